"""Loads a checkpoint onto the ranks of a group: each reads its slices straight to its device, and no rank the model.

The fingerprint is that of the whole model: each weight is read whole by one rank, one weight at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModel, GenerationConfig

from nla_engine.engine.families import NORMS
from nla_engine.engine.ranks import Ranks
from nla_engine.engine.slots import free_each
from nla_engine.engine.split import Slice, Split, join_parts
from nla_engine.errors import CheckpointError, RequestError
from nla_engine.models.checkpoint import CONFIG, read_json, weight_paths
from nla_engine.models.cut import cut_config, is_behind
from nla_engine.models.fingerprint import checksums, fingerprint_of_sums
from nla_engine.models.hub.fetch import say
from nla_engine.models.load import LanguageModel, load_model, tokenizer_of, wrap_model
from nla_engine.models.source import Source
from nla_engine.models.weights import check_checkpoint, model_kind

#: What a rank needs beside its weights while it reads them: one weight whole, and integers of its bits.
_READING_BYTES = 4 << 30
#: Parts of names that differ between a model's classes, and from version to version.
_WRAPPERS = ("model", "language_model")


def load_split(
    ranks: Ranks,
    source: Source,
    *,
    dtype: torch.dtype,
    headless: bool = False,
    blocks: int | None = None,
    remote_code: bool = False,
    announce: Callable[[str], None] = lambda text: None,
) -> LanguageModel:
    """A model on the ranks of a group; called on rank 0. Arguments as for `load_model`.

    Raises RequestError, in one line, for a model that cannot be split so or does not fit; else as `load_model`.
    """
    name = source.name
    files, needed = check_split(
        source, ranks.size, dtype, headless=headless, blocks=blocks, remote_code=remote_code
    )
    if ranks.device.type == "cuda":
        free = ranks.together(free_each, ranks)
        for device, there in zip(ranks.devices, free, strict=True):
            if needed + _READING_BYTES > there:
                raise RequestError(
                    f"{name}: a rank's weights are {needed / 2**30:.1f} GiB, and {there / 2**30:.1f} GiB are free on "
                    f"{device}: give more GPUs with --tensor-parallel, or free some memory"
                )
    announce(f"{name}: {needed / 2**30:.2f} GiB of weights on each of {', '.join(map(str, ranks.devices))}")
    tokenizer = tokenizer_of(source, remote_code=remote_code)
    made: LanguageModel = ranks.make(_load, ranks, files, name, source.revision, tokenizer, dtype)
    made.origin = source.origin()
    return made if blocks is None or files.blocks is not None else made.truncated(blocks - 1)


def load_on(
    ranks: Ranks | None,
    source: Source,
    *,
    device: torch.device,
    dtype: torch.dtype,
    headless: bool = False,
    blocks: int | None = None,
    remote_code: bool = False,
) -> LanguageModel:
    """A model on the ranks of a group, or, without one, on a device."""
    how: dict[str, Any] = {"dtype": dtype, "headless": headless, "blocks": blocks, "remote_code": remote_code}
    if ranks is None:
        return load_model(source.name, device=device, source=source, **how)
    return load_split(ranks, source, announce=say, **how)


def check_split(
    source: Source,
    size: int,
    dtype: torch.dtype,
    *,
    headless: bool = False,
    blocks: int | None = None,
    remote_code: bool = False,
) -> tuple[_Files, int]:
    """The files of a model, and the bytes of a rank's weights. RequestError if it cannot be split over `size` ranks."""
    check_checkpoint(source.weights, headless=headless, remote_code=remote_code)
    if source.adapter is not None:
        raise RequestError(
            f"--tensor-parallel: {source.name} is an adapter: merge it into its base, save that, and give it instead"
        )
    files = _Files.of(source.weights, headless, blocks)
    split = files.split(source.name, 0, size)
    return files, split.weight_bytes(split.empty_model(dtype, headless, files.blocks))


