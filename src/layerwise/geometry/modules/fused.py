"""Projections known to be several matrices in one weight: which rows are q, k, v, or gate and up.

Known by the class that owns the projection, as each stores its parts in its own order; a class that is not known
stays whole, and the user may declare its split. Names of classes and not classes: transformers is never imported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from layerwise.geometry.split import Split

QKV = Split.equal("q", "k", "v")
KV = Split.equal("k", "v")
GATE_UP = Split.equal("gate", "up")
UP_GATE = Split.equal("up", "gate")
INPUT_GATE = Split.equal("input", "gate")
LSTM_GATES = Split.equal("input", "forget", "cell", "output")
GRU_GATES = Split.equal("reset", "update", "new")


def _whole_parts(owner: Any) -> Split | None:
    """``[all q | all k | all v]`` of one size; not known where keys have fewer heads or a size of their own."""
    own_sizes = any(hasattr(owner, name) for name in ("key_dim", "val_dim", "kv_dim", "value_dim"))
    heads, key_heads = _number(owner, _HEADS), _number(owner, _KEY_HEADS)
    fewer = heads is not None and key_heads is not None and heads != key_heads
    return None if own_sizes or fewer else QKV


def _fewer_key_heads(owner: Any) -> Split | None:
    """q, k, v one after the other by a class's own heads: where a class known for equal thirds has fewer for keys.

    Its numbers fill the projection, but they do not say that it keeps the order of its namesake.
    """
    heads, key_heads = _number(owner, _HEADS), _number(owner, _KEY_HEADS)
    if not heads or not key_heads or heads % key_heads or heads == key_heads:
        return None
    return Split.of_sizes({"q": heads, "k": key_heads, "v": key_heads})


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


def _query_gate(owner: Any) -> Split | None:
    """``[q1 gate1 | q2 gate2 | ...]`` where the projection is twice as wide as the heads; else it is one matrix."""
    heads = owner.config.num_attention_heads
    gated = owner.q_proj.out_features == 2 * heads * owner.head_dim
    return Split.equal("q", "gate", blocks=heads) if gated else None


def _falcon(owner: Any) -> Split:
    if owner.new_decoder_architecture:  # a block per key-value head: its queries, then k and v
        return Split.of_sizes({"q": owner.num_heads // owner.num_kv_heads, "k": 1, "v": 1}, owner.num_kv_heads)
    if owner.multi_query:
        return Split.of_sizes({"q": owner.num_heads, "k": 1, "v": 1})
    return Split.equal("q", "k", "v", blocks=owner.num_heads)


def _bigcode(owner: Any) -> Split:
    if owner.is_cross_attention:
        return KV
    if owner.multi_query:
        return Split.of_sizes({"q": owner.embed_dim, "k": owner.kv_dim, "v": owner.kv_dim})
    return Split.equal("q", "k", "v", blocks=owner.num_heads)


Rule = Split | Callable[[Any], Split | None]

#: How a projection's parts are stored, the attribute it is kept under, and the classes that own it.
_KNOWN: tuple[tuple[Rule, str, str], ...] = (
    (_gpt2, "c_attn", "GPT2Attention DecisionTransformerGPT2Attention ImageGPTAttention"),
    (_whole_parts, "c_attn", "Attention CausalSelfAttention"),  # OpenAI GPT; nanoGPT and its relatives
    (_bigcode, "c_attn", "GPTBigCodeAttention"),
    (_whole_parts, "att_proj", "BarkSelfAttention BarkSelfFlashAttention2"),
    (_per_head, "query_key_value", "GPTNeoXAttention GPTNeoXJapaneseAttention"),
    (_per_head, "query_key_value", "BloomAttention PersimmonAttention"),
    (_falcon, "query_key_value", "FalconAttention FalconFlashAttention2"),
    (_per_head, "in_proj", "DisentangledSelfAttention"),  # DeBERTa
    (_per_head, "qkv_proj", "MiniMaxLightningAttention"),
    (_grouped, "qkv_proj", "Phi3Attention Phi4MultimodalAttention"),
    (_whole_parts, "Wqkv", "MptAttention ModernBertAttention"),
    (_grouped, "Wqkv", "DbrxAttention"),
    (KV, "kv_proj", "JetMoeAttention"),
    (INPUT_GATE, "Wi", "ModernBertMLP ModernBertDecoderMLP"),
    (UP_GATE, "gate_up_proj", "Phi4MultimodalAudioMLP"),
    (GATE_UP, "gate_up_proj", "Phi3MLP Phi4MultimodalMLP GlmMLP Glm4MLP Glm4vTextMLP GlmOcrTextMLP"),
    (GATE_UP, "gate_up_proj", "GlmImageTextMLP Zamba2MLP DiaMLP EsmFold2SwiGLU MiniMaxM3VLDenseMLP"),
    (GATE_UP, "input_linear", "GraniteMoeSharedMLP GraniteMoeHybridMLP GraniteMoeSWAMLP"),
    (_query_gate, "q_proj", "Qwen3NextAttention Qwen3_5Attention Qwen3_5MoeAttention"),
    # Vision towers: the projection is reshaped to (..., 3, heads, d).
    (_whole_parts, "qkv", "Attention VisionAttention"),  # timm; Qwen2-VL
    (_whole_parts, "qkv", "BlipAttention Blip2Attention InstructBlipAttention"),
    (_whole_parts, "qkv", "InstructBlipVideoAttention MgpstrAttention SegGptAttention VitDetAttention"),
    (_whole_parts, "qkv", "SamVisionAttention SamHQVisionAttention TimesformerSelfAttention"),
    (_whole_parts, "qkv", "Qwen2_5_VLVisionAttention Qwen3VLVisionAttention Qwen3VLMoeVisionAttention"),
    (_whole_parts, "qkv", "Glm4vVisionAttention"),
)
_RULES = {(attribute, owner): rule for rule, attribute, owners in _KNOWN for owner in owners.split()}


def projection_split(owner: nn.Module, attribute: str, d_out: int) -> tuple[Split | None, str]:
    """The split of the projection `owner.attribute`, and a note on what is not certain.

    The split is None where it is one matrix, or it is not known how it is divided. A rule goes by the class's name, so it
    has to agree with the owner's own numbers.
    """
    split = _by_numbers(owner, attribute, d_out)
    if split is not None:
        return split, ""
    names = [(attribute, base.__name__) for base in type(owner).__mro__]  # FSDP2 and parametrizations make subclasses
    rule = next((_RULES[name] for name in names if name in _RULES), None)
    try:
        split = rule if rule is None or isinstance(rule, Split) else rule(owner)
    except (AttributeError, TypeError):  # another library's class of this name, or other attributes
        return None, fused_note(owner, attribute, d_out)
    if split is not None and split.divides(d_out):
        return split, ""
    split = _fewer_key_heads(owner) if rule is _whole_parts else None
    if split is not None and split.divides(d_out):
        return split, f"assumed {split}, as {type(owner).__name__} has fewer heads for keys; if not, declare its split"
    return None, fused_note(owner, attribute, d_out)


def _by_numbers(owner: Any, attribute: str, d_out: int) -> Split | None:
    """Projections whose owner, of whatever class, says how many rows each part has, when these fill the projection."""
    key, value = getattr(owner, "key_dim", None), getattr(owner, "value_dim", None)
    if attribute == "in_proj_qkv" and key and value and 2 * key + value == d_out:  # a gated delta net
        return Split.of_sizes({"q": key, "k": key, "v": value})
    latent, rotary = getattr(owner, "kv_lora_rank", None), getattr(owner, "qk_rope_head_dim", None)
    if attribute in ("kv_a_proj_with_mqa", "wkv_a") and latent and rotary and latent + rotary == d_out:
        return Split.of_sizes({"latent": latent, "k": rotary})
    key, value = getattr(owner, "qk_nope_head_dim", None), getattr(owner, "v_head_dim", None)
    heads = _number(owner, _HEADS)
    if attribute in ("kv_b_proj", "wkv_b") and key and value and heads and heads * (key + value) == d_out:  # MLA
        return Split.of_sizes({"k": key, "v": value}, heads)
    return None


def _number(owner: Any, names: Sequence[str]) -> int | None:
    """The first of these numbers that the owner, or its config, has."""
    places = (owner, getattr(owner, "config", None))
    values = [getattr(place, name, None) for place in places for name in names]
    return next((v for v in values if isinstance(v, int) and not isinstance(v, bool)), None)


_HEADS = ("num_heads", "n_head", "n_heads", "num_attention_heads", "heads", "nhead")
_KEY_HEADS = ("num_kv_heads", "n_kv_head", "n_kv_heads", "num_key_value_heads", "kv_heads", "n_query_groups")


#: Names of projections that hold several matrices in most of the models that use them.
_FUSED = {
    "c_attn", "att_proj", "query_key_value", "gate_up_proj", "gate_up", "in_proj", "in_proj_ba", "kv_b_proj", "kv_proj",
    "to_kv", "wkv", "wkv_b", "w12", "x_proj",
}  # fmt: skip


def fused_note(owner: Any, attribute: str, d_out: int) -> str:
    """A note on a projection that may be several matrices in one, "" where nothing points to it."""
    name = attribute.lower()
    if "qkv" in name or name in _FUSED:
        return "may be several matrices in one; if so, declare its split"
    gated = "glu" in type(owner).__name__.lower() and d_out % 2 == 0 and _reads_half(owner, d_out)
    if gated:
        return f"may be two matrices, as the class {type(owner).__name__} is a gated unit; if so, declare its split"
    if _comes_before_a_gate(owner, attribute):
        return "may be two matrices, as a gated unit comes next; if so, declare its split"
    if name in ("q_proj", "wq", "query") and _reads_half(owner, d_out):
        return "may be queries and gates, as what reads them takes half as many; if so, declare its split"
    return ""


def _reads_half(owner: nn.Module, d_out: int) -> bool:
    """Whether a projection beside it takes half of these outputs; a gated unit may have none beside it."""
    readers = [m for m in owner.children() if isinstance(m, nn.Linear) and m.out_features != d_out]
    holding = [m for m in owner.children() if _holds_parameters(m)]
    return any(m.in_features * 2 == d_out for m in readers) or len(holding) == 1


def _comes_before_a_gate(owner: nn.Module, attribute: str) -> bool:
    """Whether what comes next in a Sequential halves these outputs: torch's GLU, a GEGLU without parameters."""
    following = pairwise(owner.named_children()) if isinstance(owner, nn.Sequential) else ()
    after = next((module for (name, _), (_, module) in following if name == attribute), None)
    return after is not None and "glu" in type(after).__name__.lower() and not _holds_parameters(after)


def _holds_parameters(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def recurrent_split(module: nn.Module, attribute: str) -> Split | None:
    """Gates of torch's recurrent nets, stacked along d_out in torch's documented order."""
    if attribute.startswith("weight_hr"):  # an LSTM's projection of its hidden state
        return None
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return LSTM_GATES
    return GRU_GATES if isinstance(module, (nn.GRU, nn.GRUCell)) else None
