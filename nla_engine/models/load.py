"""Language models: find, load and describe a Hugging Face decoder for the engine."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from nla_engine.errors import CheckpointError, RequestError, first_line
from nla_engine.models.adapters.merge import merge
from nla_engine.models.adapters.tensors import AdapterFile
from nla_engine.models.cut import cut_config
from nla_engine.models.decoder import CutDecoder, blocks_of, find_decoder, values
from nla_engine.models.fingerprint import fingerprint_of
from nla_engine.models.hub.fetch import say
from nla_engine.models.logits import LibraryLogits
from nla_engine.models.source import Source, find_source
from nla_engine.models.weights import check_checkpoint, read_model
from nla_engine.ops.cards import card_of, torch_fault

#: Files that hold a tokenizer, or say of which kind it is.
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
#: Stands for the length of a model whose configuration states none.
NO_LENGTH = 1 << 30
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass
class LanguageModel:
    """A decoder-only language model, on one device, in evaluation mode.

    `decoder` maps embeddings [1, T, d] to hidden states [1, T, d]; `blocks` are its layers; `head` maps hidden states
    to logits [.., vocab_size] or is None for a truncated model (an AR). `origin`: adapter and base that it was made of.
    `ranks`: the group (`engine.ranks`) of a model of which this is one rank's part; `known_fingerprint`: of the whole.
    """

    name: str
    revision: str | None
    model: Any
    tokenizer: Any
    decoder: Any
    head: nn.Module | None
    origin: Mapping[str, Any] = field(default_factory=dict)
    ranks: Any = None
    known_fingerprint: str | None = None

    @cached_property
    def blocks(self) -> nn.ModuleList:
        return blocks_of(self.decoder)

    @property
    def config(self) -> Any:
        """The text model's own configuration (of a multimodal wrapper, its `text_config`)."""
        return self.decoder.config

    @property
    def d_model(self) -> int:
        return int(values(self.config, "hidden_size")[0])

    @property
    def uncached(self) -> dict[str, Any]:
        """Arguments of the decoder with which it keeps no cache."""
        whole = getattr(self.decoder, "whole", self.decoder)
        parameters = inspect.signature(whole.forward).parameters
        takes = "use_cache" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        return {"use_cache": False} if takes else {}

    def beside(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """Arguments of the decoder that it reads of ids [B, T] besides their embeddings: what each block of Gemma-4
        looks up for itself."""
        whole = getattr(self.decoder, "whole", self.decoder)
        if not getattr(self.config, "hidden_size_per_layer_input", 0):
            return {}
        return {"per_layer_inputs": whole.get_per_layer_inputs(ids, None)}

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: ids from this one on can stand for vectors."""
        return int(self.embedding.num_embeddings)

    @property
    def embedding(self) -> Any:
        return self.decoder.get_input_embeddings()

    @property
    def device(self) -> torch.device:
        return next(self.decoder.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.decoder.parameters()).dtype

    @property
    def max_length(self) -> int:
        """Longest sequence that the positions of the model allow, in tokens."""
        named = (getattr(self.config, name, None) for name in ("max_position_embeddings", "max_seq_len"))
        longest = int(next(filter(None, named), 0))
        return longest if longest > 0 else NO_LENGTH

    @property
    def states_length(self) -> bool:
        """Whether the configuration says how many positions the model has."""
        return self.max_length < NO_LENGTH

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every id that ends a reply: the tokenizer's and the generation config's."""
        generation = getattr(self.model, "generation_config", None)
        ids: set[int] = set()
        for source in (self.tokenizer.eos_token_id, getattr(generation, "eos_token_id", None)):
            if source is not None:
                ids.update(source if isinstance(source, (list, tuple)) else [source])
        return tuple(sorted(ids))

    def check_layer(self, layer: int) -> None:
        """Raises RequestError unless `layer` is one of the model's blocks."""
        if not 0 <= layer < len(self.blocks):
            raise RequestError(
                f"layer {layer} does not exist: {self.name} has {len(self.blocks)} blocks, 0 to {len(self.blocks) - 1}"
            )

    def truncated(self, layer: int) -> LanguageModel:
        """The same weights up to block `layer`: the decoder gives that block's output; no final norm, no head.

        CheckpointError if the model's blocks are not run once each, in order.
        """
        self.check_layer(layer)
        if self.ranks is not None:  # the check of a cut runs the model
            cut: LanguageModel = self.ranks.make(LanguageModel._cut, self, layer)
            return cut
        return self._cut(layer)

    def _cut(self, layer: int) -> LanguageModel:
        return dataclasses.replace(self, decoder=CutDecoder(self.decoder, layer), head=None)

    def move(self, device: torch.device) -> None:
        """Move the weights to another device. No Runner may be open on them."""
        self.model.to(device)

    @cached_property
    def _library_logits(self) -> LibraryLogits:
        return LibraryLogits(self.model, self.decoder)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Final hidden states [n, d] -> logits [n, columns] as transformers gives them, scaled and capped."""
        assert self.head is not None
        return self._library_logits(hidden)

    def fingerprint(self) -> str:
        """Of every weight's name, shape, dtype and bits."""
        return self.known_fingerprint or fingerprint_of(self.model.state_dict())

    def describe(self) -> dict[str, Any]:
        """What a store or a result records of the model."""
        return {
            "model": self.name,
            "revision": self.revision,
            **self.origin,
            "architecture": type(self.model).__name__,
            "weights": self.fingerprint(),
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "blocks": len(self.blocks),
            "d_model": self.d_model,
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def pick_device(device: str | None) -> torch.device:
    """The device named 'cuda', 'cuda:N' or 'cpu'; None: CUDA if available. RequestError if it does not exist.

    A GPU is returned with its number and becomes torch's current device, where kernels and graphs run.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise RequestError(f"device '{device}' is not one torch knows: use cuda, cuda:N or cpu") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise RequestError(f"device '{device}' was asked for, but torch finds no CUDA GPU: pass --device cpu")
    if chosen.type not in ("cuda", "cpu"):
        raise RequestError(f"device '{device}' is not supported: use cuda, cuda:N or cpu")
    if chosen.type == "cpu":
        return torch.device("cpu")
    number = torch.cuda.current_device() if chosen.index is None else chosen.index
    if number >= torch.cuda.device_count():
        raise RequestError(f"device '{device}' does not exist: torch finds {torch.cuda.device_count()} GPUs")
    chosen = torch.device("cuda", number)
    if fault := torch_fault(card_of(chosen)):
        raise RequestError(fault)
    torch.cuda.set_device(number)
    return chosen


def pick_dtype(dtype: str | None, device: torch.device) -> torch.dtype:
    """The named dtype; None: bfloat16 on a GPU that supports it, else float32. RequestError if it cannot be used."""
    on_gpu = device.type == "cuda"
    if dtype is None:
        return torch.bfloat16 if on_gpu and card_of(device).bfloat16 else torch.float32
    if dtype not in DTYPES:
        raise RequestError(f"dtype '{dtype}' is not supported: use {' or '.join(DTYPES)}")
    if on_gpu and dtype == "bfloat16" and not card_of(device).bfloat16:
        raise RequestError(f"dtype bfloat16: {card_of(device)} does not compute in it: use float32")
    return DTYPES[dtype]


def tokenizer_of(source: Source, *, remote_code: bool = False) -> Any:
    """The tokenizer and chat template of a model: an adapter's own, where it has them, else its base's.

    CheckpointError if the adapter's gives a token of the base's another id, or has more than the base's embedding.
    """
    tokenizer = load_tokenizer(source.having(*_TOKENIZER), remote_code=remote_code)
    if source.adapter is None:
        return tokenizer
    own, of_base = (
        any((place / file).is_file() for file in _TOKENIZER) for place in (source.directory, source.weights)
    )
    if own and of_base:
        base = load_tokenizer(source.weights, remote_code=remote_code)
        _check_vocabulary(source, tokenizer.get_vocab(), base.get_vocab(), remote_code)
        tokenizer.chat_template = tokenizer.chat_template or base.chat_template
    template = source.directory / "chat_template.jinja"
    if template.is_file():
        tokenizer.chat_template = template.read_text(encoding="utf-8")
    return tokenizer


def _check_vocabulary(source: Source, own: dict[str, int], base: dict[str, int], remote_code: bool) -> None:
    another = "this adapter belongs to another base: give the one that it was trained on"
    by_id = {id_: token for token, id_ in own.items()}
    if moved := [t for t, id_ in base.items() if own.get(t, id_) != id_ or by_id.get(id_, t) != t]:
        raise CheckpointError(
            f"{source.name}: its tokenizer differs from that of its base {source.base} in {len(moved)} tokens, "
            f"{min(moved)!r} is one: {another}"
        )
    size = int(_text_config(source.weights, remote_code).vocab_size)
    if more := {token: id_ for token, id_ in own.items() if token not in base and id_ >= size}:
        raise CheckpointError(
            f"{source.name}: its tokenizer has {len(more)} tokens, {min(more)!r} is one, for which its base "
            f"{source.base} has no embedding ({size} in all): {another}"
        )


def load_tokenizer(directory: Path, *, remote_code: bool = False) -> Any:
    """The tokenizer of a checkpoint directory. CheckpointError if it cannot be loaded, or lacks its vocabulary."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=remote_code)
    except Exception as error:  # the library raises many types for one fault
        if not any(any(directory.glob(pattern)) for pattern in ("tokenizer.json", "vocab.*", "*.model")):
            raise CheckpointError(_no_tokenizer(directory)) from error
        raise CheckpointError(f"{directory}: the tokenizer cannot be loaded ({first_line(error)})") from error
    if tokenizer.get_vocab().keys() <= tokenizer.get_added_vocab().keys():  # for some families, no error
        raise CheckpointError(_no_tokenizer(directory))
    return tokenizer


def _no_tokenizer(directory: Path) -> str:
    return f"{directory}: holds no tokenizer: copy the model's tokenizer.json and tokenizer_config.json there"


def load_model(
    name: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    base: str | None = None,
    source: Source | None = None,
    headless: bool = False,
    blocks: int | None = None,
    remote_code: bool = False,
) -> LanguageModel:
    """Load a causal language model (or, `headless`, its decoder alone) from a directory or Hub id.

    An adapter is merged into its base.
    device, dtype: by name, or None, as `pick_device` and `pick_dtype` choose them
    base: of an adapter, unless it names its own
    source: what `find_source` gave for name, revision and base, if that was asked already
    blocks: load only so many blocks, the first ones
    Raises CheckpointError for weights that cannot be read, are not those of the configuration, or make a model that the
    engine cannot drive; EngineError if memory is short.
    """
    name = os.fspath(name)
    device = pick_device(device) if device is None or isinstance(device, str) else device
    dtype = pick_dtype(dtype, device) if dtype is None or isinstance(dtype, str) else dtype
    source = source or find_source(name, revision, base=base, remote_code=remote_code)
    directory = source.weights
    check_checkpoint(directory, headless=headless, remote_code=remote_code)
    adapter = None if source.adapter is None else AdapterFile(source.adapter)
    tokenizer = tokenizer_of(source, remote_code=remote_code)
    cut = None if blocks is None else cut_config(directory, blocks, remote_code)
    model, missing = read_model(
        directory, device=device, dtype=dtype, headless=headless, remote_code=remote_code, cut=cut
    )
    lm = wrap_model(model, tokenizer, name=name, revision=source.revision)
    if missing:
        _check_unused(directory, lm, missing)
    if adapter is not None:
        if adapter.adapter.quantised:
            say(
                f"{name}: was trained on its base in 4 bits, and runs on the whole weights: it may differ a little"
            )
        depth = int(_text_config(directory, remote_code).num_hidden_layers)
        merge(model, directory, adapter, headless=headless, depth=depth, blocks=blocks)
    lm.origin = source.origin()
    return lm if blocks is None or cut is not None else lm.truncated(blocks - 1)


def _text_config(directory: Path, remote_code: bool) -> Any:
    return AutoConfig.from_pretrained(directory, trust_remote_code=remote_code).get_text_config(decoder=True)


@torch.inference_mode()
def _check_unused(directory: Path, lm: LanguageModel, missing: Sequence[str]) -> None:
    """CheckpointError if the output of the last block depends on missing weights. A final norm may be missing.

    The missing weights are NaN while one token is read: NaN spreads to everything that uses them.
    """
    tensors = lm.model.state_dict()
    own = {tensor.data_ptr() for tensor in lm.blocks.state_dict().values()}
    used = [
        name for name in missing if tensors[name].data_ptr() in own or not tensors[name].is_floating_point()
    ]
    if not used:
        before = {name: tensors[name].clone() for name in missing}
        for name in missing:
            tensors[name].fill_(torch.nan)
        token = torch.zeros((1, 1), dtype=torch.int64, device=lm.device)
        cut = lm.truncated(len(lm.blocks) - 1).decoder
        states = cut(input_ids=token, use_cache=False).last_hidden_state
        for name, tensor in before.items():
            tensors[name].copy_(tensor)
        used = [] if bool(states.isfinite().all()) else list(missing)
    if used:
        raise CheckpointError(
            f"{directory}: {len(used)} weights are missing, the first is {used[0]}: fetch it again"
        )


def wrap_model(model: Any, tokenizer: Any, *, name: str, revision: str | None = None) -> LanguageModel:
    """A LanguageModel around a model that is already in memory. CheckpointError if its blocks are not found."""
    try:
        decoder = find_decoder(model)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}") from error
    if values(decoder.config, "hidden_size") in ([], [None]):
        raise CheckpointError(
            f"{name}: {type(model).__name__} has no hidden_size in its configuration: this architecture is not "
            "supported"
        )
    model.eval().requires_grad_(False)
    return LanguageModel(name, revision, model, tokenizer, decoder, model.get_output_embeddings())


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """sha256 over the vocabulary, the merges and the chat template.

    Truncation and padding are left out: calls of the tokenizer change them, and prompts are encoded without them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and (backend.truncation or backend.padding):
        backend = copy.deepcopy(backend)
        backend.no_truncation()
        backend.no_padding()
    text = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(f"{text}\n{tokenizer.chat_template}".encode()).hexdigest()[:16]
