"""What the zoo knows of single config fields and families: the sizes it shrinks to, the exceptions, the variants."""

from __future__ import annotations

from typing import Any

VOCAB, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, EXPERTS, POSITIONS = 97, 32, 48, 4, 2, 8, 4, 64


def _same(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SMALL: dict[str, Any] = {
    **_same(VOCAB, "vocab_size vocab_size_per_layer_input decoder_vocab_size shape_vocab_size"),
    **_same(53, "pronunciation_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base"),
    **_same(HIDDEN, "hidden_size n_embd d_model emb_dim word_embed_proj_dim embedding_dim hidden_size_global"),
    **_same(HIDDEN, "adapter_in_dim adapter_out_dim adapter_input_size out_hidden_size projection_hidden_dim"),
    **_same(24, "embedding_size input_embedding_size output_embedding_size shape_embed_dim pronunciation_embed_dim"),
    **_same(2, "num_hidden_layers n_layer n_layers num_layers num_layers_per_stack depth num_blocks"),
    **_same(2, "decoder_layers encoder_layers num_decoder_layers num_encoder_layers"),
    **_same(HEADS, "num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads"),
    **_same(HEADS, "decoder_attention_heads encoder_attention_heads linear_num_value_heads linear_num_heads"),
    **_same(HEADS, "num_decoder_attention_heads num_encoder_attention_heads"),
    **_same(KV_HEADS, "num_key_value_heads num_kv_heads swa_num_key_value_heads kv_n_heads"),
    **_same(HEAD_DIM, "head_dim swa_head_dim global_head_dim kv_channels v_head_dim d_head dim_head"),
    **_same(HEAD_DIM, "qk_rope_head_dim qk_nope_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim"),
    **_same(HEAD_DIM, "index_head_dim attention_head_size"),
    **_same(2, "linear_num_key_heads"),
    **_same(8, "index_n_heads"),  # fewer, and most scores of a rectified indexer are zero: ties, broken by chance
    **_same(16, "q_lora_rank kv_lora_rank o_lora_rank hc_lowrank hidden_size_per_layer_input laurel_rank adapter_rank"),
    **_same(INNER, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim dff d_inner ffn_hidden_size dim_ff"),
    **_same(
        INNER, "intermediate_size_mlp dense_intermediate_size dense_mlp_intermediate_size feed_forward_size mlp_dim"
    ),
    **_same(24, "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size router_hidden_size"),
    **_same(24, "shared_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size"),
    **_same(EXPERTS, "num_experts n_routed_experts num_local_experts moe_num_experts"),
    **_same(2, "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k zero_expert_num"),
    **_same(1, "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_group"),
    **_same(1, "first_k_dense_replace num_dense_layers"),
    **_same(POSITIONS, "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length"),
    **_same(POSITIONS, "max_target_positions max_source_positions rel_extent"),
    **_same(6, "sliding_window sliding_window_size attention_window_size local_attention local_attention_window_len"),
    **_same(4, "window_size index_topk keep_window_size rotary_dim d_rel"),
    **_same(8, "mamba_d_state mamba_n_heads mamba_d_head state_size ssm_state_size mamba_num_heads mamba_head_dim"),
    **_same(8, "mamba_chunk_size chunk_size"),
    **_same(4, "time_step_rank mamba_dt_rank"),
    **_same(28, "image_size crop_size"),
    **_same(14, "patch_size"),
    **_same(16, "output_channels ext_pw_out_channel depthwise_separable_out_channel nemo_conv_channels"),
    **_same(0.15, "initializer_range init_std"),
    "is_decoder": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
"""Config field to small value. Weights start at a spread of 0.15, so that at this width no layer is nearly linear."""

LOCAL_GLOBAL = ["sliding_attention", "full_attention"]
LINEAR_FULL = ["linear_attention", "full_attention"]
SWA_NAMES = (
    "num_attention_heads",
    "num_key_value_heads",
    "qk_nope_head_dim",
    "v_head_dim",
    "q_lora_rank",
    "kv_lora_rank",
)
DOTS3 = {f"swa_{name}": SMALL[name] for name in SWA_NAMES} | {"swa_num_key_value_heads": HEADS, "swa_head_dim": 16}
QWEN4 = {
    **_same(2, "indexer_n_heads heads_per_ngram"),
    **_same(1, "indexer_kv_heads split_ngram_parts"),
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
    "ple_layer_ids": [1],
}
ASSISTANT = {
    "num_hidden_layers": 2,
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 0,
    "num_kv_shared_layers": 2,
}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": KV_HEADS, "clip_qkv": 1.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4}},
    "dots1": {"n_routed_experts": EXPERTS, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {"text_config": DOTS3},
    "dots3_note_text": DOTS3,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": LOCAL_GLOBAL * 2,
        "intermediate_size": INNER,
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
    },
    "gemma4": {"text_config": {"global_head_dim": 16}},
    "gemma4_assistant": {"default": {"text_config": ASSISTANT}, "text_config": ASSISTANT},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified": {"text_config": {"global_head_dim": 16}},
    "gemma4_unified_assistant": {"text_config": {"num_kv_shared_layers": 2}},
    "gemma4_unified_text": {"global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": LINEAR_FULL},
    "hunyuan_v1_dense": {"head_dim": HEAD_DIM},
    "hunyuan_v1_moe": {"head_dim": HEAD_DIM, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "n_groups": 2},
    "ministral": {"head_dim": HEAD_DIM, "layer_types": LOCAL_GLOBAL},
    "nemotron": {"num_key_value_heads": KV_HEADS},
    "nemotron_h": {"n_groups": 2},
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [8, 24], "attn_layers": ["local", "lsh"]},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid", "hybrid_sliding"], "sliding_window": 6},
}
"""Where the generic way fails or would leave a kind of layer out. "default" is what the class needs to exist at all."""

UNBUILT: dict[str, tuple[str, str]] = {
    "cpmant": ("not causal", "its prompt and text see each other, so there is no log π(y|x) by next tokens"),
    "gemma3n": ("requires the timm library", "its vision tower is timm's, which wants torchvision"),
    "gemma4_assistant": (
        "set of layer types producing a cache",
        "all its layers read a target model's keys and values",
    ),
    "gemma4_unified_assistant": (
        "set of layer types producing a cache",
        "all its layers read a target model's keys and values",
    ),
    "musicgen": ("invalid for input of size", "its rows are four streams of audio codes, not one of tokens"),
    "musicgen_melody": ("invalid for input of size", "its rows are four streams of audio codes, not one of tokens"),
    "reformer": ("put the model into training mode", "its reversible layers refuse a backward with dropout off"),
}
"""Family to (what the failure says, why it cannot be measured)."""

LORA_EXCLUDES: dict[str, str] = {
    **dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"), r".*\.(out_proj|conv1d)"),
    "deepseek_v4": r".*\.o_a_proj",
    **dict.fromkeys(("llama4", "llama4_text", "phimoe"), r".*\.router"),
}
"""Linear layers that PEFT refuses to adapt, or adapts wrongly (grouped, or returning tuples), as a pattern."""

FLOAT32_ONLY: dict[str, tuple[str, str]] = {
    "inkling2_text": ("to have the same dtype", "its router casts activations to float32 but not its weight"),
    "xglm": (
        "cannot be converted to type float without overflow",
        "its attention writes float64's minimum into float32",
    ),
}
"""Family to (what its failure in float64 says, why)."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bamba, biases": ("bamba", {"mamba_proj_bias": True, "attention_bias": True, "mlp_bias": True}),
    "bart, untied": ("bart", {"tie_word_embeddings": False, "scale_embedding": True}),
    "cohere, query-key norms": ("cohere", {"use_qk_norm": True}),
    "deepseek_v3, full queries": ("deepseek_v3", {"q_lora_rank": None}),
    "diffllama, biases": ("diffllama", {"attention_bias": True}),
    "falcon, alibi": ("falcon", {"alibi": True, "bias": True}),
    "falcon, new decoder": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": KV_HEADS}),
    "falcon_h1, normed": ("falcon_h1", {"mamba_rms_norm": True, "projectors_bias": True, "mamba_n_groups": 2}),
    "gemma4_text, experts": (
        "gemma4_text",
        {"enable_moe_block": True, "num_experts": EXPERTS, "top_k_experts": 2, "moe_intermediate_size": 24},
    ),
    "gemma4_text, shared keys": (
        "gemma4_text",
        {
            "num_hidden_layers": 4,
            "layer_types": LOCAL_GLOBAL * 2,
            "num_kv_shared_layers": 2,
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "use_double_wide_mlp": True,
        },
    ),
    "gpt_bigcode, many heads": ("gpt_bigcode", {"multi_query": False}),
    "gpt_neox, serial": ("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}),
    "gpt2, untied": ("gpt2", {"tie_word_embeddings": False, "scale_attn_by_inverse_layer_idx": True}),
    "jamba, dense": ("jamba", {"num_experts": 1, "num_experts_per_tok": 1, "mamba_proj_bias": True}),
    "llama, biases, tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama4_text, dense": ("llama4_text", {"interleave_moe_layer_step": 2, "attention_chunk_size": 6}),
    "mamba, biases": ("mamba", {"use_bias": True, "tie_word_embeddings": False}),
    "mixtral, sliding": ("mixtral", {"sliding_window": 4}),
    "mpt, no alibi": ("mpt", {"attn_config": {"alibi": False, "clip_qkv": 1.0}, "no_bias": False}),
    "olmo, clipped": ("olmo", {"clip_qkv": 0.5}),
    "opt, post-norm, projected": ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 24}),
    "phi, query-key norms": ("phi", {"qk_layernorm": True}),
    "qwen2, tied, sliding": (
        "qwen2",
        {"tie_word_embeddings": True, "use_sliding_window": True, "max_window_layers": 1},
    ),
    "stablelm, per-head norms": (
        "stablelm",
        {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True},
    ),
    "zamba2, adapters": (
        "zamba2",
        {"num_mem_blocks": 2, "use_shared_attention_adapter": True, "num_key_value_heads": HEADS, "use_mem_rope": True},
    ),
}
"""Other architectures that a family's config can ask for: name to (family, config fields)."""

TWINS: dict[str, str] = {
    "dots3_note": "dots3_note_text",
    "gpt-sw3": "gpt2",
    "internlm3": "llama",
    "iquestcoder": "llama",
    "llama4": "llama4_text",
    "qwen3_5": "qwen3_5_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen4_exp": "qwen4_exp_text",
}
"""Families whose causal LM is another's, class and parameters: measured once in full, not again in every way."""
