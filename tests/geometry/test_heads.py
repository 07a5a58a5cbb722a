"""Output heads: what may stand between a projection and the outputs, and the doubts where nothing was run."""

import pytest
import torch
from test_forward_kinds import D, Net, X, heads_of, linear
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from layerwise.geometry import describe, param_groups

V = 7


def test_logits_that_are_added_to_what_was_normalised_are_still_logits():
    """As in a deep-and-cross net, which adds a scaled product of pooled inputs."""

    def crossed(m, x):
        h = torch.tanh(m.body(x))
        return m.a(h) + (h * (h * m.scales).sum(-1, keepdim=True)).mean(-1, keepdim=True)

    assert heads_of(Net(crossed, body=linear(), a=linear(5), scales=nn.Parameter(torch.ones(D))), X) == {"a.weight"}


def test_what_only_has_the_shape_of_logits_makes_no_head():
    model = Net(lambda m, x: (m.last(x), torch.zeros_like(m.a(x))), a=linear(5), last=linear(3))
    assert heads_of(model, X) == {"last.weight"}


def test_a_head_that_comes_last_beside_bare_matrices_is_in_doubt():
    """As a router in a model whose unembedding is a bare matrix, which may be registered after it."""
    model = Net(None, body=linear(), block=nn.Sequential(linear(9)), out=nn.Parameter(torch.ones(D, V)))
    doubt = {found.name: found.note for found in describe(model).rows}["block.0.weight"]
    assert "holds matrices of its own" in doubt


class Scorer(nn.Module):
    """A body, a projection `a`, another one `b` where `end` uses it, vectors of scales, and what comes after them."""

    def __init__(self, end):
        super().__init__()
        self.b, self.a, self.body = linear(V), linear(V), linear()
        self.scales, self.shift = nn.Parameter(torch.ones(V)), nn.Parameter(torch.zeros(V))
        self.end = end

    def forward(self, x):
        return self.end(self, self.body(x))


def into_buffer(m, x):
    out = x.new_zeros(x.shape[0], 2, V)
    out[:, 0] = m.a(x).mean(1)
    out[:, 1] = m.b(x).mean(1) * m.scales
    return out


def step_by_step(m, x):
    out = x.new_empty(x.shape[1], x.shape[0], V)
    for t in range(x.shape[1]):
        out[t] = m.a(x[:, t])
    return out.transpose(0, 1)


def added_into_a_part(m, x):
    out = x.new_zeros(*x.shape[:2], V + 2)
    out[..., 1:-1] += m.a(x) * m.scales
    return out


def in_place(m, x):
    logits = m.a(x)
    logits *= m.scales
    return logits.div_(3).tanh_().mul_(3)


AFTER = {
    "scaled": lambda m, x: m.a(x) * m.scales,
    "scaled, capped, shifted": lambda m, x: 30 * torch.tanh(m.a(x) * m.scales.exp() / 30) + m.shift,
    "scaled, cut, transposed, cast": lambda m, x: (m.scales * m.a(x))[..., :5].transpose(1, 2).double(),
    "scaled, then a loss": lambda m, x: F.cross_entropy(
        (m.a(x) * m.scales).flatten(0, 1), torch.zeros(x.shape[0] * x.shape[1], dtype=torch.long)
    ),
    "cosines, scaled": lambda m, x: F.linear(F.normalize(x, dim=-1), F.normalize(m.a.weight, dim=-1)) * m.scales,
    "log-softmax by hand": lambda m, x: (y := m.a(x) * m.scales) - y.logsumexp(-1, keepdim=True),
    "step by step into a tensor": step_by_step,
    "added into a part": added_into_a_part,
    "in place": in_place,
}
TWO = {
    "both scaled": lambda m, x: (m.a(x) * m.scales, m.b(x) * m.scales),
    "written side by side": into_buffer,
    "mixed": lambda m, x: torch.lerp(m.a(x), m.b(x), m.scales.sigmoid()),
}


def root_mean_square(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def standard(x):
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + 1e-6)


NORMALISED = {
    "root mean square": lambda m, x: root_mean_square(m.a(x)) * m.scales,
    "in float32": lambda m, x: m.scales * root_mean_square(m.a(x).float()).to(x.dtype),
    "deviation": lambda m, x: standard(m.a(x)) * m.scales + m.shift,
    "gains before the division": lambda m, x: (
        m.scales * ((y := m.a(x)) - y.mean(-1, keepdim=True)) / (y.std(-1, keepdim=True) + 1e-6)
    ),
    "length": lambda m, x: F.normalize(m.a(x), dim=-1) * m.scales,
    "torch's, gains apart": lambda m, x: F.layer_norm(m.a(x), (V,)) * m.scales,
    "over the batch": lambda m, x: ((y := m.a(x).flatten(0, 1)) - y.mean(0)) / y.var(0).add(1e-5).sqrt() * m.scales,
}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("end", "heads"),
    [pytest.param(end, "a", id=name) for name, end in AFTER.items()]
    + [pytest.param(end, "ab", id=name) for name, end in TWO.items()]
    + [pytest.param(end, "", id=f"normalised: {name}") for name, end in NORMALISED.items()],
)
def test_logits_may_be_scaled_and_normalised_features_are_no_logits(end, heads, device):
    model = Scorer(end).to(device)
    assert heads_of(model, X.to(device)) == {f"{name}.weight" for name in heads}


