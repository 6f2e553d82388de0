"""AV and AR of a round trip: loads them, places them, and checks them against each other and the store.

Both stay on the GPU if they fit. Otherwise they take turns there, and the other waits in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nla_engine.config import RoundtripOptions
from nla_engine.engine.families import why_unfused
from nla_engine.engine.slots import free_bytes
from nla_engine.errors import CheckpointError, RequestError
from nla_engine.models.checkpoint import CONFIG, read_json, weight_paths
from nla_engine.models.hub import find_directory
from nla_engine.models.load import pick_device, pick_dtype
from nla_engine.models.sidecar import VALUE_HEAD, Given
from nla_engine.ops.backends import Kernels, shortfall
from nla_engine.ops.fp8 import check_fp8
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.verbalize import Verbalizer
from nla_engine.store import CaptureStore

#: GPU memory that AV and AR need besides their weights: slots, activations, graphs.
_WORKING_BYTES = 12 << 30
_HOST = torch.device("cpu")


@dataclass
class Pair:
    """The two models. in_turns: only one of them is on `device` at a time."""

    verbalizer: Verbalizer
    reconstructor: Reconstructor
    device: torch.device
    in_turns: bool = False

    def verbalize_next(self) -> None:
        """Bring the AV to the device."""
        if self.in_turns:
            self.reconstructor.move(_HOST)
            self.verbalizer.move(self.device)

    def reconstruct_next(self) -> None:
        """Bring the AR to the device."""
        if self.in_turns:
            self.verbalizer.move(_HOST)
            self.reconstructor.move(self.device)

    def close(self) -> None:
        """Undo what the engine changed in the models."""
        self.reconstructor.close()


def load_pair(
    options: RoundtripOptions,
    announce: Callable[[str], None],
    verbalizer: Verbalizer | None = None,
    reconstructor: Reconstructor | None = None,
) -> Pair:
    """The AV and AR of the options, or the given ones, on the device unless they take turns."""
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    if options.precision == "fp8":
        check_fp8(device)
    for line in shortfall(device):
        announce(line)
    remote_code = options.trust_remote_code
    kernels = Kernels(options.kernels, options.precision)
    said = Given(options.injection_scale, options.injection, options.template_value)
    if said != Given() and (verbalizer or reconstructor):
        raise RequestError(
            "--injection, --injection-scale and --template-value are for models that are loaded here"
        )
    for model in (verbalizer, reconstructor):
        if model is not None and model.kernels != kernels:
            raise RequestError(f"a given model was loaded with {model.kernels}, the options say {kernels}")
    given = ((options.av, verbalizer), (options.ar, reconstructor))
    directories = [find_directory(name, remote_code=remote_code) for name, model in given if model is None]
    turns = options.residency == "turns"
    if options.residency == "auto" and device.type == "cuda" and len(directories) == 2:
        weights = sum(_weight_bytes(directory, dtype) for directory in directories)
        if options.precision == "fp8":
            weights += weights // 2  # the quantised weights are kept beside the model's own
        free = free_bytes(device)
        turns = weights + _WORKING_BYTES > free
        if turns:
            announce(
                f"AV and AR take turns on the GPU: {weights / 2**30:.0f} GiB of weights and "
                f"{_WORKING_BYTES >> 30} GiB to work in, {free / 2**30:.0f} GiB free"
            )
    place = _HOST if turns else device
    how: dict[str, Any] = {
        "device": place,
        "dtype": dtype,
        "remote_code": remote_code,
        "kernels": kernels,
        "given": said,
    }
    verbalizer = verbalizer or Verbalizer.load(options.av, **how)
    reconstructor = reconstructor or Reconstructor.load(options.ar, **how)
    for lm in (verbalizer.lm, reconstructor.lm):
        if not kernels.plain(device) and (reason := why_unfused(lm.blocks)):
            announce(f"{lm.name}: {reason}")
    return Pair(verbalizer, reconstructor, device, turns)


def _weight_bytes(directory: Path, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint's weights in this dtype; on disk they have 16 bits unless the config says float32.

    0 if config or index cannot be read: loading the checkpoint then says why.
    """
    try:
        config = read_json(directory / CONFIG)
        files = [*weight_paths(directory, config), directory / VALUE_HEAD]
    except CheckpointError:
        return 0
    stored = sum(file.stat().st_size for file in files if file.is_file())
    wide = (config.get("dtype") or config.get("torch_dtype")) == "float32"
    return stored * dtype.itemsize // (4 if wide else 2)


def choose_layer(store: CaptureStore, options: RoundtripOptions, pair: Pair) -> int:
    """The layer to read, checked against the widths and layers of store, AV and AR."""
    av, ar = pair.verbalizer, pair.reconstructor
    for name, sidecar in (("--av " + options.av, av.sidecar), ("--ar " + options.ar, ar.sidecar)):
        if sidecar.d_model != store.d_model:
            raise RequestError(
                f"{name} is made for vectors of width {sidecar.d_model}, {options.store} holds {store.d_model}: "
                "give the AV and AR of the captured model"
            )
    trained = av.sidecar.layer
    if trained is not None and trained != ar.layer:
        raise RequestError(
            f"--av {options.av} reads layer {trained}, --ar {options.ar} gives layer {ar.layer}: they are no pair"
        )
    layer = options.layer if options.layer is not None else ar.layer
    if layer != ar.layer:
        raise RequestError(
            f"--layer {layer}: this AV and AR were made for layer {ar.layer}; leave --layer out"
        )
    if layer not in store.layers:
        held = ", ".join(map(str, store.layers))
        raise RequestError(
            f"{options.store} holds layer {held}, the AV and AR were made for layer {layer}: capture that one"
        )
    return layer