@dataclass(frozen=True)
class _Files:
    """The weights of a checkpoint. config: its model's, cut to `blocks` blocks if that is not None."""

    directory: Path
    config: Any
    headless: bool
    blocks: int | None

    @classmethod
    def of(cls, directory: Path, headless: bool, blocks: int | None) -> _Files:
        """Blocks are cut where the others do not matter for them."""
        config = None if blocks is None else cut_config(directory, blocks, False)
        blocks = None if config is None else blocks
        return cls(directory, config or AutoConfig.from_pretrained(directory), headless, blocks)

    @property
    def text(self) -> Any:
        """The text model's configuration."""
        return self.config.get_text_config(decoder=True)

    def split(self, name: str, rank: int, size: int) -> Split:
        """Of the text model."""
        return Split(name, self.text, rank, size)

    def whole(self) -> Any:
        """The model of the checkpoint as transformers makes it, without memory."""
        kind = AutoModel if self.headless else model_kind(self.directory, False)
        with torch.device("meta"):
            return kind.from_config(self.config)

    def places(self, whole: Any) -> dict[str, tuple[Path, str]]:
        """Where each weight of the whole model lies: file and key, by the weight's short name.

        CheckpointError unless the files hold exactly its weights, each with its shape. A tied head may be missing, and
        without a head what comes after the last block.
        """
        found: dict[str, tuple[Path, str]] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        for path in weight_paths(self.directory, read_json(self.directory / CONFIG)):
            with safe_open(path, framework="pt") as file:
                for key in list(file.keys()):
                    if self.blocks is not None and is_behind(key, self.blocks):
                        continue
                    if short(key) in found:
                        raise CheckpointError(f"{self.directory}: {key} is there twice: fetch it again")
                    found[short(key)] = (path, key)
                    shapes[short(key)] = tuple(file.get_slice(key).get_shape())
        state, tied = whole.state_dict(), self.tied
        wanted = {short(name): tuple(weight.shape) for name, weight in state.items()}
        extra = sorted(
            name
            for name in found.keys() - wanted.keys()
            if not name.endswith("rotary_emb.inv_freq") and not (self.headless and name == "lm_head.weight")
        )
        if extra:
            raise CheckpointError(
                f"{self.directory}: {len(extra)} tensors have no place in {type(whole).__name__}, the first is "
                f"{found[extra[0]][1]}: config.json is not that of these weights: fetch both again"
            )
        wrong = sorted(name for name in found.keys() & wanted.keys() if shapes[name] != wanted[name])
        if wrong:
            raise CheckpointError(
                f"{self.directory}: {len(wrong)} weights have the wrong shape, the first is {found[wrong[0]][1]} "
                f"({list(shapes[wrong[0]])}, not {list(wanted[wrong[0]])}): config.json is not that of these weights: "
                "fetch both again"
            )
        missing = sorted(
            name
            for name in wanted.keys() - found.keys()
            if not (tied and name == "lm_head.weight") and not (self.headless and name == "norm.weight")
        )
        if missing:
            raise CheckpointError(
                f"{self.directory}: {len(missing)} weights are missing, the first is {missing[0]}: fetch it again"
            )
        return {name: place for name, place in found.items() if name in wanted}

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return bool(getattr(self.config, "tie_word_embeddings", False))


def short(name: str) -> str:
    """A weight's name without the modules that only wrap others."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _load(
    ranks: Ranks, files: _Files, name: str, revision: str | None, tokenizer: Any, dtype: torch.dtype
) -> LanguageModel:
    """On every rank: its model, with its slices of the weights."""
    split = files.split(name, ranks.rank, ranks.size)
    model = split.empty_model(dtype, files.headless, files.blocks)
    whole = files.whole()
    own = _read(ranks, files, whole, {short(key): part for key, part in split.slices(model).items()}, dtype)
    fingerprint = fingerprint_of_sums(
        {
            key: (
                tuple(weight.shape),
                dtype if weight.is_floating_point() else weight.dtype,
                own.sums[short(key)],
            )
            for key, weight in whole.state_dict().items()
        }
    )
    fill(model, own.weights, split, tied=files.tied)
    model.to(ranks.device)  # buffers
    if not files.headless and (files.directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(files.directory)
    return wrap_split(ranks, model, tokenizer, name=name, revision=revision, fingerprint=fingerprint)


def wrap_split(
    ranks: Ranks,
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    revision: str | None = None,
    fingerprint: str | None = None,
) -> LanguageModel:
    """A LanguageModel around a rank's model that is in memory, whose parts are joined from here on."""
    join_parts(model, ranks, int(model.config.vocab_size))
    lm = wrap_model(model, tokenizer, name=name, revision=revision)
    lm.ranks, lm.known_fingerprint = ranks, fingerprint
    return lm


