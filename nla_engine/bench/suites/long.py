"""Replies of very different lengths, up to far above the mean, each given by the bench; with and without capture."""

from __future__ import annotations

import shutil
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from nla_engine.bench.limits import long_seconds
from nla_engine.bench.session import Prepared, Session, expect
from nla_engine.bench.timing import seconds
from nla_engine.bench.workload import document_lengths, open_generator, prompt_file, requests, run_all
from nla_engine.capture.load import load_inputs
from nla_engine.capture.run import GENERATING, CaptureJob
from nla_engine.capture.tap import RowTap
from nla_engine.codec.rows import Codec
from nla_engine.config import CaptureOptions
from nla_engine.engine.choose import AnyGenerator
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
    """One layer to disk, also with the longest reply first, nothing tapped, and all layers to disk.

    All layers take much disk: only as many of the requests run as fit it, beside the same ones with nothing tapped.
    """
    lengths, layer = reply_lengths(session), session.layer
    count = len(lengths)
    one, every = (layer,), tuple(range(len(session.lm.blocks)))
    _measure_capture(session, lengths, one, f"layer {layer} to disk")
    longest = lengths.index(max(lengths))
    first = [lengths[longest], *lengths[:longest], *lengths[longest + 1 :]]
    _measure_capture(session, first, one, f"layer {layer} to disk, longest first")
    _measure_generation(session, lengths)
    fitting = _fitting(session, every, lengths)
    if fitting and fitting < count:
        _measure_generation(session, lengths[:fitting])
    _measure_capture(session, lengths[:fitting], every, "all layers to disk")


def _name(session: Session, lengths: Sequence[int]) -> str:
    mean = sum(lengths) / len(lengths)
    return f"{len(lengths)} x {session.sizes.long_prompt}+{min(lengths)}-{max(lengths)} (mean {mean:.0f})"


def _limit(session: Session, lengths: Sequence[int]) -> float:
    """New tokens per second."""
    return sum(lengths) / long_seconds(session.size, session.hardware, session.sizes.long_prompt, lengths)


def _measure_generation(session: Session, lengths: Sequence[int]) -> None:
    session.measure(
        "long",
        f"{_name(session, lengths)} no tap",
        "tok/s",
        _generated(session, lengths),
        limit=_limit(session, lengths),
        warmups=0,
    )


def _measure_capture(session: Session, lengths: Sequence[int], layers: tuple[int, ...], what: str) -> None:
    """A case is named as skipped if the disk cannot hold one of its sequences."""
    if not lengths:
        session.skipped.append(f"long: {what}: the disk has too little room")
        return
    told: dict[str, int] = {}
    line = session.measure(
        "long",
        f"{_name(session, lengths)} {what}",
        "tok/s",
        _captured(session, layers, lengths, told),
        limit=_limit(session, lengths),
        warmups=0,
        detail=lambda p50: (
            f"stepped back {told['stepped_back']} times, staging on the device {told['staging'] / 2**30:.2f} GiB"
        ),
    )
    if line is not None:
        line.compare(session.find("long", "vLLM "))


def _fitting(session: Session, layers: Sequence[int], lengths: Sequence[int]) -> int:
    """How many of these requests the disk holds the rows of."""
    row = len(layers) * Codec.named("int8", session.d_model).row_bytes
    free = _DISK_PART * shutil.disk_usage(session.directory).free
    return bisect_right(list(accumulate(size * row for size in lengths)), free)


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
    #: Bytes of rows on the device.
    staging = 0

    def _from_here(self, generator: AnyGenerator | None, *given: Any) -> Any:
        assert generator is not None
        tap = generator.runner.tap
        assert isinstance(tap, RowTap)
        self.staging = tap.staging.nbytes
        return super()._from_here(generator, *given)

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
    told |= {"stepped_back": summary.stepped_back, "staging": job.staging}
    return summary.seconds_by_phase[GENERATING]
