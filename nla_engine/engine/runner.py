"""One forward pass of a language model over packed tokens: embeddings or vectors in, hidden states out.

Owns the slot cache, the shared prefix, the table of vectors and the taps on blocks. Knows nothing of requests, sampling
or when a sequence ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from nla_engine.engine import attention
from nla_engine.engine.attention import Pass, Segment
from nla_engine.engine.request import VECTOR
from nla_engine.engine.slots import SlotCache
from nla_engine.errors import EngineError
from nla_engine.models import LanguageModel

#: tap(layer, hidden [T, d], slot int64 [T], position int64 [T]) is called inside every pass, after block `layer`.
Tap = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]

#: Relative L2 difference of logits that the self-check allows, by dtype: rounding, with room for long dot products.
_CHECK_LIMIT = {torch.float32: 1e-3, torch.bfloat16: 6e-2, torch.float16: 2e-2}


class Runner:
    """Drives `lm` with `slots` sequences of at most `length` tokens each, the shared `prefix` included."""

    def __init__(
        self,
        lm: LanguageModel,
        *,
        slots: int,
        length: int,
        prefix: Sequence[int] = (),
        tap: Tap | None = None,
        tap_layers: Iterable[int] = (),
    ) -> None:
        if length > lm.max_length:
            raise EngineError(
                f"{lm.name}: sequences of {length} tokens are longer than its {lm.max_length} positions"
            )
        self.lm = lm
        self.device = lm.device
        size = max(length - len(prefix), len(prefix)) + 1
        self.cache = SlotCache(lm, slots, size)
        self.vectors = torch.zeros(slots + 1, lm.d_model, device=lm.device, dtype=lm.dtype)
        self._pass: Pass | None = None
        self._tap: Tap | None = None
        self._hooks = [
            lm.blocks[k].register_forward_hook(self._on_block(k)) for k in dict.fromkeys(tap_layers)
        ]
        lm.model.set_attn_implementation(attention.NAME)
        self.check()
        if prefix:
            self.prefill([(0, 0, prefix)])
            self.cache.keep_as_prefix(0, len(prefix))
        self._tap = tap

    def close(self) -> None:
        """Take the taps off the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _on_block(self, layer: int) -> Callable[..., None]:
        def hook(_module: object, _inputs: object, output: object) -> None:
            if self._tap is not None and self._pass is not None:
                hidden = output[0] if isinstance(output, tuple) else output
                assert isinstance(hidden, torch.Tensor)
                self._tap(layer, hidden[0], self._pass.slot, self._pass.position)

        return hook

    @torch.inference_mode()
    def prefill(self, parts: Sequence[tuple[int, int, Sequence[int]]]) -> torch.Tensor:
        """Read runs of tokens: (slot, start position, token ids). Returns hidden states [T, d], runs one after another."""
        segments, offset = [], 0
        for slot, start, ids in parts:
            segments.append(Segment(slot, start, len(ids), offset))
            offset += len(ids)
        ids_flat = np.concatenate([np.asarray(ids, np.int64) for _, _, ids in parts])
        slots = np.repeat([s.slot for s in segments], [s.length for s in segments])
        positions = np.concatenate([np.arange(s.start, s.start + s.length) for s in segments])
        packed = torch.from_numpy(np.stack([ids_flat, slots, positions])).to(self.device)
        longest = max(s.start + s.length for s in segments)
        return self._forward(packed[0], Pass(self.cache, packed[1], packed[2], segments, longest))

    @torch.inference_mode()
    def decode(
        self, ids: torch.Tensor, slot: torch.Tensor, position: torch.Tensor, longest: int
    ) -> torch.Tensor:
        """Read one token for each lane: ids, slot, position int64 [B]. Returns hidden states [B, d]."""
        return self._forward(ids, Pass(self.cache, slot, position, None, longest))

    def _forward(self, ids: torch.Tensor, work: Pass) -> torch.Tensor:
        embeds = self.lm.embedding(ids.clamp(min=0))
        if work.segments is not None:  # vectors stand in prompts only
            embeds = torch.where((ids == VECTOR)[:, None], self.vectors[work.slot], embeds)
        self._pass = work
        try:
            with attention.running(work):
                hidden: torch.Tensor = self.lm.decoder(
                    inputs_embeds=embeds[None], position_ids=work.position[None], use_cache=False
                ).last_hidden_state
        finally:
            self._pass = None
        if len(work.written) != len(self.lm.blocks):
            missing = sorted(set(range(len(self.lm.blocks))) - work.written)
            raise EngineError(f"{self.lm.name}: blocks {missing} did not attend through the engine")
        return hidden[0]

    @torch.inference_mode()
    def check(self) -> None:
        """Compare a short prompt, read in two pieces, with the library's own forward pass. EngineError if they differ."""
        lm = self.lm
        ids = torch.arange(1, 1 + min(8, self.cache.size - 1), device=self.device) % lm.vocab_size
        lm.model.set_attn_implementation("eager")
        try:
            expected = lm.decoder(input_ids=ids[None], use_cache=False).last_hidden_state[0].float()
        finally:
            lm.model.set_attn_implementation(attention.NAME)
        half = (len(ids) + 1) // 2
        parts = [self.prefill([(0, 0, ids[:half].tolist())])]
        if half < len(ids):
            parts.append(self.prefill([(0, half, ids[half:].tolist())]))
        actual = torch.cat(parts).float()
        error = float((actual - expected).norm() / expected.norm())
        limit = _CHECK_LIMIT.get(lm.dtype, 1e-3)
        if not error <= limit:
            raise EngineError(
                f"{lm.name}: the engine's forward pass differs from transformers' own by {error:.2g} (limit {limit:.2g}); "
                "this architecture is not supported"
            )
