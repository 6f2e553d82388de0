"""Decoder blocks of a model that is patched, in few launches: `engine.fused`, with the attention of `lanes`.

As in the engine, blocks and parts of blocks whose arithmetic is known are replaced, and others left to transformers.
"""

from __future__ import annotations

from typing import Any

import torch

from nla_engine.engine.families import can_fuse, can_fuse_norm
from nla_engine.engine.fused import FusedBlock, FusedNorm
from nla_engine.engine.lone import lone_parts
from nla_engine.engine.slots import kv_shape
from nla_engine.models.load import LanguageModel
from nla_engine.ops.rotary import rotate_and_store
from nla_engine.referee.lanes import current_work


class PatchedBlock(FusedBlock):
    """Called like the block it replaces, inside a `Work`: hidden states [B, T, d] -> [B, T, d], which may be changed in
    place. NotFused for a block of no known family."""

    def __init__(self, block: Any) -> None:
        super().__init__(block)
        self.groups, self.size = kv_shape(block.self_attn.config)

    def __call__(self, hidden_states: torch.Tensor, **given: Any) -> torch.Tensor:
        return super().__call__(hidden_states.flatten(0, 1)[None], **given).view(hidden_states.shape)

    def _attend(
        self, row: torch.Tensor, x: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = len(row)
        batch = rows // position_embeddings[0].shape[1]
        cos, sin = (each.expand(batch, -1, -1).reshape(rows, -1) for each in position_embeddings)
        keys, values = row.new_empty(
            (2, rows, 1, self.groups, self.size)
        )  # a cache of one place for each token
        at = torch.arange(rows, device=row.device)
        slot, table = torch.zeros_like(at), at.int()[None]
        query = rotate_and_store(row, cos, sin, keys, values, table, slot, at, self.head_norm)
        query, key, value = (
            each.reshape(batch, -1, *each.shape[-2:]).transpose(1, 2) for each in (query, keys, values)
        )
        attended = current_work().attend(self.layer, query, key, value, self.shape)
        return attended.reshape(rows, -1), x


def known_parts(lm: LanguageModel) -> dict[Any, Any]:
    """What may take the place of the forward of a model's modules, by module."""
    blocks = {block: PatchedBlock(block) for block in lm.blocks if can_fuse(block)}
    last: Any = getattr(lm.decoder, "norm", None)
    norm = {last: FusedNorm(last)} if blocks and can_fuse_norm(last) else {}
    return blocks | lone_parts(lm.blocks) | norm
