"""The writer of a store: finished sequences in, committed rows out.

A commit writes (1) every shard file, (2) the manifest, in one step, (3) the shapes in the arrays' own metadata.
Whatever stops a writer, the rows that the manifest counts stay readable, and `resume` continues after them.
Sequences come in any order, each with its number, and each number once.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from nla_engine.codec.rows import Codec
from nla_engine.errors import DamageError, StoreError, WriteError
from nla_engine.provenance import now
from nla_engine.sites import Site, listed
from nla_engine.store.arrays import ArrayReader
from nla_engine.store.directory import emptied, staged
from nla_engine.store.empty import numbered, write_empty
from nla_engine.store.format import NUMBER, default_narrow_shard_rows, default_shard_rows
from nla_engine.store.interrupt import interrupt_held
from nla_engine.store.lease import Lease
from nla_engine.store.logs import Link, StoreLogs
from nla_engine.store.manifest import (
    METADATA_NAME,
    Commit,
    Manifest,
    differences,
    strict_json,
)
from nla_engine.store.numbers import Numbers
from nla_engine.store.objects import ObjectLock, ObjectPath, Place, place
from nla_engine.store.queue import WriteQueue
from nla_engine.store.records import LayerRows, SequenceBatch, SequenceRows
from nla_engine.store.shards import (
    TEMPORARY_SUFFIX,
    fsync_directory,
    writing,
)

COMMIT_SECONDS = 30.0
#: A full shard is a good moment to commit. But a commit syncs some forty files, so at least this part of
#: `commit_seconds` must have passed.
FILLED_COMMIT_PART = 1 / 30


class StoreWriter:
    """Appends sequences to a store. Use `create` or `resume`; a context manager.

    Leaving the context normally commits and marks the store complete; an exception commits what was appended and
    is raised again. After a WriteError the writer is dead: what was committed is safe, and `resume` continues it.
    """

    def __init__(
        self, path: Place, lock: Lease | ObjectLock, manifest: Manifest, commit_seconds: float
    ) -> None:
        """For `create` and `resume`. manifest: the one on disk."""
        self.path = path
        self._lock = lock
        self._manifest = manifest
        self._commit_seconds = commit_seconds
        self._committed_at = time.monotonic()
        self._codec_error = dict(manifest.codec_error)
        self._usable = True
        self._queue = WriteQueue()
        self._numbers = Numbers()
        lengths, specs = manifest.lengths(), manifest.specs()
        try:
            held = ArrayReader(path, specs[NUMBER], lengths["sequences"]).read()
            if (np.diff(np.sort(held)) == 0).any():  # nearly in order, so a sort is quicker than a hash table
                raise DamageError(f"{path}: damaged: two sequences have one number: run `nla-engine verify`")
            self._numbers.add(held)
            self._logs = StoreLogs(path, manifest, self._queue)
        except BaseException:
            self._release()
            raise

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        *,
        layers: Sequence[Site | int],
        codec: Codec,
        sink_norm: Mapping[Site, float],
        vocabulary: Sequence[bytes],
        provenance: Mapping[str, Any],
        options: Mapping[str, Any],
        next_token: int | None = None,
        overwrite: bool = False,
        shard_rows: int | None = None,
        commit_seconds: float = COMMIT_SECONDS,
    ) -> StoreWriter:
        """A new, empty store, on disk when this returns.

        layers: sites, each as a layer's number where it is a block's output
        sink_norm: norm above which rows are kept exactly, for each of them (infinity: never)
        vocabulary: the bytes of every token's text, by token id
        options: JSON; what `resume` compares
        next_token: how many of the likeliest next tokens every sequence brings for each row; None: no `next_tokens`
        shard_rows: rows per shard of codes, a power of two; None for the default
        Raises StoreError if the path is taken or an argument is unfit, WriteError if it cannot be written.
        """
        target = _target(path)
        sites = tuple(map(Site.at, layers))
        shard_rows = shard_rows or default_shard_rows(codec)
        manifest = Manifest(
            store_id=uuid.uuid4().hex,
            layers=sites,
            codec=codec,
            shard_rows=shard_rows,
            narrow_shard_rows=default_narrow_shard_rows(codec, shard_rows),
            sink_norm={Site.at(site): float(norm) for site, norm in sink_norm.items()},
            vocabulary_size=len(vocabulary),
            vocabulary_bytes=sum(map(len, vocabulary)),
            provenance=strict_json(provenance, "provenance"),
            options=strict_json(options, "options"),
            next_token=next_token,
            commit=Commit(0, 0, 0, 0, dict.fromkeys(sites, 0), epoch=1, complete=False, time=now()),
        )
        if isinstance(target, ObjectPath):
            with writing(target), emptied(target, overwrite) as held:
                write_empty(target, manifest, vocabulary)
            return cls(target, held, manifest, commit_seconds)
        with staged(target, overwrite) as (staging, lock):
            write_empty(staging, manifest, vocabulary)
        return cls(target, lock, manifest, commit_seconds)

    @classmethod
    def resume(
        cls,
        path: str | os.PathLike[str],
        *,
        options: Mapping[str, Any],
        commit_seconds: float = COMMIT_SECONDS,
    ) -> StoreWriter:
        """Continue after the last commit of an existing store. One of an older format becomes one of this format.

        Raises StoreError when there is no store, another writer has it, its options differ (each difference
        is named), or its last committed rows are damaged.
        """
        target = _target(path)
        Manifest.read(target)
        with writing(target):
            lock = ObjectLock(target) if isinstance(target, ObjectPath) else Lease.of_directory(target)
        try:
            manifest = Manifest.read(target)  # again: another writer may have just released it
            if changed := differences(manifest.options, strict_json(options, "options")):
                raise StoreError(
                    f"{target}: cannot be resumed with other options: {'; '.join(changed)}: "
                    "give those of the first run, or --overwrite to start again"
                )
            if isinstance(target, Path):
                with writing(target):
                    (target / (METADATA_NAME + TEMPORARY_SUFFIX)).unlink(missing_ok=True)
                    fsync_directory(target.parent)  # the creator may have been killed before it synced this
            writer = cls(target, lock, numbered(target, manifest), commit_seconds)
            writer._write_commit(complete=False, epoch=manifest.commit.epoch + 1)
        except BaseException:
            lock.release()
            raise
        return writer

    @property
    def codec(self) -> Codec:
        return self._manifest.codec

    @property
    def layers(self) -> tuple[Site, ...]:
        return self._manifest.layers

    @property
    def sink_norm(self) -> Mapping[Site, float]:
        return self._manifest.sink_norm

    @property
    def codec_error(self) -> Mapping[Site, Any]:
        return self._codec_error

    @property
    def sequences(self) -> int:
        """Committed sequences."""
        return self._manifest.commit.sequences

    @property
    def rows(self) -> int:
        """Committed rows."""
        return self._manifest.commit.rows

    def missing(self, count: int) -> np.ndarray:
        """int64, ascending: the numbers below `count` of which no sequence was appended."""
        return self._numbers.missing(count)

    def append(self, sequence: SequenceRows) -> None:
        """`append_many` of one sequence."""
        self.append_many([sequence])

    def append_many(self, sequences: Sequence[SequenceRows], *, wait: bool = True) -> None:
        """Add sequences, all or none. Their rows are copied, so the arrays may be reused.

        wait: True: copy before returning, then `commit_if_due`. False: the arrays may be reused only after
            `wait_until_copied`, so several calls copy at once, and the caller commits
        Raises StoreError if a sequence does not fit or its number is taken (the writer stays usable), WriteError.
        """
        if sequences:
            first, next_token = self._numbers.following, self._manifest.next_token
            self._append(SequenceBatch.of(sequences, self.layers, self.codec, first, next_token), wait)

    def append_block(self, columns: Mapping[str, np.ndarray], rows: Mapping[Site, LayerRows]) -> None:
        """`append_many` of sequences that lie end to end already, as `SequenceBatch.of_block` takes them."""
        first, next_token = self._numbers.following, self._manifest.next_token
        self._append(SequenceBatch.of_block(columns, rows, self.layers, self.codec, first, next_token), True)

    def _append(self, batch: SequenceBatch, wait: bool) -> None:
        self._numbers.check(batch.number)
        self._check_lock(sometimes=True)
        with self._write_errors():
            try:
                self._logs.append(batch)
                self._numbers.add(batch.number)
            finally:
                if wait:
                    self.wait_until_copied()
        if wait:
            self.commit_if_due()

    @property
    def narrow_shard_rows(self) -> int:
        """Rows per shard of every array with one entry per row, except `codes`."""
        return self._manifest.narrow_shard_rows

    @property
    def room(self) -> int:
        """How many more rows fill the last shards of all arrays with one entry per row; 0: they are full."""
        return self._logs.room

    def append_linked(
        self,
        tables: Iterable[Mapping[str, np.ndarray]],
        exact: Mapping[Site, Iterable[tuple[np.ndarray, np.ndarray]]],
        rows: int,
        link: Link,
    ) -> None:
        """Add sequences whose rows lie in whole shard files of another store, as `StoreLogs.append_linked` does.

        Raises what `append_many` raises.
        """
        self._check_lock()

        def checked() -> Iterator[Mapping[str, np.ndarray]]:
            for table in tables:
                self._numbers.check(table["number"])
                yield table
                self._numbers.add(table["number"])

        with self._write_errors():
            self._logs.append_linked(checked(), exact, rows, link)
            self._logs.wait_until_copied()
        self.commit_if_due()

    def commit_if_due(self) -> None:
        """Commit if `commit_seconds` have passed, or a thirtieth of it and a shard of codes is full. Raises WriteError.

        Some time after an `append_many` that did not wait this is quick: full shards are on disk by then.
        """
        shard_rows = self._manifest.shard_rows
        filled = self._logs.rows // shard_rows != self.rows // shard_rows
        if self.is_overdue or (filled and self._passed(FILLED_COMMIT_PART)):
            self.commit()

    @property
    def is_overdue(self) -> bool:
        """Whether `commit_seconds` have passed since the last commit."""
        return self._passed(1)

    def _passed(self, part: float) -> bool:
        return time.monotonic() - self._committed_at >= part * self._commit_seconds

    def wait_until_copied(self) -> None:
        """Wait until the arrays of every appended sequence may be reused."""
        self._logs.wait_until_copied()

    @property
    def _appended(self) -> int:
        """Sequences, committed or not."""
        return self._logs.sequences

    def commit(self) -> None:
        """Make every appended sequence readable and durable. Raises WriteError."""
        if self._appended != self.sequences or self._codec_error != self._manifest.codec_error:
            self._write_commit(complete=False)
        self._committed_at = time.monotonic()

    def record_codec_error(self, layer: Site | int, error: Mapping[str, Any]) -> None:
        """Note the codec's measured error at a site (JSON) for the next commit."""
        site = Site.at(layer)
        if site not in self.layers:
            raise StoreError(f"{site.label} is not in the store: it has {listed(self.layers)}")
        self._codec_error[site] = strict_json(error, "codec_error")

    def close(self, complete: bool = True) -> None:
        """Commit, mark the store complete (or not), and let another writer in. A second call does nothing."""
        try:
            if self._usable:
                self._write_commit(complete)
        finally:
            self._release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
            return
        try:
            if self._usable:
                with contextlib.suppress(WriteError):  # the first error is the one to report
                    self.commit()
        finally:
            self._release()

    def _release(self) -> None:
        self._usable = False
        self._queue.close()  # no write may follow once another writer has the lock
        self._lock.release()

    def _write_commit(self, complete: bool, epoch: int | None = None) -> None:
        self._check_lock()
        with self._write_errors():
            self._logs.flush()
            self._queue.join()
            committed = Commit(
                **self._logs.counts(),
                epoch=epoch or self._manifest.commit.epoch,
                complete=complete,
                time=now(),
            )
            manifest = replace(self._manifest, commit=committed, codec_error=dict(self._codec_error))
            self._check_lock()
            manifest.write(self.path)
            self._manifest = manifest
            self._logs.describe()
            self._queue.join()

    def _check_lock(self, sometimes: bool = False) -> None:
        """WriteError when another process has taken the store: two writers would write the same shards."""
        with self._write_errors(), writing(self.path):
            self._lock.check_sometimes() if sometimes else self._lock.check()

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        """After an error in the body the writer is unusable: logs may disagree. A WriteError also says what is safe."""
        if not self._usable:
            raise StoreError(
                f"{self.path}: this writer is closed or has failed: resume the store with a new one"
            )
        with interrupt_held():
            try:
                yield
            except WriteError as error:
                self._usable = False
                raise WriteError(
                    f"{error}; {self.sequences} sequences with {self.rows} rows are committed and safe: "
                    "mend the cause; a capture goes on with --resume"
                ) from error
            except BaseException:
                self._usable = False
                raise


def _target(path: str | os.PathLike[str]) -> Place:
    found = place(path)
    return Path(os.path.realpath(found)) if isinstance(found, Path) else found
