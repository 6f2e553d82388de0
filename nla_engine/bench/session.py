"""One benchmark run: the model and the ceilings that the suites share, and how a case is measured and recorded.

A case that fails, or for which no time is left, is named in the result. The other cases run.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.markup import escape

from nla_engine.bench.limits import Hardware, ModelSize, measure_hardware
from nla_engine.bench.report import Line, Machine, format_number
from nla_engine.bench.settings import Settings, Sizes
from nla_engine.bench.shapes import find_shape, loaded_model, random_model
from nla_engine.bench.timing import free_memory
from nla_engine.errors import RequestError
from nla_engine.models.load import LanguageModel


class Prepared(NamedTuple):
    """A case ready to run. once: does the work and returns the figure, in the case's unit.

    brief: a shorter run of the same work, for the profiler.
    """

    once: Callable[[], float]
    brief: Callable[[], object] | None = None


class WrongWork(Exception):
    """A case did not do the work that it was asked for, so its time means nothing."""


@dataclass
class Session:
    """What suites are given. directory: where they may write files; recorded: called after each case."""

    settings: Settings
    machine: Machine
    hardware: Hardware
    directory: Path
    console: Console
    lines: list[Line] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)
    recorded: Callable[[], object] = lambda: None

    @classmethod
    def start(cls, settings: Settings, directory: Path, console: Console) -> Session:
        """Measure the hardware and begin."""
        started = time.monotonic()
        hardware = measure_hardware(settings.device, settings.dtype)
        free_memory(settings.device)
        session = cls(settings, Machine.here(settings.device), hardware, directory, console, started=started)
        copy, flops = hardware.copy / 1e9, hardware.flops / 1e12
        console.print(
            f"{session.machine.gpu}: copy {format_number(copy)} GB/s, products {format_number(flops)} TFLOP/s",
            highlight=False,
        )
        return session

    @property
    def device(self) -> torch.device:
        return self.settings.device

    @property
    def sizes(self) -> Sizes:
        return self.settings.sizes

    @cached_property
    def lm(self) -> LanguageModel:
        """The model, made or loaded when the first suite asks for it."""
        name, device, dtype = self.settings.model, self.device, self.settings.dtype
        if name is not None:
            return loaded_model(name, device, dtype)
        return random_model(self.settings.shape, device, dtype)

    @cached_property
    def size(self) -> ModelSize:
        return ModelSize.of(self.lm)

    @cached_property
    def layer(self) -> int:
        """The block that is tapped, which is also the last block of an AR."""
        layer = self.settings.layer
        if layer is None and self.settings.model is None:
            layer = find_shape(self.settings.shape).layer
        elif layer is None:
            layer = len(self.lm.blocks) * 5 // 7
        self.lm.check_layer(layer)
        return layer

    @property
    def model_name(self) -> str:
        """The shape, or the last part of the checkpoint's name."""
        return Path(self.settings.model).name if self.settings.model is not None else self.settings.shape

    @cached_property
    def config(self) -> Any:
        """Config of the text model. For random weights it is known without making the model."""
        return self.lm.config if self.settings.model is not None else find_shape(self.settings.shape).config()

    @property
    def d_model(self) -> int:
        """Width of the rows."""
        return int(self.config.hidden_size)

    @property
    def mlp_width(self) -> int:
        """Channels between the two halves of an MLP."""
        return int(self.config.intermediate_size)

    def measure(
        self,
        suite: str,
        case: str,
        unit: str,
        prepared: AbstractContextManager[Prepared],
        *,
        limit: float | None = None,
        against: Line | None = None,
        warmups: int = 1,
        repeats: int | None = None,
        detail: Callable[[float], str] = lambda p50: "",
    ) -> Line | None:
        """Run a case `warmups` times, then `repeats` times for the record. None if it is skipped or fails.

        against: the line that this one is compared with.
        """
        settings = self.settings
        if settings.time_limit is not None and time.monotonic() - self.started > settings.time_limit:
            self.skipped.append(f"{suite}: {case}")
            self.console.print(
                f"{suite:12} {escape(case)}: skipped, the time limit has passed", style="yellow"
            )
            return None
        line = Line(suite, case, unit, [], limit)
        try:
            with prepared as work:
                for _ in range(warmups):
                    work.once()
                line.values = [work.once() for _ in range(repeats or settings.repeats)]
                if self.device.type == "cuda":
                    line.peak_gib = torch.cuda.max_memory_allocated(self.device) / 2**30 or None
                if settings.profile is not None and work.brief is not None:
                    self._profile(settings.profile, f"{suite}-{case}", work.brief)
        except Exception as error:
            if settings.debug:
                self.console.print_exception()
            self.__dict__.pop("lm", None)  # a failed engine may have left its own parts in the modules
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            self.failed.append({"suite": suite, "case": case, "error": message})
            self.console.print(f"{suite:12} {escape(case)}: failed: {escape(message)}", style="red")
            if not line.values:
                return None
        finally:
            free_memory(self.device)
        line.detail = detail(line.p50)
        line.compare(against)
        self.record(line)
        return line

    def record(self, line: Line) -> None:
        """Keep a line and print it at once, so that a run that is interrupted has printed what it measured."""
        self.lines.append(line)
        part = f", {line.p50 / line.limit:.1%} of the limit" if line.limit else ""
        more = f" ({line.detail})" if line.detail else ""
        self.console.print(
            f"{line.suite:12} {escape(line.case)}: {format_number(line.p50)} {line.unit}{part}{more}",
            highlight=False,
            soft_wrap=True,
        )
        self.recorded()

    def find(self, suite: str, start: str) -> Line | None:
        """The first line of a suite whose case begins with `start`."""
        return next((e for e in self.lines if e.suite == suite and e.case.startswith(start)), None)

    def _profile(self, directory: Path, name: str, brief: Callable[[], object]) -> None:
        """A Chrome trace of one brief run, and the table of its kernels by time."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        order = "self_cpu_time_total"
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            order = "self_device_time_total"
        directory.mkdir(parents=True, exist_ok=True)
        with torch.profiler.profile(activities=activities) as profile:
            brief()
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        stem = directory / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        summary = profile.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90)
        stem.with_suffix(".txt").write_text(summary, encoding="utf-8")
        profile.export_chrome_trace(f"{stem}.trace.json")


def expect(what: str, actual: int, wanted: int) -> None:
    """WrongWork unless the counts agree."""
    if actual != wanted:
        raise WrongWork(f"{actual:,} {what} instead of {wanted:,}")


def check_plot(path: Path | None) -> None:
    """RequestError if a plot is asked for but matplotlib is missing."""
    if path is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError as error:
            raise RequestError("--plot needs matplotlib: install it, or leave --plot out") from error
