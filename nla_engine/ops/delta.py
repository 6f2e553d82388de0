"""The gated delta rule, with the short convolution before it: references in torch, two Triton kernels for decode steps.

    x_t = silu(sum_j w[j] row_{t - k + 1 + j})        row at negative positions is 0; per channel
    q, k, v = split(x);  q, k = q / |q|, k / |k| per head;  q = q / sqrt(dk)
    S_t = exp(g_t) S_{t-1};  S_t += k_t (beta_t (v_t - k_t S_t))^T;  o_t = q_t S_t
    g = -exp(A_log) softplus(a + dt_bias),  beta = most sigmoid(b)

A state S is float32 [dk, dv] per value head; a key head serves Hv / Hk value heads. Of the convolution the last k - 1
rows of each slot are kept, that of position p at p % (k - 1). float32 inside, rounded once. Yang, Kautz and
Hatamizadeh, arXiv:2412.06464; chunks after Yang et al., arXiv:2406.06484.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad, silu, softplus

from nla_engine.ops import short_conv
from nla_engine.ops.backends import has_triton
from nla_engine.ops.triton_module import tl, triton

#: What transformers adds to the square of a norm.
_EPS = 1e-6
#: Most tokens that are read by one product of the chunked form.
CHUNK = 64
_CHANNELS = 512


@dataclass(frozen=True)
class DeltaShape:
    """Hk key heads of dk channels, Hv value heads of dv; taps of the convolution; most: what beta stays below."""

    key_heads: int
    value_heads: int
    key_size: int
    value_size: int
    taps: int
    most: float = 1.0

    @property
    def channels(self) -> int:
        """Of a row: queries, keys and values."""
        return 2 * self.key_heads * self.key_size + self.value_heads * self.value_size

    @property
    def state(self) -> tuple[int, int, int]:
        return self.value_heads, self.key_size, self.value_size

    def slot_bytes(self, itemsize: int) -> int:
        """What a slot keeps for one block, with rows of `itemsize` bytes."""
        heads, key, value = self.state
        return 4 * heads * key * value + itemsize * self.channels * (self.taps - 1)

    def split(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x [..., channels] -> queries and keys [..., Hv, dk], normed, and values [..., Hv, dv], in float32."""
        keys = self.key_heads * self.key_size
        q, k, v = x.float().split([keys, keys, self.value_heads * self.value_size], -1)
        q, k = (part.unflatten(-1, (self.key_heads, self.key_size)) for part in (q, k))
        q, k = (part * torch.rsqrt(part.square().sum(-1, keepdim=True) + _EPS) for part in (q, k))
        each = self.value_heads // self.key_heads
        q, k = (part.repeat_interleave(each, -2) for part in (q * self.key_size**-0.5, k))
        return q, k, v.unflatten(-1, (self.value_heads, self.value_size))


