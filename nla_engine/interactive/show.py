"""show: the report page inside a notebook. IPython is not needed: a notebook asks an object for its HTML."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from nla_engine.errors import RequestError
from nla_engine.interactive.explanations import Explanations
from nla_engine.interactive.vectors import Scores
from nla_engine.interactive.words import python_words
from nla_engine.report.data import Explained
from nla_engine.report.page import render
from nla_engine.roundtrip.variance import layer_variance
from nla_engine.store import CaptureStore, LayerReader
from nla_engine.store.directory import check_parents
from nla_engine.store.shards import write_file_atomically
from nla_engine.store.views.indexing import split_index

#: Rows of a layer that are searched for given vectors at once.
_BLOCK = 4096
#: A given row's vector may differ from the stored one by this much of its norm: bfloat16 does.
_SAME = 0.01


@dataclass(frozen=True)
class Page:
    """A report page. A notebook shows it as the value of a cell; `save` writes it as one file.

    html: the whole page; title: of its store; height: in a notebook, in pixels
    """

    html: str = field(repr=False)
    title: str
    height: int

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the page. RequestError if there is a file already and it may not be replaced."""
        out = Path(path)
        if out.is_dir() or (out.exists() and not overwrite):
            raise RequestError(f"{out}: exists: choose another name, or pass overwrite=True for a file")
        check_parents(out)
        write_file_atomically(out, self.html.encode())
        return out

    def __repr__(self) -> str:
        return f"<report page of {self.title}: the value of a notebook's cell, or .save('report.html')>"

    def _repr_html_(self) -> str:
        """A frame whose source is the page. Its scripts run apart from the notebook, with no access to it."""
        return (
            f'<iframe title="{escape(self.title)}" sandbox="allow-scripts" width="100%" height="{self.height}" '
            f'style="border:0" srcdoc="{escape(self.html)}"></iframe>'
        )


@python_words()
def show(
    run: CaptureStore | str | os.PathLike[str],
    explained: Explanations | str | os.PathLike[str],
    *,
    rows: Any = None,
    layer: int | None = None,
    title: str | None = None,
    height: int = 800,
) -> Page:
    """The report page of a store and explanations of some of its rows: each beside its token.

    run: a store or its path; explained: what `explain` gave for rows of the store, or the table of a round trip
    rows: which rows the vectors are, as numbers, slice or mask; None: they are looked up in the layer
    layer: None for the one that AV and AR were made for
    Raises RequestError for vectors that are no rows of the layer, and what reading raises.
    """
    store = run if isinstance(run, CaptureStore) else CaptureStore.open(run)
    if isinstance(explained, Explanations):
        number = store.chosen_layer(explained.layer if layer is None else layer)
        table = _table(store, store.layer(number), explained, rows)
    elif rows is not None or layer is not None:
        raise RequestError("a table names its rows and its layer itself: leave rows and layer out")
    else:
        table = Explained.read(store, Path(explained))
    return Page(render(store, table, title).html.decode(), str(store.path), height)


def _table(store: CaptureStore, layer: LayerReader, explained: Explanations, rows: Any) -> Explained:
    """The explanations as the table of a round trip, in the order of the rows."""
    if explained.vectors.shape[1] != store.d_model:
        raise RequestError(
            f"the explained vectors have width {explained.vectors.shape[1]}, {store.path} holds {store.d_model}"
        )
    if rows is None:
        found = _found_rows(store, layer, explained.vectors)
    else:
        chosen, _, _ = split_index(rows, store.rows)
        found = np.arange(store.rows)[chosen] if isinstance(chosen, slice) else chosen
        _check_rows(store, layer, explained.vectors, found)
    of = found[explained.vector]
    order = np.argsort(of, kind="stable")
    columns = {
        "row": of[order],
        "explanation": np.array(explained.texts, object)[order],
        "status": np.array(explained.statuses, object)[order],
        "n_tokens": explained.n_tokens[order].astype(np.float64),
    }
    metadata = {
        **explained.about,
        "layer": layer.site.key,
        "options": {"store": store.attributes["store_id"]},
    }
    if explained.reconstructions is None:
        nothing = np.full(len(of), np.nan)
        columns |= dict.fromkeys(("cos", "cos_shuffled", "retrieval_rank"), nothing)
        columns["best"] = np.zeros(len(of), bool)
    else:
        seed = int(explained.about["run"]["seed"])
        sequence, position = (store.column(name)[of].astype(np.int64) for name in ("sequence", "position"))
        scores = Scores.of(
            explained.vectors[explained.vector], sequence, position, explained.reconstructions, seed
        )
        for name in ("cos", "cos_shuffled", "retrieval_rank", "best"):
            columns[name] = getattr(scores, name)[order]
        metadata |= _variance(layer, explained, seed) | {
            "control_vectors": scores.among,
            "control_rows": scores.among,
        }
    return Explained.of(store, metadata, columns)


