"""Generation with and without capture: whole jobs, from the first prompt to the last byte on disk; steady decode."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nla_engine.bench import baselines
from nla_engine.bench.limits import decode_step_seconds, generate_seconds
from nla_engine.bench.report import Line
from nla_engine.bench.session import Prepared, Session, expect
from nla_engine.bench.timing import seconds
from nla_engine.bench.workload import open_generator, prompt_file, ragged_lengths, requests, run_all
from nla_engine.capture.run import GENERATING, run_capture
from nla_engine.capture.setup import MAX_PREFILL_TOKENS
from nla_engine.config import CaptureOptions
from nla_engine.engine.scheduler import STEPS_BETWEEN_POLLS
from nla_engine.ops.backends import Kernels
from nla_engine.sites import PARTS, RESID_POST, Site, crossed

#: Steps before the timed ones, so that every prompt has been read.
_LEAD = 32
_BRIEF_TOKENS = 8
#: Tokens listed beside each row, where that is measured.
_LIKELIEST = 10
#: With fewer sequences, steps cannot be timed between the ends of two of them.
_FEW = 4


def run(session: Session) -> None:
    """The jobs, then every batch size: steady decode, or a whole job of few sequences."""
    _job(session)
    _ragged_job(session)
    for batch in session.sizes.batches:
        measure = _few if batch < _FEW else _steady_batch
        measure(session, batch)


# ---- a whole job ----


def _job(session: Session) -> None:
    sizes, layer = session.sizes, session.layer
    count, prompt, new = sizes.requests, sizes.prompt, sizes.new
    slots = min(sizes.slots, count)
    name = f"{count} x {prompt}+{new}"
    limit = count * new / generate_seconds(session.size, session.hardware, count, prompt, new, slots)
    session.measure("generate", f"{name} no tap", "tok/s", _generated(session, count, slots), limit=limit)
    ours = session.measure(
        "generate",
        f"{name} layer {layer} to disk",
        "tok/s",
        _captured(session, (layer,), [prompt] * count, new, slots),
        limit=limit,
    )
    theirs = [session.find("generate", "vLLM ")]
    if session.settings.baseline == "hf":
        batch = min(baselines.GENERATE_BATCH, count)
        theirs += [
            session.measure(
                "generate",
                f"HF generate {what} B={batch} {prompt}+{new}",
                "tok/s",
                prepare(session, batch, prompt, new),
                warmups=1,
                repeats=min(session.settings.repeats, 2),
            )
            for what, prepare in (
                ("output_hidden_states", baselines.generate_hidden_states),
                ("hook to host", baselines.generate_hook),
                ("static cache, no capture", baselines.generate_static),
            )
        ]
        library = session.measure(
            "generate",
            f"--kernels library B={batch} {prompt}+{new} layer {layer}",
            "tok/s",
            _generated(session, batch, batch, (layer,), Kernels("library")),
            warmups=1,
            repeats=min(session.settings.repeats, 2),
        )
        if library is not None:
            library.compare(session.find("generate", "HF generate hook to host"))
    if ours is not None:
        ours.compare(*theirs)


def _ragged_job(session: Session) -> None:
    """Prompts of very different lengths, in as many slots as memory allows (or --batch-size)."""
    sizes, layer, given = session.sizes, session.layer, session.settings.batch_sizes
    shortest, longest = sizes.ragged
    lengths = ragged_lengths(sizes.requests, shortest, longest)
    count, new, mean = len(lengths), sizes.new, sum(lengths) / len(lengths)
    # The limit has every request in a slot of its own: no run can have more slots.
    limit = count * new / generate_seconds(session.size, session.hardware, count, mean, new, count)
    session.measure(
        "generate",
        f"{count} x {shortest}-{longest} (mean {mean:.0f})+{new} layer {layer} to disk",
        "tok/s",
        _captured(session, (layer,), lengths, new, max(given) if given else None),
        limit=limit,
        detail=lambda p50: f"{p50 * (mean + new) / new:,.0f} tok/s read and written",
    )


def _few(session: Session, batch: int) -> None:
    """Too few sequences to time steps within a run: the whole job is timed, prompts included."""
    sizes, hardware = session.sizes, session.hardware
    prompt, new = sizes.prompt, sizes.new
    for what, layers in (("no tap", ()), (f"layer {session.layer}", (session.layer,))):
        session.measure(
            "generate",
            f"{batch} x {prompt}+{new} {what}",
            "tok/s",
            _generated(session, batch, batch, layers),
            limit=batch * new / generate_seconds(session.size, hardware, batch, prompt, new, batch),
            detail=lambda p50: f"{batch / p50 * 1e3:.3f} ms per token",
        )


@contextmanager
def _generated(
    session: Session, count: int, slots: int, layers: tuple[int, ...] = (), kernels: Kernels = Kernels()
) -> Iterator[Prepared]:
    """Generation alone, the generator made beforehand; tapped rows end on the host. New tokens per second."""
    lm, prompt, new = session.lm, session.sizes.prompt, session.sizes.new
    work = requests(lm, [prompt] * count, [new] * count)
    brief = requests(lm, [prompt] * slots, [min(_BRIEF_TOKENS, new)] * slots)
    with open_generator(
        lm,
        slots=slots,
        length=prompt + new,
        new_tokens=new,
        layers=layers,
        prompt=prompt,
        kernels=kernels,
    ) as generator:
        yield Prepared(
            lambda: count * new / seconds(lambda: run_all(generator, work), lm.device),
            lambda: run_all(generator, brief),
        )


@contextmanager
def _captured(
    session: Session, layers: tuple[int, ...], lengths: list[int], new: int, slots: int | None
) -> Iterator[Prepared]:
    """`run_capture` to disk, timed from its first prefill to its last commit. New tokens per second."""
    tokens = len(lengths) * new

    def once() -> float:
        return tokens / _capture(session, prompts, layers, new, slots, tokens)

    prompts = prompt_file(session.directory / "prompts.txt", lengths)
    yield Prepared(once)


def _capture(
    session: Session, prompts: Path, layers: tuple[int, ...], new: int, slots: int | None, tokens: int
) -> float:
    """Seconds of one capture. Its store is removed afterwards."""
    out = session.directory / "generate.zarr"
    options = CaptureOptions(
        model=session.lm.name,
        prompts=(prompts,),
        layer=layers,
        out=str(out),
        max_new_tokens=new,
        batch_size=slots,
        chat=False,
        overwrite=True,
    )
    try:
        summary = run_capture(options, lm=session.lm)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    expect("tokens generated", summary.tokens_generated, tokens)
    expect("rows stored", summary.rows, tokens)
    return summary.seconds_by_phase[GENERATING]


# ---- steady decode ----


def _steady_batch(session: Session, batch: int) -> None:
    sizes, hardware = session.sizes, session.hardware
    limit = batch / decode_step_seconds(session.size, hardware, batch, sizes.context)
    every = tuple(range(len(session.lm.blocks)))
    untapped = None
    one: tuple[Site | int, ...] = (session.layer,)
    taps: list[tuple[str, tuple[Site | int, ...], int | None]] = [
        ("no tap", (), None),
        (f"layer {session.layer}", one, None),
        (f"layer {session.layer}, log-probability of the next token", one, 0),
        (f"layer {session.layer}, next token and {_LIKELIEST} likeliest", one, _LIKELIEST),
        ("all layers", every, None),
    ]
    # Sites inside a block where a launch is the largest part of a step.
    if batch == min(each for each in sizes.batches if each >= _FEW):
        inside = crossed((session.layer,), PARTS.keys() - {RESID_POST})
        taps += [(site.label, (site,), None) for site in inside]
    for what, layers, next_token in taps:
        line = session.measure(
            "generate",
            f"steady B={batch} context {sizes.context} {what}",
            "tok/s",
            steady(session, batch, layers, next_token),
            limit=limit,
            warmups=0,
            detail=lambda p50: f"{batch / p50 * 1e3:.3f} ms/step",
        )
        if not layers:
            untapped = line
        elif line is not None and untapped is not None:
            cost = 100 * (untapped.p50 / line.p50 - 1)
            session.record(Line("generate", f"tap cost B={batch} {what}", "% of step", [cost]))


@contextmanager
def steady(
    session: Session, batch: int, layers: tuple[Site | int, ...], next_token: int | None = None
) -> Iterator[Prepared]:
    """`steps` decode steps with every slot busy, around the wanted context. New tokens per second.

    The last two requests enter in one prefill pass, and one generates `steps` tokens more than the other. All other
    requests outlast both by more than two turns, however many passes read their prompts: what is fetched of them when
    they end is not timed. So the time between the ends of these two is that of `steps` steps.
    """
    lm, sizes = session.lm, session.sizes
    steps, lead = sizes.steps, min(_LEAD, sizes.steps)
    prompt = max(sizes.context - lead - steps // 2, 2)
    most = max(MAX_PREFILL_TOKENS[lm.device.type] // prompt, 3)
    together = next(n for n in range(min(most, batch), 1, -1) if batch % n != 1)
    longest = lead + steps + 4 * (batch // together) + 2 * STEPS_BETWEEN_POLLS
    limits = [longest] * (batch - 2) + [lead, lead + steps]
    work = requests(lm, [prompt] * batch, limits)
    warm = requests(lm, [2] * batch, [_BRIEF_TOKENS] * batch)

    def once() -> float:
        ended, count = {}, 0
        for completion in generator.run(iter(work)):
            ended[completion.request.id] = time.perf_counter()
            expect("tokens generated", len(completion.generated), completion.request.max_new_tokens)
            count += 1
        expect("sequences ended", count, batch)
        elapsed = ended[batch - 1] - ended[batch - 2]
        early = sum(ended[id_] < ended[batch - 1] - 0.05 * elapsed for id_ in range(batch - 2))
        expect("sequences ended inside the timed steps", early, 0)
        return batch * steps / elapsed

    with open_generator(
        lm,
        slots=batch,
        length=prompt + longest,
        new_tokens=longest,
        layers=layers,
        prompt=prompt,
        max_prefill=together * prompt,
        next_token=next_token,
    ) as generator:
        run_all(generator, warm)
        yield Prepared(once, lambda: run_all(generator, warm))
