"""Where transformers' own modules show each site: which tensor of which module, found by arithmetic and not by name.

A block may add what its attention gives, or that after a norm or a dropout; modules are called differently by every
family. So a short text is read, and what the modules of a block gave must add up to what it returned, bit by bit:

    in sequence   middle = input + attention, output = middle + MLP;  middle is what a later module reads
    in parallel   output = input + attention + MLP, in some order;    there is no middle

A block that adds up in neither way (it scales what it adds, say) has no known sites but its output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nla_engine.errors import RequestError
from nla_engine.models.decoder import block_output
from nla_engine.models.implementation import attend_by
from nla_engine.models.load import LanguageModel
from nla_engine.sites import ATTN_OUT, EMBEDDINGS, MLP_OUT, RESID_MID, RESID_POST, Site

#: Tokens that are read to find the sites.
_TOKENS = 12
#: Takes hidden states [1, T, d].
Take = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Place:
    """What a module reads, or what it gives."""

    module: nn.Module
    reads: bool = False

    def watch(self, take: Take) -> Any:
        """Call `take` whenever the module runs. Returns the handle of the hook."""
        if self.reads:

            def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                take(hidden_input(args, kwargs))

            return self.module.register_forward_pre_hook(before, with_kwargs=True)
        return self.module.register_forward_hook(lambda _m, _i, output: take(block_output(output)))


def hidden_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among what a module was called with."""
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def find_places(lm: LanguageModel, sites: Iterable[Site]) -> dict[Site, Place]:
    """The place of each site. RequestError, by name, if a block has no such site.

    Runs the decoder with transformers' eager attention. No Runner may be open.
    """
    sites = tuple(sites)
    simple = {RESID_POST: False, EMBEDDINGS: True}
    inside = sorted({site.layer for site in sites if site.part not in simple})
    found = _inside(lm, inside) if inside else {}
    for site in sites:
        if site.part in simple:
            found[site] = Place(lm.blocks[site.layer], reads=simple[site.part])
        elif site not in found:
            raise RequestError(f"{lm.name}: {_why_not(site, found)}: leave {site.part} out of --sites")
    return {site: found[site] for site in sites}


def _why_not(site: Site, found: dict[Site, Place]) -> str:
    block = f"block {site.layer}"
    if Site(site.layer, ATTN_OUT) in found:
        return f"{block} computes attention and MLP in parallel, so it has no residual stream between them"
    return (
        f"{block} does not return the sum of its input, its attention's output and its MLP's, "
        f"so its {site.part} is not known"
    )


@dataclass
class _Ran:
    """What one module of a block read and gave: [T, d] each, or None where that is no hidden state. times: it ran."""

    name: str
    module: nn.Module
    read: torch.Tensor | None = None
    gave: torch.Tensor | None = None
    times: int = 0


@torch.inference_mode()
def _inside(lm: LanguageModel, layers: list[int]) -> dict[Site, Place]:
    """The sites inside these blocks, as far as they are there."""
    attend_by(lm.model, "eager")
    cut = lm.truncated(layers[-1])
    watches = {layer: _Watch(lm.blocks[layer]) for layer in layers}
    ids = torch.arange(min(_TOKENS, lm.max_length), device=lm.device) * 7 % lm.vocab_size
    try:
        cut.decoder(input_ids=ids[None], **lm.uncached)
    finally:
        for watch in watches.values():
            watch.remove()
    return {
        Site(layer, part): place for layer, watch in watches.items() for part, place in watch.places().items()
    }


class _Watch:
    """Keeps what a block and its modules read and give. A module may change its input later, so these are copies."""

    def __init__(self, block: nn.Module) -> None:
        self.block = _Ran("block", block)
        self.parts = [_Ran(name, module) for name, module in block.named_children()]
        self.order: list[_Ran] = []
        self._handles = [handle for ran in (self.block, *self.parts) for handle in self._keep(ran)]

    def _keep(self, ran: _Ran) -> tuple[Any, Any]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            ran.read = _copy(given)
            ran.times += 1
            self.order.append(ran)

        def after(_module: nn.Module, _inputs: object, output: Any) -> None:
            ran.gave = _copy(output[0] if isinstance(output, tuple) else output)

        return ran.module.register_forward_pre_hook(
            before, with_kwargs=True
        ), ran.module.register_forward_hook(after)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def places(self) -> dict[str, Place]:
        """Of each part that this block has. Empty if it does not add up, or if it does so in several ways."""
        x, out = self.block.read, self.block.gave
        if x is None or out is None or self.block.times != 1:
            return {}
        once = [ran for ran in self.order if ran.times == 1 and ran is not self.block]
        giving = [ran for ran in once if _gives(ran, x)]
        ways: list[tuple[_Ran, _Ran, _Ran | None]] = []
        for number, first in enumerate(giving):
            for second in giving[number + 1 :]:
                if middle := self._between(x, first, once):
                    if _same(_sum(middle.read, second.gave), out):
                        ways.append((first, second, middle))
                elif any(_same(total, out) for total in _parallel_sums(x, first, second)):
                    ways.append((first, second, None))
        if not ways or any(not _alike(way, ways[0]) for way in ways):
            return {}
        attention, mlp, between = ways[0]
        if between is None and not _attends(attention):
            attention, mlp = mlp, attention
        if between is None and (not _attends(attention) or _attends(mlp)):
            return {}
        places = {ATTN_OUT: Place(attention.module), MLP_OUT: Place(mlp.module)}
        return places if between is None else {**places, RESID_MID: Place(between.module, reads=True)}

    @staticmethod
    def _between(x: torch.Tensor, first: _Ran, once: list[_Ran]) -> _Ran | None:
        """The first module that reads x + what `first` gave."""
        later = once[once.index(first) + 1 :]
        total = _sum(x, first.gave)
        return next((ran for ran in later if ran.read is not None and _same(ran.read, total)), None)


def _gives(ran: _Ran, x: torch.Tensor) -> bool:
    """Whether it gave states like x. Zeros are none: they add up with anything."""
    return ran.gave is not None and ran.gave.shape == x.shape and bool(torch.count_nonzero(ran.gave))


def _copy(value: Any) -> torch.Tensor | None:
    """Hidden states [1, T, d] or [T, d] -> a copy, [T, d]."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.ndim not in (2, 3):
        return None
    return value.detach().reshape(-1, value.shape[-1]).clone()


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor:
    assert a is not None and b is not None
    return a + b


def _parallel_sums(x: torch.Tensor, first: _Ran, second: _Ran) -> list[torch.Tensor]:
    """x + a + m in every order that may round differently."""
    a, m = first.gave, second.gave
    return [_sum(_sum(a, m), x), _sum(_sum(x, a), m), _sum(_sum(x, m), a)]


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit by bit, wherever both are finite, and somewhere they are."""
    if a.shape != b.shape:
        return False
    finite = torch.isfinite(a) & torch.isfinite(b)
    return bool(finite.any() & ((a == b) | ~finite).all())


def _alike(one: tuple[_Ran, _Ran, _Ran | None], other: tuple[_Ran, _Ran, _Ran | None]) -> bool:
    """Whether two ways to add up name the same tensors."""
    gave = all(
        a.gave is not None and b.gave is not None and _same(a.gave, b.gave)
        for a, b in zip(one[:2], other[:2], strict=True)
    )
    return gave and (one[2] is None) == (other[2] is None)


def _attends(ran: _Ran) -> bool:
    """By its name, where two sums could be told apart by nothing else."""
    return "attn" in ran.name or "attention" in ran.name
