"""Log-probabilities of the token behind each row, kept on the device by (slot, position) until a sequence ends.

A row's place in the buffers is computed as `capture.tap` computes it, and a value that was never written stops the run.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nla_engine.capture.row_range import RowRange
from nla_engine.config import CaptureOptions
from nla_engine.engine.following import PromptRows
from nla_engine.engine.request import NextTokens
from nla_engine.engine.scheduler import Run
from nla_engine.engine.transfer import to_device, to_host
from nla_engine.errors import EngineError
from nla_engine.models.load import LanguageModel
from nla_engine.models.logits import logit_pieces
from nla_engine.ops.likelihood import likelihood
from nla_engine.ops.places import row_places, row_places_reference
from nla_engine.ops.sampling import SlotState

#: The log-probability of a row that was not written: no log-probability is above 0, and NaN means that none follows.
_UNWRITTEN = 1.0
#: Most bytes of logits of prompts, as float32, that lie in memory at once.
_LOGIT_BYTES = 256 << 20


class NextTokenTap:
    """Keeps, for the rows in the range `rows`, the log-probability of the next token and the `top` likeliest tokens.

    rows_per_slot: room of a slot, in rows
    reference: use plain torch only
    Implements `engine.following.Following`, which the generator calls.
    """

    asked = True

    def __init__(
        self, top: int, rows: RowRange, *, rows_per_slot: int, device: torch.device, reference: bool = False
    ) -> None:
        self.top, self.rows, self.rows_per_slot = top, rows, rows_per_slot
        self._device = device
        self._row_places = row_places_reference if reference else row_places

    @property
    def row_bytes(self) -> int:
        """Bytes on the host of a row."""
        return 4 + 8 * self.top

    def allocate(self, slots: int) -> None:
        """Room for every slot, and for the spare one, where rows that are not kept are written."""
        size, device = (slots + 1) * self.rows_per_slot, self._device
        self._spare = slots * self.rows_per_slot
        self._logprob = torch.full((size,), _UNWRITTEN, dtype=torch.float32, device=device)
        self._top_id = torch.zeros((size, self.top), dtype=torch.int32, device=device)
        self._top_logprob = torch.zeros((size, self.top), dtype=torch.float32, device=device)
        self._first = torch.zeros(slots + 1, dtype=torch.int64, device=device)
        self._end = torch.zeros_like(self._first)
        self._start = np.zeros(slots + 1, np.int64)  # the same as _first, on the host

    def open(self, slots: list[int], prompt_sizes: list[int], totals: list[int]) -> None:
        """Mark every row of these slots as unwritten. EngineError if a sequence has too many rows."""
        first = [self.rows.first(size) for size in prompt_sizes]
        end = [self.rows.end(size, total) for size, total in zip(prompt_sizes, totals, strict=True)]
        if any(b - a > self.rows_per_slot for a, b in zip(first, end, strict=True)):
            raise EngineError("a sequence has more rows to keep than its slot has room for")
        columns = to_device(np.array([slots, first, end]), self._device)
        self._first[columns[0]], self._end[columns[0]] = columns[1], columns[2]
        self._start[slots] = first
        self._logprob.view(-1, self.rows_per_slot)[columns[0]] = _UNWRITTEN

    def of_prompts(self, runs: Sequence[Run], prefix: int) -> PromptRows:
        """The tokens of these runs that have rows. The last one that is read before more are chosen is not among
        them."""
        found: list[tuple[int, int, int, int]] = []
        before = 0  # tokens of the pass in front of the run
        for run in runs:
            request, slot, ids = run.admitted.request, run.admitted.slot, run.admitted.ids
            prompt_size, size = (
                prefix + len(request.token_ids),
                prefix + len(ids),
            )  # ids: with what was generated
            last = len(ids) - (request.max_new_tokens > 0)
            first, end = self.rows.first(prompt_size) - prefix, self.rows.end(prompt_size, size) - prefix
            for place in range(max(run.start, first), min(run.stop, end, last)):
                following = ids[place + 1] if place + 1 < len(ids) else -1
                found.append((before + place - run.start, slot, prefix + place, following))
            before += run.stop - run.start
        return PromptRows(*zip(*found, strict=True)) if found else PromptRows()

    def read(self, lm: LanguageModel, hidden: torch.Tensor, rows: PromptRows) -> None:
        """Logits of some of the states [n, d] at a time. Launches only: no synchronisation."""
        if not rows.token:
            return
        columns = to_device(np.array([rows.slot, rows.position, rows.following]), self._device)
        for at in logit_pieces(len(hidden), lm.vocab_size, _LOGIT_BYTES):
            slot, position, following = (column[at].contiguous() for column in columns)
            self._keep(lm.logits(hidden[at]), slot, position, following)

    def before(self, lanes: torch.Tensor, state: SlotState) -> tuple[torch.Tensor, torch.Tensor]:
        """The positions of the tokens just read, int64 [B], and whether a token will be chosen, bool [B]."""
        return state.position[lanes], state.active[lanes] & ~state.closing[lanes]

    def after(
        self,
        logits: torch.Tensor,
        lanes: torch.Tensor,
        state: SlotState,
        before: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """The chosen tokens are those that will be read next. Launches only: no synchronisation."""
        position, growing = before
        self._keep(logits, lanes, position, state.token[lanes].masked_fill(~growing, -1))

    def _keep(
        self, logits: torch.Tensor, slot: torch.Tensor, position: torch.Tensor, following: torch.Tensor
    ) -> None:
        """logits [n, V]; slot, position, following: int64 [n]."""
        place = self._row_places(slot, position, self._first, self._end, self.rows_per_slot)
        place = place.masked_fill(place < 0, self._spare)
        found = likelihood(logits, following, self.top)
        self._logprob[place] = found.chosen
        if self.top:
            self._top_id[place] = found.top_token.int()
            self._top_logprob[place] = found.top

    def collect(self, slots: Sequence[int], positions: Sequence[np.ndarray]) -> list[NextTokens | None]:
        """What was kept of these rows. EngineError if one was never written."""
        sizes = [len(at) for at in positions]
        owner = np.repeat(np.array(slots, np.int64), sizes)
        place = owner * self.rows_per_slot + np.concatenate(positions) - self._start[owner]
        at = to_device(place, self._device)
        logprob = to_host(self._logprob[at])
        if missing := int((logprob == _UNWRITTEN).sum()):
            raise EngineError(f"next tokens: {missing} rows of sequences that ended were never written")
        top_id, top_logprob = to_host(self._top_id[at]), to_host(self._top_logprob[at])
        parts = np.split(np.arange(len(place)), np.cumsum(sizes)[:-1])
        return [NextTokens(logprob[part], top_id[part], top_logprob[part]) for part in parts]


def following_of(
    options: CaptureOptions, rows: RowRange, rows_per_slot: int, device: torch.device, reference: bool
) -> NextTokenTap | None:
    """What the options ask for; None: nothing."""
    if options.next_token is None:
        return None
    return NextTokenTap(
        options.next_token, rows, rows_per_slot=rows_per_slot, device=device, reference=reference
    )