def _variance(layer: LayerReader, explained: Explanations, seed: int) -> dict[str, Any]:
    """Var: that of the explanations, or that of the layer."""
    if explained.variance is not None:
        found = {"variance": explained.variance, "variance_rows": explained.variance_rows}
        if explained.variance_rows:
            return found | {"variance_of": "given vectors"}
        return found | {"run": explained.about["run"] | {"variance": explained.variance}}
    import torch

    measured = layer_variance(layer, seed, torch.device("cpu"))
    return {"variance": measured.value, "variance_rows": measured.rows}


def _check_rows(store: CaptureStore, layer: LayerReader, vectors: np.ndarray, rows: np.ndarray) -> None:
    """RequestError unless these rows hold these vectors."""
    if len(rows) != len(vectors):
        raise RequestError(
            f"rows names {len(rows):,} rows, {len(vectors):,} vectors were explained: give one for each"
        )
    stored = layer[rows]
    apart = np.linalg.norm((stored - vectors).astype(np.float64), axis=1)
    size = np.linalg.norm(stored.astype(np.float64), axis=1)
    other = ~((apart <= _SAME * size) | ~np.isfinite(stored).all(1))
    if other.any():
        place = int(np.argmax(other))
        raise RequestError(
            f"vector {place} is not that of row {rows[place]} of {layer.site.label} of {store.path}: give its own row"
        )


def _found_rows(store: CaptureStore, layer: LayerReader, vectors: np.ndarray) -> np.ndarray:
    """The row of each vector, int64 [n], by its exact values. Equal rows are taken in order.

    RequestError if a vector is in no row, or if fewer vectors than rows are equal: which row is meant is not known.
    """
    wanted: dict[bytes, list[int]] = {}
    for place, vector in enumerate(vectors):
        wanted.setdefault(vector.tobytes(), []).append(place)
    held: dict[bytes, list[int]] = {key: [] for key in wanted}
    heads = _heads(vectors)
    for start in range(0, len(layer), _BLOCK):
        block = layer[start : start + _BLOCK]
        for place in np.flatnonzero(np.isin(_heads(block), heads)).tolist():
            if (key := block[place].tobytes()) in held:
                held[key].append(start + place)
    found = np.full(len(vectors), -1)
    for key, places in wanted.items():
        rows = held[key]
        if not rows:
            raise RequestError(
                f"vector {places[0]} is no row of {layer.site.label} of {store.path}: the page shows stored rows; "
                "give rows= if it was read in another type, and print explanations of other vectors"
            )
        if len(rows) != len(places):
            raise RequestError(
                f"vector {places[0]} stands in {len(rows)} rows of {layer.site.label} of {store.path}, and was "
                f"explained {len(places)} times: say which rows they are with rows="
            )
        found[places] = rows
    return found


def _heads(vectors: np.ndarray) -> np.ndarray:
    """The bits of two numbers of each vector, uint64 [n]: a cheap first comparison."""
    bits = np.ascontiguousarray(vectors[:, :2]).view(np.uint32).astype(np.uint64)
    return bits[:, 0] | bits[:, -1] << 32
