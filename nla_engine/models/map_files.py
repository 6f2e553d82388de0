"""What stands between captured vectors and a model: which files hold it, and whether they fit sidecar and model.

    before an AV   v -> whitening -> map -> injection
    after an AR    head -> map -> un-whitening -> v'

The files are given, or lie beside the weights: whitening.safetensors, av_map.safetensors, ar_map.safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nla_engine.errors import CheckpointError
from nla_engine.models.checkpoint import AR_MAP, AV_MAP, WHITENING
from nla_engine.models.hub import listed
from nla_engine.models.sidecar import WHITENED, Given, Sidecar
from nla_engine.models.source import Source
from nla_engine.models.value_head import CONVERT, convertible
from nla_engine.models.vector_map import VectorMap, Whitening

_MAP = {"av": AV_MAP, "ar": AR_MAP}
_READ = {WHITENING, *_MAP.values()}
#: Words in the name of a file that may be a map by another name, by role, and of one that may be a whitening.
_EITHER = {"map", "proj", "projection", "projector"}
_SUSPECT = {
    "av": _EITHER | {"enc", "encoder", "prefix"},
    "ar": _EITHER | {"dec", "decoder", "mean", "means"},
}
_WHITENS = {"whitening", "whiten", "zca"}


@dataclass(frozen=True)
class Maps:
    """The whitening and the map of one model, each None if it has none."""

    whitening: Whitening | None = None
    map: VectorMap | None = None

    def check_width(self, sidecar: Sidecar, d_model: int) -> None:
        """CheckpointError unless vectors of the sidecar's width enter or leave a model of width d_model."""
        width, found = sidecar.d_model, self.map
        if self.whitening is not None and self.whitening.width != width:
            raise CheckpointError(
                f"{self.whitening.path}: is made for vectors of width {self.whitening.width}, "
                f"{sidecar.path} says {width}: give the whitening of this pair"
            )
        if found is None:
            if d_model != width:
                raise CheckpointError(f"{sidecar.path}: d_model is {width}, the model's width is {d_model}")
            return
        enters, leaves = (width, d_model) if sidecar.role == "av" else (d_model, width)
        if found.width != enters:
            whose = f"{sidecar.path} says" if sidecar.role == "av" else "the model's width is"
            raise CheckpointError(
                f"{found.path}: takes vectors of width {found.width}, {whose} {enters}: give the map of this model"
            )
        count = found.count(leaves)
        if sidecar.role == "ar" and (count != 1 or found.prefix is not None):
            raise CheckpointError(
                f"{found.path}: makes several vectors ({count} and a prefix of "
                f"{0 if found.prefix is None else len(found.prefix)}), and one leaves an AR: give another map"
            )

    @property
    def prefix(self) -> torch.Tensor | None:
        """Constant vectors [p, d_model] that enter before the others, as they are."""
        return None if self.map is None else self.map.prefix

    def count(self, d_model: int) -> int:
        """How many vectors of width d_model become of one."""
        return 1 if self.map is None else self.map.count(d_model)

    def before(self, vectors: torch.Tensor, d_model: int) -> torch.Tensor:
        """What enters an AV of width d_model: captured vectors float32 [n, d] -> [n, k, d_model].

        CheckpointError if a vector comes out without a direction.
        """
        if self.whitening is None and self.map is None:
            return vectors[:, None]
        white = vectors if self.whitening is None else self.whitening.white(vectors)
        mapped = white[:, None] if self.map is None else self.map.apply(white, d_model)
        if not bool((mapped.isfinite() & (mapped.abs().amax(2, keepdim=True) > 0)).all()):
            last = self.map or self.whitening
            assert last is not None
            raise CheckpointError(
                f"{last.path}: makes a vector zero or infinite: it is not made for these vectors"
            )
        return mapped

    def after(self, vectors: torch.Tensor) -> torch.Tensor:
        """What leaves an AR: outputs of its head float32 [n, d_model] -> captured vectors [n, d]."""
        if self.map is not None:
            vectors = self.map.apply(vectors, len(self.map.weight))[:, 0]
        return vectors if self.whitening is None else self.whitening.captured(vectors)

    def to(self, device: torch.device) -> Maps:
        """The same on another device."""
        whitening, found = self.whitening, self.map
        return replace(
            self,
            whitening=None if whitening is None else whitening.to(device),
            map=None if found is None else found.to(device),
        )

    def checksums(self) -> Mapping[str, str]:
        """Of the files, as a table records them; nothing without any."""
        files = {"map": self.map, "whitening": self.whitening}
        return {name: file.checksum for name, file in files.items() if file is not None}

    def fingerprint(self) -> list[str]:
        """What the fingerprint of a model that has them gains."""
        return [f"{name} {checksum}" for name, checksum in self.checksums().items()]


