"""Where a model keeps its decoder and its blocks, and a decoder cut after one of them.

A cut decoder is the model's own forward, stopped when that block has given its output. Nothing in the model is removed
or replaced, so it does not matter what an architecture calls its final norm, what else uses that norm, or what
follows it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from nla_engine.errors import CheckpointError


def find_decoder(model: Any) -> Any:
    """The module of a causal language model that maps token ids to final hidden states.

    It is the smallest module that holds the input embedding and all blocks. CheckpointError if the blocks are not in
    one list, or the embedding is not found.
    """
    roots = [model.get_decoder(), model]
    for root in roots:
        if isinstance(getattr(root, "layers", None), nn.ModuleList) and root is not model:
            return root
    name = type(model).__name__
    for root in roots:
        config = getattr(root, "config", None)
        if config is None or not isinstance(root, nn.Module):
            continue
        lists = _lists_of_blocks(root, config)
        if len(lists) != 1:
            continue
        embedding = _embedding_of(root)
        paths = {module: path for path, module in root.named_modules()}
        if embedding not in paths:
            continue
        shared = paths[lists[0]].split(".")
        other = paths[embedding].split(".")
        same = next((i for i, (a, b) in enumerate(zip(shared, other, strict=False)) if a != b), 0)
        decoder = root.get_submodule(".".join(shared[:same]))
        if hasattr(decoder, "config"):
            return decoder
    raise CheckpointError(
        f"{name} keeps its blocks in no list of their own, or in several: this architecture is not supported"
    )


def blocks_of(decoder: Any) -> nn.ModuleList:
    """The blocks of a decoder of `find_decoder`, or of a `CutDecoder`, in the order in which they run."""
    layers = getattr(decoder, "layers", None)
    return layers if isinstance(layers, nn.ModuleList) else _lists_of_blocks(decoder, decoder.config)[0]


def values(config: Any, key: str) -> list[Any]:
    """What a configuration says under this key: one value, or the different ones of its blocks; None if it lacks it."""
    try:
        found = [getattr(config, key, None)]
    except RuntimeError:  # a value per block, which the library does not read as one
        found = [getattr(each, key, None) for each in config.per_layer_config]
    if len(found) == 1 and isinstance(found[0], list | tuple):
        found = list(found[0])
    return sorted(set(found), key=str)


def _lists_of_blocks(root: nn.Module, config: Any) -> list[nn.ModuleList]:
    """Every list of as many modules as the configuration names blocks, without lists inside of such lists."""
    text = config.get_text_config(decoder=True)
    count, found = getattr(text, "num_hidden_layers", None), dict[str, nn.ModuleList]()
    for path, module in root.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, nn.ModuleList) and len(module) == count and not inside:
            found[path] = module
    return list(found.values())


def _embedding_of(root: Any) -> Any:
    """The input embedding of a model; None if it has none that it names."""
    try:
        return root.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


class CutDecoder:
    """Called like the decoder `whole`, it runs blocks 0 to `last`: `last_hidden_state` is the output of block `last`.

    CheckpointError if that is ambiguous: blocks run twice or out of order, or do not give [1, T, d].
    """

    def __init__(self, whole: Any, last: int) -> None:
        self.whole: Any = whole.whole if isinstance(whole, CutDecoder) else whole
        self.layers = nn.ModuleList(list(blocks_of(self.whole))[: last + 1])
        self.config = whole.config
        self._check_order()

    def __call__(self, **inputs: Any) -> BaseModelOutput:
        def stop(_module: object, _inputs: object, output: object) -> None:
            raise _Reached(block_output(output))

        # Registered after the block's other hooks, which see its output first.
        hook = self.layers[-1].register_forward_hook(stop)
        try:
            self.whole(**inputs)
        except _Reached as reached:
            return BaseModelOutput(last_hidden_state=reached.output)
        finally:
            hook.remove()
        raise CheckpointError(
            f"{type(self.whole).__name__}: its forward does not run block {len(self.layers) - 1}: "
            "this architecture is not supported"
        )

    def get_input_embeddings(self) -> nn.Module:
        embedding: nn.Module = self.whole.get_input_embeddings()
        return embedding

    def parameters(self) -> Any:
        """The parameters of the blocks."""
        return self.layers.parameters()

    @torch.inference_mode()
    def _check_order(self) -> None:
        """Read one token with the whole decoder: each block up to the last must run once, in order."""
        name, given = type(self.whole).__name__, list(blocks_of(self.whole))
        ran: list[int] = []
        shapes: Counter[tuple[int, ...]] = Counter()

        def note(number: int) -> Any:
            def hook(_module: object, _inputs: object, output: object) -> None:
                ran.append(number)
                if number < len(self.layers):
                    shapes[tuple(block_output(output).shape)] += 1

            return hook

        hooks = [block.register_forward_hook(note(number)) for number, block in enumerate(given)]
        token = torch.zeros((1, 1), dtype=torch.int64, device=next(self.parameters()).device)
        try:
            self.whole(input_ids=token, use_cache=False)
        except Exception as error:  # the library raises many types for one fault
            raise CheckpointError(
                f"{name}: does not run on text alone ({type(error).__name__}): this architecture is not supported"
            ) from error
        finally:
            for hook in hooks:
                hook.remove()
        if ran != list(range(len(given))) or set(shapes) != {(1, 1, self.config.hidden_size)}:
            raise CheckpointError(
                f"{name}: its blocks do not each add once to one residual stream, "
                f"so the output of block {len(self.layers) - 1} is ambiguous: this architecture is not supported"
            )


def block_output(output: Any) -> torch.Tensor:
    """Hidden states [1, T, d] in the output of a block: itself, or the first of a tuple or list."""
    hidden = output[0] if isinstance(output, tuple | list) else output
    assert isinstance(hidden, torch.Tensor)
    return hidden


class _Reached(Exception):
    """Stops a forward after the last block that is wanted; holds its output."""

    def __init__(self, output: torch.Tensor) -> None:
        super().__init__("the forward ends here")
        self.output = output
