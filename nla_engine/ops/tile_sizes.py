"""How attention's Triton programs are cut, so that each fits the shared memory of its card."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch

from nla_engine.ops.cards import HOPPER, SHARED_KIB, Card, card_of
from nla_engine.ops.triton_module import triton

#: Query rows of a program that reads the shared prefix; half as many for wide heads.
PREFIX_ROWS = 64
#: Places of a long sequence that one program reads in a decode step, and the length from which sequences are divided.
LONG_PART, DIVIDED_FROM = 1024, 4096
#: Fewest places of a part. If there are few sequences, parts are as small as it takes to give every multiprocessor this
#: many programs.
LEAST_PART, PROGRAMS = 128, 1
#: Decode steps over heads of up to so many channels take four warps per program if a multiprocessor has few programs,
#: or not many and a lane may have so many places that one has far more than most: it would hold up the step.
_NARROW, _FEW, _MANY, _UNEVEN_FROM = 64, 5, 24, 384
_INTERPRETED = Card(0, "Triton's interpreter", HOPPER, 1024 * SHARED_KIB[HOPPER])


@dataclass(frozen=True)
class Cut:
    """The size of a program: query rows; keys per block; warps; stages of Triton's pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int

    def shared_bytes(self, size: int, itemsize: int, card: Card, rest: int = 0) -> int:
        """The most shared memory that Triton takes for heads of `size` channels, `rest` more of queries and keys."""
        width = head_width(size)
        # Cards with wgmma or tcgen05 read operands from shared memory, which then holds one more stage.
        buffers = self.stages if card.capability[0] in (9, 10, 11) else self.stages - 1
        rows = (buffers * self.keys + self.rows) * head_width(rest) if rest else buffers * self.keys * width
        values = rows + buffers * self.keys * width + self.rows * width + self.rows * self.keys
        return itemsize * values + 8 * self.rows


@functools.cache
def cut_for(
    size: int, itemsize: int, rows: int, card: Card, part: int = 0, rest: int = 0, quick: bool = False
) -> Cut:
    """The cut for `rows` query rows of heads of `size` channels: the fastest known, reduced until it fits the card.

    Its rows are `rows` divided by a power of two. part: places that a program reads of a sequence that has several
    programs; 0: it has one. rest: channels of queries and keys behind those of the values, which are a part of the
    keys; 0: none. quick: as `quick_step` says it. ValueError if nothing fits.
    """
    small = size <= 128 and itemsize < 4
    if small and rows == 16 and not (part or quick):
        cut = Cut(rows, 32, 1, 2)  # a decode step only streams keys and values: many programs at once
    elif rest:  # rows of sums are wide, so a warp holds few
        while rows > 64:
            rows //= 2
        cut = Cut(rows, 32, 4 if rows == 16 else 8, 2)
    else:
        cut = Cut(rows, 64 if size <= 128 else 32, 4, 3 if small else 2)
    while cut.shared_bytes(size, itemsize, card, rest) > card.shared_bytes:
        if cut.stages > 2:
            cut = replace(cut, stages=cut.stages - 1)
        elif cut.rows > 16:
            cut = replace(cut, rows=cut.rows // 2)
        elif cut.keys > 16:
            cut = replace(cut, keys=cut.keys // 2)
        else:
            raise ValueError(f"heads of {size} channels do not fit the shared memory of {card}")
    return cut


def quick_step(size: int, places: int, programs: int, card: Card) -> bool:
    """Whether each program of a decode step should be quick, rather than all of them read the most at once.

    size: channels of a head; places: that a sequence may have; programs: one for each lane and key/value head
    """
    most = _MANY if places > _UNEVEN_FROM else _FEW
    return size <= _NARROW and programs <= most * card.processors


def part_for(places: int, programs: int, block: int, card: Card) -> int:
    """Places of a sequence that one program reads in a decode step, a multiple of `block`; 0: all `places` of it.

    programs: how many there are if sequences are not divided. Few would leave the card idle, and one long sequence
    would hold up the others.
    """
    part, room = LONG_PART, PROGRAMS * card.processors
    while part > max(LEAST_PART, block) and programs * places < room * part:
        part //= 2
    if part % block or part >= places or not (part < LONG_PART or places > DIVIDED_FROM):
        return 0
    return part


def card_or_interpreter(device: torch.device) -> Card:
    """The card of a device. For a CPU, where kernels are interpreted, one with Hopper's shared memory."""
    return card_of(device) if device.type == "cuda" else _INTERPRETED


def head_width(size: int) -> int:
    """Channels of a head as the kernels hold it, padded."""
    return max(16, triton.next_power_of_2(size))
