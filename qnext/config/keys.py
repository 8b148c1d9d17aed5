"""Keys of config.json that do not belong to a family: which values they may have, and what happens otherwise.

Collected from the released and repackaged files of the three families, and from what transformers, vLLM,
llm-compressor, unsloth, ms-swift, TRL, mlx-lm and modelopt write.
"""

from __future__ import annotations

from typing import Any

# Nothing that they say changes a logit. Those of a quantisation are read by the checkpoint loader.
WITHOUT_EFFECT = frozenset(
    [
        "model_type",
        "architectures",
        "auto_map",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "output_router_logits",
        "quantization_config",
        "quantization",
        "compression_config",
        "_name_or_path",
        "name_or_path",
        "model_name",
        "return_dict",
        "use_return_dict",
        "output_hidden_states",
        "output_attentions",
        "chunk_size_feed_forward",
        "is_decoder",
        "problem_type",
        "id2label",
        "label2id",
        "num_labels",
        "finetuning_task",
        "torchscript",
        "tokenizer_class",
        "processor_class",
        "prefix",
        "task_specific_params",
        "decoder_start_token_id",
        "sep_token_id",
        "mask_token_id",
        "cls_token_id",
        "unk_token_id",
        "eod_token_id",
        "im_start_token_id",
        "im_end_token_id",
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
        "_attn_implementation",
        "_attn_implementation_internal",
        "_attn_implementation_autoset",
        "attn_implementation",
        "_experts_implementation",
        "_experts_implementation_internal",
        "experts_implementation",
        "_flash_attn_2_enabled",
        "use_flash_attn",
        "use_flash_attention",
        "use_kernels",
        "keys_to_ignore_at_inference",
        "hf_device_map",
        "device_map",
        "base_model_tp_plan",
        "base_model_pp_plan",
        "base_model_ep_plan",
        "base_model_fsdp_plan",
        "distributed_config",
        "transformers.js_config",
        "custom_pipelines",
        "_commit_hash",
        "_auto_class",
        "transformers_weights",
        "sub_configs",
        "is_composition",
        "has_no_defaults_at_init",
        "attribute_map",
        "ignore_keys_at_rope_validation",
        "use_bfloat16",
        "tf_legacy_loss",
        "remove_invalid_values",
        "gradient_checkpointing",
        "pretraining_tp",
        "seq_length",
        "max_seq_len",
        "max_seq_length",
        "model_max_length",
        "max_model_len",
        "unsloth_fixed",
        "unsloth_version",
        "unsloth_tiled_mlp",
        "base_model_name_or_path",
        "sliding_window",
        "max_window_layers",
        "head_dtype",
        "mamba_ssm_dtype",
        "ssm_state_dtype",
        "license",
        "language",
        "language_model_type",
        "text_config",
        "llm_config",
        "language_config",
        "vision_config",
        "audio_config",
    ]
)

# Used while training alone.
_TRAINING = (
    "attention_dropout",
    "attn_pdrop",
    "resid_pdrop",
    "embd_pdrop",
    "hidden_dropout",
    "hidden_dropout_prob",
    "mlp_dropout",
    "classifier_dropout",
    "dropout",
    "router_jitter_noise",
    "router_z_loss_coef",
    "aux_loss_alpha",
)

# Sampling belongs to generation_config.json; transformers 4 also wrote these, at the values given here.
_SAMPLING: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0,),
    "top_k": (50,),
    "top_p": (1.0,),
    "min_p": (0.0,),
    "typical_p": (1.0,),
    "do_sample": (False,),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "diversity_penalty": (0.0,),
    "repetition_penalty": (1.0,),
    "length_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "max_length": (20,),
    "min_length": (0,),
    "max_new_tokens": (),
    "early_stopping": (False,),
    "output_scores": (False,),
    "return_dict_in_generate": (False,),
    "bad_words_ids": (),
    "suppress_tokens": (),
    "begin_suppress_tokens": (),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "exponential_decay_length_penalty": (),
}

# Other values than these leave the logits as they are, but somebody who wrote them should hear that nothing follows.
UNUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    **dict.fromkeys(_TRAINING, ((0, False), "is for training and not used")),
    **{key: (values, "is sampling, which only generation_config.json decides") for key, values in _SAMPLING.items()},
}

# Other values than these would change the logits, and are not implemented.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish"),
    "activation_function": ("silu", "swish"),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "cross_attention_hidden_size": (),
    "tie_encoder_decoder": (False,),
    "pruned_heads": ({}, []),
    "is_causal": (True,),
    "use_bidirectional_attention": (False,),
    "mlp_bias": (False,),
    "qkv_bias": (False,),
    "o_bias": (False,),
    "use_bias": (False,),
    "lm_head_bias": (False,),
    "moe_bias": (False,),
    "use_qk_norm": (True,),
    "qk_norm": (True,),
    "qk_layernorm": (True,),
    "use_mrope": (False,),
    "rope_interleaved": (False,),
    "rope_interleave": (False,),
    "use_rotary_pos_emb": (True,),
    "use_dynamic_ntk": (False,),
    "use_logn_attn": (False,),
    "dual_chunk_attention_config": (),
    "sparse_attention_config": (),
    "first_k_dense_replace": (0,),
    "moe_layer_freq": (1,),
    "moe_layer_interval": (1,),
    "n_group": (1,),
    "topk_group": (1,),
    "topk_method": ("greedy",),
    "scoring_func": ("softmax",),
    "score_func": ("softmax",),
    "routed_scaling_factor": (1,),
    "moe_router_enable_expert_bias": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "embedding_multiplier": (1,),
    "residual_multiplier": (1,),
    "attention_multiplier": (),
    "scale_emb": (1,),
    "logit_softcapping": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "linear_conv_bias": (False,),
    "mtp_use_dedicated_embeddings": (False,),
}
# The same, where the neutral value is another in a hybrid than in the other families.
NEUTRAL_IN_HYBRID: dict[str, tuple[Any, ...]] = {
    "attention_output_gate": (True,),
    "zero_centered_norm": (True,),
    "mtp_uses_final_norm": (True,),
    "attn_output_gate": (True,),
    "use_gated_attention": (True,),
    "shared_expert_gate": (True,),
    "n_shared_experts": (1,),
    "num_shared_experts": (1,),
}
NEUTRAL_ELSEWHERE: dict[str, tuple[Any, ...]] = {
    "attention_output_gate": (False,),
    "zero_centered_norm": (False,),
    "attn_output_gate": (False,),
    "use_gated_attention": (False,),
    "shared_expert_gate": (False,),
    "n_shared_experts": (0,),
    "num_shared_experts": (0,),
    "shared_expert_intermediate_size": (0,),
}
# Why, where the key alone does not tell.
REASONS = {
    "mtp_use_dedicated_embeddings": "set it to false and remove the mtp tensors to use the model without",
}


def is_neutral(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Whether `value` is null or one of `allowed`. 1 and 1.0 are the same; True and 1 are not."""
    if value is None:
        return True
    return any(value == known and isinstance(value, bool) == isinstance(known, bool) for known in allowed)


def is_unused(value: Any, allowed: tuple[Any, ...]) -> bool:
    """The same as is_neutral, for keys that only cause a warning: empty lists and zeros count as neutral too."""
    return value in ([], {}) or is_neutral(value, allowed)
