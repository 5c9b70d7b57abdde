"""A tiny model of any causal `model_type` of transformers, made from its config by rules that know names of sizes.

`tiny_config("llama")` shrinks the type's default config: its widths, layers, heads, experts, and the lengths at which
attention changes (sliding windows, chunks, top-k), so that a text of 40 tokens passes them. A type that the rules
cannot shrink raises; `test_causal_types.py` counts these.
"""

from typing import Any

VOCAB_SIZE = 320
# Tokens at which attention that looks at a part of the text begins to leave some out.
_REACH = 8
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "n_vocab", "vocab_size_per_layer_input"), VOCAB_SIZE),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim_model", "emb_dim", "embedding_size", "dim"), 32),
    **dict.fromkeys(("word_embed_proj_dim", "embedding_dim", "input_embedding_size", "output_embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 4),
    **dict.fromkeys(("decoder_layers", "encoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "linear_num_value_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "linear_num_key_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "d_ff", "n_inner", "ffn_dim", "ffn_hidden_size", "dim_ff", "d_inner"), 48),
    **dict.fromkeys(("decoder_ffn_dim", "encoder_ffn_dim", "feed_forward_size", "mamba_intermediate"), 48),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size"), 16),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "intermediate_size_mlp"), 16),
    **dict.fromkeys(("head_dim", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "rotary_dim", "index_head_dim"), 8),
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_d_state", "mamba_d_ssm_heads", "state_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk"), 2),
    # Keys whose scores are equal (0 in every head) are chosen by place: with many heads there are few.
    "index_n_heads": 16,
    **dict.fromkeys(("n_group", "topk_group", "mamba_n_groups", "n_groups", "num_expert_group"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(
        ("sliding_window", "attention_chunk_size", "keep_window_size", "index_topk", "window_size"), _REACH
    ),
    **dict.fromkeys(("local_attention", "attention_window_size", "mamba_chunk_size", "chunk_size"), _REACH),
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
    "is_decoder": True,
}
# Sizes that belong to each other in a way that the names do not tell.
_OF_TYPE: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "zaya": {"num_experts_per_tok": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "window_size": _REACH},
    "xmod": {"default_language": "en_XX"},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma4_assistant": {"hidden_size_per_layer_input": 0},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "attention_head_size": 8},
    "dots1": {"n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "mamba_headdim": 8},
}


def tiny_config(model_type: str) -> Any:
    """The config of a tiny model of a type."""
    from transformers import AutoConfig

    return _shrunk(type(AutoConfig.for_model(model_type)), _OF_TYPE.get(model_type, {}))


def _shrunk(config_class: Any, extra: dict[str, Any]) -> Any:
    from transformers import PreTrainedConfig

    default = config_class()
    values = default.to_dict()
    other_names = getattr(config_class, "attribute_map", {})
    changes = {name: size for name, size in _SIZES.items() if name in values and name not in other_names}
    # A size that is off by default stays off; lists (one entry a layer) follow from the sizes or fail.
    keep_none = ("sliding_window", "attention_chunk_size", "n_group", "topk_group", "q_lora_rank")
    changes = {
        name: size
        for name, size in changes.items()
        if not isinstance(values[name], (list, tuple, dict)) and not (values[name] is None and name in keep_none)
    }
    # Latent attention has a key of its own for each head.
    if "kv_lora_rank" in changes and "num_key_value_heads" in changes:
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    for name in getattr(config_class, "sub_configs", {}):
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            changes[name] = _shrunk(type(part), {}).to_dict()
    return config_class(**(changes | extra))
