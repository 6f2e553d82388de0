"""python -m nla_engine.models.convert_head FILE OUT.safetensors: a pickled head, map or whitening as safetensors.

Reads FILE with torch.load(weights_only=True), which builds tensors and plain containers only and runs no code of the
file's; an .npz with numpy, which unpickles nothing. What OUT becomes is decided by its name:

whitening.safetensors: `mean` [d], `matrix` [d, d], and `inverse`, `norm` if they are there
av_map.safetensors, ar_map.safetensors: `weight` [out, in], and `bias`, `prefix` if they are there, in float32
value_heads.safetensors: for each layer `value_heads.LAYER.weight` [d, d], in float32
any other name: the one head, `weight` [d, d], and `bias` [d] if there is one, in float32

Nothing else in the package reads pickles.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from nla_engine.errors import CheckpointError, NLAError, RequestError, first_line
from nla_engine.models.checkpoint import AR_MAP, AV_MAP, VALUE_HEADS, WHITENING
from nla_engine.models.value_head import heads_by_layer

#: What trainers call the parts of a whitening.
_WHITENING = {
    **dict.fromkeys(("mean", "mu"), "mean"),
    **dict.fromkeys(("matrix", "w", "W"), "matrix"),
    **dict.fromkeys(("inverse", "w_inv", "W_inv"), "inverse"),
    "norm": "norm",
}
#: Eigenvalues that a whitening divides by, and those of the training vectors: their ratios tell `norm`.
_DIVIDED, _MEASURED = "eigenvalues", "eigenvalues_raw"
#: What else trainers keep beside a whitening; it does not change it.
_IDLE = {_DIVIDED, _MEASURED, "shrinkage", "floor_quantile", "n_samples", "layer_index"}


def convert(source: Path, out: Path, key: str | None = None) -> dict[str, torch.Tensor]:
    """Write what `source` holds to `out`, and return its tensors.

    key: the name of the matrix of a head or a map, needed if there are several
    Raises CheckpointError if it holds nothing of that kind, RequestError if `out` exists or `key` has no meaning.
    """
    if out.exists():
        raise RequestError(f"{out}: exists: give another name")
    if key is not None and out.name in (WHITENING, VALUE_HEADS):
        raise RequestError(f"--key is for one matrix: leave it out for {out.name}")
    tensors = _load(source, numbers=out.name == WHITENING)
    if out.name == WHITENING:
        found = _whitening(source, tensors)
    elif out.name == VALUE_HEADS:
        found = _heads(source, tensors)
    else:
        found = _matrix(source, tensors, key, square=out.name not in (AV_MAP, AR_MAP))
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, out)
    return found


def _load(source: Path, *, numbers: bool) -> dict[str, torch.Tensor]:
    """Every tensor of the file, by its dotted name. numbers: plain ones too."""
    try:
        if source.suffix == ".npz":
            with np.load(source, allow_pickle=False) as arrays:
                found = {name: arrays[name] for name in arrays.files if arrays[name].dtype.kind in "fiu"}
            return {name: torch.from_numpy(np.asarray(array)) for name, array in found.items()}
        return dict(_tensors(torch.load(source, map_location="cpu", weights_only=True), "", numbers))
    except Exception as error:  # the libraries raise many types for one fault
        raise CheckpointError(
            f"{source}: holds more than tensors, or cannot be read ({first_line(error)}): it is not converted"
        ) from error


def _matrix(
    source: Path, tensors: dict[str, torch.Tensor], key: str | None, *, square: bool
) -> dict[str, torch.Tensor]:
    """The one matrix with its bias: a head, which is square, or a map, which may have a prefix."""
    kind = "head" if square else "map"
    chosen = [
        name
        for name, tensor in tensors.items()
        if tensor.ndim == 2
        and (len(set(tensor.shape)) == 1 or not square)
        and key in (None, name)
        and (square or not _is_named(name, "prefix"))
    ]
    if len(chosen) != 1:
        raise CheckpointError(
            f"{source}: holds {len(chosen)} {'square ' if square else ''}matrices{f' named {key}' if key else ''}, "
            f"a {kind} has one ({_listed(tensors)}): name it with --key"
        )
    start = chosen[0].removesuffix("weight")
    parts = {"weight": chosen[0]}
    if chosen[0].endswith("weight"):
        parts["bias"] = f"{start}bias"
    if not square:
        parts["prefix"] = f"{start if chosen[0].endswith('weight') else ''}prefix"
    if (others := sorted(set(tensors) - set(parts.values()))) and key is None:
        raise CheckpointError(
            f"{source}: holds {others[0]} too, so {chosen[0]} may be a part of a larger {kind}: "
            f"pass --key {chosen[0]} if it is the whole {kind}"
        )
    return {part: tensors[name].float() for part, name in parts.items() if name in tensors}


def _whitening(source: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """mean, matrix and what goes with them, in their own precision: a checksum of the sidecar may be over that."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        part = _WHITENING.get(name.rpartition(".")[2])
        if part in found:
            raise CheckpointError(f"{source}: holds {part} twice ({_listed(tensors)}): it is not converted")
        if part is not None:
            found[part] = tensor
        elif name not in _IDLE:
            raise CheckpointError(
                f"{source}: holds {name} {list(tensor.shape)}, which may change the whitening ({_listed(tensors)}): "
                "it is not converted"
            )
    if missing := [part for part in ("mean", "matrix") if part not in found]:
        raise CheckpointError(f"{source}: has no {missing[0]} ({_listed(tensors)}): it is no whitening")
    if "norm" not in found and {_DIVIDED, _MEASURED} <= set(tensors):
        found["norm"] = (tensors[_MEASURED] / tensors[_DIVIDED]).sum().sqrt()
    return found


def _heads(source: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The head of each layer."""
    try:
        heads = heads_by_layer(tensors)
    except ValueError as error:
        raise CheckpointError(f"{source}: {error} ({_listed(tensors)}): it is not converted") from None
    if not heads:
        raise CheckpointError(f"{source}: holds no heads ({_listed(tensors)})")
    return {
        f"value_heads.{layer}.{part}": tensors[name].float()
        for layer, parts in heads.items()
        for part, name in parts.items()
    }


def _is_named(name: str, part: str) -> bool:
    return name == part or name.endswith(f".{part}")


def _listed(tensors: Mapping[str, torch.Tensor]) -> str:
    """What a file holds, for errors."""
    listed = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items())[:8])
    return f"it holds {listed or 'no tensors'}"


def _tensors(value: Any, name: str, numbers: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested dictionaries, by its dotted name. numbers: plain ones too."""
    if isinstance(value, torch.Tensor):
        yield name or "weight", value.detach()
    elif numbers and isinstance(value, int | float):
        yield name, torch.tensor(float(value), dtype=torch.float64)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}.{key}" if name else str(key), numbers)


def main() -> None:
    """The command."""
    more = (__doc__ or "").partition("\n\n")[2]
    parser = argparse.ArgumentParser(
        "nla_engine.models.convert_head",
        description=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="the pickled file, or an .npz")
    parser.add_argument("out", type=Path, help="the file to write, such as value_head.safetensors")
    parser.add_argument("--key", help="name of the matrix in FILE, if it holds several tensors")
    given = parser.parse_args()
    try:
        found = convert(given.file, given.out, given.key)
    except NLAError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in found.items())
    print(f"{given.out}: {shapes}, read from {given.file} as tensors only: no code in it was run")


if __name__ == "__main__":
    main()
