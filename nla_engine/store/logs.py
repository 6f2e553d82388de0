"""The logs of all arrays of a store that is being written: sequences in, bytes for the write queue out.

Knows no commit and no lock: `StoreWriter` does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from nla_engine.errors import DamageError
from nla_engine.sites import Site
from nla_engine.store.arrays import ArrayLog
from nla_engine.store.format import ArraySpec, layer_group
from nla_engine.store.manifest import Manifest
from nla_engine.store.objects import Place
from nla_engine.store.queue import WriteQueue
from nla_engine.store.records import SequenceBatch

#: Puts the shards of an array in place, durably, as those from this number on. False: not of this array.
Link = Callable[[ArraySpec, int], bool]
_COUNTED = {"row": "rows/token_id", "token": "sequences/tokens", "source": "sequences/source"}


class StoreLogs:
    """One log for each array but the vocabulary's. They stand at the end of what is committed when this is made."""

    def __init__(self, root: Place, manifest: Manifest, queue: WriteQueue) -> None:
        """Raises what `ArrayLog.resume` raises."""
        lengths, self._sites = manifest.lengths(), manifest.layers
        self._codec, self._narrow_shard_rows = manifest.codec, manifest.narrow_shard_rows
        self._logs = {
            name: ArrayLog.resume(root, spec, lengths[spec.unit], queue)
            for name, spec in manifest.specs().items()
            if not name.startswith("vocabulary/")
        }

    @property
    def rows(self) -> int:
        """Appended rows."""
        return self._logs["rows/token_id"].length

    @property
    def sequences(self) -> int:
        """Appended sequences."""
        return self._logs["sequences/row_start"].length

    @property
    def room(self) -> int:
        """How many more rows fill the last shards of all arrays with one entry per row; 0: they are full."""
        return -self.rows % self._narrow_shard_rows

    def counts(self) -> dict[str, Any]:
        """What a `Commit` counts."""
        return {
            "rows": self.rows,
            "sequences": self.sequences,
            "tokens": self._logs["sequences/tokens"].length,
            "source_bytes": self._logs["sequences/source"].length,
            "exact": {site: self._logs[f"{layer_group(site)}/exact_row"].length for site in self._sites},
        }

    def append(self, batch: SequenceBatch) -> None:
        """Append sequences. Their arrays must not change until `wait_until_copied`."""
        columns = {
            f"rows/{name}": getattr(batch, name)
            for name in ("token_id", "next_token_id", "position", "flags")
        }
        columns |= {f"rows/{name}": values for name, values in batch.next_tokens.items()}
        columns["rows/sequence"] = batch.number[batch.owner]
        columns |= self._table(vars(batch), self.rows)
        for site in self._sites:
            columns[f"{layer_group(site)}/norm"] = batch.norm[site]
            columns[f"{layer_group(site)}/exact_row"] = batch.exact_row[site] + self.rows
        for site in self._sites:  # the largest first: the disk is busy while the rest is appended
            group, rows = layer_group(site), [layers[site] for layers in batch.rows]
            for name in ("codes", "scales", "exact"):
                if name != "scales" or self._codec.scale_width:
                    self._logs[f"{group}/{name}"].append(*(getattr(each, name) for each in rows))
        for name, values in columns.items():
            self._logs[name].append(values)

    def append_linked(
        self,
        tables: Iterable[Mapping[str, np.ndarray]],
        exact: Mapping[Site, Iterable[tuple[np.ndarray, np.ndarray]]],
        rows: int,
        link: Link,
    ) -> None:
        """Append sequences whose rows lie in whole shard files of another store. `room` must be 0.

        tables: entries of the sequences, some at a time: the arrays of `SequenceBatch` with one value per sequence,
            token or byte
        exact: of each site, some at a time, the rows that are kept exactly, int64 [m], counted from the first of all,
            and their bits, uint16 [m, d]
        rows: of all these sequences, a multiple of narrow_shard_rows
        link: False only of rows/sequence, which is then written by the tables
        Raises DamageError if the sequences have not so many rows.
        """
        first = start = self.rows
        for path, log in self._logs.items():
            if log.spec.unit == "rows" and link(log.spec, first // log.spec.shard_rows):
                log.adopt(rows)
            else:
                assert log.spec.unit != "rows" or path == "rows/sequence"
        for table in tables:
            for path, values in self._table(table, start).items():
                self._logs[path].append(values)
            if self._logs["rows/sequence"].length < first + rows:
                self._logs["rows/sequence"].append(np.repeat(table["number"], table["row_size"]))
            start += int(table["row_size"].sum())
        for site, parts in exact.items():
            for places, bits in parts:
                self._logs[f"{layer_group(site)}/exact_row"].append(places + first)
                self._logs[f"{layer_group(site)}/exact"].append(bits)
        if start != first + rows or self._logs["rows/sequence"].length != start:
            raise DamageError(f"{rows} rows are to be linked, and their sequences have {start - first}")

    def _table(self, table: Mapping[str, np.ndarray], row: int) -> dict[str, np.ndarray]:
        """The values of the arrays of `sequences/`, by path, of sequences whose rows begin at `row`."""
        values = {
            f"sequences/{name}": table[name]
            for name in ("number", "prompt_size", "finish", "tokens", "source")
        }
        for name, counted in _COUNTED.items():
            size = table[f"{name}_size"]
            begin = row if name == "row" else self._logs[counted].length
            values[f"sequences/{name}_start"] = begin + np.cumsum(size) - size
            values[f"sequences/{name}_size"] = size
        return values

    def wait_until_copied(self) -> None:
        """Wait until the arrays of every appended sequence may be reused."""
        for log in self._logs.values():
            log.wait_until_copied()

    def flush(self) -> None:
        """`ArrayLog.flush` of each."""
        for log in self._logs.values():
            log.flush()

    def describe(self) -> None:
        """`ArrayLog.describe` of each."""
        for log in self._logs.values():
            log.describe()
