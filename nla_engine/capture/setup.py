"""What a capture generates with: the tap, and the generator of its plan, in whichever process the model is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from nla_engine.capture.next_token import following_of
from nla_engine.capture.plan import CapturePlan
from nla_engine.capture.row_range import RowRange
from nla_engine.capture.spill import RowKeeper
from nla_engine.capture.tap import Choose, RowTap
from nla_engine.codec.rows import Codec
from nla_engine.config import CaptureOptions
from nla_engine.engine.choose import AnyGenerator, open_generator
from nla_engine.engine.experts import why_no_graph
from nla_engine.engine.families import why_unfused
from nla_engine.engine.library_generator import LibraryGenerator
from nla_engine.engine.stopping import StopAutomaton
from nla_engine.errors import EngineError, RequestError
from nla_engine.models.load import LanguageModel
from nla_engine.ops.backends import Kernels, shortfall
from nla_engine.ops.sampling import sampling_of
from nla_engine.sites import Site
from nla_engine.store.objects import place

MAX_PREFILL_TOKENS = {"cpu": 2048, "cuda": 8192}


@dataclass(frozen=True)
class Setup:
    """Of one model on one device.

    prefix: the prompt tokens that all sequences share; choose: None: all rows of the range are stored
    host_bytes: for rows that are not in the store
    """

    options: CaptureOptions
    lm: LanguageModel
    sites: tuple[Site, ...]
    keep: RowRange
    stop: StopAutomaton | None
    choose: Choose | None
    codec: Codec
    sink_norm: Mapping[Site, float]
    prefix: tuple[int, ...]
    host_bytes: float
    announce: Callable[[str], None]

    def generator(self, plan: CapturePlan) -> AnyGenerator:
        """The generator of the plan. Its slots are halved until they fit the GPU's memory."""
        kernels = Kernels(self.options.kernels)
        for line in shortfall(self.lm.device):
            self.announce(line)
        if not kernels.plain(self.lm.device):
            for reason in filter(None, (why_unfused(self.lm.blocks), why_no_graph(self.lm.blocks))):
                self.announce(f"{self.lm.name}: {reason}")
        while True:
            try:
                generator = self._try(plan, kernels)
            except torch.cuda.OutOfMemoryError as error:
                if self.lm.ranks is not None:  # the other ranks are not where this one is
                    message = f"{self.lm.name}: {plan.slots} sequences at once do not fit the free GPU memory"
                    raise EngineError(f"{message}: lower --batch-size") from error
                if plan.slots == 1:
                    message = f"{self.lm.name}: one sequence of {plan.length} tokens does not fit the free GPU memory"
                    raise EngineError(message) from error
            else:
                break
            torch.cuda.empty_cache()
            plan = plan.half()
            self.announce(f"out of GPU memory while setting up: trying {plan.slots} sequences at once")
        if self.options.keep_partial and isinstance(generator, LibraryGenerator):
            generator.runner.close()
            raise RequestError(
                f"--keep-partial: {self.lm.name} runs by transformers' generation, which does not offer it: "
                "leave it out"
            )
        return generator

    def _try(self, plan: CapturePlan, kernels: Kernels) -> AnyGenerator:
        options, lm, new = self.options, self.lm, plan.new
        following = following_of(options, self.keep, plan.slot_rows, lm.device, kernels.reference)
        tap = RowTap(
            self.sites,
            self.codec,
            self.keep,
            rows_per_slot=max(self.keep.end(1, 1 + new) - 1, 1),
            sink_norm=self.sink_norm,
            device=lm.device,
            choose=self.choose,
            skip_sinks=options.skip_sinks,
            reference=kernels.reference,
            keeper=RowKeeper.beside(place(options.target), self.codec, len(self.sites), self.host_bytes),
        )
        return open_generator(
            lm if new or following else lm.truncated(max(site.layer for site in self.sites)),
            slots=plan.slots,
            blocks=plan.room.blocks,
            length=plan.length,
            prefix=self.prefix,
            tap=tap,
            kernels=kernels,
            announce=self.announce,
            how={
                "max_new_tokens": new,
                "stop": self.stop,
                "sampling": sampling_of(options),
                "read_last": "generated" in self.keep.names or "all" in self.keep.names,
                "max_prefill_tokens": MAX_PREFILL_TOKENS[lm.device.type],
                "following": following,
            },
        )


def library_attention(generator: AnyGenerator | None) -> str | None:
    """The attention of transformers' own generation, if that runs the model."""
    return generator.runner.attention if isinstance(generator, LibraryGenerator) else None
