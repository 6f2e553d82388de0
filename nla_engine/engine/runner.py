"""One forward pass of a language model over packed tokens: embeddings or vectors in, hidden states out.

Owns the slot cache, the shared prefix, the injected vectors and the hooks of the tap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch

from nla_engine.engine import attention
from nla_engine.engine.attention import Pass, TilesFor, Wanted
from nla_engine.engine.compressed import latent_attentions
from nla_engine.engine.delta import EngineDelta
from nla_engine.engine.experts import host_experts
from nla_engine.engine.families import can_fuse, can_fuse_norm
from nla_engine.engine.fused import Fp8Block, FusedBlock, FusedNorm, tune_products
from nla_engine.engine.heads import EngineHeads, known_heads
from nla_engine.engine.injection import Injector
from nla_engine.engine.latent import EngineLatent
from nla_engine.engine.lone import lone_parts
from nla_engine.engine.own_attention import implementation, take_attention
from nla_engine.engine.ranks import Ranks
from nla_engine.engine.rotation import rotates_on_host
from nla_engine.engine.selfcheck import SelfCheck
from nla_engine.engine.short_conv import EngineShortConv
from nla_engine.engine.slots import SlotCache
from nla_engine.engine.states import conv_module, delta_module
from nla_engine.engine.supported import check_supported
from nla_engine.engine.tap import NoTap, Tap
from nla_engine.engine.temperature import temper, untemper
from nla_engine.engine.transfer import to_device
from nla_engine.errors import EngineError, NLAError, UnsupportedModel
from nla_engine.models.decoder import block_output
from nla_engine.models.implementation import attend_by
from nla_engine.models.injection import Injection
from nla_engine.models.load import LanguageModel
from nla_engine.models.places import Place, find_places
from nla_engine.ops.backends import Kernels
from nla_engine.sites import EMBEDDINGS, MLP_OUT, RESID_POST, Site

#: Errors in a model's first passes that say nothing about its architecture.
_NOT_THE_MODEL = (NLAError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)


class Runner:
    """Runs `lm` with `slots` sequences of at most `length` tokens each, including the shared `prefix`.

    blocks: of keys and values in all, of `block` tokens; see `SlotCache`. With fewer than all slots may need, only a
        Generator can decide who holds them.
    tap: called inside every pass once the model has been checked.
    injection: how vectors enter, at most `vectors` of them per sequence. The tap sees a block's output after that.
    While a runner is open, the model's own forward must not be called. `close` restores it, with transformers' eager
    attention.
    """

    def __init__(
        self,
        lm: LanguageModel,
        *,
        slots: int,
        length: int,
        prefix: Sequence[int] = (),
        tap: Tap = NoTap(),
        kernels: Kernels = Kernels(),
        injection: Injection = Injection(),
        vectors: int = 1,
        blocks: int | None = None,
        block: int | None = None,
    ) -> None:
        check_supported(lm, length, kernels.precision)
        self.ranks: Ranks | None = lm.ranks
        self.at_close: list[Callable[[], object]] = []  # called when it is closed
        self.lm, self.length = lm, length
        self.device = lm.device
        self.precision = kernels.precision
        self.reference = kernels.plain(lm.device)
        self.cache = SlotCache(lm, slots, length, len(prefix), blocks, block)
        self.injector = Injector(injection, slots, vectors, lm.d_model, lm.device)
        self._pass: Pass | None = None
        self.tap = tap
        self._tapped = False  # until the model has been checked
        self.seen_site: Callable[[Site, torch.Tensor], None] | None = None  # what is called until then
        self._fused: list[Any] = []  # blocks whose forward is the engine's own
        self._mixers: list[Any] = []  # the same of what keeps states or compressed keys, within blocks
        self._own: list[Any] = []  # and of attention that computes its scores itself
        self._lone: list[Any] = []  # and of parts of blocks that are not fused
        self._untempered: list[Any] = []  # attentions that leave the scale of their queries to the engine
        self._norm: Any = None  # the norm after the last block, if its forward is the engine's too
        self._hooks: list[Any] = []
        self._narrows = False  # whether the last block continues with the wanted tokens only
        try:
            self._take_over(length, prefix)
        except BaseException as error:
            self.close()
            if isinstance(error, _NOT_THE_MODEL) or not isinstance(error, Exception):
                raise
            raise UnsupportedModel(
                f"{lm.name}: {type(lm.model).__name__} cannot be run by the engine ({type(error).__name__}): "
                "this architecture is not supported"
            ) from error
        self._tapped = True

    def _take_over(self, length: int, prefix: Sequence[int]) -> None:
        """Install the engine's attention, fused blocks and hooks in the model, and check that they compute the same."""
        sites = tuple(map(Site.at, self.tap.layers))
        places = find_places(self.lm, sites)
        check = SelfCheck(self, length, places)  # first of all, as it runs transformers' own attention
        attend_by(self.lm.model, implementation(self.lm.blocks))
        self._own = take_attention(self.lm.blocks)
        self._untempered = untemper(self.lm.blocks)
        for find, kind in ((delta_module, EngineDelta), (conv_module, EngineShortConv)):
            for module in filter(None, map(find, self.lm.blocks)):
                module.forward = kind(module)
                self._mixers.append(module)
        for module in latent_attentions(self.lm):
            module.forward = EngineLatent(module)
            self._mixers.append(module)
        check.note_shapes()
        for block in self.lm.blocks:
            if (self.precision == "fp8" or not self.reference) and can_fuse(block):
                block.forward = FusedBlock(block, self.ranks)
                self._fused.append(block)
        if not self.reference:
            parts = lone_parts(self.lm.blocks)
            for module in known_heads(self.lm.blocks):
                parts[module] = EngineHeads(module, check.asked(int(module.layer_idx)))
            for module, part in parts.items():
                module.forward = part
                self._lone.append(module)
        norm: Any = getattr(self.lm.decoder, "norm", None)
        if self._fused and can_fuse_norm(norm):
            norm.forward = FusedNorm(norm)
            self._norm = norm
        entry, last = self.injector.injection.block, len(self.lm.blocks) - 1
        self._narrows = self.lm.blocks[last] in self._fused and last not in {
            entry,
            *(site.layer for site in sites),
        }
        if entry is not None:  # before the tap, which sees what the next block reads
            self._hooks.append(self.lm.blocks[entry].register_forward_hook(self._inject))
        for site, place in places.items():
            self._watch(site, place)
        check.run()
        if self.precision == "fp8":  # the same arithmetic, just checked, except for rounding
            for block in self._fused:
                taps, block.forward = block.forward.taps, Fp8Block(block)
                block.forward.taps = taps
            check.run(fp8=True)
        if prefix:
            self.cache.grow(0, len(prefix))
            self.prefill([(0, 0, prefix)])
            self.cache.keep_as_prefix(0, len(prefix))
        self._prefix = tuple(prefix)

    def weights_changed(self) -> None:
        """Call after the values of the model's weights were replaced in place, with no sequence running.

        Graphs and fused blocks read the weights where they are; only the shared prefix was computed with others. It is
        read again into the memory that graphs know. EngineError where weights have copies (fp8), and on several ranks.
        """
        if self.precision == "fp8" or self.ranks is not None:
            raise EngineError(
                f"{self.lm.name}: weights are replaced in place only in full precision, on one GPU"
            )
        if not self._prefix:
            return
        self.cache.release_all()
        self.cache.grow(0, len(self._prefix))
        with self.cache.without_prefix():
            self.prefill([(0, 0, self._prefix)])
        self.cache.renew_prefix(0)
        self.cache.release_all()

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks, the fused blocks and the engine's attention from the model, and close the tap."""
        if self.ranks is not None:
            self.ranks.last(Runner.close, self)
        self.tap.close()
        for free in self.at_close:
            free()
        self.at_close.clear()
        for hook in self._hooks:
            hook.remove()
        for module in (*self._fused, *self._mixers, *self._own, *self._lone):
            del module.forward
        if self._norm is not None:
            del self._norm.forward
        temper(self._untempered)
        self._hooks, self._fused, self._mixers, self._own, self._lone = [], [], [], [], []
        self._untempered, self._norm = [], None
        attend_by(self.lm.model, "eager")

    @cached_property
    def _host_experts(self) -> bool:
        return host_experts(self.lm.blocks)

    @property
    def graphable(self) -> bool:
        """Whether a decode step reads nothing on the host, so that a CUDA graph can hold it."""
        if self.device.type != "cuda" or self.reference:
            return False
        if self._host_experts:
            return False
        return not rotates_on_host(self.lm)

    @cached_property
    def weights(self) -> int:
        """How many weights this rank's blocks and head have."""
        head = self.lm.head
        parameters = [*self.lm.blocks.parameters(), *(() if head is None else head.parameters())]
        return sum(weight.numel() for weight in parameters)

    @property
    def whole(self) -> bool:
        """Whether every block is the engine's own, so that a pass over prompts reads nothing on the host either."""
        return len(self._fused) == len(self.lm.blocks)

    def tune(self, rows: int) -> None:
        """Time the products of passes of `rows` tokens; from now on use the fastest. Call before a run, not in it."""
        if self.graphable and self._fused and self.precision != "fp8":
            tune_products([block.forward for block in self._fused], rows)

    def _watch(self, site: Site, place: Place) -> None:
        """Call the tap whenever the site has been computed: by the fused block itself, or by transformers' module."""
        block = self.lm.blocks[site.layer]
        inside = site.part not in (RESID_POST, EMBEDDINGS)
        # Only a fused block joins the work that runs beside it: its own, or that of the block before it.
        joins = site.layer + (site.part in (RESID_POST, MLP_OUT))
        joined = joins < len(self.lm.blocks) and self.lm.blocks[joins] in self._fused
        if inside and block not in self._fused:
            joined = False

        def take(states: torch.Tensor) -> None:
            if self._pass is None:
                return
            if self.seen_site is not None:
                self.seen_site(site, states)
            elif self._tapped:
                with self._pass.beside(states) if joined else nullcontext():
                    self.tap(site, states, self._pass.slot, self._pass.position)

        if inside and block in self._fused:
            fused: Any = block.forward
            fused.taps[site.part] = take
        else:
            self._hooks.append(place.watch(lambda hidden: take(hidden.reshape(-1, hidden.shape[-1]))))

    def _inject(self, _module: object, _inputs: object, output: object) -> None:
        if self._pass is not None and self._pass.entering is not None:
            self._enter(block_output(output)[0], self._pass.entering)

    def _enter(self, hidden: torch.Tensor, entering: torch.Tensor) -> None:
        """Let vectors enter. Only rank 0 has them, and passes on what they change."""
        self.injector.inject(hidden, entering)
        if self.ranks is not None:
            self.ranks.from_first(hidden)

    def read(
        self, parts: Sequence[tuple[int, int, Sequence[int]]], wanted: Sequence[int] | None = None
    ) -> torch.Tensor:
        """`prefill` on every rank, for a caller that is on rank 0 only."""
        if self.ranks is None:
            return self.prefill(parts, wanted)
        self.ranks.check()
        return self.ranks.together(Runner._read, self, parts, wanted)

    def _read(
        self, parts: Sequence[tuple[int, int, Sequence[int]]], wanted: Sequence[int] | None
    ) -> torch.Tensor:
        assert self.ranks is not None
        states = self.prefill(parts, wanted)
        self.ranks.look()
        return states

    def copy(self, source: Sequence[int], target: Sequence[int], length: int) -> None:
        """`SlotCache.copy` on every rank, for a caller that is on rank 0 only."""
        if self.ranks is None:
            self.cache.copy(source, target, length)
        else:
            self.ranks.together(Runner._copy, self, source, target, length)

    def _copy(self, source: Sequence[int], target: Sequence[int], length: int) -> None:
        self.cache.copy(source, target, length)

    @torch.inference_mode()
    def prefill(
        self,
        parts: Sequence[tuple[int, int, Sequence[int]]],
        wanted: Sequence[int] | None = None,
        entering: Sequence[tuple[int, int, int]] = (),
    ) -> torch.Tensor:
        """Read runs of tokens: (slot, start position, token ids). Returns their hidden states, run by run.

        wanted: the tokens whose states [n, d] are returned, 0 < n <= T; None: all T of them
        entering: for each vector that enters in this pass its token, its slot, and which of the slot's it is
        """
        runs = np.array([(slot, start, len(ids)) for slot, start, ids in parts], np.int64)
        slot, start, length = runs.T
        ids = np.concatenate([np.asarray(ids, np.int64) for _, _, ids in parts])
        positions = np.repeat(start, length) + attention.counted(length)
        if wanted is not None and not 0 < len(wanted) <= len(ids):
            raise EngineError(f"states of {len(wanted)} tokens are asked for, of a pass of {len(ids)}")
        packed = to_device(np.stack([ids, np.repeat(slot, length), positions]), self.device)
        tiles = cache(lambda group: attention.prefill_tiles(runs, group, packed[2]))
        token = None if wanted is None else to_device(np.array(wanted, np.int64), self.device)
        vectors = to_device(np.array(entering, np.int64).T.copy(), self.device) if entering else None
        first = np.cumsum(length) - length
        of_slots = list(zip(*(column.tolist() for column in (first, length, slot, start)), strict=True))
        return self._forward(packed[0], packed[1], packed[2], tiles, vectors, token, of_slots)

    @torch.inference_mode()
    def read_packed(
        self,
        ids: torch.Tensor,
        slot: torch.Tensor,
        position: torch.Tensor,
        tiles: TilesFor,
        wanted: torch.Tensor,
    ) -> torch.Tensor:
        """Read tokens that are on the device: ids, slot, position int64 [T], and their tiles. Returns the states [n, d]
        of the tokens `wanted`, int64 [n]. Where every block is the engine's own, a graph can hold it."""
        return self._forward(ids, slot, position, tiles, token=wanted)

    @torch.inference_mode()
    def decode(
        self, ids: torch.Tensor, slot: torch.Tensor, position: torch.Tensor, longest: int
    ) -> torch.Tensor:
        """Read one token per lane: ids, slot, position int64 [B]. Returns hidden states [B, d].

        longest: an upper bound on position + 1. A tight one is faster where attention is plain torch.
        """
        tiles = cache(lambda group: attention.decode_tiles(slot, position, group, longest))
        return self._forward(ids, slot, position, tiles)

    def _forward(
        self,
        ids: torch.Tensor,
        slot: torch.Tensor,
        position: torch.Tensor,
        tiles: TilesFor,
        entering: torch.Tensor | None = None,
        token: torch.Tensor | None = None,
        runs: list[tuple[int, int, int, int]] | None = None,
    ) -> torch.Tensor:
        """entering: as `Injector.inject` takes it; token: int64 [n], the tokens whose states are returned; runs: as in
        `Pass`."""
        if not all(each.is_contiguous() for each in (ids, slot, position)):
            raise EngineError("ids, slot and position of a pass are contiguous: kernels read them by number")
        work = Pass(self.cache, slot, position, tiles, self.reference, entering=entering, runs=runs)
        if token is not None and self._narrows:
            own, at = slot[token], position[token]
            work.wanted = Wanted(
                len(self.lm.blocks) - 1,
                token,
                cache(lambda group: attention.decode_tiles(own, at, group, tiles(group).longest)),
            )
        embeds = self.lm.embedding(ids)
        if entering is not None and self.injector.injection.block is None:
            self._enter(embeds, entering)
        if self.ranks is not None:
            self.ranks.note(ids, slot, position)
        self._pass = work
        try:
            with attention.running(work):
                hidden: torch.Tensor = self.lm.decoder(
                    inputs_embeds=embeds[None],
                    position_ids=position[None],
                    use_cache=False,
                    **self.lm.beside(ids[None]),
                ).last_hidden_state
        finally:
            self._pass = None
        if len(work.shapes) != self.cache.layers:
            missing = sorted(set(range(self.cache.layers)) - work.shapes.keys())
            raise UnsupportedModel(
                f"{self.lm.name}: blocks {missing} did not attend through the engine: this architecture is not "
                "supported"
            )
        states = hidden[0] if token is None or self._narrows else hidden[0, token]
        return states if self.ranks is None else self.ranks.own(states)
