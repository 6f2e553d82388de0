"""A capture on a Ray cluster: units of work for workers that Ray places, one on each GPU, and the join at the end.

Rows go from a worker to its unit's store, on a disk that all share or an object store; Ray carries names of units and
counts. A unit counts as done when its store is complete, whoever wrote it, so a retry can neither lose nor double a
row. A worker that dies is replaced, wherever Ray finds room, and its unit is done by the next that is free.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from nla_engine.capture.load import CLOCK
from nla_engine.capture.run import check_out
from nla_engine.capture.summary import CaptureSummary
from nla_engine.cluster.versions import differing, versions
from nla_engine.cluster.worker import Worker
from nla_engine.config import CaptureOptions
from nla_engine.errors import EngineError, HeldError, NLAError, RequestError, StoreError, first_line
from nla_engine.progress import Phases, Progress
from nla_engine.shard import Shard
from nla_engine.store import CaptureStore
from nla_engine.store.exchange.merge import merge
from nla_engine.store.objects import ObjectPath, place
from nla_engine.store.swap import exists

#: Units for each worker: more balance better, fewer cost less.
UNITS_PER_WORKER = 4
#: A unit that failed so often stops the run.
MOST_FAILURES = 3
#: Seconds: to reach an address; for Ray to answer there; until the first worker, or one that replaces the last, must
#: have a place; between two tries of a unit that another process still writes.
REACH_SECONDS, ANSWER_SECONDS, PLACE_SECONDS, HELD_SECONDS = 5.0, 60.0, 300.0, 5.0
WORKING, JOINING = "generating", "joining"
#: What Ray says if it cannot make a worker there: `Worker` cannot be imported, and nothing else happens in its making.
_UNKNOWN = "error raised in its creation task"
_PART = re.compile(r"run\.([0-9]+)-of-([0-9]+)\.zarr")


def parts_directory(out: str) -> str:
    """Where the units of a run are."""
    return out.rstrip("/") + ".parts"


def run_on_ray(
    options: CaptureOptions,
    *,
    announce: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] | Progress = Progress(),
) -> CaptureSummary:
    """`run_capture` on the cluster that `options.ray` names. Raises its errors."""
    ray = _library()
    options = _absolute(options)
    check_out(options)
    parts = parts_directory(options.out)
    found = _found(parts)
    if found and not options.resume:
        raise StoreError(
            f"{parts}: holds units of an unfinished run: --resume goes on; delete it to start again"
        )
    phases = Phases(progress)
    with contextlib.redirect_stdout(sys.stderr):  # what Ray prints is no result
        stores, run = _work(ray, options, found, announce, phases)
    phases.phase(JOINING, "sequences")
    joined = merge(stores, options.out, overwrite=exists(place(options.out)), progress=phases)
    assert joined.sequences == run.sequences
    if isinstance(place(parts), Path):
        shutil.rmtree(parts)  # the joined store has its own names for the files
    by_phase = phases.seconds()
    return CaptureSummary.of_store(
        joined,
        skipped=run.skipped,
        new_rows=joined.rows,
        generated=run.tokens,
        filling=by_phase[WORKING],
        by_phase=by_phase,
    )


def _work(
    ray: Any, options: CaptureOptions, found: list[Shard], announce: Callable[[str], None], phases: Phases
) -> tuple[list[str], _Run]:
    """Do all units. found: those of which there is something. Returns their stores, and the run that did them."""
    parts = parts_directory(options.out)
    _connect(ray, str(options.ray))
    try:
        gpus, room = _room(ray, options)
        workers = options.ray_workers or room
        of = found[0].of if found else options.ray_units or UNITS_PER_WORKER * workers
        if options.ray_units not in (None, of):
            raise RequestError(f"--ray-units is {options.ray_units}: the run that is resumed has {of}")
        alone: dict[str, Any] = {
            "ray": None,
            "ray_workers": None,
            "ray_units": None,
            "resume": False,
            "overwrite": False,
        }
        of_units = replace(options, out=f"{parts}/run.zarr", **alone)
        clock = _clock([shard.name(of_units.out) for shard in found])
        announce(f"Ray: {workers} workers, each with {'a GPU' if gpus else 'a CPU'}; {of} units in {parts}")
        run = _Run(ray, lambda: _actor(ray, gpus), (of_units, clock), announce, phases)
        units = [Shard(n, of) for n in range(1, of + 1)]
        run.work(list(map(str, units)), workers)
    finally:
        ray.shutdown()
    return [unit.name(of_units.out) for unit in units], run


class _Run:
    """Units handed to workers that can work, one each. start: makes another worker; given: what `Worker.load` takes.

    After `work`: sequences of all units; tokens generated by this run; skipped prompt records.
    """

    def __init__(
        self,
        ray: Any,
        start: Callable[[], Any],
        given: tuple[CaptureOptions, datetime],
        announce: Callable[[str], None],
        phases: Phases,
    ) -> None:
        self._ray, self._start, self._given, self._announce, self._phases = (
            ray,
            start,
            given,
            announce,
            phases,
        )
        self._asked: dict[Any, Any] = {}  # worker by the reference of its `versions`
        self._loading: dict[Any, Any] = {}  # the same of its `load`
        self._working: dict[Any, tuple[Any, str]] = {}  # worker and unit by the reference of its `do`
        self._free: list[Any] = []
        self._failures: Counter[str] = Counter()
        self._waits: set[str] = set()  # units that were found held by another process
        self.sequences = self.tokens = self.skipped = 0
        self._all: int | None = None

    def work(self, units: list[str], workers: int) -> None:
        """Do all units. Raises the error of a unit or of loading."""
        self._phases.phase("loading")
        todo, later = deque(units), deque[tuple[float, str]]()
        done = 0
        for _ in range(workers):
            self._add()
        began = time.monotonic()
        while done < len(units):
            while later and later[0][0] <= time.monotonic():
                todo.append(later.popleft()[1])
            while todo and self._free:
                worker, unit = self._free.pop(), todo.popleft()
                self._working[worker.do.remote(unit)] = worker, unit
            if self._working or self._free or self._loading:
                began = time.monotonic()
            elif time.monotonic() - began > PLACE_SECONDS:
                raise EngineError("Ray has no place for a worker: what is done is safe, --resume goes on")
            waiting = [*self._asked, *self._loading, *self._working]
            if not waiting:  # a unit is to be tried again
                time.sleep(0.1)
                continue
            for reference in self._ray.wait(waiting, timeout=1.0)[0]:
                if reference not in self._working:
                    self._started(reference)
                    continue
                worker, unit = self._working.pop(reference)
                try:
                    count, new = self._ray.get(reference)
                except Exception as error:
                    wait = self._failed(worker, unit, error)
                    later.append((time.monotonic() + wait, unit))
                else:
                    self._free.append(worker)
                    done, self.sequences, self.tokens = done + 1, self.sequences + count, self.tokens + new
                    self._phases(self.sequences, self._all or 0)

    def _add(self) -> None:
        worker = self._start()
        self._asked[worker.versions.remote()] = worker

    def _started(self, reference: Any) -> None:
        """A worker has told its versions, or has loaded the model."""
        asked = reference in self._asked
        worker = (self._asked if asked else self._loading).pop(reference)
        try:
            told = self._ray.get(reference)
        except Exception as error:
            if isinstance(cause := _cause(error), NLAError):
                raise cause from None
            if _UNKNOWN in str(error):
                raise RequestError(
                    f"--ray: a worker cannot import this package ({_last_line(error)}): "
                    "install the same on all machines"
                ) from None
            self._failures["loading"] += 1
            if self._failures["loading"] >= MOST_FAILURES:
                raise EngineError(f"workers cannot start: {first_line(error)}") from None
            self._announce(f"a worker was lost while it started: {first_line(error)}")
            self._add()
            return
        if asked:
            if other := differing(versions(), told):
                raise RequestError(
                    f"--ray: a worker has other versions: {other}: install the same on all machines"
                )
            self._loading[worker.load.remote(*self._given)] = worker
            return
        if self._all is None:
            self.skipped, self._all = told.skipped, told.sequences
            for message in told.messages:
                self._announce(message)
            self._phases.phase(WORKING, "sequences")
            self._phases(0, told.sequences)
        self._free.append(worker)

    def _failed(self, worker: Any, unit: str, error: Exception) -> float:
        """Seconds until the unit is tried again. Raises the cause, if that is the request's or has come too often."""
        cause = _cause(error)
        if isinstance(cause, HeldError):
            if unit not in self._waits:
                self._waits.add(unit)
                self._announce(f"unit {unit} waits: {first_line(cause)}")
            self._free.append(worker)
            return HELD_SECONDS
        if isinstance(cause, RequestError):
            raise cause from None
        self._failures[unit] += 1
        if self._failures[unit] >= MOST_FAILURES:
            if isinstance(cause, NLAError):
                raise cause from None
            raise EngineError(f"unit {unit} failed {MOST_FAILURES} times: {first_line(cause)}") from None
        self._announce(f"unit {unit} is tried again: {first_line(cause)}")
        if isinstance(cause, NLAError):
            self._free.append(worker)
        else:  # it died, or its device may be broken
            self._ray.kill(worker)
            self._add()
        return 0.0


