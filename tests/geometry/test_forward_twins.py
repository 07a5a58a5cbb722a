"""Whole models: `Lanton(param_groups(model, batch))` against one that is given every matrix on its own, by hand."""

from dataclasses import replace

import pytest
import torch
from forward_models import MODELS
from torch import nn

import layerwise as lw
from layerwise.geometry import MatrixLayout, Sign, Spectral, VectorLayout, VectorRMS, spectral_conv

GEOMETRY = {"embedding": Sign(), "head": Sign(per_input=True), "hidden": Spectral(), "vector": VectorRMS()}


def by_hand(model: nn.Module) -> dict[str, tuple[str, object]]:
    """name -> (role, how its matrices lie in it), of every parameter."""
    known = model.parts()
    return {name: known.get(name, ("vector", lambda w: [w.reshape(-1, 1)])) for name, _ in model.named_parameters()}


def twin_groups(model: nn.Module) -> list[dict]:
    """A group for each matrix, which is a parameter of its own."""
    groups = []
    for name, (role, cut) in by_hand(model).items():
        weight = model.get_parameter(name)
        geometry = spectral_conv(weight.shape[2:]) if role == "conv" else GEOMETRY[role]
        layout = VectorLayout() if role == "vector" else MatrixLayout()
        for i, matrix in enumerate(cut(weight.detach())):
            param = nn.Parameter(matrix.clone())
            what = {"role": role, "layout": layout, "geometry": geometry}
            no_decay = {"weight_decay": 0.0} if role == "vector" or "pos" in name or "wpe" in name else {}
            groups.append({"params": [(f"{name}/{i}", param)], **what, **no_decay})
    return groups


def exactly(group: dict) -> dict:
    """Exact polar factors and nuclear norms: estimates draw their probes by a matrix's place among others."""
    if isinstance(group["geometry"], Spectral):
        return {**group, "geometry": replace(group["geometry"], polar="svd", nuclear="svd")}
    return group


@pytest.mark.parametrize("family", MODELS)
def test_lanton_takes_the_steps_of_a_literal_twin_matrix_by_matrix(family):
    make, batch = MODELS[family]
    torch.manual_seed(0)
    model = make().double()
    given = batch()
    optimizer = lw.Lanton([exactly(group) for group in lw.param_groups(model, given)], lr=0.1)
    groups = [exactly(group) for group in twin_groups(model)]
    twin = lw.Lanton(groups, lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        out = model(*given) if isinstance(given, tuple) else model(given)
        (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        for group in groups:
            ((key, param),) = group["params"]
            name, index = key.rsplit("/", 1)
            whole = gradients[name] if gradients[name] is not None else torch.zeros_like(model.get_parameter(name))
            param.grad = by_hand(model)[name][1](whole)[int(index)].clone()
        optimizer.step()
        twin.step()
    # Steps have entries of RMS 0.02, and multipliers come in float32: 0.02 * 2^-23, a few times over
    steps = {group["params"][0][0]: group["params"][0][1] for group in groups}
    for name, (_, cut) in by_hand(model).items():
        for i, matrix in enumerate(cut(model.get_parameter(name).detach())):
            assert (matrix - steps[f"{name}/{i}"]).abs().max() < 1e-8, f"{name} part {i}"


@pytest.mark.parametrize("family", MODELS)
def test_heads_of_whole_models_are_found_without_a_batch_too(family):
    model = MODELS[family][0]()
    heads = {name for name, (role, _) in by_hand(model).items() if role == "head"}
    rows = lw.describe(model).rows
    assert {row.name for row in rows if row.role == "head"} == heads
