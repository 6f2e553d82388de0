"""The manifest: the root group's zarr.json, which says what a store holds and how much of it is committed.

It is one file, always replaced whole, so its `commit` alone decides what may be read. It repeats the metadata of every
array (Zarr's inline consolidated metadata): readers that use it see all shapes change at once.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import google_crc32c

from nla_engine.codec.rows import Codec
from nla_engine.errors import DamageError, RequestError, StoreError
from nla_engine.sites import PARTS, RESID_POST, Site
from nla_engine.store.format import (
    ATTRIBUTE,
    FINISH_MEANINGS,
    FLAG_MEANINGS,
    FORMAT_VERSION,
    LAYER_CONVENTION,
    ArraySpec,
    array_specs,
    exact_unit,
)
from nla_engine.store.objects import Place
from nla_engine.store.shards import write_file_atomically
from nla_engine.store.swap import exists

METADATA_NAME = "zarr.json"
GROUP_METADATA = {"zarr_format": 3, "node_type": "group", "attributes": {}}
#: Fingerprints of weights, prompts and the like: people learn nothing from their digits.
_FINGERPRINT = re.compile("[0-9a-f]{16}")
_ABSENT = object()


@dataclass(frozen=True)
class Commit:
    """How much of a store may be read.

    exact: exact rows of each site; epoch: writers so far; time: ISO 8601, UTC
    """

    rows: int
    sequences: int
    tokens: int
    source_bytes: int
    exact: Mapping[Site, int]
    epoch: int
    complete: bool
    time: str

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "exact": {str(site): count for site, count in self.exact.items()}}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Commit:
        counts = {name: int(data[name]) for name in ("rows", "sequences", "tokens", "source_bytes", "epoch")}
        exact = {Site.parse(site): int(count) for site, count in data["exact"].items()}
        if min(*counts.values(), *exact.values()) < 0:
            raise ValueError("a count is negative")
        return cls(**counts, exact=exact, complete=bool(data["complete"]), time=str(data["time"]))


@dataclass(frozen=True)
class Manifest:
    """Everything that attributes["nla_engine"] holds.

    store_id: random; differs for a store that replaces another under the same name
    shard_rows: rows per shard of codes; narrow_shard_rows: of every other array with one entry per row
    layers: the sites that it holds rows of, each a layer's number alone where it is a block's output
    sink_norm: norm above which a row is kept exactly, for each site; infinity for never
    codec_error: measured reconstruction error of each site, or None
    next_token: how many of the likeliest next tokens each row has, beside the log-probability of the one that follows;
    None: neither
    dropped: the sequences that a repair dropped because rows were damaged, with the fault
    version: of the format
    """

    store_id: str
    layers: tuple[Site, ...]
    codec: Codec
    shard_rows: int
    narrow_shard_rows: int
    sink_norm: Mapping[Site, float]
    vocabulary_size: int
    vocabulary_bytes: int
    provenance: Mapping[str, Any]
    options: Mapping[str, Any]
    commit: Commit
    codec_error: Mapping[Site, Any] = field(default_factory=dict)
    dropped: Mapping[int, str] = field(default_factory=dict)
    next_token: int | None = None
    version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if not self.layers or len(set(self.layers)) != len(self.layers) or min(self.layers).layer < 0:
            raise StoreError(
                f"layers {[site.key for site in self.layers]}: give one or more different layer numbers from 0 on"
            )
        if set(self.sink_norm) != set(self.layers):
            raise StoreError(
                f"sink_norm is given for layers {', '.join(map(str, self.sink_norm))}, "
                f"the store has {', '.join(map(str, self.layers))}"
            )
        if self.next_token is not None and self.next_token < 0:
            raise StoreError(f"next_token {self.next_token}: give 0 or more")
        if any(math.isnan(norm) for norm in self.sink_norm.values()):
            raise StoreError("sink_norm is NaN: give a number, or infinity to keep no sink rows")

    def specs(self) -> dict[str, ArraySpec]:
        """Every array of the store, by path."""
        return array_specs(
            self.layers,
            self.codec,
            self.shard_rows,
            self.narrow_shard_rows,
            self.next_token,
            self.version,
        )

    def lengths(self) -> dict[str, int]:
        """Committed length of an array, by the unit of its spec."""
        commit = self.commit
        return {
            "rows": commit.rows,
            "sequences": commit.sequences,
            "tokens": commit.tokens,
            "source_bytes": commit.source_bytes,
            "vocabulary_boundaries": self.vocabulary_size + 1,
            "vocabulary_bytes": self.vocabulary_bytes,
            **{exact_unit(layer): commit.exact[layer] for layer in self.layers},
        }

    def nbytes(self) -> int:
        """Size of all files that the commit needs."""
        lengths, documents = self.lengths(), self.consolidated_metadata()["metadata"]
        return (
            sum(spec.shards_bytes(lengths[spec.unit]) for spec in self.specs().values())
            + sum(len(json_bytes(document, name)) for name, document in documents.items())
            + len(json_bytes(self.document(), "the manifest"))
        )

    def attributes(self) -> dict[str, Any]:
        """attributes["nla_engine"]; strict JSON."""
        attributes = {
            "format_version": self.version,
            "store_id": self.store_id,
            "d_model": self.codec.d_model,
            "layers": [site.key for site in self.layers],
            "layer_convention": LAYER_CONVENTION,
            **self._conventions(),
            "codec": self.codec.to_dict(),
            "codec_error": {str(site): self.codec_error.get(site) for site in self.layers},
            "shard_rows": self.shard_rows,
            "narrow_shard_rows": self.narrow_shard_rows,
            "sink_norm": {str(k): float(v) if math.isfinite(v) else None for k, v in self.sink_norm.items()},
            "row_flags": {
                flag.name: {"bit": flag.value, "meaning": text} for flag, text in FLAG_MEANINGS.items()
            },
            "finish": {
                code.name: {"code": code.value, "meaning": text} for code, text in FINISH_MEANINGS.items()
            },
            "vocabulary": {"size": self.vocabulary_size, "bytes": self.vocabulary_bytes},
            **({} if self.next_token is None else {"next_token": {"top": self.next_token}}),
            "provenance": self.provenance,
            "options": self.options,
            "dropped": {str(number): fault for number, fault in self.dropped.items()},
            "commit": self.commit.to_dict(),
        }
        return {**attributes, "checksum": attributes_checksum(attributes)}

    def _conventions(self) -> dict[str, Any]:
        """What its sites inside blocks hold, in words."""
        parts = {site.part for site in self.layers} - {RESID_POST}
        return (
            {"site_conventions": {part: text for part, text in PARTS.items() if part in parts}}
            if parts
            else {}
        )

    @classmethod
    def from_attributes(cls, data: dict[str, Any]) -> Manifest:
        if data["checksum"] != attributes_checksum(data):
            raise ValueError("the attributes fail their checksum")
        manifest = cls(
            store_id=str(data["store_id"]),
            layers=tuple(Site.parse(site) for site in data["layers"]),
            codec=Codec.from_dict(data["codec"]),
            shard_rows=int(data["shard_rows"]),
            # Stores written before this key existed lack it.
            narrow_shard_rows=int(data.get("narrow_shard_rows", data["shard_rows"])),
            sink_norm={
                Site.parse(k): math.inf if v is None else float(v) for k, v in data["sink_norm"].items()
            },
            vocabulary_size=int(data["vocabulary"]["size"]),
            vocabulary_bytes=int(data["vocabulary"]["bytes"]),
            provenance=data["provenance"],
            options=data["options"],
            commit=Commit.from_dict(data["commit"]),
            codec_error={Site.parse(k): v for k, v in data["codec_error"].items() if v is not None},
            dropped={int(k): str(v) for k, v in data["dropped"].items()},
            next_token=int(data["next_token"]["top"]) if "next_token" in data else None,
            version=data["format_version"],
        )
        manifest.specs(), manifest.lengths()  # raise if something they need is missing or unfit
        return manifest

    def write(self, root: Place) -> None:
        """Replace the root group's zarr.json: this is the moment of commit. Raises WriteError."""
        write_file_atomically(root / METADATA_NAME, json_bytes(self.document(), "the manifest"))

    def document(self) -> dict[str, Any]:
        """The root group's zarr.json."""
        return {
            **GROUP_METADATA,
            "attributes": {ATTRIBUTE: self.attributes()},
            "consolidated_metadata": self.consolidated_metadata(),
        }

    def consolidated_metadata(self) -> dict[str, Any]:
        """The metadata of every group and array, as Zarr readers find it in the root's zarr.json."""
        lengths = self.lengths()
        specs = self.specs()
        nodes: dict[str, Any] = {spec.path.split("/")[0]: GROUP_METADATA for spec in specs.values()}
        nodes.update({path: spec.metadata(lengths[spec.unit]) for path, spec in specs.items()})
        return {"kind": "inline", "must_understand": False, "metadata": nodes}

    @classmethod
    def read(cls, root: Place) -> Manifest:
        """The manifest of the store at `root`. Raises StoreError if there is none that can be read."""
        data = read_attributes(root)
        version = data.get("format_version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 1:
            raise DamageError(f"{root / METADATA_NAME}: damaged: format_version is {version!r}")
        if version > FORMAT_VERSION:
            raise StoreError(
                f"{root}: format version {version}, this nla_engine reads up to {FORMAT_VERSION}: upgrade it"
            )
        try:
            return cls.from_attributes(data)
        except KeyError as error:
            raise DamageError(f"{root / METADATA_NAME}: damaged: {error} is missing") from None
        except (RequestError, StoreError, TypeError, ValueError, AttributeError) as error:
            raise DamageError(f"{root / METADATA_NAME}: damaged: {error}") from None


def read_attributes(root: Place) -> dict[str, Any]:
    """attributes["nla_engine"] of the Zarr group at `root`. The StoreError says what else is there."""
    path = root / METADATA_NAME
    try:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            exists(root)  # puts back a store that an interrupted replacement left under another name
            data = path.read_bytes()
    except OSError as error:
        raise _why_unreadable(root, error) from None
    try:
        document = json.loads(data)
    except ValueError as error:
        raise DamageError(f"{path}: damaged: broken JSON: {error}") from None
    attributes = document.get("attributes") if isinstance(document, dict) else None
    ours = attributes.get(ATTRIBUTE) if isinstance(attributes, dict) else None
    if not isinstance(ours, dict):
        raise StoreError(
            f"{root}: a Zarr store without '{ATTRIBUTE}' attributes: nla_engine capture did not write it"
        )
    return ours


def _why_unreadable(root: Place, error: OSError) -> StoreError:
    """The error for a root whose zarr.json could not be read. Raises StoreError if the root cannot be reached."""
    try:
        if not root.exists():
            return StoreError(f"{root}: there is no such store: give the directory that capture wrote")
        if isinstance(root, Path) and not root.is_dir():
            return StoreError(f"{root}: a file, not a store (a store is a directory)")
        if isinstance(error, FileNotFoundError):
            old = any((root / name).exists() for name in (".zgroup", ".zarray"))
            kind = "a Zarr v2 store" if old else "not a Zarr store"
            return StoreError(f"{root}: {kind}, so not one that nla_engine capture wrote")
    except OSError as other:
        return StoreError(f"{root}: cannot be read: {other.strerror}")
    return StoreError(f"{root / METADATA_NAME}: cannot be read: {error.strerror}")


def attributes_checksum(attributes: Mapping[str, Any]) -> str:
    """crc32c, as 8 hex digits, of all but `checksum`, written as JSON with sorted keys and no spaces."""
    rest = {key: value for key, value in attributes.items() if key != "checksum"}
    text = json.dumps(rest, allow_nan=False, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return f"{google_crc32c.value(text.encode()):08x}"


def strict_json(value: Any, name: str) -> Any:
    """`value` after a trip through JSON. Raises StoreError if JSON cannot hold it (NaN)."""
    return json.loads(json_bytes(value, name))


def json_bytes(value: Any, name: str) -> bytes:
    """Strict JSON in UTF-8. Raises StoreError naming `name`."""
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError) as error:
        raise StoreError(f"{name} cannot be written as JSON: {error}") from None


def differences(stored: Any, given: Any, name: str = "") -> Sequence[str]:
    """One line for each key in which two JSON values differ, dictionaries entered."""
    if isinstance(stored, dict) and isinstance(given, dict):
        names = {key: f"{name}.{key}" if name else str(key) for key in [*stored, *given]}
        return [
            line
            for key, path in names.items()
            for line in differences(stored.get(key, _ABSENT), given.get(key, _ABSENT), path)
        ]
    if stored == given:
        return []
    if all(isinstance(side, str) and _FINGERPRINT.fullmatch(side) for side in (stored, given)):
        return [f"the content of {name} differs"]
    words = {None: "not given", _ABSENT: "absent"}
    before, now = (
        words[side] if side is None or side is _ABSENT else json.dumps(side) for side in (stored, given)
    )
    return [f"{name} was {before}, is now {now}"]
