"""How far stage 2 is: what the AV has written of a segment of rows, with what an earlier run or turn had written."""

from __future__ import annotations

import time
from collections.abc import Callable

from nla_engine.config import WritingOptions
from nla_engine.engine.forecast import Forecast, Tally
from nla_engine.progress import Progress
from nla_engine.roundtrip.verbalize import Verbalizer

#: Seconds between two looks.
_LOOK_SECONDS = 1.0
#: Explanations at once on each kind of device, unless the options say.
AT_ONCE = {"cpu": 64, "cuda": 1024}


class Watcher:
    """Called by the AV's generator, tells a Progress. written: explanations that are there; left: those of this segment
    that are not; known: whether no other segment will follow.
    """

    def __init__(
        self,
        progress: Progress,
        options: WritingOptions,
        verbalizer: Verbalizer,
        *,
        written: int,
        left: int,
        known: bool,
    ) -> None:
        tail = len(verbalizer.prompt.token_ids) - len(verbalizer.prompt.shared)
        device = verbalizer.lm.device.type
        slots = options.batch_size or AT_ONCE[device]
        # The prompt is read once for all samples of a vector.
        self._forecast = Forecast(left, left // options.samples * tail, options.max_new_tokens, slots, device)
        self._progress, self._known, self._written, self._left = progress, known, written, left
        self._last = 0.0
        self._before = Tally()  # of generators before this one: AV and AR may take turns
        self._now = Tally()

    def __call__(self, tally: Callable[[], Tally]) -> None:
        """From time to time, tell."""
        if (now := time.monotonic()) - self._last < _LOOK_SECONDS:
            return
        self._last, at = now, tally()
        if at is not self._now:
            self._before, self._now = self._before + self._now, at
        whole = self._before + at
        part = self._forecast.part(whole) if self._known else 0.0
        self._progress(
            self._written + whole.ended,
            self._written + self._left,
            tokens=whole.tokens,
            part=part,
            least=not whole.ended,
        )
