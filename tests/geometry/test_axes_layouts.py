"""Layouts written as patterns, and depthwise filters, over random patterns and shapes, against plain loops over indices."""

import math
from itertools import product

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import layerwise as lw
from layerwise.geometry.axes import AxesLayout, layout_of
from layerwise.geometry.layout import DepthwiseLayout
from layerwise.geometry.split import Split


@st.composite
def patterns(draw) -> tuple[list[list[tuple[str, int]]], list[int]]:
    """(name, size) of the factors of each dimension, of which one is o, i or k, and the sizes of the dimensions."""
    letters = draw(st.permutations(["o", "i", *draw(st.lists(st.sampled_from("oik"), max_size=2))]))
    factors = []
    for letter in letters:
        numbers = [(str(n), n) for n in draw(st.lists(st.integers(1, 3), max_size=2))]
        numbers.insert(draw(st.integers(0, len(numbers))), (letter, draw(st.integers(1, 3))))
        factors.append(numbers)
    return factors, [math.prod(size for _, size in dimension) for dimension in factors]


def written(factors) -> str:
    words = [" ".join(name for name, _ in dimension) for dimension in factors]
    return " ".join(word if " " not in word else f"({word})" for word in words)


def by_loops(tensor, factors):
    """`[k, o, i]`: every entry put where its indices along o, i and the counting factors say, the first the slowest."""
    flat = [factor for dimension in factors for factor in dimension]
    side = ["k" if name.isdigit() else name for name, _ in flat]
    sizes = {s: math.prod(size for (_, size), its in zip(flat, side, strict=True) if its == s) for s in "koi"}
    out = torch.full((sizes["k"], sizes["o"], sizes["i"]), float("nan"))
    for index in product(*(range(size) for _, size in flat)):
        place = dict.fromkeys("koi", 0)
        for (_, size), its, i in zip(flat, side, index, strict=True):
            place[its] = place[its] * size + i
        entry, start = [], 0
        for dimension in factors:
            along = 0
            for (_, size), i in zip(dimension, index[start : start + len(dimension)], strict=True):
                along = along * size + i
            start += len(dimension)
            entry.append(along)
        out[place["k"], place["o"], place["i"]] = tensor[tuple(entry)]
    return out


@settings(max_examples=80)
@given(patterns())
def test_a_pattern_is_what_its_words_say_and_the_way_back_is_exact(case):
    factors, shape = case
    layout = layout_of(written(factors))
    tensor = torch.arange(float(math.prod(shape))).reshape(shape)
    (stack,) = layout.to_matrices(tensor)
    assert torch.equal(stack, by_loops(tensor, factors))
    assert torch.equal(layout.from_matrices([stack], shape), tensor)
    assert layout.shapes(shape) == (tuple(stack.shape),)
    names = layout.unit_names("w", shape)
    assert len(set(names)) == len(names) == layout.count(shape) == len(stack)
    if isinstance(layout, AxesLayout):
        assert eval(repr(layout)) == layout  # what a checkpoint holds


@settings(max_examples=40)
@given(patterns(), st.integers(2, 3))
def test_a_split_divides_the_rows_of_every_matrix_of_a_pattern(case, parts):
    factors, shape = case
    layout = AxesLayout(Split.equal(*map(str, range(parts))), written(factors))
    tensor = torch.randn(shape)
    (whole,) = AxesLayout(pattern=written(factors)).to_matrices(tensor)
    if whole.shape[1] % parts:
        return
    (stack,) = layout.to_matrices(tensor)
    expected = [rows for matrix in whole for rows in matrix.chunk(parts)]
    assert torch.equal(stack, torch.stack(expected))
    assert torch.equal(layout.from_matrices([stack], shape), tensor)
    assert len(layout.unit_names("w", shape)) == len(stack)


@settings(max_examples=40)
@given(st.integers(1, 6), st.lists(st.integers(1, 4), max_size=3))
def test_depthwise_filters_are_the_rows_of_one_matrix_and_step_alone(channels, kernel):
    shape = (channels, 1, *kernel)
    tensor = torch.randn(shape, dtype=torch.float64)
    layout = DepthwiseLayout()
    (stack,) = layout.to_matrices(tensor)
    assert torch.equal(stack[0], torch.stack([tensor[i].flatten() for i in range(channels)]))
    assert torch.equal(layout.from_matrices([stack], shape), tensor)
    assert layout.unit_names("w", shape) == ("w",)
    step = lw.RowNorm().lmo(stack)[0]
    for row, of in zip(step, stack[0], strict=True):  # every filter by its own length alone
        torch.testing.assert_close(row / row.norm(), of / of.norm())
        torch.testing.assert_close(row.norm(), step[0].norm())
