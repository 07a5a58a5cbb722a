"""Does the best learning rate carry over? The sweeps of docs/transfer.md, their figure and their table.

    python benchmarks/transfer.py

ResMLP width x16 on digits and the three decoders of arXiv 2502.17405 width x8 on bytes of the standard library, each with
{standard, FLeRM, uniform, 1/width} x learning rates x 2 seeds: 468 trials, about 15 minutes of CPU time. Finished
trials, those committed included, are not repeated. The byte corpus is the running Python's own library: on another
version of Python the losses differ a little.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from layerwise.lab.overrides import load_config
from layerwise.lab.report.style import save_figure
from layerwise.lab.sweep.config import SweepConfig
from layerwise.lab.sweep.engines.local import LocalEngine
from layerwise.lab.sweep.figure import Panels, transfer_figure
from layerwise.lab.sweep.report import LOSS_NAMES, analyse
from layerwise.lab.sweep.run import run_sweep
from layerwise.lab.sweep.table import markdown

HERE = Path(__file__).parent
SWEEPS = {
    "resmlp": ("ResMLP", "resmlp.yaml", []),
    "post": ("PostNorm", "decoder.yaml", ["model.norm=post"]),
    "pre": ("PreNorm", "decoder.yaml", ["model.norm=pre"]),
    "pre_post_mod": ("PreNormPostMod", "decoder.yaml", ["model.norm=pre_post_mod"]),
}


def config_of(name: str, folder: Path) -> SweepConfig:
    """One of the sweeps, in a folder of its own below `folder`."""
    _, file, overrides = SWEEPS[name]
    return load_config(
        HERE / "transfer" / file, [*overrides, f"run.dir={folder}", f"run.name={name}"], SweepConfig
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2, help="trials side by side")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/transfer"), help="folder of results"
    )
    parser.add_argument("--only", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="some of the sweeps")
    options = parser.parse_args()

    rows, text = (
        [],
        ["Made by `python benchmarks/transfer.py`; the columns are explained in docs/transfer.md.\n"],
    )
    for name in options.only:
        config = config_of(name, options.out)
        folder = run_sweep(config, LocalEngine(options.workers)).folder
        curves, table = analyse(config, folder)
        title = SWEEPS[name][0]
        rows.append(Panels(title, curves, config.sweep.axis, LOSS_NAMES[config.sweep.loss]))
        text += [f"## {title}\n", markdown(table, config.sweep.axis)]
    save_figure(lambda: transfer_figure(rows), options.out, "transfer")
    (options.out / "table.md").write_text("\n".join(text), encoding="utf-8")
    print("\n".join(text))


if __name__ == "__main__":
    main()
