"""The tensors of an adapter's file, by the module that they belong to.

Knows names and shapes, not the model: `merge` knows that.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nla_engine.errors import CheckpointError, first_line
from nla_engine.models.adapters.form import Adapter

#: What trainers put before the name that a module has in the base model.
_PREFIXES = ("base_model.model.", "backbone.")
_LOW_RANK = re.compile(
    r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(\.default)?(\.weight)?"
)
HEAD, HEADS = "value_head.", "heads."


@dataclass
class Change:
    """What the file holds for one module, as names of tensors.

    down, up: A [r, in] and B [out, r]; of an embedding A [r, tokens] and B [d, r]; None if the module has none
    whole: parameters that the file replaces, by their name in the module
    """

    down: str | None = None
    up: str | None = None
    embedding: bool = False
    whole: dict[str, str] = field(default_factory=dict)


class AdapterFile:
    """The file of an adapter. changes: by the name of a module in its base model.

    CheckpointError for a file that cannot be read, a tensor that is no part of a LoRA, a half without its other half,
    a rank or a module that the configuration does not give.
    """

    def __init__(self, adapter: Adapter) -> None:
        self.adapter, self.path = adapter, adapter.weights
        try:
            with safe_open(self.path, framework="pt") as file:
                self.shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{self.path}: cannot be read ({first_line(error)}): fetch it again"
            ) from error
        self.changes: dict[str, Change] = {}
        for key in sorted(self.shapes):
            if not (adapter.blocks is not None and key.startswith((HEAD, HEADS))):
                self._place(key)
        for module, change in self.changes.items():
            self._check(module, change)
        if not any(change.down for change in self.changes.values()):
            raise CheckpointError(f"{self.path}: holds no tensors of a LoRA (lora_A, lora_B): fetch it again")

    def read(self, key: str, device: torch.device) -> torch.Tensor:
        """A tensor in float32 on `device`. CheckpointError if it holds NaN or Inf."""
        with safe_open(self.path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(key).to(device).float()
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(
                f"{self.path}: {key} holds NaN or Inf: the adapter is damaged, fetch it again"
            )
        return tensor

    def delta(self, module: str, device: torch.device) -> torch.Tensor:
        """(B @ A) * scaling in float32: what the weight of a module gains, [out, in] ([d, tokens] of an embedding)."""
        change = self.changes[module]
        assert change.down is not None and change.up is not None
        product = self.read(change.up, device) @ self.read(change.down, device)
        return product.mul_(self.adapter.scaling_of(module))

    def _place(self, key: str) -> None:
        name = next((key.removeprefix(start) for start in _PREFIXES if key.startswith(start)), key)
        if found := _LOW_RANK.fullmatch(name):
            change = self.changes.setdefault(found["module"], Change())
            change.embedding = bool(found["embedding"])
            if found["part"] == "A":
                change.down = key
            else:
                change.up = key
            return
        if "lora_" in name:
            raise CheckpointError(
                f"{self.path}: {key} is no tensor of a plain LoRA: merge the adapter into its base with the tool that "
                "trained it, and give that directory"
            )
        module, _, parameter = name.replace(".modules_to_save.default.", ".").rpartition(".")
        module = module.removesuffix(".base_layer")  # as saved where an adapted embedding or head lies beside
        self.changes.setdefault(module, Change()).whole[parameter] = key

    def _check(self, module: str, change: Change) -> None:
        adapter = self.adapter
        if change.whole and not (
            adapter.is_saved(module) or (change.down and set(change.whole) == {"weight"})
        ):
            raise CheckpointError(
                f"{self.path}: {next(iter(change.whole.values()))} is a whole tensor, and modules_to_save in "
                f"{adapter.config.name} does not name its module: fetch both again"
            )
        if change.down is None and change.up is None:
            return
        if change.down is None or change.up is None:
            raise CheckpointError(
                f"{self.path}: {module} has one half of its LoRA ({change.down or change.up}): fetch it again"
            )
        rank, down, up = adapter.rank_of(module), self.shapes[change.down], self.shapes[change.up]
        if len(down) != 2 or len(up) != 2 or down[0] != rank or up[1] != rank:
            raise CheckpointError(
                f"{self.path}: {module} has tensors {list(down)} and {list(up)}, {adapter.config.name} says rank "
                f"{rank}: the two files do not belong together: fetch both again"
            )
        if not adapter.is_target(module):
            raise CheckpointError(
                f"{self.path}: {module} has a LoRA, and target_modules in {adapter.config.name} does not name it: "
                "the two files do not belong together: fetch both again"
            )


def fingerprint(path: Path) -> str:
    """sha256 over the bytes of a file, short."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
