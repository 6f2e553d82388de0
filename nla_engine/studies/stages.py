"""The model runs of a study, inside its directory: capture, explanations, samples, and texts that the AR reads again.

Each run resumes where it was interrupted. Calls the stages as any user does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.capture.run import run_capture
from nla_engine.config import CaptureOptions, RoundtripOptions
from nla_engine.models.load import pick_device, pick_dtype
from nla_engine.ops.backends import Kernels
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.results import read_metadata
from nla_engine.roundtrip.run import run_roundtrip
from nla_engine.roundtrip.verbalize import Verbalizer
from nla_engine.store import CaptureStore
from nla_engine.store.shards import write_file_atomically
from nla_engine.studies.directory import EXPLAINED, PROBLEMS, REREAD, SAMPLES, STORE
from nla_engine.studies.models import Models
from nla_engine.studies.reread import Reading, run_reread
from nla_engine.workers.devices import worker_devices

#: progress(what is counted): a context that gives a function (done, in all)
Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class Stages:
    """The runs in the directory `out`. `StudyDirectory` has checked that the same options made what is there.

    gpus, workers: as `workers.devices.worker_devices` takes them; with several, each run has processes of its own
    """

    out: Path
    models: Models
    announce: Callable[[str], None]
    progress: Progress
    seed: int = 0
    batch_size: int | None = None
    dtype: str | None = None
    device: str | None = None
    gpus: str | None = None
    workers: int = 1
    kernels: str = "auto"
    trust_remote_code: bool = False

    def capture(
        self, records: Sequence[Mapping[str, object]], *, max_new_tokens: int, positions: str
    ) -> CaptureStore:
        """The base model's replies to the records of a prompts file, which is written too."""
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_file_atomically(self.out / PROBLEMS, lines.encode())
        options = CaptureOptions(
            model=self.models.base,
            prompts=(self.out / PROBLEMS,),
            layer=(self.models.layer,),
            out=str(self.out / STORE),
            max_new_tokens=max_new_tokens,
            positions=positions,
            **self._common(),
        )
        with self.progress("sequences") as update:
            run_capture(options, announce=self.announce, progress=update)
        return CaptureStore.open(self.out / STORE)

    def load_pair(self) -> tuple[Verbalizer | None, Reconstructor | None]:
        """AV and AR, for the runs that follow; None if these have processes of their own, which load them."""
        if len(self._devices) > 1:
            return None, None
        return Verbalizer.load(self.models.av, **self._how()), self._load_ar()

    def _load_ar(self) -> Reconstructor:
        return Reconstructor.load(self.models.ar, **self._how())

    def _how(self) -> dict[str, Any]:
        device = pick_device(self._devices[0] if self._devices else self.device)
        return {
            "device": device,
            "dtype": pick_dtype(self.dtype, device),
            "remote_code": self.trust_remote_code,
            "kernels": Kernels(self.kernels),
        }

    @property
    def _devices(self) -> tuple[str, ...]:
        return worker_devices(self.gpus, self.workers, self.device)

    def explain(
        self,
        rows: np.ndarray,
        av: Verbalizer | None,
        ar: Reconstructor | None,
        *,
        max_new_tokens: int,
        variance: float | None = None,
    ) -> float:
        """One greedy explanation of each row (int64 [n]). variance: Var of FVE, if given.

        Returns the Var that was used.
        """
        self._roundtrip(EXPLAINED, rows, av, ar, max_new_tokens=max_new_tokens, variance=variance)
        return float(read_metadata(self.out / EXPLAINED)["variance"])

    def sample(
        self,
        rows: np.ndarray,
        av: Verbalizer | None,
        ar: Reconstructor | None,
        *,
        max_new_tokens: int,
        samples: int,
        temperature: float,
        variance: float,
    ) -> None:
        """Several explanations of each row. variance: that of `explain`, so that FVE can be compared."""
        self._roundtrip(
            SAMPLES,
            rows,
            av,
            ar,
            max_new_tokens=max_new_tokens,
            samples=samples,
            temperature=temperature,
            variance=variance if variance > 0 else None,
        )

    def reread(self, readings: Sequence[Reading], ar: Reconstructor | None, *, variance: float) -> None:
        """Have the AR read every changed text, and score it, in this process. variance: that of `explain`.

        ar: as `load_pair` returned it
        """
        with self.progress("texts") as update:
            run_reread(
                CaptureStore.open(self.out / STORE),
                self.models.layer,
                readings,
                ar or self._load_ar(),
                self.out / REREAD,
                variance=variance,
                seed=self.seed,
                resume=True,
                overwrite=False,
                progress=update,
            )

    def _roundtrip(
        self, name: str, rows: np.ndarray, av: Verbalizer | None, ar: Reconstructor | None, **changes: Any
    ) -> None:
        options = RoundtripOptions(
            store=str(self.out / STORE),
            av=self.models.av,
            ar=self.models.ar,
            out=self.out / name,
            layer=self.models.layer,
            **self._common(),
            **changes,
        )
        with self.progress("explanations") as update:
            run_roundtrip(
                options,
                announce=self.announce,
                progress=update,
                verbalizer=av,
                reconstructor=ar,
                rows=rows,
            )

    def _common(self) -> dict[str, Any]:
        devices = self._devices
        where: dict[str, Any] = {"device": devices[0] if devices else self.device}
        if len(devices) > 1:
            where = {"device": self.device, "gpus": self.gpus, "workers": self.workers}
        return {
            **where,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "dtype": self.dtype,
            "kernels": self.kernels,
            "trust_remote_code": self.trust_remote_code,
            "resume": True,
        }
