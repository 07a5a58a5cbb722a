from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import call, tiny_tree

import layerwise
from layerwise.errors import LayerwiseError
from layerwise.lab.cli.words import split_words
from layerwise.lab.config.load import load_config
from layerwise.lab.models.families import PRESETS
from layerwise.lab.optimizers.registry import optimizers


@pytest.fixture
def config(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(tiny_tree(tmp_path)))
    return file


def test_train_resume_and_train_again_from_the_runs_folder(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", str(config), "training.steps=4", "optimizer=lanton") == 0
    out = capsys.readouterr().out
    assert "4 steps, 256 tokens" in out
    assert "validation loss" in out
    folder = tmp_path / "runs" / "gpt2-tiny-lanton"
    assert call("train", str(config), "training.steps=4", "optimizer=lanton") == 2
    assert "--resume continues it" in capsys.readouterr().err
    assert call("train", str(folder), "--resume") == 0
    assert "had finished before" in capsys.readouterr().out
    assert call("train", str(folder), "run.name=again") == 0
    metrics = [
        [line.split('"seconds"')[0] for line in (folder.parent / name / "metrics.jsonl").read_text().splitlines()]
        for name in (folder.name, "again")
    ]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["optimzer=lanton"], "unknown key `optimzer`: did you mean `optimizer`?"),
        (["sweep.axis=width"], "section `sweep` is for `layerwise sweep`"),
        (["training.batch_size=4000"], "one batch of training.batch_size=4000"),
        (["other.yaml"], "one config at most"),
        (["optimizer.lr=1e30", "training.clip_norm=null"], "diverged"),
        (["run.dir=/dev/null/x"], "cannot make"),
    ],
)
def test_faults_are_one_line_and_exit_code_2(
    config: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("train", str(config), *words) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert message in error[-1]
    assert error[-1].startswith("layerwise: ")
    assert not any("Traceback" in line for line in error)


def test_a_run_that_cannot_begin_leaves_no_folder(config: Path, tmp_path: Path) -> None:
    assert call("train", str(config), f"run.dir={tmp_path}", "run.name=x", "data.seq_len=1000000") == 2
    assert not (tmp_path / "x").exists()


def test_an_interrupted_command_says_how_to_go_on(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("layerwise.lab.training.run.train", interrupted)
    assert call("train", str(config)) == 130
    assert capsys.readouterr().err.splitlines() == [
        f"layerwise: interrupted; what is finished is kept, layerwise train {config} --resume --or-start goes on"
    ]


@pytest.mark.parametrize("library", ["torch", "numpy", "typer"])
def test_ctrl_c_while_a_library_is_imported_is_quiet(tmp_path: Path, library: str) -> None:
    """In the first seconds of the command, before any of it runs."""
    (tmp_path / f"{library}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"  # as on a terminal
        "from layerwise.lab.cli import main; main(['train'])"  # what the installed command does
    )
    path = os.pathsep.join([str(tmp_path), str(Path(layerwise.__file__).parent.parent)])
    environment = {**os.environ, "PYTHONPATH": path}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr == "layerwise: interrupted\n"


def test_without_the_libraries_of_the_lab_the_command_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text("raise ModuleNotFoundError(\"No module named 'typer'\", name='typer')")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    ended = subprocess.run([sys.executable, "-m", "layerwise"], env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == "layerwise: the command line needs typer: pip install 'layerwise[lab]'\n"


def test_an_unknown_option_is_exit_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--resme") == 2
    assert "--resume" in capsys.readouterr().err


def test_help_names_every_model_and_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    for name in (*PRESETS, *optimizers()):
        assert name in text


def test_words() -> None:
    assert split_words(["a.yaml", "x=1"]) == ("a.yaml", ["x=1"])
    assert split_words([]) == (None, [])
    with pytest.raises(LayerwiseError):
        split_words(["a", "b"])
    long = f"data.paths=[{'a' * 300}.txt]"  # longer than a file's name can be
    assert split_words([long]) == (None, [long])
    with pytest.raises(LayerwiseError, match=r"config aaa.* cannot be read"):
        load_config("a" * 300)


def test_a_sweep_shows_its_first_result_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = tiny_tree(tmp_path)
    tree["model"] = {"preset": "decoder", "base_width": 4, "base_heads": 1, "base_blocks": 1}
    tree["training"] |= {"steps": 3, "eval_every": 3}
    tree["sweep"] = {"sizes": [4, 8], "lr": [0.01, 0.1], "seeds": [0], "methods": ["standard"]}
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(tree))
    assert call("sweep", str(file), "--workers", "0") == 0
    said = capsys.readouterr()
    assert "4 trials, 4 of them to run" in said.out
    assert re.search(r"trial 1/4  last loss \d\.\d+", said.err)
    assert call("sweep", str(file), "--workers", "0") == 0
    assert "4 trials, 0 of them to run" in capsys.readouterr().out


def test_the_module_is_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["layerwise", "--version"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("layerwise", run_name="__main__")
    assert (ended.value.code, capsys.readouterr().out) == (0, f"layerwise {layerwise.__version__}\n")
