"""From vectors of any layer to logits: what a model does after its last block, in float32.

The model's own forward runs with blocks that return the given vectors, so it does not matter what an architecture calls
its final norm, or what it scales and caps behind its head.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from nla_engine.errors import EngineError, first_line
from nla_engine.models.decoder import block_output
from nla_engine.models.load import LanguageModel
from nla_engine.models.logits import LibraryLogits

#: Largest relative L2 difference from the model's own logits, by its dtype. Wider than rounding, far from a wrong norm.
_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 0.03}
#: Tokens of the text that both are compared on.
_TOKENS = 8


class Readout:
    """The final norm and head of `lm` in float32, with what its family scales and caps. Copies them, not the blocks.

    EngineError if the model has no head, or if the logits of its own last states differ from transformers' own.
    """

    @torch.inference_mode()
    def __init__(self, lm: LanguageModel) -> None:
        if lm.head is None:
            raise EngineError(f"{lm.name}: {type(lm.model).__name__} has no head: a lens needs one")
        refusal = f"{lm.name}: {type(lm.model).__name__} has no lens here: "
        try:
            outputs, expected = _whole(lm)
            self._given: list[torch.Tensor] = []
            self._beside = lambda count: lm.beside(
                torch.zeros((count, 1), dtype=torch.int64, device=lm.device)
            )
            model = _without_blocks(lm, outputs, self._given)
            self._decoder = model.get_decoder()
            self._logits = LibraryLogits(model, self._decoder)
            own = self(block_output(outputs[-1])[0].float())
        except Exception as error:  # the code of any architecture
            raise EngineError(
                f"{refusal}its logits depend on more than the output of its last block ({first_line(error)})"
            ) from error
        expected = expected.float()
        difference = float((own - expected).norm() / expected.norm()) if own.shape == expected.shape else 1.0
        limit = _LIMITS.get(lm.dtype, max(_LIMITS.values()))
        if not difference <= limit:
            raise EngineError(
                f"{refusal}its logits differ from transformers' own by {difference:.2g} (limit {limit:.2g})"
            )
        self.columns = own.shape[1]

    @torch.inference_mode()
    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """Logits, float32 [n, columns], of vectors, float32 [n, d], as if the last block had given them."""
        self._given.append(vectors[:, None])
        try:
            states = self._decoder(
                inputs_embeds=self._given[0], use_cache=False, **self._beside(len(vectors))
            ).last_hidden_state
        finally:
            self._given.clear()
        return self._logits(states[:, 0]).float()


def _whole(lm: LanguageModel) -> tuple[list[Any], torch.Tensor]:
    """Of a short text: the output of every block as it is, and the logits [T, columns], by transformers alone."""
    ids = torch.arange(_TOKENS, device=lm.device)[None] % lm.vocab_size
    outputs: list[Any] = []
    hooks = [block.register_forward_hook(lambda _m, _i, out: outputs.append(out)) for block in lm.blocks]
    try:
        logits: torch.Tensor = lm.model(input_ids=ids, use_cache=False, return_dict=True).logits
    finally:
        for hook in hooks:
            hook.remove()
    return outputs, logits[0]


def _tables(lm: LanguageModel) -> list[nn.Module]:
    """Other embeddings of tokens in the decoder: those of a small Gemma-4 are as large as all the rest."""
    table = getattr(lm.decoder, "embed_tokens_per_layer", None)
    return [] if table is None else [table]


def _without_blocks(lm: LanguageModel, outputs: list[Any], given: list[torch.Tensor]) -> Any:
    """A copy of the model, float32, whose blocks return `given`. Embeddings of tokens, and what stands beside the
    decoder in a wrapper (a vision tower), are shared with the model and keep their dtype."""
    holder, *path = next(name for name, module in lm.model.named_modules() if module is lm.decoder).split(".")
    shared: list[nn.Module] = [lm.embedding, *_tables(lm)]
    around = getattr(lm.model, holder)
    for name in path:
        shared += [child for other, child in around.named_children() if other != name]
        around = getattr(around, name)
    known: dict[int, Any] = {id(module): module for module in shared}
    known |= {
        id(block): _giving(block, output, given) for block, output in zip(lm.blocks, outputs, strict=True)
    }
    model = copy.deepcopy(lm.model, known)
    kept = {id(tensor) for module in shared for tensor in (*module.parameters(), *module.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and id(tensor) not in kept:
            tensor.data = tensor.data.float()
    return model


def _giving(block: nn.Module, output: Any, given: list[torch.Tensor]) -> nn.Module:
    """A block without weights that gives given[0] in the form of `output`."""
    rest = output[1:] if isinstance(output, tuple) else None
    stand_in = copy.copy(block)  # its attributes, which some decoders read
    for name in ("_modules", "_parameters", "_buffers", "_forward_hooks", "_forward_pre_hooks"):
        stand_in.__dict__[name] = {}

    def forward(*_: Any, **__: Any) -> Any:
        return given[0] if rest is None else (given[0], *rest)

    stand_in.forward = forward
    return stand_in
