"""The function-space paper's models against literal twins, their data, adapters, and rates by role."""

from __future__ import annotations

import gzip
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import tiny_config
from torch import Tensor, nn

from layerwise.errors import LayerwiseError
from layerwise.lab.config.schema import Config, ModelConfig, OptimizerConfig
from layerwise.lab.data.batches import ImageData, load_images
from layerwise.lab.models.families import build_model, resized
from layerwise.lab.models.family import Examples
from layerwise.lab.models.paper import NORMS, Decoder, Norm, ResMLP
from layerwise.lab.optimizers.registry import build_optimizer
from layerwise.lab.training.observers import Observer
from layerwise.lab.training.run import train
from layerwise.lab.training.trainer import Trainer


def test_resmlp_is_the_papers_formula() -> None:
    torch.manual_seed(0)
    model = ResMLP(7, 3, width=2, depth=2, base_width=4, base_blocks=2).double()
    p = dict(model.named_parameters())
    x = torch.randn(5, 7, dtype=torch.float64)
    h = x @ p["input.weight"].T + p["input.bias"]
    for block in range(4):
        h = h + h.clamp(min=0) @ p[f"blocks.{block}.linear.weight"].T
    expected = h @ p["output.weight"].T + p["output.bias"]
    assert p["input.weight"].shape == (8, 7)
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def n(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)


def literal_decoder(p: dict[str, Tensor], ids: Tensor, norm: Norm, blocks: int, heads: int, m: int) -> Tensor:
    """The decoder from its definition, one sequence and one head at a time."""
    d = p["embedding.weight"].shape[1]
    rows = []
    for sequence in ids:
        positions = torch.zeros(len(sequence), d, dtype=torch.float64)
        for t in range(len(sequence)):
            for i in range(0, d, 2):
                positions[t, i] = math.sin(t / 10_000 ** (i / d))
                positions[t, i + 1] = math.cos(t / 10_000 ** (i / d))
        x = p["embedding.weight"][sequence] + positions
        for b in range(blocks):

            def attention(x: Tensor, b: int = b) -> Tensor:
                q, k, v = (x @ p[f"blocks.{b}.attention.{part}.weight"].T for part in ("query", "key", "value"))
                size, parts = d // heads, []
                for h in range(heads):
                    at = slice(h * size, (h + 1) * size)
                    scores = n(q[:, at]) @ n(k[:, at]).T / math.sqrt(size)
                    seen = torch.ones_like(scores).tril().bool()
                    parts.append(torch.where(seen, scores, -math.inf).softmax(-1) @ v[:, at])
                return torch.cat(parts, -1) @ p[f"blocks.{b}.attention.out.weight"].T

            def mlp(x: Tensor, b: int = b) -> Tensor:
                h = x @ p[f"blocks.{b}.mlp.up.weight"].T
                h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
                return h @ p[f"blocks.{b}.mlp.down.weight"].T

            for f in (attention, mlp):
                if norm == "post":
                    x = n(x + f(x) / math.sqrt(m))
                elif norm == "pre":
                    x = x + f(n(x)) / math.sqrt(m)
                else:
                    x = x + n(f(x)) / math.sqrt(m)
        logits = n(x) @ p["head.weight"].T + p["head.bias"]
        rows.append(logits - logits.exp().sum(-1, keepdim=True).log())
    return torch.stack(rows)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("norm", NORMS)
def test_decoder_is_the_papers_definition(norm: Norm, kind: str) -> None:
    torch.manual_seed(0)
    model = Decoder(11, norm=norm, width=2, depth=3, base_width=4, base_heads=1, base_blocks=1, attention=kind).double()
    ids = torch.randint(11, (2, 6))
    expected = literal_decoder(dict(model.named_parameters()), ids, norm, blocks=3, heads=2, m=3)
    # The sinusoids' angles are computed in float32: their error is about 6 positions * 1e-7.
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)


def test_decoder_sees_no_future_and_gives_log_probabilities() -> None:
    torch.manual_seed(0)
    model = Decoder(11, base_width=8, base_heads=2)
    ids = torch.randint(11, (1, 9))
    changed = ids.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % 11
    first, second = model(ids), model(changed)
    torch.testing.assert_close(first[:, :5], second[:, :5])
    assert not torch.allclose(first[:, 5:], second[:, 5:])
    torch.testing.assert_close(first.exp().sum(-1), torch.ones(1, 9))


