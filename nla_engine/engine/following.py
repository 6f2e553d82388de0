"""What the model says of the token behind each row: what the generator calls for it. capture/next_token.py keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from nla_engine.engine.request import NextTokens
from nla_engine.engine.scheduler import Run
from nla_engine.models.load import LanguageModel
from nla_engine.ops.sampling import SlotState


@dataclass(frozen=True)
class PromptRows:
    """Tokens of a prefill pass whose next token is asked for: n rows of prompts.

    token: their index in the pass; slot, position: of each; following: the id of the token behind, -1 for none
    """

    token: tuple[int, ...] = ()
    slot: tuple[int, ...] = ()
    position: tuple[int, ...] = ()
    following: tuple[int, ...] = ()


class Following(Protocol):
    """Keeps, for rows of running sequences, log-probabilities of the token that follows and of the likeliest ones."""

    @property
    def asked(self) -> bool:
        """Whether anything is kept: then the model's head has to give the logits that transformers gives."""

    @property
    def row_bytes(self) -> int:
        """Bytes on the host of a row."""

    def allocate(self, slots: int) -> None:
        """Allocate the device memory, before any pass."""

    def open(self, slots: list[int], prompt_sizes: list[int], totals: list[int]) -> None:
        """Start new sequences in these slots, each of at most `total` tokens, `prompt_size` of them given."""

    def of_prompts(self, runs: Sequence[Run], prefix: int) -> PromptRows:
        """Which tokens of a prefill pass of these runs are to be read, except those whose next token is chosen."""

    def read(self, lm: LanguageModel, hidden: torch.Tensor, rows: PromptRows) -> None:
        """Take final hidden states [n, d] of these rows. No synchronisation."""

    def before(self, lanes: torch.Tensor, state: SlotState) -> Any:
        """Called in every step, before the next tokens are chosen. No synchronisation."""

    def after(self, logits: torch.Tensor, lanes: torch.Tensor, state: SlotState, before: Any) -> None:
        """Called in every step, once they are chosen, with the logits [B, V]. No synchronisation."""

    def collect(self, slots: Sequence[int], positions: Sequence[np.ndarray]) -> Sequence[NextTokens | None]:
        """What was kept of the rows at these positions, int64 [k], of sequences that ended in these slots."""


class NotAsked:
    """Keeps nothing."""

    asked = False
    row_bytes = 0

    def allocate(self, slots: int) -> None:
        """Nothing to do."""

    def open(self, slots: list[int], prompt_sizes: list[int], totals: list[int]) -> None:
        """Nothing to do."""

    def of_prompts(self, runs: Sequence[Run], prefix: int) -> PromptRows:
        """No token."""
        return PromptRows()

    def read(self, lm: LanguageModel, hidden: torch.Tensor, rows: PromptRows) -> None:
        """Nothing to do."""

    def before(self, lanes: torch.Tensor, state: SlotState) -> Any:
        """Nothing to do."""

    def after(self, logits: torch.Tensor, lanes: torch.Tensor, state: SlotState, before: Any) -> None:
        """Nothing to do."""

    def collect(self, slots: Sequence[int], positions: Sequence[np.ndarray]) -> Sequence[NextTokens | None]:
        """None of each."""
        return [None] * len(slots)
