"""AR: explanations -> vectors. Blocks 0..K of a language model read a fixed prompt around the text; a linear head maps
the last token's residual stream to the vector.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from nla_engine.engine.choose import open_runner
from nla_engine.engine.library import Library
from nla_engine.engine.library_batch import Batch
from nla_engine.engine.ranks import Ranks
from nla_engine.engine.request import Request
from nla_engine.engine.runner import Runner
from nla_engine.engine.split_load import load_on
from nla_engine.engine.tap import NoTap
from nla_engine.errors import CheckpointError
from nla_engine.models.adapters.form import AR_META, read_ar_meta
from nla_engine.models.checkpoint import VALUE_HEADS
from nla_engine.models.load import LanguageModel
from nla_engine.models.map_files import Maps, find_maps
from nla_engine.models.sidecar import SIDECAR, Given, Sidecar, read_sidecar, reconstructor_prompts
from nla_engine.models.source import Source, find_source
from nla_engine.models.value_head import HEAD_FILES, read_value_head
from nla_engine.ops.backends import Kernels
from nla_engine.sites import Site

#: Most prompts, and most tokens, in one packed pass.
_BATCH = {"cpu": (64, 4096), "cuda": (256, 32768)}
_NO_HEADS: Mapping[int, torch.Tensor] = {}


class _LastStates(NoTap):
    """Keeps the output of some blocks at the tokens that are `wanted`. states: by block, [n, d]."""

    def __init__(self, layers: Sequence[int]) -> None:
        self.layers = tuple(map(Site, layers))
        self.wanted: torch.Tensor | None = None
        self.states: dict[int, torch.Tensor] = {}

    def __call__(self, layer: Site, hidden: torch.Tensor, slot: torch.Tensor, position: torch.Tensor) -> None:
        if self.wanted is not None:
            self.states[layer.layer] = hidden[self.wanted]


class Reconstructor:
    """A loaded AR checkpoint. weight float32 [d, d], bias float32 [d] or None: the value head.

    special: its prompts begin with the tokenizer's start token, if it has one
    maps: what the head's output goes through
    layer: whose vectors it gives; None: that of its last block
    further: the heads of other layers that it gives from the same text, float32 [d, d] by layer
    """

    def __init__(
        self,
        lm: LanguageModel,
        sidecar: Sidecar,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        *,
        kernels: Kernels = Kernels(),
        special: bool = True,
        maps: Maps = Maps(),
        layer: int | None = None,
        further: Mapping[int, torch.Tensor] = _NO_HEADS,
    ) -> None:
        maps.check_width(sidecar, lm.d_model)
        if not further and sidecar.layer is not None and len(lm.blocks) != sidecar.layer + 1:
            raise CheckpointError(
                f"{sidecar.path}: layer {sidecar.layer} needs {sidecar.layer + 1} blocks, "
                f"the model has {len(lm.blocks)}"
            )
        self.sidecar = sidecar
        last = len(lm.blocks) - 1
        self.layer = last if layer is None else layer
        self.lm = lm.truncated(last)
        self.further = {number: head.to(lm.device) for number, head in further.items()}
        self._tap = _LastStates([number for number in (self.layer, *self.further) if number < last])
        self.weight = weight.to(lm.device)
        self.bias = None if bias is None else bias.to(lm.device)
        self.kernels = kernels
        self.special = special
        self.maps = maps.to(lm.device)
        self._runner: Runner | Library | None = None
        self._prefix = self._shared_prefix()

    def __repr__(self) -> str:
        return (
            f"<Reconstructor {self.lm.name}: AR for layer {self.layer}, vectors of width {self.sidecar.d_model}, "
            f"on {self.lm.device}>"
        )

    @classmethod
    def load(
        cls,
        name: str,
        *,
        device: torch.device,
        dtype: torch.dtype,
        remote_code: bool = False,
        kernels: Kernels = Kernels(),
        given: Given = Given(),
        base: str | None = None,
        source: Source | None = None,
        ranks: Ranks | None = None,
    ) -> Reconstructor:
        """From a directory or Hub id. CheckpointError names what is wrong with it.

        base: of an adapter; source: what `find_source` gave for both, if that was asked already; ranks: the group
        that shares the weights
        """
        source = source or find_source(name, base=base, flag="--ar-base", remote_code=remote_code)
        sidecar = read_sidecar(source.having(SIDECAR), "ar", given)
        maps = find_maps(source, sidecar, given)
        layer = given.layer if sidecar.layer is None else sidecar.layer
        heads = source.having(*HEAD_FILES)
        width = sidecar.d_model if maps.map is None else maps.map.width
        weight, bias = read_value_head(heads, width, layer)
        taps = () if source.adapter is None else source.adapter.taps
        further = {tap: read_value_head(heads, width, tap)[0] for tap in taps if tap != layer}
        if taps and maps != Maps():
            raise CheckpointError(
                f"{name}: gives layers {', '.join(map(str, taps))}, and a map or a whitening is of one layer: "
                "leave it out"
            )
        lm = load_on(
            ranks,
            source,
            device=device,
            dtype=dtype,
            headless=True,
            blocks=_blocks(source, sidecar, layer if (heads / VALUE_HEADS).is_file() else None),
            remote_code=remote_code,
        )
        # The trainer that writes ar_meta.json encodes prompts without special tokens, the released pairs' with them.
        easy = (source.directory / AR_META).is_file()
        if easy and (told := read_ar_meta(source.directory, name).blocks) != len(lm.blocks):
            raise CheckpointError(f"{name}: {AR_META} says {told} blocks, the model has {len(lm.blocks)}")
        return cls(
            lm,
            sidecar,
            weight,
            bias,
            kernels=kernels,
            special=not easy,
            maps=maps,
            layer=layer if taps else None,
            further=further,
        )

    def fingerprint(self) -> str:
        """Of everything that a reconstruction depends on: weights, sidecar, value head and maps."""
        digest = hashlib.sha256(self.weight.cpu().numpy().tobytes())
        if self.bias is not None:
            digest.update(self.bias.cpu().numpy().tobytes())
        parts = [self.lm.fingerprint(), self.sidecar.fingerprint(), digest.hexdigest()[:16]]
        for number, head in sorted(self.further.items()):
            parts.append(f"{number}:{hashlib.sha256(head.cpu().numpy().tobytes()).hexdigest()[:16]}")
        parts += self.maps.fingerprint()
        return "-".join(parts if self.special else [*parts, "plain"])

    def move(self, device: torch.device) -> None:
        """Move the weights to another device."""
        self.close()
        self.lm.move(device)
        self.weight = self.weight.to(device)
        self.bias = None if self.bias is None else self.bias.to(device)
        self.further = {number: head.to(device) for number, head in self.further.items()}
        self.maps = self.maps.to(device)

    def prompt_sizes(self, explanations: Sequence[str]) -> list[int]:
        """How many tokens the prompt around each text has."""
        return [len(ids) for ids in self.prompts(explanations)]

    @torch.inference_mode()
    def prepare(self, tokens: int) -> None:
        """Allocate memory for texts of so many tokens, and check the engine against the library's forward."""
        (empty,) = self.prompts([""])
        self._fit_runner(min(len(empty) + tokens, self.lm.max_length))

    @torch.inference_mode()
    def reconstruct(self, explanations: Sequence[str]) -> torch.Tensor:
        """The vector of each text, float32 [n, d] on the model's device. Passes are packed, without padding."""
        return self.reconstruct_layers(explanations)[self.layer]

    @torch.inference_mode()
    def reconstruct_layers(self, explanations: Sequence[str]) -> dict[int, torch.Tensor]:
        """The same of every layer that the AR gives from one text, its own first."""
        prompts = self.prompts(explanations)
        layers = (self.layer, *self.further)
        shape = (len(layers), len(prompts), self.lm.d_model)
        last = torch.empty(shape, dtype=self.lm.dtype, device=self.lm.device)
        most, budget = _BATCH[self.lm.device.type]
        start = 0
        while start < len(prompts):
            end, total = start, 0
            while (
                end < len(prompts)
                and end - start < most
                and (end == start or total + len(prompts[end]) <= budget)
            ):
                total += len(prompts[end])
                end += 1
            states = self._last_states(prompts[start:end])
            for place, layer in enumerate(layers):
                last[place, start:end] = states[layer]
            start = end
        if self.lm.ranks is not None:
            self.lm.ranks.check()
        linear = torch.nn.functional.linear
        own = {self.layer: self.maps.after(linear(last[0].float(), self.weight, self.bias))}
        heads = zip(last[1:], self.further.items(), strict=True)
        return own | {layer: linear(states.float(), head) for states, (layer, head) in heads}

    @torch.inference_mode()
    def _last_states(self, prompts: list[list[int]]) -> dict[int, torch.Tensor]:
        """The last token's residual stream [n, d] of each prompt, by layer. The prefix held by every slot is not read
        again."""
        runner = self._fit_runner(max(map(len, prompts)))
        if isinstance(runner, Library):
            requests = [Request(id_, tuple(ids), 0) for id_, ids in enumerate(prompts)]
            batch = Batch(requests, range(len(prompts)), (), runner.device)
            return self._read(lambda: runner.read(batch), batch.last)
        shared = len(self._prefix)
        first = [
            shared if len(ids) > shared and tuple(ids[:shared]) == self._prefix else 0 for ids in prompts
        ]
        sizes = [len(ids) - skip for skip, ids in zip(first, prompts, strict=True)]
        wanted = np.cumsum(sizes) - 1
        runs = [(slot, skip, ids[skip:]) for slot, (skip, ids) in enumerate(zip(first, prompts, strict=True))]
        states = self._read(lambda: runner.read(runs, wanted.tolist()), wanted)
        if overwritten := [slot for slot, skip in enumerate(first) if skip < shared]:
            runner.copy([runner.cache.spare] * len(overwritten), overwritten, shared)
        return states

    def _read(self, read: Callable[[], torch.Tensor], wanted: np.ndarray) -> dict[int, torch.Tensor]:
        """What one pass gives at its tokens `wanted`, int64 [n], by layer. read: runs it, returns the last layer's."""
        if self._tap.layers:
            self._tap.wanted = torch.from_numpy(wanted).to(self.lm.device)
        states = read()
        self._tap.wanted = None
        return {len(self.lm.blocks) - 1: states, **self._tap.states}

    def prompts(self, explanations: Sequence[str]) -> list[list[int]]:
        """The prompt around each text, as token ids."""
        return reconstructor_prompts(self.sidecar, self.lm.tokenizer, explanations, self.special)

    def _shared_prefix(self) -> tuple[int, ...]:
        """Token ids that prompts begin with, unless the tokenizer merges a text with the template before it."""
        one, other = self.prompts(["a", "1"])
        same = [a == b for a, b in zip(one, other, strict=False)]
        return tuple(one[: max(same.index(False) - 1 if False in same else 0, 0)])

    def close(self) -> None:
        """Release the model; the next `reconstruct` takes it again."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _fit_runner(self, longest: int) -> Runner | Library:
        """A runner whose slots hold `longest` tokens. If too small, it is replaced by one for 1.5 times as many."""
        if self._runner is None or self._runner.length < longest:
            self.close()  # frees its cache first
            length = min(longest + longest // 2, max(self.lm.max_length, longest))
            slots = _BATCH[self.lm.device.type][0]
            self._runner = open_runner(
                self.lm, slots=slots, length=length, tap=self._tap, kernels=self.kernels
            )
            if self._prefix and isinstance(self._runner, Runner):
                cache = self._runner.cache
                self._runner.read([(cache.spare, 0, self._prefix)])
                self._runner.copy([cache.spare] * slots, list(range(slots)), len(self._prefix))
        return self._runner


def _blocks(source: Source, sidecar: Sidecar, layer: int | None) -> int | None:
    """How many of the blocks in its files an AR has; None: all. layer: the one that is read, if each has a head."""
    if layer is not None:
        return layer + 1
    if source.adapter is None:
        return None
    if source.adapter.blocks is not None:
        return source.adapter.blocks
    if sidecar.layer is None:
        raise CheckpointError(
            f"{sidecar.path}: does not say the layer, so it is not known how many blocks of {source.base} this AR has: "
            "add extraction_layer_index"
        )
    return sidecar.layer + 1
