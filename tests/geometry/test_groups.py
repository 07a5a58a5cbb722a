"""Groups, overrides, splits, plain parameters, the table, and every refusal."""

import re
import warnings

import pytest
import torch
from torch import nn

import layerwise.geometry as geometry
from layerwise.errors import LayerwiseError
from layerwise.geometry import (
    RowNorm,
    Sign,
    Spectral,
    Split,
    VectorRMS,
    describe,
    group_by_shape,
    param_groups,
)
from layerwise.geometry.layout import MatrixLayout, TransposedLayout, VectorLayout


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv_proj = nn.Linear(width, 2 * width, bias=False)
        self.mlp = nn.Linear(width, width)


class Model(nn.Module):
    """An embedding, two blocks, a tied head."""

    def __init__(self, width=8, vocabulary=20):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight


def group_of(groups, name):
    (group,) = [group for group in groups if name in dict(group["params"])]
    return group


def test_groups_hold_every_parameter_once_with_what_they_share():
    model = Model()
    groups = param_groups(model)
    names = [name for group in groups for name, _ in group["params"]]
    assert sorted(names) == sorted(dict(model.named_parameters()))
    assert [(g["role"], g["layout"], g["geometry"]) for g in groups] == [
        ("head", MatrixLayout(), Sign(per_input=True)),
        ("vector", VectorLayout(), VectorRMS()),
        ("hidden", MatrixLayout(), Spectral()),
    ]
    kept = {"params", "role", "layout", "geometry", "origin"}
    assert all(set(group) - {"weight_decay"} == kept for group in groups)


def test_groups_make_a_torch_optimizer():
    model = Model()
    optimizer = torch.optim.SGD(param_groups(model), lr=0.1)
    model.blocks[0].mlp(torch.ones(8)).sum().backward()
    before = model.blocks[0].mlp.bias.detach().clone()
    optimizer.step()
    assert not torch.equal(model.blocks[0].mlp.bias, before)


def test_frozen_and_empty_parameters_are_left_out():
    model = Model()
    model.blocks[0].mlp.weight.requires_grad_(False)
    model.nothing = nn.Parameter(torch.zeros(0, 4))
    names = {name for group in param_groups(model) for name, _ in group["params"]}
    assert "blocks.0.mlp.weight" not in names
    assert "nothing" not in names
    assert describe(model).frozen == ("blocks.0.mlp.weight",)
    assert "1 frozen left out" in describe(model).summary()


def test_override_of_options_splits_a_group_off():
    groups = param_groups(Model(), overrides={"blocks.*.mlp.weight": {"lr": 0.5, "weight_decay": 0.0}})
    group = group_of(groups, "blocks.1.mlp.weight")
    assert [name for name, _ in group["params"]] == ["blocks.0.mlp.weight", "blocks.1.mlp.weight"]
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.0)
    assert "lr" not in group_of(groups, "blocks.0.qkv_proj.weight")


def test_options_by_role_and_by_name_and_the_later_dict_wins():
    by_role = {"role:vector": {"weight_decay": 0.0, "lr": 0.1}, "*.norm.bias": {"lr": 0.2}}
    groups = param_groups(Model(), overrides=[by_role, {"blocks.1.norm.bias": {"lr": 0.3}}])
    taken = {name: (g.get("weight_decay"), g.get("lr")) for g in groups for name, _ in g["params"]}
    assert taken["blocks.0.norm.weight"] == (0.0, 0.1)
    assert taken["blocks.0.norm.bias"] == (0.0, 0.2)
    assert taken["blocks.1.norm.bias"] == (0.0, 0.3)
    assert taken["blocks.0.mlp.weight"] == (None, None)


def test_override_with_a_bare_geometry_and_by_a_tied_name():
    groups = param_groups(Model(), overrides={"head.weight": RowNorm()})
    assert group_of(groups, "embed.weight")["geometry"] == RowNorm()
    assert group_of(groups, "embed.weight")["role"] == "head"


