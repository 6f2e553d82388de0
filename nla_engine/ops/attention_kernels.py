"""Triton kernels of attention: over the shared prefix, over a slot's blocks, and over the parts of a long sequence.

`attention.py` says what they compute and launches them.
"""

from __future__ import annotations

from nla_engine.ops.triton_module import tl, triton


@triton.jit
def prefix_kernel(
    q,  # [T, H, h]
    prefix_keys,  # [P, KV, h]
    prefix_values,  # [P, KV, h], strides of prefix_keys
    partial,  # float32 [T, H, h], contiguous: the sum of weighted values so far
    sums,  # float32 [T, H]: the sum of weights so far
    biggests,  # float32 [T, H]: the score that weights are relative to
    sinks,  # float [H]; not read unless SINKS
    slopes,  # float32 [H]; None: the scores have no biases
    positions,  # int64 [T]
    q_token,
    q_head,
    prefix_position,
    prefix_head,
    prefix_size,
    tokens,
    window,
    scale,
    softcap,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    REST: tl.constexpr,  # channels of queries and keys behind those of the values, if these are a part of the keys
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,  # as `Shape.window_kind` says it
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    ROUND: tl.constexpr,  # see `_biases`
    COARSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the queries of BLOCK_M rows see of the shared prefix."""
    group = tl.program_id(1)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # row r is head r % G of token r // G
    token = (row // GROUP).to(tl.int64)
    mine = token < tokens
    head = group * GROUP + row % GROUP
    channel = tl.arange(0, BLOCK_H)
    real = channel < HEAD
    q_at = token * q_token + head * q_head
    block = tl.load(q + q_at[:, None] + channel[None], mask=mine[:, None] & real[None], other=0.0)
    block_rest = block
    if REST:
        further = HEAD + tl.arange(0, BLOCK_R)
        behind = further < HEAD + REST
        block_rest = tl.load(q + q_at[:, None] + further[None], mask=mine[:, None] & behind[None], other=0.0)
    own = tl.load(positions + token, mask=mine, other=0).to(tl.int32)

    slope = None if slopes is None else tl.load(slopes + head, mask=mine, other=0.0)
    biggest, total = _begin(sinks, head, mine, BLOCK_M, SINKS)
    acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    k_base = prefix_keys + group * prefix_head
    v_base = prefix_values + group * prefix_head
    for start in range(0, prefix_size, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        there = at < prefix_size
        place = at.to(tl.int64)[:, None] * prefix_position + channel[None]
        k = tl.load(k_base + place, mask=there[:, None] & real[None], other=0.0)
        v, k_rest = k, k
        if REST:
            rest_place = at.to(tl.int64)[:, None] * prefix_position + further[None]
            k_rest = tl.load(k_base + rest_place, mask=there[:, None] & behind[None], other=0.0)
        else:
            v = tl.load(v_base + place, mask=there[:, None] & real[None], other=0.0)
        seen = there[None] & mine[:, None]
        if WINDOW:
            seen = seen & (at[None] >= _first(own, window, WINDOW)[:, None])
        biases = None if slopes is None else _biases(slope, at, own, ROUND, COARSE)
        acc, total, biggest = fold(
            block,
            k,
            block_rest,
            k_rest,
            v,
            seen,
            acc,
            total,
            biggest,
            scale,
            softcap,
            biases,
            SOFTCAP,
            REST,
            PRECISION,
        )

    flat = token * (tl.num_programs(1) * GROUP) + head
    tl.store(partial + flat[:, None] * HEAD + channel[None], acc, mask=mine[:, None] & real[None])
    tl.store(sums + flat, total, mask=mine)
    tl.store(biggests + flat, biggest, mask=mine)


@triton.jit
def attend_kernel(
    q,  # [T, H, h]
    keys,  # [blocks, SIZE, KV, h]
    values,  # [blocks, SIZE, KV, h], strides of keys
    out,  # [T, H, h], contiguous
    partial,  # float32 [T, H, h], contiguous: from the prefix's kernel; unused without PREFIX
    sums,  # float32 [T, H]: the same
    biggests,  # float32 [T, H]: the same
    sinks,  # float [H]; not read unless SINKS
    slopes,  # float32 [H]; None: the scores have no biases
    part_sums,  # float32 [parts, T, H, h], contiguous: what the parts of long sequences give; unused without PART
    part_totals,  # float32 [parts, T, H]: the same
    part_biggests,  # float32 [parts, T, H]: the same
    tile_token,  # int64 [tiles]
    tile_count,
    tile_slot,
    tile_position,
    table,  # int32 [slots, columns]
    q_token,
    q_head,
    table_slot,
    kv_block,
    kv_position,
    kv_head,
    prefix_size,
    window,
    scale,
    softcap,
    PREFIX: tl.constexpr,
    SHARED: tl.constexpr,  # a tile has several programs
    PART: tl.constexpr,  # places that a program reads, a multiple of SIZE; 0: all
    SIZE: tl.constexpr,  # a multiple of BLOCK_N
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    REST: tl.constexpr,  # channels of queries and keys behind those of the values, if these are a part of the keys
    BLOCK_H: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    ROUND: tl.constexpr,  # see `_biases`
    COARSE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What the queries of a tile, or of some of its rows, see of their slot; with PART, of a part of it."""
    tile, group = tl.program_id(0), tl.program_id(1)
    token = tl.load(tile_token + tile)
    count = tl.load(tile_count + tile).to(tl.int32)
    slot = tl.load(tile_slot + tile)
    first = tl.load(tile_position + tile).to(tl.int32)
    end = first + count - prefix_size  # places in the slot
    low = 0
    if WINDOW:
        low = tl.maximum(_first(first, window, WINDOW) - prefix_size, 0)
    if PART:
        part, first_part, last_part = tl.program_id(2), low // PART, (end - 1) // PART
        if (part < first_part) | (part > last_part):
            return
        low = tl.maximum(low, part * PART)
        end = tl.minimum(end, (part + 1) * PART)

    row = tl.arange(0, BLOCK_M)  # row r is head r % G of token r // G
    if SHARED:  # else the compiler knows the rows, which saves 2% of a decode step
        row += tl.program_id(2) * BLOCK_M
    mine = row // GROUP < count
    channel = tl.arange(0, BLOCK_H)
    real = channel < HEAD
    own = first + row // GROUP
    head = group * GROUP + row % GROUP
    q_at = (token + row // GROUP) * q_token + head * q_head
    block = tl.load(q + q_at[:, None] + channel[None], mask=mine[:, None] & real[None], other=0.0)
    slope = None if slopes is None else tl.load(slopes + head, mask=mine, other=0.0)
    block_rest = block
    if REST:
        further = HEAD + tl.arange(0, BLOCK_R)
        behind = further < HEAD + REST
        block_rest = tl.load(q + q_at[:, None] + further[None], mask=mine[:, None] & behind[None], other=0.0)

    flat = (token + row // GROUP) * (tl.num_programs(1) * GROUP) + head
    out_at = flat[:, None] * HEAD + channel[None]
    if PREFIX:
        biggest = tl.load(biggests + flat, mask=mine, other=-float("inf"))
        total = tl.load(sums + flat, mask=mine, other=0.0)
        acc = tl.load(partial + out_at, mask=mine[:, None] & real[None], other=0.0)
    else:
        biggest, total = _begin(sinks, head, mine, BLOCK_M, SINKS)
        acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    if PART:
        begins = part == first_part  # the others have seen neither prefix nor sink
        biggest = tl.where(begins, biggest, -float("inf"))
        total = tl.where(begins, total, 0.0)
        acc = tl.where(begins, acc, 0.0)

    low = low // BLOCK_N * BLOCK_N
    k_base = keys + group * kv_head
    v_base = values + group * kv_head
    entry = table + slot * table_slot
    number = tl.load(entry + low // SIZE)
    for start in range(low, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        there = at < end
        base = number.to(tl.int64) * kv_block
        number = tl.load(entry + (start + BLOCK_N) // SIZE)  # ahead, so that no key waits for it
        inside = start % SIZE + tl.arange(0, BLOCK_N)
        place = base + inside.to(tl.int64)[:, None] * kv_position + channel[None]
        k = tl.load(k_base + place, mask=there[:, None] & real[None], other=0.0)
        v, k_rest = k, k
        if REST:
            rest_place = base + inside.to(tl.int64)[:, None] * kv_position + further[None]
            k_rest = tl.load(k_base + rest_place, mask=there[:, None] & behind[None], other=0.0)
        else:
            v = tl.load(v_base + place, mask=there[:, None] & real[None], other=0.0)
        seen = there[None] & (at[None] + prefix_size <= own[:, None])
        if WINDOW:
            seen = seen & (at[None] + prefix_size >= _first(own, window, WINDOW)[:, None])
        biases = None if slopes is None else _biases(slope, at + prefix_size, own, ROUND, COARSE)
        acc, total, biggest = fold(
            block,
            k,
            block_rest,
            k_rest,
            v,
            seen,
            acc,
            total,
            biggest,
            scale,
            softcap,
            biases,
            SOFTCAP,
            REST,
            PRECISION,
        )

    stored = mine
    if PART:
        begin = tl.zeros([BLOCK_M], tl.int32) + first_part
        part_at = flat + part.to(tl.int64) * tl.num_programs(0) * (tl.num_programs(1) * GROUP)
        kept = mine & (begin < last_part)
        tl.store(part_sums + part_at[:, None] * HEAD + channel[None], acc, mask=kept[:, None] & real[None])
        tl.store(part_totals + part_at, total, mask=kept)
        tl.store(part_biggests + part_at, biggest, mask=kept)
        stored = mine & (begin == last_part)  # alone
    result = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + out_at, result.to(out.dtype.element_ty), mask=stored[:, None] & real[None])


@triton.jit
def join_kernel(
    out,  # [T, H, h], contiguous
    part_sums,  # float32 [parts, T, H, h], contiguous
    part_totals,  # float32 [parts, T, H]
    part_biggests,  # float32 [parts, T, H]
    positions,  # int64 [T]
    prefix_size,
    window,
    HEAD: tl.constexpr,
    BLOCK_H: tl.constexpr,
    WINDOW: tl.constexpr,
    PART: tl.constexpr,
    BLOCK_P: tl.constexpr,  # parts read at once
):
    """Joins the parts of one query and head, unless there is only one, which has written its result."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    position = tl.load(positions + token).to(tl.int32)
    low = 0
    if WINDOW:
        low = tl.maximum(_first(position, window, WINDOW) - prefix_size, 0)
    first_part, last_part = low // PART, (position - prefix_size) // PART
    if first_part == last_part:
        return
    channel = tl.arange(0, BLOCK_H)
    real = channel < HEAD
    flat = token * tl.num_programs(1) + head
    all_ = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    biggest = -float("inf")
    total = 0.0
    acc = tl.zeros([BLOCK_H], tl.float32)
    for begin in range(first_part, last_part + 1, BLOCK_P):
        part = begin + tl.arange(0, BLOCK_P)
        there = part <= last_part
        at = part.to(tl.int64) * all_ + flat
        biggests = tl.load(part_biggests + at, mask=there, other=-float("inf"))
        largest = tl.maximum(biggest, tl.max(biggests, 0))
        weight = tl.exp(biggests - largest)
        shrink = tl.exp(biggest - largest)
        totals = tl.load(part_totals + at, mask=there, other=0.0)
        sums_at = part_sums + at[:, None] * HEAD + channel[None]
        sums = tl.load(sums_at, mask=there[:, None] & real[None], other=0.0)
        total = total * shrink + tl.sum(totals * weight, 0)
        acc = acc * shrink + tl.sum(sums * weight[:, None], 0)
        biggest = largest
    tl.store(out + flat * HEAD + channel, (acc / total).to(out.dtype.element_ty), mask=real)


@triton.jit
def _first(own, window, WINDOW: tl.constexpr):
    """The first position that a query at position own sees; below 0: all. WINDOW: as `Shape.window_kind` says it."""
    if WINDOW == 2:
        return own // window * window
    else:
        return own - window + 1


@triton.jit
def _begin(sinks, head, mine, ROWS: tl.constexpr, SINKS: tl.constexpr):
    """The running softmax of rows before any key: the score that weights are relative to, and the sum of weights."""
    if SINKS:
        return tl.load(sinks + head, mask=mine, other=0.0).to(tl.float32), tl.full([ROWS], 1.0, tl.float32)
    else:
        return tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32)


@triton.jit
def _biases(slope, at, own, ROUND: tl.constexpr, COARSE: tl.constexpr):
    """ALiBi, [M, N]: slope [M] times position `at` [N] of the keys; own: positions [M] of the queries.

    ROUND: the dtype that products are rounded to; COARSE: so are positions. None: neither. A softmax then sees the
    same from the query, where the numbers are small.
    """
    if ROUND is None:
        biases = slope[:, None] * (at[None] - own[:, None]).to(tl.float32)
    else:  # no early return: Triton 3.6 compiles what stands behind it
        place = at.to(tl.float32)
        if COARSE:
            place = place.to(ROUND).to(tl.float32)
        biases = (slope[:, None] * place[None]).to(ROUND).to(tl.float32)
    return biases


@triton.jit
def fold(
    q, k, q_rest, k_rest, v, seen, acc, total, biggest, scale, softcap, biases,
    SOFTCAP: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one block of keys [N, h] and values [N, h] to the running softmax of q [M, h].

    q_rest, k_rest: further channels of both [M, r], [N, r]; not read unless REST
    """
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if REST:
        scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)
    scores *= scale
    if SOFTCAP:
        ratio = scores / softcap
        scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * ratio)) - 1.0)  # tanh
    if biases is not None:
        scores += biases
    scores = tl.where(seen, scores, -float("inf"))
    largest = tl.maximum(biggest, tl.max(scores, 1))
    safe = tl.where(largest == -float("inf"), 0.0, largest)  # nothing seen yet
    weights = tl.exp(scores - safe[:, None])
    shrink = tl.exp(biggest - safe)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
    return acc, total, largest
