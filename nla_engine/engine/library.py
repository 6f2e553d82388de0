"""transformers' own forward and caches behind the interface of the engine's runner and generator.

Runs whatever `generate` of transformers can continue. A batch reads in lock-step: first as many tokens of every prompt
as the shortest one has, then one token per pass. A longer prompt goes on being read while the others generate. So there
is no padding, every sequence of a batch is at the same position, and any cache fits: growing, sliding, recurrent.
Prompts that are only read are padded behind their end, where nothing that comes before can see it.

Prompts share nothing here, and a batch ends with its longest reply: slower than slots, never different.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from nla_engine.engine.injection import Injector
from nla_engine.engine.request import Request
from nla_engine.engine.rotation import check_rotation
from nla_engine.engine.slots import borrowed
from nla_engine.engine.tap import NoTap, Tap
from nla_engine.engine.transfer import to_device
from nla_engine.errors import EngineError, NLAError, UnsupportedModel, first_line
from nla_engine.models.decoder import block_output
from nla_engine.models.implementation import attend_by
from nla_engine.models.injection import Injection
from nla_engine.models.load import LanguageModel
from nla_engine.models.places import Take, find_places
from nla_engine.ops.backends import Kernels
from nla_engine.ops.sampling import Choosing, SlotState, advance
from nla_engine.sites import Site

#: Errors in a pass that say nothing about the model's architecture.
_NOT_THE_MODEL = (NLAError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)


#: Called after every pass with the number of lanes that generate.
Each = Callable[[int], None]


class Batch:
    """Requests that run together, shortest prompt first, each in a slot of its own.

    sizes: int64 [B], tokens of each prompt, the shared prefix among them; start: tokens that every lane has read;
    new: tokens per lane in the pass that runs; ends: one past the last position of each that may be read, int64 [B]
    """

    def __init__(
        self, requests: Sequence[Request], slots: Sequence[int], prefix: Sequence[int], device: torch.device
    ) -> None:
        self.requests = list(requests)
        self.prefix_size = len(prefix)
        self.prompts = [[*prefix, *request.token_ids] for request in requests]
        self.sizes = np.array([len(prompt) for prompt in self.prompts])
        self.shortest, self.longest = int(self.sizes.min()), int(self.sizes.max())
        self.limits = np.array([request.max_new_tokens for request in requests])
        self.slots = to_device(np.array(slots), device)
        self.ends = to_device(self.sizes + self.limits, device)
        padded = np.zeros((len(self.prompts), self.longest), np.int64)
        for lane, prompt in enumerate(self.prompts):
            padded[lane, : len(prompt)] = prompt
        self.padded = to_device(padded, device)
        self.last = (
            self.sizes - 1 + np.arange(len(self.prompts)) * self.longest
        )  # of each prompt, in one pass over all
        self.start, self.new = 0, self.shortest if self.limits.any() else self.longest

    def halves(self, prefix: Sequence[int], device: torch.device) -> list[Batch]:
        """The same requests in their slots, as two batches that have read nothing."""
        middle, slots = len(self.requests) // 2, self.slots.tolist()
        return [
            Batch(self.requests[part], slots[part], prefix, device)
            for part in (slice(middle), slice(middle, None))
        ]

    def entering(self, width: int) -> list[tuple[int, int, int]]:
        """Where vectors enter a pass over the last `width` tokens read: token of the pass, lane, number."""
        first = self.start + self.new - width
        return [
            (lane * width + self.prefix_size + place - first, lane, number)
            for lane, request in enumerate(self.requests)
            for number, place in enumerate(request.places)
            if first <= self.prefix_size + place < first + width
        ]


class Library:
    """Holds `lm` as a Runner does, for passes of transformers' own forward. Arguments are those of a Runner.

    blocks: not needed: transformers' caches grow
    attention: the one of transformers' implementations that runs: eager until `attend` is called
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        slots: int,
        length: int,
        prefix: Sequence[int] = (),
        blocks: int | None = None,
        tap: Tap = NoTap(),
        kernels: Kernels = Kernels("library"),
        injection: Injection = Injection(),
        vectors: int = 1,
    ) -> None:
        if length > lm.max_length:
            raise EngineError(
                f"{lm.name}: sequences of {length} tokens are longer than its {lm.max_length} positions"
            )
        check_rotation(lm, length)
        self.lm, self.device, self.slots, self.length = lm, lm.device, slots, length
        self.prefix, self.tap, self.reference = tuple(prefix), tap, kernels.reference
        self.injector = Injector(injection, slots, vectors, lm.d_model, lm.device)
        self.attention = ""
        self._batch: Batch | None = None
        self._placed: tuple[int, torch.Tensor, torch.Tensor] | None = None  # see `_tokens`
        self._active: torch.Tensor | None = None  # bool [slots + 1], or None if every lane is
        self._hooks: list[Any] = []
        try:
            self._take_over()
        except BaseException:
            self.close()
            raise

    def _take_over(self) -> None:
        places = find_places(self.lm, map(Site.at, self.tap.layers))
        entry = self.injector.injection.block
        into = self.lm.embedding if entry is None else self.lm.blocks[entry]
        self._hooks.append(into.register_forward_hook(self._inject))  # before the tap
        for site, place in places.items():
            self._hooks.append(place.watch(self._on_site(site)))
        self.attend("eager")

    def attend(self, implementation: str) -> None:
        """Use this one of transformers' implementations of attention."""
        attend_by(self.lm.model, implementation)
        self.attention = implementation

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks from the model, which gets transformers' eager attention, and close the tap."""
        self.tap.close()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        attend_by(self.lm.model, "eager")

    @torch.inference_mode()
    def read(self, batch: Batch) -> torch.Tensor:
        """Read the prompts of a batch in one pass. Returns the final state of the last token of each, [B, d]."""
        with self._running(batch, None):
            states = self.lm.decoder(input_ids=batch.padded, **self.lm.uncached).last_hidden_state
        picked: torch.Tensor = states.flatten(0, 1)[to_device(batch.last, self.device)]
        return picked

    @torch.inference_mode()
    def generate(self, batch: Batch, state: SlotState, how: Choosing, each: Each) -> None:
        """Run a batch until every sequence has ended, or has read its prompt if nothing may be generated.

        each: called after every pass
        """
        steps = int((batch.sizes + batch.limits).max()) - batch.shortest + 1
        settings = GenerationConfig(
            max_new_tokens=steps, do_sample=False, use_cache=True, disable_compile=True
        )
        work = _LockStep(self, batch, state, how, each)
        # Asked for the logits of the last token as a number, blocks that borrow keys would run for that token alone.
        last = {"logits_to_keep": torch.tensor([-1], device=self.device)} if borrowed(self.lm) else {}
        # A generation config is completed by the model's own, which may penalise, force or end.
        with (
            self._running(batch, state.active),
            mock.patch.object(self.lm.model, "generation_config", GenerationConfig()),
        ):
            self.lm.model.generate(
                batch.padded[:, : batch.shortest],
                generation_config=settings,
                logits_processor=LogitsProcessorList([work]),
                stopping_criteria=StoppingCriteriaList([_AllEnded(batch, state)]),
                **last,
            )

    @contextmanager
    def _running(self, batch: Batch, active: torch.Tensor | None) -> Iterator[None]:
        """While a batch runs, hooks know it. Errors of the model's code become one line."""
        self._batch, self._active, self._placed = batch, active, None
        name = f"{self.lm.name}: {type(self.lm.model).__name__}"
        try:
            yield
        except _NOT_THE_MODEL:
            raise
        except Exception as error:  # the code of any architecture
            raise UnsupportedModel(
                f"{name} cannot be run by transformers' own generation either ({type(error).__name__}: "
                f"{first_line(error)}): this architecture is not supported"
            ) from error
        finally:
            self._batch = self._active = None

    def _width(self, states: torch.Tensor) -> int:
        """Tokens per lane of hidden states [B, T, d]: those of the pass, or all again where there is no cache."""
        assert self._batch is not None
        batch, width = self._batch, self.lm.d_model
        for tokens in (batch.new, batch.start + batch.new):
            if states.shape == (len(batch.requests), tokens, width):
                return tokens
        raise UnsupportedModel(
            f"{self.lm.name}: a block of {type(self.lm.model).__name__} gives states {list(states.shape)} for "
            f"{batch.new} tokens of {len(batch.requests)} sequences, not one vector of {width} per token: this "
            "architecture is not supported"
        )

    def _on_site(self, site: Site) -> Take:
        def take(states: torch.Tensor) -> None:
            if (batch := self._batch) is None:
                return
            if states.ndim == 2:  # some modules see all lanes as one
                states = states.view(len(batch.requests), -1, states.shape[-1])
            self._width(states)
            slot, position = self._tokens(batch)
            self.tap(site, states[:, -batch.new :].flatten(0, 1).contiguous(), slot, position)

        return take

    def _tokens(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Slot and position of each token of the pass, int64 [B * new], the same tensors for every site. Tokens without
        a row, which are behind the end of a sequence, have the spare slot."""
        if self._placed is None or self._placed[0] != batch.start:
            new, lanes = batch.new, len(batch.requests)
            position = torch.arange(batch.start, batch.start + new, device=self.device).repeat(lanes)
            slot = batch.slots.repeat_interleave(new)
            real = position < batch.ends.repeat_interleave(new)
            if self._active is not None:
                real &= self._active[slot]
            slot = torch.where(real, slot, self.slots)
            self._placed = (batch.start, slot, torch.where(real, position, 0))
        return self._placed[1:]

    def _inject(self, _module: object, _inputs: object, output: object) -> None:
        if (batch := self._batch) is None or not any(request.places for request in batch.requests):
            return
        states = block_output(output)
        if entering := batch.entering(self._width(states)):
            token, lane, number = to_device(np.array(entering, np.int64).T.copy(), self.device)
            flat = states.flatten(0, 1)
            self.injector.inject(flat, torch.stack([token, batch.slots[lane], number]))
            states.copy_(flat.view_as(states))


class _LockStep(LogitsProcessor):  # type: ignore[misc, unused-ignore]
    """Chooses tokens as the engine does; the scores then leave transformers one choice, the next token of each lane."""

    def __init__(self, library: Library, batch: Batch, state: SlotState, how: Choosing, each: Each) -> None:
        self.library, self.batch, self.state, self.how, self.each = library, batch, state, how, each
        self.reads = torch.from_numpy(np.flatnonzero(batch.limits == 0)).to(library.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """input_ids int64 [B, T], all tokens read so far; scores: float32 [B, V], of what comes next."""
        batch, state = self.batch, self.state
        read = batch.start + batch.new
        if input_ids.shape[1] != read or scores.shape[1] > self.library.lm.vocab_size:
            raise UnsupportedModel(
                f"{self.library.lm.name}: gives {scores.shape[1]} logits after {input_ids.shape[1]} tokens, where "
                f"{self.library.lm.vocab_size} after {read} are expected: this architecture is not supported"
            )
        complete = int(np.searchsorted(batch.sizes, read, side="right"))
        if complete:
            for lane in np.flatnonzero((batch.limits == 0) & (batch.sizes == read)):
                state.active[batch.slots[lane]] = False
            advance(scores[:complete], batch.slots[:complete], state, self.how, self.library.reference)
        chosen = state.token[batch.slots]
        if complete < len(batch.requests):
            chosen = torch.cat([chosen[:complete], batch.padded[complete:, read]])
        batch.start, batch.new = read, 1
        self.each(complete)
        only = torch.zeros((len(chosen), self.library.lm.vocab_size), device=scores.device)
        return only.scatter_(1, chosen[:, None], 1.0)


class _AllEnded(StoppingCriteria):  # type: ignore[misc, unused-ignore]
    """Ends a batch once no sequence of it runs."""

    def __init__(self, batch: Batch, state: SlotState) -> None:
        self.batch, self.state = batch, state

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """bool [B]."""
        return ~self.state.active[self.batch.slots].any().expand(len(input_ids))
