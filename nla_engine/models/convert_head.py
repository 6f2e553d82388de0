"""python -m nla_engine.models.convert_head FILE.pt OUT.safetensors: a pickled AR head as safetensors.

Reads FILE with torch.load(weights_only=True), which builds tensors and plain containers only and runs no code of the
file's. Writes the one linear map that it holds as `weight` [d, d], and `bias` [d] if there is one, both in float32.
Nothing else in the package reads pickles.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from nla_engine.errors import CheckpointError, NLAError, RequestError, first_line


def convert(source: Path, out: Path, key: str | None = None) -> dict[str, torch.Tensor]:
    """Write the head that `source` holds to `out`, and return its tensors.

    key: the name of its matrix, needed if there are several
    Raises CheckpointError if it holds no such head, RequestError if `out` exists.
    """
    if out.exists():
        raise RequestError(f"{out}: exists: give another name")
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # the library raises many types for one fault
        raise CheckpointError(
            f"{source}: holds more than tensors, or cannot be read ({first_line(error)}): it is not converted"
        ) from error
    tensors = dict(_tensors(found, ""))
    matrices = [name for name, tensor in tensors.items() if tensor.ndim == 2 and len(set(tensor.shape)) == 1]
    chosen = [name for name in matrices if key in (None, name)]
    if len(chosen) != 1:
        listed = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sorted(tensors.items())[:8])
        raise CheckpointError(
            f"{source}: holds {len(chosen)} square matrices{f' named {key}' if key else ''}, a head has one "
            f"(it holds {listed or 'no tensors'}): name it with --key"
        )
    start = chosen[0].removesuffix("weight")
    bias = f"{start}bias"
    others = sorted(set(tensors) - {chosen[0], bias})
    if others and key is None:
        raise CheckpointError(
            f"{source}: holds {others[0]} too, so {chosen[0]} may be a part of a larger head: "
            f"pass --key {chosen[0]} if it is the whole head"
        )
    head = {"weight": tensors[chosen[0]].float().contiguous()}
    if chosen[0].endswith("weight") and bias in tensors:
        head["bias"] = tensors[bias].float().contiguous()
    save_file(head, out)
    return head


def _tensors(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in nested dictionaries, by its dotted name."""
    if isinstance(value, torch.Tensor):
        yield name or "weight", value.detach()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{name}.{key}" if name else str(key))


def main() -> None:
    """The command."""
    more = (__doc__ or "").partition("\n\n")[2]
    parser = argparse.ArgumentParser("nla_engine.models.convert_head", description=more)
    parser.add_argument("file", type=Path, help="the pickled head")
    parser.add_argument("out", type=Path, help="the file to write, such as value_head.safetensors")
    parser.add_argument("--key", help="name of the matrix in FILE, if it holds several tensors")
    given = parser.parse_args()
    try:
        head = convert(given.file, given.out, given.key)
    except NLAError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in head.items())
    print(f"{given.out}: {shapes}, read from {given.file} as tensors only: no code in it was run")


if __name__ == "__main__":
    main()
