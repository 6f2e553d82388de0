"""An AV and an AR by transformers alone, one vector or text at a time: what the engine's results are compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import yaml
from tiny import MARKER, byte_tokenizer
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM


def plain_text(
    av: Path, vector: np.ndarray, scale: float = 12.0, new_tokens: int = 24, message: str | None = None
) -> str:
    """The explanation that an AV writes of one vector [d], which enters at this norm, or of several [m, d] as they are.

    message: the user's, with the marker; None: the template of the sidecar
    """
    tokenizer = byte_tokenizer()
    sidecar = yaml.safe_load((av / "nla_meta.yaml").read_text())
    message = message or sidecar["prompt_templates"]["av"].replace("{injection_char}", MARKER)
    model = AutoModelForCausalLM.from_pretrained(av, dtype=torch.float32)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    embeds = model.get_input_embeddings()(torch.tensor([ids])).detach()
    v = torch.from_numpy(vector)
    rows = (v * (scale / v.norm()))[None] if v.ndim == 1 else v
    places = [i for i, id_ in enumerate(ids) if id_ == sidecar["tokens"]["injection_token_id"]]
    if len(places) == 1:  # all of them there
        embeds = torch.cat([embeds[:, : places[0]], rows[None].float(), embeds[:, places[0] + 1 :]], 1)
    else:
        embeds[0, places] = rows.float()
    out = model.generate(
        inputs_embeds=embeds,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=tokenizer.eos_token_id,
    )[0].tolist()
    written = tokenizer.decode(out[:-1] if out[-1] == tokenizer.eos_token_id else out)
    return written.split("</explanation>")[0].split("<explanation>")[-1].strip()


def plain_state(weights: Path, prompt: str, layer: int) -> np.ndarray:
    """float32 [d]: the residual stream behind block `layer` at the last token of a prompt."""
    model = AutoModel.from_pretrained(weights, dtype=torch.float32)
    last: list[torch.Tensor] = []
    blocks = next(module for module in model.modules() if isinstance(module, nn.ModuleList))
    blocks[layer].register_forward_hook(
        lambda _m, _i, output: last.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        model(torch.tensor([byte_tokenizer().encode(prompt)]))
    return last[0][0, -1].numpy()
