"""Every model type of transformers that a tiny config builds: roles by the forward pass and by the modules agree.

Where they do not, the difference stands in `role_differences.json`, and docs/roles.md says which kinds there are and why.
"""

import json
import logging
from pathlib import Path

import pytest
from role_audit import NotRunError, compared, differences
from tiny_transformers import model_types

KNOWN = json.loads((Path(__file__).parent / "role_differences.json").read_text())
THIRTY = (
    *(
        "albert",
        "apertus",
        "bert",
        "bert-generation",
        "biogpt",
        "bloom",
        "camembert",
        "clip",
        "codegen",
        "cohere",
    ),
    *(
        "deberta",
        "diffllama",
        "falcon_mamba",
        "fnet",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gptj",
        "jetmoe",
        "mamba",
    ),
    *("moshi", "mpt", "olmo2", "phi3", "qwen3", "smollm3", "splinter", "stablelm", "starcoder2", "vit", "vits"),
)
#: A base model for speech, whose output goes through normalised convolutions.
NO_HEAD = ("fastspeech2_conformer", "tipsv2")


@pytest.fixture(autouse=True)
def quiet():
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


def check(model_type: str) -> None:
    _, by_forward, by_modules = compared(model_type)
    assert differences(by_forward, by_modules) == KNOWN.get(model_type, {})
    heads = [found.name for found in by_forward if found.role == "head"]
    assert bool(heads) != (model_type in NO_HEAD)


@pytest.mark.parametrize("model_type", THIRTY)
def test_roles_by_forward_pass_and_by_modules_agree_or_the_difference_is_known(model_type):
    check(model_type)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_same_for_all_types_that_run():
    ran, wrong = 0, []
    for model_type in model_types():
        try:
            check(model_type)
        except NotRunError:
            continue
        except AssertionError:
            wrong.append(model_type)
        ran += 1
    assert not wrong
    assert ran >= 290  # of 476; the others need other sizes, other inputs, or libraries that are not there
