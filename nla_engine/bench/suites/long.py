"""Replies of very different lengths, up to far above the mean, each given by the bench; with and without capture."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from nla_engine.bench.limits import long_seconds
from nla_engine.bench.session import Prepared, Session, expect
from nla_engine.bench.timing import seconds
from nla_engine.bench.workload import document_lengths, open_generator, prompt_file, requests, run_all
from nla_engine.capture.load import load_inputs
from nla_engine.capture.run import GENERATING, CaptureJob
from nla_engine.codec.rows import Codec
from nla_engine.config import CaptureOptions
from nla_engine.engine.request import Request
from nla_engine.engine.slots import default_room

_BRIEF_TOKENS = 8
#: The part of the free disk that a store may take.
_DISK_PART = 0.9


def reply_lengths(session: Session) -> list[int]:
    """Of each request its new tokens: lognormal, the same every time."""
    sizes = session.sizes
    return document_lengths(sizes.long_requests, sizes.long_mean, sizes.long_most)


def run(session: Session) -> None:
    """Without a tap, one layer and all layers to disk, and one layer with the longest reply first."""
    sizes, lengths, layer = session.sizes, reply_lengths(session), session.layer
    count, prompt, tokens = len(lengths), sizes.long_prompt, sum(lengths)
    limit = tokens / long_seconds(session.size, session.hardware, prompt, lengths)
    name = f"{count} x {prompt}+{min(lengths)}-{max(lengths)} (mean {tokens / count:.0f})"
    session.measure("long", f"{name} no tap", "tok/s", _generated(session, lengths), limit=limit, warmups=0)
    one, every = (layer,), tuple(range(len(session.lm.blocks)))
    longest_first = sorted(lengths, reverse=True)
    for what, layers, order in (
        (f"layer {layer} to disk", one, lengths),
        (f"layer {layer} to disk, longest first", one, longest_first),
        ("all layers to disk", every, lengths),
    ):
        if not _has_room(session, layers, tokens, f"{name} {what}"):
            continue
        told: dict[str, int] = {}
        line = session.measure(
            "long",
            f"{name} {what}",
            "tok/s",
            _captured(session, layers, order, told),
            limit=limit,
            warmups=0,
            detail=lambda p50, told=told: f"stepped back {told.get('stepped_back', 0)} times",  # type: ignore[misc]
        )
        if line is not None:
            line.compare(session.find("long", "vLLM "))


def _has_room(session: Session, layers: Sequence[int], rows: int, case: str) -> bool:
    """Whether the disk holds these rows. If not, the case is named as skipped."""
    needed = rows * len(layers) * Codec.named("int8", session.d_model).row_bytes
    if needed < _DISK_PART * shutil.disk_usage(session.directory).free:
        return True
    session.skipped.append(f"long: {case}: it needs {needed / 1e9:,.0f} GB of disk")
    return False


@contextmanager
def _generated(session: Session, lengths: Sequence[int]) -> Iterator[Prepared]:
    """Generation alone, the generator made beforehand. New tokens per second."""
    lm, prompt = session.lm, session.sizes.long_prompt
    length = prompt + max(lengths)
    room = default_room(lm, length, most=_slots(session))
    work = requests(lm, [prompt] * len(lengths), lengths)
    brief = requests(lm, [prompt] * room.slots, [_BRIEF_TOKENS] * room.slots)
    with open_generator(
        lm, slots=room.slots, length=length, new_tokens=max(lengths), blocks=room.blocks
    ) as generator:
        run_all(generator, brief)
        yield Prepared(
            lambda: sum(lengths) / seconds(lambda: run_all(generator, work), lm.device),
            lambda: run_all(generator, brief),
        )


def _slots(session: Session) -> int:
    return min(session.sizes.slots, session.sizes.long_requests)


class _GivenLengths(CaptureJob):
    """A capture whose replies have these lengths. They are at most what its options allow."""

    lengths: Sequence[int] = ()

    def _requests(self, *given: Any) -> Iterator[Request]:
        for request in super()._requests(*given):
            yield replace(request, max_new_tokens=self.lengths[request.id])


@contextmanager
def _captured(
    session: Session, layers: tuple[int, ...], lengths: Sequence[int], told: dict[str, int]
) -> Iterator[Prepared]:
    """A capture to disk, timed from its first prefill to its last commit. New tokens per second. told: of the last."""
    prompts = prompt_file(session.directory / "prompts.txt", [session.sizes.long_prompt] * len(lengths))
    yield Prepared(lambda: sum(lengths) / _capture(session, prompts, layers, lengths, told))


def _capture(
    session: Session, prompts: Path, layers: tuple[int, ...], lengths: Sequence[int], told: dict[str, int]
) -> float:
    """Seconds of one capture. Its store is removed afterwards."""
    out = session.directory / "long.zarr"
    given = session.settings.batch_sizes
    options = CaptureOptions(
        model=session.lm.name,
        prompts=(prompts,),
        layer=layers,
        out=str(out),
        max_new_tokens=max(lengths),
        batch_size=max(given) if given else None,
        chat=False,
        overwrite=True,
    )
    try:
        job = _GivenLengths(options, *load_inputs(options, session.lm))
        job.lengths = lengths
        summary = job.run()
    finally:
        shutil.rmtree(out, ignore_errors=True)
    expect("tokens generated", summary.tokens_generated, sum(lengths))
    expect("rows stored", summary.rows, sum(lengths))
    told["stepped_back"] = summary.stepped_back
    return summary.seconds_by_phase[GENERATING]
