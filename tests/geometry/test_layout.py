"""Layouts: round trips over shapes, and each stack against what torch computes with the weight."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from layerwise.errors import LayerwiseError
from layerwise.geometry.layout import (
    ConvLayout,
    ConvTransposeLayout,
    Layout,
    MatrixLayout,
    StackLayout,
    TransposedLayout,
    TransposedStackLayout,
    VectorLayout,
    VectorStackLayout,
)
from layerwise.geometry.split import Split

QKV = Split.equal("q", "k", "v")
small = st.integers(1, 5)


@st.composite
def splits(draw) -> tuple[Split | None, int]:
    """A split (or none) and a d_out that it divides."""
    if draw(st.booleans()):
        return None, draw(small)
    sizes = draw(st.lists(st.integers(1, 3), min_size=2, max_size=4))
    split = Split(tuple((f"part{i}", size) for i, size in enumerate(sizes)), draw(st.integers(1, 3)))
    return split, split.blocks * sum(sizes) * draw(st.integers(1, 3))


@st.composite
def cases(draw) -> tuple[Layout, tuple[int, ...]]:
    """A layout and a shape that it holds."""
    split, d_out = draw(splits())
    d_in, k, groups = draw(small), draw(small), draw(st.integers(1, 3))
    kernel = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    return draw(
        st.sampled_from(
            [
                (VectorLayout(split), (d_out,)),
                (VectorLayout(), ()),
                (VectorLayout(), (1, d_in, k)),
                (VectorStackLayout(split), (k, d_out)),
                (MatrixLayout(split), (d_out, d_in)),
                (TransposedLayout(split), (d_in, d_out)),
                (StackLayout(split), (k, d_out, d_in)),
                (TransposedStackLayout(split), (k, d_in, d_out)),
                (ConvLayout(split, groups), (groups * d_out, d_in, *kernel)),
                (ConvTransposeLayout(split, groups), (groups * d_in, d_out, *kernel)),
            ]
        )
    )


def numbered(shape) -> torch.Tensor:
    return torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)


@given(cases(), st.booleans())
@settings(max_examples=300)
def test_round_trip_and_shapes(case, strided):
    layout, shape = case
    tensor = numbered(shape)
    if strided:  # not contiguous, as after a transpose or in channels_last
        tensor = numbered(shape[::-1]).permute(tuple(reversed(range(len(shape)))))
    stacks = layout.to_matrices(tensor)
    assert tuple(tuple(stack.shape) for stack in stacks) == layout.shapes(shape)
    back = layout.from_matrices(stacks, shape)
    assert back.shape == tensor.shape
    assert torch.equal(back, tensor)


@given(cases())
@settings(max_examples=200)
def test_every_entry_is_in_one_unit_and_every_unit_has_a_name(case):
    layout, shape = case
    entries = torch.cat([stack.flatten() for stack in layout.to_matrices(numbered(shape))])
    assert sorted(entries.tolist()) == list(range(math.prod(shape)))
    names = layout.unit_names("w", shape)
    assert len(names) == len(set(names)) == layout.count(shape)


@given(cases())
@settings(max_examples=100)
def test_layouts_are_told_apart_by_their_repr(case):
    layout, shape = case
    assert eval(repr(layout)) == layout
    assert layout.to_matrices(torch.empty(shape, device="meta"))[0].is_meta  # shapes alone are enough


def test_equal_parts_share_one_stack_as_a_view():
    for layout, shape in [
        (MatrixLayout(QKV), (12, 5)),
        (TransposedLayout(QKV), (5, 12)),
        (StackLayout(QKV), (2, 12, 5)),
        (ConvLayout(groups=2), (4, 3, 2, 2)),
        (MatrixLayout(Split.equal("gate", "up", blocks=6)), (12, 5)),
    ]:
        tensor = numbered(shape)
        (stack,) = layout.to_matrices(tensor)
        assert stack.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def test_sizes_of_a_split_are_whole_numbers():
    with pytest.raises(LayerwiseError, match="whole numbers of rows"):
        Split.of_sizes({"q": 2.5, "k": 1})


def test_unequal_parts_are_several_stacks_in_order():
    layout = MatrixLayout(Split.of_sizes({"q": 8, "k": 2, "v": 2}))
    weight = numbered((12, 5))
    q, kv = layout.to_matrices(weight)
    assert torch.equal(q[0], weight[:8])
    assert torch.equal(kv, torch.stack([weight[8:10], weight[10:]]))
    assert layout.unit_names("w", (12, 5)) == ("w[q]", "w[k]", "w[v]")
    assert layout.shapes((12, 5)) == ((1, 8, 5), (2, 2, 5))


def test_gpt2_c_attn_is_three_matrices_the_right_way_round():
    weight, x = (
        torch.randn(6, 12, dtype=torch.float64),
        torch.randn(6, dtype=torch.float64),
    )  # Conv1D: y = x W
    (stack,) = TransposedLayout(QKV).to_matrices(weight)
    torch.testing.assert_close(stack @ x, (x @ weight).view(3, 4))


def test_interleaved_heads_are_gathered():
    heads, size = 2, 3
    weight = numbered((heads * 3 * size, 4))
    (stack,) = MatrixLayout(Split.equal("q", "k", "v", blocks=heads)).to_matrices(weight)
    by_head = weight.view(heads, 3, size, 4)
    for part in range(3):
        assert torch.equal(stack[part], by_head[:, part].reshape(heads * size, 4))


def test_names_of_experts_with_a_split():
    layout = TransposedStackLayout(Split.equal("gate", "up"))
    assert layout.unit_names("w", (2, 3, 8)) == ("w[0,gate]", "w[0,up]", "w[1,gate]", "w[1,up]")
    assert StackLayout().unit_names("w", (2, 3, 8)) == ("w[0]", "w[1]")
    weight, x = torch.randn(2, 3, 8), torch.randn(3)
    stack = layout.to_matrices(weight)[0]
    expected = torch.stack([half for expert in weight for half in (x @ expert).chunk(2)])
    torch.testing.assert_close(stack @ x, expected)


def test_embedding_maps_a_one_hot_to_its_vector():
    weight = torch.randn(7, 3)
    (stack,) = TransposedLayout().to_matrices(weight)
    assert stack.shape == (1, 3, 7)
    torch.testing.assert_close(stack[0] @ F.one_hot(torch.tensor(4), 7).float(), weight[4])


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv1d(6, 4, 3),
        nn.Conv2d(6, 4, (3, 2)),
        nn.Conv2d(6, 4, (3, 2), groups=2),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Conv2d(6, 12, 3, groups=6),
        nn.Conv3d(2, 4, (1, 3, 2), groups=2),
    ],
    ids=str,
)
def test_convolution_is_its_matrices_on_patches(module):
    """The output at one position, from the patch that the kernel covers."""
    module = module.double()
    size = module.kernel_size
    patch = torch.randn(module.in_channels, *size, dtype=torch.float64)
    (stack,) = ConvLayout(groups=module.groups).to_matrices(module.weight)
    columns = patch.reshape(module.groups, -1, 1)
    expected = module(patch[None]).flatten() - module.bias
    torch.testing.assert_close((stack @ columns).flatten(), expected)


@pytest.mark.parametrize(
    "module",
    [
        nn.ConvTranspose1d(6, 4, 3),
        nn.ConvTranspose2d(6, 4, (3, 2)),
        nn.ConvTranspose2d(6, 4, (3, 2), groups=2),
        nn.ConvTranspose3d(2, 2, (1, 3, 2), groups=2),
    ],
    ids=str,
)
def test_transposed_convolution_reads_taps_times_inputs(module):
    """At the centre of a wide input every tap contributes: the output there is the matrix on the flipped patch."""
    module = module.double()
    size = module.kernel_size
    patch = torch.randn(module.in_channels, *size, dtype=torch.float64)
    (stack,) = ConvTransposeLayout(groups=module.groups).to_matrices(module.weight)
    flipped = patch.flip(tuple(range(1, patch.ndim)))
    full = module(patch[None])[0] - module.bias.reshape(-1, *(1 for _ in size))
    centre = full[(slice(None), *(k - 1 for k in size))]
    torch.testing.assert_close((stack @ flipped.reshape(module.groups, -1, 1)).flatten(), centre)


def test_channels_last_weight_round_trips_with_the_same_values():
    weight = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    (stack,) = ConvLayout().to_matrices(weight)
    assert torch.equal(stack[0], weight.contiguous().reshape(4, -1))
    assert torch.equal(ConvLayout().from_matrices((stack,), weight.shape), weight)


@pytest.mark.parametrize(
    ("layout", "shape", "says"),
    [
        (MatrixLayout(), (3,), "MatrixLayout holds tensors of shape"),
        (StackLayout(), (3, 4), "StackLayout"),
        (ConvLayout(groups=3), (4, 2, 3), "groups=3"),
        (MatrixLayout(QKV), (10, 4), "d_out = 10 cannot be divided as q|k|v"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(layout, shape, says):
    with pytest.raises(LayerwiseError) as error:
        layout.shapes(shape)
    assert says in str(error.value)


def test_splits_that_make_no_sense_are_refused():
    for make in (
        lambda: Split.equal("q"),
        lambda: Split.equal("q", "q"),
        lambda: Split((("q", 0), ("k", 1))),
        lambda: Split.equal("q", "k", blocks=0),
    ):
        with pytest.raises(LayerwiseError):
            make()


def test_a_stack_of_no_matrix_divides_and_joins():
    """Of experts cut over more processes than there are, some hold none."""
    layout = StackLayout(Split.equal("gate", "up"))
    stacks = layout.to_matrices(torch.zeros(0, 4, 6))
    assert [tuple(stack.shape) for stack in stacks] == [(0, 2, 6)]
    assert layout.from_matrices(stacks, (0, 4, 6)).shape == (0, 4, 6)
