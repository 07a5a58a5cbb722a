"""One small module for each kind of weight, under names that no rule knows: what the forward pass tells of it."""

from types import SimpleNamespace

import pytest
import torch
from forward_models import attend, heads, rotated
from torch import nn
from torch.distributions import Independent, Normal
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention

from layerwise.geometry import describe

D = 12
X = torch.randn(2, 5, D, generator=torch.Generator().manual_seed(0))


class Mix(nn.Module):
    """A weight `w` of a given shape, a function that uses it, and a projection after it."""

    def __init__(self, shape, use, out=D):
        super().__init__()
        self.w = nn.Parameter(torch.randn(shape) / 4)
        self.last = nn.Linear(out, 3)
        self.use = use

    def forward(self, x):
        return self.last(self.use(self.w, x))


def attention(q, k, v, count=3):
    return attend(heads(q, count), heads(k, count), heads(v, count)).transpose(1, 2).flatten(2)


def grouped(w, x):
    q, k, v = F.linear(x, w).split((D, D // 3, D // 3), -1)
    k, v = k.repeat(1, 1, 3), v.repeat(1, 1, 3)
    return attention(rotated(q), rotated(k), v)


def by_head(w, x, sizes=(4, 4, 4)):
    q, k, v = heads(F.linear(x, w), 3).split(sizes, -1)
    return attend(q, k, v).transpose(1, 2).flatten(2)


def fused_attention(w, x):
    q, k, v = (heads(part, 3) for part in F.linear(x, w).chunk(3, -1))
    return F.scaled_dot_product_attention(rotated(q), rotated(k), v).transpose(1, 2).flatten(2)


def flexible_attention(w, x):
    q, k, v = (heads(part, 3) for part in F.linear(x, w).split((D, D, D), -1))
    y = flex_attention(rotated(q), rotated(k), v, score_mod=lambda score, b, h, i, j: score + i - j)
    return y.transpose(1, 2).flatten(2)


def complex_rotary(w, x):
    q, k, v = F.linear(x, w).chunk(3, -1)
    turn = torch.polar(torch.ones(5, 2), torch.arange(10.0).view(5, 2))
    q, k = (
        torch.view_as_real(torch.view_as_complex(heads(part, 3).unflatten(-1, (2, 2))) * turn).flatten(-2) for part in (q, k)
    )
    return attend(q, k, heads(v, 3)).transpose(1, 2).flatten(2)


def gated_queries(w, x):
    q, gate = heads(F.linear(x, w), 3).chunk(2, -1)
    return (attend(q, heads(x, 3), heads(x, 3)) * torch.sigmoid(gate)).transpose(1, 2).flatten(2)


def compressed(w, x):
    k, v = heads(F.linear(F.rms_norm(x, (D,)), w), 3).split((2, 4), -1)
    return attend(heads(x, 3)[..., :2], k, v).transpose(1, 2).flatten(2)


def gate_and_up(w, x):
    gate, up = F.linear(x, w).chunk(2, -1)
    return F.silu(gate) * up


def every_other_row(w, x):
    y = F.linear(x, w)
    return F.gelu(y[..., 0::2]) * y[..., 1::2]


def slices(w, x):
    q, k, v = (F.linear(x, part) for part in w.chunk(3))
    return attention(q, k, v)


def scan(w, x):
    """As in a gated delta net: a depthwise convolution over what is then queries, keys and values."""
    y = F.conv1d(F.linear(x, w).transpose(1, 2), torch.ones(28, 1, 2), padding=1, groups=28)[..., :5]
    q, k, v = F.silu(y).transpose(1, 2).split((8, 8, 12), -1)
    return torch.tril(q @ k.transpose(1, 2)) @ v


def written_in_place(w, x):
    y = F.linear(x, w)
    out = torch.empty_like(y[..., :D])
    out[..., ::2] = F.silu(y[..., :6])
    out[..., 1::2] = y[..., 6:12]
    return out * y[..., 12:]


def keys_beside_a_latent(w, x):
    """As in MLA: keys that all heads share, written into a new tensor beside others."""
    latent, shared = F.linear(x, w).split((8, 4), -1)
    k = latent.new_empty(2, 5, 12)
    k[..., :8] = x[..., :8]
    k[..., 8:] = rotated(shared)
    return attend(x, k, x) * F.layer_norm(latent, (8,)).repeat(1, 1, 2)[..., :D]


PARTS = {
    "one after the other": (
        Mix((3 * D, D), lambda w, x: attention(*F.linear(x, w).chunk(3, -1))),
        "out,in q|k|v",
    ),
    "stored in, out": (Mix((D, 3 * D), lambda w, x: attention(*(x @ w).chunk(3, -1))), "in,out q|k|v"),
    "fewer keys and values": (Mix((20, D), grouped), "out,in q:3|k:1|v:1"),
    "head by head": (Mix((3 * D, D), by_head), "out,in (q|k|v) x 3"),
    "head by head, of several sizes": (
        Mix((3 * 12, D), lambda w, x: by_head(w, x, (4, 4, 4))),
        "out,in (q|k|v) x 3",
    ),
    "values of their own size": (
        Mix((3 * 8, D), lambda w, x: by_head(w, x, (2, 2, 4))),
        "out,in (q:1|k:1|v:2) x 3",
    ),
    "torch's attention, rotary": (Mix((3 * D, D), fused_attention), "out,in q|k|v"),
    "torch's flexible attention": (Mix((3 * D, D), flexible_attention), "out,in q|k|v"),
    "the same, compiled": (
        Mix((3 * D, D), torch.compile(flexible_attention, backend="eager")),
        "out,in q|k|v",
    ),
    "complex rotary": (Mix((3 * D, D), complex_rotary), "out,in q|k|v"),
    "gated queries": (Mix((2 * D, D), gated_queries), "out,in (0|1) x 3"),
    "a latent and keys": (Mix((12, D), keys_beside_a_latent), "out,in 0:2|1:1"),
    "keys and values from a latent": (Mix((18, D), compressed), "out,in (k:1|v:2) x 3"),
    "gate and up": (Mix((2 * D, D), gate_and_up), "out,in gate|up"),
    "row by row": (Mix((2 * D, D), every_other_row), "out,in (gate|up) x 12"),
    "torch's glu": (Mix((2 * D, D), lambda w, x: F.glu(F.linear(x, w), -1)), "out,in up|gate"),
    "shift and scale": (
        Mix((2 * D, D), lambda w, x: x + torch.tanh(F.linear(x, w)[..., :D]) * (1 + F.linear(x, w)[..., D:])),
        "out,in gate|up",
    ),
    "through a depthwise convolution": (Mix((28, D), scan), "out,in q:2|k:2|v:3"),
    "written in place": (Mix((18 + 6, D), written_in_place), "out,in up:1|gate:1"),
    "one matrix": (Mix((2 * D, D), lambda w, x: F.relu(F.linear(x, w))[..., :D] * 1.0), "out,in"),
}


def row(model, batch, name="w", **options):
    return next(row for row in describe(model, batch, **options).rows if name in (row.name, *row.tied))


@pytest.mark.parametrize("kind", [k for k in PARTS if k not in ("written in place", "one matrix", "shift and scale")])
def test_parts_of_a_fused_weight_are_what_its_rows_are_used_for(kind):
    model, stored = PARTS[kind]
    found = row(model, X)
    assert (found.role, str(found.layout), found.how, found.note) == ("hidden", stored, "forward", "")


def test_slices_of_a_weight_in_products_of_their_own_are_units():
    found = row(Mix((3 * D, D), slices), X)
    assert found.layout.shapes(found.shape) == ((3, D, D),)


def test_slices_of_a_layer_are_its_parts_and_no_experts():
    found = row(Net(lambda m, x: m.last(slices(m.mix.weight, x)), mix=linear(3 * D), last=linear(3)), X, "mix.weight")
    assert (found.role, found.layout.shapes(found.shape)) == ("hidden", ((3, D, D),))


def test_rows_written_in_place_are_followed():
    found = row(Mix((24, D), written_in_place), X)
    assert found.layout.split is not None
    assert [size for _, size in found.layout.split.parts] == [1, 1]


def test_a_convolution_of_size_one_has_parts_too():
    def use(w, x):
        q, k, v = F.conv1d(x.transpose(1, 2), w).transpose(1, 2).chunk(3, -1)
        return attention(q, k, v)

    found = row(Mix((3 * D, D, 1), use), X)
    assert (found.role, str(found.layout)) == ("conv", "out,in,*k q|k|v")


def chosen(x):
    return torch.tensor([0, 2])


STACKS = {
    "bmm": ((3, D, 8), lambda w, x: torch.bmm(x.flatten(0, 1).expand(3, -1, -1), w).sum(0), "k,in,out"),
    "einsum": ((2, 8, D), lambda w, x: torch.einsum("ktd,kod->kto", x, w), "k,out,in"),
    "a loop over some": ((4, 8, D), lambda w, x: sum(F.linear(x, w[e]) for e in (0, 2)), "k,out,in"),
    "gathered": ((4, 8, D), lambda w, x: (w[chosen(x)] @ x.transpose(1, 2)).transpose(1, 2), "k,out,in"),
    "in one matrix": ((4 * 8, D), lambda w, x: sum(F.linear(x, e) for e in w.view(4, 8, D)[:3]), "(4 o) i"),
    "sliced from one matrix": ((3 * 8, D), lambda w, x: sum(F.linear(x, e) for e in w.split(8)), "(3 o) i"),
    "a bank of layers": ((2, 2, D, D), lambda w, x: F.linear(F.linear(x, w[0, 1]), w[1, 0]), "k k o i"),
    "columns in turn": (
        (8, D * 3),
        lambda w, x: torch.bmm(x.flatten(0, 1).expand(3, -1, -1), w.view(8, D, 3).permute(2, 1, 0)).sum(0),
        "o (i 3)",
    ),
}


@pytest.mark.parametrize("kind", STACKS)
def test_stacks_of_matrices_are_found_whichever_way_they_are_stored(kind):
    shape, use, stored = STACKS[kind]
    out = D if kind == "a bank of layers" else 8
    found = row(Mix(shape, use, out), X)
    assert (found.role, str(found.layout), found.note) == ("experts", stored, "")


def test_experts_that_got_no_token_have_the_parts_of_the_others():
    def use(w, x):
        halves = [F.linear(x, w[e]).chunk(2, -1) for e in (1, 3)]
        return sum(F.silu(gate) * up for gate, up in halves)

    found = row(Mix((4, 16, D), use, 8), X)
    assert str(found.layout) == "k,out,in gate|up"
    assert len(found.units) == 8


class Net(nn.Module):
    def __init__(self, use, **parts):
        super().__init__()
        self.use = use
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs):
        return self.use(self, *inputs)


def heads_of(model, *batch, **options):
    rows = describe(model, batch, **options).rows
    return {row.name for row in rows if row.role == "head"}


def linear(d_out=D, d_in=D):
    return nn.Linear(d_in, d_out)


def holding_itself(**attributes):
    result = SimpleNamespace(**attributes)
    result.owner = result
    return result


HEADS = {
    "registered first": (
        lambda m, x: m.head(m.body(x)),
        {"head": linear(5), "body": linear()},
        {"head.weight"},
    ),
    "two": (
        lambda m, x: (m.a(m.body(x)), m.b(m.body(x))),
        {"a": linear(5), "b": linear(1), "body": linear()},
        "ab",
    ),
    "averaged": (lambda m, x: (m.a(x) + m.b(x)) / 2, {"a": linear(5), "b": linear(5)}, "ab"),
    "capped": (lambda m, x: 30 * torch.tanh(m.a(m.body(x)) / 30), {"a": linear(5), "body": linear()}, "a"),
    "probabilities": (lambda m, x: m.a(m.body(x)).softmax(-1), {"a": linear(5), "body": linear()}, "a"),
    "only a loss": (
        lambda m, x: F.cross_entropy(m.a(m.body(x)).flatten(0, 1), torch.zeros(10, dtype=torch.long)),
        {"a": linear(5), "body": linear()},
        "a",
    ),
    "rows normalised": (
        lambda m, x: F.linear(m.body(x), F.normalize(m.a.weight)),
        {"a": linear(5), "body": linear()},
        "a",
    ),
    "compared with one another": (
        lambda m, x: F.normalize(m.a(x), dim=-1) @ F.normalize(m.b(x), dim=-1).transpose(1, 2) * m.scale.exp(),
        {"a": linear(), "b": linear(), "scale": nn.Parameter(torch.zeros(()))},
        "ab",
    ),
    "in a dict": (lambda m, x: {"y": {"z": [m.a(m.body(x))]}}, {"a": linear(5), "body": linear()}, "a"),
    "in a distribution": (
        lambda m, x: Independent(Normal(m.a(m.body(x)), m.b(x).exp()), 1),
        {"a": linear(5), "b": linear(5), "body": linear()},
        "ab",
    ),
    "in an object that holds itself and the model": (
        lambda m, x: holding_itself(model=m, found=[SimpleNamespace(y=m.a(m.body(x)))]),
        {"a": linear(5), "body": linear()},
        "a",
    ),
    "not what scales": (
        lambda m, x: m.a(F.layer_norm(x, (D,)) * m.scales(x)),
        {"a": linear(5), "scales": linear()},
        "a",
    ),
    "none, as a norm comes last": (
        lambda m, x: m.norm(x + m.a(x)),
        {"a": linear(), "norm": nn.LayerNorm(D)},
        "",
    ),
}


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_is_a_projection_whose_result_comes_out_as_it_is(kind):
    use, parts, expected = HEADS[kind]
    expected = expected if isinstance(expected, set) else {f"{name}.weight" for name in expected}
    assert heads_of(Net(use, **parts), X) == expected


def test_what_a_router_chose_makes_its_rows_no_parts():
    """Scores of the chosen experts are picked by scores: the rows of the others are no other matrix."""

    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.head = nn.Linear(D, 6, bias=False), nn.Linear(D, 5)
            self.experts = nn.Parameter(torch.randn(6, D, D))

        def forward(self, x):
            scores = self.gate(x).sigmoid()
            _, chosen = (scores + torch.arange(6.0)).topk(2, dim=-1)  # the last experts, whatever the input
            weights = scores.gather(-1, chosen)
            weights = weights / weights.sum(-1, keepdim=True)
            return self.head(torch.einsum("bsk,bskoi,bsi->bso", weights, self.experts[chosen], x))

    rows = {row.name: row for row in describe(Routed(), torch.randn(2, 3, D)).rows}
    assert (rows["gate.weight"].role, str(rows["gate.weight"].layout)) == ("hidden", "out,in")


def test_a_convolution_may_be_the_head():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3))
    assert heads_of(model, torch.randn(1, 3, 8, 8)) == {"2.weight"}


