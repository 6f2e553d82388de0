"""AV: explanations of fixed length, per second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from nla_engine.bench import baselines
from nla_engine.bench.limits import generate_seconds
from nla_engine.bench.report import Line
from nla_engine.bench.session import Prepared, Session, expect
from nla_engine.bench.shapes import MARKER, merged, twin
from nla_engine.bench.timing import seconds
from nla_engine.bench.workload import texts, vectors
from nla_engine.models.injection import Injection
from nla_engine.models.load import LanguageModel
from nla_engine.models.sidecar import Sidecar
from nla_engine.ops.backends import Kernels
from nla_engine.ops.fp8 import has_fp8
from nla_engine.roundtrip.verbalize import Verbalizer

#: The prompt of the released Qwen2.5-7B pair: 111 tokens, the marker, 13 tokens.
BEFORE, AFTER = 111, 13
PROMPT = BEFORE + 1 + AFTER
_REPLACED = Injection(scale=150.0)
_BRIEF_TOKENS = 8
#: How nanoNLA and EasyNLA inject, and the rank of their adapters.
_ADDED = Injection(1, adds=True, norm_match=True)
_RANK = 128


def run(session: Session) -> None:
    """One case, the same in fp8, with other injections and weights, its set-up time, and the baseline."""
    sizes = session.sizes
    slots = min(sizes.av_slots, sizes.vectors)
    case = f"{sizes.vectors} vectors {BEFORE}+{PROMPT - BEFORE}+{sizes.av_new} B={slots}"
    line = session.measure(
        "verbalize",
        case,
        "vectors/s",
        _explained(session, sizes.vectors, sizes.av_new, slots),
        limit=limit(session),
        detail=lambda p50: f"{p50 * sizes.av_new:,.0f} tok/s",
    )
    if has_fp8(session.device):
        session.measure(
            "verbalize",
            f"{case} fp8",
            "vectors/s",
            _explained(session, sizes.vectors, sizes.av_new, slots, "fp8"),
            against=line,
        )
    others = {
        "add@1, norm match": _explained(session, sizes.vectors, sizes.av_new, slots, how=_ADDED),
        f"merged adapter of rank {_RANK}": _merged(session, sizes.vectors, sizes.av_new, slots),
    }
    for name, prepared in others.items():
        session.measure("verbalize", f"{case} {name}", "vectors/s", prepared, against=line)
    session.measure("verbalize", "explain set-up", "s", _set_up(session, slots))
    if session.settings.baseline == "hf":
        batch = min(baselines.AV_BATCH, sizes.vectors)
        session.measure(
            "verbalize",
            f"HF generate inputs_embeds B={batch} {PROMPT}+{sizes.av_new}",
            "vectors/s",
            baselines.verbalizer(session, batch, PROMPT, BEFORE, sizes.av_new),
            warmups=1,
            repeats=1,
        )
    if line is not None:
        line.compare(*peers(session))


def peers(session: Session) -> list[Line]:
    """The baselines that did the same work in this run, as far as they were measured."""
    return [line for name in ("HF ", "vLLM ") if (line := session.find("verbalize", name))]


def limit(session: Session) -> float:
    """Vectors per second; the prompt before the marker is read once for all."""
    sizes = session.sizes
    count, new = sizes.vectors, sizes.av_new
    slots = min(sizes.av_slots, count)
    return count / generate_seconds(session.size, session.hardware, count, PROMPT, new, slots, shared=BEFORE)


def verbalizer_of(
    lm: LanguageModel,
    layer: int,
    precision: str = "full",
    how: Injection = _REPLACED,
) -> Verbalizer:
    """A model as an AV."""
    sidecar = Sidecar(
        path=Path("bench-av"),
        role="av",
        d_model=lm.d_model,
        layer=layer,
        injection=how,
        template=(texts([BEFORE])[0], texts([AFTER])[0]),
        marker=MARKER,
        marker_id=lm.tokenizer.convert_tokens_to_ids(MARKER),
        left_id=None,
        right_id=None,
        suffix_ids=(),
    )
    return Verbalizer(lm, sidecar, kernels=Kernels(precision=precision))


def explained(session: Session, verbalizer: Verbalizer, count: int, new: int, slots: int) -> float:
    """Seconds for `count` vectors."""
    rows = vectors(count, session.lm.d_model)
    counts: list[int] = []

    def explain() -> None:
        written = verbalizer.explain(enumerate(rows), max_new_tokens=new, batch_size=slots)
        counts.extend(explanation.n_tokens for explanation in written)

    elapsed = seconds(explain, session.device)
    expect("explanations", len(counts), count)
    expect("tokens generated", sum(counts), count * new)
    return elapsed


@contextmanager
def _explained(
    session: Session, count: int, new: int, slots: int, precision: str = "full", how: Injection = _REPLACED
) -> Iterator[Prepared]:
    yield _prepared(
        session, verbalizer_of(twin(session.lm), session.layer, precision, how), count, new, slots
    )


@contextmanager
def _merged(session: Session, count: int, new: int, slots: int) -> Iterator[Prepared]:
    with TemporaryDirectory(dir=session.directory) as directory:
        lm = merged(session.lm, Path(directory), _RANK)
    yield _prepared(session, verbalizer_of(lm, session.layer), count, new, slots)


def _prepared(session: Session, verbalizer: Verbalizer, count: int, new: int, slots: int) -> Prepared:
    return Prepared(
        lambda: count / explained(session, verbalizer, count, new, slots),
        lambda: explained(session, verbalizer, slots, min(_BRIEF_TOKENS, new), slots),
    )


@contextmanager
def _set_up(session: Session, slots: int) -> Iterator[Prepared]:
    """Seconds for one explanation of one token, with the same slots."""
    verbalizer = verbalizer_of(twin(session.lm), session.layer)
    yield Prepared(lambda: explained(session, verbalizer, 1, 1, slots))
