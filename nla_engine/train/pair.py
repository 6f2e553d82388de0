"""AV and AR while they are trained: their forward passes with gradients, and which of their weights change.

The passes are transformers' own. What runs fast, and what ships, is the engine's copy: see `rollouts` and `output`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call

from nla_engine.engine.injection import at_scale
from nla_engine.models.av_prompt import verbalizer_prompt
from nla_engine.models.load import LanguageModel
from nla_engine.models.sidecar import read_sidecar, reconstructor_prompts
from nla_engine.train.lora import LoraLinear, add_lora


class Trained:
    """A model of which a LoRA, or every weight, is trained. adapters: by the name of their layer; empty: every weight.

    parameters: what is trained, by its name in the model
    """

    def __init__(self, lm: LanguageModel, rank: int | None, seed: int) -> None:
        """rank: of the LoRA, whose alpha is twice that; None: train every weight"""
        self.lm = lm
        lm.model.set_attn_implementation("sdpa" if lm.model._supports_sdpa else "eager")
        self.adapters: dict[str, LoraLinear] = {}
        lm.model.requires_grad_(rank is None)
        if rank is not None:
            self.adapters = add_lora(lm.model, lm.blocks, rank, 2.0 * rank, seed)
        self.parameters: dict[str, nn.Parameter] = {
            name: weight for name, weight in lm.model.named_parameters() if weight.requires_grad
        }

    def changed(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the weights are now that training changes, by their names in the base model; LoRAs merged, float32."""
        if self.adapters:
            for name, lora in self.adapters.items():
                yield f"{name}.weight", lora.merged()
        else:
            yield from ((name, weight.detach()) for name, weight in self.parameters.items())

    def autocast(self) -> Any:
        """bfloat16 products on a GPU."""
        device = self.lm.device.type
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


class TrainedAV(Trained):
    """The AV. prompt: as its sidecar makes it."""

    def __init__(self, lm: LanguageModel, directory: Path, rank: int | None, seed: int) -> None:
        """directory: of the sidecar"""
        self.sidecar = read_sidecar(directory, "av")
        self.prompt = verbalizer_prompt(self.sidecar, lm.tokenizer)
        super().__init__(lm, rank, seed)
        self._ids = torch.tensor(self.prompt.token_ids, device=lm.device)

    def log_probs(
        self,
        vectors: torch.Tensor,
        texts: Sequence[Sequence[int]],
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """float32 [t]: the log-probability of each token of the texts, one text after another, temperature 1.

        vectors: float32 [n, d], one for each text; weights: of LoRAs, in place of the trained ones, by their names
        """
        device, start = self.lm.device, len(self._ids)
        sizes = [len(ids) for ids in texts]
        wide = np.zeros((len(texts), max(sizes)), np.int64)
        for line, ids in zip(wide, texts, strict=True):
            line[: len(ids)] = ids
        targets = torch.from_numpy(wide).to(device)
        real = torch.arange(max(sizes)) < torch.tensor(sizes)[:, None]
        real = real.to(device)
        with self.autocast():
            embeds = self.lm.embedding(torch.cat([self._ids.expand(len(texts), -1), targets[:, :-1]], 1))
            entering = at_scale(vectors.to(device), self.sidecar.injection).to(embeds.dtype)
            place = self.prompt.places[0]
            embeds = torch.cat([embeds[:, :place], entering[:, None], embeds[:, place + 1 :]], 1)
            hidden = self._decode(embeds, weights)[:, start - 1 :]
            logits = self.lm.logits(hidden[real])
        return -nn.functional.cross_entropy(logits.float(), targets[real], reduction="none")

    def _decode(self, embeds: torch.Tensor, weights: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
        given = {"inputs_embeds": embeds, **self.lm.uncached}
        if weights is None:
            hidden: torch.Tensor = self.lm.decoder(**given).last_hidden_state
            return hidden
        names = {module: name for name, module in self.lm.model.named_modules()}
        prefix = f"{names[self.lm.decoder]}."
        inside = {name.removeprefix(prefix): value for name, value in weights.items()}
        told: torch.Tensor = functional_call(self.lm.decoder, inside, (), given).last_hidden_state
        return told


class TrainedAR(Trained):
    """The AR: blocks 0..K and a head. head: float32 [d, d], the identity at first."""

    def __init__(self, lm: LanguageModel, directory: Path, rank: int | None, seed: int) -> None:
        """lm: the first K + 1 blocks of the base, without a head; directory: of the sidecar"""
        self.sidecar = read_sidecar(directory, "ar")
        super().__init__(lm, rank, seed)
        self._cut = lm.truncated(len(lm.blocks) - 1)
        if rank is None:  # the norm behind the last block plays no part and gets no gradient
            behind = {id(weight) for weight in _behind(lm)}
            self.parameters = {
                name: weight for name, weight in self.parameters.items() if id(weight) not in behind
            }
        self.head = nn.Parameter(torch.eye(lm.d_model, device=lm.device))
        self.parameters["value_head"] = self.head

    def reconstruct(self, texts: Sequence[str]) -> torch.Tensor:
        """The vector of each text, float32 [n, d] with gradients."""
        prompts = reconstructor_prompts(self.sidecar, self.lm.tokenizer, texts)
        sizes = [len(ids) for ids in prompts]
        wide = np.zeros((len(prompts), max(sizes)), np.int64)
        for line, ids in zip(wide, prompts, strict=True):
            line[: len(ids)] = ids
        device = self.lm.device
        with self.autocast():
            embeds = self.lm.embedding(torch.from_numpy(wide).to(device))
            hidden = self._cut.decoder(inputs_embeds=embeds, **self._cut.uncached).last_hidden_state
        last = torch.tensor(sizes, device=device) - 1
        return nn.functional.linear(hidden[torch.arange(len(sizes), device=device), last].float(), self.head)

    def changed(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Without the head."""
        for name, weight in super().changed():
            if name != "value_head":
                yield name, weight


def mse_nrm(vectors: torch.Tensor, reconstructed: torch.Tensor) -> torch.Tensor:
    """float32 [n]: 2 (1 - cos) of each vector and what was read back, float [n, d]."""
    cos = nn.functional.cosine_similarity(vectors.to(reconstructed.device), reconstructed, dim=-1)
    return 2 * (1 - cos)


def _behind(lm: LanguageModel) -> list[nn.Parameter]:
    """Parameters of the decoder that are neither of a block nor of the embedding."""
    used = {id(weight) for module in (*lm.blocks, lm.embedding) for weight in module.parameters()}
    return [weight for weight in lm.model.parameters() if id(weight) not in used]
