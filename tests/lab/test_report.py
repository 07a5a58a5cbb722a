"""The report on run directories made up by formula: order, labels, curves, figures, the page, and what can be wrong."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from fabricated_runs import fabricate
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex

from layerwise.errors import LayerwiseError
from layerwise.lab.report import RateCurve, Story, contenders, load_runs, write_report
from layerwise.lab.report.figures.heatmap import layer_heat_maps, measured, relative_norms
from layerwise.lab.report.figures.loss import loss_curves, loss_limits, smooth
from layerwise.lab.report.figures.units import effective_rates, network_order, rate_per_layer, unit_name
from layerwise.lab.report.grouping import looks
from layerwise.lab.report.style import BAND, GREY, THEME, Look, spread_apart, styled, themed_svg
from layerwise.lab.report.tables import headline, parameter_rows, result_rows, settings
from layerwise.lab.runs.recorded import LayerHistory, Run, duration

SHORT = {"steps": 60, "blocks": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    fabricate(folder / "adamw", "adamw", final=3.5, with_layers=False, **SHORT)
    fabricate(folder / "lanton", "lanton", final=3.2, with_function_space=True, **SHORT)
    fabricate(folder / "lanton-s1", "lanton", final=3.2, seed=1, **SHORT)
    return {run.name: run for run in load_runs([folder])}


# ------------------------------------------------------------------ names and order


def test_experts_and_heads_are_of_one_kind() -> None:
    kinds = {"experts.up[3,gate]": "experts.up gate", "experts.down[3]": "experts.down", "attn.qkv[q]": "attn.qkv q"}
    assert {name: unit_name(name).kind for name in kinds} == kinds


@pytest.mark.parametrize(
    ("unit", "short"),
    [
        ("transformer.h.3.mlp.c_fc.weight", "h.3 mlp.c_fc"),
        ("transformer.h.0.attn.c_attn.weight[q]", "h.0 attn.c_attn q"),
        ("transformer.h.0.ln_1.bias", "h.0 ln_1 bias"),
        ("model.layers.12.self_attn.q_proj.weight", "layers.12 self_attn.q_proj"),
        ("model.layers.0.mlp.experts.down_proj[3]", "layers.0 mlp.experts.down_proj 3"),
        ("transformer.wte.weight", "wte"),
        ("lm_head.weight", "lm_head"),
    ],
)
def test_units_have_short_names(unit: str, short: str) -> None:
    name = unit_name(unit)
    assert f"{name.block} {name.part}".strip() == short


def test_units_follow_the_models_order_and_blocks_count_as_numbers() -> None:
    parameters = [
        "wte.weight",
        *(f"h.{b}.{part}.weight" for b in range(12) for part in ("attn", "mlp")),
        "lm_head.weight",
    ]
    shuffled = sorted(parameters)  # as text: h.10 before h.2, and lm_head before wte
    assert [n.unit for n in network_order(shuffled, parameters)] == parameters
    assert [n.unit for n in network_order(shuffled, [])] == shuffled


def test_every_contender_has_a_look_of_its_own() -> None:
    names = ["adamw", "lanton", "lanton", "scion", "d-muon", "unheard-of", "lanton"]
    chosen = looks(names)
    assert len({look.color for look in chosen}) == len(names)
    assert chosen[4] == looks(["d-muon"])[0]


def test_of_many_contenders_the_best_have_colours_of_their_own_and_the_others_none(tmp_path: Path) -> None:
    for i in range(20):
        name = ("adamw", "lanton", "d-muon", "scion")[i % 4]
        fabricate(tmp_path / f"r{i}", name, final=4.0 - 0.01 * i, lr=0.001 * 2 ** (i // 4), with_layers=False, steps=60)
    colors = [row.color for row in result_rows(contenders(load_runs([tmp_path])))]
    assert len({*colors[:8]}) == 8
    assert {*colors[8:]} == {BAND}


def test_contenders_in_one_figure_have_markers_of_their_own() -> None:
    assert len({look.marker for look in looks(["dual-muon", "d-muon", "lanton", "adamw", "unheard-of", "lanton"])}) == 6


# ------------------------------------------------------------------ numbers behind the figures


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=12),
    st.floats(0.01, 0.08),
)
def test_labels_are_apart_in_order_and_inside(wanted: list[float], gap: float) -> None:
    placed = spread_apart(wanted, gap)
    order = np.argsort(wanted, kind="stable")
    assert all(np.diff(np.array(placed)[order]) >= gap - 1e-9)
    if (len(wanted) - 1) * gap <= 1:
        assert min(placed) >= -1e-9
        assert max(placed) <= 1 + 1e-9
    if len(wanted) == 1:
        assert placed == pytest.approx(wanted)


def test_smoothing_keeps_lines_and_reduces_noise() -> None:
    line = np.linspace(9.0, 3.0, 200)
    np.testing.assert_allclose(smooth(line), line, atol=1e-9)  # a local line reproduces lines, ends included
    noise = np.random.default_rng(0).normal(size=2000)
    # Gaussian weights of deviation s = 60 points leave 1 / (2 s sqrt(pi)) of the variance: a deviation of 0.07.
    assert np.std(smooth(noise)[200:-200]) < 0.12
    holes = line.copy()
    holes[[3, 50]] = np.nan
    smoothed = smooth(holes)
    assert np.isnan(smoothed[[3, 50]]).all()
    np.testing.assert_allclose(np.delete(smoothed, [3, 50]), np.delete(line, [3, 50]), atol=1e-9)


def test_loss_limits_leave_out_the_first_fall(runs: dict[str, Run]) -> None:
    low, high = loss_limits(contenders(list(runs.values())))
    first = runs["adamw"].train_loss.values[0]
    last = min(run.val_loss.values[-1] for run in runs.values())
    assert low < last < high < first


def test_a_run_that_diverged_at_once_does_not_hide_the_others(tmp_path: Path, runs: dict[str, Run]) -> None:
    path = fabricate(tmp_path / "diverged", "d-muon", status="diverged", with_layers=False, **SHORT)
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    rows = [json.dumps(line | {"loss": 4e5 if i == 0 else None}) for i, line in enumerate(lines)]
    (path / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    (diverged,) = load_runs([path])
    others = list(runs.values())
    assert loss_limits(contenders([*others, diverged])) == loss_limits(contenders(others))
    low, high = loss_limits(contenders([diverged]))
    assert low < 4e5 < high
    drawn = loss_curves(contenders([diverged])).axes[0].lines
    assert "_" in [line.get_marker() for line in drawn if np.isfinite(line.get_ydata()).sum() == 1]


def test_the_largest_function_space_rates_have_names_and_colours(tmp_path: Path) -> None:
    path = fabricate(tmp_path / "a", "lanton", with_function_space=True, **SHORT)
    lines = [json.loads(line) for line in (path / "function_space.jsonl").read_text().splitlines()]
    parts = list(dict.fromkeys(unit_name(name).part for name in lines[0]["rates"]))
    for line in lines:
        for name, rate in line["rates"].items():
            rate["value"] = 2.0 ** parts.index(unit_name(name).part)
    (path / "function_space.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    texts = rate_per_layer(*load_runs([path])).axes[0].texts
    assert len(parts) > 8
    assert {text.get_text() for text in texts} == set(parts[-8:])
    assert BAND not in {to_hex(text.get_color()) for text in texts}


def test_images_are_no_tokens(tmp_path: Path) -> None:
    path = fabricate(tmp_path / "a", "lanton", with_layers=False, **SHORT)
    info = json.loads((path / "run.json").read_text())
    info["config"].setdefault("data", {})["source"] = "digits"
    (path / "run.json").write_text(json.dumps(info))
    groups = contenders(load_runs([path]))
    assert loss_curves(groups).axes[0].get_xlabel() == "Training images"
    assert dict(headline(groups[0].runs))["trained on"].endswith(" images")


def test_noise_is_relative_to_the_median_of_its_group(runs: dict[str, Run]) -> None:
    run = runs["lanton"]
    history = run.history
    assert history is not None
    groups = [run.norm_groups[u.split("[")[0]] for u in history.units]
    relative = relative_norms(history, range(len(history.units)), groups)
    for group in set(groups):
        members = [i for i, g in enumerate(groups) if g == group]
        assert np.nanmedian(relative[members]) == pytest.approx(1)
    rows = [i for i, g in enumerate(groups) if g == "spectral"]
    np.testing.assert_allclose(
        relative[rows] / relative[rows[0]], history.squared_norm[rows] / history.squared_norm[rows[0]]
    )


def test_units_that_no_rule_touches_are_not_drawn(runs: dict[str, Run], tmp_path: Path) -> None:
    history = runs["lanton"].history
    assert history is not None
    assert history.ruled == list(history.units)
    norms, multiplier = history.squared_norm.copy(), history.multiplier.copy()
    norms[1], multiplier[1] = np.nan, 1.0  # AdamW's, beside a rule
    norms[2], multiplier[2] = np.nan, 0.5  # a static rate
    assert replace(history, squared_norm=norms, multiplier=multiplier).ruled == [history.units[0], *history.units[2:]]

    fabricate(tmp_path / "run", "lanton", final=3.2, **SHORT)
    path = tmp_path / "run" / "layers.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        for unit, row in line["layers"].items():
            if "ln_" in unit or unit.endswith(".bias"):
                row |= {"squared_norm": None, "multiplier": 1.0}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(contenders(load_runs([tmp_path / "run"])), tmp_path / "page")
    drawn = {figure.stem for figure in (page.parent / "figures").iterdir()}
    assert "layers_lanton" in drawn
    assert "vectors_lanton" not in drawn


def test_a_curve_knows_its_best_rate_and_whether_it_is_at_the_end() -> None:
    look = Look(GREY)
    inside = RateCurve("a", look, {1e-3: [3.0], 2e-3: [2.0, 2.2], 4e-3: [2.5]})
    assert (inside.best, inside.mean(2e-3), inside.edge) == (2e-3, pytest.approx(2.1), None)
    assert RateCurve("a", look, {1e-3: [1.0], 2e-3: [2.0]}).edge == "lowest"
    assert RateCurve("a", look, {1e-3: [3.0], 2e-3: [2.0]}).edge == "highest"
    bracketed = RateCurve("a", look, {1e-3: [3.0], 2e-3: [2.0], 4e-3: [1.0, math.inf]})
    assert (bracketed.best, bracketed.edge) == (2e-3, None)  # one seed diverged: not a rate to choose
    assert RateCurve("a", look, {1e-3: [math.inf]}).best is None
    assert RateCurve("a", look, {1e-3: [1.0]}).edge is None  # a single rate is no grid


# ------------------------------------------------------------------ reading and grouping


def test_seeds_are_one_contender_and_other_settings_are_another(tmp_path: Path) -> None:
    for name, lr, seed in (("a", 0.01, 0), ("b", 0.01, 1), ("c", 0.02, 0)):
        fabricate(tmp_path / name, "lanton", lr=lr, seed=seed, with_layers=False, **SHORT)
    fabricate(tmp_path / "d", "adamw", with_layers=False, **SHORT)
    groups = contenders(load_runs([tmp_path]))
    assert {g.label: len(g.runs) for g in groups} == {"LANTON lr 0.01": 2, "LANTON lr 0.02": 1, "AdamW": 1}


def test_contenders_on_other_models_are_told_by_the_model(tmp_path: Path) -> None:
    for preset, keys in (("small", {"n_embd": 8, "n_head": 2, "n_layer": 1}), ("large", {"hidden_size": 16, "ffn": 32})):
        path = fabricate(tmp_path / preset, "lanton", with_layers=False, **SHORT)
        info = json.loads((path / "run.json").read_text())
        info["config"]["model"] = {"preset": preset, **keys}
        (path / "run.json").write_text(json.dumps(info))
    labels = [group.label for group in contenders(load_runs([tmp_path]))]
    assert sorted(labels) == ["LANTON large, 5 more", "LANTON small, 5 more"]


def test_half_written_lines_are_left_out(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "killed", "lanton", status="running", **SHORT)

    def recorded() -> tuple[int, int]:
        read = load_runs([run])[0]
        assert read.history is not None
        return len(read.train_loss), read.history.squared_norm.shape[1]

    losses, layers = recorded()
    for stream in ("metrics", "layers"):
        file = run / f"{stream}.jsonl"
        file.write_text(file.read_text()[:-40])
    assert recorded() == (losses - 1, layers - 1)


def test_results_rank_by_loss_with_the_spread_over_seeds(runs: dict[str, Run]) -> None:
    first, second = result_rows(contenders(list(runs.values())))
    assert (first.cells["optimizer"], first.leads, first.cells["seeds"]) == ("LANTON", True, "2")
    losses = [runs[name].val_loss.values[-1] for name in ("lanton", "lanton-s1")]
    assert float(first.cells["val. loss"]) == pytest.approx(np.mean(losses), abs=1e-4)
    assert float(first.cells["spread"]) == pytest.approx(max(losses) - min(losses), abs=1e-4)
    assert (second.cells["optimizer"], second.leads, second.cells["spread"]) == ("AdamW", False, "")


def test_settings_are_shared_or_differ(runs: dict[str, Run]) -> None:
    found = settings(contenders([runs["adamw"], runs["lanton"]]))
    assert dict(found.differing) == {"optimizer.name": ["adamw", "lanton"]}
    assert ("training.steps", "60") in found.shared
    row = next(r for r in parameter_rows([runs["lanton"]]) if r["name"].endswith("h.0.attn.c_attn.weight"))
    assert (row["units"], row["norm_group"]) == ("3 (q, k, v)", "spectral")


@pytest.mark.parametrize(("seconds", "text"), [(3.2, "3.2 s"), (48, "48 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ------------------------------------------------------------------ the page


class _Page(HTMLParser):
    """Collects ids, and whatever a browser would load by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href") and tag != "a":
                self.loads.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_is_self_contained_and_its_figures_are_files_too(runs: dict[str, Run], tmp_path: Path) -> None:
    curve = RateCurve("LANTON", Look(GREY), {1e-3: [3.4, 3.5], 2e-3: [3.2, 3.3], 4e-3: [math.inf, 3.6]})
    story = Story(title="A <title>", notes=["Rates were not tuned."], command="layerwise compare", grid=[curve])
    path = write_report(contenders(list(runs.values())), tmp_path, story)
    page = path.read_text()
    parsed = _Page()
    parsed.feed(page)
    assert all(target.startswith(("data:", "#")) for target in parsed.loads), "a request would leave the page"
    assert not re.search(r"url\((?!#)", page)
    assert "@import" not in page
    assert len(parsed.ids) == len(set(parsed.ids)), "figures must not share ids"
    for text in (
        "A <title>",
        "Rates were not tuned.",
        "layerwise compare",
        "h.1.mlp.c_proj.weight",
        "Spread",
    ):
        assert text in parsed.text
    names = {file.stem for file in (tmp_path / "figures").iterdir()}
    expected = {"loss", "loss_against_rate", "layers_lanton", "vectors_lanton", "rates_lanton"}
    assert names == expected | {"function_space_lanton", "shares_lanton"}
    for name in names:
        assert (tmp_path / "figures" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / "figures" / f"{name}.pdf").read_bytes().startswith(b"%PDF")