def test_initial_deviations_follow_width_depth_and_scale() -> None:
    torch.manual_seed(0)
    model = ResMLP(64, 10, width=8, depth=4, base_width=32, init_scale=0.5)
    weight = model.blocks[3].linear.weight
    # 256 * 256 normal numbers: the sample deviation is within 4 / sqrt(2 * 65536) = 1.1 % of the true one.
    assert weight.std().item() == pytest.approx(0.5 / math.sqrt(256) / math.sqrt(4), rel=0.011)
    assert len(model.blocks) == 16
    decoder = Decoder(50, width=8, base_width=32, init_scale=2.0)
    block = decoder.blocks[0]
    assert block.mlp.down.weight.std().item() == pytest.approx(2 / math.sqrt(1024), rel=0.011)
    assert block.attention.heads == 16  # their size stays
    assert decoder.head.weight.std().item() == pytest.approx(1 / math.sqrt(256), rel=0.03)


@pytest.mark.parametrize(
    ("settings", "examples", "message"),
    [
        ({"preset": "decoder", "norm": "both"}, Examples(9, 8), "model.norm='both'"),
        ({"preset": "decoder", "base_width": 30, "base_heads": 4}, Examples(9, 8), "not a multiple of"),
        ({"preset": "decoder"}, Examples(10, 8, 64), "use model=resmlp"),
        ({"preset": "gpt2-tiny"}, Examples(10, 8, 64), "use model=resmlp"),
        ({"preset": "resmlp"}, Examples(9, 8), "set data.source to digits"),
        ({"preset": "resmlp", "width": 0}, Examples(10, 8, 64), "model.width=0"),
        ({"preset": "resmlp", "widht": 2}, Examples(10, 8, 64), "did you mean `width`"),
        ({"preset": "decoder", "lora": {"targets": ["nothing"]}}, Examples(9, 8), "model.lora.targets"),
        ({"preset": "decoder", "start": "no/such/run"}, Examples(9, 8), "no checkpoint there"),
    ],
)
def test_models_that_cannot_be(settings: dict[str, object], examples: Examples, message: str) -> None:
    with pytest.raises(LayerwiseError, match=message):
        build_model(ModelConfig.model_validate(settings), examples, 0)


def test_digits_come_once_in_a_pass_and_never_from_the_held_out_ones() -> None:
    config = Config.model_validate(
        {
            "model": "resmlp",
            "data": {"source": "digits", "validation_fraction": 0.2},
            "training": {"batch_size": 58},
        }
    )
    data = ImageData(config)
    images, _ = load_images(config.data)
    assert data.info["train_images"] + data.info["validation_images"] == len(images) == 1797
    assert abs(images.mean()) < 1e-5
    seen = torch.cat([data.batch(step).inputs for step in range(25)])[:1438]
    rows = {row.numpy().tobytes() for row in seen}
    held_out = {row.numpy().tobytes() for batch in data.validation(16) for row in batch.inputs}
    assert len(rows) == 1438
    assert not rows & held_out
    assert torch.equal(data.batch(7).inputs, ImageData(config).batch(7).inputs)


def test_a_fraction_that_holds_no_image_out_is_refused() -> None:
    config = Config.model_validate({"model": "resmlp", "data": {"source": "digits", "validation_fraction": 0.0002}})
    with pytest.raises(LayerwiseError, match=r"data.validation_fraction=0.0002 .* holds none out"):
        ImageData(config)


def test_fashion_mnist_is_read_from_its_files(tmp_path: Path) -> None:
    settings = Config.model_validate({"data": {"source": "fashion-mnist", "paths": [str(tmp_path)]}}).data
    with pytest.raises(LayerwiseError, match="dataset-fashion-mnist"):
        load_images(settings)
    pixels = np.arange(3 * 784, dtype=np.uint64).astype(np.uint8)
    for name, header, content in (
        ("images-idx3", 16, pixels),
        ("labels-idx1", 8, np.array([3, 0, 9], np.uint8)),
    ):
        with gzip.open(tmp_path / f"train-{name}-ubyte.gz", "wb") as file:
            file.write(b"\0" * header + content.tobytes())
    images, labels = load_images(settings)
    assert images.shape == (3, 784)
    assert labels.tolist() == [3, 0, 9]
    expected = (pixels.astype(np.float32) - pixels.mean()) / pixels.std()
    np.testing.assert_allclose(images.reshape(-1), expected, rtol=1e-4, atol=1e-5)


