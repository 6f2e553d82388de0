"""What the store's codecs cost on the rows of a real model, as the Markdown table of docs/codecs.md.

    python -m nla_engine.demo.smollm2 smollm2
    python benchmarks/codec_rows.py smollm2 [--layers 0 10 20 29]

Texts: prose (the pages of this repository, without the benchmark tables), chat (made-up requests and the model's own
greedy replies) and code (the package's source). Rows are read in float32 by a hook of plain transformers, without the
engine. Rows longer than 8 times the layer's median are left out, since the store keeps them exactly.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nla_engine.bench.chats import chats
from nla_engine.codec.rows import SINK_FACTOR, Codec, relative_errors

ROOT = Path(__file__).resolve().parent.parent
CODECS = ("int8", "int4", "bf16")
#: Tokens of a document, and documents of each kind of text.
LENGTH, DOCUMENTS = 512, 8
REPLY = 64


def documents(kind: str, model: Any, tokenizer: Any) -> list[list[int]]:
    """Token ids of DOCUMENTS texts; of chat twice as many, which are shorter."""
    if kind == "chat":
        return [_chat(text, model, tokenizer) for text in chats(2 * DOCUMENTS)]
    paths = (ROOT / "nla_engine").rglob("*.py")
    if kind == "prose":
        paths = (path for path in ROOT.glob("docs/*.md") if path.name != "benchmarks.md")
    text = "".join(path.read_text(encoding="utf-8") for path in sorted(paths))
    ids = tokenizer(text[: 8 * LENGTH * DOCUMENTS]).input_ids
    return [ids[start : start + LENGTH] for start in range(0, LENGTH * DOCUMENTS, LENGTH)]


def _chat(text: str, model: Any, tokenizer: Any) -> list[int]:
    messages = [{"role": "user", "content": text}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    out = model.generate(**prompt, max_new_tokens=REPLY, do_sample=False)
    return list(map(int, out[0]))


def read_rows(model: Any, texts: list[list[int]], layers: list[int]) -> dict[int, np.ndarray]:
    """The outputs of these blocks for every token, float32 [tokens, d_model]."""
    rows: dict[int, list[np.ndarray]] = {layer: [] for layer in layers}

    def keep(layer: int) -> Any:
        return lambda _module, _inputs, output: rows[layer].append(
            output[0].reshape(-1, output.shape[-1]).numpy()
        )

    hooks = [model.get_decoder().layers[layer].register_forward_hook(keep(layer)) for layer in layers]
    for ids in texts:
        model(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return {layer: np.concatenate(parts) for layer, parts in rows.items()}


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a checkpoint directory")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 10, 20, 29])
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    print("| text | layer | rows | kept exactly |" + "".join(f" {name}: mean | worst |" for name in CODECS))
    print("|---|---:|---:|---:|" + "---:|---:|" * len(CODECS))
    for kind in ("prose", "chat", "code"):
        for layer, rows in read_rows(model, documents(kind, model, tokenizer), options.layers).items():
            norm = np.linalg.norm(rows.astype(np.float64), axis=1)
            ordinary = rows[norm <= SINK_FACTOR * np.median(norm)]
            line = f"| {kind} | {layer} | {len(rows):,} | {len(rows) - len(ordinary)} |"
            for name in CODECS:
                error = relative_errors(Codec.named(name, rows.shape[1]), ordinary)
                line += f" {error.mean():.4f} | {error.max():.4f} |"
            print(line, flush=True)


if __name__ == "__main__":
    main()
