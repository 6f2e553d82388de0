"""How a model is split over ranks: attention heads, MLP channels and the vocabulary; the rest is on every rank.

A rank's model is an ordinary one of transformers with fewer heads and a narrower MLP. What its blocks add to the
residual stream is a part of a sum, so the outputs of two products of each block are summed over the ranks. The records
of `families` name these products.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import AutoModel, AutoModelForCausalLM

from nla_engine.engine.families import FAMILIES, BlockFamily, NotFused, facts_of
from nla_engine.engine.ranks import Ranks
from nla_engine.engine.slots import kv_shape
from nla_engine.errors import RequestError
from nla_engine.models.decoder import blocks_of


@dataclass(frozen=True)
class Slice:
    """A rank's part of a whole weight: [start, stop) along a dimension."""

    dim: int
    start: int
    stop: int

    def of(self, whole: Any) -> torch.Tensor:
        """The part of a tensor, or of a slice of a file."""
        part: torch.Tensor = (
            whole[self.start : self.stop] if self.dim == 0 else whole[:, self.start : self.stop]
        )
        return part

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the part of a weight of this shape."""
        return tuple(self.stop - self.start if dim == self.dim else size for dim, size in enumerate(whole))


@dataclass(frozen=True)
class Split:
    """The split of a text model over `size` ranks, for one of them. config: the whole text model's.

    RequestError if it cannot be split so: the message is about `name`.
    """

    name: str
    config: Any
    rank: int
    size: int

    def __post_init__(self) -> None:
        heads, groups, width = self.heads, self.groups, int(self.config.intermediate_size)
        for what, count in (("attention heads", heads), ("channels between the products of its MLP", width)):
            if count % self.size:
                raise RequestError(
                    f"--tensor-parallel {self.size}: {self.name} has {count:,} {what}, and {self.size} does not "
                    "divide them"
                )
        if groups % self.size and self.size % groups:
            raise RequestError(
                f"--tensor-parallel {self.size}: {self.name} has {groups} key/value heads: give a number that divides "
                "them, or that they divide"
            )

    @property
    def heads(self) -> int:
        """Attention heads of the whole model."""
        return int(self.config.num_attention_heads)

    @property
    def groups(self) -> int:
        """Key/value heads of the whole model."""
        return kv_shape(self.config)[0]

    @property
    def chunk(self) -> int:
        """Rows of the head on a rank; the last ranks' may be padded."""
        return -(-int(self.config.vocab_size) // self.size)

    def local_config(self) -> Any:
        """The configuration of a rank's model."""
        local = copy.deepcopy(self.config)
        local.head_dim = kv_shape(self.config)[1]
        local.num_attention_heads = self.heads // self.size
        local.num_key_value_heads = max(self.groups // self.size, 1)
        local.intermediate_size = int(self.config.intermediate_size) // self.size
        return local

    def slices(self, model: nn.Module) -> dict[str, Slice]:
        """Which part of the whole weight each one of this rank's model is, by name. Those not named are whole."""
        size, head_size = self.size, kv_shape(self.config)[1]
        own, width = self.heads // size, int(self.config.intermediate_size) // size
        groups = max(self.groups // size, 1)
        first = self.rank * self.groups // size
        query = (self.rank * own * head_size, (self.rank + 1) * own * head_size)
        key = (first * head_size, (first + groups) * head_size)
        channels = (self.rank * width, (self.rank + 1) * width)
        names = {id(module): name for name, module in model.named_modules()}
        found: dict[str, Slice] = {}
        for block, family in family_blocks(model):
            attention, mlp = block.self_attn, block.mlp
            parts = [
                (attention, family.qkv[0], 0, query),
                *((attention, name, 0, key) for name in family.qkv[1:]),
            ]
            parts += [(attention, family.out, 1, query), (mlp, family.down, 1, channels)]
            parts += [(mlp, name, 0, channels) for name in family.gate_up]
            for module, name, dim, bounds in parts:
                layer = getattr(module, name)
                for kind, _ in layer.named_parameters(recurse=False):
                    found[f"{names[id(layer)]}.{kind}"] = Slice(dim, *bounds)
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        if head is not None:
            vocabulary = int(self.config.vocab_size)
            start = min(self.rank * self.chunk, vocabulary)
            found[f"{names[id(head)]}.weight"] = Slice(0, start, min(start + self.chunk, vocabulary))
        return found

    def empty_model(self, dtype: torch.dtype, headless: bool, blocks: int | None = None) -> Any:
        """This rank's model: its weights on the meta device, of the shapes that transformers gives them."""
        config = self.local_config()
        if blocks is not None:
            config.num_hidden_layers = blocks
        kind: Any = AutoModel if headless else AutoModelForCausalLM

        def without_memory(
            _module: nn.Module, _name: str, weight: nn.Parameter | None
        ) -> nn.Parameter | None:
            return None if weight is None else nn.Parameter(weight.to("meta"), requires_grad=False)

        register: Any = register_module_parameter_registration_hook
        hook = register(without_memory)
        try:
            model = kind.from_config(config, dtype=dtype, attn_implementation="eager")
        finally:
            hook.remove()
        self._check_family(model)
        return model.eval()

    def _check_family(self, model: Any) -> None:
        """RequestError unless the arithmetic of every block is known."""
        for block, _ in family_blocks(model):
            try:
                facts_of(block)
            except NotFused as error:
                raise self._refusal(str(error)) from error
        kinds = [type(block).__name__ for block in blocks_of(model.get_decoder())]
        unknown = [kind for kind in kinds if kind not in FAMILIES]
        if unknown:
            raise self._refusal(f"{unknown[0]} is not a known block")

    def _refusal(self, why: str) -> RequestError:
        return RequestError(
            f"--tensor-parallel: {self.name} cannot be split ({why}): run it on one GPU, without --tensor-parallel"
        )

    def weight_bytes(self, model: nn.Module) -> int:
        """Bytes of this rank's weights. A tied head is a part of the embedding, which every rank holds."""
        tied = bool(getattr(self.config, "tie_word_embeddings", False))
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        total = sum(
            weight.nbytes for weight in model.parameters() if head is None or weight is not head.weight
        )
        if head is not None and not tied:
            total += self.chunk * head.weight.shape[1] * head.weight.element_size()
        return total


def family_blocks(model: Any) -> Iterator[tuple[Any, BlockFamily]]:
    """The blocks of a model that have a record, with it."""
    for block in blocks_of(model.get_decoder()):
        if family := FAMILIES.get(type(block).__name__):
            yield block, family


def join_parts(model: Any, ranks: Ranks, vocabulary: int) -> None:
    """Let the modules of a rank's model sum or gather what they give, wherever transformers calls them."""

    def summed(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return ranks.sum(output.contiguous())

    def gathered(_module: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        flat = ranks.columns(output.reshape(-1, output.shape[-1]), vocabulary)
        return flat.view(*output.shape[:-1], vocabulary)

    for block, family in family_blocks(model):
        getattr(block.self_attn, family.out).register_forward_hook(summed)
        getattr(block.mlp, family.down).register_forward_hook(summed)
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_hook(gathered)
