"""How costs grow with a store: each operation on more and more rows, layers, and rows per sequence.

What is measured is the processor time of this process and of those that it starts, the least of several runs: other
programs and the disk count little in it. Seconds that passed are in the detail.
"""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pyarrow.parquet as pq

from nla_engine.bench import s3_server
from nla_engine.bench.made_page import write_table
from nla_engine.bench.made_stores import WHERE, Made
from nla_engine.bench.session import Prepared, Session, expect
from nla_engine.report import write_report
from nla_engine.store import CaptureStore, StoreWriter
from nla_engine.store.care.verify import verify
from nla_engine.store.exchange.export import export
from nla_engine.store.exchange.merge import merge
from nla_engine.store.views.dataset import ShuffledRows

LAYERS, LENGTHS = (1, 4, 28), (10, 100, 1_000, 10_000)
#: Rows of the stores whose layers, or rows per sequence, grow.
AXIS_ROWS = 200_000
#: Of a store with so many times the rows; the merged store has an eighth more; S3 and the page have fewer.
_OTHER, _S3, _PAGE = 8, 10, 500
#: Runs of a case of which the least counts, and the rows beyond which there is one, except of what is quick.
_TIMES, _LARGE = 3, 20_000_000
_BATCH = 4_096


@dataclass(frozen=True)
class Place:
    """Where a made store is, and where an operation may write."""

    made: Made
    store: Path | str
    out: Path

    def write(self) -> None:
        expect("rows", self.made.write(self.store), self.made.rows)

    def open(self) -> None:
        expect("rows", CaptureStore.open(self.store).rows, self.made.rows)

    def read_one(self) -> None:
        number = self.made.sequences // 2
        expect("sequence", CaptureStore.open(self.store).sequence(number).number, number)

    def where(self) -> None:
        expect("rows", len(CaptureStore.open(self.store).where(WHERE)), self.made.fitting)

    def epoch(self) -> None:
        rows = total = 0
        for numbers, vectors in ShuffledRows(
            CaptureStore.open(self.store), 0, batch_size=_BATCH, numbers=True
        ):
            rows += len(vectors)
            total += int(numbers.sum())
        expect("rows", rows, self.made.rows)
        expect("as the sum of their numbers", total, self.made.rows * (self.made.rows - 1) // 2)

    def verify(self) -> None:
        checks = verify(self.store)
        expect("failed checks", sum(not check.ok for check in checks), 0)
        wanted = f"{self.made.rows} checked"
        expect("checks of rows", sum(check.detail == wanted for check in checks), 5 + self.made.layers)

    def info(self) -> None:
        command = [sys.executable, "-m", "nla_engine", "info", str(self.store), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        expect("rows", json.loads(done.stdout.splitlines()[-1])["rows"], self.made.rows)

    def export(self) -> None:
        path = self.out / "rows.parquet"
        export(CaptureStore.open(self.store), "parquet", path, layer=0)
        expect("rows", pq.read_metadata(path).num_rows, self.made.rows)

    def merge(self) -> None:
        """With a store of an eighth of the rows."""
        other = self.out.with_name("other.zarr")
        rows = self.made.rows + max(self.made.rows // _OTHER, 1)
        expect("rows", merge([self.store, other], self.out / "merged.zarr").rows, rows)

    def merge_copied(self) -> None:
        """As where there are no hard links."""
        with mock.patch("os.link", side_effect=OSError):
            self.merge()

    def resume(self) -> None:
        writer = StoreWriter.resume(self.store, options={"prompts": Path(self.store).name})
        missing = len(writer.missing(self.made.sequences + 1))
        writer.close()
        expect("rows", writer.rows, self.made.rows)
        expect("missing sequences", missing, 1)

    def page(self) -> None:
        summary = write_report(self.store, self.out.with_name("table.parquet"), self.out / "page.html")
        expect("rows", summary.rows, self.made.rows)


@dataclass(frozen=True)
class Operation:
    """What is measured, and per what: call, row, or row and layer."""

    name: str
    run: Callable[[Place], None]
    per: str = "row"

    @property
    def unit(self) -> str:
        return "ms" if self.per == "call" else f"us/{self.per}"

    def figure(self, seconds: float, made: Made) -> float:
        """Seconds in this unit."""
        rows = {"row": made.rows, "row and layer": made.rows * made.layers}
        return 1e3 * seconds if self.per == "call" else 1e6 * seconds / rows[self.per]


OPEN = Operation("open", Place.open, "call")
READ_ONE = Operation("open, read one sequence", Place.read_one, "call")
WRITE = Operation("write", Place.write, "row and layer")
CHOOSE = Operation("where", Place.where)
EPOCH = Operation("shuffled epoch", Place.epoch)
VERIFY = Operation("verify", Place.verify, "row and layer")
INFO = Operation("info", Place.info, "call")
EXPORT = Operation("export to Parquet", Place.export)
MERGE = Operation("merge", Place.merge, "row and layer")
COPIED = Operation("merge, copied", Place.merge_copied, "row and layer")
RESUME = Operation("resume", Place.resume, "call")
PAGE = Operation("report page", Place.page)
LOCAL = (OPEN, READ_ONE, CHOOSE, EPOCH, VERIFY, INFO, EXPORT, MERGE, COPIED, RESUME)
ON_S3 = (OPEN, READ_ONE, CHOOSE, EPOCH, VERIFY, RESUME)


def measure_growth(session: Session, *, all_axes: bool) -> None:
    """Every operation at every size. all_axes: not only by rows."""
    for rows in session.sizes.scaling_rows:
        _local(session, Made(rows), f"{rows:,} rows", LOCAL)
        _page(session, max(rows // _PAGE, 1))
        _on_s3(session, max(rows // _S3, 1))
    if not all_axes:
        return
    for layers in LAYERS:
        _local(session, Made(AXIS_ROWS, layers=layers), f"{layers} layer{'s' * (layers > 1)}", LOCAL)
    for length in LENGTHS:
        _local(session, Made(AXIS_ROWS, length), f"{length:,} rows per sequence", LOCAL)


def _local(session: Session, made: Made, size: str, operations: tuple[Operation, ...]) -> None:
    place = Place(made, session.directory / "made.zarr", session.directory / "out")
    other = session.directory / "other.zarr"
    try:
        # Two stores that are merged have the same options, but for their prompts.
        Made(max(made.rows // _OTHER, 1), made.length, made.layers).write(other)
        _measure(session, place, WRITE, size, again=lambda: shutil.rmtree(place.store, ignore_errors=True))
        for operation in operations:
            _measure(session, place, operation, size)
    finally:
        for path in (place.store, other, place.out):
            shutil.rmtree(path, ignore_errors=True)


def _page(session: Session, rows: int) -> None:
    place = Place(Made(rows), session.directory / "made.zarr", session.directory / "out")
    table = session.directory / "table.parquet"
    try:
        place.write()
        write_table(CaptureStore.open(place.store), table)
        _measure(session, place, PAGE, f"{rows:,} rows")
    finally:
        table.unlink(missing_ok=True)
        for path in (place.store, place.out):
            shutil.rmtree(path, ignore_errors=True)


def _on_s3(session: Session, rows: int) -> None:
    if lacking := s3_server.missing():
        session.skipped.append(f"scaling: S3, {rows:,} rows: {', '.join(lacking)} not installed")
        return
    with s3_server.bucket() as url:
        place = Place(Made(rows), f"{url}/made.zarr", session.directory / "out")
        for operation in (WRITE, *ON_S3):
            _measure(session, place, operation, f"{rows:,} rows", "S3 ", times=0 if operation is OPEN else 1)


def _measure(
    session: Session,
    place: Place,
    operation: Operation,
    size: str,
    where: str = "",
    times: int = 0,
    again: Callable[[], None] = lambda: None,
) -> None:
    """again: done before each run. times: 0 for as many runs as the size allows"""
    times = times or (1 if place.made.rows > _LARGE and operation.per != "call" else _TIMES)
    passed: list[float] = []

    @contextmanager
    def prepared() -> Iterator[Prepared]:
        def once() -> float:
            return min(measured() for _ in range(times))

        def measured() -> float:
            again()
            shutil.rmtree(place.out, ignore_errors=True)
            place.out.mkdir()
            began, processor = time.perf_counter(), _processor()
            operation.run(place)
            used = _processor() - processor
            passed.append(time.perf_counter() - began)
            return operation.figure(used, place.made)

        yield Prepared(once)
        shutil.rmtree(place.out, ignore_errors=True)

    session.measure(
        "scaling",
        f"{where}{operation.name}, {size}",
        operation.unit,
        prepared(),
        warmups=0,
        repeats=1,
        detail=lambda p50: f"{min(passed):.3g} s passed",
    )


def _processor() -> float:
    """Seconds of processor time that this process and those that it started and waited for have used."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
