"""What transformers' own modules compute for a short sample, block by block: the truth for the engine's self-check.

Every block runs by itself, in the model's dtype and in float32, so that its rounding is known. The lanes of the sample
read real text. In some lanes a block's input is scaled down until the epsilon of a norm matters, which it rarely does
in text.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from nla_engine.engine.families import can_fuse_norm
from nla_engine.errors import UnsupportedModel
from nla_engine.models.decoder import block_output
from nla_engine.models.implementation import attend_by
from nla_engine.models.load import LanguageModel
from nla_engine.models.places import Place
from nla_engine.sites import EMBEDDINGS, RESID_POST, Site

#: What the lanes read, cut to LENGTH tokens. The first two begin alike, so they can share a prefix.
TEXTS = (
    "In the spring of 1846 the harbour froze twice, and the ships that had wintered there could not leave before May.",
    "In the spring of 1846 the harbour was quiet; a list of stores names 37 barrels of rye, 482 of salt and no wine.",
    "def mean(values):\n    total = 0.0\n    for value in values:\n        total += value\n    return total\n",
    "Question: what is 482 times 37? Multiply 482 by 30, which is 14460, then 482 by 7, which is 3374, and add them.",
)
#: Root mean square of a block's input in each lane; None: not scaled. Below a norm's epsilon (1e-5 or 1e-6, of the mean
#: square) the norm is linear, so its output is small too and the next norm meets its own epsilon.
SCALES = (None, None, 0.05, 3e-3, 5e-4, 1e-5)
#: Tokens per lane.
LENGTH = 16
#: Tokens that the first two lanes share.
PREFIX = 4


@dataclass(frozen=True)
class Sample:
    """What transformers computes for the sample: L lanes of T tokens. Lists have one entry per part, see `parts_of`.

    ids: int64 [L, T]. embedded: input of the first block, [L, T, d], the model's dtype. inputs: what each part reads:
    its input in the model, rescaled in some lanes. wide: its output for that input in float32, [L, T, d]. size: what
    errors are relative to, [L, T]: the L2 norm of the input or of what the part adds to it, whichever is larger. noise:
    transformers' own error in the model's dtype, relative to `size`, [L, T]; 0 for a float32 model. sites: those inside
    blocks, which follow the parts in wide, size and noise.
    """

    ids: torch.Tensor
    embedded: torch.Tensor
    inputs: list[torch.Tensor] = field(default_factory=list)
    wide: list[torch.Tensor] = field(default_factory=list)
    size: list[torch.Tensor] = field(default_factory=list)
    noise: list[torch.Tensor] = field(default_factory=list)
    sites: list[Site] = field(default_factory=list)

    def judge_by(
        self, read: torch.Tensor, own: torch.Tensor, wide: torch.Tensor, change: torch.Tensor
    ) -> None:
        """Add what is expected for input `read`: `own` in the model's dtype, `wide` and `change` in float32."""
        size = torch.maximum(change.norm(dim=-1), read.float().norm(dim=-1))
        self.wide.append(wide)
        self.size.append(size)
        self.noise.append((own - wide).norm(dim=-1) / size)

    def number(self, site: Site) -> int:
        """Where a site stands in wide, size and noise."""
        return len(self.inputs) + self.sites.index(site)


def parts_of(lm: LanguageModel) -> list[nn.Module]:
    """The blocks, and the norm after the last one if the engine computes it itself."""
    norm = getattr(lm.decoder, "norm", None)
    return [*lm.blocks, *([norm] if can_fuse_norm(norm) else [])]


