"""The directory of a study, created, resumed, refused or emptied; and its record of options."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nla_engine.errors import RequestError, WriteError, already_there
from nla_engine.store.directory import check_directory
from nla_engine.store.lease import Lease
from nla_engine.store.manifest import differences
from nla_engine.store.objects import LOCK_NAME
from nla_engine.store.shards import TEMPORARY_SUFFIX, make_directory, write_file_atomically, writing

#: What a study writes into its directory, besides its Markdown file. Nothing else there is touched.
RECORD, PROBLEMS = "study.json", "problems.jsonl"
STORE, EXPLAINED, SAMPLES, REREAD = "run.zarr", "explained.parquet", "samples.parquet", "reread.parquet"
PATCHED, CLAUSES, CLAIMS = "patched.parquet", "clauses.parquet", "claims.parquet"
_TABLES = (EXPLAINED, SAMPLES, REREAD, PATCHED, CLAUSES, CLAIMS)
PAGE, TABLES, FIGURES = "report.html", "tables", "figures"
#: Options that a resumed study may change.
FREE = {"out", "batch_size", "device", "gpus", "workers", "resume", "overwrite"}


@dataclass(frozen=True)
class StudyDirectory:
    """Where one study is written. markdown: the name of its Markdown file. options: all of them, as JSON values."""

    out: Path
    markdown: str
    options: dict[str, Any]
    resume: bool
    overwrite: bool

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Inside the `with`, the directory exists, is locked by this process, and holds no study but a resumed one.

        RequestError, with nothing changed, if it cannot be used as asked; StoreError if another run is filling it.
        """
        self._resumes()
        with writing(self.out):
            make_directory(self.out)
        with Lease.of_directory(self.out):
            if not self._resumes():  # checked again: another run may have just ended
                self._empty()
                write_file_atomically(self.out / RECORD, (json.dumps(self._asked, indent=1) + "\n").encode())
            yield

    @property
    def _asked(self) -> dict[str, Any]:
        return {key: value for key, value in self.options.items() if key not in FREE}

    def _resumes(self) -> bool:
        """Whether there is a study to resume. RequestError if the directory cannot be used as asked."""
        out, record = self.out, self.out / RECORD
        check_directory(out)
        if not out.is_dir() or set(os.listdir(out)) <= {LOCK_NAME, RECORD + TEMPORARY_SUFFIX}:
            return False
        if not record.exists():
            raise RequestError(f"{out}: holds other files and no study; choose another --out")
        if self.resume and not self.overwrite:
            self._check_same(record)
        elif not self.overwrite:
            raise RequestError(already_there(out))
        return not self.overwrite

    def _check_same(self, record: Path) -> None:
        try:
            before = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RequestError(f"{record}: cannot be read ({error}); start again with --overwrite") from error
        differ = differences({key: before.get(key) for key in self._asked}, self._asked)
        if differ:
            raise RequestError(
                f"{record}: the study was made with other options ({'; '.join(differ)}); --overwrite starts again"
            )

    def _empty(self) -> None:
        """Remove all that a study writes except its record, which marks a half-emptied directory as a study's."""
        try:
            for name in (*_TABLES, PROBLEMS, self.markdown, PAGE):
                (self.out / name).unlink(missing_ok=True)
            for name in (
                STORE,
                TABLES,
                FIGURES,
                *(f"{table}.parts" for table in _TABLES),
            ):
                if (self.out / name).exists():
                    shutil.rmtree(self.out / name)
        except OSError as error:
            raise WriteError(f"{self.out}: cannot be overwritten ({error.strerror})") from error
