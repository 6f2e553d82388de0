"""The model runs of a study, inside its directory: capture, explanations, samples, and what the referee measures.

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
from nla_engine.config import CaptureOptions, ClaimsOptions, ClausesOptions, PatchOptions, RoundtripOptions
from nla_engine.errors import UnsupportedModel
from nla_engine.models.load import pick_device, pick_dtype
from nla_engine.ops.backends import Kernels
from nla_engine.referee.claim_run import run_claims
from nla_engine.referee.clause_run import run_clauses
from nla_engine.referee.run import run_patch
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.results import read_metadata
from nla_engine.roundtrip.run import run_roundtrip
from nla_engine.roundtrip.verbalize import Verbalizer
from nla_engine.store import CaptureStore
from nla_engine.store.shards import write_file_atomically
from nla_engine.studies.directory import CLAIMS, CLAUSES, EXPLAINED, PATCHED, PROBLEMS, REREAD, SAMPLES, STORE
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
        return Verbalizer.load(self.models.av, **self._how()), self.load_ar()

    def load_ar(self) -> Reconstructor:
        """The AR in this process."""
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

    def reread(self, readings: Sequence[Reading], ar: Reconstructor, *, variance: float) -> None:
        """Have the AR read every text, and score it. variance: that of `explain`."""
        with self.progress("texts") as update:
            run_reread(
                CaptureStore.open(self.out / STORE),
                self.models.layer,
                readings,
                ar,
                self.out / REREAD,
                variance=variance,
                seed=self.seed,
                resume=True,
                overwrite=False,
                progress=update,
            )

    def patch(self, rows: np.ndarray, others: Mapping[int, int], ar: Reconstructor) -> bool:
        """Put the reconstructions of rows (int64 [n]) in their place, and see what the model makes of them.

        others: for rows the row whose explanation is the control. False if this architecture cannot be patched.
        """
        options = PatchOptions(
            **self._texts(PATCHED), model=self.models.base, ar=self.models.ar, layer=self.models.layer
        )
        try:
            with self.progress("texts") as update:
                run_patch(
                    options,
                    announce=self.announce,
                    progress=update,
                    reconstructor=ar,
                    rows=rows,
                    others=others,
                )
        except UnsupportedModel as error:
            self.announce(f"   not patched: {error}")
            return False
        return True

    def clauses(
        self,
        rows: np.ndarray,
        others: Mapping[int, int],
        ar: Reconstructor,
        *,
        variance: float,
        patched: bool,
    ) -> None:
        """Leave out, swap and negate every clause of these rows' explanations. others: from which row clauses come.

        variance: that of `explain`; patched: whether the model can tell the KL
        """
        options = ClausesOptions(
            **self._texts(CLAUSES),
            ar=self.models.ar,
            layer=self.models.layer,
            model=self.models.base if patched else None,
            variance=variance if variance > 0 else None,
        )
        with self.progress("texts") as update:
            run_clauses(
                options,
                announce=self.announce,
                progress=update,
                reconstructor=ar,
                rows=rows,
                others=others,
            )

    def claims(self) -> None:
        """Compare what every explanation says with what was read, by the referee's rules."""
        with self.progress("texts") as update:
            run_claims(ClaimsOptions(**self._texts(CLAIMS)), announce=self.announce, progress=update)

    def _texts(self, name: str) -> dict[str, Any]:
        """Options of a run that reads the explanations."""
        left_out = ("batch_size", "gpus", "workers")  # they run in this process
        same = {key: value for key, value in self._common().items() if key not in left_out}
        return {
            "store": str(self.out / STORE),
            "explained": self.out / EXPLAINED,
            "out": self.out / name,
            **same,
        }

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