@torch.inference_mode()
def take_sample(lm: LanguageModel, places: Mapping[Site, Place]) -> Sample:
    """Run transformers' own modules, before the engine takes them over. Needs room for one block in float32.

    places: of the sites that will be tapped
    """
    attend_by(lm.model, "eager")
    ids = sample_ids(lm)
    calls = _library_calls(lm, ids)
    sample = Sample(ids, calls[0][0])
    inside = {site: place for site, place in places.items() if site.part not in (RESID_POST, EMBEDDINGS)}
    shown: dict[Site, list[torch.Tensor]] = {site: [] for site in inside}
    twins: Twins = {}
    with ExitStack() as hooks:
        for site, place in inside.items():
            hooks.callback(place.watch(_keeper(shown[site], ids)).remove)
        for part, (hidden, args, kwargs) in zip(parts_of(lm), calls, strict=True):
            read = _rescaled(hidden)
            own = block_output(part(read, *args, **kwargs))
            wide = (
                own
                if own.dtype == torch.float32
                else block_output(_in_float32(part, (read, *args), kwargs, twins))
            )
            sample.inputs.append(read)
            sample.judge_by(read, own, wide, wide - read.float())
    for site, states in shown.items():  # in the model's dtype, then in float32
        sample.sites.append(site)
        wide = states[-1].float()
        sample.judge_by(sample.inputs[site.layer], states[0], wide, wide)
    return sample


def _keeper(states: list[torch.Tensor], ids: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """Appends copies, [L, T, d] for ids [L, T]."""
    return lambda hidden: states.append(hidden.reshape(*ids.shape, -1).clone())


def sample_ids(lm: LanguageModel) -> torch.Tensor:
    """TEXTS by the model's tokenizer, after its BOS if it has one: int64 [L, T]."""
    start = [] if lm.tokenizer.bos_token_id is None else [lm.tokenizer.bos_token_id]
    length = min(LENGTH, lm.max_length)
    lanes = []
    for lane in range(len(SCALES)):
        text = TEXTS[lane % len(TEXTS)]
        ids = [*start, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]]
        ids = [i for i in ids if i < lm.vocab_size]
        given = lm.embedding(torch.tensor(ids, dtype=torch.int64, device=lm.device)).isfinite().all(-1)
        ids = [i for i, finite in zip(ids, given.tolist(), strict=True) if finite] or [0]
        lanes.append((ids * length)[:length])
    return torch.tensor(lanes, device=lm.device)


def _rescaled(hidden: torch.Tensor) -> torch.Tensor:
    """The lanes [L, T, d], scaled to the root mean squares in SCALES."""
    lanes = []
    for lane, scale in zip(hidden, SCALES, strict=True):
        rms = lane.float().square().mean(-1, keepdim=True).sqrt()
        lanes.append(lane if scale is None else (lane * (scale / rms)).to(lane.dtype))
    return torch.stack(lanes)


#: A block's input, and its other arguments.
Call = tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]


def _library_calls(lm: LanguageModel, ids: torch.Tensor) -> list[Call]:
    """How transformers calls each part when it reads ids [L, T]."""
    parts, calls = parts_of(lm), list[tuple[int, Call]]()

    def recorder(number: int) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls.append((number, split_call(args, kwargs)))

        return record

    hooks = [
        part.register_forward_pre_hook(recorder(number), with_kwargs=True)
        for number, part in enumerate(parts)
    ]
    try:
        lm.decoder(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    if [number for number, _ in calls] != list(range(len(parts))):
        raise UnsupportedModel(
            f"{lm.name}: its blocks do not run once each, in order: this architecture is not supported"
        )
    return [call for _, call in calls]


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """The hidden states of a block's call, and its other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {k: v for k, v in kwargs.items() if k != "hidden_states"}


#: By the id of a mapping among the arguments of blocks, its twin in float32. There is one for all blocks: a block may
#: leave keys and values in the mapping that a later block reads.
Twins = dict[int, Any]


def _in_float32(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], twins: Twins) -> Any:
    """part(*args, **kwargs) with weights and arguments in float32."""
    named = [*part.named_parameters(), *part.named_buffers()]
    weights = {name: _to_float32(value, twins) for name, value in named}
    return functional_call(part, weights, _to_float32(args, twins), _to_float32(kwargs, twins))


def _to_float32(value: Any, twins: Twins) -> Any:
    """A nested argument with every floating-point tensor in float32."""
    if isinstance(value, torch.Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_to_float32(each, twins) for each in value)
    if isinstance(value, dict | UserDict):
        if id(value) not in twins:
            twins[id(value)] = twin = copy(value)
            for key, each in value.items():
                twin[key] = _to_float32(each, twins)
        return twins[id(value)]
    return value
