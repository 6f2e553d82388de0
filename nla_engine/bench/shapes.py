"""Models of a known shape with random weights, and a tokenizer whose texts have exactly as many tokens as characters.

Speed does not depend on the weights' values, so nothing is downloaded.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from nla_engine.errors import RequestError
from nla_engine.models.load import LanguageModel, load_model, wrap_model

MARKER = "㈎"
_FIRST_LETTER = 0x4E00
_SURROGATES = range(0xD800, 0xE000)


@dataclass(frozen=True)
class Shape:
    """A published architecture. layer: the block that its NLA reads, or one at two thirds of its depth."""

    config: Callable[[], Any]
    layer: int


def _qwen() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=152_064,
        hidden_size=3584,
        intermediate_size=18_944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32_768,
        tie_word_embeddings=False,
    )


def _llama() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
    )


def _gemma() -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        vocab_size=262_208,
        hidden_size=3840,
        intermediate_size=15_360,
        num_hidden_layers=48,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        sliding_window=1024,
        query_pre_attn_scalar=256,
        max_position_embeddings=131_072,
    )


def _gpt_oss() -> Any:
    from transformers import GptOssConfig

    return GptOssConfig(
        vocab_size=201_088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=24,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_local_experts=32,
        num_experts_per_tok=4,
        sliding_window=128,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
    )


def _qwen_moe() -> Any:
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,  # type: ignore[call-arg]
        num_experts=128,
        num_experts_per_tok=8,
        norm_topk_prob=True,
        max_position_embeddings=40_960,
        tie_word_embeddings=False,
    )


def _qwen_hybrid() -> Any:
    from transformers import Qwen3_5TextConfig

    return Qwen3_5TextConfig(
        vocab_size=248_320,
        hidden_size=5120,
        intermediate_size=17_408,
        num_hidden_layers=64,
        num_attention_heads=24,
        num_key_value_heads=4,
        head_dim=256,
        linear_num_key_heads=16,
        linear_num_value_heads=48,
        max_position_embeddings=262_144,
        tie_word_embeddings=False,
    )


def _deepseek_lite() -> Any:
    from transformers import DeepseekV2Config

    return DeepseekV2Config(
        vocab_size=102_400,
        hidden_size=2048,
        intermediate_size=10_944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        q_lora_rank=None,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        max_position_embeddings=163_840,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 40.0,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
            "original_max_position_embeddings": 4096,
        },
    )


def _llama_70b() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128_256,
        hidden_size=8192,
        intermediate_size=28_672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
    )


def _qwen_72b() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=152_064,
        hidden_size=8192,
        intermediate_size=29_568,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
        max_position_embeddings=32_768,
        tie_word_embeddings=False,
    )


def _gemma_27b() -> Any:
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        vocab_size=262_208,
        hidden_size=5376,
        intermediate_size=21_504,
        num_hidden_layers=62,
        num_attention_heads=32,
        num_key_value_heads=16,
        head_dim=128,
        sliding_window=1024,
        query_pre_attn_scalar=168,
        max_position_embeddings=131_072,
    )


def _tiny() -> Any:
    from transformers import Qwen2Config

    return Qwen2Config(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )


SHAPES = {
    "qwen2.5-7b": Shape(_qwen, 20),
    "llama3-8b": Shape(_llama, 20),
    "gemma3-12b": Shape(_gemma, 32),
    "gpt-oss-20b": Shape(_gpt_oss, 16),
    "qwen3-30b-a3b": Shape(_qwen_moe, 32),
    "qwen3.6-27b": Shape(_qwen_hybrid, 42),
    "deepseek-v2-lite": Shape(_deepseek_lite, 18),
    "llama3-70b": Shape(_llama_70b, 53),
    "qwen2.5-72b": Shape(_qwen_72b, 53),
    "gemma3-27b": Shape(_gemma_27b, 41),
    "tiny": Shape(_tiny, 2),
}


def find_shape(name: str) -> Shape:
    """The shape of that name. RequestError if there is none."""
    if name not in SHAPES:
        raise RequestError(f"--shape {name} is unknown: choose one of {', '.join(SHAPES)}")
    return SHAPES[name]


def random_model(name: str, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """A model of shape `name`, made on the device in this dtype, with transformers' own random initial weights."""
    from transformers import AutoModelForCausalLM

    config = find_shape(name).config()
    config.dtype = dtype
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return _for_bench(model, name)


def loaded_model(name: str, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """A checkpoint, with `character_tokenizer` in place of its own tokenizer."""
    return _for_bench(load_model(name, device=device, dtype=dtype).model, name)


def _for_bench(model: Any, name: str) -> LanguageModel:
    """Remove the end tokens, so that every request runs to its full length."""
    model.generation_config.eos_token_id = None
    vocabulary = model.get_decoder().get_input_embeddings().num_embeddings
    return wrap_model(model, character_tokenizer(vocabulary), name=name)


def twin(lm: LanguageModel) -> LanguageModel:
    """The same weights in other modules, since two runners cannot use one module at the same time. A model over several
    ranks is given back: its runners come one after the other."""
    if lm.ranks is not None:
        return lm
    shared = {id(tensor): tensor for tensor in (*lm.model.parameters(), *lm.model.buffers())}
    return wrap_model(copy.deepcopy(lm.model, shared), lm.tokenizer, name=lm.name)


def merged(lm: LanguageModel, directory: Path, rank: int) -> LanguageModel:
    """The model with an adapter (rsLoRA, random) over every linear layer of its blocks, both saved in `directory` and
    loaded from there, which merges them."""
    base, adapter = directory / "base", directory / "adapter"
    lm.model.config.save_pretrained(base)
    own = {name: weight.detach().cpu().clone() for name, weight in lm.model.named_parameters()}
    save_file(own, base / "model.safetensors")
    lm.tokenizer.save_pretrained(base)
    tensors: dict[str, torch.Tensor] = {}
    targets = set()
    for name, module in lm.model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            targets.add(name.rsplit(".", 1)[-1])
            out, width = module.weight.shape
            a, b = torch.randn(rank, width) * 0.01, torch.randn(out, rank) * 0.01
            tensors |= {
                f"base_model.model.{name}.lora_A.weight": a,
                f"base_model.model.{name}.lora_B.weight": b,
            }
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": True,
        "target_modules": sorted(targets),
        "base_model_name_or_path": str(base),
    }
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    model = load_model(str(adapter), device=lm.device, dtype=lm.dtype).model
    return wrap_model(model, lm.tokenizer, name=lm.name)


def character_tokenizer(vocabulary: int) -> Any:
    """Every character is one token and every token one character, for ids below `vocabulary`. No special tokens.

    So a text of n letters is n tokens, and n generated tokens give a text of n tokens.
    """
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    letters = ["\n", *map(chr, range(32, 127)), MARKER]
    code = _FIRST_LETTER
    while len(letters) < vocabulary:
        if code not in _SURROGATES:
            letters.append(chr(code))
        code += 1
    backend = Tokenizer(
        models.BPE(vocab={letter: i for i, letter in enumerate(letters[:vocabulary])}, merges=[])
    )
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False)
