"""A real chat model (`--model`): made-up requests, replies that end by themselves, every position kept.

With `--baseline hf` it is compared with plain `generate` of the same requests without capture, padded on the left, in
batches of several sizes. A sample of each capture's last store is recomputed by plain transformers
(`nla_engine.capture.audit`).
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from nla_engine.bench.chats import chat_file, chats
from nla_engine.bench.session import Prepared, Session, WrongWork
from nla_engine.capture.audit import audit
from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions
from nla_engine.models.load import LanguageModel, load_model
from nla_engine.store import CaptureStore

#: Batches of plain `generate`: the fastest is what the capture is compared with.
HF_BATCHES = (1024, 256, 64)
STORE = "real.zarr"
REQUESTS, NEW = {"cpu": 4, "cuda": 2048}, {"cpu": 8, "cuda": 256}


def run(session: Session) -> None:
    """One layer and all of them to disk, then plain `generate`."""
    settings = session.settings
    assert settings.model is not None  # Settings checks it
    kind = "cuda" if session.device.type == "cuda" else "cpu"
    count, new = settings.requests or REQUESTS[kind], settings.new_tokens or NEW[kind]
    lm = load_model(settings.model, device=session.device, dtype=settings.dtype)
    one = len(lm.blocks) * 5 // 7 if settings.layer is None else settings.layer
    lm.check_layer(one)
    ours = []
    for what, layers in ((f"layer {one}", (one,)), ("all layers", tuple(range(len(lm.blocks))))):
        case = f"{count} chats, up to {new} new tokens, all positions, {what} to disk"
        line = session.measure("real", case, "tok/s", _captured(session, lm, layers, count, new))
        if line is not None:
            ours.append(line)
            checks = _audited(session, lm)
            session.measure("real", f"verify --model, {what}", "checks passed", checks, warmups=0, repeats=1)
    theirs = [
        session.measure(
            "real",
            f"HF generate, no capture B={batch} up to {new}",
            "tok/s",
            _generated(session, lm, batch, count, new),
            warmups=0,
            repeats=1,
        )
        for batch in HF_BATCHES
        if settings.baseline == "hf" and (batch == HF_BATCHES[-1] or batch <= count)
    ]
    for line in ours:
        line.compare(*theirs)


@contextmanager
def _captured(
    session: Session, lm: LanguageModel, layers: tuple[int, ...], count: int, new: int
) -> Iterator[Prepared]:
    """`run_capture` to disk, which leaves the last store there. Generated tokens per second."""
    options = CaptureOptions(
        model=lm.name,
        prompts=(chat_file(session.directory / "chats.jsonl", count),),
        layer=layers,
        out=str(session.directory / STORE),
        max_new_tokens=new,
        positions="all",
        batch_size=max(session.settings.batch_sizes, default=None),
        overwrite=True,
    )
    yield Prepared(lambda: run_capture(options, lm=lm).tokens_per_second)


@contextmanager
def _audited(session: Session, lm: LanguageModel) -> Iterator[Prepared]:
    """`verify --model` of the store that a capture left, which is then removed. The number of checks; all must pass."""
    path = session.directory / STORE

    def once() -> float:
        checks = audit(CaptureStore.open(path), lm)
        failed = [f"{check.name} ({check.detail})" for check in checks if not check.ok]
        if failed:
            raise WrongWork("; ".join(failed))
        return len(checks)

    try:
        yield Prepared(once)
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _generated(session: Session, lm: LanguageModel, batch: int, count: int, new: int) -> Iterator[Prepared]:
    """Greedy `generate` of the same requests, the longest first so that little is padded, tokenized beforehand.

    Tokens per second, counted up to the end of each reply.
    """
    lm.model.set_attn_implementation("sdpa")
    tokenizer = copy.deepcopy(lm.tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token  # an id that the embedding surely has; padding is masked
    messages = [[{"role": "user", "content": text}] for text in sorted(chats(count), key=len, reverse=True)]
    batches = [
        tokenizer.apply_chat_template(
            messages[start : start + batch],
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
        ).to(lm.device)
        for start in range(0, count, batch)
    ]

    def run(part: Sequence[Any], new: int) -> int:
        generated = 0
        for read in part:
            out = lm.model.generate(
                **read, max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
            generated += until_the_end(out[:, read["input_ids"].shape[1] :], lm.eos_ids)
        return generated

    def once() -> float:
        started = time.perf_counter()
        generated = run(batches, new)  # ends with a number on the host
        return generated / (time.perf_counter() - started)

    with torch.inference_mode():
        run(batches[:1], min(new, 8))
        yield Prepared(once)


def until_the_end(replies: torch.Tensor, ends: Sequence[int]) -> int:
    """Tokens of replies [n, steps] up to the first of `ends` in each, that one included."""
    ended = torch.isin(replies, torch.tensor(ends, device=replies.device)).int()
    return int((ended.cumsum(1) - ended == 0).sum())