def find_maps(source: Source, sidecar: Sidecar, given: Given) -> Maps:
    """The whitening and the map of a model: those given, else those beside its weights.

    CheckpointError for a file that does not fit the sidecar, that is missing though the sidecar needs it, or that lies
    there though the sidecar does not mention it.
    """
    whitening = _whitening(source, sidecar, given.whitening)
    option, file = f"--{sidecar.role}-map", _MAP[sidecar.role]
    path = given.map or _beside(source, file)
    if path is None:
        _check_nothing_left_out(source, _SUSPECT[sidecar.role], option, file)
        return Maps(whitening)
    _check_form(path, option, file)
    return Maps(whitening, VectorMap.read(path))


def _beside(source: Source, file: str) -> Path | None:
    path = source.having(file) / file
    return path if path.is_file() else None


def _whitening(source: Source, sidecar: Sidecar, given: Path | None) -> Whitening | None:
    """The whitening that the sidecar needs, or one that is given where it does not say."""
    whitened = sidecar.norm in WHITENED
    path = given or _beside(source, WHITENING)
    if path is None:
        if whitened:
            raise CheckpointError(
                f"{sidecar.path}: extraction.norm is {sidecar.norm}, and there is no {WHITENING} with the mean and the "
                f"matrix: pass --whitening FILE{_or_convert(source)}"
            )
        _check_nothing_left_out(source, _WHITENS, "--whitening", WHITENING)
        return None
    if not whitened and (sidecar.norm is not None or given is None):
        says = (
            "does not say extraction.norm"
            if sidecar.norm is None
            else f"says extraction.norm: {sidecar.norm}"
        )
        mend = (
            "pass it with --whitening, or move it away"
            if sidecar.norm is None
            else "take one of the two away"
        )
        raise CheckpointError(f"{path}: is a whitening, and {sidecar.path} {says}: {mend}")
    _check_form(path, "--whitening", WHITENING)
    found = Whitening.read(path, back=sidecar.role == "ar")
    if whitened and not found.symmetric:
        raise CheckpointError(
            f"{path}: matrix is not symmetric, and {sidecar.path} says {sidecar.norm}, whose matrix is: "
            "give the whitening of this pair"
        )
    if sidecar.whitening is not None and found.content not in (None, sidecar.whitening):
        raise CheckpointError(
            f"{path}: has sha256 {found.content}, {sidecar.path} says {sidecar.whitening}: "
            "give the whitening of this pair"
        )
    return found


def _or_convert(source: Source) -> str:
    for directory in (source.directory, source.weights):
        if files := [name for name in convertible(listed(directory)[1]) if _words(name) & _WHITENS]:
            return f", made from {files[0]} with {CONVERT} {directory / files[0]} {WHITENING}"
    return ""


def _check_nothing_left_out(source: Source, suspect: set[str], option: str, target: str) -> None:
    """CheckpointError for a file whose name says that it may be a map: running without it would be wrong."""
    files = listed(source.directory)[1]
    left = [file for file in files if file.endswith(".safetensors") and "/" not in file and file not in _READ]
    for file in sorted([*convertible(files), *left]):
        if _words(file) & suspect:
            how = f", converted with {CONVERT} {file} {target}" if convertible([file]) else ""
            raise CheckpointError(
                f"{source.name}: has {file}, which may change vectors and is not read under this name: pass {option} "
                f"with it{how}, or give a directory without it"
            )


def _words(file: str) -> set[str]:
    """The words of a file's name."""
    return set(re.split(r"[^a-z]+", file.lower()))


def _check_form(path: Path, option: str, target: str) -> None:
    """CheckpointError for a file that is not there, or of a form that is converted first."""
    if convertible([path.name]):
        raise CheckpointError(
            f"{path}: is not safetensors (pickles can run code): convert it with {CONVERT} {path} {target}, and pass "
            f"{option} {target}"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file: mend {option}")
