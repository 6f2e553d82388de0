"""A model over several GPUs: steady decode with and without a tap, AV, AR, and transformers' own tensor parallel.

The weights are random, and made on the GPUs: each rank makes its own slices. Limits are those of all GPUs together,
without what they have to tell each other.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nla_engine.bench import hf_split
from nla_engine.bench.limits import ModelSize, decode_step_seconds, generate_seconds, prefill_seconds
from nla_engine.bench.report import Line
from nla_engine.bench.session import Prepared, Session, expect
from nla_engine.bench.shapes import character_tokenizer, find_shape
from nla_engine.bench.suites.generate import steady
from nla_engine.bench.suites.reconstruct import AROUND, reconstructor_of
from nla_engine.bench.suites.verbalize import BEFORE, PROMPT, explained, verbalizer_of
from nla_engine.bench.timing import seconds
from nla_engine.bench.workload import texts
from nla_engine.engine.families import NORMS
from nla_engine.engine.leader import group_devices, open_ranks
from nla_engine.engine.ranks import Ranks
from nla_engine.engine.split import Split
from nla_engine.engine.split_load import fill, short, wrap_split
from nla_engine.errors import RequestError
from nla_engine.models.load import LanguageModel, wrap_model

_SUITE = "tensor-parallel"
#: Sequences of the steady decode.
BATCH = {"cuda": 256, "cpu": 4}
#: Spread of the random weights.
_SPREAD = 0.02
#: New tokens of transformers' generate, and most seconds of all its runs.
_THEIR_TOKENS, _THEIR_SECONDS = 32, 200.0


def run(session: Session) -> None:
    """Open the group, then every case, on all GPUs unless --gpus says how many."""
    if session.settings.model is not None:
        raise RequestError(f"suite {_SUITE} makes its weights: give --shape, not --model")
    there = torch.cuda.device_count() if session.device.type == "cuda" else 2
    size = session.settings.gpus or there
    if size < 2:
        raise RequestError(f"suite {_SUITE} needs at least two GPUs, torch finds {there}")
    devices = group_devices(session.device, size)
    if session.settings.baseline == "hf":
        _theirs(session, size)
    with open_ranks(devices) as ranks:
        assert ranks is not None
        kept = {name: session.__dict__.pop(name, None) for name in ("lm", "size", "layer")}
        hardware = session.hardware
        vocabulary = int(find_shape(session.settings.shape).config().vocab_size)
        session.lm = ranks.make(
            random_split,
            ranks,
            session.settings.shape,
            session.settings.dtype,
            character_tokenizer(vocabulary),
        )
        session.size = whole_size(session.settings.shape, session.settings.dtype)
        session.hardware = hardware.times(size)
        try:
            _sums(session, ranks)
            _decode(session, size)
            _verbalize(session, size)
            _reconstruct(session, size)
        finally:
            for name in kept:
                session.__dict__.pop(name, None)
            session.__dict__.update({name: value for name, value in kept.items() if value is not None})
            session.hardware = hardware


def random_split(ranks: Ranks, shape: str, dtype: torch.dtype, tokenizer: Any) -> LanguageModel:
    """On every rank: its slices of a model of this shape, random; what all ranks hold is the same on all."""
    config = find_shape(shape).config()
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    split = Split(shape, config, ranks.rank, ranks.size)
    model = split.empty_model(dtype, headless=False)
    slices = split.slices(model)
    own, same = (torch.Generator(ranks.device).manual_seed(seed) for seed in (1 + ranks.rank, 0))
    weights: dict[str, torch.Tensor] = {}
    for module_name, module in model.named_modules():
        norm = NORMS.get(type(module).__name__)
        for kind, empty in module.named_parameters(recurse=False):
            name = f"{module_name}.{kind}"
            part = slices.get(name)
            size = tuple(empty.shape)
            if part is not None and module is model.get_output_embeddings():
                size = part.shape(size)
            weight = torch.empty(size, dtype=dtype, device=ranks.device)
            if norm is not None:
                weight.fill_(1.0 - norm.offset)
            else:
                weight.normal_(0.0, _SPREAD, generator=same if part is None else own)
            weights[short(name)] = weight
    fill(model, weights, split, tied=bool(config.tie_word_embeddings))
    model.to(ranks.device)
    model.generation_config.eos_token_id = None
    return wrap_split(ranks, model, tokenizer, name=shape, fingerprint="random")


def whole_size(shape: str, dtype: torch.dtype) -> ModelSize:
    """Of the whole model, counted without its memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(find_shape(shape).config(), dtype=dtype)
    return ModelSize.of(wrap_model(model, None, name=shape))


