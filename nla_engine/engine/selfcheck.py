"""Checks that the engine computes what transformers computes, for the given model, before anything is captured.

Every block reads what transformers' own block read. So errors do not add up from block to block, and a model whose last
states depend on rounding is judged as fairly as any other. The limit is the noise of the arithmetic: the engine may not
be much further from the block in float32 than transformers is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from nla_engine.engine.attention import Pass, current_pass
from nla_engine.engine.expected import PREFIX, Sample, parts_of, split_call, take_sample
from nla_engine.engine.families import softcap_of
from nla_engine.engine.graph import DecodeGraph
from nla_engine.engine.slots import SlotCache
from nla_engine.engine.windows import largest_window, masks_of_the_library
from nla_engine.errors import EngineError, UnsupportedModel
from nla_engine.models.decoder import block_output
from nla_engine.models.load import LanguageModel
from nla_engine.models.places import Place
from nla_engine.ops.attention import Shape
from nla_engine.sites import MLP_OUT, Site

#: The engine's error of many tokens (relative L2, see `Sample.size`) may be this many times transformers' own, that of
#: one token twice as many times ...
RATIO = 2.0
#: ... plus this much, for sums in another order.
FLOOR = {torch.float32: 3e-4, torch.bfloat16: 4e-3, torch.float16: 5e-4}
#: The same in fp8. e4m3 rounds a factor by 2.6% (root mean square), so a product by 3.7%. A block has three products in
#: a row, and rows with a few massive channels lose most of the other channels. Unrelated states are 1.4 apart.
FLOOR_FP8 = 0.7
#: Tokens per lane that are read one by one.
DECODED = 3
#: Longest text for which transformers' masks, [length, length], are checked.
LONGEST_MASK = 16_384
#: Stands for the error of a state that is not finite; its square is finite.
_INFINITE = 1e18


class Engine(Protocol):
    """What the check needs of the runner."""

    lm: LanguageModel
    cache: SlotCache
    reference: bool
    seen_site: Callable[[Site, torch.Tensor], None] | None

    @property
    def graphable(self) -> bool: ...

    def prefill(
        self, parts: Sequence[tuple[int, int, Sequence[int]]], wanted: Sequence[int] | None = None
    ) -> torch.Tensor: ...

    def decode(
        self, ids: torch.Tensor, slot: torch.Tensor, position: torch.Tensor, longest: int
    ) -> torch.Tensor: ...


class SelfCheck:
    """Created before the engine takes over the model, and run after that. length: of the run's longest sequence.

    places: where transformers' own modules show the sites that will be tapped
    """

    def __init__(self, engine: Engine, length: int, places: Mapping[Site, Place]) -> None:
        self.engine, self.lm, self.length = engine, engine.lm, length
        self.sample = take_sample(self.lm, places)
        self._shapes: list[Shape] = []
        self._routed = {
            number
            for number, block in enumerate(self.lm.blocks)
            if any("expert" in name or "router" in name for name, _ in block.named_modules())
        }
        sites = [site for site in self.sample.sites if site.part == MLP_OUT and site.layer in self._routed]
        self._routed.update(map(self.sample.number, sites))

    @torch.inference_mode()
    def note_shapes(self) -> None:
        """Record how transformers' own modules ask to attend. EngineError if their windows differ from its masks."""
        self._shapes = self._attended()
        cap = softcap_of(self.lm.config)
        several = len(self._shapes) // len(self.lm.blocks)  # attentions of a block
        for layer, shape in enumerate(self._shapes):
            block = layer // several
            if shape.softcap != cap:
                raise UnsupportedModel(
                    f"{self.lm.name}: block {block} asks the engine for a soft cap of {shape.softcap}, and its "
                    f"configuration names {cap}: this architecture is not supported"
                )
        length = min(self.length, largest_window(self.lm, self._shapes) + 3)
        if not 3 < length <= LONGEST_MASK:
            return
        at = torch.arange(length, device=self.lm.device)
        masks = masks_of_the_library(self.lm, length)
        for layer, shape in enumerate(self._shapes):
            block = layer // several
            seen, own = masks[block], at >= shape.first(length - 1)
            if seen is not None and not torch.equal(seen, own):
                raise UnsupportedModel(
                    f"{self.lm.name}: block {block} attends to {int(seen.sum())} of {length} tokens, and asks the "
                    f"engine for {int(own.sum())}: this architecture is not supported"
                )

    def asked(self, layer: int) -> Shape:
        """How transformers' own module of a layer asked to attend, once `note_shapes` has called it."""
        return self._shapes[layer]

    @torch.inference_mode()
    def run(self, fp8: bool = False) -> None:
        """EngineError if a part of the engine attends differently, or is further off than rounding explains."""
        for block, (own, asked) in enumerate(zip(self._attended(), self._shapes, strict=True)):
            if own != asked:
                raise self._refusal(fp8)(
                    f"{self.lm.name}: block {block} of the engine attends with {own}, transformers' own with {asked}: "
                    + self._mend(fp8)
                )
        floor = FLOOR_FP8 if fp8 else FLOOR[self.lm.dtype]
        for name, seen in self._passes():
            self._check_embedding(name, seen, fp8)
            finding = judge(self.sample, seen, floor, self._routed)
            if not finding.error <= finding.limit:
                raise self._refusal(fp8)(
                    f"{self.lm.name}: {self._name(finding.part)} of the engine differs from transformers' own "
                    f"by {finding.error:.2g} {name} (limit {finding.limit:.2g}; rounding alone makes "
                    f"{finding.noise:.2g}): {self._mend(fp8)}"
                )

    def _name(self, part: int) -> str:
        if part >= len(self.sample.inputs):
            return self.sample.sites[part - len(self.sample.inputs)].label
        return "the last norm" if part == len(self.lm.blocks) else f"block {part}"

    def _refusal(self, fp8: bool) -> type[EngineError]:
        """Of the architecture, where transformers' own blocks ran; else of the engine's blocks."""
        return UnsupportedModel if self.engine.reference and not fp8 else EngineError

    def _mend(self, fp8: bool) -> str:
        if fp8:
            return "this model is not supported in fp8, pass --precision full"
        if self.engine.reference:
            return "this architecture is not supported"
        return (
            "its rows would be wrong; pass --kernels reference for transformers' own blocks, and report this"
        )

    def _check_embedding(self, name: str, seen: list[Seen], fp8: bool) -> None:
        first = seen[0]
        expected = self.sample.embedded[first.slot, first.position].float()
        finite = torch.isfinite(expected).all(-1, keepdim=True)
        apart = torch.where(finite, first.arrived.float() - expected, 0.0)
        error = float(apart.norm() / torch.where(finite, expected, 0.0).norm().clamp(min=1e-30))
        if not error <= FLOOR[self.lm.dtype]:
            raise self._refusal(fp8)(
                f"{self.lm.name}: block 0 reads what differs from transformers' own by {error:.2g} {name}: "
                + self._mend(fp8)
            )

    @contextmanager
    def _watched(self) -> Iterator[Watch]:
        """Inside, the blocks read the sample, and what they and the sites give is kept."""

        def seen_site(site: Site, states: torch.Tensor) -> None:
            if (
                site in self.sample.sites
            ):  # a block's output and input are seen as such; other states may change later
                states, place = states.clone(), _places(watch.work, len(states))
                watch.seen.append(Seen(self.sample.number(site), states, states, *place))

        with given_inputs(self.lm, self.sample) as watch:
            self.engine.seen_site = seen_site
            try:
                yield watch
            finally:
                self.engine.seen_site = None

    @contextmanager
    def _cache(self, slots: int, prefix: int = 0) -> Iterator[SlotCache]:
        """Replace the run's cache by one for the sample."""
        kept, cache = self.engine.cache, SlotCache(self.lm, slots, self.sample.ids.shape[1], prefix)
        cache.length = self.length  # windows are checked for the run's length
        self.engine.cache = cache
        try:
            yield cache
        finally:
            self.engine.cache = kept

    def _attended(self) -> list[Shape]:
        """How every block attends now."""
        with self._cache(1) as cache, self._watched() as watch:
            self.engine.prefill([(0, 0, self.sample.ids[0, :1].tolist())])
        return [watch.work.shapes[layer] for layer in range(cache.layers)]

    def _passes(self) -> Iterator[tuple[str, list[Seen]]]:
        """Every way in which a run reads tokens: its name, and what the parts computed."""
        ids = self.sample.ids.tolist()
        lanes, length = len(ids), len(ids[0])
        decoded = min(DECODED, length - 1)
        ragged = range(lanes) if length > 3 * DECODED else [0] * lanes
        ends = [length - decoded - lane % 3 for lane in ragged]
        starts = [end // 2 for end in ends]
        with self._cache(lanes) as cache, self._watched() as watch:
            if all(starts):
                self.engine.prefill([(lane, 0, ids[lane][: starts[lane]]) for lane in reversed(range(lanes))])
                yield "in a prompt", watch.take()
            parts = [(lane, starts[lane], ids[lane][starts[lane] : ends[lane]]) for lane in range(lanes)]
            last = [sum(len(part[2]) for part in parts[: lane + 1]) - 1 for lane in range(lanes)]
            self.engine.prefill(parts, last)
            yield "in the second part of a prompt", watch.take()
            for step in range(decoded):
                decode = self._decoder([end + step for end in ends])
                if step == decoded - 1 and self.engine.graphable:
                    yield "in a graph", self._in_a_graph(decode, cache, watch)
                else:
                    decode(torch.arange(lanes, device=self.lm.device))
                    yield "in a decode step", watch.take()
        if length > PREFIX + 1 and ids[0][:PREFIX] == ids[1][:PREFIX]:
            with self._cache(2, PREFIX) as cache, self._watched() as watch:
                self.engine.prefill([(0, 0, ids[0][:PREFIX])])
                cache.keep_as_prefix(0, PREFIX)
                watch.take()
                self.engine.prefill([(lane, PREFIX, ids[lane][PREFIX:-1]) for lane in (1, 0)])
                yield "after a shared prefix", watch.take()
                self._decoder([length - 1] * 2)(torch.arange(2, device=self.lm.device))
                yield "in a decode step after a shared prefix", watch.take()

    def _decoder(self, positions: list[int]) -> Callable[[torch.Tensor], None]:
        """A decode step of lanes (int64 [B], slots) that are at these positions; the spare slot is at position 0."""
        lanes = len(positions)
        position = torch.tensor([*positions, 0], device=self.lm.device)
        token = self.sample.ids[torch.arange(lanes + 1, device=self.lm.device).clamp(max=lanes - 1), position]
        length = self.sample.ids.shape[1]

        def step(slots: torch.Tensor) -> None:
            self.engine.decode(token[slots], slots, position[slots], length)

        return step

    def _in_a_graph(
        self, decode: Callable[[torch.Tensor], None], cache: SlotCache, watch: Watch
    ) -> list[Seen]:
        def step(slots: torch.Tensor) -> None:
            watch.take()  # drops the steps before: the graph holds the last one
            decode(slots)

        pool = torch.cuda.graph_pool_handle()
        graph = DecodeGraph(step, cache.slots, cache.spare, self.lm.device, pool)
        graph.run(list(range(cache.slots)), 1)
        seen = watch.take()
        torch.cuda.current_stream(self.lm.device).synchronize()
        return [each.clone() for each in seen]  # the graph's memory is freed with it


@dataclass(frozen=True)
class Seen:
    """What a part of the engine read and returned in a pass. arrived, states: [n, d]; slot, position: int64 [n]."""

    part: int
    arrived: torch.Tensor
    states: torch.Tensor
    slot: torch.Tensor
    position: torch.Tensor

    def clone(self) -> Seen:
        return Seen(
            self.part, self.arrived.clone(), self.states.clone(), self.slot.clone(), self.position.clone()
        )


class Watch:
    """What has been seen since the last `take`, by part and then by site, and the last pass."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self.work: Any = None

    def take(self) -> list[Seen]:
        seen, self.seen = sorted(self.seen, key=lambda each: each.part), []
        return seen


@contextmanager
def given_inputs(lm: LanguageModel, sample: Sample) -> Iterator[Watch]:
    """Inside, slot i of a pass is lane i. Every part reads the sample's input, and its output is kept."""
    watch, last_lane = Watch(), len(sample.ids) - 1
    own = (lambda states: states) if lm.ranks is None else lm.ranks.own

    def hook(number: int, part: nn.Module) -> tuple[Any, Any]:
        arrived: list[torch.Tensor] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            watch.work = current_pass()
            hidden, args, kwargs = split_call(args, kwargs)
            arrived[:] = [own(hidden[0])]
            slot, position = _places(watch.work, hidden.shape[1])
            # A graph is captured on the spare slot, which is not a lane.
            return (sample.inputs[number][slot.clamp(max=last_lane), position][None], *args), kwargs

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            states = own(block_output(output)[0])
            watch.seen.append(Seen(number, arrived[0], states, *_places(watch.work, len(states))))

        return part.register_forward_pre_hook(before, with_kwargs=True), part.register_forward_hook(after)

    handles = [handle for number, part in enumerate(parts_of(lm)) for handle in hook(number, part)]
    try:
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _places(work: Pass, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and positions of the tokens of a pass, or of the wanted ones if a block returned only these."""
    if work.wanted is not None and count != len(work.slot):
        return work.slot[work.wanted.token], work.position[work.wanted.token]
    return work.slot, work.position


@dataclass(frozen=True)
class Finding:
    """The worst lane of a pass: its part, and the engine's error, its limit and the noise, as relative L2 norms."""

    part: int
    error: float
    limit: float
    noise: float


def judge(sample: Sample, seen: list[Seen], floor: float, routed: set[int]) -> Finding:
    """The finding with the largest share of its limit. Synchronises once for all parts of a pass.

    The error allowed for n tokens of a lane follows from the noise of its n noisiest tokens, times RATIO (1 + 1 / n):
    the rounding of one token is a matter of luck, that of many is not. A few tokens of a real model are ten times as
    noisy as the others, and which ones they are differs from one order of sums to the next. In `routed` parts rounding
    may send a token to other experts, so only one token is judged there: the one with the median share of its limit.
    """
    found = torch.stack(
        [_medians(sample, each, floor) if each.part in routed else _by_lane(sample, each) for each in seen]
    )
    findings = []
    for each, (errors, noises, counts) in zip(seen, found.double().tolist(), strict=True):
        for error, noise, count in zip(errors, noises, counts, strict=True):
            if count:
                error = math.inf if error > _INFINITE / 1e6 else error
                limit = RATIO * (1 + 1 / count) * noise + floor
                findings.append(Finding(each.part, error, limit, noise))
    if not findings:
        raise EngineError(
            "transformers' own states of a short text are not finite, so this model cannot be checked"
        )
    return max(findings, key=lambda finding: finding.error / finding.limit)


def _errors(sample: Sample, seen: Seen) -> torch.Tensor:
    """Errors relative to `Sample.size`, [n]."""
    at = (seen.slot, seen.position)
    apart = (seen.states.float() - sample.wide[seen.part][at]).norm(dim=-1) / sample.size[seen.part][at]
    return apart.nan_to_num(_INFINITE, posinf=_INFINITE)


def _by_lane(sample: Sample, seen: Seen) -> torch.Tensor:
    """Root mean squares of error and noise per lane, and the number of tokens: [3, L]."""
    noise = sample.noise[seen.part]
    finite = torch.isfinite(noise)  # a model may overflow in its own dtype: such a token cannot be checked
    mine = (seen.slot[:, None] == torch.arange(len(noise), device=noise.device)) & finite[
        seen.slot, seen.position
    ][:, None]
    count = mine.sum(0)
    last = (count - 1).clamp(min=0)
    noisiest = torch.where(finite, noise, 0.0).square().sort(1, descending=True).values.cumsum(1)
    allowed = noisiest.gather(1, last[:, None])[:, 0] / (last + 1)
    squares = _errors(sample, seen).square() @ mine.float() / (last + 1)
    return torch.stack([squares.sqrt(), allowed.sqrt(), count.float()])


def _medians(sample: Sample, seen: Seen, floor: float) -> torch.Tensor:
    """The same for the token with the median share of its limit, as one lane; the other lanes have no tokens.

    A token that rounding sends to other experts in transformers too may be as far off as it is there.
    """
    noise = sample.noise[seen.part]
    own, error = noise[seen.slot, seen.position], _errors(sample, seen)
    finite = torch.isfinite(own)
    allowed = torch.where(finite, torch.maximum(own, noise.nanmedian().nan_to_num(0.0)), 0.0)
    share = torch.where(finite, error / (RATIO * allowed + floor), torch.nan)
    middle = share.nanmedian(0).indices
    out = torch.zeros((3, len(noise)), device=noise.device)
    out[0, 0], out[1, 0], out[2, 0] = error[middle], allowed[middle], finite.sum()
    return out
