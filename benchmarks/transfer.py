"""Does the best learning rate carry over? The sweeps of docs/transfer.md, their figures and their tables.

    python benchmarks/transfer.py

Twelve figures: width (ResMLP x16 on digits and the three decoders of arXiv 2502.17405 x8 on bytes of the standard library),
depth x8, the initial scale 1/4 and 4, the paper's own model and range for it, six at 400 steps (to x16), and LoRA rank x8 on
a GPT-2 that is trained here first, at 100 and 400 steps. Each with {standard, FLeRM, uniform, and for widths 1/width} x
learning rates x 2 to 5 seeds: some 2,800 trials, about six hours on one core. Finished ones, those committed included, are
not repeated. The texts are the running Python's own library and manual: on another version of Python the losses differ a
little.
"""

from __future__ import annotations

from pathlib import Path

from layerwise.lab.config.load import load_config
from layerwise.lab.experiments.sweep.engines import LocalEngine
from layerwise.lab.experiments.sweep.run_sweep import SweepConfig, make_plan, read_results, run_sweep
from layerwise.lab.experiments.sweep.sweep_report import LOSS_NAMES, Panels, analyse, markdown, transfer_figure
from layerwise.lab.report.style import save_figure
from layerwise.lab.training.run import train
from script import documented_parser, iterate_in_float32

CONFIGS = Path(__file__).parent / "transfer"
DEPTH = ["sweep.axis=depth"]
SCALE = ["sweep.axis=init_scale", "sweep.sizes=[1, 0.25, 4]"]
# ResMLP has no norms: four times the weights is another range of rates.
HIGHER = [
    "sweep.lr={low: 0.00006103515625, high: 1, count: 15}",
    "sweep.lr_of.uniform={low: 0.015625, high: 256, count: 15}",
]

# The paper's own model and range for the initial scale, 4^-2 to 4^4; unbiased rates, three seeds for intervals.
PAPER_SCALE = [
    "sweep.axis=init_scale",
    "sweep.sizes=[1, 0.0625, 0.25, 4, 16, 256]",
    "sweep.lr={low: 0.0078125, high: 0.5, count: 7}",
    "sweep.lr_of.uniform={low: 0.5, high: 32, count: 7}",
    "sweep.seeds=[0, 1, 2]",
    "function_space.method=full_cov",
    "function_space.probes=128",
]

# Five times as many steps, rates matched by what is now the default, and grids around the best rates.
LONG = [
    "training.steps=400",
    "training.eval_every=400",
    "function_space.method=full_cov",
    "function_space.probes=64",
]
PRE = [*LONG, "model.norm=pre"]
POST_MOD = [*LONG, "model.norm=pre_post_mod"]
FIVE_SEEDS = "sweep.seeds=[0, 1, 2, 3, 4]"
THREE_SEEDS = "sweep.seeds=[0, 1, 2]"
PRE_WIDTH = [
    "sweep.sizes=[16, 128, 256]",
    FIVE_SEEDS,
    "sweep.lr={low: 0.00048828125, high: 0.03125, count: 7}",
    "sweep.lr_of={flerm: [0.007812, 0.01562, 0.03125], mup: [0.007812, 0.01562, 0.03125], uniform: [0.25, 0.5, 1, 2]}",
]
# Steps of D-Muon are of size one in every matrix: other rates, and a unit of `uniform` of its own.
MUON_WIDTH = [
    "optimizer.name=d-muon",
    FIVE_SEEDS,
    "sweep.methods=[standard, flerm, uniform]",
    "sweep.lr={low: 0.001953125, high: 0.0625, count: 6}",
    "sweep.lr_of={flerm: [0.007812, 0.01562, 0.03125, 0.0625], uniform: [0.0625, 0.125, 0.25, 0.5, 1, 2]}",
]
# LANTON slows layers down: higher rates.
LANTON_WIDTH = [
    "optimizer.name=lanton",
    FIVE_SEEDS,
    "sweep.methods=[standard, flerm, uniform]",
    "sweep.lr={low: 0.00390625, high: 0.125, count: 6}",
    "sweep.lr_of={flerm: [0.007812, 0.01562, 0.03125, 0.0625], uniform: [0.0625, 0.125, 0.25, 0.5, 1, 2]}",
]
PRE_DEPTH = [
    "sweep.sizes=[2, 16, 32]",
    THREE_SEEDS,
    "sweep.lr={low: 0.00390625, high: 0.0625, count: 5}",
    "sweep.lr_of={flerm: [0.007812, 0.01562, 0.03125, 0.0625], uniform: [0.5, 1, 2, 4]}",
]
POST_MOD_DEPTH = [
    "sweep.sizes=[2, 16, 32]",
    THREE_SEEDS,
    "sweep.lr={low: 0.00390625, high: 0.125, count: 6}",
    "sweep.lr_of={flerm: [0.007812, 0.01562, 0.03125, 0.0625, 0.125], uniform: [0.25, 0.5, 1, 2, 4]}",
]
POST_MOD_SCALE = [
    "sweep.sizes=[1, 0.0625, 0.25, 4, 16, 64, 256]",
    THREE_SEEDS,
    "sweep.lr=[0.01562, 0.03125, 0.0625, 0.125]",
    "sweep.lr_of={uniform: [0.125, 0.25, 0.5, 1, 2, 4, 8]}",
]
LORA = [
    THREE_SEEDS,
    "sweep.lr={low: 0.00048828125, high: 0.015625, count: 6}",
    "sweep.lr_of={flerm: [0.0009766, 0.001953, 0.003906, 0.007812], uniform: {low: 0.0009765625, high: 0.03125, count: 6}}",
]

