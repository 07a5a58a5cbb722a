"""Roles, orientations and splits against what models compute, on tiny random models."""

import contextlib

import pytest
import torch
import transformers as tf
from torch import nn

from layerwise.geometry import RowNorm, Sign, Spectral, describe, param_groups
from layerwise.geometry.describe import Row
from layerwise.geometry.layout import MatrixLayout, TransposedLayout, VectorLayout
from layerwise.geometry.module_kinds import is_hf_conv1d

SIZES = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 60,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = SIZES | {"num_key_value_heads": 2}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"n_layer": 2, "n_embd": 24, "n_head": 4, "n_positions": 32, "vocab_size": 60} | SPECIAL
BLOOM = {"n_layer": 2, "hidden_size": 24, "n_head": 4, "vocab_size": 60} | SPECIAL
T5 = {"vocab_size": 60, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 2, "num_heads": 4} | SPECIAL
VIT = {k: SIZES[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
MOE = GQA | {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 4, "head_dim": 6}

FUSED_ATTENTION = {
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "openai-gpt": lambda: tf.OpenAIGPTLMHeadModel(tf.OpenAIGPTConfig(**GPT2)),
    "gpt-neox": lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**SIZES)),
    "bloom": lambda: tf.BloomForCausalLM(tf.BloomConfig(**BLOOM)),
    "falcon-grouped": lambda: tf.FalconForCausalLM(tf.FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2)),
    "falcon-one-kv": lambda: tf.FalconForCausalLM(tf.FalconConfig(**SIZES, multi_query=True)),
    "falcon-per-head": lambda: tf.FalconForCausalLM(tf.FalconConfig(**SIZES, multi_query=False)),
    "phi3": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**GQA)),
    "mpt": lambda: tf.MptForCausalLM(tf.MptConfig(d_model=24, n_heads=4, n_layers=2, vocab_size=60, max_seq_len=32)),
    "persimmon": lambda: tf.PersimmonForCausalLM(tf.PersimmonConfig(**SIZES | {"hidden_size": 32}, qk_layernorm=False)),
    "bigcode-one-kv": lambda: tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**GPT2, multi_query=True)),
    "bigcode-per-head": lambda: tf.GPTBigCodeForCausalLM(tf.GPTBigCodeConfig(**GPT2, multi_query=False)),
    "modernbert": lambda: tf.ModernBertForMaskedLM(
        tf.ModernBertConfig(**SIZES, cls_token_id=1, sep_token_id=2, reference_compile=False)
    ),
    "deberta": lambda: tf.DebertaForMaskedLM(tf.DebertaConfig(**SIZES, relative_attention=False)),
    "torch": lambda: TorchAttention(),
}
EXPERTS = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**MOE)),
    "qwen3-moe": lambda: tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**MOE, moe_intermediate_size=20)),
    "gpt-oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**MOE)),
    "llama4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(**MOE, intermediate_size_mlp=40, interleave_moe_layer_step=1)
    ),
}


class TorchAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 24)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.head = nn.Linear(24, 60)

    def forward(self, ids):
        x = self.embed(ids)
        return (self.head(self.attention(x, x, x)[0]),)


class ConvNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, (3, 5))
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.up = nn.ConvTranspose2d(8, 4, 2)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.temperature = nn.Parameter(torch.tensor(1.0))
        self.fc = nn.Linear(4, 10)


