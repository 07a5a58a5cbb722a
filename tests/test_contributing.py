"""The recipes of CONTRIBUTING.md, done as they are written: the file is made in a copy of the package."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import layerwise
from layerwise.optim.rules import rule

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## (An? .+)\n(?:(?!^## ).*\n)*?```python\n((?:.*\n)*?)```", PAGE, flags=re.MULTILINE))

USES = {
    "An optimizer of known parts": """
compared("row-muon", "Row Muon", "optimizer.momentum=0.9")
""",
    "A new kind of update": """
import torch
import layerwise as lw
compared("heavy-ball", "Heavy ball", "optimizer.beta=0.5")
weight = torch.nn.Parameter(torch.tensor([[2.0]]))
group = {"params": [("weight", weight)], "role": "hidden", "lr_scale": 0.5}
optimizer = recipe["HeavyBallSGD"]([group], lr=0.1, beta=0.5, weight_decay=0.1)
for ball in (1.0, 1.5):
    before = weight.item()
    weight.grad = torch.tensor([[1.0]])
    optimizer.step()
    assert abs(weight.item() - (before - 0.05 * (ball + 0.1 * before))) < 1e-6
""",
    "A rate rule": """
from layerwise.lab.optimizers.registry import RULES
assert "gentle" in RULES and "`gentle`" in page()
run = trained("optimizer=d-muon", "optimizer.rates={rule: gentle, factor: 0.25}")
assert {rate["multiplier"] for rate in run.layers[-1]["layers"].values()} == {0.25, 1.0}
""",
    "A geometry": """
import torch
from torch import nn
import layerwise as lw
g = torch.randn(3, 5)
geometry = recipe["HalfSign"]()
assert torch.isclose((g * geometry.lmo(g)).sum(), geometry.dual_norm(g)) and geometry.norm(geometry.lmo(g)) == 1
model = nn.Linear(4, 3)
optimizer = lw.Lanton(lw.param_groups(model, overrides={"weight": geometry}), lr=0.1, scaling="unit", weight_decay=0.0)
before = model.weight.detach().clone()
model(torch.ones(2, 4)).sum().backward()
optimizer.step()
assert torch.allclose((model.weight - before).abs(), torch.tensor(0.05))
assert "HalfSign()" in str(lw.describe(model, overrides={"weight": geometry}))
""",
    "An estimator of function-space rates": """
import torch
from torch import nn
import layerwise as lw
model, inputs = nn.Linear(4, 3), torch.randn(8, 4)
update = {name: torch.randn_like(p) for name, p in model.named_parameters()}
rates = lw.function_space_rates(model, update, inputs, method="literal_kronecker", probes=64)
assert rates["weight"].value > 0
""",
    "A model family for the lab": """
from layerwise.lab.config.schema import ModelConfig
from layerwise.lab.models import families
from layerwise.lab.models.family import FAMILIES
assert families.resized(ModelConfig(preset=None, family="bag"), "width", 32) == {"model.width": 32}
run = trained("optimizer=d-muon", model=["model={preset: null, family: bag, width: 16}"])
assert run.status == "finished"
""",
}

#: What each use is run after, in a process beside this: a registry is not to remember a test.
BEFORE = """
import runpy, sys
from importlib import import_module
from pathlib import Path
folder, page_file = Path(sys.argv[1]), sys.argv[2]
in_package = len(sys.argv) > 3
recipe = vars(import_module(sys.argv[3])) if in_package else runpy.run_path(str(folder / "recipe.py"), run_name="recipe")
from layerwise.lab.config.load import load_config
from layerwise.lab.report.grouping import looks, optimizer_title
from layerwise.lab.training.run import train

TINY = ["model.preset=gpt2-tiny", "model.n_layer=1", "model.n_embd=16", "model.n_head=2"]
(folder / "text.txt").write_text("".join(f"line {i} of a text that is long enough\\n" for i in range(300)))
COMMON = [
    f"data.paths=[{folder / 'text.txt'}]", f"run.dir={folder / 'runs'}", "data.source=files", "data.tokenizer=byte",
    "data.seq_len=16", "training.batch_size=2", "training.steps=4", "training.eval_every=2", "training.record_every=1",
    "training.eval_batches=1", "schedule.warmup_steps=1", "run.tensorboard=false",
]


def page():
    return runpy.run_path(page_file)["page"]()


def trained(*words, model=TINY):
    return train(load_config(None, [*model, *COMMON, *words]))


def compared(name, title, *words):
    from layerwise.lab.cli import main
    try:
        main(["compare", *TINY, *COMMON, "--optimizers", f"adamw,{name}"])
    except SystemExit as ended:
        assert ended.code in (0, None), ended.code
    (report,) = folder.rglob("report.html")
    assert title in report.read_text() and optimizer_title(name) == title
    assert len({look.color for look in looks([name, "adamw"])}) == 2
    assert f"`{name}`" in page()
    assert trained(f"optimizer={name}", *words, "run.name=alone").status == "finished"
"""


def test_every_recipe_is_used_here() -> None:
    assert RECIPES.keys() == USES.keys()


#: Each use has names of its own; one process for all, as each would import torch and the lab anew.
ONE_AFTER_THE_OTHER = """
import json, sys
for name, code, words in json.load(sys.stdin):
    sys.argv[1:] = words
    exec(compile(code, name, "exec"), {"__name__": "use"})
"""


def test_recipes_work_as_they_are_written(tmp_path: Path) -> None:
    """In a copy of the package, at the path that each names, before all others; a script's, by itself."""
    source, uses = tmp_path / "src", []
    shutil.copytree(Path(layerwise.__file__).parent, source / "layerwise", ignore=shutil.ignore_patterns("__pycache__"))
    for number, (name, use) in enumerate(USES.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = re.match(r"# src/(layerwise/.+)\.py\n", RECIPES[name])
        file = folder / "recipe.py" if path is None else source / f"{path[1]}.py"
        file.write_text(RECIPES[name], encoding="utf-8")
        words = [str(folder), str(ROOT / "docs" / "make_configuration.py")]
        uses.append((name, BEFORE + use, words if path is None else [*words, path[1].replace("/", ".")]))
    path = os.pathsep.join([str(source), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", ONE_AFTER_THE_OTHER],
        input=json.dumps(uses),
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_rule_in_a_script_has_its_name_too(tmp_path: Path) -> None:
    (tmp_path / "recipe.py").write_text(RECIPES["A rate rule"], encoding="utf-8")
    runpy.run_path(str(tmp_path / "recipe.py"))
    try:
        assert "gentle" in layerwise.rate_rules()
    finally:
        rule._RULES.pop("gentle", None)
