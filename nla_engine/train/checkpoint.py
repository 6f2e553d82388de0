"""The state of training as two files, so that a run goes on exactly: tensors by name, and where it was.

There is no state of random numbers: what a step draws follows from the seed and the step's number.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from nla_engine.errors import RequestError, first_line
from nla_engine.store.shards import write_file_atomically

STATE = "state.safetensors"
_KEY = "nla_engine"


@dataclass(frozen=True)
class Place:
    """Where training is. step: of the phase; seconds: spent in all, began: by when the phase began; done: steps of each
    phase; options: those that shape the training; data: fingerprint of its rows and texts
    """

    phase: str
    step: int
    seconds: float
    began: float
    done: dict[str, int]
    options: dict[str, Any]
    data: str


def write_state(directory: Path, place: Place, tensors: Mapping[str, torch.Tensor]) -> None:
    """Replace the checkpoint in `directory`, whole or not at all."""
    held = {name: tensor.detach().to("cpu").contiguous().clone() for name, tensor in tensors.items()}
    write_file_atomically(directory / STATE, save(held, {_KEY: json.dumps(asdict(place))}))


def read_place(directory: Path) -> Place:
    """Where the checkpoint stands. RequestError if there is none that can be read."""
    file = directory / STATE
    try:
        with safe_open(file, framework="pt") as opened:
            return Place(**json.loads((opened.metadata() or {})[_KEY]))
    except FileNotFoundError:
        raise RequestError(
            f"{directory}: holds no checkpoint: leave --resume out (and pass --overwrite, if something is there)"
        ) from None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"{file}: cannot be read ({first_line(error)}): start again with --overwrite"
        ) from None


def read_state(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors of the checkpoint, by name."""
    with safe_open(directory / STATE, framework="pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