def test_override_of_a_role_brings_its_geometry_and_layout():
    model = Model()
    model.table = nn.Parameter(torch.zeros(16, 8))
    groups = param_groups(
        model,
        overrides={
            "table": {"role": "embedding"},
            "blocks.0.mlp.weight": {"role": "vector", "radius": 3.0},
        },
    )
    table = group_of(groups, "table")
    assert (table["layout"], table["geometry"]) == (TransposedLayout(), Sign())
    vector = group_of(groups, "blocks.0.mlp.weight")
    assert (vector["layout"], vector["geometry"], vector["radius"]) == (VectorLayout(), VectorRMS(), 3.0)


def test_override_of_a_layout_and_norm_group():
    overrides = {"blocks.0.mlp.weight": {"layout": TransposedLayout(), "norm_group": "mine"}}
    group = group_of(param_groups(Model(), overrides), "blocks.0.mlp.weight")
    assert (group["layout"], group["norm_group"]) == (TransposedLayout(), "mine")
    row = next(row for row in describe(Model(), overrides).rows if row.name == "blocks.0.mlp.weight")
    assert row.norm_group == "mine"


@pytest.mark.parametrize(
    ("spec", "units", "shapes"),
    [
        ({"q": 8, "k": 4, "v": 4}, ["q", "k", "v"], ((1, 8, 8), (2, 4, 8))),
        (4, ["0", "1", "2", "3"], ((4, 4, 8),)),
        (Split.equal("a", "b", blocks=2), ["a", "b"], ((2, 8, 8),)),
        ({"parts": {"a": 1, "b": 1}, "blocks": 2}, ["a", "b"], ((2, 8, 8),)),
        ({"parts": {"a": 3, "b": 1}}, ["a", "b"], ((1, 12, 8), (1, 4, 8))),
        ({"parts": 12, "blocks": 4}, ["parts", "blocks"], ((1, 12, 8), (1, 4, 8))),
        (1, [], ((1, 16, 8),)),
        ({"all": 16}, [], ((1, 16, 8),)),
    ],
)
def test_declared_splits(spec, units, shapes):
    name = "blocks.0.qkv_proj.weight"
    row = next(row for row in describe(Model(), splits={"blocks.*.qkv_proj.weight": spec}).rows if row.name == name)
    assert row.layout.shapes(row.shape) == shapes
    assert row.units == (tuple(f"{name}[{unit}]" for unit in units) or (name,))
    assert not row.note


def test_a_split_may_undo_a_known_one():
    model = nn.Sequential(nn.LSTM(4, 4), nn.Linear(4, 4))
    rows = {row.name: row for row in describe(model, splits={"0.weight_ih_l0": 1}).rows}
    assert len(rows["0.weight_ih_l0"].units) == 1
    assert len(rows["0.weight_hh_l0"].units) == 4


def test_layers_of_different_width_share_a_group():
    model = nn.ModuleDict({"a": Model(8), "b": Model(16)})
    groups = param_groups(
        model,
        splits={"a.*.qkv_proj.weight": {"q": 8, "kv": 8}, "b.*.qkv_proj.weight": {"q": 16, "kv": 16}},
    )
    assert len(group_of(groups, "a.blocks.0.qkv_proj.weight")["params"]) == 4


def complex_model():
    model = Model()
    model.phase = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    return model


