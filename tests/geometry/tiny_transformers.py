"""A tiny model of (nearly) every model type of transformers, made from its config, without a download."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers as tf
from transformers.models.auto import configuration_auto, modeling_auto

#: Tasks in the order of preference: the model of a type is that of the first task it has.
TASKS = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
    "MASKED_LM",
    "IMAGE_CLASSIFICATION",
    "SEQUENCE_CLASSIFICATION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "OBJECT_DETECTION",
    "CTC",
    "AUDIO_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "UNIVERSAL_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "MASK_GENERATION",
    "VIDEO_CLASSIFICATION",
    "VISUAL_QUESTION_ANSWERING",
    "QUESTION_ANSWERING",
    "TOKEN_CLASSIFICATION",
    "TEXT_TO_SPECTROGRAM",
    "TEXT_TO_WAVEFORM",
    "TIME_SERIES_PREDICTION",
    "MULTIMODAL_LM",
    "PRETRAINING",
)

_SIZES = {
    r"(n_layers?|num_layers|num_hidden_layers|(num_)?(en|de)coder_layers|depth|num_block|.*_num_hidden_layers)": 2,
    r"(hidden_size|d_model|n_embd|dim|embedding_size|word_embed_proj_dim|model_dim)": 64,
    r"(n_heads?|num_heads|num_attention_heads|((en|de)coder_)(attention_heads|num_heads)|num_query_heads)": 4,
    r"(num_key_value_heads|num_kv_heads|multi_query_group_num)": 2,
    r"(.*intermediate_size|ffn_dim|(en|de)coder_ffn_dim|d_ff|n_inner|dim_feedforward)": 48,
    r"(vocab_size|tgt_vocab_size|src_vocab_size)": 128,
    r"(max_position_embeddings|n_positions|max_seq_len|n_ctx)": 64,
    r"(head_dim|attention_head_size|d_kv)": 16,
    r"(num_experts|n_routed_experts|num_local_experts|moe_num_experts)": 4,
    r"(num_experts_per_tok|moe_topk|top_k|moe_k)": 2,
    r"(n_group|topk_group|num_mem_blocks)": 1,
    r"(kv_lora_rank|q_lora_rank)": 24,
    r"qk_rope_head_dim": 8,
    r"(qk_nope_head_dim|v_head_dim)": 16,
    r"(pad_token_id)": 0,
    r"(bos_token_id|decoder_start_token_id|cls_token_id)": 1,
    r"(eos_token_id|sep_token_id)": 2,
    r"(image_size)": 64,
    r"rotary_dim": 8,
}
_DERIVED = (
    "layer_types",
    "mlp_layer_types",
    "num_labels",
    "id2label",
    "label2id",
    "torch_dtype",
    "dtype",
    "model_type",
)


def model_types() -> list[str]:
    """All model types for which transformers has a model of one of the tasks."""
    return [name for name in configuration_auto.CONFIG_MAPPING_NAMES if model_class(name) is not None]


def model_class(model_type: str) -> str | None:
    """The name of the class of a type's model."""
    for task in TASKS:
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES").get(model_type)
        if names is not None:
            return names if isinstance(names, str) else names[0]
    return None


def tiny_config(config: Any) -> Any:
    """The config again with small sizes, those of the configs in it too."""
    changes: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        inner = getattr(config, name, None)
        if isinstance(inner, tf.PreTrainedConfig):
            changes[name] = tiny_config(inner)
        elif name not in _DERIVED and isinstance(value, int) and not isinstance(value, bool):
            sizes = [size for pattern, size in _SIZES.items() if re.fullmatch(pattern, name)]
            changes |= {name: sizes[-1]} if sizes else {}
    if "qk_rope_head_dim" in changes:  # MLA: keys for every head, and in some configs two names for the rotary part
        changes |= {"head_dim": changes["qk_rope_head_dim"], "num_key_value_heads": 4}
    return type(config)(**changes)


def tiny_model(model_type: str) -> torch.nn.Module:
    """A tiny model of a type. Raises whatever transformers raises where these sizes do not fit it."""
    name = model_class(model_type)
    assert name is not None
    config = tiny_config(tf.AutoConfig.for_model(model_type))
    torch.manual_seed(0)
    return getattr(tf, name)(config).eval()