@torch.library.custom_op("layerwise_tests::cross_entropy_of", mutates_args=())
def cross_entropy_of(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(x @ weight.T, torch.zeros(len(x), dtype=torch.long))


def test_a_weight_that_only_a_foreign_operation_reads_has_the_role_of_its_module():
    model = Net(
        lambda m, x: cross_entropy_of(m.body(x).flatten(0, 1), m.scores.weight),
        body=linear(),
        scores=linear(V),
    )
    rows = {row.name: row for row in describe(model, X).rows}
    assert (rows["scores.weight"].role, rows["scores.weight"].how) == ("head", "module")
    assert (rows["body.weight"].role, rows["body.weight"].how) == ("hidden", "forward")


class Branches(nn.Module):
    """Blocks, each with a projection at its end, so that none lies outside of what is repeated."""

    def __init__(self, table=False):
        super().__init__()
        if table:
            self.table = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(D, 9), nn.Linear(9, D)) for _ in range(2))


def noted(model):
    return {row.name: row for row in describe(model).rows if row.note}


def test_where_no_head_is_found_what_comes_last_says_so_and_one_warning_counts():
    rows = noted(Branches())
    assert set(rows) == {"blocks.1.1.weight"}
    assert "no head was found" in rows["blocks.1.1.weight"].note
    assert set(noted(Branches(table=True))) == {"table.weight", "blocks.1.1.weight"}
    with pytest.warns(UserWarning, match="the roles of 2 parameters are not certain") as caught:
        param_groups(Branches(table=True))
    assert len(caught) == 1


def test_the_last_projection_before_what_is_none_is_in_doubt_too():
    """A speaker's vector, which a loss of its own compares with a table: the vector is what comes out."""

    class Angles(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(D, V))

    rows = noted(Net(None, body=linear(), vector=linear(), angles=Angles()))
    assert set(rows) == {"vector.weight", "angles.weight"}
    assert "no head was found" in rows["vector.weight"].note


def test_a_head_that_is_one_for_coming_last_says_so_where_others_read_as_many():
    rows = noted(Net(None, out=linear(3), body=linear(), prepares=linear()))
    assert rows["prepares.weight"].role == "head"
    assert "taken for the head as it comes last" in rows["prepares.weight"].note
    assert "may be an output head" in rows["out.weight"].note
    assert not noted(nn.Sequential(linear(), nn.ReLU(), linear()))  # whose order is not in doubt


def test_beside_a_head_that_the_model_names_others_are_in_doubt():
    class Declares(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.body = nn.Embedding(V, D), linear()
            self.scores, self.follows = linear(V), linear(2)

        def get_output_embeddings(self):
            return self.scores

    rows = {row.name: row for row in describe(Declares()).rows}
    assert (rows["scores.weight"].role, rows["scores.weight"].note) == ("head", "")
    assert "may be an output head" in rows["follows.weight"].note


def test_a_head_with_a_parametrization_is_found_without_a_batch():
    model = Net(None, words=nn.Embedding(V, D), head=parametrizations.weight_norm(linear(V)), body=linear())
    roles = {row.name: row.role for row in describe(model).rows}
    assert roles["head.parametrizations.weight.original1"] == "head"
    assert roles["head.parametrizations.weight.original0"] == "vector"


def test_a_table_with_a_parametrization_in_a_model_without_a_head():
    """As in the projection discriminator of a GAN."""
    model = Net(lambda m, x, y: (m.words(y) * x).sum(-1), words=parametrizations.spectral_norm(nn.Embedding(V, D)))
    name = "words.parametrizations.weight.original"
    (without,), (seen,) = describe(model).rows, describe(model, (X[:, 0], torch.zeros(len(X), dtype=torch.long))).rows
    assert (without.name, without.role, without.note) == (
        name,
        "embedding",
        "the model has embeddings, and no head was found",
    )
    assert (seen.name, seen.role, seen.note) == (name, "embedding", "")


def test_no_weight_is_made_to_look_at_modules():
    """`spectral_norm` takes a step of its power iteration whenever its weight is made in training mode."""
    model = Net(None, body=parametrizations.spectral_norm(linear()), last=parametrizations.spectral_norm(linear(V)))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    describe(model)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def drawn(m, x):
    """As an agent of PPO acts: a draw, how likely it was, and a value."""
    mean = m.actor(m.body(x))
    given = torch.distributions.Normal(mean, m.log_std.expand_as(mean).exp())
    action = given.sample()
    return action, given.log_prob(action).sum(-1), m.critic(m.body(x))


@pytest.mark.parametrize("shape", [(V,), (1, V)])
def test_what_a_draw_is_made_of_is_a_head_also_where_its_deviation_is_stored_as_a_row(shape):
    model = Net(drawn, body=linear(), actor=linear(V), critic=linear(1), log_std=nn.Parameter(torch.zeros(shape)))
    assert heads_of(model, X) == {"actor.weight", "critic.weight"}


def modulated(m, x):
    """As StyleGAN2's convolution: a weight for each example, of which the style scales the inputs."""
    weights = m.weight * m.style(x[:, 0])[:, None, :, None]
    return F.conv1d(x.mT.reshape(1, -1, x.shape[1]), weights.flatten(0, 1), groups=len(x)).view(len(x), V, -1)


def test_a_style_that_scales_the_weights_of_the_last_convolution_is_not_the_head():
    model = Net(modulated, style=linear(), weight=nn.Parameter(torch.randn(1, V, D, 1)))
    assert heads_of(model, X) == {"weight"}