class Net(nn.Module):
    """Parts in the order they are given."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


def rows(model: nn.Module, **options) -> dict[str, Row]:
    return {row.name: row for row in describe(model, **options).rows}


def on_meta(make) -> nn.Module:
    with torch.device("meta"):
        return make()


def roles(model: nn.Module) -> dict[str, str]:
    return {row.name: row.role for row in describe(model).rows}


@pytest.fixture(autouse=True)
def quiet():
    tf.logging.set_verbosity_error()
    torch.manual_seed(0)


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(3, 15).view(2, 6)
    with torch.no_grad():
        return model(ids)[0]


@contextlib.contextmanager
def changed(model: nn.Module, part: str, row: Row, how):
    """The units of `row` that end in `part` changed by `how`, for a while."""
    parameter = model.get_parameter(row.name)
    before = parameter.detach().clone()
    stacks = [stack.clone() for stack in row.layout.to_matrices(before)]
    matrices = [matrix for stack in stacks for matrix in stack]
    for unit, matrix in zip(row.units, matrices, strict=True):
        if unit.endswith(f"{part}]"):
            matrix.copy_(how(matrix))
    with torch.no_grad():
        parameter.copy_(row.layout.from_matrices(stacks, row.shape))
    yield
    with torch.no_grad():
        parameter.copy_(before)


def noisy(matrix: torch.Tensor) -> torch.Tensor:
    return matrix + torch.randn_like(matrix)


def in_float64(make) -> nn.Module:
    """The model in float64 and evaluation mode, with matrices of size one, so that changes are far above rounding."""
    model = make().double().eval()
    if hasattr(model, "config"):
        model.config._experts_implementation = "eager"  # the grouped kernels take no float64
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(std=0.3)
            elif "bias" in name:
                p.zero_()
    for name, p in model.named_parameters():
        if p.ndim == 2 and "bias" in name:
            p.data.zero_()
    return model


@pytest.mark.parametrize("family", FUSED_ATTENTION)
def test_fused_projections_split_where_the_model_splits_them(family):
    """With all queries zero attention is uniform, so keys do not matter and values do: any wrong row would show."""
    model = in_float64(FUSED_ATTENTION[family])
    table = rows(model)
    fused = [row for row in table.values() if any(unit.endswith("q]") for unit in row.units)]
    assert fused, f"no split found in {list(table)}"
    row = fused[0]
    with changed(model, "q", row, torch.zeros_like):
        uniform = logits(model)
        with changed(model, "k", row, noisy):
            torch.testing.assert_close(logits(model), uniform)
        with changed(model, "v", row, noisy):
            assert (logits(model) - uniform).abs().max() > 1e-6
    with changed(model, "k", row, noisy):
        assert (logits(model) - uniform).abs().max() > 1e-6


@pytest.mark.parametrize("family", [*EXPERTS, "phi3"])
def test_gate_and_up_split_where_the_model_splits_them(family):
    """A closed gate (silu(0) = 0) hides all of up."""
    model = in_float64((EXPERTS | FUSED_ATTENTION)[family])
    row = next(
        row
        for row in rows(model).values()
        if row.name.split(".")[-1].startswith("gate_up_proj") or row.name.endswith("gate_up_proj.weight")
    )
    assert any(unit.endswith("up]") for unit in row.units)
    with changed(model, "gate", row, torch.zeros_like):
        closed = logits(model)
        with changed(model, "up", row, noisy):
            torch.testing.assert_close(logits(model), closed)
    open_ = logits(model)
    assert (open_ - closed).abs().max() > 1e-6
    with changed(model, "up", row, noisy):
        assert (logits(model) - open_).abs().max() > 1e-6


@pytest.mark.parametrize("family", EXPERTS)
def test_experts_are_stacks_the_right_way_round(family):
    model = on_meta(EXPERTS[family])
    experts = [row for row in rows(model).values() if row.role == "experts"]
    up, down = experts[0], experts[1]
    hidden, inner = 24, (20 if family == "qwen3-moe" else 40)
    assert up.layout.shapes(up.shape) == ((8, inner, hidden),)
    assert down.layout.shapes(down.shape) == ((4, hidden, inner),)
    assert up.units[0].endswith("gate_up_proj[0,gate]")
    assert down.units[3].endswith("down_proj[3]")


def test_gpt_oss_biases_of_experts_are_a_vector_each():
    table = rows(on_meta(EXPERTS["gpt-oss"]))
    row = table["model.layers.0.mlp.experts.down_proj_bias"]
    assert (row.role, len(row.units)) == ("vector", 4)


@pytest.mark.parametrize("family", [*FUSED_ATTENTION, *EXPERTS, "t5", "bert", "llama"])
def test_every_projection_has_the_d_out_and_d_in_that_it_computes_with(family):
    others = {
        "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5)),
        "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES)),
        "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GQA)),
    }
    model = (FUSED_ATTENTION | EXPERTS | others)[family]().eval()
    seen = {}
    for name, module in model.named_modules():
        if type(module).forward is nn.Linear.forward or is_hf_conv1d(module):  # not what returns more, such as a router
            module.register_forward_hook(
                lambda m, args, out, name=name: seen.update({name: (out.shape[-1], args[0].shape[-1])})
            )
    if family == "t5":
        model(input_ids=torch.ones(1, 4, dtype=torch.long), decoder_input_ids=torch.ones(1, 4, dtype=torch.long))
    else:
        logits(model)
    table = {name: row for row in describe(model).rows for name in (row.name, *row.tied)}
    assert seen
    for name, (d_out, d_in) in seen.items():
        row = table[f"{name}.weight"]
        shapes = row.layout.shapes(row.shape)
        assert (sum(k * rows for k, rows, _ in shapes), shapes[0][2]) == (d_out, d_in), name


def test_gpt2():
    table = rows(on_meta(FUSED_ATTENTION["gpt2"]))
    head = table["transformer.wte.weight"]
    assert (head.role, head.tied, head.layout) == ("head", ("lm_head.weight",), MatrixLayout())
    assert head.geometry == Sign(per_input=True)
    assert table["transformer.wpe.weight"].layout == TransposedLayout()
    assert table["transformer.wpe.weight"].geometry == Sign()
    assert table["transformer.h.1.attn.c_attn.weight"].units == tuple(
        f"transformer.h.1.attn.c_attn.weight[{part}]" for part in "qkv"
    )
    assert table["transformer.h.0.mlp.c_fc.weight"].layout == TransposedLayout()
    assert table["transformer.h.0.mlp.c_fc.weight"].geometry == Spectral()
    assert {row.role for row in table.values() if len(row.shape) == 1} == {"vector"}
    assert not any(row.note for row in table.values())


def test_gpt2_cross_attention_is_k_and_v():
    table = rows(on_meta(lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2, add_cross_attention=True))))
    assert [unit[-3:] for unit in table["transformer.h.0.crossattention.c_attn.weight"].units] == [
        "[k]",
        "[v]",
    ]
    assert len(table["transformer.h.0.crossattention.q_attn.weight"].units) == 1


def test_untied_head_and_embedding_are_two():
    table = roles(on_meta(lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**GQA))))
    assert table["model.embed_tokens.weight"] == "embedding"
    assert table["lm_head.weight"] == "head"
    assert sum(role == "head" for role in table.values()) == 1


def test_t5_shared_embedding_is_one_row_with_all_its_names():
    table = rows(on_meta(lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5))))
    assert table["shared.weight"].role == "head"
    assert set(table["shared.weight"].tied) == {
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "lm_head.weight",
    }
    untied = rows(on_meta(lambda: tf.T5EncoderModel(tf.T5Config(**T5))))
    assert untied["shared.weight"].role == "embedding"
    assert untied["shared.weight"].tied == ("encoder.embed_tokens.weight",)


@pytest.mark.parametrize(
    ("make", "head"),
    [
        (lambda: tf.BertForSequenceClassification(tf.BertConfig(**SIZES)), "classifier.weight"),
        (lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES)), "bert.embeddings.word_embeddings.weight"),
        (lambda: tf.BertModel(tf.BertConfig(**SIZES)), None),  # ends in a pooler, which is hidden
        (lambda: tf.GPT2Model(tf.GPT2Config(**GPT2)), None),
        (lambda: tf.GPT2ForSequenceClassification(tf.GPT2Config(**GPT2)), "score.weight"),
        (
            lambda: tf.ViTForImageClassification(tf.ViTConfig(**VIT, image_size=16, patch_size=4)),
            "classifier.weight",
        ),
        (lambda: Net(model=tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2))), "model.transformer.wte.weight"),
        (lambda: Net(body=tf.BertModel(tf.BertConfig(**SIZES)), out=nn.Linear(24, 3)), "out.weight"),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), "2.weight"),
        (lambda: ConvNet(), "fc.weight"),
        (lambda: Net(rnn=nn.LSTM(4, 8), out=nn.Linear(8, 2)), "out.weight"),
        (lambda: nn.LSTM(4, 8), None),
        (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), None),
        (lambda: nn.MultiheadAttention(8, 2), None),
        (
            lambda: Net(fc=nn.Linear(8, 4), decoder=nn.ConvTranspose2d(4, 3, 4)),
            None,
        ),  # an autoencoder's bottleneck
        (lambda: Net(blocks=nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))])), None),
        (lambda: nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3))), None),
        (
            lambda: nn.Sequential(
                *(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(3)), nn.Sequential(nn.Linear(8, 2))
            ),
            "3.0.weight",
        ),
    ],
)
def test_where_the_head_is(make, head):
    found = [name for name, role in roles(on_meta(make)).items() if role == "head"]
    assert found == ([head] if head else [])


def test_head_of_a_wrapped_model():
    model = FUSED_ATTENTION["gpt-neox"]()
    assert roles(torch.compile(model))["lm_head.weight"] == "head"


def test_tie_by_assignment_without_get_output_embeddings():
    model = Net(embed=nn.Embedding(20, 8), mix=nn.Linear(8, 8), out=nn.Linear(8, 20, bias=False))
    model.out.weight = model.embed.weight
    table = rows(model)
    assert (table["embed.weight"].role, table["embed.weight"].tied) == ("head", ("out.weight",))
    assert table["embed.weight"].layout == MatrixLayout()  # logits = W x: d_out is the vocabulary
    # and where the rule finds no head, the tie itself tells
    model = Net(out=nn.Linear(8, 20, bias=False), embed=nn.Embedding(20, 8), last=nn.Conv1d(8, 8, 1))
    model.embed.weight = model.out.weight
    assert rows(model)["out.weight"].role == "head"


def test_vit_tables_and_patches():
    model = on_meta(lambda: tf.ViTForImageClassification(tf.ViTConfig(**VIT, image_size=16, patch_size=4)))
    table = rows(model)
    assert table["vit.embeddings.cls_token"].role == "vector"
    patches = table["vit.embeddings.patch_embeddings.projection.weight"]
    assert (patches.role, patches.geometry) == ("conv", Spectral(taps=16))
    positions = table["vit.embeddings.position_embeddings"]
    assert positions.role == "embedding"
    assert (positions.how, positions.note) == ("forward", "")
    assert positions.layout.shapes(positions.shape) == ((1, 24, 17),)
    assert len(positions.units) == 1


def test_conv_net():
    table = rows(on_meta(ConvNet))
    assert table["stem.weight"].geometry == Spectral(taps=15)
    assert table["stem.weight"].layout.shapes((8, 3, 3, 5)) == ((1, 8, 45),)
    depthwise = table["depthwise.weight"]  # a filter for each channel, all in one unit
    assert depthwise.layout.shapes(depthwise.shape) == ((1, 8, 9),)
    assert (depthwise.units, depthwise.geometry) == (("depthwise.weight",), RowNorm())
    assert table["up.weight"].layout.shapes((8, 4, 2, 2)) == ((1, 4, 32),)
    for name in ("norm.weight", "scale", "temperature", "stem.bias"):
        assert (table[name].role, table[name].layout) == ("vector", VectorLayout())
    assert table["temperature"].layout.shapes(()) == ((1, 1, 1),)


@pytest.mark.parametrize(
    ("module", "gates"),
    [(nn.LSTM(5, 7), 4), (nn.GRU(5, 7), 3), (nn.RNN(5, 7), 1), (nn.GRUCell(5, 7), 3)],
    ids=str,
)
def test_recurrent_gates_are_units(module, gates):
    for row in describe(module).rows:
        if row.role == "hidden":
            assert row.layout.shapes(row.shape) == ((gates, 7, row.shape[1]),)


def test_lstm_forget_gate_is_the_one_that_forgets():
    """The second quarter: with a huge negative forget gate the cell's past does not matter."""
    module = nn.LSTMCell(1, 3).double()
    row = rows(module)["weight_ih"]
    with changed(module, "forget", row, lambda m: torch.full_like(m, -1e4)):
        x, h = torch.ones(1, 1).double(), torch.zeros(1, 3).double()
        torch.testing.assert_close(module(x, (h, torch.ones(1, 3).double()))[1], module(x, (h, h))[1])