def fill(model: Any, weights: dict[str, torch.Tensor], split: Split, *, tied: bool) -> None:
    """Put this rank's weights, by short name, in the place of the empty ones."""
    head = model.get_output_embeddings()
    for module_name, module in model.named_modules():
        for kind, empty in list(module._parameters.items()):
            if empty is None:
                continue
            key = short(f"{module_name}.{kind}")
            if module is head:
                embedding = weights["embed_tokens.weight"]
                first = min(split.rank * split.chunk, len(embedding))
                weight = embedding[first : first + split.chunk] if tied else weights[key]
                if len(weight) < split.chunk:
                    padded = weight.new_zeros(split.chunk, weight.shape[1])
                    padded[: len(weight)] = weight
                    weight = padded
            elif key in weights:
                weight = weights[key]
            else:  # a norm after the last block, which is not used
                offset = NORMS[type(module).__name__].offset
                like = next(iter(weights.values()))
                weight = torch.full(empty.shape, 1.0 - offset, dtype=like.dtype, device=like.device)
            module._parameters[kind] = nn.Parameter(weight, requires_grad=False)


@dataclass(frozen=True)
class _Read:
    """weights: this rank's, by short name; sums: the checksums of every whole weight."""

    weights: dict[str, torch.Tensor]
    sums: dict[str, tuple[int, int]]


def _read(ranks: Ranks, files: _Files, whole: Any, slices: dict[str, Slice], dtype: torch.dtype) -> _Read:
    places, weights = files.places(whole), {}
    state = {short(key): weight for key, weight in whole.state_dict().items()}
    sums = torch.zeros(len(state), 2, dtype=torch.int64)
    text = {short(name) for name, _ in whole.get_decoder().named_parameters()} | {"lm_head.weight"}
    for number, (key, file, name) in enumerate(_in_order(state, places)):
        ranks.pulse.beat()
        mine = number % ranks.size == ranks.rank
        if file is None:
            continue
        part: torch.Tensor | None = None
        if mine:
            tensor = file.get_tensor(name)
            tensor = tensor.to(ranks.device, dtype if tensor.is_floating_point() else tensor.dtype)
            sums[number] = torch.tensor(checksums(tensor))
            part = slices[key].of(tensor).clone() if key in slices else tensor
        elif key in text:
            source = file.get_slice(name)
            part = slices[key].of(source) if key in slices else source[:]
            part = part.to(ranks.device, dtype if part.is_floating_point() else part.dtype)
        if key in text and part is not None and not (files.tied and key == "lm_head.weight"):
            weights[key] = part.contiguous()
    total = ranks.sum(sums.to(ranks.device)).tolist()
    found = {
        key: (int(first), int(second)) for key, (first, second) in zip(sorted(state), total, strict=True)
    }
    for key in state.keys() - places.keys():
        if key == "lm_head.weight":
            found[key] = found["embed_tokens.weight"]
        else:  # the norm after the last block of a model without a head
            offset = NORMS[type(whole.get_decoder().norm).__name__].offset
            found[key] = checksums(torch.full(state[key].shape, 1.0 - offset, dtype=dtype))
    return _Read(weights, found)


def _in_order(
    state: dict[str, torch.Tensor], places: dict[str, tuple[Path, str]]
) -> Iterator[tuple[str, Any, str]]:
    """Every weight by name, with its open file and its key there; None and "" if no file holds it."""
    opened: dict[Path, Any] = {}
    for key in sorted(state):
        if key not in places:
            yield key, None, ""
            continue
        path, name = places[key]
        if path not in opened:
            opened[path] = safe_open(path, framework="pt")
        yield key, opened[path], name
