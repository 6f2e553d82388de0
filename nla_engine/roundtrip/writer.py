"""A model that writes texts about vectors: each enters a prompt, and the model generates what follows."""

from __future__ import annotations

import collections.abc
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from nla_engine.engine.choose import open_generator
from nla_engine.engine.generator import Watch
from nla_engine.engine.injection import at_scale
from nla_engine.engine.order import InOrder
from nla_engine.engine.request import Completion, Finish, Request
from nla_engine.engine.slots import default_room
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.errors import CheckpointError
from nla_engine.models.injection import Injection, Prompt
from nla_engine.models.load import LanguageModel
from nla_engine.models.map_files import Maps
from nla_engine.models.tokens import token_bytes
from nla_engine.ops.backends import Kernels
from nla_engine.ops.sampling import Sampling
from nla_engine.roundtrip.draws import of_sample

#: Finished texts that may wait for an earlier one, in bytes (a text is small).
_WAITING_BYTES = 1 << 28
#: Vectors scaled at once, more only if one prompt has more.
_SCALED_AT_ONCE = 256
#: Texts are short, so more lanes fit than in capture; a matrix product then costs less per lane.
_MOST_SLOTS = 1024


@dataclass(frozen=True)
class Asked:
    """A prompt, and the vectors that enter it in their order: float32 [n, d], finite and not zero, before any map.

    id: unique; those of its texts follow from it. draw: names their random numbers, with the sample; None: its id
    """

    id: int
    prompt: Prompt
    vectors: np.ndarray | torch.Tensor
    draw: int | None = None


@dataclass(frozen=True)
class Text:
    """What the model generated: with special tokens, except the one that ended it.

    cut: the length limit ended it
    """

    id: int
    text: str
    n_tokens: int
    cut: bool


@dataclass(frozen=True)
class Limits:
    """Over all prompts of a run. shared: tokens that all begin with, read once, and none of them a vector's;
    longest: tokens of the longest prompt; vectors: most of one prompt.
    """

    shared: tuple[int, ...]
    longest: int
    vectors: int

    @classmethod
    def of(cls, prompts: Iterable[Prompt]) -> Limits:
        """Those of these prompts, at least one."""
        first: tuple[int, ...] | None = None
        last: tuple[int, ...] = ()
        longest = vectors = 0
        for prompt in prompts:
            first = prompt.shared if first is None else min(first, prompt.shared)
            last = max(last, prompt.shared)
            longest = max(longest, len(prompt.token_ids))
            vectors = max(vectors, len(prompt.places))
        assert first is not None, "no prompts"
        alike = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
        return cls(first[:alike], longest, vectors)


