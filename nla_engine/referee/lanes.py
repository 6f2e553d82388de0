"""Attention of patched tokens: each reads the keys and values of its own sequence before it, and those of its lane.

A lane is a patched token and the tokens after it that are read again. Lanes of one sequence share its keys and values,
which are never written. With position p of the patched token and i of a token of its lane, counted from p:

    score over the sequence at t < p, and over the lane at j <= i;  one softmax over both, in float32
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AttentionInterface

from nla_engine.engine.attention import prefill_tiles
from nla_engine.errors import EngineError, UnsupportedModel
from nla_engine.ops.attention import Shape
from nla_engine.ops.lane_attention import attend_lanes_triton, takes_lanes

NAME = "nla_engine_patch"


class Work(Protocol):
    """A forward pass that attends by itself. query [B, H, T, h], key and value [B, KV, T, h] -> [B, T, H, h]."""

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: Shape
    ) -> torch.Tensor: ...


#: The pass that modules called now belong to.
running: ContextVar[Work | None] = ContextVar("running", default=None)


def current_work() -> Work:
    """The running pass. EngineError if there is none."""
    if (work := running.get()) is None:
        raise EngineError("the model was called outside the patcher while the patcher holds it")
    return work


def patch_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The function registered with transformers. What else a module may ask for shows in `Patcher.check`."""
    work = current_work()
    if attention_mask is not None or is_causal is False:
        raise UnsupportedModel(
            f"{type(module).__name__} attends by a mask of its own: this architecture is not supported"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    shape = Shape(scale, sliding_window or 0, softcap or 0.0)
    return work.attend(module.layer_idx, query, key, value, shape), None


AttentionInterface.register(NAME, patch_attention)


@dataclass
class Reading:
    """S sequences that were read, padded to T tokens behind their ends.

    ids: int64 [S, T]; sizes: tokens of each, int64 [S] on the host; layer: K
    states: outputs of block K, [S, T, d]; keys, values: of each later block, [S, KV, T, h]; shapes: how blocks attended
    """

    ids: torch.Tensor
    sizes: np.ndarray
    layer: int
    states: torch.Tensor = field(init=False)
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)
    shapes: dict[int, Shape] = field(default_factory=dict)

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: Shape
    ) -> torch.Tensor:
        """See `Work`: every token attends to those up to itself."""
        if layer in self.shapes:
            raise UnsupportedModel(
                f"block {layer} attends twice in one pass: this architecture is not supported"
            )
        self.shapes[layer] = shape
        if layer > self.layer:
            self.keys[layer], self.values[layer] = key, value
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, 1) if group > 1 else x for x in (key, value))
        at = torch.arange(query.shape[2], device=query.device)
        seen = _seen(at[:, None], at, shape.window)
        if shape.softcap:
            weights = _scores(query * shape.scale, key, shape).masked_fill(~seen, -math.inf).softmax(-1)
            out = weights.to(value.dtype) @ value
        else:
            mask = seen if shape.window else None
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=mask is None, scale=shape.scale
            )
        return out.transpose(1, 2)