def test_ties_positions_gains_and_what_takes_no_part():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(7, D))
            self.places = nn.Parameter(torch.randn(5, D))
            self.gains = nn.Parameter(torch.ones(3, 4))
            self.start = nn.Parameter(torch.zeros(1, 1, D))
            self.unused = nn.Linear(D, D)

        def forward(self, ids):
            x = (self.table[ids] + self.places).unflatten(-1, (3, 4)) * self.gains
            x = torch.cat([self.start.expand(2, -1, -1), x.flatten(-2)], 1)
            return F.layer_norm(x, (D,)) @ self.table.T

    rows = {row.name: row for row in describe(Model(), torch.randint(7, (2, 5))).rows}
    assert (rows["table"].role, str(rows["table"].layout)) == ("head", "out,in")
    assert (rows["places"].role, str(rows["places"].layout)) == ("embedding", "in,out")
    assert (rows["gains"].role, rows["start"].role) == ("vector", "vector")
    assert rows["unused.weight"].note == "took no part in the forward pass"
    assert "2 not certain" in describe(Model(), torch.randint(7, (2, 5))).summary()


def test_an_adapter_of_a_fused_projection_has_its_parts():
    class Adapted(nn.Module):  # peft's make of a layer
        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(D, 3 * D)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(D, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3 * D, bias=False)})

        def forward(self, x):
            return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x)) * 2

    model = Net(lambda m, x: m.last(attention(*m.mix(x).chunk(3, -1))), mix=Adapted(), last=linear(3))
    found = row(model, X, "mix.lora_B.default.weight")
    assert (found.role, str(found.layout)) == ("lora_B", "out,in q|k|v")


