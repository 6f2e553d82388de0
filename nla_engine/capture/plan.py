"""The plan of a capture: upper bounds of rows and bytes, slots, shared prompt tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nla_engine.capture.choice import RowChoice
from nla_engine.capture.load import chosen_sites
from nla_engine.codec.rows import Codec
from nla_engine.config import CaptureOptions
from nla_engine.engine.slots import BLOCK, Room, default_room, slot_blocks
from nla_engine.errors import RequestError
from nla_engine.models.load import LanguageModel
from nla_engine.models.prompt_set import PromptSet
from nla_engine.options import flag

#: Fewer shared prompt tokens are not worth a prefix.
SHORTEST_PREFIX = 8
#: Most sequences that are generated at once: more cost a matrix product as much per sequence.
DECODING_SLOTS = 512
#: Most slots when prompts are only read: a pass reads at most this many texts at once.
READING_SLOTS = 64


@dataclass(frozen=True)
class CapturePlan:
    """What a run will do. rows, bytes: upper bounds, since replies may end early; row_bytes: of one, in all layers.

    length: most tokens of a sequence; new: most that it generates; slot_rows: most rows of it
    held: bytes that a slot needs besides keys and values; workers: processes that do this at once, each with its room
    """

    sequences: int
    already_done: int
    rows: int
    bytes: int
    row_bytes: int
    codec: str
    room: Room
    length: int
    new: int
    slot_rows: int
    prefix: int
    whole: bool
    held: int = 0
    workers: int = 1

    @property
    def slots(self) -> int:
        """Sequences at once."""
        return self.room.slots

    def half(self) -> CapturePlan:
        """The same with half as much at once."""
        return replace(self, room=self.room.half(self._most_blocks()))

    def _most_blocks(self) -> int:
        """Blocks of a sequence of the longest length."""
        return slot_blocks(self.length, self.prefix)

    def _together(self) -> str:
        """In words, what all sequences have room for, where that is less than the longest length of each."""
        blocks = self.room.blocks
        if blocks is None or blocks >= self.slots * self._most_blocks():
            return ""
        return f" and {blocks * BLOCK:,} together"

    def __str__(self) -> str:
        done = f" ({self.already_done:,} already there)" if self.already_done else ""
        shared = f", {self.prefix} prompt tokens shared" if self.prefix else ""
        each = f" in each of {self.workers} workers" if self.workers > 1 else ""
        whole = "; the whole model runs, for the next tokens" if self.whole else ""
        return (
            f"{self.sequences:,} sequences{done}: at most {self.rows:,} rows, {_size(self.bytes)} as {self.codec}; "
            f"{self.slots} at once{each}, of at most {self.length:,} tokens{self._together()}{shared}{whole}"
        )


def _size(size: int) -> str:
    """Bytes in words."""
    return f"{size / 2**30:,.1f} GiB" if size >= 1 << 30 else f"{size / 2**20:.1f} MiB"


def room_for(options: CaptureOptions, lm: LanguageModel, plan: CapturePlan, sequences: int) -> Room:
    """What a process has room for on the model's device, if it runs so many sequences of the plan."""
    return _room(options, lm, plan.length, plan.prefix, plan.new, plan.held, sequences)


def _room(
    options: CaptureOptions, lm: LanguageModel, length: int, prefix: int, new: int, held: int, sequences: int
) -> Room:
    at_once = options.batch_size or (DECODING_SLOTS if new else READING_SLOTS)
    at_once = max(min(at_once, sequences), 1)
    given = at_once if options.batch_size else None
    return default_room(lm, length, prefix, most=at_once, held=held, slots=given)


def plan_capture(
    options: CaptureOptions,
    lm: LanguageModel,
    prompts: PromptSet,
    choice: RowChoice,
    limits: np.ndarray,
    todo: np.ndarray,
    workers: int = 1,
) -> CapturePlan:
    """Plan the run: slots from the batch size or the free memory, rows from the lengths.

    limits: most new tokens of each prompt, int64 [all]
    todo: int64 [n], ascending: the numbers of the prompts that are not done
    RequestError if it would have no rows.
    """
    keep = choice.keep
    new = int(limits[todo].max(initial=0))
    sizes, done = prompts.sizes[todo], len(prompts) - len(todo)
    prefix = prompts.common_prefix() if len(todo) > 1 else 0
    if prefix < SHORTEST_PREFIX or keep.first(prefix + 1) < prefix:
        prefix = 0  # its rows would be computed once, but every sequence needs them
    longest = int((sizes + limits[todo]).max(initial=1))
    known, first = np.unique(sizes, return_index=True)
    pairs = zip(known.tolist(), limits[todo][first].tolist(), strict=True)  # of one size, all have one limit
    slot_rows = max((keep.count(size, size + most) for size, most in pairs), default=0)
    asked = 0 if options.next_token is None else 4 + 8 * options.next_token  # bytes of a row
    held = asked * slot_rows
    room = _room(options, lm, longest, prefix, new, held, -(-len(todo) // workers))
    rows = choice.most_rows(todo, limits)
    if not rows and not done:
        raise RequestError(f"no row would be left of any prompt: change {_narrowing(options)}")
    row_bytes = Codec.named(options.codec, lm.d_model).row_bytes * len(chosen_sites(options, lm))
    row_bytes += asked
    return CapturePlan(
        sequences=len(prompts),
        already_done=done,
        rows=rows,
        bytes=rows * row_bytes,
        row_bytes=row_bytes,
        codec=options.codec,
        room=room,
        length=longest,
        new=new,
        slot_rows=max(slot_rows, 1),
        prefix=prefix,
        whole=not new and options.next_token is not None,
        held=held,
        workers=workers,
    )


def _narrowing(options: CaptureOptions) -> str:
    """The options that leave rows out, as the command line has them."""
    given = [
        name
        for name in ("min_position", "skip_special", "tokens", "every", "skip_first")
        if getattr(options, name) != getattr(CaptureOptions, name)
    ]
    return " or ".join(map(flag, ["positions", *given]))