#: Figure -> sweep -> its title, its config and what is changed in it.
SWEEPS: dict[str, dict[str, tuple[str, str, list[str]]]] = {
    "width": {
        "resmlp": ("ResMLP", "resmlp.yaml", []),
        "post": ("PostNorm", "decoder.yaml", ["model.norm=post"]),
        "pre": ("PreNorm", "decoder.yaml", ["model.norm=pre"]),
        "pre_post_mod": ("PreNormPostMod", "decoder.yaml", ["model.norm=pre_post_mod"]),
    },
    "depth": {
        "resmlp_depth": ("ResMLP", "resmlp.yaml", [*DEPTH, "sweep.sizes=[4, 32]"]),
        "post_depth": ("PostNorm", "decoder.yaml", [*DEPTH, "sweep.sizes=[2, 16]", "model.norm=post"]),
        "pre_depth": ("PreNorm", "decoder.yaml", [*DEPTH, "sweep.sizes=[2, 16]", "model.norm=pre"]),
    },
    "init_scale": {
        "resmlp_init": ("ResMLP", "resmlp.yaml", [*SCALE, *HIGHER]),
        "post_init": ("PostNorm", "decoder.yaml", [*SCALE, "model.norm=post"]),
        "pre_init": ("PreNorm", "decoder.yaml", [*SCALE, "model.norm=pre"]),
    },
    "init_scale_paper": {
        "pre_post_mod_init": ("PreNormPostMod", "decoder.yaml", [*PAPER_SCALE, "model.norm=pre_post_mod"]),
    },
    "width_400": {"pre_400": ("PreNorm, 400 steps", "decoder.yaml", [*PRE, *PRE_WIDTH])},
    "width_400_muon": {"pre_400_muon": ("PreNorm, D-Muon, 400 steps", "decoder.yaml", [*PRE, *MUON_WIDTH])},
    "width_400_lanton": {"pre_400_lanton": ("PreNorm, LANTON, 400 steps", "decoder.yaml", [*PRE, *LANTON_WIDTH])},
    "depth_400": {"pre_depth_400": ("PreNorm, 400 steps", "decoder.yaml", [*PRE, *DEPTH, *PRE_DEPTH])},
    "depth_400_post_mod": {
        "pre_post_mod_depth_400": ("PreNormPostMod, 400 steps", "decoder.yaml", [*POST_MOD, *DEPTH, *POST_MOD_DEPTH])
    },
    "init_scale_400": {
        "pre_post_mod_init_400": (
            "PreNormPostMod, 400 steps",
            "decoder.yaml",
            [*POST_MOD, "sweep.axis=init_scale", *POST_MOD_SCALE],
        )
    },
    "lora": {"lora": ("LoRA on GPT-2", "lora.yaml", [])},
    "lora_400": {"lora_400": ("LoRA on GPT-2, 400 steps", "lora.yaml", [*LONG, *LORA])},
}


def config_of(figure: str, name: str, folder: Path) -> SweepConfig:
    """One of the sweeps, in a folder of its own below `folder`."""
    _, file, overrides = SWEEPS[figure][name]
    return load_config(CONFIGS / file, [*overrides, f"run.dir={folder}", f"run.name={name}"], SweepConfig)


def python_manual() -> str:
    """The text that adapters are trained on."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


def prepare_adapters(config: SweepConfig) -> None:
    """The model that the adapters are put on and the text they are trained on, where trials are missing."""
    if make_plan(config).trials.keys() <= read_results(config.run_path).keys():
        return
    [text] = map(Path, config.data.paths)
    text.parent.mkdir(parents=True, exist_ok=True)
    text.write_text(python_manual(), encoding="utf-8")
    assert config.model.start is not None
    if not Path(config.model.start).exists():
        train(load_config(CONFIGS / "pretrained.yaml"))


def draw(figure: str, folder: Path, workers: int) -> str:
    """Runs what is missing of a figure's sweeps and draws it; returns its tables."""
    rows, text = [], []
    for name, (title, _, _) in SWEEPS[figure].items():
        config = config_of(figure, name, folder)
        if config.model.lora is not None:
            prepare_adapters(config)
        run_sweep(config, LocalEngine(workers))
        curves, table = analyse(config)
        rows.append(Panels(title, curves, config.sweep.axis, LOSS_NAMES[config.sweep.loss]))
        text += [f"## {title}\n", markdown(table, config.sweep.axis)]
    save_figure(lambda: transfer_figure(rows), folder, figure)
    return "\n".join(text)


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="trials side by side; 0: one after the other, in float32 throughout",
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/transfer"), help="folder of results")
    parser.add_argument("--only", nargs="+", choices=SWEEPS, default=list(SWEEPS), help="some of the figures")
    options = parser.parse_args()
    if options.workers == 0:
        iterate_in_float32()  # 128 wide matrices would be iterated in bfloat16 on a processor with units for it
    for figure in options.only:
        tables = draw(figure, options.out, options.workers)
        made = f"Made by `python benchmarks/transfer.py --only {figure}`; docs/transfer.md explains the columns.\n\n"
        (options.out / f"{figure}.md").write_text(made + tables, encoding="utf-8")
        print(tables)


if __name__ == "__main__":
    main()
