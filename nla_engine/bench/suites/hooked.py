"""The whole of a capture against what one would write by hand: `generate` with a hook that keeps the rows (`--model`).

Short requests, greedy, in one batch each way. Counted is processor time, because other programs use a CPU too, and all
of it: calibration, checks, codec and writing on our side, padding and tokenizing on the other. Each repeat runs both.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from nla_engine.bench.chats import chats
from nla_engine.bench.report import Line
from nla_engine.bench.session import Prepared, Session
from nla_engine.bench.suites.real import until_the_end
from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions
from nla_engine.models.decoder import block_output
from nla_engine.models.load import LanguageModel, load_model

BATCH, NEW = 30, 96
#: Characters of the longest request.
_SHORT = 120
UNIT = "tok/CPU-s"


def run(session: Session) -> None:
    """One layer, every position."""
    settings = session.settings
    assert settings.model is not None  # Settings checks it
    count, new = settings.requests or BATCH, settings.new_tokens or NEW
    lm = load_model(settings.model, device=session.device, dtype=settings.dtype)
    layer = len(lm.blocks) * 5 // 7 if settings.layer is None else settings.layer
    lm.check_layer(layer)
    theirs: list[float] = []
    case = f"{count} short chats, up to {new} new tokens, layer {layer}, loading left out"
    line = session.measure("hooked", case, UNIT, _both(session, lm, layer, count, new, theirs), warmups=0)
    if line is not None and theirs:
        hooked = Line("hooked", f"HF generate with a hook B={count} up to {new}", UNIT, theirs, None)
        session.record(hooked)
        line.compare(hooked)


@contextmanager
def _both(
    session: Session, lm: LanguageModel, layer: int, count: int, new: int, theirs: list[float]
) -> Iterator[Prepared]:
    """`run_capture` with a loaded model; then plain `generate`, whose figure is added to `theirs`."""
    texts = [text for text in chats(8 * count) if len(text) < _SHORT][:count]
    prompts = session.directory / "short.jsonl"
    records = ({"messages": [{"role": "user", "content": text}]} for text in texts)
    prompts.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    options = CaptureOptions(
        model=lm.name,
        prompts=(prompts,),
        layer=(layer,),
        out=str(session.directory / "hooked.zarr"),
        max_new_tokens=new,
        positions="all",
        batch_size=count,
        overwrite=True,
    )

    def once() -> float:
        ours = _rate(lambda: run_capture(options, lm=lm).tokens_generated)
        theirs.append(_rate(lambda: _generate(lm, texts, layer, new)))
        return ours

    yield Prepared(once)


def _rate(work: Callable[[], int]) -> float:
    """Tokens per second of this process's processor time."""
    started = time.process_time()
    return work() / (time.process_time() - started)


@torch.inference_mode()
def _generate(lm: LanguageModel, texts: list[str], layer: int, new: int) -> int:
    """Plain `generate` of one batch, padded on the left; a hook copies every row. Generated tokens."""
    lm.model.set_attn_implementation("sdpa")
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token  # an id that the embedding surely has; padding is masked
    read = tokenizer.apply_chat_template(
        [[{"role": "user", "content": text}] for text in texts],
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    ).to(lm.device)
    rows: list[torch.Tensor] = []
    hook = lm.blocks[layer].register_forward_hook(
        lambda _module, _inputs, output: rows.append(block_output(output).float().cpu().clone())
    )
    try:
        out = lm.model.generate(
            **read, max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
    finally:
        hook.remove()
    return until_the_end(out[:, read["input_ids"].shape[1] :], lm.eos_ids)
