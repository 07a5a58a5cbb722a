"""Projections known to be several matrices in one weight: which rows are q, k, v, or gate and up.

Known by the class that owns the projection, as each stores its parts in its own order; a class that is not known
stays whole, and the user may declare its split. Names of classes and not classes: transformers is never imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from layerwise.geometry.layout import Split

QKV = Split.equal("q", "k", "v")
KV = Split.equal("k", "v")
GATE_UP = Split.equal("gate", "up")
LSTM_GATES = Split.equal("input", "forget", "cell", "output")
GRU_GATES = Split.equal("reset", "update", "new")


def _whole_parts(owner: Any) -> Split:
    """``[all q | all k | all v]``."""
    return QKV


def _gate_up(owner: Any) -> Split:
    """``[all gate | all up]``."""
    return GATE_UP


def _up_gate(owner: Any) -> Split:
    return Split.equal("up", "gate")


def _input_gate(owner: Any) -> Split:
    return Split.equal("input", "gate")


def _gpt2(owner: Any) -> Split:
    return KV if getattr(owner, "is_cross_attention", False) else QKV


def _per_head(owner: Any) -> Split:
    """``[q1 k1 v1 | q2 k2 v2 | ...]``: one block a head."""
    heads = getattr(owner, "num_heads", None) or getattr(owner, "num_attention_heads", None)
    return Split.equal("q", "k", "v", blocks=heads or owner.config.num_attention_heads)


def _grouped(owner: Any) -> Split:
    """``[all q | all k | all v]`` with fewer heads for k and v."""
    key_value = owner.num_key_value_heads
    heads = getattr(owner, "num_heads", None) or owner.config.num_attention_heads
    return Split.of_sizes({"q": heads, "k": key_value, "v": key_value})


def _falcon(owner: Any) -> Split:
    if owner.new_decoder_architecture:  # a block per key-value head: its queries, then k and v
        return Split.of_sizes(
            {"q": owner.num_heads // owner.num_kv_heads, "k": 1, "v": 1}, owner.num_kv_heads
        )
    if owner.multi_query:
        return Split.of_sizes({"q": owner.num_heads, "k": 1, "v": 1})
    return Split.equal("q", "k", "v", blocks=owner.num_heads)


def _bigcode(owner: Any) -> Split:
    if owner.is_cross_attention:
        return KV
    if owner.multi_query:
        return Split.of_sizes({"q": owner.embed_dim, "k": owner.kv_dim, "v": owner.kv_dim})
    return Split.equal("q", "k", "v", blocks=owner.num_heads)


Rule = Callable[[Any], Split]

# (attribute of the projection, class that owns it) -> rule
_RULES: dict[tuple[str, str], Rule] = {
    ("c_attn", "GPT2Attention"): _gpt2,
    ("c_attn", "DecisionTransformerGPT2Attention"): _gpt2,
    ("c_attn", "ImageGPTAttention"): _gpt2,
    ("c_attn", "Attention"): _whole_parts,  # transformers' OpenAI GPT, nanoGPT's relatives
    ("c_attn", "CausalSelfAttention"): _whole_parts,  # nanoGPT
    ("c_attn", "GPTBigCodeAttention"): _bigcode,
    ("att_proj", "BarkSelfAttention"): _whole_parts,
    ("att_proj", "BarkSelfFlashAttention2"): _whole_parts,
    ("query_key_value", "GPTNeoXAttention"): _per_head,
    ("query_key_value", "GPTNeoXJapaneseAttention"): _per_head,
    ("query_key_value", "BloomAttention"): _per_head,
    ("query_key_value", "PersimmonAttention"): _per_head,
    ("query_key_value", "FalconAttention"): _falcon,
    ("query_key_value", "FalconFlashAttention2"): _falcon,
    ("in_proj", "DisentangledSelfAttention"): _per_head,  # DeBERTa
    ("qkv_proj", "MiniMaxLightningAttention"): _per_head,
    ("qkv_proj", "Phi3Attention"): _grouped,
    ("qkv_proj", "Phi4MultimodalAttention"): _grouped,
    ("Wqkv", "MptAttention"): _whole_parts,
    ("Wqkv", "ModernBertAttention"): _whole_parts,
    ("Wqkv", "DbrxAttention"): _grouped,
    ("kv_proj", "JetMoeAttention"): lambda owner: KV,
    ("Wi", "ModernBertMLP"): _input_gate,
    ("Wi", "ModernBertDecoderMLP"): _input_gate,
    ("gate_up_proj", "Phi4MultimodalAudioMLP"): _up_gate,
    ("gate_up_proj", "Zamba2MLP"): _gate_up,
    ("gate_up_proj", "DiaMLP"): _gate_up,
    ("gate_up_proj", "EsmFold2SwiGLU"): _gate_up,
    ("gate_up_proj", "MiniMaxM3VLDenseMLP"): _gate_up,
    **{
        ("gate_up_proj", f"{family}MLP"): _gate_up
        for family in ("Phi3", "Phi4Multimodal", "Glm", "Glm4", "Glm4vText", "GlmOcrText", "GlmImageText")
    },
    **{
        ("input_linear", f"{family}MLP"): _gate_up
        for family in ("GraniteMoeShared", "GraniteMoeHybrid", "GraniteMoeSWA")
    },
    # vision towers: the projection is reshaped to (..., 3, heads, d)
    **{
        ("qkv", owner): _whole_parts
        for owner in (
            "Attention",  # timm
            "BlipAttention",
            "Blip2Attention",
            "InstructBlipAttention",
            "InstructBlipVideoAttention",
            "MgpstrAttention",
            "SamVisionAttention",
            "SamHQVisionAttention",
            "SegGptAttention",
            "TimesformerSelfAttention",
            "VitDetAttention",
            "VisionAttention",  # Qwen2-VL
            "Qwen2_5_VLVisionAttention",
            "Qwen3VLVisionAttention",
            "Qwen3VLMoeVisionAttention",
            "Glm4vVisionAttention",
        )
    },
}


def known_split(owner: nn.Module, attribute: str) -> Split | None:
    """The split of the projection `owner.attribute`, None when it is one matrix or its class is not known."""
    for base in type(owner).__mro__:  # bases too: FSDP2 and parametrizations make a subclass of another name
        rule = _RULES.get((attribute, base.__name__))
        if rule is not None:
            try:
                return rule(owner)
            except AttributeError:  # another library's class of this name, or a version with other attributes
                return None
    return None


def looks_fused(attribute: str) -> bool:
    """Whether a projection's name says that it is fused: for a note to the user when its split is not known."""
    return "qkv" in attribute.lower() or attribute in (
        "c_attn",
        "att_proj",
        "query_key_value",
        "gate_up_proj",
    )


def recurrent_split(module: nn.Module, attribute: str) -> Split | None:
    """Gates of torch's recurrent nets, stacked along d_out in torch's documented order."""
    if attribute.startswith("weight_hr"):  # an LSTM's projection of its hidden state
        return None
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return LSTM_GATES
    return GRU_GATES if isinstance(module, (nn.GRU, nn.GRUCell)) else None
