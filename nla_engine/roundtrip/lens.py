"""The logit lens from its options to its summary: stored rows through their model's own final norm and head."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from nla_engine.config import LensOptions
from nla_engine.engine.slots import free_bytes
from nla_engine.errors import RequestError
from nla_engine.models.captured import load_captured
from nla_engine.models.load import LanguageModel, pick_device
from nla_engine.models.logits import states_at_once
from nla_engine.models.readout import Readout
from nla_engine.models.tokens import token_bytes
from nla_engine.ops.likelihood import entropy, likelihood, rank
from nla_engine.progress import Announce, Heard, Phases, Progress
from nla_engine.provenance import describe_run
from nla_engine.roundtrip.pipeline import COMMIT_SECONDS
from nla_engine.roundtrip.results import SCHEMA, ResultTable, batches, check_table, read_metadata
from nla_engine.roundtrip.rows import row_columns, select_rows
from nla_engine.roundtrip.texts import read_ahead
from nla_engine.store import CaptureStore
from nla_engine.store.format import IMPORTED

LOADING, READING, FINISHING = "loading", "reading", "finishing"
#: Lines of the table that are committed together; fewer if COMMIT_SECONDS have passed.
CHUNK = 4096
#: Bytes of logits, float32, that lie in memory at once.
LOGIT_BYTES = {"cpu": 64 << 20, "cuda": 512 << 20}
#: The table: a line for each row and layer. Null where the vector is not finite; next_*: also where no token follows.
LENS = pa.schema(
    [
        SCHEMA.field("row"),
        pa.field("layer", pa.int32()),
        *(SCHEMA.field(name) for name in SCHEMA.names[1 : SCHEMA.names.index("sample")]),
        pa.field("next_logprob", pa.float32()),
        pa.field("next_rank", pa.int32()),
        pa.field("entropy", pa.float32()),
        pa.field("top_id", pa.list_(pa.int32())),
        pa.field("top_token", pa.list_(pa.string())),
        pa.field("top_logprob", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True)
class LensSummary:
    """The table in numbers; the keys are those of `--json`. By layer: how often the true next token is the likeliest,
    the mean of its log-probability, and the mean entropy, in nats; None where no row has one."""

    out: str
    layers: list[int]
    rows: int
    next_top1: dict[str, float | None]
    next_logprob: dict[str, float | None]
    entropy: dict[str, float | None]
    seconds: float
    seconds_by_phase: dict[str, float]
    rows_per_second: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run_lens(
    options: LensOptions,
    *,
    announce: Announce = lambda text: None,
    progress: Heard = Progress(),
    lm: LanguageModel | None = None,
) -> LensSummary:
    """Read rows with the lens, and write the table. lm: the model, if it is loaded, in the captured dtype.

    Raises the errors of `nla_engine.errors`.
    """
    phases = Phases(progress)
    phases.phase(LOADING)
    check_table(options.out, resume=options.resume, overwrite=options.overwrite)
    store = CaptureStore.open(options.store)
    layers = _layers(store, options)
    if IMPORTED not in store.options:
        _check_top(options, len(store.vocabulary), str(store.path))
    rows = select_rows(store, options)
    lm = lm or load_captured(
        options.model,
        store.provenance,
        pick_device(options.device),
        base=options.base,
        remote_code=options.trust_remote_code,
    )
    run = _Run(options, store, layers, rows, lm)
    run.check(announce)
    readout = Readout(lm)
    _check_top(options, readout.columns, lm.name)
    table = ResultTable.open(
        options.out,
        options=run.identity(),
        resume=options.resume,
        overwrite=options.overwrite,
        schema=LENS,
    )
    before = table.done
    with table:
        if not table.finished:
            run.fill(table, readout, announce, phases)
    return _summarise(options, layers, phases.seconds(), (table.done - before) / len(layers))


@dataclass(frozen=True)
class _Run:
    """One run. layers: ascending; rows: int64 [n], by sequence and position."""

    options: LensOptions
    store: CaptureStore
    layers: tuple[int, ...]
    rows: np.ndarray
    lm: LanguageModel

    @cached_property
    def vocabulary(self) -> list[bytes]:
        """The bytes of every token's text, as the model's tokenizer has them."""
        return token_bytes(self.lm.tokenizer, self.lm.vocab_size)

    @cached_property
    def fingerprint(self) -> str:
        """Of the model's weights."""
        return self.lm.fingerprint()

    def check(self, announce: Announce) -> None:
        """RequestError unless the model is the one whose rows these are, or one of its width and tokens if that will
        do. Of an imported store nothing but width and texts of tokens can be checked."""
        options, store, lm = self.options, self.store, self.lm
        given = f"--model {options.model}"
        if lm.d_model != store.d_model:
            raise RequestError(
                f"{given} has width {lm.d_model}, {options.store} holds rows of width {store.d_model}: give the "
                "captured model"
            )
        for layer in self.layers:
            lm.check_layer(layer)
        known, imported = store.vocabulary, IMPORTED in store.options
        told = [known.raw(token) for token in range(len(known))]
        own = self.vocabulary
        wrong = [
            token
            for token, text in enumerate(told)
            if (text or not imported) and (token >= len(own) or own[token] != text)
        ]
        if wrong or (not imported and len(own) != len(told)):
            where = f"token {wrong[0]} is {told[wrong[0]]!r} there" if wrong else f"{len(told)} tokens there"
            raise RequestError(
                f"{given} has other tokens than {options.store} ({where}): give the captured model"
            )
        captured = store.provenance.get("weights")
        if captured is None:
            announce(f"{options.store}: does not say which model its rows are of: taken to be {lm.name}")
        elif captured != self.fingerprint:
            if not options.any_weights:
                raise RequestError(
                    f"{given} has the weights {self.fingerprint}, {options.store} was captured from {captured} "
                    f"({store.provenance.get('model')}): give that model, or --any-weights"
                )
            announce(f"{lm.name}: has other weights than the captured model")

    def identity(self) -> dict[str, Any]:
        """What a resumed run must have in common with the one it continues."""
        given = self.options.to_dict()
        return {name: given[name] for name in ("where", "limit", "top_k")} | {
            "layers": list(self.layers),
            "store": self.store.attributes["store_id"],
            "model": self.fingerprint,
            "rows": len(self.rows),
            "selection": hashlib.sha256(self.rows.tobytes()).hexdigest()[:16],
        }

    def fill(self, table: ResultTable, readout: Readout, announce: Announce, phases: Phases) -> None:
        """Read the rows that the table does not hold yet, and finish it."""
        depth, total = len(self.layers), len(self.rows)
        done = table.done // depth
        named = ("layer " if depth == 1 else "layers ") + ", ".join(map(str, self.layers))
        announce(
            f"{total:,} rows of {named}, the likeliest {self.options.top_k} tokens of each"
            + (f" ({done:,} already there)" if done else "")
        )
        phases.phase(READING, "rows")
        phases(done, total)
        held: list[pa.Table] = []
        since = time.monotonic()
        for part in self._parts(readout, done):
            held.append(part)
            lines = sum(map(len, held))
            last = table.done + lines == total * depth
            if last or lines >= CHUNK or time.monotonic() - since >= COMMIT_SECONDS:
                joined = pa.concat_tables(held)
                table.append(dict(zip(joined.column_names, joined.columns, strict=True)))
                held, since = [], time.monotonic()
            phases((table.done + sum(map(len, held))) // depth, total)
        phases.phase(FINISHING)
        table.finish(self._metadata(), store=self.store)

    def _parts(self, readout: Readout, done: int) -> Iterator[pa.Table]:
        """The lines of the rows from number `done` on, some at a time."""
        at_once = self._at_once(readout.columns)
        each = max(at_once // len(self.layers), 1)
        blocks = [self.rows[start : start + each] for start in range(done, len(self.rows), each)]
        stack = _Stack(self.store, self.layers)
        with closing(read_ahead(stack, blocks, self.lm.device)) as read:
            for rows, vectors in zip(blocks, read, strict=True):
                yield self._lines(readout, rows, stack.norm_at(rows), vectors.flatten(0, 1), at_once)

    def _at_once(self, columns: int) -> int:
        """Vectors whose logits lie in memory at once."""
        if self.options.batch_size is not None:
            return self.options.batch_size
        device = self.lm.device
        room = LOGIT_BYTES[device.type]
        if device.type == "cuda":
            room = min(room, free_bytes(device) // 8)
        return states_at_once(columns, room)

    def _lines(
        self, readout: Readout, rows: np.ndarray, norms: np.ndarray, vectors: torch.Tensor, at_once: int
    ) -> pa.Table:
        """The table of these rows. norms: float32 [rows, layers]; vectors: float32 [rows * layers, d], row by row."""
        store, depth = self.store, len(self.layers)
        following = store.column("next_token_id")[rows].astype(np.int64)
        following[following >= readout.columns] = -1  # an id that the head has no column for
        token = torch.from_numpy(np.repeat(following, depth)).to(vectors.device)
        found = [
            numbers_of(readout(some), its, self.options.top_k)
            for some, its in zip(vectors.split(at_once), token.split(at_once), strict=True)
        ]
        numbers = {name: np.concatenate([each[name] for each in found]) for name in found[0]}
        columns: dict[str, Any] = {
            name: np.repeat(np.asarray(values), depth, 0)
            for name, values in row_columns(store, store.layer(self.layers[0]), rows).items()
        }
        columns |= {"norm": norms.reshape(-1), "layer": np.tile(self.layers, len(rows))}
        finite = np.isfinite(numbers["entropy"])
        known = finite & (np.repeat(following, depth) >= 0)
        columns |= {
            "next_logprob": _where(known, numbers["next_logprob"]),
            "next_rank": _where(known, numbers["next_rank"]),
            "entropy": _where(finite, numbers["entropy"]),
            "top_id": _where(finite, numbers["top_id"]),
            "top_token": _where(finite, self._texts(numbers["top_id"])),
            "top_logprob": _where(finite, numbers["top_logprob"]),
        }
        return pa.table(
            {field.name: pa.array(columns[field.name], field.type) for field in LENS}, schema=LENS
        )

    def _texts(self, ids: np.ndarray) -> np.ndarray:
        """The text of every token, for any shape."""
        each, place = np.unique(ids, return_inverse=True)
        texts = np.array([self.vocabulary[token].decode(errors="replace") for token in each], object)
        return texts[place].reshape(ids.shape)

    def _metadata(self) -> dict[str, Any]:
        lm = self.lm
        about = {"model": lm.name, "model_revision": lm.revision, **lm.origin, "weights": self.fingerprint}
        return {**describe_run(), "run": self.options.to_dict(), **about, "layers": list(self.layers)}


@dataclass(frozen=True)
class _Stack:
    """The vectors of several layers of one store, as `read_ahead` reads those of one."""

    store: CaptureStore
    layers: Sequence[int]

    def torch(self, rows: np.ndarray, device: torch.device) -> torch.Tensor:
        """float32 [n, layers, d] on the device."""
        return torch.stack([self.store.layer(layer).torch(rows, device) for layer in self.layers], 1)

    def norm_at(self, rows: np.ndarray) -> np.ndarray:
        """L2 norms, float32 [n, layers]."""
        return np.stack([self.store.layer(layer).norm_at(rows) for layer in self.layers], 1)


def numbers_of(logits: torch.Tensor, token: torch.Tensor, k: int) -> dict[str, np.ndarray]:
    """The columns of numbers: logits float32 [n, V]; token int64 [n], -1 for none. next_rank: 0 for none."""
    found = likelihood(logits, token, k)
    numbers = {
        "next_logprob": found.chosen,
        "next_rank": rank(logits, token),
        "entropy": entropy(logits),
        "top_id": found.top_token,
        "top_logprob": found.top,
    }
    return {name: values.cpu().numpy() for name, values in numbers.items()}


def _where(known: np.ndarray, values: np.ndarray) -> list[Any]:
    """The values of a column, None where it is not known."""
    return [value if there else None for value, there in zip(values.tolist(), known.tolist(), strict=True)]


def _layers(store: CaptureStore, options: LensOptions) -> tuple[int, ...]:
    """RequestError if the store lacks one that is asked for."""
    if options.layer is None or isinstance(options.layer, str):
        return store.layers
    if missing := sorted(set(options.layer) - set(store.layers)):
        held = ", ".join(map(str, store.layers))
        raise RequestError(f"--layer {missing[0]}: {options.store} holds layer {held}")
    return options.layer


def _check_top(options: LensOptions, tokens: int, whose: str) -> None:
    if options.top_k > tokens:
        raise RequestError(f"--top-k is {options.top_k}: {whose} has {tokens:,} tokens: lower it")


def _summarise(
    options: LensOptions, layers: Sequence[int], seconds: dict[str, float], new_rows: float
) -> LensSummary:
    """From the finished table. new_rows: rows that this run added."""
    names = ["layer", "next_rank", "next_logprob", "entropy"]
    parts = list(batches(options.out, names))
    data = {name: np.concatenate([part[name].astype(np.float64) for part in parts]) for name in names}
    of_layer = {layer: data["layer"] == layer for layer in layers}
    top = np.where(np.isnan(data["next_rank"]), np.nan, data["next_rank"] == 1)

    def means(values: np.ndarray) -> dict[str, float | None]:
        return {str(layer): _mean(values[mask]) for layer, mask in of_layer.items()}

    reading = seconds.get(READING, 0.0)
    return LensSummary(
        out=str(options.out),
        layers=[int(layer) for layer in read_metadata(options.out)["layers"]],
        rows=len(data["layer"]) // len(layers),
        next_top1=means(top),
        next_logprob=means(data["next_logprob"]),
        entropy=means(data["entropy"]),
        seconds=round(sum(seconds.values()), 3),
        seconds_by_phase=dict(seconds),
        rows_per_second=round(new_rows / reading, 2) if reading else 0.0,
    )


def _mean(values: np.ndarray) -> float | None:
    values = values[~np.isnan(values)]
    return round(float(values.mean()), 6) if len(values) else None