def test_norms_of_any_shape_are_vectors():
    model = Net(norm=nn.LayerNorm((3, 4, 4)), out=nn.Linear(4, 2))
    assert rows(model)["norm.weight"].role == "vector"


def test_a_projection_whose_class_says_norm_is_a_projection():
    class NormedLinear(nn.Linear):
        pass

    class LayerNormLinear(nn.Module):  # as transformer_engine's: a gain and a matrix in one module
        def __init__(self):
            super().__init__()
            self.layer_norm_weight = nn.Parameter(torch.ones(8))
            self.weight = nn.Parameter(torch.zeros(16, 8))

    class HeadRMSNorm(nn.Module):  # a gain for every head
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 8))

    table = rows(Net(a=NormedLinear(8, 8), b=LayerNormLinear(), c=HeadRMSNorm(), out=nn.Linear(8, 2)))
    assert table["a.weight"].role == table["b.weight"].role == "hidden"
    assert "assumed" in table["b.weight"].note
    assert table["b.layer_norm_weight"].role == table["c.weight"].role == "vector"


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_torchs_older_weight_norm():
    old = nn.utils.weight_norm
    table = rows(Net(conv=old(nn.Conv1d(3, 8, 3)), hidden=old(nn.Linear(8, 8)), out=nn.Linear(8, 2)))
    for name, role in (("conv", "conv"), ("hidden", "hidden")):
        assert table[f"{name}.weight_g"].role == "vector"
        assert table[f"{name}.weight_v"].role == role


