"""Reading prompts: a file of documents to token ids, at two sizes, compared with the tokenizer called text by text.

A capture does this while the weights load. Tokens per second of all of it: file, records, ids, fingerprint.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from nla_engine.bench.session import Prepared, Session, expect
from nla_engine.bench.workload import document_lengths, prompt_file, texts
from nla_engine.models.prompts import read_prompts

#: Documents of the two sizes, as multiples of those of suite corpus.
_TIMES = (16, 128)


def run(session: Session) -> None:
    """The small file, the large one, and the tokenizer alone on the small one."""
    small, large = (
        document_lengths(session.sizes.documents * times, session.sizes.mean, session.sizes.longest)
        for times in _TIMES
    )
    alone = session.measure(
        "prompts", f"tokenizer text by text, {len(small)} documents", "tok/s", _one_by_one(session, small)
    )
    for lengths in (small, large):
        name = f"{len(lengths)} documents mean {sum(lengths) / len(lengths):.0f}"
        line = session.measure("prompts", name, "tok/s", _read(session, lengths))
        if line is not None:
            line.compare(alone)


@contextmanager
def _read(session: Session, lengths: list[int]) -> Iterator[Prepared]:
    path = prompt_file(session.directory / "documents.txt", lengths)

    def once() -> float:
        started = time.perf_counter()
        found = read_prompts(path, session.lm.tokenizer, chat=False)
        elapsed = time.perf_counter() - started
        expect("tokens", int(found.sizes.sum()), sum(lengths))
        return sum(lengths) / elapsed

    yield Prepared(once)
    path.unlink()


@contextmanager
def _one_by_one(session: Session, lengths: list[int]) -> Iterator[Prepared]:
    written = texts(lengths)

    def once() -> float:
        started = time.perf_counter()
        tokens = sum(len(session.lm.tokenizer.encode(text)) for text in written)
        elapsed = time.perf_counter() - started
        expect("tokens", tokens, sum(lengths))
        return tokens / elapsed

    yield Prepared(once)