def test_figures_follow_the_theme() -> None:
    light = next(iter(THEME))
    svg = f'<?xml?><svg width="5pt" height="3pt" viewBox="0 0 5 3"><g id="a" style="fill: {light}"/></svg>'
    themed = themed_svg(svg, "loss")
    assert themed == f'<svg viewBox="0 0 5 3"><g id="loss-a" style="fill: var(--c{light[1:]})"/></svg>'


def test_a_run_without_evaluations_or_layers_still_has_a_page(tmp_path: Path) -> None:
    run = fabricate(tmp_path / "bare", "adamw", with_layers=False, status="diverged", **SHORT)
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 8, "seconds": 0.1, "loss": null}\n')
    page = write_report(contenders(load_runs([run])), run).read_text()
    assert "Diverged: bare." in page


def test_different_texts_and_models_are_called_incomparable(tmp_path: Path) -> None:
    fabricate(tmp_path / "a", "adamw", with_layers=False, **SHORT)
    fabricate(tmp_path / "b", "lanton", with_layers=False, corpus="b" * 64, **SHORT)
    fabricate(tmp_path / "c", "scion", with_layers=False, steps=30)
    page = write_report(contenders(load_runs([tmp_path])), tmp_path / "out").read_text()
    assert "different texts: their losses cannot be compared" in page
    assert "differ in length" in page