def _cause(error: Exception) -> Exception:
    """What was raised in a worker; of a worker that was lost, Ray's own error."""
    cause = getattr(error, "cause", None)
    return cause if isinstance(cause, Exception) else error


def _last_line(text: object) -> str:
    """The last line that is not empty: of a traceback the error itself."""
    return next(
        (line.strip() for line in reversed(str(text).splitlines()) if line.strip()), "no reason given"
    )


def _library() -> Any:
    try:
        import ray
    except ImportError:
        raise RequestError(
            "--ray needs ray: pip install 'nla-engine[ray]', or '.[ray]' in a checkout"
        ) from None
    return ray


def _absolute(options: CaptureOptions) -> CaptureOptions:
    """With paths that mean the same on every machine that shares the disk."""
    changes: dict[str, Any] = {"prompts": tuple(path.absolute() for path in options.prompts)}
    if "://" not in options.out:
        changes["out"] = str(Path(options.out).absolute())
    for name in ("model", "base"):
        if (given := getattr(options, name)) and Path(given).exists():
            changes[name] = str(Path(given).absolute())
    return replace(options, **changes)


def _connect(ray: Any, address: str) -> None:
    """Raises RequestError if no Ray that can be used answers there."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    how = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
    if address != "auto":
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), REACH_SECONDS).close()
            # Where something else answers, `ray.init` tries for many minutes. A process can be stopped.
            command = [sys.executable, "-P", "-c", f"import ray; ray.init({address!r}, **{how!r})"]
            tried = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER_SECONDS)
        except subprocess.TimeoutExpired:
            raise RequestError(f"--ray {address}: no Ray answers there in {ANSWER_SECONDS:.0f} s") from None
        except (OSError, ValueError, OverflowError) as error:
            raise RequestError(f"--ray {address}: no Ray answers there ({first_line(error)})") from None
        if tried.returncode:
            raise RequestError(
                f"--ray {address}: no Ray that can be used answers there: {_last_line(tried.stderr)}"
            )
    local = {"address": None, "include_dashboard": False}
    try:
        ray.init(**(local if address == "auto" else {"address": address}), **how)
    except Exception as error:
        raise RequestError(
            f"--ray {address}: no Ray that can be used answers there: {first_line(error)}"
        ) from None


def _room(ray: Any, options: CaptureOptions) -> tuple[bool, int]:
    """Whether workers have a GPU each, and for how many there is room. RequestError if there are too few."""
    there = ray.cluster_resources()
    gpus = (options.device or "cuda").startswith("cuda") and (
        options.device is not None or there.get("GPU", 0) >= 1
    )
    room = int(there.get("GPU" if gpus else "CPU", 0))
    what = "GPUs" if gpus else "CPUs"
    if room < (options.ray_workers or 1):
        raise RequestError(
            f"--ray: the cluster has {room} {what}, and {options.ray_workers or 1} workers were asked for"
        )
    return gpus, room


def _actor(ray: Any, gpus: bool) -> Any:
    needs = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    return ray.remote(Worker).options(**needs).remote()


def _found(parts: str) -> list[Shard]:
    """The units of which there is something already. StoreError if they are of runs with different numbers of units."""
    at = place(parts)
    if isinstance(at, ObjectPath):
        names = {name.split("/")[0] for name in at.names()}
    else:
        names = set(os.listdir(at)) if at.is_dir() else set()
    units = [Shard(int(m[1]), int(m[2])) for name in sorted(names) if (m := _PART.fullmatch(name))]
    if len({unit.of for unit in units}) > 1:
        raise StoreError(f"{parts}: holds units of different runs: delete it to start again")
    return units


def _clock(stores: list[str]) -> datetime:
    """The time that the first worker of the run gave the chat template; now, if it has not begun."""
    for store in stores:
        told = CaptureStore.open(store).provenance.get(CLOCK)
        return datetime.fromisoformat(told) if told else datetime.now()
    return datetime.now()