def test_factors_of_a_kronecker_product_are_matrices_and_factors_of_an_outer_one_are_gains():
    """As peft's LoKr makes an update: each factor maps its part of d_in to its part of d_out."""
    kron = Net(lambda m, x: F.linear(x, torch.kron(m.one, m.two)), one=entries(2, 3), two=entries(4, 4))
    for name in ("one", "two"):
        found = row(kron, X, name)
        assert (found.role, str(found.layout), found.how) == ("hidden", "out,in", "assumed")
    outer = Net(lambda m, x: F.linear(x, m.base * (m.one * m.two)), base=entries(5, D), one=entries(5, 1), two=entries(1, D))
    assert [row(outer, X, name).role for name in ("one", "two")] == ["vector", "vector"]


def entries(*shape):
    return nn.Parameter(torch.randn(shape))


def test_matrices_along_d_in_by_a_pattern():
    model = Net(lambda m, x: m.last(m.o(x)), o=linear(), last=linear(3))
    found = row(model, X, "o.weight", splits={"o.weight": "o (4 i)"})
    assert found.layout.shapes(found.shape) == ((4, D, D // 4),)
    weight = torch.arange(D * D).view(D, D)
    (stack,) = found.layout.to_matrices(weight)
    assert torch.equal(stack[1], weight[:, 3:6])
    assert torch.equal(found.layout.from_matrices([stack], weight.shape), weight)
