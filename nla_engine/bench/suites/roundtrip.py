"""AV and AR on one device, over a store: stored vectors that are explained and scored, per second."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from nla_engine.bench.report import Line
from nla_engine.bench.session import Prepared, Session, expect
from nla_engine.bench.shapes import twin
from nla_engine.bench.suites import reconstruct, verbalize
from nla_engine.bench.timing import free_memory
from nla_engine.bench.workload import encoded_sequences, write_store
from nla_engine.codec.rows import Codec
from nla_engine.config import RoundtripOptions
from nla_engine.ops.fp8 import has_fp8
from nla_engine.roundtrip.run import run_roundtrip


def run(session: Session) -> None:
    """One case; its parts are the suites verbalize and reconstruct."""
    sizes = session.sizes
    prompt = reconstruct.AROUND + sizes.av_new
    case = f"{sizes.vectors} vectors {verbalize.PROMPT}+{sizes.av_new} and {prompt}"
    line = session.measure(
        "roundtrip",
        case,
        "vectors/s",
        _explained(session),
        limit=_both(verbalize.limit(session), reconstruct.limit(session, prompt)),
    )
    if has_fp8(session.device):
        session.measure("roundtrip", f"{case} fp8", "vectors/s", _explained(session, "fp8"), against=line)
    if line is not None:
        _compare(session, line)


def _compare(session: Session, line: Line) -> None:
    """Compare with the two halves, ours and the baselines', as far as they were measured in this run."""
    ours = f"{session.sizes.vectors} "
    av, ar = session.find("verbalize", ours), session.find("reconstruct", ours)
    if av is not None and ar is not None:
        beyond = 100 * (_both(av.p50, ar.p50) / line.p50 - 1)
        session.record(Line("roundtrip", f"{line.case}: longer than AV and AR in turn", "%", [beyond]))
    theirs = session.find("reconstruct", "HF ")
    if theirs is not None:
        line.compare(*[_in_turn(peer, theirs) for peer in verbalize.peers(session)])


def _in_turn(av: Line, ar: Line) -> Line:
    """A baseline's AV, then a baseline's AR. Both lines begin with the program's name."""
    name = f"{av.case.split()[0]} AV, then {ar.case.split()[0]} AR"
    return Line("roundtrip", name, "vectors/s", [_both(av.p50, ar.p50)])


def _both(av: float, ar: float) -> float:
    """Rate of two kinds of work done one after the other."""
    return 1 / (1 / av + 1 / ar)


@contextmanager
def _explained(session: Session, precision: str = "full") -> Iterator[Prepared]:
    sizes, store = session.sizes, session.directory / "roundtrip.zarr"
    codec = Codec.named("int8", session.lm.d_model)
    write_store(store, codec, session.layer, encoded_sequences(codec, session.layer, sizes.vectors))
    options = RoundtripOptions(
        store=str(store),
        av="bench-av",
        ar="bench-ar",
        out=session.directory / "explained.parquet",
        limit=sizes.vectors,
        max_new_tokens=sizes.av_new,
        batch_size=min(sizes.av_slots, sizes.vectors),
        device=str(session.device),
        overwrite=True,
        precision=precision,
    )

    def once() -> float:
        free_memory(session.device)  # of the run before
        summary = run_roundtrip(
            options,
            verbalizer=verbalize.verbalizer_of(twin(session.lm), session.layer, precision),
            reconstructor=reconstruct.reconstructor_of(session.lm, session.layer, precision),
        )
        expect("explanations", summary.explanations, sizes.vectors)
        expect(
            "tokens generated", round((summary.n_tokens or 0) * sizes.vectors), sizes.vectors * sizes.av_new
        )
        return summary.rows_per_second

    yield Prepared(once)
