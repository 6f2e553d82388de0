"""The round trip on one GPU and on several of the machine, the same stored vectors: how much faster several are.

As in the suite `parallel`, each run is the command itself, which reads AV and AR of random weights from disk. The rate
is that of explaining, scoring and writing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import AddedToken

from nla_engine.bench.session import Session, expect
from nla_engine.bench.shapes import MARKER
from nla_engine.bench.suites.parallel import counts, give_up_model, measure_each, summary_of
from nla_engine.bench.suites.reconstruct import random_head
from nla_engine.bench.suites.verbalize import AFTER, BEFORE
from nla_engine.bench.workload import LETTERS, encoded_sequences, texts, write_store
from nla_engine.codec.rows import Codec
from nla_engine.errors import RequestError
from nla_engine.models.cut import cut_config, is_behind
from nla_engine.models.load import LanguageModel
from nla_engine.models.sidecar import SIDECAR

#: Vectors of a run, unless --requests says how many: 32 times what an AV writes at once on a GPU.
VECTORS = {"cpu": 8, "cuda": 32 * 1024}
#: Around an explanation. Each letter is a token; a space would be none for a tokenizer of bytes.
_TEMPLATE = ("<text>", "</text>-<read>")


def run(session: Session) -> None:
    """One process, two, and all. On a machine with one GPU there is nothing to compare."""
    if not counts(session, "parallel-roundtrip"):
        return
    count, new = session.settings.requests or VECTORS[session.device.type], session.sizes.av_new
    store, av, ar = _saved(session, count)
    out = session.directory / "parallel.parquet"

    def explained(processes: int, told: dict[str, Any]) -> float:
        """Vectors per second."""
        given = ["roundtrip", store, "--av", av, "--ar", ar, "--out", out, "--limit", count]
        told |= summary_of(session, [*given, "--max-new-tokens", new], processes)
        expect("explanations", told["explanations"], count)
        expect("tokens generated", round(told["n_tokens"] * count), count * new)
        return float(told["rows_per_second"])

    case = f"{count} vectors, {BEFORE}+{AFTER + 1} prompt and {new} new tokens, scored"
    measure_each(session, "parallel-roundtrip", case, "vectors/s", explained)


def _saved(session: Session, count: int) -> tuple[Path, Path, Path]:
    """A store of random vectors, and checkpoints of an AV and an AR, whose memory is free afterwards."""
    lm, layer = session.lm, session.layer
    store, av, ar = (session.directory / f"parallel-{name}" for name in ("vectors.zarr", "av", "ar"))
    codec = Codec.named("int8", lm.d_model)
    write_store(store, codec, layer, encoded_sequences(codec, layer, count))
    _write_letters_only(lm)
    # A tokenizer that is read again may split unknown characters into bytes; it leaves added ones whole.
    lm.tokenizer.add_tokens([AddedToken(MARKER, special=False, normalized=False)])
    about = {"kind": "nla_model", "d_model": lm.d_model, "extraction_layer_index": layer}
    marker = {"injection_char": MARKER, "injection_token_id": lm.tokenizer.convert_tokens_to_ids(MARKER)}
    template = "{injection_char}".join((texts([BEFORE])[0], texts([AFTER])[0]))
    lm.model.save_pretrained(av)
    of_av = {"role": "av", "extraction": {"injection_scale": 150.0}, "tokens": marker}
    _finish(lm, av, {**about, **of_av, "prompt_templates": {"av": template}})
    _save_first(lm, av, layer + 1, ar)
    of_ar = {"role": "ar", "extraction": {"injection_scale": None}, "tokens": {}}
    _finish(lm, ar, {**about, **of_ar, "prompt_templates": {"ar": "{explanation}".join(_TEMPLATE)}})
    save_file({"weight": random_head(lm.d_model)}, ar / "value_head.safetensors")
    del lm
    give_up_model(session)
    return store, av, ar


def _save_first(lm: LanguageModel, whole: Path, blocks: int, directory: Path) -> None:
    """A checkpoint of the first blocks only. whole: that of all."""
    config = cut_config(whole, blocks, remote_code=False)
    if config is None:
        raise RequestError(
            f"{lm.name}: its first {blocks} blocks are no model of their own: choose another --shape"
        )
    first = {name: value for name, value in lm.model.state_dict().items() if not is_behind(name, blocks)}
    lm.model.save_pretrained(directory, state_dict=first)
    config.save_pretrained(directory)


@torch.inference_mode()
def _write_letters_only(lm: LanguageModel) -> None:
    """Let the head give other tokens no more than 0: a text of n tokens is then read again as n tokens."""
    head: Any = lm.head
    letters = lm.tokenizer.convert_tokens_to_ids(list(LETTERS))
    kept = head.weight[letters].clone()
    head.weight.zero_()
    head.weight[letters] = kept


def _finish(lm: LanguageModel, directory: Path, sidecar: dict[str, Any]) -> None:
    lm.tokenizer.save_pretrained(directory)
    text = yaml.safe_dump(sidecar, allow_unicode=True, sort_keys=False)
    (directory / SIDECAR).write_text(text, encoding="utf-8")