class Writer:
    """Generates texts of `lm`. stop: texts that end one, as bytes; they stay in it. maps: what vectors go through."""

    def __init__(
        self,
        lm: LanguageModel,
        injection: Injection,
        kernels: Kernels = Kernels(),
        stop: Sequence[bytes] = (),
        maps: Maps = Maps(),
    ) -> None:
        last = len(lm.blocks) - 1
        if injection.block is not None and injection.block > last:
            raise CheckpointError(
                f"--injection {injection.name}: {lm.name} has blocks 0 to {last}: name one of these"
            )
        if maps.prefix is not None and injection != Injection(scale=injection.scale):
            raise CheckpointError(
                f"{maps.map and maps.map.path}: has a prefix, which replaces embeddings: it does not go with "
                "--norm-match or another --injection"
            )
        self.lm, self.injection, self.kernels, self.stop, self.maps = lm, injection, kernels, stop, maps

    def places(self, rows: int) -> int:
        """How many places of a prompt these rows of a store need."""
        prefix = self.maps.prefix
        return rows * self.maps.count(self.lm.d_model) + (0 if prefix is None else len(prefix))

    @cached_property
    def _automaton(self) -> StopAutomaton:
        lm = self.lm
        return StopAutomaton(token_bytes(lm.tokenizer, lm.vocab_size), lm.eos_ids, self.stop)

    def write(
        self,
        asked: Iterable[Asked | None],
        limits: Limits,
        *,
        samples: int = 1,
        max_new_tokens: int = 200,
        sampling: Sampling = Sampling(),
        batch_size: int | None = None,
        watch: Watch = lambda tally: None,
    ) -> collections.abc.Generator[Text, None, None]:
        """`samples` texts of each together, in the same order, with ids id * samples, id * samples + 1 and so on.

        The prompt is read once for all of them. Vectors are scaled here, and read lazily, some ahead of free slots.
        None means that there is nothing just now; it may come only while texts of what came before are missing.
        """
        lm, kernels, shared = self.lm, self.kernels, limits.shared
        length = limits.longest + max_new_tokens
        held = limits.vectors * lm.d_model * 4  # bytes: a slot keeps its vectors in float32
        room = default_room(lm, length, len(shared), _MOST_SLOTS, kernels.precision, held, batch_size)
        order = InOrder(_WAITING_BYTES)

        def requests() -> Iterator[Request | None]:
            for scaled in self._at_scale(asked):
                if scaled is None:
                    yield None
                    continue
                each, vectors = scaled
                tail = each.prompt.token_ids[len(shared) :]
                places = tuple(place - len(shared) for place in each.prompt.places)
                for sample in range(samples):
                    while order.is_full:
                        yield None
                    id_ = each.id * samples + sample
                    draw = of_sample(each.id if each.draw is None else each.draw, sample)
                    again = sample > 0
                    yield order.asked(Request(id_, tail, max_new_tokens, vectors, places, again, draw))

        generator = open_generator(
            lm,
            slots=room.slots,
            blocks=room.blocks,
            length=length,
            prefix=shared,
            kernels=kernels,
            injection=self.injection,
            vectors=limits.vectors,
            how={"max_new_tokens": max_new_tokens, "stop": self._automaton, "sampling": sampling},
        )
        with generator.runner:
            for group in generator.groups(requests(), watch=watch):
                for ended in order.add(group):
                    cut = ended.finish is Finish.LENGTH
                    yield Text(ended.request.id, self._decoded(ended), len(ended.generated), cut)

    def _decoded(self, ended: Completion) -> str:
        ids = ended.generated[:-1] if ended.finish is Finish.EOS else ended.generated
        return str(self.lm.tokenizer.decode(ids.tolist(), skip_special_tokens=False))

    def _at_scale(self, asked: Iterable[Asked | None]) -> Iterator[tuple[Asked, torch.Tensor] | None]:
        """Each with what enters at its places, mapped and scaled, on the model's device, in blocks."""
        maps, d_model = self.maps.to(self.lm.device), self.lm.d_model
        prefix = () if maps.prefix is None else (maps.prefix,)
        each_gives = maps.count(d_model)
        for group in _groups(asked):
            if group is None:
                yield None
                continue
            block = torch.cat([torch.as_tensor(each.vectors) for each in group]).to(self.lm.device)
            scaled = at_scale(maps.before(block, d_model).flatten(0, 1), self.injection)
            parts = scaled.split([len(each.vectors) * each_gives for each in group])
            yield from ((each, torch.cat((*prefix, part))) for each, part in zip(group, parts, strict=True))


def _groups(asked: Iterable[Asked | None]) -> Iterator[list[Asked] | None]:
    """Some at a time: as many as have _SCALED_AT_ONCE vectors together, at least one. None is passed on."""
    group: list[Asked] = []
    size = 0
    for each in asked:
        if each is None:
            if group:
                yield group
                group, size = [], 0
            yield None
            continue
        if group and size + len(each.vectors) > _SCALED_AT_ONCE:
            yield group
            group, size = [], 0
        group.append(each)
        size += len(each.vectors)
    if group:
        yield group
