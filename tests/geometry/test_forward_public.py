"""What well-known models outside of transformers do to their weights, in small: each of these was once wrong, in silence."""

import pytest
import torch
from test_forward_kinds import D, Mix, Net, X, attention, heads, linear, row
from torch import nn
from torch.nn import functional as F

from layerwise.geometry import describe


def turned(x):
    """Rotary positions as Wan's: pairs of neighbours, whose two sums are written into a new tensor."""
    one, two = x.unflatten(-1, (-1, 2)).unbind(-1)
    angles = torch.arange(5.0)[:, None]
    out = torch.empty_like(x)
    out[..., 0::2] = one * angles.cos() - two * angles.sin()
    out[..., 1::2] = one * angles.sin() + two * angles.cos()
    return out


def test_rotary_pairs_that_are_written_in_place_come_together_again():
    def use(w, x):
        q, k, v = F.linear(x, w).chunk(3, -1)
        return attention(turned(q), turned(k), v)

    assert str(row(Mix((3 * D, D), use), X).layout) == "out,in q|k|v"
    alone = row(Mix((D, D), lambda w, x: attention(turned(F.linear(x, w)), turned(x), x)), X)
    assert str(alone.layout) == "out,in"


STACKS = {
    "of the relations of a graph": lambda w, x: (x[:, :1] @ w.index_select(0, x[:, 0, 0].long().abs() % 4))[:, 0],
    "joined with nothing else": lambda w, x: x[:, 0] @ torch.cat([w.view(-1, D)])[: 4 * D].view(4, D, D)[0],
}


@pytest.mark.parametrize("kind", STACKS)
def test_matrices_that_are_picked_by_number_are_a_stack(kind):
    found = row(Mix((4, D, D), STACKS[kind]), X)
    assert (found.role, str(found.layout), found.how) == ("experts", "k,in,out", "forward")


def test_a_weight_that_is_packed_alone_and_normalised_is_the_matrix_that_it_was():
    """As in einops' `pack`, by which a weight of any shape becomes one of rows."""
    found = row(Mix((D, D), lambda w, x: x @ F.normalize(torch.cat([w.reshape(D, -1)])).view(D, D)), X)
    assert (found.role, str(found.layout), found.how) == ("hidden", "in,out", "forward")


def test_shifts_of_two_streams_that_meet_again_are_parts_all_the_same():
    """As in CogVideoX: text and video are modulated with shifts and scales of their own, and then one sequence."""

    def use(m, x):
        x = m.first(x)
        shift, scale, gate, text_shift, text_scale, text_gate = m.modulation(x.mean(1, keepdim=True)).chunk(6, -1)
        both = torch.cat([x[:, :2] * (1 + text_scale) + text_shift, x[:, 2:] * (1 + scale) + shift], 1)
        both = attention(m.q(both), m.k(both), m.v(both))
        return m.last(torch.cat([text_gate * both[:, :2], gate * both[:, 2:]], 1))

    model = Net(use, first=linear(), modulation=linear(6 * D), q=linear(), k=linear(), v=linear(), last=linear(3))
    assert str(row(model, X, "modulation.weight").layout) == "out,in 0|1|2|3|4|5"
    assert str(row(model, X, "q.weight").layout) == "out,in"


def test_a_modulation_of_three_branches_is_in_nine_parts():
    """As in SD3.5: a shift, a scale and a gate for two attentions and an MLP."""

    def use(m, x):
        x = m.first(x)
        parts = m.modulation(x.mean(1, keepdim=True)).chunk(9, -1)
        for shift, scale, gate, branch in zip(parts[::3], parts[1::3], parts[2::3], m.branches, strict=True):
            x = x + gate * branch(F.layer_norm(x, (D,)) * (1 + scale) + shift)
        return m.last(x)

    branches = nn.ModuleList(linear() for _ in range(3))
    model = Net(use, first=linear(), modulation=linear(9 * D), branches=branches, last=linear(3))
    assert str(row(model, X, "modulation.weight").layout) == "out,in 0|1|2|3|4|5|6|7|8"


def test_queries_keys_and_values_of_linear_attention_are_parts_of_a_convolution():
    """As in the U-Nets of diffusion: queries are normalised over their features, keys over the places."""

    def use(w, x):
        q, k, v = (heads(part.transpose(1, 2), 3) for part in F.conv1d(x.transpose(1, 2), w).chunk(3, 1))
        return (q.softmax(-1) @ (k.softmax(-2).transpose(-1, -2) @ v)).transpose(1, 2).flatten(2)

    found = row(Mix((3 * D, D, 1), use), X)
    assert (found.role, str(found.layout)) == ("conv", "out,in,*k 0|1|2")


class Fused(nn.Linear):
    """loralib's adapter of a fused projection: queries and values have a pair of factors each, keys have none."""

    def __init__(self, by_weights):
        super().__init__(D, 3 * D)
        self.lora_A = nn.Parameter(torch.randn(2 * 2, D))
        self.lora_B = nn.Parameter(torch.randn(2 * D, 2))
        self.by_weights = by_weights

    def forward(self, x):
        inner = self.lora_A[None] if self.by_weights else F.linear(x, self.lora_A).transpose(1, 2)
        q, v = F.conv1d(inner, self.lora_B[..., None], groups=2).chunk(2, 1)
        if self.by_weights:
            return F.linear(x, self.weight + torch.cat([q, torch.zeros_like(q), v], 1)[0], self.bias)
        return super().forward(x) + torch.cat([q, torch.zeros_like(q), v], 1).transpose(1, 2)


