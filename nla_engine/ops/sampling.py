"""The end of a step: choose every lane's next token and advance its sequence. Reference in torch, two Triton launches.

    greedy      argmax_v logit_v                              the first of equal ones; NaN is largest, as torch.argmax
    sampled     argmax_v logit_v / a + g_v / b                draws v with probability softmax(logit / T)
                a = max(T, 1), b = max(1 / T, 1)              so that neither term overflows float32, for any T

g_v = -log(-log u_v), where u_v is a counter-based hash of (seed, sequence, position, v), so no state is kept and
batching cannot change a draw (Gumbel-max; the mixer is C. Wellons' 'lowbias32').
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch

from nla_engine.ops.backends import has_triton
from nla_engine.ops.triton_module import tl, triton

_MASK = 0xFFFFFFFF
#: Logits per program.
_BLOCK = 4096
_LARGEST = torch.finfo(torch.float32).max
_Bits = TypeVar("_Bits", int, torch.Tensor)


@dataclass(frozen=True)
class SlotState:
    """The state of running sequences: one entry per slot, and one for the spare slot that unused lanes work on."""

    token: torch.Tensor  # int64: the next token to read
    position: torch.Tensor  # int64: its position
    sequence: torch.Tensor  # int64: selects the random numbers
    active: torch.Tensor  # bool
    closing: torch.Tensor  # bool: the last token is known and only has to be read
    stop_state: torch.Tensor  # uint8: row of the stop table
    count: torch.Tensor  # int64: tokens generated
    limit: torch.Tensor  # int64: most tokens to generate
    generated: torch.Tensor  # int64 [slots + 1, most new tokens]

    @classmethod
    def allocate(cls, slots: int, most: int, device: torch.device) -> SlotState:
        """All zero, so that no slot is active."""

        def zeros(*more: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.zeros(slots + 1, *more, dtype=dtype, device=device)

        return cls(
            token=zeros(),
            position=zeros(),
            sequence=zeros(),
            active=zeros(dtype=torch.bool),
            closing=zeros(dtype=torch.bool),
            stop_state=zeros(dtype=torch.uint8),
            count=zeros(),
            limit=zeros(),
            generated=zeros(max(most, 1)),
        )


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. The model's logits are changed in no other way."""

    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Choosing:
    """How tokens are chosen and sequences end.

    table: uint8 [states, V], the stop automaton; states from `stopped` on end a sequence
    read_last: whether the last token is also read before a sequence leaves
    """

    sampling: Sampling
    table: torch.Tensor
    stopped: int
    read_last: bool


def advance(
    logits: torch.Tensor, lanes: torch.Tensor, state: SlotState, how: Choosing, reference: bool = False
) -> None:
    """logits [B, V] of the token that each lane (int64 [B], slots) has just read. No synchronisation.

    An active slot is in one lane only. Others, such as the spare one, may be in several lanes and are not changed.
    Triton where it runs unless `reference`.
    """
    run = advance_triton if has_triton(logits.device) and not reference else advance_reference
    run(logits, lanes, state, how)


def advance_reference(logits: torch.Tensor, lanes: torch.Tensor, state: SlotState, how: Choosing) -> None:
    """`advance` in plain torch."""
    active, closing = state.active[lanes], state.closing[lanes]
    count, position = state.count[lanes], state.position[lanes]
    token = choose(logits, state.sequence[lanes], position + 1, how.sampling.temperature, how.sampling.seed)
    growing = active & ~closing
    at = (lanes, count.clamp(max=state.generated.shape[1] - 1))
    state.generated[at] = torch.where(growing, token, state.generated[at])
    before = state.stop_state[lanes]
    after = torch.where(growing, how.table[before.long(), token], before)
    count = count + growing
    ends = growing & ((after >= how.stopped) | (count >= state.limit[lanes]))
    state.token[lanes] = torch.where(growing, token, state.token[lanes])
    state.position[lanes] = position + active
    state.stop_state[lanes] = after
    state.count[lanes] = count
    state.closing[lanes] = closing | ends
    state.active[lanes] = active & ~(closing if how.read_last else ends)


def choose(
    logits: torch.Tensor, sequence: torch.Tensor, position: torch.Tensor, temperature: float, seed: int
) -> torch.Tensor:
    """int64 [n]: the token chosen for each row of logits [n, V]; sequence, position: int64 [n] of the chosen token."""
    if temperature == 0.0:
        return logits.argmax(-1)
    vocabulary = torch.arange(logits.shape[-1], device=logits.device)
    key = torch.full_like(sequence, _seed_key(seed))
    for part in (sequence, sequence >> 32, position):
        key = _hash(key ^ (part & _MASK))
    bits = _hash(key[:, None] ^ _hash(vocabulary)[None])
    u = ((bits >> 9).float() + 0.5) * 2.0**-23  # 23 bits: with 24 the largest would round to 1 and always win
    a, b = _divisors(temperature)
    return (logits.float() / a - torch.log(-torch.log(u)) / b).argmax(-1)


def _divisors(temperature: float) -> tuple[float, float]:
    """Divisors of the logits and of their Gumbel noise: the scores are logit / T + noise, times one positive number."""
    return min(max(temperature, 1.0), _LARGEST), min(max(1.0 / temperature, 1.0), _LARGEST)


def _seed_key(seed: int) -> int:
    return _hash(_hash(seed & _MASK) ^ (seed >> 32 & _MASK))


