"""What becomes of a small model of a family: run in batches with refill by the engine or by the library, and compared
with plain transformers, one sequence at a time, without a cache, in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
import transformers
from small_families import small_model
from tiny import byte_tokenizer

from nla_engine.capture.tap import RowRange, RowTap
from nla_engine.codec.rows import Codec
from nla_engine.engine.choose import open_generator
from nla_engine.engine.generator import Generator
from nla_engine.engine.library_generator import LibraryGenerator
from nla_engine.engine.request import Completion, Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.errors import NLAError
from nla_engine.models.decoder import block_output
from nla_engine.models.load import LanguageModel, wrap_model
from nla_engine.ops.backends import Kernels

T = TypeVar("T")
#: Sizes of the prompts, so that some are longer than windows, and replies: more requests than slots.
SIZES, NEW, SLOTS = (11, 3, 19, 7, 12, 12, 30), (6, 9, 4, 12, 1, 8, 5), 3
LENGTH = max(SIZES) + max(NEW) + 1
#: Largest relative error of a row that is kept as bfloat16.
LIMIT = 8e-3
#: Relative size of changes that stand for other roundings of float32, and how many draws of them.
MOVED, REDRAWN = 1e-6, 24


def family_model(config: type[Any]) -> LanguageModel:
    return wrap_model(small_model(config), byte_tokenizer(), name=config.__name__)


def requests(rng: np.random.Generator) -> list[Request]:
    return [
        Request(i, tuple(rng.integers(3, 250, size).tolist()), new)
        for i, (size, new) in enumerate(zip(SIZES, NEW, strict=True))
    ]


def run(
    lm: LanguageModel,
    asked: Sequence[Request],
    *,
    kernels: str = "auto",
    eos: Sequence[int] = (),
    new: int = max(NEW),
) -> tuple[dict[int, Completion], str]:
    """Completions by id, with rows of every block as bfloat16, and which way ran them: fast or library."""
    layers = tuple(range(len(lm.blocks)))
    tap = RowTap(
        layers,
        Codec.named("bf16", lm.d_model),
        RowRange.parse("all"),
        rows_per_slot=LENGTH,
        sink_norm=dict.fromkeys(layers, float("inf")),
        device=lm.device,
    )
    generator = open_generator(
        lm if new else lm.truncated(max(layers)),
        slots=SLOTS,
        length=LENGTH,
        tap=tap,
        kernels=Kernels(kernels),
        announce=lambda text: None,
        how={
            "max_new_tokens": new,
            "stop": StopAutomaton([b""] * lm.vocab_size, eos) if new else None,
            "read_last": bool(new),
        },
    )
    with generator.runner:
        found = {each.request.id: each for each in generator.run(iter(asked))}
    return found, "library" if isinstance(generator, LibraryGenerator) else "fast"


@torch.inference_mode()
def alone(lm: LanguageModel, ids: Sequence[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """By transformers alone, over one sequence: the output [T, d] of every block, and the logits [T, V]."""
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        block.register_forward_hook(lambda _m, _i, out, k=k: seen.update({k: block_output(out)[0].cpu()}))
        for k, block in enumerate(lm.blocks)
    ]
    lm.model.set_attn_implementation("eager")
    try:
        logits = lm.model(input_ids=torch.tensor([list(ids)], device=lm.device)).logits[0].cpu()
    finally:
        for hook in hooks:
            hook.remove()
    return [seen[k] for k in range(len(lm.blocks))], logits


def wrong_by_any_rounding(lm: LanguageModel, wrong: Callable[[], T]) -> T:
    """What `wrong`, which asks transformers, finds wrong: something false if nothing is.

    Where two experts suit a token alike to the last digit, rounding decides between them. So nothing is wrong, either,
    if `wrong` finds nothing once the embeddings are moved by about as much as rounding moves what follows from them.
    """
    first = wrong()
    for seed in range(REDRAWN if first else 0):
        draws = torch.Generator(lm.device).manual_seed(seed)
        hook = lm.model.get_input_embeddings().register_forward_hook(
            lambda _m, _i, out, draws=draws: (
                out * (1 + MOVED * torch.empty_like(out).normal_(generator=draws))
            )
        )
        try:
            if not (again := wrong()):
                return again
        finally:
            hook.remove()
    return first


def fault(lm: LanguageModel, done: Completion, prefix: tuple[int, ...] = ()) -> str:
    """How the rows and tokens of a sequence differ from those of transformers alone; empty if they do not."""
    given = [*prefix, *done.request.token_ids]
    sequence = [*given, *done.generated.tolist()]
    return wrong_by_any_rounding(lm, lambda: _unlike(done, len(given), *alone(lm, sequence)))


def _unlike(done: Completion, given: int, rows: list[torch.Tensor], logits: torch.Tensor) -> str:
    """given: tokens before the reply; rows, logits: from `alone`."""
    for k, own in enumerate(rows):
        kept = torch.from_numpy(done.rows[k].codes.view(np.int16)).view(torch.bfloat16).float()
        own = own[done.positions]  # 0 for a token whose embedding is 0
        error = float(((kept - own).norm(dim=-1) / own.norm(dim=-1).clamp(min=1e-20)).max())
        if not error <= LIMIT:
            return f"block {k} differs by {error:.2g}"
    for at, token in enumerate(done.generated.tolist(), given - 1):
        best = logits[at].float()
        if not best[token] >= best.max() - 1e-3 * (1 + best.abs().max()):
            return f"token {at - given + 1} of the reply is not the best"
    return ""


def misplaced(done: Completion, eos: Sequence[int] = ()) -> str:
    """What is wrong with the length of a reply and with the places of its rows, which are of all tokens; or empty."""
    reply, new = done.generated.tolist(), done.request.max_new_tokens
    length = len(done.request.token_ids) + len(reply)
    if done.positions.tolist() != list(range(length)):
        return f"rows of {len(done.positions)} positions, of {length}"
    if len(reply) != new and not (reply and reply[-1] in eos):
        return f"{len(reply)} tokens, not {new}"
    return "" if not set(reply[:-1]) & set(eos) else "runs past its end"


def outcome(config: type[Any], rng: np.random.Generator, kernels: str = "auto") -> tuple[str, str]:
    """(fast | library | not, why not) of a family. AssertionError if what runs is wrong."""
    try:
        lm = family_model(config)
    except NLAError as error:
        return "not", str(error)
    asked = requests(rng)
    try:
        found, way = run(lm, asked, kernels=kernels)
        eos = natural_ends(found)
        ended, _ = run(lm, asked, kernels=kernels, eos=eos)
        read, _ = run(lm, [Request(r.id, r.token_ids, 0) for r in asked], kernels=kernels, new=0)
    except NLAError as error:
        return "not", str(error)
    for completions, ends in ((found, ()), (ended, eos), (read, ())):
        assert sorted(completions) == list(range(len(asked)))
        for done in completions.values():
            assert not (wrong := misplaced(done, ends) or fault(lm, done)), (
                f"{config.__name__}, {way}, request {done.request.id}: {wrong}"
            )
    return way, ""


def in_slots(
    lm: LanguageModel,
    asked: Sequence[Request],
    *,
    slots: int = 3,
    passed: int = 2048,
    length: int = LENGTH,
    inside: Callable[[Runner], object] = lambda runner: None,
    **more: Any,
) -> tuple[list[Completion], int]:
    """By the engine's slots: completions with rows of every block, and how many sequences stepped back.

    passed: most tokens of a prompt in one pass; inside: is called with the open runner; more: arguments of Runner
    """
    layers = tuple(range(len(lm.blocks)))
    tap = RowTap(
        layers,
        Codec.named("bf16", lm.d_model),
        RowRange.parse("generated"),
        rows_per_slot=length,
        sink_norm=dict.fromkeys(layers, float("inf")),
        device=lm.device,
    )
    with Runner(lm, slots=slots, length=length, tap=tap, **more) as runner:
        inside(runner)
        generator = Generator(
            runner,
            max_new_tokens=12,
            stop=StopAutomaton([b""] * lm.vocab_size, ()),
            read_last=True,
            max_prefill_tokens=passed,
        )
        found = list(generator.run(iter(asked)))
        assert generator._queue is not None
        return found, generator._queue.tally().stepped_back


def check_rows(lm: LanguageModel, found: Sequence[Completion], prefix: tuple[int, ...] = ()) -> None:
    """Rows and tokens of `in_slots` are those of transformers alone."""
    for done in found:
        assert len(done.generated) == done.request.max_new_tokens
        assert not fault(lm, done, prefix)


def drawn(rng: np.random.Generator, sizes: tuple[int, ...], new: tuple[int, ...]) -> list[Request]:
    """Requests with random prompts of these sizes, for so many tokens."""
    return [
        Request(i, tuple(rng.integers(3, 250, size).tolist()), more)
        for i, (size, more) in enumerate(zip(sizes, new, strict=True))
    ]


def named_model(name: str) -> LanguageModel:
    """A small one with this configuration; the test is skipped where transformers has none."""
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return family_model(getattr(transformers, name))


def natural_ends(found: dict[int, Completion]) -> tuple[int, ...]:
    """A token that ends some replies before their limit, and not all."""
    inner = [token for done in found.values() for token in done.generated[1:-1].tolist()]
    return (inner[0],) if inner else ()
