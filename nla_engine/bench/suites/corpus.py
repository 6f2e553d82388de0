"""Capture from existing text: packed prefill up to the tapped block, with rows on the host, then with rows on disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from nla_engine.bench import baselines
from nla_engine.bench.limits import prefill_seconds
from nla_engine.bench.session import Prepared, Session, expect
from nla_engine.bench.timing import seconds
from nla_engine.bench.workload import document_lengths, open_generator, prompt_file, requests, run_all
from nla_engine.capture.run import READING, run_capture
from nla_engine.config import CaptureOptions

#: Slots of the run without a disk: more than one prefill pass can fill.
_SLOTS = 64
_BRIEF_DOCUMENTS = 16


def run(session: Session) -> None:
    """Without a disk, then the whole capture."""
    sizes, layer = session.sizes, session.layer
    lengths = document_lengths(sizes.documents, sizes.mean, sizes.longest)
    limit = 1 / prefill_seconds(session.size, session.hardware, 1, layer + 1)
    name = f"{len(lengths)} documents mean {sum(lengths) / len(lengths):.0f} layer {layer}"
    session.measure("corpus", f"{name} to host", "tok/s", _read(session, lengths), limit=limit)
    line = session.measure(
        "corpus",
        f"{name} to disk",
        "tok/s",
        _captured(session, lengths),
        limit=limit,
        warmups=1,
    )
    if session.settings.baseline == "hf":
        batch = baselines.CORPUS_BATCH
        theirs = session.measure(
            "corpus",
            f"HF whole model padded B={batch} fp32 to host",
            "tok/s",
            baselines.padded_extractor(session, lengths),
            warmups=1,
            repeats=min(session.settings.repeats, 2),
        )
        if line is not None:
            line.compare(theirs)


@contextmanager
def _read(session: Session, lengths: list[int]) -> Iterator[Prepared]:
    """Reading and encoding, rows dropped on the host. Tokens per second."""
    lm = session.lm.truncated(session.layer)
    work = requests(lm, lengths, [0] * len(lengths))
    with open_generator(
        lm,
        slots=min(_SLOTS, len(lengths)),
        length=max(lengths),
        new_tokens=0,
        layers=(session.layer,),
        positions="all",
    ) as generator:

        def once() -> float:
            rows = 0

            def read() -> None:
                nonlocal rows
                _, rows = run_all(generator, work)

            elapsed = seconds(read, lm.device)
            expect("rows", rows, sum(lengths))
            return rows / elapsed

        yield Prepared(once, lambda: run_all(generator, work[:_BRIEF_DOCUMENTS]))


@contextmanager
def _captured(session: Session, lengths: list[int]) -> Iterator[Prepared]:
    """`run_capture` of a corpus to disk, in tokens per second. It chooses the number of slots unless one is given."""
    given = session.settings.batch_sizes
    out = session.directory / "corpus.zarr"

    def once() -> float:
        options = CaptureOptions(
            model=session.lm.name,
            prompts=(prompts,),
            layer=(session.layer,),
            out=str(out),
            corpus=True,
            batch_size=max(given) if given else None,
            overwrite=True,
        )
        try:
            summary = run_capture(options, lm=session.lm)
        finally:
            shutil.rmtree(out, ignore_errors=True)
        expect("rows stored", summary.rows, sum(lengths))
        return summary.rows / summary.seconds_by_phase[READING]

    prompts = prompt_file(session.directory / "corpus.txt", lengths)
    yield Prepared(once)