class Standardised(nn.Conv2d):
    """A convolution of an NFNet: its weight is normalised, and each output has a gain."""

    def __init__(self):
        super().__init__(3, 8, 3)
        self.gain = nn.Parameter(torch.ones(8, 1, 1, 1))
        self.mix = nn.Parameter(torch.ones(8, 2))

    def forward(self, x):
        return nn.functional.conv2d(x, nn.functional.normalize(self.weight) * self.gain, self.bias)


class Scaled(nn.Linear):
    def __init__(self):
        super().__init__(8, 4)
        self.scale = nn.Parameter(torch.ones(4, 1))

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


@pytest.mark.parametrize("batch", [None, torch.ones(2, 3, 3, 3)])
def test_what_a_derived_layer_holds_beside_its_weight_is_not_its_weight(batch):
    table = rows(nn.Sequential(Standardised(), nn.Flatten(), Scaled()), batch=batch)
    assert table["0.gain"].role == table["2.scale"].role == "vector"
    assert (table["0.weight"].role, table["2.weight"].role) == ("conv", "head")
    assert table["0.mix"].note == (
        "assumed a matrix stored (out, in)" if batch is None else "took no part in the forward pass"
    )


def test_attention_with_separate_projections_and_bilinear():
    table = rows(Net(a=nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True), b=nn.Bilinear(3, 4, 5)))
    assert table["a.k_proj_weight"].layout == MatrixLayout()
    assert table["a.bias_k"].role == "vector"
    assert table["b.weight"].layout.shapes((5, 3, 4)) == ((1, 5, 12),)
    assert not any(row.note for row in table.values())


