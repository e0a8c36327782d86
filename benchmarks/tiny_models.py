"""Language models of `transformers` from configurations small enough to build and run anywhere.

Nothing is downloaded: every architecture that `transformers` maps to a causal, masked or sequence-to-sequence
language model has a configuration class, and the defaults of that class are made small by the names of its
fields. Widths, heads and layers shrink together, so that what must divide still divides, and a list with an
entry per layer is cut to one layer of each kind. The standard deviation of the initial weights grows by the
root of what the width has lost, so that a layer's gain is what it is at the usual width: 0.02 suits 768
inputs and is next to nothing for 32. What a family needs beyond that is in `OVERRIDES`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
import transformers  # type: ignore[import-not-found]
from torch import Tensor, nn
from transformers import PreTrainedConfig  # type: ignore[import-not-found]
from transformers.models.auto import modeling_auto  # type: ignore[import-not-found]
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # type: ignore[import-not-found]

TASKS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
}

WIDTH, VOCABULARY, RESERVED = 32, 96, 16  # token ids below RESERVED are special ones, and are not drawn
ROWS, TOKENS = 4, 16

_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "emb_dim")
_DEVIATIONS = ("initializer_range", "init_std", "initializer_std")

# Field name (a regular expression for the whole of it) -> its small value; the first that fits counts.
SIZES: dict[str, int] = {
    r"(.*_)?vocab_size(_per_layer_input)?|encoder_hash_byte_group_vocab": VOCABULARY,
    r"(hidden_size_per_layer_input|embedding_size|emb_size)": 16,
    r"(.*_)?(hidden_size(_global)?|hidden_dim|d_model|n_embd|embed_dim|emb_dim|lru_width|output_dim)": WIDTH,
    r"adapter_(in_dim|out_dim|input_size)": WIDTH,
    r"(dim|dim_model|embedding_dim|output_hidden_size|word_embed_proj_dim|entity_emb_size)": WIDTH,
    r"(.*_)?(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|dff|dim_ff|mlp_dim|feed_forward_size)": 64,
    r"(n_inner|d_inner|intermediate_size_mlp)": 64,
    r"(.*_)?(num_(hidden_)?layers|encoder_layers|decoder_layers|n_layers?)": 2,
    r"(num_encoder_layers|num_decoder_layers|depth|num_self_attends_per_block)": 2,
    r"mamba_n_heads": 8,
    r"(.*_)?(num_attention_heads|attention_heads|num_heads|n_heads?)": 4,
    r"(linear_num_key_heads|linear_num_value_heads)": 4,
    r"(qk_rope_head_dim|rotary_dim)": 4,
    r"(.*_)?(head_dim|d_kv|dim_head|attention_head_size|kv_channels|mamba_d_head|d_head|mamba_headdim)": 8,
    r"d_latents": WIDTH,
    r"(.*_)?lora_rank|num_latents": 16,
    r"index_topk": 8,
    r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts)": 4,
    r"(num_experts_per_tok(en)?|moe_topk|moe_top_k|moe_k)": 2,
    r"(n_shared_experts|num_shared_experts|moe_num_shared_experts|n_group|topk_group|num_expert_group)": 1,
    r"n_groups|zero_expert_num": 2,
    r"(.*_)?(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length)": 64,
    r"(.*_)?(sliding_window(_size)?|attention_window(_size)?|local_attention|attention_chunk_size)": 8,
    r"(mamba_d_state|ssm_state_size|state_size)": 8,
    r"(mamba_)?chunk_size": 8,
    r"(image_size|crop_size)": 32,
    r"patch_size": 8,
    r"num_mel_bins": 16,
    r"num_filters": 4,
    r"(attn_layer_period|expert_layer_period|decoder_sparse_step|encoder_sparse_step)": 2,
    r"(attn_layer_offset|expert_layer_offset|first_k_dense_replace|num_dense_layers)": 1,
}
_SIZES = [(re.compile(pattern), value) for pattern, value in SIZES.items()]
_KV_HEADS = re.compile(r"(.*_)?(num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups)")

_GEMMA4 = {"global_head_dim": 8}
_START = {"decoder_start_token_id": 1, "pad_token_id": 0}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}

# What a family's configuration needs beyond that, mostly values that its class leaves open or ties together.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"use_cache": False},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {"num_hidden_layers": 3, "layer_types": None, "n_input_layers": 1, "n_output_layers": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "esmc": {"vocab_size": VOCABULARY},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 4},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "intermediate_size": 64,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
    },
    "gemma4_text": _GEMMA4,
    "gemma4_unified_text": _GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"head_dim": 4, "qk_head_dim": 12},
    "longt5": _START,
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "neomme": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "omniasr": {"initializer_range": 0.02 * math.sqrt(1024 / WIDTH)},  # that of its audio part
    "perceiver": {"max_position_embeddings": TOKENS},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {  # takes fresh entropy for its hashes and dropout, whatever the seed
        "hash_seed": 0,
        "hidden_dropout_prob": 0.0,
        "lsh_attention_probs_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0,
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 4,
    },
    "squeezebert": {"embedding_size": 32},
    "switch_transformers": _START,
    "t5": _START,
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "chunk_size": 16},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 6, "layers_block_type": None, "attention_hidden_size": 64},
}


def tiny_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a small configuration of the same class as `config`, which has its class's defaults."""
    values = {f.name: vars(config).get(f.name) for f in dataclasses.fields(config)}
    usual = {f.name: f.default for f in dataclasses.fields(config)}
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            changed[name] = tiny_config(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            small = _small(name, value, values)
            if small != value or usual[name] not in (value, None):  # None: derived from others
                changed[name] = small
        elif isinstance(value, float) and name in _DEVIATIONS:
            width = next((w for n in _WIDTHS if isinstance(w := values.get(n), int)), WIDTH)
            changed[name] = value * math.sqrt(max(width / WIDTH, 1.0))
    return type(config)(**(changed | _layers_of_each_kind(config) | OVERRIDES.get(config.model_type, {})))


def _small(name: str, value: int, beside: Mapping[str, Any]) -> int:
    if re.fullmatch(r".*_(token_id|token_index)", name):
        return value if value < RESERVED else 3 + sum(map(ord, name)) % (RESERVED - 3)
    if _KV_HEADS.fullmatch(name):
        heads = next(
            (beside[n] for n in ("num_attention_heads", "num_heads", "n_heads") if beside.get(n)), value
        )
        return 4 if value >= heads else min(value, 2)
    for pattern, small in _SIZES:
        if pattern.fullmatch(name):
            return min(value, small) if value > 0 else value
    return value


def _layers_of_each_kind(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the lists with an entry per layer, cut to one layer of each kind, and how many that is."""
    name = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    count = vars(config).get(name)
    values = {f.name: vars(config).get(f.name) for f in dataclasses.fields(config)}
    lists = {n: v for n, v in values.items() if isinstance(v, (list, tuple)) and len(v) == count}
    first: dict[Any, int] = {}
    for i, row in enumerate(zip(*lists.values(), strict=True)):
        first.setdefault(tuple(v for v in row if isinstance(v, str)), i)
    keep = sorted(first.values()) if len(first) > 1 else [0, 1]
    return {**{n: [v[i] for i in keep] for n, v in lists.items()}, name: len(keep)} if lists else {}


def tiny_model(architecture: str, task: str) -> nn.Module:
    """Return a small model with random weights, in train mode."""
    model_class = getattr(transformers, TASKS[task][architecture])
    if architecture == "encoder-decoder":
        halves = [tiny_config(CONFIG_MAPPING["bert"]()) for _ in range(2)]
        config = model_class.config_class.from_encoder_decoder_configs(*halves, **_START)
    else:
        config = tiny_config(CONFIG_MAPPING[architecture]())
    if model_class.config_class is not type(config):  # the language model alone of several that are joined
        config = config.get_text_config(decoder=task == "causal")
    if architecture == "reformer":
        config.is_decoder = task == "causal"
    return model_class(config).train()


def batch_for(architecture: str, task: str) -> dict[str, Tensor]:
    """Return a batch of random token ids, with labels."""
    tokens, labels = torch.randint(RESERVED, VOCABULARY, (2, ROWS, TOKENS))
    batch = {"input_ids": tokens, "labels": labels}
    if architecture == "git":
        batch["pixel_values"] = torch.randn(ROWS, 3, 32, 32)
    if architecture in ("musicgen", "musicgen_melody"):  # several tokens at a time, one of each codebook
        batch["input_ids"] = tokens.repeat(4, 1)
        batch["labels"] = labels[..., None].repeat(1, 1, 4)
    return batch
