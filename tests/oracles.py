"""Tiny oracles for tests, in the layouts of their families, and what they answer by plain transformers with hooks.

The formats follow the description of their public code: adamkarvonen/activation_oracles (`dataset_utils.py`,
`steering_hooks.py`) and aypan17/latentqa (`dataset_utils.py`, `activation_utils.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from adapters import merged, save_adapter
from tiny import CHATML, tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerFast

END = "<|im_end|>"
NEW_TOKENS = 12


def oracle_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, one for a space and a question mark, two of ChatML: 259 in all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate([*alphabet, "Ġ?"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "?")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, normalized=False) for token in ("<|im_start|>", END)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END)
    tokenizer.chat_template = CHATML
    return tokenizer


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save_oracle(root: Path, architecture: str = "qwen2") -> Any:
    """base (a model) and oracle (a PEFT directory over it, with nothing else); the merged model.

    As the trainer of activation oracles leaves it: every linear layer of the blocks, rank 64.
    """
    tiny_model(architecture, seed=7).save_pretrained(root / "base")
    oracle_tokenizer().save_pretrained(root / "base")
    return _adapter(root / "oracle", root / "base", PROJECTIONS, 64, 128)


def save_decoder(root: Path) -> Any:
    """decoder, beside a base that is there, as LatentQA's trainer leaves it: rank 16, the head too; merged."""
    return _adapter(root / "decoder", root / "base", [*PROJECTIONS, "lm_head"], 16, 32)


def _adapter(directory: Path, base: Path, targets: list[str], rank: int, alpha: int) -> Any:
    pattern = rf"(.*\.)?({'|'.join(targets)})"
    tensors = save_adapter(
        directory, base, pattern, lambda name: rank, r=rank, lora_alpha=alpha, target_modules=targets
    )
    return merged(base, tensors, lambda name: alpha / rank)


@contextmanager
def hooked(model: Any, block: int, change: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """The output [1, T, d] of a block is changed in place, in every pass."""

    def hook(_module: Any, _inputs: Any, output: Any) -> None:
        change(output[0] if isinstance(output, tuple) else output)

    handle = model.get_decoder().layers[block].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def activation_oracle(
    model: Any, tokenizer: Any, layer: int, question: str, vectors: np.ndarray, new: int = NEW_TOKENS
) -> list[int]:
    """The tokens that it generates; vectors [n, d] are added at block 1, at the first n tokens ` ?`."""
    prompt = f"Layer: {layer}\n" + " ?" * len(vectors) + " \n" + question
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    mark = tokenizer.encode(" ?", add_special_tokens=False)
    assert len(mark) == 1
    places = [i for i, id_ in enumerate(ids) if id_ == mark[0]][: len(vectors)]
    assert places[-1] - places[0] == len(vectors) - 1

    def steer(hidden: torch.Tensor) -> None:
        if hidden.shape[1] > 1:
            there = hidden[0, places]
            hidden[0, places] = there + normalize(torch.tensor(vectors), dim=-1) * there.norm(
                dim=-1, keepdim=True
            )

    given = torch.tensor([ids])
    with hooked(model, 1, steer), torch.no_grad():
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=0,
        )
    return [int(id_) for id_ in out[0, len(ids) :]]


REFLECTS = (
    "{% for m in messages %}<|im_start|>{{ 'reflect' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>reflect\n{% endif %}"
)
#: The same conversation written out, for `--raw --prompt`.
LATENTQA = (
    "<|im_start|>user\n<INJECT><|im_end|>\n<|im_start|>reflect\nSure, I've analyzed the assistant.<|im_end|>\n"
    "<|im_start|>user\n<QUESTION><|im_end|>\n<|im_start|>reflect\n"
)


def latentqa(model: Any, tokenizer: Any, question: str, vectors: np.ndarray) -> list[int]:
    """The tokens that it generates. No cache: each step reads all, and writes the vectors over block 0's output."""
    dialog = [
        {"role": "user", "content": "? " * len(vectors)},
        {"role": "assistant", "content": "Sure, I've analyzed the assistant."},
        {"role": "user", "content": question},
    ]
    text = tokenizer.apply_chat_template(
        dialog, tokenize=False, add_generation_prompt=True, chat_template=REFLECTS
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    first = len(tokenizer("<|im_start|>user\n")["input_ids"])

    def write(hidden: torch.Tensor) -> None:
        hidden[0, first : first + len(vectors)] = torch.tensor(vectors)

    generated: list[int] = []
    with hooked(model, 0, write), torch.no_grad():
        for _ in range(NEW_TOKENS):
            logits = model(torch.tensor([ids + generated]), use_cache=False).logits
            generated.append(int(logits[0, -1].argmax()))
            if generated[-1] == tokenizer.eos_token_id:
                break
    return generated


def answer(tokenizer: Any, generated: list[int], new: int = NEW_TOKENS) -> tuple[str, str, int]:
    """(answer, status, n_tokens) of the table, for what was generated."""
    ended = generated[-1] == tokenizer.eos_token_id
    assert ended or len(generated) == new
    text = tokenizer.decode(generated[:-1] if ended else generated, skip_special_tokens=False)
    return text.strip(), "ok" if ended else "unclosed", len(generated)