def _sums(session: Session, ranks: Ranks) -> None:
    """A sum over all GPUs with the residual, as it was measured when the group opened, and by NCCL and an addition."""
    if ranks.peers is None:
        session.console.print(f"{_SUITE}: sums by NCCL: {ranks.without_peers}", highlight=False)
        return
    for number, took in ranks.peers.took.items():
        if number.bit_length() % 2:  # every second one: 256 KiB, 1 MiB, 4 MiB, ...
            programs, best = min((each for each in took.items() if each[0]), key=lambda each: each[1])
            line = Line(_SUITE, f"{ranks.size} GPUs sum {number >> 10} KiB + residual", "us", [best / 100])
            line.detail = f"{programs} programs; NCCL and an addition {took[0] / 100:.1f} us"
            session.record(line)


def _decode(session: Session, size: int) -> None:
    batch = max(session.settings.batch_sizes, default=BATCH[session.device.type])
    limit = batch / decode_step_seconds(session.size, session.hardware, batch, session.sizes.context)
    lines = [
        session.measure(
            _SUITE,
            f"{size} GPUs steady B={batch} context {session.sizes.context} {what}",
            "tok/s",
            steady(session, batch, layers),
            limit=limit,
            warmups=0,
            detail=lambda p50: f"{batch / p50 * 1e3:.3f} ms/step",
        )
        for what, layers in (("no tap", ()), (f"layer {session.layer}", (session.layer,)))
    ]
    plain, tapped = lines
    if plain is not None and tapped is not None:
        cost = 100 * (plain.p50 / tapped.p50 - 1)
        session.record(Line(_SUITE, f"{size} GPUs tap cost B={batch}", "% of step", [cost]))
        tapped.compare(session.find(_SUITE, f"{size} GPUs HF "))


def _verbalize(session: Session, size: int) -> None:
    sizes = session.sizes
    count, new, slots = sizes.vectors, sizes.av_new, min(sizes.av_slots, sizes.vectors)
    read = generate_seconds(session.size, session.hardware, count, PROMPT, new, slots, shared=BEFORE)

    @contextmanager
    def prepared() -> Iterator[Prepared]:
        av = verbalizer_of(session.lm, session.layer)
        yield Prepared(lambda: count / explained(session, av, count, new, slots))

    session.measure(
        _SUITE,
        f"{size} GPUs AV {count} vectors {PROMPT}+{new} B={slots}",
        "vectors/s",
        prepared(),
        limit=count / read,
        repeats=min(session.settings.repeats, 2),
        detail=lambda p50: f"{p50 * new:,.0f} tok/s",
    )


def _reconstruct(session: Session, size: int) -> None:
    count, prompt = session.sizes.vectors, session.sizes.ar_prompt

    @contextmanager
    def prepared() -> Iterator[Prepared]:
        ar = reconstructor_of(session.lm, session.layer)
        written = texts([prompt - AROUND] * count)

        def reconstruct() -> None:
            expect("vectors", len(ar.reconstruct(written)), count)

        try:
            yield Prepared(lambda: count / seconds(reconstruct, session.device))
        finally:
            ar.close()

    session.measure(
        _SUITE,
        f"{size} GPUs AR {count} texts {prompt} tokens {session.layer + 1} blocks",
        "vectors/s",
        prepared(),
        limit=1 / prefill_seconds(session.size, session.hardware, prompt, session.layer + 1),
        detail=lambda p50: f"{p50 * prompt:,.0f} tok/s",
    )


def _theirs(session: Session, size: int) -> None:
    """`generate` of transformers with tp_plan="auto", in processes of its own, before this one takes the GPUs."""
    batch = max(session.settings.batch_sizes, default=BATCH[session.device.type])
    new = min(_THEIR_TOKENS, session.sizes.context // 2)
    prompt = session.sizes.context - new // 2
    directory = session.directory / "hf-split"
    rates = directory / "rates.json"

    @contextmanager
    def prepared() -> Iterator[Prepared]:
        directory.mkdir(exist_ok=True)
        hf_split.write_empty_checkpoint(
            directory, find_shape(session.settings.shape).config(), session.settings.dtype
        )
        job = {"batch": batch, "prompt": prompt, "new": new, "device": session.device.type}
        (directory / "job.json").write_text(json.dumps(job))
        hf_split.run(directory, rates, size, _THEIR_SECONDS)
        yield Prepared(lambda: float(json.loads(rates.read_text())["tokens_per_second"]))

    session.measure(
        _SUITE,
        f"{size} GPUs HF generate tp_plan=auto B={batch} {prompt}+{new}, decode steps",
        "tok/s",
        prepared(),
        warmups=0,
        repeats=1,
    )
