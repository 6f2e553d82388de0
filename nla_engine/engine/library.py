"""transformers' own forward and caches behind the interface of the engine's runner and generator.

Runs whatever `generate` of transformers can continue. A batch reads in lock-step: first as many tokens of every prompt
as the shortest one has, then one token per pass. A longer prompt goes on being read while the others generate. So there
is no padding, every sequence of a batch is at the same position, and any cache fits: growing, sliding, recurrent.
Prompts that are only read are padded behind their end, where nothing that comes before can see it.

Prompts share nothing here, and a batch ends with its longest reply: slower than slots, never different.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import torch
from transformers import GenerationConfig

from nla_engine.engine.injection import Injector
from nla_engine.engine.library_batch import Batch
from nla_engine.engine.lock_step import Each, LockStep
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
from nla_engine.ops.sampling import Choosing, SlotState
from nla_engine.sites import Site

#: Errors in a pass that say nothing about the model's architecture.
_NOT_THE_MODEL = (NLAError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)


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
        self._d_model = lm.d_model
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

        each: called after every pass, says whether there is another
        """
        settings = GenerationConfig(
            max_new_tokens=batch.until(read_last=True) - batch.shortest + 1,
            do_sample=False,
            use_cache=True,
            disable_compile=True,
        )
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
                custom_generate=LockStep(self.lm, batch, state, how, self.reference, each),
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
        batch, width = self._batch, self._d_model
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
            new, lanes, slot = batch.new, len(batch.requests), batch.slots
            position = torch.arange(batch.start, batch.start + new, device=self.device).repeat(lanes)
            if self._active is not None:  # no such lane is past its end
                slot = torch.where(self._active[slot], slot, self.slots)
            slot = slot.repeat_interleave(new)
            if self._active is None:
                slot = torch.where(position < batch.ends.repeat_interleave(new), slot, self.slots)
            self._placed = (batch.start, slot, position)
        return self._placed[1:]

    def _inject(self, _module: object, _inputs: object, output: object) -> None:
        if (batch := self._batch) is None or not batch.has_vectors:
            return
        states = block_output(output)
        if entering := batch.entering(self._width(states)):
            token, lane, number = to_device(np.array(entering, np.int64).T.copy(), self.device)
            flat = states.flatten(0, 1)
            self.injector.inject(flat, torch.stack([token, batch.slots[lane], number]))
            states.copy_(flat.view_as(states))