def test_resized_models_have_the_size_asked_for() -> None:
    gpt2 = ModelConfig(preset="gpt2-tiny")
    assert resized(gpt2, "width", 64) == {"model.n_embd": 64, "model.n_head": 2}
    llama = resized(ModelConfig(preset="llama-tiny"), "width", 256)
    assert llama == {
        "model.hidden_size": 256, "model.num_attention_heads": 8, "model.num_key_value_heads": 4,
        "model.intermediate_size": 704,
    }  # fmt: skip
    decoder = ModelConfig.model_validate({"preset": "decoder", "base_width": 16, "base_heads": 1})
    assert resized(decoder, "width", 128) == {"model.width": 8}
    assert resized(decoder, "depth", 6) == {"model.depth": 3}
    for axis, value, message in (("width", 24, "multiple of 16"), ("lora_rank", 4, "needs adapters")):
        with pytest.raises(LayerwiseError, match=message):
            resized(decoder, axis, value)  # type: ignore[arg-type]


@pytest.mark.parametrize("preset", ["resmlp", "decoder", "gpt2-tiny", "llama-tiny"])
def test_initial_scales_multiply_initial_weights(preset: str) -> None:
    settings: dict[str, Any] = {"preset": preset}
    if preset == "gpt2-tiny":
        settings |= {"n_layer": 1, "n_embd": 16, "initializer_range": 0.125}
    config = Config.model_validate({"model": settings})
    examples = Examples(9, 8, 4 if preset == "resmlp" else None)
    plain, scaled = (
        dict(build_model(config.replace(resized(config.model, "init_scale", scale)).model, examples, 0).named_parameters())
        for scale in (1, 4)
    )
    # The paper's models keep the layers into and out of the stack, transformers' scale every matrix. Factors of two
    # are exact; gains of 1 and biases of 0 have no deviation.
    everywhere = preset.endswith("tiny")
    for name, p in plain.items():
        factor = 4 if p.ndim == 2 and (everywhere or name.startswith("blocks")) else 1
        assert torch.equal(scaled[name], factor * p), name


def test_role_factors_set_the_rates_of_roles_and_nothing_else() -> None:
    config = Config.model_validate(
        {
            "model": {"preset": "decoder", "base_width": 8},
            "optimizer": {"lr": 0.1, "role_factors": {"hidden": 0.25}},
        }
    )
    model = build_model(config.model, Examples(9, 8), 0)
    optimizer = build_optimizer(model, config.optimizer)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in model.named_parameters():
        assert rates[id(p)] == pytest.approx(0.025 if name.startswith("blocks") else 0.1)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays[id(model.get_parameter("head.bias"))] == 0
    wrong = config.optimizer.model_copy(update={"role_factors": {"hiden": 0.5}})
    with pytest.raises(LayerwiseError, match="did you mean `hidden`"):
        build_optimizer(model, wrong)
    short = OptimizerConfig.model_validate({"name": "adamw", "betas": [0.9]})
    with pytest.raises(LayerwiseError, match=r"optimizer.betas=\[0.9\]: adamw does not take that: "):
        build_optimizer(model, short)


class KeepModel(Observer):
    """Shows a test what the run trained, before and after."""

    def begin(self, trainer: Trainer, saved: Any) -> None:
        self.model: nn.Module = trainer.model
        self.start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("fixed", ["A", "B"])
def test_adapters_on_a_pretrained_model_match_after_b_has_moved(tmp_path: Path, fixed: str) -> None:
    pretrained = tiny_config(tmp_path, run__name="pretrained")
    before = train(pretrained)
    tuned = pretrained.replace(
        {
            "run.name": "tuned",
            "model.start": str(pretrained.run_path),
            "model.lora": {"rank": 2, "targets": ["c_attn"], "fixed": fixed},
            "function_space": {"match": "uniform", "match_step": 5, "probes": 4, "batches": 1},
        }
    )
    kept = KeepModel()
    run = train(tuned, observers=[kept])
    trainable = "lora_B" if fixed == "A" else "lora_A"
    for name, p in kept.model.named_parameters():
        assert torch.equal(p, kept.start[name]) == (trainable not in name), name
    [matching] = run.info["matching"]
    assert matching["step"] == 5
    assert all(trainable in name and row["change"] != 1 for name, row in matching["rates"].items())
    if fixed == "A":  # B starts at 0: before the first step it is the pretrained model
        assert run.metrics[0]["val_loss"] == pytest.approx(before.result["val_loss"], rel=1e-5)