def test_a_pages_name_is_no_folder(tmp_path: Path) -> None:
    runs = load_runs([fabricate(tmp_path / "a", "adamw", with_layers=False, **SHORT)])
    with pytest.raises(LayerwiseError, match="name a folder"):
        write_report(contenders(runs), tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(LayerwiseError, match=r"no run\.json there or below"):
        load_runs([tmp_path / "missing"])
    with pytest.raises(LayerwiseError, match=r"no run\.json there or below"):
        load_runs([tmp_path])
    with pytest.raises(LayerwiseError, match="no run was named"):
        load_runs([])
    (tmp_path / "file.txt").write_text("text")
    with pytest.raises(LayerwiseError, match=r"file\.txt: no run\.json there"):
        load_runs([tmp_path / "file.txt"])
    damaged = fabricate(tmp_path / "damaged", "adamw", with_layers=False, **SHORT)
    (damaged / "run.json").write_text(json.dumps({"format": 1})[:-3])
    for path in (damaged, tmp_path):  # by itself, and as all there is
        with pytest.raises(LayerwiseError, match=r"run\.json is damaged"):
            load_runs([path])


def test_a_damaged_run_among_others_is_left_out_with_a_note(tmp_path: Path) -> None:
    for name in ("good", "bad"):
        fabricate(tmp_path / name, "adamw", with_layers=False, **SHORT)
    (tmp_path / "bad" / "run.json").write_text("{")
    notes: list[str] = []
    assert [run.name for run in load_runs([tmp_path], notes.append)] == ["good"]
    assert len(notes) == 1
    assert notes[0].startswith(f"left out: run {tmp_path / 'bad'}: run.json is damaged")
    with pytest.warns(UserWarning, match="left out") as caught:
        load_runs([tmp_path])
    assert caught[0].filename == __file__


def test_steps_of_short_runs_are_whole_numbers(runs: dict[str, Run]) -> None:
    history = runs["lanton"].history
    assert history is not None
    first = LayerHistory(
        history.units,
        np.arange(1.0, 4.0),
        history.squared_norm[:, :3],
        history.multiplier[:, :3] * 0.9,
        history.lr[:, :3],
    )
    short = replace(runs["lanton"])
    short.__dict__["history"] = first
    with styled():
        for figure in (effective_rates(short), layer_heat_maps(short, history.units)):
            labelled = [axes for axes in figure.axes if axes.get_xlabel() == "Step"]
            assert labelled
            for axes in labelled:
                assert all(tick == round(tick) for tick in axes.get_xticks())


def test_a_colour_bar_is_pointed_where_something_lies_beyond_it(runs: dict[str, Run]) -> None:
    history = runs["lanton"].history
    assert history is not None
    level, far = np.ones_like(history.squared_norm), np.ones_like(history.squared_norm)
    far[0, 0] = 1e6
    for norms, ends in ((level, "neither"), (far, "max"), (1 / far, "min")):
        one = replace(runs["lanton"])
        one.__dict__["history"] = replace(history, squared_norm=norms)
        with styled():
            figure = layer_heat_maps(one, history.units)
        bars = [axes._colorbar for axes in figure.axes if hasattr(axes, "_colorbar")]
        assert bars[0].extend == ends


@pytest.mark.parametrize(
    ("optimizer", "rates", "what"),
    [
        ("dual-muon", None, "Squared dual norm"),
        ("lanton", None, "Gradient noise"),
        ("lanton", {"rule": "dual_norm_adaptive"}, "Squared dual norm"),
        ("muon", {"alpha": 1.0}, "Gradient noise"),
        ("one of yours", "x", "Gradient noise"),
    ],
)
def test_a_heat_map_names_what_the_rule_measured(optimizer: str, rates: object, what: str) -> None:
    config = {"optimizer": {"name": optimizer, "rates": rates}}
    assert measured(Run(Path("a"), {"config": config})) == what