def flat_model():
    model = Model()
    model.flat = nn.Parameter(torch.zeros(3))
    model.flat._is_flat_param = True
    return model


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: param_groups(Model().parameters()), "group_by_shape"),
        (lambda: param_groups(nn.ReLU()), "ReLU has no parameters"),
        (lambda: param_groups(Model().requires_grad_(False)), "all 11 parameters of Model are frozen"),
        (lambda: param_groups(complex_model()), "phase is complex (torch.complex64)"),
        (lambda: param_groups(flat_model()), "fully_shard"),
        (lambda: param_groups(nn.LazyLinear(3)), "weight has no shape yet"),
        (lambda: param_groups(Model(), {"*.mpl.weight": {"lr": 1}}), "nearest: blocks.0.mlp.weight"),
        (lambda: param_groups(Model(), {"hed.weight": {"lr": 1}}), "head.weight"),
        (lambda: param_groups(Model(), {"qqq": {"lr": 1}}), "matches no parameter"),
        (
            lambda: param_groups(Model(), {"*.mlp.*": {"lr": 1}, "blocks.1.*": {"lr": 2}}),
            "blocks.1.mlp.weight is matched by '*.mlp.*' and by 'blocks.1.*'",
        ),
        (
            lambda: param_groups(Model(), {"embed.weight": {"lr": 1}, "head.weight": {"lr": 2}}),
            "'embed.weight' and by 'head.weight'",
        ),
        (lambda: param_groups(Model(), {"head.weight": {"role": "haed"}}), "did you mean 'head'?"),
        (lambda: param_groups(Model(), {"head.weight": {"role": "zzz"}}), "choose from embedding"),
        (lambda: param_groups(Model(), {"role:vektor": {"lr": 1}}), "did you mean 'vector'?"),
        (lambda: param_groups(Model(), {"head.weight": 3}), "give a geometry or a dict"),
        (lambda: param_groups(Model(), {"head.weight": {"geometry": "sign"}}), "'sign'; give one"),
        (lambda: param_groups(Model(), {"head.weight": {"layout": "x"}}), "layout of embed.weight is 'x'"),
        (lambda: param_groups(Model(), {"head.weight": {"params": []}}), "'params'"),
        (
            lambda: param_groups(Model(), {"*.norm.bias": {"layout": MatrixLayout()}}),
            "blocks.0.norm.bias: MatrixLayout holds",
        ),
        (
            lambda: param_groups(Model(), splits={"*.0.qkv_proj.weight": {"q": 8, "k": 4}}),
            "blocks.0.qkv_proj.weight: the sizes {'q': 8, 'k': 4} add up to 12, but its d_out is 16",
        ),
        (lambda: param_groups(Model(), splits={"*.qkv_proj.weight": 3}), "d_out = 16 cannot be divided"),
        (
            lambda: param_groups(Model(), splits={"*.qkv_proj.weight": {"q": 16, "k": 0}}),
            "positive number of rows",
        ),
        (
            lambda: param_groups(Model(), splits={"*.qkv_proj.weight": {"axis": 1, "heads": 4}}),
            "for parts of d_in a pattern such as 'o (4 i)'",
        ),
        (
            lambda: param_groups(Model(), splits={"*.qkv_proj.weight": {"a": 4, "b": 4}}),
            "for parts of d_in a pattern such as 'o (2 i)'",
        ),
        (
            lambda: param_groups(Model(), splits={"*.qkv_proj.weight": {"parts": {"a": 1, "b": 1}, "block": 2}}),
            "blocks.0.qkv_proj.weight: Split(block=2): there is no 'block'; did you mean 'blocks'?",
        ),
        (
            lambda: param_groups(Model(), splits={"*.qkv_proj.weight": {"parts": {"a": 1, "b": 0.5}}}),
            "blocks.0.qkv_proj.weight: Split(parts=(('a', 1), ('b', 0.5))): give",
        ),
        (lambda: param_groups(Model(), splits={"*.qkv_proj.weight": "qkv"}), "give a number of equal parts"),
        (lambda: param_groups(Model(), splits={"*.qkv_proj.weight": True}), "give a number of equal parts"),
        (
            lambda: param_groups(Model(), splits={"*.c_attn.*": 3}),
            "splits: '*.c_attn.*' matches no parameter",
        ),
        (lambda: group_by_shape([]), "no parameters"),
        (lambda: group_by_shape([nn.Parameter(torch.zeros(2, dtype=torch.cfloat))]), "param_0 is complex"),
        (lambda: group_by_shape([torch.zeros(2, dtype=torch.int64)]), "param_0 is of type torch.int64"),
        (lambda: group_by_shape([("a", 3)]), "a is int"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_bad_input_is_one_clear_line(call, says):
    with pytest.raises(LayerwiseError) as error:
        call()
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_pattern_on_frozen_parameters_only():
    model = Model()
    model.blocks[0].norm.requires_grad_(False)
    with pytest.raises(LayerwiseError, match="frozen parameters only"):
        param_groups(model, {"blocks.0.norm.*": {"lr": 1.0}})


def test_a_parameter_given_twice():
    p = nn.Parameter(torch.zeros(3))
    with pytest.raises(LayerwiseError, match="twice"):
        group_by_shape([("a", p), ("b", p)])


def test_plain_parameters_go_by_shape_with_one_warning():
    shapes = [(), (4,), (4, 3), (4, 3, 2), (4, 3, 2, 2), (4, 3, 2, 2, 2)]
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        groups = group_by_shape(iter(parameters))
    assert [warning.category for warning in caught] == [UserWarning]
    assert "param_groups(model)" in str(caught[0].message)
    assert caught[0].filename == __file__
    taken = {name: (g["role"], g["geometry"]) for g in groups for name, _ in g["params"]}
    assert taken == {
        "param_0": ("vector", VectorRMS()),
        "param_1": ("vector", VectorRMS()),
        "param_2": ("hidden", Spectral()),
        "param_3": ("conv", Spectral(taps=2)),
        "param_4": ("conv", Spectral(taps=4)),
        "param_5": ("conv", Spectral(taps=8)),
    }
    for group in groups:
        for _, p in group["params"]:
            group["layout"].shapes(p.shape)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_named_parameters_keep_their_names():
    groups = group_by_shape(Model().named_parameters())
    assert group_of(groups, "blocks.1.mlp.weight")["role"] == "hidden"


def test_table_has_a_line_for_layers_that_are_alike():
    text = str(describe(Model()))
    lines = text.splitlines()
    line = next(line for line in lines if "mlp.weight" in line)
    cells = [
        "blocks.{0-1}.mlp.weight",
        "hidden",
        "8 x 8",
        "out,in",
        "2 x 1",
        "Spectral()",
        "module",
    ]
    assert re.split(r"  +", line) == cells
    named = str(describe(Model(), overrides={"blocks.0.mlp.weight": {"norm_group": "mine"}})).splitlines()
    assert "norm group" in named[0]  # where one is not its geometry's own
    assert any("blocks.0.mlp.weight" in line and "mine" in line for line in named)
    header = lines[0]
    assert all(row[header.index("role") - 1] == " " for row in lines[2:8])  # columns are aligned
    assert f"{sum(p.numel() for p in Model().parameters())} entries in 11 parameters" in text
    assert "embed.weight is tied to head.weight" in text
    assert "blocks.{0-1}.qkv_proj.weight: may be several matrices" in text
    assert sum("blocks.0.mlp.weight" in line for line in describe(Model()).full().splitlines()) == 1


def test_table_keeps_apart_what_differs_and_leaves_numbers_inside_names():
    model = nn.ModuleDict({"x1": nn.ModuleList(nn.Linear(size, 2) for size in (2, 3, 2)), "out": nn.Linear(2, 1)})
    text = str(describe(model))
    assert "x1.{0,2}.weight" in text
    assert "x1.1.weight" in text


def test_notebook_table_is_escaped_html():
    html = describe(Model())._repr_html_()
    assert html.startswith("<table>")
    assert html.count("<tr>") == html.count("</tr>") == 7
    assert "blocks.{0-1}.mlp.weight" in html


def test_meta_parameters_and_sharded_parameters_need_no_data(tmp_path):
    with torch.device("meta"):
        model = Model()
    assert len(param_groups(model)) == 3
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Model()
        expected = describe(model).rows
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert type(model.embed.weight).__name__ == "DTensor"
        assert describe(model).rows == expected
    finally:
        destroy_process_group()


def test_exports():
    for name in ("Layout", "Split", "describe", "group_by_shape", "param_groups"):
        assert name in geometry.__all__


def test_no_warning_of_doubts_where_the_model_was_run_by_forward_alone():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        groups = param_groups(model, forward=lambda model, batch: model(torch.arange(5)))
    assert len(groups) == 3
