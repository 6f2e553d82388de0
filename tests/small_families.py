"""Tiny random models of every family of causal language models in transformers, and of those that see images. The lists
are transformers' own.

A configuration's defaults are shrunk by what their names mean. Of a list with an entry per block, entries of every kind
are kept. Windows are shorter than the prompts of the tests, so that they matter.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

BLOCKS = 4
VOCABULARY = 259
#: Most parameters of a model that counts as small.
MOST_PARAMETERS = 30_000_000
#: Sizes by the names that configurations give them.
SIZES: dict[str, int] = {
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"), BLOCKS),
    **dict.fromkeys(("decoder_layers", "num_decoder_layers", "encoder_layers", "num_encoder_layers"), BLOCKS),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "emb_dim", "embedding_dim", "embedding_size"), 64),
    **dict.fromkeys(
        ("word_embed_proj_dim", "input_embedding_size", "output_embedding_size", "lru_width"), 64
    ),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_decoder_attention_heads", "num_encoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads",), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "dim_head", "d_head", "swa_head_dim", "kv_channels", "linear_head_dim"), 16),
    **dict.fromkeys(("attention_head_size", "linear_key_head_dim", "linear_value_head_dim"), 16),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "dff", "d_inner"), 96),
    **dict.fromkeys(("dim_ff", "decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size"), 96),
    **dict.fromkeys(("dense_intermediate_size", "intermediate_size_mlp", "expert_ffn_hidden_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_experts_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_group", "zero_expert_num"), 1),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "model_max_length"), 512
    ),
    **dict.fromkeys(("max_target_positions",), 512),
    **dict.fromkeys(
        ("kv_lora_rank", "q_lora_rank", "o_lora_rank", "v_head_dim", "hidden_size_per_layer_input"), 16
    ),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "rotary_dim"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_heads"), 2),
    **dict.fromkeys(("linear_num_value_heads", "num_codebooks"), 4),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_chunk_size", "window_size"), 8),
    **dict.fromkeys(("attention_window_size", "local_attention"), 8),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(
        ("mamba_d_head", "mamba_head_dim", "mamba_headdim", "mamba_d_state", "ssm_state_size"), 16
    ),
    **dict.fromkeys(("state_size", "time_step_rank", "mamba_dt_rank", "adapter_rank"), 16),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "mamba_ngroups"), 1),
    **dict.fromkeys(("mamba_d_ssm", "attention_hidden_size"), 128),
    **dict.fromkeys(("vocab_size_per_layer_input", "unpadded_vocab_size", "vocab_size"), VOCABULARY),
    **dict.fromkeys(("index_n_heads", "max_window_layers"), 2),
    **dict.fromkeys(("index_head_dim", "query_pre_attn_scalar", "d_rel", "router_hidden_size"), 16),
    **dict.fromkeys(("ngram_vocab_size_base", "ple_embed_dim", "rel_extent", "hc_lowrank"), 64),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "num_nextn_predict_layers"), 1),
    **dict.fromkeys(("num_kv_shared_layers",), 0),
    **dict.fromkeys(("index_topk", "original_max_position_embeddings"), 512),
}
#: The same of what sees images, or hears. Of what it computes nothing is used.
SIGHT = {"depth": 2, "embed_dim": 64, "out_hidden_size": 64, "projection_dim": 64}
#: Ids of special tokens: within the small vocabulary, and none that a prompt or a reply is likely to hold.
IDS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "start_token_id": 1,
}
#: What a family needs besides, by its configuration.
MORE: dict[str, dict[str, Any]] = {
    "AfmoeConfig": {"global_attn_every_n_layers": 2},
    "GPTBigCodeConfig": {"num_key_value_heads": 1},
    "Gemma4TextConfig": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "global_head_dim": 32,
    },
    "GPTNeoConfig": {"attention_types": [[["global", "local"], 2]]},
    "OpenAIGPTConfig": {},
    "Mamba2Config": {"num_heads": 8},
    "FalconConfig": {"new_decoder_architecture": False, "multi_query": True},
    "Inkling2LoopTextConfig": {
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
    },
    "JambaConfig": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "BambaConfig": {"attn_layer_indices": [1, 3]},
    "CohereCompassTextConfig": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("sliding_attention", "full_attention")
        },
    },
    "DbrxConfig": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "DeepseekV2Config": {"num_experts_per_tok": 2, "topk_group": 1, "n_group": 1},
    "Dots1Config": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "GraniteMoeHybridConfig": {"layer_types": ["mamba", "attention"] * 2},
    "HunYuanDenseV1Config": {"head_dim": 16},
    "HunYuanMoEV1Config": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "Llama4TextConfig": {"floor_scale": 4, "attn_scale": 0.5},
    "MinistralConfig": {"head_dim": 16},
    "MoshiConfig": {"sliding_window": 300},
    "NemotronConfig": {"head_dim": 16, "num_key_value_heads": 2},
    **{
        name: {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}}
        for name in (
            *("Glm46VTextConfig", "Glm4vTextConfig", "GlmOcrTextConfig", "GlmgaTextConfig"),
            *("PaddleOCRTextConfig", "Qwen2VLTextConfig", "Qwen2_5_VLTextConfig"),
        )
    },
    "Glm4vMoeTextConfig": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [2, 1, 1],
        }
    },
    "RwkvConfig": {"attention_hidden_size": 64},
    "Lfm2Config": {"layer_types": ["conv", "full_attention"] * 2},
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention"] * 2},
    "Qwen4ExpTextConfig": {
        "indexer_n_heads": 2,
        "indexer_head_dim": 16,
        "indexer_kv_heads": 1,
        "indexer_budget": 512,
        "indexer_compress_ratio": 1,
    },
    "ReformerConfig": {"axial_pos_shape": [16, 32], "axial_pos_embds_dim": [16, 48], "is_decoder": True},
    "xLSTMConfig": {"qk_dim_factor": 1.0},
    "Zamba2Config": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
    "ZayaConfig": {"num_experts_per_tok": 1},
}


def configurations() -> list[type[Any]]:
    """Every configuration that transformers has a causal language model for, once, by name."""
    found = {config.__name__: config for config in MODEL_FOR_CAUSAL_LM_MAPPING}
    return [found[name] for name in sorted(found)]


def seeing() -> list[type[Any]]:
    """Every configuration of a model that gives text for images and text, and is not among the first, by name."""
    found = {config.__name__: config for config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING}
    return [found[name] for name in sorted(found.keys() - {each.__name__ for each in configurations()})]


def shrunk(config: type[Any], **more: Any) -> Any:
    """A small configuration of this class, changed by `more`. Raises what the library raises if these sizes do not go
    together."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = config()
        text = whole.get_text_config(decoder=True)
        name = next((key for key, value in vars(whole).items() if value is text), None)
        if name is None:
            return config(**_changes(whole) | more)
        small = type(text)(**_changes(text))
        others = {
            key: type(value)(**_changes(value, SIGHT))
            for key, value in vars(whole).items()
            if isinstance(value, transformers.PreTrainedConfig) and value is not text
        }
        return config(**{name: small}, **others)


