"""A worker: one process of the cluster, with the model loaded once, that does units of a run one after the other.

A unit is a part of the run (`--shard`) with a store of its own. Doing it twice is the same as doing it once: a finished
unit is left as it is, an unfinished one is resumed after its last commit. Knows no Ray.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime

from nla_engine.capture.load import load_inputs
from nla_engine.capture.run import CaptureJob
from nla_engine.cluster.versions import versions
from nla_engine.config import CaptureOptions
from nla_engine.models.load import LanguageModel
from nla_engine.models.prompt_set import PromptSet
from nla_engine.store import CaptureStore
from nla_engine.store.objects import place
from nla_engine.store.swap import exists


@dataclass(frozen=True)
class Loaded:
    """What a worker says once it can work. sequences: of the whole run; skipped: prompt records that were left out."""

    sequences: int
    messages: list[str]
    skipped: int


class Worker:
    """Units of one run. It is given nothing before its versions are known: another version may not understand it."""

    _options: CaptureOptions
    _held: tuple[LanguageModel, PromptSet]

    def versions(self) -> dict[str, str]:
        """Of this process."""
        return versions()

    def load(self, options: CaptureOptions, clock: datetime) -> Loaded:
        """Load the model and read the prompts. options: of the run; clock: the time that a chat template is given.

        Raises what `load_inputs` raises.
        """
        self._options, self._held = options, load_inputs(options, clock=clock)
        prompts = self._held[1]
        return Loaded(len(prompts), prompts.messages(), len(prompts.skipped))

    def do(self, unit: str) -> tuple[int, int]:
        """Do a unit, such as "3/8": its sequences, and how many tokens were generated now.

        After `load`. Raises what `run_capture` raises; HeldError while another process writes it.
        """
        options = replace(self._options, shard=unit)
        job = CaptureJob(options, *self._held)
        if exists(place(options.target)):
            store = CaptureStore.open(options.target)
            if store.complete and store.options == job.recorded.unchanging():
                return store.sequences, 0
        summary = job.run()
        return summary.sequences, summary.tokens_generated
