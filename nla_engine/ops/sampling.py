"""The end of a step: choose every lane's next token and advance its sequence. Reference in torch, Triton launches.

    greedy      argmax_v logit_v       the first of equal ones; NaN is largest, as torch.argmax
    sampled     argmax_v score_v       scores of `gumbel`, over the tokens that `truncation` keeps (by default all)

Two launches, or three if there is a truncation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nla_engine.config import AskOptions, CaptureOptions, WritingOptions
from nla_engine.ops import gumbel
from nla_engine.ops.backends import has_triton
from nla_engine.ops.gumbel import draw_key, draw_scores, first_of_best, sortable
from nla_engine.ops.triton_module import tl, triton
from nla_engine.ops.truncation import Truncation, kept, redraw

#: Logits per program.
_BLOCK = 4096


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
    """temperature 0 is greedy, and truncates nothing. The model's logits are changed in no other way."""

    temperature: float = 0.0
    seed: int = 0
    truncation: Truncation = Truncation()

    def __str__(self) -> str:
        if not self.temperature:
            return "greedy"
        return f"softmax at the temperature, {self.truncation}, no penalty"


def sampling_of(options: AskOptions | CaptureOptions | WritingOptions) -> Sampling:
    """What a run was asked for."""
    truncation = Truncation(options.top_p, options.top_k, options.min_p)
    return Sampling(options.temperature, options.seed, truncation)


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
    token = choose(logits, state.sequence[lanes], position + 1, how.sampling)
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
    logits: torch.Tensor, sequence: torch.Tensor, position: torch.Tensor, sampling: Sampling
) -> torch.Tensor:
    """int64 [n]: the token chosen for each row of logits [n, V]; sequence, position: int64 [n] of the chosen token."""
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    found = gumbel.scores(logits, sequence, position, sampling.temperature, sampling.seed)
    if sampling.truncation.cuts(logits.shape[-1]):
        found = found.masked_fill(~kept(logits, sampling.temperature, sampling.truncation), -torch.inf)
    return found.argmax(-1)


def advance_triton(logits: torch.Tensor, lanes: torch.Tensor, state: SlotState, how: Choosing) -> None:
    """`advance` in launches: the best token of each part of the vocabulary; then the best of all, and the state.

    A truncation comes between the two: if it does not keep the best of all, another token is drawn.
    ValueError if `lanes` or the logits of a lane are strided.
    """
    if not lanes.is_contiguous() or logits.stride(1) != 1:
        raise ValueError("lanes and the logits of each lane are contiguous")
    sampling = how.sampling
    lane_count, vocabulary = logits.shape
    block = min(_BLOCK, triton.next_power_of_2(vocabulary))
    parts = triton.cdiv(vocabulary, block)
    best = torch.empty((2, lane_count, parts), dtype=torch.int32, device=logits.device)
    order, token = best[0], best[1]
    key = gumbel.seed_key(sampling.seed)
    key -= key >> 31 << 32  # the same bits as an int32
    divisors = gumbel.divisors(sampling.temperature) if sampling.temperature else (1.0, 1.0)
    _best_kernel[(lane_count, parts)](
        logits,
        lanes,
        state.sequence,
        state.position,
        order,
        token,
        logits.stride(0),
        vocabulary,
        *divisors,
        key,
        SAMPLE=sampling.temperature != 0.0,
        BLOCK=block,
        num_warps=8,
    )
    if sampling.temperature and sampling.truncation.cuts(vocabulary):
        running = (state.sequence, state.position, state.active, state.closing)
        chosen = redraw(
            logits, lanes, running, best, sampling.temperature, divisors, key, sampling.truncation
        )
        order = token = chosen  # one part per lane: its best token is the best of all
        parts = 1
    _advance_kernel[(lane_count,)](
        order,
        token,
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
        draw = draw_key(key, sequence, position, slot)
        score = draw_scores(score, token, draw, logits_divisor, noise_divisor)
    order = tl.where(real, sortable(score), -0x80000000)
    best = tl.max(order, 0)
    at = lane * tl.num_programs(1) + part
    tl.store(best_order + at, best)
    tl.store(best_token + at, first_of_best(order, token))


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
            chosen = first_of_best(order, first).to(tl.int64)
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