def test_parameters_of_unknown_modules_are_assumed_and_say_so():
    model = Net(out=nn.Linear(4, 2))
    model.mystery = nn.Parameter(torch.zeros(3, 4))
    model.stack = nn.Parameter(torch.zeros(2, 3, 4))
    model.pos_embed = nn.Parameter(torch.zeros(3, 4))
    model.gate_bias = nn.Parameter(torch.zeros(2, 3))
    table = rows(model)
    assert (table["mystery"].role, table["stack"].role) == ("hidden", "experts")
    assert (table["pos_embed"].role, table["pos_embed"].layout) == ("embedding", TransposedLayout())
    assert table["gate_bias"].role == "vector"
    assert all("assumed" in table[name].note for name in ("pos_embed", "gate_bias"))
    assert "assumed" in table["mystery"].note
    assert "assumed" in table["stack"].note
    assert "4 not certain" in str(describe(model))


def test_unknown_fused_projection_stays_whole_and_says_so():
    block = Net(qkv_proj=nn.Linear(8, 24))
    row = rows(Net(block=block, out=nn.Linear(8, 2)))["block.qkv_proj.weight"]
    assert len(row.units) == 1
    assert "declare its split" in row.note


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(8, 2, 64), (6, 1, 48), (4, 2, 16)])
def test_a_known_class_with_fewer_heads_for_keys_is_split_by_its_own_numbers_and_says_so(heads, key_heads, width):
    class CausalSelfAttention(nn.Module):
        def __init__(self, rows):
            super().__init__()
            self.n_head, self.n_kv_head = heads, key_heads
            self.c_attn = nn.Linear(width, rows, bias=False)

    size = width // heads
    fits = CausalSelfAttention((heads + 2 * key_heads) * size)
    row = rows(Net(attn=fits, out=nn.Linear(8, 2)))["attn.c_attn.weight"]
    assert row.layout.split.rows(row.shape[0]) == (width, key_heads * size, key_heads * size)
    assert "declare its split" in row.note
    other = CausalSelfAttention((heads + 2 * key_heads) * size + 1)  # its numbers say nothing of this one
    row = rows(Net(attn=other, out=nn.Linear(8, 2)))["attn.c_attn.weight"]
    assert len(row.units) == 1
    assert "declare its split" in row.note


