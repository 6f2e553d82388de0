"""The forward pass over the first blocks of a demo model that is trained."""

from __future__ import annotations

import torch
from transformers import Qwen2Model


def run_blocks(
    model: Qwen2Model, embeddings: torch.Tensor, blocks: int, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Output [B, L, d] of decoder block `blocks - 1`, before any final norm, for embeddings [B, L, d].

    mask: bool [B, 1, L, L], True where attention is allowed; None means causal over the whole row.
    """
    positions = torch.arange(embeddings.shape[1], device=embeddings.device).unsqueeze(0)
    rotary = model.rotary_emb(embeddings, positions)
    hidden = embeddings
    for block in model.layers[:blocks]:
        hidden = block(hidden, attention_mask=mask, position_embeddings=rotary)
    return hidden


def compile_blocks(model: Qwen2Model) -> None:
    """Compile each block; equal blocks share one compilation. Falls back to eager if the compiler fails."""
    torch._dynamo.config.suppress_errors = True
    for block in model.layers:
        block.compile(dynamic=False)
