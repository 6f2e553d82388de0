"""Requests that transformers' own generation runs together, and how far their lanes are."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from nla_engine.engine.request import Request
from nla_engine.engine.transfer import to_device


class Batch:
    """Requests that run together, shortest prompt first, each in a slot of its own.

    sizes: int64 [B], tokens of each prompt, the shared prefix among them; start: tokens that every lane has read;
    new: tokens per lane in the pass that runs; ends: one past the last position of each that may be read, int64 [B]
    """

    def __init__(
        self, requests: Sequence[Request], slots: Sequence[int], prefix: Sequence[int], device: torch.device
    ) -> None:
        self.requests = list(requests)
        self.prefix_size = len(prefix)
        self.prompts = [[*prefix, *request.token_ids] for request in requests]
        self.sizes = np.array([len(prompt) for prompt in self.prompts])
        self.shortest, self.longest = int(self.sizes.min()), int(self.sizes.max())
        self.limits = np.array([request.max_new_tokens for request in requests])
        self.slots = to_device(np.array(slots), device)
        self.ends = to_device(self.sizes + self.limits, device)
        padded = np.zeros((len(self.prompts), self.longest), np.int64)
        for lane, prompt in enumerate(self.prompts):
            padded[lane, : len(prompt)] = prompt
        self.padded = to_device(padded, device)
        self.last = (
            self.sizes - 1 + np.arange(len(self.prompts)) * self.longest
        )  # of each prompt, in one pass over all
        self.start, self.new = 0, self.shortest if self.limits.any() else self.longest
        # The last token at which a vector enters.
        self._entry = max(
            (self.prefix_size + place for each in requests for place in each.places), default=-1
        )

    @property
    def has_vectors(self) -> bool:
        """Whether vectors enter at all."""
        return self._entry >= 0

    def until(self, read_last: bool) -> int:
        """Tokens that the longest lane reads at most. read_last: whether it reads the last one that it generates."""
        return int((self.sizes + self.limits - ((self.limits > 0) & (not read_last))).max())

    def halves(self, prefix: Sequence[int], device: torch.device) -> list[Batch]:
        """The same requests in their slots, as two batches that have read nothing."""
        middle, slots = len(self.requests) // 2, self.slots.tolist()
        return [
            Batch(self.requests[part], slots[part], prefix, device)
            for part in (slice(middle), slice(middle, None))
        ]

    def entering(self, width: int) -> list[tuple[int, int, int]]:
        """Where vectors enter a pass over the last `width` tokens read: token of the pass, lane, number."""
        first = self.start + self.new - width
        if first > self._entry:
            return []
        return [
            (lane * width + self.prefix_size + place - first, lane, number)
            for lane, request in enumerate(self.requests)
            for number, place in enumerate(request.places)
            if first <= self.prefix_size + place < first + width
        ]
