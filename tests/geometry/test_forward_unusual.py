"""Weights that are stored or used in unusual ways: what the forward pass tells of them."""

import pytest
import torch
from test_forward_kinds import D, Mix, Net, X, attention, heads_of, linear, row
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from layerwise.geometry import describe
from layerwise.geometry.forward.flow import name_of
from layerwise.geometry.forward.rules import _REDUCTIONS


@pytest.mark.parametrize(
    ("shape", "equation", "stored"),
    [
        (
            (3, D, 4),
            "bsd,hde->bshe",
            "o i o",
        ),  # heads before: queries of all heads are one matrix, as in a linear layer
        ((D, 3, 4), "bsd,dhe->bshe", "i o o"),
        ((3, 4, D), "bsd,hed->bshe", "o o i"),
    ],
)
def test_heads_in_a_dimension_of_their_own_are_rows_of_one_matrix(shape, equation, stored):
    found = row(Mix(shape, lambda w, x: F.silu(torch.einsum(equation, x, w)).flatten(2)), X)
    assert (found.role, str(found.layout), found.how) == ("hidden", stored, "forward")
    assert found.layout.shapes(found.shape) == ((1, D, D),)
    weight = torch.randn(shape)
    (matrix,) = found.layout.to_matrices(weight)
    assert torch.allclose(torch.einsum(equation, X, weight).flatten(2), X @ matrix[0].T, atol=1e-5)


def test_experts_that_all_see_every_token_are_a_stack():
    """Unlike heads, they meet a matrix each of another stack."""

    def use(m, x):
        y = F.silu(torch.einsum("bsd,edf->besf", x, m.up)) * torch.einsum("bsd,efd->besf", x, m.gate)
        return m.last((torch.einsum("besf,efd->besd", y, m.down) * x.sum((1, 2), keepdim=True)[:, None]).sum(1))

    parts = {name: nn.Parameter(torch.randn(3, D, D)) for name in ("up", "gate", "down")}
    model = Net(use, **parts, last=linear(3))
    rows = {found.name: (found.role, str(found.layout)) for found in describe(model, X).rows}
    assert (rows["up"], rows["gate"]) == (("experts", "k,in,out"), ("experts", "k,out,in"))


def test_of_two_parameters_that_are_multiplied_one_is_a_guess():
    """Bases of matrices and their coefficients look like learned inputs and what maps them; factors by name do not."""
    bases, mixed = nn.Parameter(torch.randn(2, D, D)), nn.Parameter(torch.randn(4, 2))
    model = Net(lambda m, x: m.last(x @ torch.einsum("rb,bio->rio", m.mixed, m.bases)[0]), bases=bases, mixed=mixed)
    model.last = linear(3)
    assert all("a guess" in found.note for found in describe(model, X).rows[:2])
    model = Net(lambda m, x: m.last(m.map(m.mixed).mean() * x), mixed=mixed, map=linear(3, 2), last=linear(3))
    assert not any(found.note for found in describe(model, X).rows)


class LowRank(nn.Module):
    """As minLoRA's: what is added to a weight, under any names."""

    def __init__(self, d_out, d_in):
        super().__init__()
        self.one, self.two = nn.Parameter(torch.zeros(d_out, 2)), nn.Parameter(torch.ones(2, d_in))

    def forward(self, weight):
        return weight + self.one @ self.two * 0.5


@pytest.mark.parametrize("batch", [None, X])
def test_factors_in_a_parametrization_and_by_other_names_are_those_of_an_adapter(batch):
    made = parametrize.register_parametrization(linear(8), "weight", LowRank(8, D))
    named = Net(
        lambda m, x: F.linear(x, m.weight + m.lora_b @ m.lora_a),
        weight=nn.Parameter(torch.ones(D, 8), requires_grad=False),
        lora_a=nn.Parameter(torch.ones(2, 8)),
        lora_b=nn.Parameter(torch.zeros(D, 2)),
    )
    rows = describe(nn.Sequential(made, named, nn.Linear(D, 3)), batch).rows
    factors = {found.name.split(".")[-1]: (found.role, str(found.layout)) for found in rows if "lora" in found.role}
    assert factors == {
        "one": ("lora_B", "out,in"),
        "two": ("lora_A", "out,in"),
        "lora_a": ("lora_A", "out,in"),
        "lora_b": ("lora_B", "out,in"),
    }