def test_weight_norm_and_spectral_norm_are_seen_through():
    model = Net(
        conv=nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        hidden=nn.utils.parametrizations.spectral_norm(nn.Linear(5, 6)),
        out=nn.Linear(6, 2),
    )
    table = rows(model)
    assert table["conv.parametrizations.weight.original0"].role == "vector"
    conv = table["conv.parametrizations.weight.original1"]
    assert (conv.role, conv.geometry) == ("conv", Spectral(taps=9))
    assert table["hidden.parametrizations.weight.original"].role == "hidden"


def test_lora_on_gpt2():
    peft = pytest.importorskip("peft")
    model = FUSED_ATTENTION["gpt2"]()
    config = peft.LoraConfig(r=2, target_modules=["c_attn", "wte"], fan_in_fan_out=True)
    description = describe(peft.get_peft_model(model, config))
    table = {row.name: row for row in description.rows}
    assert {row.role for row in description.rows} == {"lora_A", "lora_B"}
    assert len(description.frozen) > 20
    prefix = "base_model.model.transformer."
    shapes = {
        f"{prefix}h.0.attn.c_attn.lora_A.default.weight": (1, 2, 24),  # 24 -> 2
        f"{prefix}h.0.attn.c_attn.lora_B.default.weight": (1, 72, 2),  # 2 -> 72
        f"{prefix}wte.lora_embedding_A.default": (1, 2, 60),  # a one-hot of 60 -> 2
        f"{prefix}wte.lora_embedding_B.default": (1, 24, 2),
    }
    for name, shape in shapes.items():
        assert table[name].layout.shapes(table[name].shape) == (shape,)


@pytest.mark.parametrize("shape", [(2, 6), (4, 2, 6)])
def test_factors_that_their_layer_holds_itself_are_known_at_the_top_of_a_model(shape):
    class Adapted(nn.Linear):  # as loralib's
        def __init__(self):
            super().__init__(6, 5)
            self.lora_A, self.lora_B = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(5, 2))

    for model, prefix in ((Adapted(), ""), (nn.Sequential(Adapted()), "0.")):
        row = next(row for row in describe(model).rows if row.name == f"{prefix}lora_A")
        assert (row.role, len(row.units), bool(row.note)) == (
            "lora_A",
            shape[0] if len(shape) == 3 else 1,
            len(shape) == 3,
        )


