"""AV and AR of stage 2, or one of them alone: loads them, places them, checks them against each other and the store.

Both stay on the GPU if they fit. Otherwise they take turns there, and the other waits in host memory.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nla_engine.config import AskOptions, RoundtripOptions, ScoringOptions, StageTwoOptions, WritingOptions
from nla_engine.engine.experts import why_no_graph
from nla_engine.engine.families import why_unfused
from nla_engine.engine.leader import first_device, group_devices, open_ranks
from nla_engine.engine.ranks import Ranks
from nla_engine.engine.slots import free_bytes, free_each
from nla_engine.engine.split_load import check_split
from nla_engine.errors import CheckpointError, RequestError
from nla_engine.models.av_prompt import Wording
from nla_engine.models.checkpoint import CONFIG, VALUE_HEAD, read_json, weight_paths
from nla_engine.models.load import LanguageModel, pick_device, pick_dtype
from nla_engine.models.sidecar import Given
from nla_engine.models.source import Source, find_source
from nla_engine.ops.backends import Kernels, shortfall
from nla_engine.ops.fp8 import check_fp8
from nla_engine.roundtrip.reconstruct import Reconstructor
from nla_engine.roundtrip.verbalize import Verbalizer
from nla_engine.sites import RESID_POST, Site
from nla_engine.store import CaptureStore

#: GPU memory that AV and AR need beside their weights: slots, activations, graphs.
_WORKING_BYTES = 12 << 30
_HOST = torch.device("cpu")


@dataclass
class Pair:
    """The models: None for one that is not needed. in_turns: only one of the two is on `device` at a time. ranks: the
    group that shares the weights of both."""

    verbalizer: Verbalizer | None
    reconstructor: Reconstructor | None
    device: torch.device
    in_turns: bool = False
    ranks: Ranks | None = None

    @property
    def av(self) -> Verbalizer:
        """The AV, where there is one."""
        assert self.verbalizer is not None
        return self.verbalizer

    @property
    def ar(self) -> Reconstructor:
        """The AR, where there is one."""
        assert self.reconstructor is not None
        return self.reconstructor

    def describe(self) -> dict[str, Any]:
        """What a result records of the models."""
        models: dict[str, Any] = {}
        if (av := self.verbalizer) is not None:
            models = {"av": av.lm.name, "av_revision": av.lm.revision, **av.injection.to_dict()}
            models |= _about("av", av)
        if (ar := self.reconstructor) is not None:
            models |= {"ar": ar.lm.name, "ar_revision": ar.lm.revision}
            models |= _about("ar", ar)
        return models

    def verbalize_next(self) -> None:
        """Bring the AV to the device."""
        if self.in_turns:
            self.ar.move(_HOST)
            self.av.move(self.device)

    def reconstruct_next(self) -> None:
        """Bring the AR to the device."""
        if self.in_turns:
            self.av.move(_HOST)
            self.ar.move(self.device)

    def close(self) -> None:
        """Undo what the engine changed in the models."""
        if self.reconstructor is not None:
            self.reconstructor.close()


def _about(role: str, model: Verbalizer | Reconstructor) -> dict[str, Any]:
    """Its base and adapter, its maps, and from which position on it was trained, where that is known."""
    told = {**model.lm.origin, **model.maps.checksums()}
    if model.sidecar.min_position is not None:
        told["min_position"] = model.sidecar.min_position
    return {f"{role}_{key}": value for key, value in told.items()}


def compute_with(
    options: StageTwoOptions | AskOptions, announce: Callable[[str], None]
) -> tuple[torch.device, torch.dtype, Kernels]:
    """What models are run on and with. Announces what is missing. RequestError if it cannot be had."""
    device = pick_device(first_device(options.device, getattr(options, "tensor_parallel", 1)))
    dtype = pick_dtype(options.dtype, device)
    if options.precision == "fp8":
        check_fp8(device)
    for line in shortfall(device):
        announce(line)
    return device, dtype, Kernels(options.kernels, options.precision)


def announce_unfused(
    lm: LanguageModel, kernels: Kernels, device: torch.device, announce: Callable[[str], None]
) -> None:
    """Say why the blocks of a model are not fused, and its steps no graph, if they could be asked to."""
    if not kernels.plain(device):
        for reason in filter(None, (why_unfused(lm.blocks), why_no_graph(lm.blocks))):
            announce(f"{lm.name}: {reason}")


def load_pair(
    options: StageTwoOptions,
    announce: Callable[[str], None],
    verbalizer: Verbalizer | None = None,
    reconstructor: Reconstructor | None = None,
    layer: int | None = None,
    opened: ExitStack | None = None,
) -> Pair:
    """The models that the options name, or the given ones, on the device unless they take turns.

    layer: of the vectors, where something else than --layer tells it
    opened: what ends the processes of --tensor-parallel
    """
    if options.tensor_parallel > 1 and (opened is None or verbalizer or reconstructor):
        raise RequestError(
            "--tensor-parallel is for the models of a command, which are loaded by it: leave it out"
        )
    device, dtype, kernels = compute_with(options, announce)
    remote_code = options.trust_remote_code
    said, wording = Given(values=options.template_value, whitening=options.whitening), Wording()
    of_av = of_ar = said
    if isinstance(options, WritingOptions):
        of_av = replace(
            said,
            scale=options.injection_scale,
            injection=options.injection,
            norm_match=options.norm_match,
            map=options.av_map,
            slots=1 if options.slots is None else options.slots.count("L"),
            prompt=options.prompt is not None,
        )
        wording = Wording(options.prompt, options.system, options.template_option or {}, options.prefill)
    if isinstance(options, ScoringOptions):
        of_ar = replace(said, map=options.ar_map)
    if (of_av, of_ar, wording) != (Given(), Given(), Wording()) and (verbalizer or reconstructor):
        raise RequestError(
            "injection, prompt, template values, maps and whitening are for models that are loaded here"
        )
    for model in (verbalizer, reconstructor):
        if model is not None and model.kernels != kernels:
            raise RequestError(f"a given model was loaded with {model.kernels}, the options say {kernels}")
    av = options.av if isinstance(options, WritingOptions) else None
    ar = options.ar if isinstance(options, ScoringOptions) else None
    av_base = options.av_base if isinstance(options, WritingOptions) else None
    ar_base = options.ar_base if isinstance(options, ScoringOptions) else None
    given = ((av, av_base, "--av-base", verbalizer), (ar, ar_base, "--ar-base", reconstructor))
    av_source, ar_source = (
        find_source(name, base=base, flag=flag, remote_code=remote_code)
        if name is not None and model is None
        else None
        for name, base, flag, model in given
    )
    ranks = None
    if options.tensor_parallel > 1 and opened is not None:
        ranks = _group(options, (av_source, ar_source), device, dtype, opened)
    directories = [source.weights for source in (av_source, ar_source) if source is not None]
    residency = options.residency if isinstance(options, RoundtripOptions) else "both"
    turns = residency == "turns"
    if residency == "auto" and ranks is None and device.type == "cuda" and len(directories) == 2:
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
        "ranks": ranks,
    }
    layer = options.layer if layer is None else layer
    if av is not None:
        said = replace(of_av, layer=layer)
        verbalizer = verbalizer or Verbalizer.load(av, source=av_source, given=said, wording=wording, **how)
        layer = verbalizer.sidecar.layer if layer is None else layer
    if ar is not None:
        said = replace(of_ar, layer=layer)
        reconstructor = reconstructor or Reconstructor.load(ar, source=ar_source, given=said, **how)
    for model in (verbalizer, reconstructor):
        if model is not None:
            announce_unfused(model.lm, kernels, device, announce)
    for model in (verbalizer, reconstructor):
        ranks = ranks if model is None else model.lm.ranks
    return Pair(verbalizer, reconstructor, device, turns, ranks)


def _group(
    options: StageTwoOptions,
    sources: tuple[Source | None, Source | None],
    device: torch.device,
    dtype: torch.dtype,
    opened: ExitStack,
) -> Ranks:
    """The processes of --tensor-parallel. RequestError if AV and AR cannot be split so, or do not fit there together.

    sources: of the AV and the AR
    """
    devices, remote_code = (
        group_devices(device, options.tensor_parallel, options.device),
        options.trust_remote_code,
    )
    needed = sum(
        check_split(source, len(devices), dtype, headless=headless, remote_code=remote_code)[1]
        for source, headless in zip(sources, (False, True), strict=True)
        if source is not None
    )
    ranks = opened.enter_context(open_ranks(devices))
    assert ranks is not None
    if device.type == "cuda" and None not in sources:
        free = min(ranks.together(free_each, ranks))
        if needed + _WORKING_BYTES > free:
            raise RequestError(
                f"AV and AR do not fit {len(devices)} GPUs together: {needed / 2**30:.0f} GiB of weights and "
                f"{_WORKING_BYTES >> 30} GiB to work in on each, {free / 2**30:.0f} GiB free: give more GPUs with "
                "--tensor-parallel, or run explain, then score"
            )
    return ranks


def _weight_bytes(directory: Path, dtype: torch.dtype) -> int:
    """Bytes of a checkpoint's weights in this dtype; on disk they have 16 bits unless the config says float32.

    0 where config or index cannot be read: loading the checkpoint says what is wrong.
    """
    try:
        config = read_json(directory / CONFIG)
        files = [*weight_paths(directory, config), directory / VALUE_HEAD]
    except CheckpointError:
        return 0
    stored = sum(file.stat().st_size for file in files if file.is_file())
    wide = (config.get("dtype") or config.get("torch_dtype")) == "float32"
    return stored * dtype.itemsize // (4 if wide else 2)


def choose_layer(store: CaptureStore, options: StageTwoOptions, pair: Pair) -> Site:
    """The layer to read, or its site that the options name, checked against the store and the models."""
    av = (f"--av {options.av}", pair.av.sidecar) if isinstance(options, WritingOptions) else None
    ar = (f"--ar {options.ar}", pair.ar.sidecar) if isinstance(options, ScoringOptions) else None
    both = "AV and AR" if av and ar else "AV" if av else "AR"
    were = f"{both} {'were' if av and ar else 'was'}"
    for name, sidecar in filter(None, (av, ar)):
        if sidecar.d_model != store.d_model:
            raise RequestError(
                f"{name} is made for vectors of width {sidecar.d_model}, {options.store} holds {store.d_model}: "
                f"give the {both} of the captured model"
            )
    trained = pair.ar.layer if ar else None
    if av:
        reads = av[1].layer
        if ar and reads is not None and reads != trained:
            raise RequestError(
                f"{av[0]} reads layer {reads}, {ar[0]} gives layer {trained}: they are no pair"
            )
        trained = reads if trained is None else trained
    layer = options.layer if options.layer is not None else trained
    if layer is None:
        raise RequestError(f"{av and av[0]} does not say which layer it reads: give --layer")
    if trained is not None and layer != trained:
        raise RequestError(f"--layer {layer}: this {were} made for layer {trained}; leave --layer out")
    site = Site.at(layer, options.site)
    if site not in store.sites:
        held = ", ".join(map(str, store.sites))
        if trained is None or site.part != RESID_POST:
            raise RequestError(f"--layer {site}: {options.store} holds layer {held}")
        others = [each.part for each in store.sites if each.layer == layer]
        mend = f" (or pass --site {others[0]} to read another site all the same)" if others else ""
        raise RequestError(
            f"{options.store} holds layer {held}, the {were} made for layer {layer}: capture that one{mend}"
        )
    return site