def test_heads_that_are_put_together_again_are_columns_of_one_matrix():
    found = row(Mix((3, 4, D), lambda w, x: torch.einsum("bshe,hed->bsd", x.unflatten(-1, (3, 4)), w)), X)
    assert (found.role, str(found.layout), found.layout.shapes(found.shape)) == (
        "hidden",
        "i i o",
        ((1, D, D),),
    )


def layers_of_attention(w, x):
    """As modded-nanogpt's bank: the rows of queries, keys and values in one product, those of the output in another."""
    for layer in w:
        mixed = attention(*F.linear(x, layer[: 3 * D]).chunk(3, -1))
        x = x + F.linear(mixed, layer[3 * D :])
    return x


def test_slices_of_different_sizes_end_where_their_layer_ends():
    found = row(Mix((2, 4 * D, D), layers_of_attention), X)
    assert (found.role, str(found.layout), found.note) == ("experts", "k,out,in 0|1|2|3", "")
    assert found.layout.shapes(found.shape) == ((8, D, D),)


def test_a_bank_whose_matrices_stand_both_ways_round_is_a_stack_and_says_so():
    def layers(w, x):
        for up, down in w:
            x = x + F.relu(F.linear(x, up)) @ down
        return x

    found = row(Mix((3, 2, 4 * D, D), layers), X)
    assert (found.role, str(found.layout)) == ("experts", "k k o i")
    assert "used the other way round" in found.note


def test_a_matrix_that_is_used_both_ways_keeps_the_way_of_its_module():
    model = Net(lambda m, x: m.last(F.linear(F.relu(m.a(x)), m.a.weight.T)), a=linear(8), last=linear(3))
    found = row(model, X, "a.weight")
    assert (found.role, str(found.layout), found.note) == ("hidden", "out,in", "")


@pytest.mark.parametrize("scores", [lambda y: y.softmax(-1), torch.sigmoid])
@pytest.mark.parametrize("used", [range(4), (1, 2)])
def test_the_scores_that_experts_are_weighed_with_are_one_matrix(scores, used):
    """A loop over experts, all of them or those that were chosen, reads one score after the other."""
    parts = {"router": linear(4), "up": linear(), "last": linear(3)}
    model = Net(lambda m, x: m.last(sum(scores(m.router(x))[..., i : i + 1] * m.up(x) for i in used)), **parts)
    assert str(row(model, X, "router.weight").layout) == "out,in"


def test_rows_that_weigh_one_level_each_are_one_part_beside_the_others():
    """As FocalNet's: queries, values, and a score for each level of them."""

    def levels(w, x):
        q, v, scores = F.linear(x, w).split((D, D, 3), -1)
        return F.silu(q) * sum(torch.tanh(v * (level + 1)) * scores[..., level, None] for level in range(3))

    assert str(row(Mix((2 * D + 3, D), levels), X).layout) == "out,in 0:4|1:4|2:1"


NORMALISED = {
    "spectral_norm": (parametrizations.spectral_norm, "parametrizations.weight.original"),
    "spectral_norm, older": (nn.utils.spectral_norm, "weight_orig"),
    "weight_norm": (parametrizations.weight_norm, "parametrizations.weight.original1"),
    "weight_norm, older": (nn.utils.weight_norm, "weight_v"),
}


@pytest.mark.parametrize("kind", NORMALISED)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_a_weight_that_is_normalised_is_the_matrix_that_it_was(kind):
    normalised, name = NORMALISED[kind]
    model = Net(lambda m, x: m.head(F.relu(m.body(x))), body=normalised(linear(8)), head=normalised(linear(5, 8)))
    rows = {found.name: found for found in describe(model, X).rows}
    body, head = rows[f"body.{name}"], rows[f"head.{name}"]
    assert [(found.role, str(found.layout), found.how) for found in (body, head)] == [
        ("hidden", "out,in", "forward"),
        ("head", "out,in", "forward"),
    ]