def test_peft_with_a_trained_head_and_known_splits_under_the_wrapper():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query_key_value"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(FUSED_ATTENTION["gpt-neox"](), config)
    for p in model.parameters():
        p.requires_grad_(True)
    table = rows(model)
    assert table["base_model.model.lm_head.modules_to_save.default.weight"].role == "head"
    base = table["base_model.model.gpt_neox.layers.0.attention.query_key_value.base_layer.weight"]
    assert len(base.units) == 3


@pytest.mark.parametrize("batch", [None, torch.ones(2, 36)])
def test_factors_of_lokr_and_loha_are_those_of_adapters_and_of_a_kronecker_product_none_is_a_gain(batch):
    peft = pytest.importorskip("peft")

    def adapted(config):
        network = nn.Sequential(nn.Linear(36, 48), nn.ReLU(), nn.Linear(48, 5))
        table = rows(peft.get_peft_model(network, config(r=2, target_modules=["0"])), batch=batch)
        return {name.split(".")[-2]: (row.role, str(row.layout), bool(row.note)) for name, row in table.items()}

    a, b = ("lora_A", "out,in", False), ("lora_B", "out,in", False)
    assert adapted(peft.LoHaConfig) == {"hada_w1_a": b, "hada_w1_b": a, "hada_w2_a": b, "hada_w2_b": a}
    kronecker = {"lokr_w1": ("hidden", "out,in", True), "lokr_w2_a": b, "lokr_w2_b": a}
    assert adapted(peft.LoKrConfig) == kronecker


@pytest.mark.parametrize("batch", [None, torch.arange(6).view(1, 6)])
def test_rows_that_peft_puts_in_the_place_of_a_tables_are_a_table(batch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["query_key_value"], trainable_token_indices=[1, 2])
    table = rows(peft.get_peft_model(FUSED_ATTENTION["gpt-neox"](), config), batch=batch)
    (name,) = (name for name in table if "trainable_tokens_delta" in name)
    assert (table[name].role, str(table[name].layout), table[name].note) == ("embedding", "in,out", "")


def test_group_order_and_contents():
    model = on_meta(FUSED_ATTENTION["gpt2"])
    groups = param_groups(model)
    assert [group["role"] for group in groups] == ["head", "embedding", "vector", "hidden", "hidden"]
    grouped = {name: p for group in groups for name, p in group["params"]}
    assert all(grouped[name] is p for name, p in model.named_parameters())
    assert grouped.keys() == dict(model.named_parameters()).keys()


def test_a_config_without_a_vocabulary_is_no_error():
    config = tf.CanineConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_hash_buckets=64
    )
    assert not hasattr(config, "vocab_size")
    table = rows(tf.CanineForSequenceClassification(config))
    assert table["classifier.weight"].role == "head"


@pytest.mark.parametrize("names", [("kv_a_proj_with_mqa", "kv_b_proj"), ("wkv_a", "wkv_b")])
def test_projections_of_latent_attention_are_in_parts_by_their_owners_numbers(names):
    """As in DeepSeek's models, in transformers' names and in its own; numbers that do not fill them say nothing."""
    owner = nn.Module()
    owner.n_heads, owner.kv_lora_rank, owner.qk_rope_head_dim = 3, 12, 4
    owner.qk_nope_head_dim, owner.v_head_dim = 8, 6
    for name, layer in zip(names, (nn.Linear(20, 16), nn.Linear(12, 42)), strict=True):
        setattr(owner, name, layer)
    model = nn.Sequential(nn.Linear(5, 20), owner, nn.Linear(20, 5))
    stored = [str(row.layout) for row in describe(model).rows if "kv" in row.name and row.role == "hidden"]
    assert stored == ["out,in latent:3|k:1", "out,in (k:4|v:3) x 3"]
    owner.kv_lora_rank = owner.v_head_dim = 7
    stored = [str(row.layout) for row in describe(model).rows if "kv" in row.name and row.role == "hidden"]
    assert stored == ["out,in", "out,in"]