def _hash(x: _Bits) -> _Bits:
    """A 32-bit mixer, two multiply-xorshift rounds, on Python's integers or int64 tensors."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def advance_triton(logits: torch.Tensor, lanes: torch.Tensor, state: SlotState, how: Choosing) -> None:
    """`advance` in two launches: the best token of each part of the vocabulary; then the best of all, and the state.

    ValueError if `lanes` or the logits of a lane are strided.
    """
    if not lanes.is_contiguous() or logits.stride(1) != 1:
        raise ValueError("lanes and the logits of each lane are contiguous")
    lane_count, vocabulary = logits.shape
    block = min(_BLOCK, triton.next_power_of_2(vocabulary))
    parts = triton.cdiv(vocabulary, block)
    best = torch.empty((2, lane_count, parts), dtype=torch.int32, device=logits.device)
    key = _seed_key(how.sampling.seed)
    _best_kernel[(lane_count, parts)](
        logits,
        lanes,
        state.sequence,
        state.position,
        best[0],
        best[1],
        logits.stride(0),
        vocabulary,
        *(_divisors(how.sampling.temperature) if how.sampling.temperature else (1.0, 1.0)),
        key - (key >> 31 << 32),  # the same bits as an int32
        SAMPLE=how.sampling.temperature != 0.0,
        BLOCK=block,
        num_warps=8,
    )
    _advance_kernel[(lane_count,)](
        best[0],
        best[1],
        lanes,
        state.token,
        state.position,
        state.active.view(torch.uint8),
        state.closing.view(torch.uint8),
        state.stop_state,
        state.count,
        state.limit,
        state.generated,
        how.table,
        parts,
        state.generated.shape[1],
        how.table.stride(0),
        how.stopped,
        READ_LAST=how.read_last,
        PARTS=triton.next_power_of_2(parts),
        num_warps=1,
    )


@triton.jit(do_not_specialize=["key"])
def _best_kernel(
    logits,  # [B, V], rows logits_row apart
    lanes,  # int64 [B]
    sequence,  # int64 [slots + 1]
    position,  # int64 [slots + 1]
    best_order,  # int32 [B, parts]: the best score of a part, as an integer that sorts as torch sorts floats
    best_token,  # int32 [B, parts]: the first token that has it
    logits_row,
    vocabulary,
    logits_divisor,
    noise_divisor,
    key,
    SAMPLE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lane, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = part * BLOCK + tl.arange(0, BLOCK)
    real = token < vocabulary
    score = tl.load(logits + lane * logits_row + token, mask=real, other=0.0).to(tl.float32)
    if SAMPLE:
        slot = tl.load(lanes + lane)
        number = tl.load(sequence + slot)
        draw = key.to(tl.uint32)
        draw = _mix(draw ^ number.to(tl.uint32))
        draw = _mix(draw ^ (number >> 32).to(tl.uint32))
        draw = _mix(draw ^ (tl.load(position + slot) + 1).to(tl.uint32))
        bits = _mix(_mix(token.to(tl.uint32)) ^ draw)
        u = ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2^-23
        score = tl.div_rn(score, logits_divisor) - tl.div_rn(tl.log(-tl.log(u)), noise_divisor)
    as_int = (score + 0.0).to(tl.int32, bitcast=True)  # + 0: -0 is 0
    order = as_int ^ ((as_int >> 31) & 0x7FFFFFFF)
    order = tl.where(score == score, order, 0x7FFFFFFF)
    order = tl.where(real, order, -0x80000000)
    best = tl.max(order, 0)
    at = lane * tl.num_programs(1) + part
    tl.store(best_order + at, best)
    tl.store(best_token + at, tl.min(tl.where(order == best, token, 0x7FFFFFFF), 0))


@triton.jit
def _mix(x):
    """`_hash` on uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _advance_kernel(
    best_order,  # int32 [B, parts]
    best_token,  # int32 [B, parts]
    lanes,  # int64 [B]
    token,  # this and what follows: the SlotState, flags as uint8
    position,
    active,
    closing,
    stop_state,
    count,
    limit,
    generated,  # int64 [slots + 1, most]
    table,  # uint8 [states, V]
    parts,
    most,
    table_row,
    stopped,
    READ_LAST: tl.constexpr,
    PARTS: tl.constexpr,
):
    lane = tl.program_id(0).to(tl.int64)
    slot = tl.load(lanes + lane)
    if tl.load(active + slot) != 0:  # other slots are not written: they may be in several lanes
        tl.store(position + slot, tl.load(position + slot) + 1)
        if tl.load(closing + slot) != 0:
            if READ_LAST:
                tl.store(active + slot, 0)
        else:
            part = tl.arange(0, PARTS)
            order = tl.load(best_order + lane * parts + part, mask=part < parts, other=-0x80000000)
            first = tl.load(best_token + lane * parts + part, mask=part < parts, other=0x7FFFFFFF)
            chosen = tl.min(tl.where(order == tl.max(order, 0), first, 0x7FFFFFFF), 0).to(tl.int64)
            before = tl.load(count + slot)
            after = tl.load(table + tl.load(stop_state + slot).to(tl.int64) * table_row + chosen)
            tl.store(token + slot, chosen)
            tl.store(generated + slot * most + tl.minimum(before, most - 1), chosen)
            tl.store(stop_state + slot, after)
            tl.store(count + slot, before + 1)
            if (after.to(tl.int32) >= stopped) | (before + 1 >= tl.load(limit + slot)):
                tl.store(closing + slot, 1)
                if not READ_LAST:
                    tl.store(active + slot, 0)