def test_a_convolution_whose_two_halves_are_gates_is_two():
    def gated(w, x):
        a, b = F.conv1d(x.transpose(1, 2), w, padding=1).chunk(2, 1)
        return (torch.tanh(a) * torch.sigmoid(b)).transpose(1, 2)

    found = row(Mix((2 * D, D, 3), gated), X)
    assert (found.role, str(found.layout)) == ("conv", "out,in,*k 0|1")


def test_weights_that_are_repeated_are_still_known_from_the_first_one():
    """A copy on the meta device begins at number 0: the evidence must not go to the parameter that is there."""

    def use(m, x):
        tokens = torch.cat([m.token.repeat(2, 1, 1), x], 1) + m.places.repeat(2, 1)
        return m.last(F.linear(tokens, m.groups.repeat_interleave(3, 0)))

    parts = {"first": nn.Parameter(torch.ones(2, 3)), "token": nn.Parameter(torch.ones(1, 1, D))}
    parts |= {"places": nn.Parameter(torch.ones(3, D)), "groups": nn.Parameter(torch.ones(4, D))}
    model = Net(use, **parts, last=linear(3))
    rows = {found.name: found for found in describe(model, X).rows}
    assert rows["first"].how == "assumed"  # nothing was seen of it
    assert [(rows[name].role, rows[name].how) for name in ("token", "places", "groups")] == [
        ("vector", "forward"),
        ("embedding", "forward"),
        ("hidden", "forward"),
    ]


MADE_IN_UNKNOWN_WAYS = {
    "joined": (
        lambda m, x: F.linear(m.body(x), torch.cat([m.a.weight, m.b.weight])),
        {"a": linear(4), "b": linear(2), "body": linear()},
        {"a.weight", "b.weight"},
    ),
    "orthogonal": (
        lambda m, x: m.head(torch.relu(m.body(x))),
        {"head": parametrizations.orthogonal(linear(5)), "body": parametrizations.orthogonal(linear())},
        {"head.parametrizations.weight.original"},
    ),
    "joined before the last layer": (
        lambda m, x: m.head(F.linear(m.body(x), torch.cat([m.a.weight, m.b.weight]))),
        {"head": linear(5, 6), "a": linear(4), "b": linear(2), "body": linear()},
        {"head.weight"},
    ),
    "a learned diagonal is a scale": (
        lambda m, x: m.head(m.body(x)) @ torch.diag(m.scales),
        {"head": linear(5), "scales": nn.Parameter(torch.ones(5)), "body": linear()},
        {"head.weight"},
    ),
    "a fixed matrix transforms nothing": (
        lambda m, x: m.head(m.body(x)) @ torch.ones(5, 3),
        {"head": linear(5), "body": linear()},
        {"head.weight"},
    ),
}


@pytest.mark.parametrize("kind", MADE_IN_UNKNOWN_WAYS)
def test_weights_that_are_made_in_unknown_ways_are_still_those_of_a_layer(kind):
    use, parts, heads = MADE_IN_UNKNOWN_WAYS[kind]
    assert heads_of(Net(use, **parts), X) == heads


def test_attention_over_a_memory_keeps_its_role_and_parts():
    net = Net(
        lambda m, x: m.last(m.mix(x, x[:, :3], x[:, :3])[0]),
        mix=nn.MultiheadAttention(D, 3, batch_first=True),
        last=linear(3),
    )
    found = {r.name: r for r in describe(net, X).rows}["mix.in_proj_weight"]
    assert (found.role, str(found.layout), found.how) == ("hidden", "out,in q|k|v", "forward")


def in_slices(out, a, b):
    out[..., :5], out[..., 5:] = a, b
    return out