class Lanes:
    """n lanes of m tokens each. sequence: int64 [n], ascending; position: int64 [n], of each lane's first token.

    plain: whether they attend in plain torch on every device
    """

    def __init__(
        self, read: Reading, sequence: np.ndarray, position: np.ndarray, tokens: int, *, plain: bool = False
    ) -> None:
        self.read, self.tokens, self.plain = read, tokens, plain
        device = read.ids.device
        chosen, own, counts = np.unique(sequence, return_inverse=True, return_counts=True)
        self._sequences, self._most = len(chosen), int(counts.max())
        rank = np.arange(len(sequence)) - (np.cumsum(counts) - counts)[own]
        self._place = torch.from_numpy(own * self._most + rank).to(device)
        self._chosen: slice | torch.Tensor = slice(int(chosen[0]), int(chosen[-1]) + 1)
        if chosen[-1] - chosen[0] + 1 != len(chosen):
            self._chosen = torch.from_numpy(chosen).to(device)
        self._past = int(position.max())
        first = torch.from_numpy(position).to(device)
        self._first = self._padded(first[:, None])[..., 0]  # [S, N]
        runs = np.stack([chosen, np.zeros_like(chosen), tokens * counts], 1)
        at = (first[:, None] + torch.arange(tokens, device=device)).flatten()
        self._tiles = cache(lambda group: prefill_tiles(runs, group, at))

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: Shape
    ) -> torch.Tensor:
        """See `Work`, for the packed tokens [1, .., n m, ..] of all lanes."""
        if self.plain or not takes_lanes(query, value, shape):
            return self._attend_plain(layer, query, key, value, shape)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        keys, values = self.read.keys[layer], self.read.values[layer]
        tiles = self._tiles(query.shape[1] // key.shape[1])
        return attend_lanes_triton(q, k, v, keys, values, tiles, self.tokens, shape)[None]

    def _attend_plain(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, shape: Shape
    ) -> torch.Tensor:
        """`attend` in plain torch, as batched products over padded lanes."""
        heads, size = query.shape[1], query.shape[3]
        groups, width = key.shape[1], value.shape[3]
        sequences, lanes, tokens, past = self._sequences, self._most, self.tokens, self._past
        group = heads // groups
        # By sequence: queries [S, KV, G, N, m, h], the lanes' own keys and values [S, KV, 1, N, m, h].
        q = self._padded(_lanes(query, tokens)).view(sequences, lanes, tokens, groups, group, size)
        q = (q * shape.scale).permute(0, 3, 4, 1, 2, 5).contiguous()
        own_key, own_value = (
            self._padded(_lanes(x, tokens)).permute(0, 3, 1, 2, 4)[:, :, None] for x in (key, value)
        )
        keys = self.read.keys[layer][self._chosen, :, :past]
        values = self.read.values[layer][self._chosen, :, :past]
        before = _scores(q.view(sequences, groups, group * lanes * tokens, size), keys, shape)
        before = before.view(sequences, groups, group, lanes, tokens, past)
        scores = torch.cat([before, _scores(q, own_key, shape)], -1)
        weights = scores.masked_fill_(~self._seen(shape.window), -math.inf).softmax(-1).to(value.dtype)
        read = weights[..., :past].reshape(sequences, groups, group * lanes * tokens, past) @ values
        out = read.view(*q.shape[:-1], width) + weights[..., past:] @ own_value
        out = out.permute(0, 3, 4, 1, 2, 5).reshape(sequences * lanes, tokens, heads, width)
        return out[self._place].reshape(1, -1, heads, width)

    def _seen(self, window: int) -> torch.Tensor:
        """bool [S, 1, 1, N, m, past + m]: what each token of each lane attends to."""
        step = torch.arange(self.tokens, device=self._first.device)
        at = torch.arange(self._past, device=self._first.device)
        first = self._first[:, :, None, None]
        before = (at < first).expand(-1, -1, self.tokens, -1)
        if window:
            before = before & (at > first + step[:, None] - window)
        own = _seen(step[:, None], step, window).expand(*before.shape[:3], -1)
        return torch.cat([before, own], -1)[:, None, None]

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """[n, ...] -> [S, N, ...], zero where a sequence has fewer lanes than another."""
        out = x.new_zeros((self._sequences * self._most, *x.shape[1:]))
        out[self._place] = x
        return out.view(self._sequences, self._most, *x.shape[1:])


def _lanes(x: torch.Tensor, tokens: int) -> torch.Tensor:
    """[1, H, n m, h] -> [n, m, H, h]."""
    return x[0].transpose(0, 1).reshape(-1, tokens, x.shape[1], x.shape[3])


def _seen(own: torch.Tensor, at: torch.Tensor, window: int) -> torch.Tensor:
    """Whether a token at `own` attends to `at`."""
    return (at <= own) & (at > own - window) if window else at <= own


def _scores(query: torch.Tensor, key: torch.Tensor, shape: Shape) -> torch.Tensor:
    """Of scaled queries; in float32 if the model caps them, else in their dtype, which the softmax widens inside."""
    scores = query @ key.transpose(-1, -2)
    return torch.tanh(scores.float() / shape.softcap) * shape.softcap if shape.softcap else scores
