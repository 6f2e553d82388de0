"""Replaces the residual stream of single tokens, and computes what the rest of the model makes of it.

Each sequence is read once. A patched token enters at the output of block K; the later blocks run on it alone, with the
keys and values of its own sequence (`lanes`). All variants of all tokens of several sequences are one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from nla_engine.engine.rotation import check_rotation
from nla_engine.engine.selfcheck import LONGEST_MASK, masks_of_the_library
from nla_engine.engine.slots import borrowed
from nla_engine.engine.temperature import scales
from nla_engine.errors import EngineError, NLAError, UnsupportedModel
from nla_engine.models.decoder import block_output
from nla_engine.models.implementation import attend_by, is_pluggable
from nla_engine.models.load import LanguageModel
from nla_engine.ops.backends import Kernels
from nla_engine.referee.blocks import known_parts
from nla_engine.referee.lanes import NAME, Lanes, Reading, Work, running
from nla_engine.referee.reference import patched_states

#: Tokens of one pass over patched tokens, at most, and entries of its attention scores.
_TOKENS = {"cpu": 2048, "cuda": 8192}
_SCORES = {"cpu": 1 << 24, "cuda": 1 << 28}
#: Largest median error of final hidden states against the reference, relative L2. Both round at other places.
_LIMIT = {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.02}
#: Tokens, positions and later positions of the text for which the two are compared.
_CHECKED_TOKENS, _CHECKED, _CHECKED_LATER = 512, 6, 2


class Patcher:
    """Holds a model while it is patched behind block `layer`. A context manager: `close` gives the model back.

    plain: whether plain torch and transformers' own modules compute, also what it makes is measured by

    While it is open, the model's own forward must not be called: where their arithmetic is known, its blocks and norms
    are replaced. Afterwards it has transformers' eager attention.
    """

    def __init__(self, lm: LanguageModel, layer: int, kernels: Kernels = Kernels()) -> None:
        lm.check_layer(layer)
        if scales(lm.blocks):
            raise EngineError(
                f"{lm.name}: {type(lm.model).__name__} cannot be patched: it scales queries by their number in a call: "
                "this architecture is not supported"
            )
        self.lm, self.layer = lm, layer
        self.plain = kernels.plain(lm.device)
        self._tuples = False  # whether blocks return tuples
        self._replaced = {} if self.plain else known_parts(lm)
        self._take()

    def __enter__(self) -> Patcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the model back."""
        attend_by(self.lm.model, "eager")
        for module in self._replaced:
            vars(module).pop("forward", None)

    def _take(self) -> None:
        attend_by(self.lm.model, NAME)
        for module, forward in self._replaced.items():
            module.forward = forward

    @contextmanager
    def _given_back(self) -> Iterator[None]:
        """Inside, the model is that of transformers."""
        self.close()
        try:
            yield
        finally:
            self._take()

    @torch.inference_mode()
    def read(self, sequences: Sequence[np.ndarray]) -> Reading:
        """Read sequences, each int [t] with t > 0, in one padded pass."""
        sizes = np.array([len(ids) for ids in sequences])
        longest = int(sizes.max())
        if longest > self.lm.max_length:
            raise EngineError(
                f"{self.lm.name}: a sequence of {longest} tokens is longer than its {self.lm.max_length} positions"
            )
        check_rotation(self.lm, longest)
        ids = np.zeros((len(sequences), longest), np.int64)
        for lane, sequence in zip(ids, sequences, strict=True):
            lane[: len(sequence)] = sequence
        read = Reading(torch.from_numpy(ids).to(self.lm.device), sizes, self.layer)

        def keep(_module: object, _inputs: object, output: Any) -> None:
            self._tuples = isinstance(output, tuple)
            read.states = block_output(output).clone()  # the next block may add to it in place

        hook = self.lm.blocks[self.layer].register_forward_hook(keep)
        try:
            with _belonging(read):
                self.lm.decoder(input_ids=read.ids, use_cache=False)
        finally:
            hook.remove()
        return read

    @torch.inference_mode()
    def run(
        self, read: Reading, sequence: np.ndarray, position: np.ndarray, vectors: torch.Tensor, later: int = 0
    ) -> torch.Tensor:
        """Final hidden states [n, 1 + later, d], where `vectors` [n, d] stand for outputs of block K.

        sequence: int64 [n], ascending, numbers in `read`; position: int64 [n], of each vector
        later: tokens after each patched one that are read again; what lies behind the end of a sequence is undefined
        """
        tokens = 1 + later
        out = torch.empty(
            (len(sequence), tokens, self.lm.d_model), dtype=self.lm.dtype, device=self.lm.device
        )
        for part in _pieces(
            sequence, self._most_scores(read, tokens), _TOKENS[self.lm.device.type] // tokens
        ):
            own, first = sequence[part], position[part]
            at = np.minimum(first[:, None] + np.arange(tokens), read.sizes[own][:, None] - 1)
            places = torch.from_numpy(at).to(self.lm.device)
            lane = torch.from_numpy(own).to(self.lm.device)[:, None]
            ids = read.ids[lane, places].view(1, -1)
            beside = self.lm.beside(ids)  # in part made of the embeddings
            entering = read.states[lane, places]
            entering[:, 0] = vectors[part].to(entering.dtype)
            with (
                _belonging(Lanes(read, own, first, tokens, plain=self.plain)),
                self._entering(entering.flatten(0, 1)[None]) as x,
            ):
                made = self.lm.decoder(
                    inputs_embeds=self.lm.embedding(ids) if beside else x,
                    position_ids=places.view(1, -1),
                    use_cache=False,
                    **beside,
                    **self._lent(read, lane, places),
                )
            out[part] = made.last_hidden_state[0].view(len(own), tokens, -1)
        return out

    def _lent(self, read: Reading, lane: torch.Tensor, places: torch.Tensor) -> dict[str, Any]:
        """Keys and values of the tokens at `places` [n, m] of sequences `lane` [n, 1] that later blocks borrow from
        blocks that do not run."""
        lent: dict[str, Any] = {}
        for layer, source in borrowed(self.lm).items():
            if source <= self.layer < layer:
                kept = (held[layer][lane, :, places].flatten(0, 1) for held in (read.keys, read.values))
                block: Any = self.lm.blocks[layer]
                lent[block.self_attn.layer_type] = tuple(x.transpose(0, 1)[None] for x in kept)
        return {"shared_kv_states": lent} if lent else {}

    def check(self, ids: np.ndarray, positions: np.ndarray, norms: np.ndarray, longest: int) -> None:
        """EngineError unless patched states of a text are those of the reference, and windows those of the masks.

        ids: int [t]; positions: int64 [n], where random vectors of these norms enter; longest: sequence of the run
        """
        if not is_pluggable(self.lm.model):
            raise EngineError(
                f"{self.lm.name}: {type(self.lm.model).__name__} computes its attention itself, so its sequences "
                "cannot be patched: this architecture is not supported"
            )
        kept = np.flatnonzero(positions < _CHECKED_TOKENS)
        kept = (
            kept[np.unique(np.linspace(0, len(kept) - 1, _CHECKED).round().astype(int))]
            if len(kept)
            else kept
        )
        positions, norms = positions[kept], norms[kept]
        ids = ids[:_CHECKED_TOKENS]
        try:
            read = self.read([ids])
            with self._given_back():
                self._check_windows(read, longest)
            if len(positions):
                self._compare(read, positions, norms)
        except (NLAError, MemoryError, torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except Exception as error:  # the code of any architecture
            raise UnsupportedModel(
                f"{self.lm.name}: {type(self.lm.model).__name__} cannot be patched ({type(error).__name__}): "
                "this architecture is not supported"
            ) from error

    def _compare(self, read: Reading, positions: np.ndarray, norms: np.ndarray) -> None:
        drawn = torch.randn(len(positions), self.lm.d_model, generator=torch.Generator().manual_seed(0))
        vectors = drawn / drawn.norm(dim=1, keepdim=True) * torch.from_numpy(norms)[:, None]
        vectors = vectors.to(self.lm.device, self.lm.dtype)
        own = self.run(read, np.zeros(len(positions), np.int64), positions, vectors, _CHECKED_LATER)
        errors: list[float] = []
        with self._given_back():
            for position, vector, states in zip(positions.tolist(), vectors, own, strict=True):
                true = patched_states(self.lm, read.ids[0], self.layer, position, vector)
                true = true[position : position + 1 + _CHECKED_LATER].double()
                apart = (states[: len(true)].double() - true).norm(dim=1) / true.norm(dim=1)
                errors += apart.tolist()
        error, limit = float(np.median(errors)), _LIMIT[self.lm.dtype]
        if not error <= limit:
            raise UnsupportedModel(
                f"{self.lm.name}: its patched states differ from those of transformers by {error:.2g} (limit "
                f"{limit:.2g}): this architecture is not supported"
            )

    def _check_windows(self, read: Reading, longest: int) -> None:
        length = min(longest, LONGEST_MASK)
        at = torch.arange(length, device=self.lm.device)
        for block, seen in enumerate(masks_of_the_library(self.lm, length)):
            window = read.shapes[block].window
            own = at >= (length - window if window else 0)
            if seen is not None and not torch.equal(seen, own):
                raise UnsupportedModel(
                    f"{self.lm.name}: block {block} attends to {int(seen.sum())} of {length} tokens by a mask of its "
                    "own: this architecture is not supported"
                )

    def _most_scores(self, read: Reading, tokens: int) -> int:
        """How many lanes, padding included, one pass may have for its attention scores to fit."""
        heads = int(self.lm.config.num_attention_heads)
        return max(_SCORES[self.lm.device.type] // (heads * tokens * (read.ids.shape[1] + tokens)), 1)

    @contextmanager
    def _entering(self, states: torch.Tensor) -> Iterator[torch.Tensor]:
        """Inside, blocks 0 to K return `states` [1, n, d] without running."""
        held = list(self.lm.blocks)[: self.layer + 1]

        def skip(*_: Any, **__: Any) -> Any:
            return (states,) if self._tuples else states

        for block in held:
            block.forward = skip
        try:
            yield states
        finally:
            for block in held:
                del block.forward
                if block in self._replaced:
                    block.forward = self._replaced[block]


@contextmanager
def _belonging(work: Work) -> Iterator[None]:
    """Inside, modules attend by `work`."""
    token = running.set(work)
    try:
        yield
    finally:
        running.reset(token)


def _pieces(sequence: np.ndarray, padded: int, most: int) -> Iterator[slice]:
    """Consecutive lanes: at most `most` of them, and at most `padded` when each sequence has as many as the largest.

    sequence: int64 [n], ascending. A piece has at least one lane.
    """
    start = 0
    while start < len(sequence):
        rest = sequence[start : start + most]
        new = np.append(True, rest[1:] != rest[:-1])
        number = np.cumsum(new)
        within = np.arange(len(rest)) - np.maximum.accumulate(np.where(new, np.arange(len(rest)), 0)) + 1
        fits = number * np.maximum.accumulate(within) <= padded  # does not rise again: both factors only grow
        size = max(int(fits.sum()), 1)
        yield slice(start, start + size)
        start += size