WRITTEN = {
    "in slices": lambda a, b: in_slices(torch.zeros(2, 5, 8), a, b),
    "out=": lambda a, b: (torch.mul(a, 2.0, out=torch.empty(2, 5, 5)), b),
    "added": lambda a, b: (torch.zeros(2, 5, 5).add_(a), b),
    "at places": lambda a, b: (torch.zeros(2, 5, 5).index_copy_(1, torch.arange(5), a), b),
    "where a mask is": lambda a, b: (torch.zeros(2, 5, 5).masked_scatter_(torch.ones(5).bool(), a), b),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", WRITTEN)
def test_results_written_into_a_tensor_of_the_forward_pass_are_still_heads(kind, device):
    """On meta too, where such a tensor is made on the CPU, as the batch was."""
    parts = {"body": linear(), "a": linear(5), "b": linear(3)}
    model = Net(lambda m, x: WRITTEN[kind](m.a(torch.relu(m.body(x))), m.b(torch.relu(m.body(x)))), **parts)
    assert heads_of(model.to(device), X) == {"a.weight", "b.weight"}


ORDER = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4, 8, 9, 11, 10])
CHOSEN = {
    "indexed": lambda w, x: F.linear(x, w[ORDER + 0]),
    "indexed by a list": lambda w, x: F.linear(x, w[ORDER.tolist()]),
    "columns": lambda w, x: F.linear(x, w[:, torch.randperm(D)]),
    "rows and columns": lambda w, x: F.linear(x, w[torch.randperm(D)][:, torch.randperm(D)]),
    "index_select": lambda w, x: x @ w.index_select(1, torch.randperm(D)).T,
    "gather": lambda w, x: F.linear(x, w.gather(0, torch.randperm(D)[:, None].expand(D, D))),
    "take_along_dim": lambda w, x: torch.einsum("bsi,oi->bso", x, w.take_along_dim(torch.randperm(D)[None], 1)),
    "some of the rows": lambda w, x: F.linear(x, w[torch.randperm(D) < 7]).sum(-1, keepdim=True) + x,
    "the largest rows": lambda w, x: F.linear(x, w[w.norm(dim=1).topk(5).indices]).sum(-1, keepdim=True) + x,
    "flipped": lambda w, x: F.linear(x, w.flip(0)),
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", CHOSEN)
def test_a_layer_whose_rows_or_columns_are_chosen_is_no_table(kind, device):
    model = Net(lambda m, x: m.last(F.relu(CHOSEN[kind](m.a.weight, x))), a=linear(), last=linear(3))
    found = row(model.to(device), X, "a.weight")
    assert (found.role, str(found.layout), found.note) == ("hidden", "out,in", "")


def test_a_bare_matrix_in_another_order_is_known_with_its_parts():
    """Rows 0 to D are the last of three that come out, so they are the values."""

    def attend_in_another_order(m, x):
        weight = m.w[(torch.arange(3 * D) + D) % (3 * D)]
        return m.last(attention(*F.linear(x, weight).chunk(3, -1)))

    found = row(Net(attend_in_another_order, w=nn.Parameter(torch.randn(3 * D, D)), last=linear(3)), X)
    assert (found.role, str(found.layout), found.how) == ("hidden", "out,in v|q|k", "forward")


TABLES = {
    "a bare one": lambda m, ids: m.last(m.bare[ids]),
    "several in one": lambda m, ids: m.last(m.levels[0][ids] + m.levels[1][ids]),
    "a layer's, without a batch": lambda m, ids: m.last(F.embedding(ids[0], m.tied.weight)) @ m.tied.weight.T,
    "positions in another order": lambda m, ids: m.last(m.bare[ids] + m.places[torch.arange(5).flip(0)]),
}


@pytest.mark.parametrize("kind", TABLES)
def test_rows_that_the_input_asks_for_and_positions_are_those_of_tables(kind):
    parts = {"bare": nn.Parameter(torch.randn(11, D)), "tied": linear(11), "last": linear()}
    model = Net(TABLES[kind], **parts, places=nn.Parameter(torch.randn(7, D)))
    model.levels = nn.Parameter(torch.randn(2, 11, D))
    rows = {found.name: found for found in describe(model, torch.arange(10).view(2, 5)).rows}
    used = {
        "a bare one": ["bare"],
        "several in one": ["levels"],
        "a layer's, without a batch": ["tied.weight"],
    }
    expected = "head" if "layer" in kind else "embedding"
    assert {rows[name].role for name in used.get(kind, ["bare", "places"])} == {expected}


def padded(w, x):
    return F.linear(x, F.pad(w, (0, 0, 0, 4)))[..., :D]


def written_out(w, x):
    return (x[..., None, :] * w).sum(-1)


def compared(w, x):
    return F.cosine_similarity(x[..., None, :], w, dim=-1)


@pytest.mark.parametrize("use", [padded, written_out, compared])
def test_a_layer_used_in_ways_that_are_not_followed_is_a_matrix_all_the_same(use):
    """A weight that grows before it is used, and a product that is written out, which looks like one with gains."""
    assert row(Mix((D, D), use), X).role == "hidden"
    found = row(Net(lambda m, x: m.last(use(m.a.weight, x)), a=linear(), last=linear(3)), X, "a.weight")
    assert (found.role, str(found.layout), found.note) == ("hidden", "out,in", "")


@pytest.mark.parametrize("triangle", [torch.tril, torch.triu])
def test_a_triangle_of_a_matrix_is_followed(triangle):
    found = row(Mix((D, D), lambda w, x: x @ triangle(w)), X)
    assert (found.role, str(found.layout), found.how) == ("hidden", "in,out", "forward")


def test_gains_of_their_own_for_each_place_are_a_vector():
    found = row(Mix((5, D), lambda w, x: x * w), X)
    assert (found.role, found.how) == ("vector", "forward")


WIDE = {
    "of heads": ((3, 4), lambda m, x: (m.mix(x).unflatten(-1, (3, 4)) + m.w).flatten(2), "vector"),
    "of a stack": ((2, 1, D), lambda m, x: torch.baddbmm(m.w, x, m.stack), "vector"),
    "of places": ((5, D), lambda m, x: m.mix(x) + m.w, "embedding"),
    "of places, in a row": ((5, D), lambda m, x: torch.addmm(m.w, x[0], m.stack[0]), "embedding"),
}


@pytest.mark.parametrize("kind", WIDE)
def test_a_wide_bias_is_one_of_features_or_a_table_of_places(kind):
    shape, use, role = WIDE[kind]
    stack = nn.Parameter(torch.randn(2, D, D))
    model = Net(lambda m, x: m.last(use(m, x)), w=nn.Parameter(torch.ones(shape)), stack=stack, mix=linear())
    model.last = linear(3)
    found = row(model, X)
    assert (found.role, found.how) == (role, "forward")


def turned(w, x):
    pairs = torch.view_as_complex(x.unflatten(-1, (6, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(w)).flatten(2)


def test_a_weight_in_complex_pairs_takes_part():
    assert "took no part" not in row(Mix((5, 6, 2), turned), X).note


def test_a_matrix_that_is_stored_flat_says_so():
    assert "store it with two dimensions" in row(Mix((D * D,), lambda w, x: x @ w.view(D, D)), X).note
    assert row(Mix((D,), lambda w, x: x * (x @ w)[..., None]), X).note == ""


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_grouped_products_of_any_precision_are_stacks_of_experts(device):
    """torch has them for the meta device in bfloat16 alone."""

    def grouped(w, x):
        ends = torch.tensor([3, 3, 10], dtype=torch.int32, device=x.device)
        return torch._grouped_mm(x.flatten(0, 1), w, offs=ends)

    model = Mix((3, 16, 8), grouped, 8).to(device)
    found = row(model, torch.randn(2, 5, 16, device=device))
    assert (found.role, str(found.layout), found.how) == ("experts", "k,in,out", "forward")


@pytest.mark.skipif(not hasattr(torch.Tag, "reduction"), reason="this torch has no tag for reductions")
def test_reductions_are_those_that_torch_calls_so():
    packets = [getattr(torch.ops.aten, name) for name in dir(torch.ops.aten)]
    overloads = [getattr(p, name) for p in packets if hasattr(p, "overloads") for name in p.overloads()]
    assert {name_of(func) for func in overloads if torch.Tag.reduction in func.tags} == _REDUCTIONS