@pytest.mark.parametrize("by_weights", [False, True])
def test_factors_that_are_put_together_by_a_convolution_in_groups_are_matrices_each(by_weights):
    model = Net(lambda m, x: m.last(attention(*m.qkv(x).chunk(3, -1))), qkv=Fused(by_weights), last=linear(3))
    for side in "AB":
        found = row(model, X, f"qkv.lora_{side}")
        assert (found.role, found.how) == (f"lora_{side}", "forward")
        assert [size for _, size in found.layout.split.parts] == [1, 1]
    assert str(row(model, X, "qkv.weight").layout) == "out,in q|k|v"


TABLES = {
    "positions on a grid": ((1, 2, 3, D), lambda w, x: x[:, :3, None].transpose(1, 2) + w, (1, D, 6)),
    "of one axis of it": ((1, 3, 1, D), lambda w, x: x[:, :3, None] + w, (1, D, 3)),
    "memory of keys and values": ((2, 3, 2, 4), lambda w, x: memory(w, x), (1, 4, 12)),
    "an input that is learned": ((1, D, 2, 2), lambda w, x: F.conv2d(w, torch.ones(D, D, 1, 1)) * x.sum(), (1, 2, 2 * D)),
}


def memory(w, x):
    k, v = (torch.cat([part.expand(2, -1, -1, -1), heads(x, 3)], 2) for part in w)
    return F.scaled_dot_product_attention(heads(x, 3), k, v)


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_of_more_than_three_dimensions_is_no_vector(kind):
    shape, use, matrices = TABLES[kind]
    model = Net(lambda m, x: m.last(use(m.w, x).mean((1, 2))), w=nn.Parameter(torch.randn(shape)))
    model.last = linear(3, 2 if shape[1] == D else shape[-1])
    found = row(model, X)
    assert (found.role, found.how, found.layout.shapes(shape)) == ("embedding", "forward", (matrices,))


def test_a_codebook_is_compared_with_and_read_and_is_no_table_of_positions():
    def use(m, x):
        near = (x @ m.codes[0].T).argmax(-1)
        return m.last(m.codes[0][near] + x - x.detach())

    model = Net(use, codes=nn.Parameter(torch.randn(1, 7, D)), last=linear(3))
    found = row(model, X, "codes")
    assert (found.role, found.note, found.how) == ("embedding", "", "forward")


class RMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(3, 1, 4))

    def forward(self, x):
        return F.normalize(x, dim=-1) * self.gamma


def test_gains_that_are_seen_to_be_gains_have_no_note():
    model = Net(lambda m, x: m.last(m.norm(heads(x, 3)).transpose(1, 2).flatten(2)), norm=RMSNorm(), last=linear(3))
    assert (row(model, X, "norm.gamma").role, row(model, X, "norm.gamma").note) == ("vector", "")
    assert row(model, None, "norm.gamma").note


def test_blocks_whose_results_are_dealt_out_to_the_blocks_after_them_are_a_stack():
    """As in monarch matrices: two block-diagonal ones, and a permutation between them."""

    def use(m, x):
        y = torch.bmm(x.view(-1, 4, 3).transpose(0, 1), m.one.transpose(1, 2)).permute(2, 1, 0)
        return m.last(torch.bmm(y, m.two.transpose(1, 2)).transpose(0, 1).flatten(1).relu())

    blocks = {"one": nn.Parameter(torch.randn(4, 4, 3)), "two": nn.Parameter(torch.randn(4, 3, 4))}
    model = Net(use, **blocks, last=linear(3))
    for name in blocks:
        found = row(model, X, name)
        assert (found.role, str(found.layout), found.how) == ("experts", "k,out,in", "forward")


class GEGLU(nn.Module):
    def forward(self, x):
        value, gate = x.chunk(2, -1)
        return value * F.gelu(gate)


def test_without_a_batch_a_gate_that_comes_next_and_a_fused_convolution_have_notes():
    """The rest of what the forward pass would show: what is left whole says so."""
    feed = nn.Sequential(nn.Linear(D, 8 * D), GEGLU(), nn.Linear(4 * D, D))
    model = Net(None, to_qkv=nn.Conv2d(D, 3 * D, 1), feed=feed, act=nn.Conv2d(D, D, 1), head=linear(3))
    notes = {found.name: found.note for found in describe(model).rows}
    assert "gated unit" in notes["feed.0.weight"]
    assert "several matrices" in notes["to_qkv.weight"]
    assert not notes["act.weight"]


class ForceField(nn.Module):
    """Energies of bare matrices, and their derivative by the places."""

    def __init__(self, with_energy):
        super().__init__()
        self.inward, self.outward = nn.Parameter(torch.randn(D, 3)), nn.Parameter(torch.randn(3, 1))
        self.with_energy = with_energy

    def forward(self, x):
        x = x.clone().requires_grad_()
        energy = torch.tanh(x @ self.inward) @ self.outward
        (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return (energy, -force) if self.with_energy else -force


def test_a_forward_that_differentiates_by_its_inputs_is_followed_up_to_there():
    model = ForceField(with_energy=True)
    found = {row.name: (row.role, str(row.layout), row.how) for row in describe(model, X).rows}
    assert found == {"inward": ("hidden", "in,out", "forward"), "outward": ("head", "in,out", "forward")}
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    derivatives_alone = describe(ForceField(with_energy=False), X)
    assert "roles are those of the modules" in str(derivatives_alone)
    assert {row.name: row.how for row in derivatives_alone.rows}["inward"] == "assumed"
