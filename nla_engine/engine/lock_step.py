"""The loop of transformers' own generation over a batch in lock-step. Its `generate` prepares the cache and runs this.

Every pass is prepared and run by the model's own methods, as in transformers' loop. What differs: the engine chooses
tokens, a longer prompt is read on while others generate, and the host queues a pass without waiting for the one before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from nla_engine.engine.library_batch import Batch
from nla_engine.errors import UnsupportedModel
from nla_engine.models.load import LanguageModel
from nla_engine.ops.sampling import Choosing, SlotState, advance

#: Called after every pass with the number of lanes that generate, and how many passes may follow. Returns whether one
#: does.
Each = Callable[[int, int], bool]


class LockStep:
    """The loop over one batch: the argument `custom_generate` of transformers' `generate`."""

    def __init__(
        self, lm: LanguageModel, batch: Batch, state: SlotState, how: Choosing, reference: bool, each: Each
    ) -> None:
        self.name, self.vocabulary = lm.name, lm.vocab_size
        self.batch, self.state, self.how, self.reference, self.each = batch, state, how, reference, each
        self.until = batch.until(how.read_last)

    def __call__(
        self,
        model: Any,
        input_ids: torch.Tensor,
        *,
        logits_processor: object,
        stopping_criteria: object,
        generation_config: Any,
        **given: Any,
    ) -> torch.Tensor:
        """input_ids: int64 [B, T], what every lane reads first; given: the other inputs of the model, the cache among
        them. Returns all tokens read, int64 [B, T']."""
        outputs = model._prefill(input_ids, generation_config, given)
        with model._optimize_model_for_decode():
            while True:
                given = model._update_model_kwargs_for_generation(outputs, given)
                more = self._choose(outputs.logits[:, -1], input_ids.shape[1])
                del outputs  # the logits of a whole prompt may be large
                if not more:
                    return input_ids
                input_ids = torch.cat([input_ids, self._next()[:, None]], dim=1)
                inputs = model.prepare_inputs_for_generation(
                    input_ids, next_sequence_length=1 if given["use_cache"] else None, **given
                )
                outputs = model(**inputs, return_dict=True)

    def _choose(self, logits: torch.Tensor, size: int) -> bool:
        """Advance the lanes that have read their prompts. Returns whether there is another pass.

        logits: [B, V] of what comes after `size` tokens
        """
        batch, state = self.batch, self.state
        read = batch.start + batch.new
        if size != read or logits.shape[1] > self.vocabulary:
            raise UnsupportedModel(
                f"{self.name}: gives {logits.shape[1]} logits after {size} tokens, where {self.vocabulary} after "
                f"{read} are expected: this architecture is not supported"
            )
        complete = int(np.searchsorted(batch.sizes, read, side="right"))
        if complete:
            if read <= batch.longest:
                for lane in np.flatnonzero((batch.limits == 0) & (batch.sizes == read)):
                    state.active[batch.slots[lane]] = False
            advance(logits[:complete].contiguous(), batch.slots[:complete], state, self.how, self.reference)
        batch.start, batch.new = read, 1
        return self.each(complete, self.until - read)

    def _next(self) -> torch.Tensor:
        """int64 [B]: what each lane reads next."""
        batch = self.batch
        chosen = self.state.token[batch.slots]
        complete = int(np.searchsorted(batch.sizes, batch.start, side="right"))
        if complete < len(batch.requests):
            chosen = torch.cat([chosen[:complete], batch.padded[complete:, batch.start]])
        return chosen