def gates(
    a: torch.Tensor, b: torch.Tensor, a_log: torch.Tensor, dt_bias: torch.Tensor, most: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """g and beta of a, b [..., Hv] and a_log, dt_bias [Hv], in float32."""
    return -a_log.float().exp() * softplus(a.float() + dt_bias.float()), b.float().sigmoid() * most


def convolve_step(
    row: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, slot: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """One token per slot. row [T, C], weight [C, k], kept [slots, k - 1, C], changed; slot, position int64 [T].

    Returns x [T, C]. Triton where it runs, else the reference.
    """
    run = convolve_step_triton if has_triton(row.device) else convolve_step_reference
    return run(row, weight, kept, slot, position)


def convolve_step_reference(
    row: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, slot: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """`convolve_step` in plain torch."""
    return silu(short_conv.step(row, weight, kept, slot, position)).to(row.dtype)


def convolve_run(
    row: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, slot: int, start: int
) -> torch.Tensor:
    """Consecutive tokens [T, C] of one slot from position `start` on -> x [T, C]. Otherwise as `convolve_step`."""
    return silu(short_conv.run(row, weight, kept, slot, start)).to(row.dtype)


def delta_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token. q, k [N, L, Hv, dk], v [N, L, Hv, dv], g, beta [N, L, Hv], state [N, Hv, dk, dv], all of one
    float dtype. Returns o [N, L, Hv, dv] and the new state."""
    out = []
    for t in range(q.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        read = (state * k[:, t, ..., None]).sum(-2)
        state = state + k[:, t, ..., None] * ((v[:, t] - read) * beta[:, t, :, None])[..., None, :]
        out.append((state * q[:, t, ..., None]).sum(-2))
    return torch.stack(out, 1), state


def delta_chunked(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    state: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`delta_reference` by products over chunks of tokens. A token with beta and g of 0 changes no state."""
    length = q.shape[1]
    chunk = min(CHUNK, max(16, 1 << (length - 1).bit_length()))
    more = -length % chunk
    q, k, v = (pad(part, (0, 0, 0, 0, 0, more)).transpose(1, 2) for part in (q, k, v))
    g, beta = (pad(part, (0, 0, 0, more)).transpose(1, 2) for part in (g, beta))
    later = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    out = []
    for start in range(0, length, chunk):
        at = slice(start, start + chunk)
        keys, total = k[:, :, at], g[:, :, at].cumsum(-1)
        decay = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp()
        scaled = keys * beta[:, :, at, None]
        system = scaled @ keys.mT * decay  # its diagonal is taken as 1
        right = torch.cat([v[:, :, at] * beta[:, :, at, None], scaled * total.exp()[..., None]], -1)
        solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
        new, read = solved.split([v.shape[-1], k.shape[-1]], -1)
        new = new - read @ state
        inside = (q[:, :, at] @ keys.mT * decay) @ new
        out.append((q[:, :, at] * total.exp()[..., None]) @ state + inside)
        left = (total[..., -1:] - total).exp()[..., None]
        state = state * total[..., -1].exp()[..., None, None] + (keys * left).mT @ new
    return torch.cat(out, 2).transpose(1, 2)[:, :length], state


def delta_step(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    slot: torch.Tensor,
    shape: DeltaShape,
) -> torch.Tensor:
    """One token per slot. x [T, channels], a, b [T, Hv], states float32 [slots, Hv, dk, dv], changed; slot int64 [T].

    Returns o [T, Hv, dv] in x's dtype. Triton where it runs, else the reference.
    """
    run = delta_step_triton if has_triton(x.device) else delta_step_reference
    return run(x, a, b, a_log, dt_bias, states, slot, shape)


def delta_step_reference(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    slot: torch.Tensor,
    shape: DeltaShape,
) -> torch.Tensor:
    """`delta_step` in plain torch."""
    g, beta = gates(a, b, a_log, dt_bias, shape.most)
    q, k, v = shape.split(x[:, None])
    out, new = delta_reference(q, k, v, g[:, None], beta[:, None], states[slot])
    states[slot] = new
    return out[:, 0].to(x.dtype)


def convolve_step_triton(
    row: torch.Tensor, weight: torch.Tensor, kept: torch.Tensor, slot: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """`convolve_step` as one launch."""
    tokens, channels = row.shape
    row = row.contiguous()
    out = torch.empty_like(row)
    _convolve_kernel[(tokens, triton.cdiv(channels, _CHANNELS))](
        row,
        weight.contiguous(),
        kept,
        slot,
        position,
        out,
        channels,
        TAPS=weight.shape[1],
        BLOCK=_CHANNELS,
        num_warps=4,
    )
    return out


def delta_step_triton(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    a_log: torch.Tensor,
    dt_bias: torch.Tensor,
    states: torch.Tensor,
    slot: torch.Tensor,
    shape: DeltaShape,
) -> torch.Tensor:
    """`delta_step` as one launch, which reads and writes each state once."""
    tokens = len(x)
    out = torch.empty((tokens, shape.value_heads, shape.value_size), dtype=x.dtype, device=x.device)
    block = min(32, triton.next_power_of_2(shape.value_size))
    _delta_kernel[(tokens, shape.value_heads, triton.cdiv(shape.value_size, block))](
        x.contiguous(),
        a,
        b,
        a_log,
        dt_bias,
        states,
        slot,
        out,
        a.stride(0),
        b.stride(0),
        shape.key_size**-0.5,
        KEY_HEADS=shape.key_heads,
        VALUE_HEADS=shape.value_heads,
        KEY=shape.key_size,
        VALUE=shape.value_size,
        BLOCK_K=triton.next_power_of_2(shape.key_size),
        BLOCK_V=block,
        EPS=_EPS,
        MOST=shape.most,
        num_warps=4,
    )
    return out


@triton.jit
def _convolve_kernel(
    row,  # [T, C], contiguous
    weight,  # [C, TAPS], contiguous
    kept,  # [slots, TAPS - 1, C], contiguous
    slots,  # int64 [T]
    positions,  # int64 [T]
    out,  # [T, C], contiguous
    channels,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = channel < channels
    slot, position = tl.load(slots + token), tl.load(positions + token)
    own = tl.load(row + token * channels + channel, mask=real, other=0.0)
    taps = weight + channel * TAPS
    total = own.to(tl.float32) * tl.load(taps + TAPS - 1, mask=real, other=0.0).to(tl.float32)
    base = kept + slot * (TAPS - 1) * channels + channel
    at = position + tl.zeros([BLOCK], tl.int64)
    for back in tl.static_range(1, TAPS):
        place = (position + (TAPS - 1) - back) % (TAPS - 1)
        past = tl.load(base + place * channels, mask=real & (at >= back), other=0.0).to(tl.float32)
        total += past * tl.load(taps + TAPS - 1 - back, mask=real, other=0.0).to(tl.float32)
    tl.store(base + position % (TAPS - 1) * channels, own, mask=real)
    result = total / (1.0 + tl.exp(-total))
    tl.store(out + token * channels + channel, result.to(out.dtype.element_ty), mask=real)


@triton.jit
def _delta_kernel(
    x,  # [T, 2 Hk dk + Hv dv], contiguous
    a,  # [T, Hv]
    b,  # [T, Hv]
    a_log,  # [Hv]
    dt_bias,  # [Hv]
    states,  # float32 [slots, Hv, dk, dv], contiguous
    slots,  # int64 [T]
    out,  # [T, Hv, dv], contiguous
    a_token,
    b_token,
    scale,
    KEY_HEADS: tl.constexpr,
    VALUE_HEADS: tl.constexpr,
    KEY: tl.constexpr,
    VALUE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    EPS: tl.constexpr,
    MOST: tl.constexpr,
):
    """One program: a token, a value head and some of its channels."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i, j = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    mine = (i < KEY)[:, None] & (j < VALUE)[None]
    slot = tl.load(slots + token)
    at = states + (slot * VALUE_HEADS + head) * (KEY * VALUE) + i[:, None] * VALUE + j[None]
    state = tl.load(at, mask=mine, other=0.0)

    start = x + token * (2 * KEY_HEADS * KEY + VALUE_HEADS * VALUE)
    q_at = start + head // (VALUE_HEADS // KEY_HEADS) * KEY + i
    q = tl.load(q_at, mask=i < KEY, other=0.0).to(tl.float32)
    k = tl.load(q_at + KEY_HEADS * KEY, mask=i < KEY, other=0.0).to(tl.float32)
    v_at = start + 2 * KEY_HEADS * KEY + head * VALUE + j
    v = tl.load(v_at, mask=j < VALUE, other=0.0).to(tl.float32)
    q = q * (tl.rsqrt(tl.sum(q * q, 0) + EPS) * scale)
    k = k * tl.rsqrt(tl.sum(k * k, 0) + EPS)

    step = tl.load(a + token * a_token + head).to(tl.float32) + tl.load(dt_bias + head).to(tl.float32)
    step = tl.where(step > 20.0, step, tl.log(1.0 + tl.exp(tl.minimum(step, 20.0))))  # softplus
    decay = tl.exp(-tl.exp(tl.load(a_log + head).to(tl.float32)) * step)
    beta = 1.0 / (1.0 + tl.exp(-tl.load(b + token * b_token + head).to(tl.float32)))
    if MOST != 1.0:
        beta *= MOST

    state = state * decay
    new = (v - tl.sum(state * k[:, None], 0)) * beta
    state += k[:, None] * new[None]
    tl.store(at, state, mask=mine)
    result = tl.sum(state * q[:, None], 0)
    to = out + (token * VALUE_HEADS + head) * VALUE + j
    tl.store(to, result.to(out.dtype.element_ty), mask=j < VALUE)