def _changes(config: Any, more: dict[str, int] | None = None) -> dict[str, Any]:
    """What to construct a small configuration with, given one of the same class. more: other sizes."""
    held, sizes = vars(config), SIZES | (more or {})
    changes: dict[str, Any] = {
        key: size for key, size in sizes.items() if key in held and held[key] is not None
    }
    changes |= {key: id_ for key, id_ in IDS.items() if key in held and held[key] is not None}
    for size in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
        blocks = getattr(config, size, None)
        if isinstance(blocks, int):
            for key, value in held.items():
                if isinstance(value, list | tuple) and len(value) == blocks and blocks > 1:
                    changes[key] = _every_kind(list(value))
            break
    if held.get("qk_rope_head_dim") is not None:  # some call the part that rotates the head's size
        compressed = {"head_dim": 8, "qk_head_dim": 16, "num_key_value_heads": 4}
        changes |= {key: size for key, size in compressed.items() if key in held}
    if hasattr(config, "is_decoder"):
        changes["is_decoder"] = True
    if getattr(config, "is_encoder_decoder", False):
        changes["is_encoder_decoder"] = False
    rope = held.get("rope_parameters") or {}
    if "mrope_section" in rope:  # a third of what rotates, or nearly, for each of time, height and width
        half = int(changes.get("head_dim", 16) * rope.get("partial_rotary_factor", 1.0)) // 2
        section = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]
        changes["rope_parameters"] = rope | {"mrope_section": section}
    for key in ("moe_layers", "mlp_only_layers", "hybrid_layer_ids", "cross_attention_layers"):
        if key in held and isinstance(held[key], list):
            changes[key] = [1] if key != "cross_attention_layers" else []
    return changes | MORE.get(type(config).__name__, {})


def _every_kind(entries: list[Any]) -> list[Any]:
    """BLOCKS of the entries in their order: the first of each kind, then others from the beginning."""
    first = [entries.index(each) for i, each in enumerate(entries) if entries.index(each) == i][:BLOCKS]
    rest = [i for i in range(len(entries)) if i not in first]
    return [entries[i] for i in sorted(first + rest[: BLOCKS - len(first)])]


def small_model(config: type[Any], seed: int = 0, **more: Any) -> Any:
    """A float32 model, in evaluation mode, with weights so large that rounding decides nothing. more: changes of its
    configuration"""
    torch.manual_seed(seed)
    given = shrunk(config, **more)
    text = config in MODEL_FOR_CAUSAL_LM_MAPPING
    kind = transformers.AutoModelForCausalLM if text else transformers.AutoModelForImageTextToText
    with torch.device("meta"):
        size = sum(weight.numel() for weight in kind.from_config(given).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size / 1e6:.0f} million parameters: not small")
    model = kind.from_config(given).float().eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.mul_(3)
    return model
