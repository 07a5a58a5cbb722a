"""Trainers give what a loop of one's own gives: accumulation, clipping, a schedule, a kill and a resume included.

All in float64 and in the same order of data. A trainer may divide and add in another order: gradients differ by some
1e-16 of themselves, which five quintic Newton-Schulz steps amplify by 3.4445^5 = 485 at most and eight steps of length 0.02
hand on: 1e-10 is far above that and far below the 1e-3 of a step left out, a clip after the step, or a rate off by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain, cycle, islice
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from accelerate import Accelerator
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR, LRScheduler
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_cosine_schedule_with_warmup,
)
from transformers.trainer_utils import get_last_checkpoint

import layerwise as lw
from layerwise.integrations.lightning import LayerRates, WatchOptimizers
from layerwise.integrations.transformers import trainer_optimizer, watch
from test_examples import Killed

STEPS, ACCUMULATION, CLIP = 8, 2, 0.05
OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}
PRESETS = pytest.mark.parametrize("preset", [lw.Lanton, lw.DMuon])  # noise; AdamW beside the matrices


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def own_loop(
    model: nn.Module,
    optimizer: lw.LayerwiseOptimizer,
    schedule: LRScheduler,
    batches: Iterator[Any],
    loss_of: Callable[[nn.Module, list[Any]], Iterator[Tensor]],
) -> nn.Module:
    """`loss_of` yields the losses of the micro-batches of a step, each already divided."""
    for _ in range(STEPS):
        optimizer.zero_grad()
        for loss in loss_of(model, list(islice(batches, ACCUMULATION))):
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        assert norm > CLIP  # it does clip
        optimizer.step()
        schedule.step()
    return model


def assert_same(trained: nn.Module, own: nn.Module) -> None:
    for name, weight in own.named_parameters():
        assert_close(trained.get_parameter(name), weight, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


# ----------------------------------------------------------------------------------------------------- transformers

TOKENS = (torch.arange(48)[:, None] * 5 + torch.arange(12)) % 32  # 6 steps an epoch: the second one is cut short


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).double()


class KillIn(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step + 1 == self.step:
            raise Killed


def hf_trainer(folder: str, preset: Any, *callbacks: TrainerCallback) -> Trainer:
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=ACCUMULATION,
        max_grad_norm=CLIP,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        save_steps=4,
        train_sampling_strategy="sequential",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    return Trainer(
        model=gpt2(),
        args=arguments,
        train_dataset=rows,
        optimizer_cls_and_kwargs=trainer_optimizer(preset, **OPTIONS),
        callbacks=list(callbacks),
    )


def test_hf_trainer_logs_what_a_watch_sees_and_goes_on_after_a_kill(tmp_path):
    first = hf_trainer(str(tmp_path), lw.Lanton, KillIn(7))
    watch(first, every=2, function_space_every=0)
    with pytest.raises(Killed):
        first.train()
    trainer = hf_trainer(str(tmp_path), lw.Lanton)
    watched = watch(trainer, every=2, function_space_every=0)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path)))
    assert watched.watch.steps == STEPS
    assert [record.step for record in watched.watch.records] == [6, 8]
    rows = [row for row in trainer.state.log_history if "update_rms/transformer.h.0.mlp.c_fc" in row]
    last = watched.watch.records[-1].scalars()
    assert {key: rows[-1][key] for key in last} == last
    assert rows[-1]["step"] == 8
    assert any(key.startswith("layer_squared_norm/") for key in last)


def token_losses(model: nn.Module, micro: list[Tensor]) -> Iterator[Tensor]:
    """The mean over the tokens of the whole step, as the Trainer counts them: every label, the first of a row too."""
    tokens = sum(rows.numel() for rows in micro)
    for rows in micro:
        logits = model(input_ids=rows).logits[:, :-1]
        # The loss is taken in float32 by the model's own function, and so here.
        yield (nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten(), reduction="sum") / tokens)


@PRESETS
def test_hf_trainer_equals_a_loop_of_ones_own(tmp_path, preset):
    with pytest.raises(Killed):
        hf_trainer(str(tmp_path), preset, KillIn(7)).train()
    trainer = hf_trainer(str(tmp_path), preset)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(tmp_path)))
    model = gpt2()
    optimizer = preset(lw.param_groups(model), **OPTIONS)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, STEPS)
    assert_same(trainer.model, own_loop(model, optimizer, schedule, cycle(TOKENS.split(4)), token_losses))


def hf_optimizer(preset: Any, options: dict[str, Any], folder: Any, **arguments: Any) -> Any:
    """What a Trainer of these arguments makes."""
    arguments = TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, **arguments)
    return Trainer(gpt2(), arguments, optimizer_cls_and_kwargs=trainer_optimizer(preset, **options)).create_optimizer()


@pytest.mark.parametrize("preset", [lw.DualMuon, partial(lw.DualMuon, head=2), torch.optim.AdamW])
def test_factors_reach_the_rates_of_the_trainers_optimizer(tmp_path, preset):
    """AdamW leaves `lr_scale` alone, in silence."""
    optimizer = hf_optimizer(preset, {"lr": 0.02, "factors": {"transformer.wpe.weight": 0.5}}, tmp_path)
    wpe = next(group for group in optimizer.param_groups if any(p.shape == (12, 16) for p in group["params"]))
    assert wpe["lr"] * wpe.get("lr_scale", 1.0) == 0.01
    with pytest.raises(lw.LayerwiseError, match=r"torch_groups\(lr=None\): give a number from 0 on"):
        hf_optimizer(torch.optim.AdamW, {}, tmp_path)


def test_hf_arguments_that_have_no_effect_are_told(tmp_path, recwarn):
    """Their rate and decay are not the optimizer's: the rate that a user had set was left out in silence."""
    for options, arguments in (
        ({}, {}),
        ({"lr": 0.02}, {}),
        ({"lr": 3e-4, "weight_decay": 0.1}, {"learning_rate": 3e-4, "weight_decay": 0.1}),
    ):
        hf_optimizer(lw.DualMuon, options, tmp_path, **arguments)
        assert not [w for w in recwarn if "TrainingArguments" in str(w.message)]
    with pytest.warns(UserWarning, match=r"learning_rate=0.0003\) has no effect: .* lr is 0.02; give") as told:
        optimizer = hf_optimizer(lw.DualMuon, {"lr": 0.02}, tmp_path, learning_rate=3e-4, weight_decay=0.05)
    assert [str(w.message).partition("=")[0] for w in told if "no effect" in str(w.message)] == [
        "TrainingArguments(learning_rate",
        "TrainingArguments(weight_decay",
    ]
    assert optimizer.defaults["lr"] == 0.02


def test_hf_factory_takes_a_batch_and_is_an_attribute_where_a_trainer_has_no_such_argument(tmp_path):
    """TRL's trainers for DPO and GRPO have no `optimizer_cls_and_kwargs`; their models may get adapters in `__init__`."""
    trainer = Trainer(gpt2(), TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True))
    batch = {"input_ids": torch.arange(8)[None]}
    trainer.optimizer_cls_and_kwargs = trainer_optimizer(lw.DualMuon, batch=batch, lr=0.02)
    optimizer = trainer.create_optimizer()
    assert isinstance(optimizer, lw.DualMuon)
    assert [group["role"] for group in optimizer.param_groups] == [g["role"] for g in lw.param_groups(trainer.model, batch)]
    assert optimizer.param_groups[0]["lr"] == 0.02


def test_rates_of_an_optimizer_that_a_trainer_has_wrapped(tmp_path):
    trainer = hf_trainer(str(tmp_path), lw.Lanton)
    with pytest.raises(lw.LayerwiseError, match=r"optimizer is NoneType: .* \(a Trainer has one from"):
        lw.layer_rates(trainer.optimizer)
    trainer.train()
    assert not hasattr(trainer.optimizer, "layer_rates")  # accelerate's
    rates = lw.layer_rates(trainer.optimizer)
    assert rates == trainer.optimizer.optimizer.layer_rates()
    assert len({rate.multiplier for rate in rates.values()}) > 1
    with pytest.raises(lw.LayerwiseError, match="the optimizer is SGD: layer rates need one of layerwise's"):
        lw.layer_rates(Accelerator(cpu=True).prepare_optimizer(torch.optim.SGD(gpt2().parameters())))


# ------------------------------------------------------------------------------------------ lightning and accelerate


def regression() -> tuple[nn.Module, TensorDataset]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x = torch.randn(64, 8, dtype=torch.float64)
    return network, TensorDataset(x, x[:, :1].sin())


def error(model: nn.Module, batch: list[Tensor]) -> Tensor:
    return nn.functional.mse_loss(model(batch[0]), batch[1])


def mean_errors(model: nn.Module, micro: list[list[Tensor]]) -> Iterator[Tensor]:
    return (error(model, batch) / len(micro) for batch in micro)


def linear(optimizer: lw.LayerwiseOptimizer) -> LRScheduler:
    return LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS)


def own_regression(preset: Any) -> nn.Module:
    network, data = regression()
    optimizer = preset(lw.param_groups(network), **OPTIONS)
    batches = chain.from_iterable(iter(DataLoader(data, batch_size=8)) for _ in range(STEPS))
    return own_loop(network, optimizer, linear(optimizer), batches, mean_errors)


class Module(lightning.LightningModule):
    def __init__(self, preset: Any, killed_in: int | None) -> None:
        super().__init__()
        self.network, self.data = regression()
        self.preset, self.killed_in = preset, killed_in

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return error(self.network, batch)

    def on_before_optimizer_step(self, _: Any) -> None:
        if self.global_step + 1 == self.killed_in:
            raise Killed

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = self.preset(lw.param_groups(self), **OPTIONS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": linear(optimizer), "interval": "step"}}


@PRESETS
def test_lightning_equals_a_loop_of_ones_own(tmp_path, preset):
    def fit(killed_in: int | None) -> Module:
        trainer = lightning.Trainer(
            max_epochs=2,  # of 4 steps; with max_steps alone lightning takes one batch too many after a resume
            accelerator="cpu",
            precision="64-true",
            accumulate_grad_batches=ACCUMULATION,
            gradient_clip_val=CLIP,
            callbacks=[ModelCheckpoint(tmp_path, save_last=True)],  # after each epoch
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        module = Module(preset, killed_in)
        trainer.fit(module, DataLoader(module.data, batch_size=8), ckpt_path="last" if killed_in is None else None)
        return module

    with pytest.raises(Killed):
        fit(7)
    assert_same(fit(None).network, own_regression(preset))


class Unfreezing(BaseFinetuning):
    """The first layer and its gain join in the second epoch."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.network[:2])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.network[:2], optimizer, lr=0.01)
        elif epoch > 1:  # a resume has frozen them again; their groups come from the checkpoint
            self.make_trainable(pl_module.network[:2])


class Growing(lightning.LightningModule):
    def __init__(self, killed_in: int | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 6, bias=False), nn.Linear(6, 9)
        self.network, self.killed_in = nn.Sequential(*layers).double(), killed_in

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.network(batch[0]).flatten(0, 1), batch[0].roll(1, 1).flatten())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.global_step + 1 == self.killed_in:
            raise Killed

    def configure_optimizers(self) -> Any:
        return lw.Lanton(lw.param_groups(self), **OPTIONS)


def test_what_lightning_unfreezes_has_its_roles_and_resumes(tmp_path):
    data = TensorDataset(torch.randint(0, 9, (16, 5), generator=torch.Generator().manual_seed(0)))

    def fit(killed_in: int | None, resume: bool) -> tuple[Growing, Any]:
        trainer = lightning.Trainer(
            max_epochs=3, accelerator="cpu", precision="64-true", logger=False, enable_progress_bar=False,
            enable_model_summary=False, callbacks=[Unfreezing(), ModelCheckpoint(tmp_path, save_last=True)],
        )  # fmt: skip
        module = Growing(killed_in)
        # lightning's callback saves the groups as they are, our objects in them: torch.load has to be allowed them
        path = "last" if resume else None
        trainer.fit(module, DataLoader(data, batch_size=8), ckpt_path=path, weights_only=False)
        return module, trainer.optimizers[0]

    whole, optimizer = fit(None, resume=False)
    roles = {name: group["role"] for group in optimizer.param_groups for name in group["param_names"]}
    assert roles == {
        "network.0.weight": "embedding",
        "network.1.weight": "vector",
        "network.1.bias": "vector",
        "network.2.weight": "hidden",
        "network.3.weight": "head",
        "network.3.bias": "vector",
    }
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(Killed):
        fit(6, resume=False)  # in the third epoch: the checkpoint is of the second
    assert_same(fit(None, resume=True)[0].network, whole.network)


def test_lightning_logs_what_a_watch_sees():
    logged: list[tuple[int, dict[str, float]]] = []
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", precision="64-true", accumulate_grad_batches=ACCUMULATION, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[WatchOptimizers(2, to=lambda record: logged.append((record.step, record.scalars())))],
    )  # fmt: skip
    module = Module(lw.Lanton, None)
    trainer.fit(module, DataLoader(module.data, batch_size=8))
    assert [step for step, _ in logged] == [1, 2, 4]  # lightning computes gradients in a closure of the step
    assert logged[-1][1].keys() >= {
        "loss_change/network.0",
        "noise_to_signal/network.2",
        "layer_lr/network.0.weight",
    }


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_fabric_wraps_is_named_and_measured_as_it_was(precision):
    """Its rows were `_forward_module.0`, and in mixed precision it let nobody but `fabric.backward` go backward."""
    fabric = lightning.Fabric(accelerator="cpu", devices=1, precision=precision)
    own = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    model, optimizer = fabric.setup(own, lw.DualMuon(lw.param_groups(own)))
    autocast = torch.bfloat16 if precision == "bf16-mixed" else None  # Fabric hands the model inputs of that type
    watch = lw.watch(model, optimizer, every=1, function_space_every=1, autocast=autocast)
    for x in torch.randn(2, 8, 8):
        fabric.backward(model(x).square().mean())
        optimizer.step()
        optimizer.zero_grad()
    assert [list(record.modules) for record in watch.records] == [["0", "2"]] * 2
    assert watch.skipped == {}
    assert [row.name for row in lw.describe(model).rows] == [name for name, _ in own.named_parameters()]


class WithPart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._forward_module, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self._forward_module(x))


def test_a_model_with_a_part_of_that_name_is_taken_whole():
    """The part was taken for the model: what else there was would not have been trained."""
    rows = lw.describe(WithPart(), torch.randn(2, 8)).rows
    assert {row.name: row.role for row in rows if row.role != "vector"} == {"weight": "hidden", "head.weight": "head"}


@pytest.mark.parametrize(("every", "interval", "steps"), [(None, 0, []), (None, 3, [3]), (2, 0, [2, 4])])
def test_lightning_logs_at_its_own_interval_or_never(every, interval, steps):
    logged: list[int] = []
    optimizer = lw.Lanton(lw.param_groups(regression()[0]), **OPTIONS)
    callback = LayerRates(every)
    for step in (1, 2, 3, 4):
        trainer = SimpleNamespace(
            global_step=step, log_every_n_steps=interval, is_global_zero=True, optimizers=[optimizer],
            loggers=[SimpleNamespace(log_metrics=lambda rates, step: logged.append(step))],
        )  # fmt: skip
        callback.on_train_batch_end(trainer, None)
    assert logged == steps


def test_lightning_cannot_log_every_no_step():
    with pytest.raises(lw.LayerwiseError, match=r"every=0.*a whole number from 1 on or None"):
        LayerRates(0)


@PRESETS
def test_accelerate_equals_a_loop_of_ones_own(tmp_path, preset):
    def run(first: int, last: int) -> nn.Module:
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATION)
        network, data = regression()
        optimizer = preset(lw.param_groups(network), **OPTIONS)
        model, wrapped, loader, schedule = accelerator.prepare(
            network, optimizer, DataLoader(data, batch_size=8), linear(optimizer)
        )
        if first:
            accelerator.load_state(str(tmp_path / "saved"))
        for _ in range(first, last):  # epochs of 4 steps
            for batch in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(error(model, batch))
                    if accelerator.sync_gradients:
                        accelerator.clip_grad_norm_(model.parameters(), CLIP)
                    wrapped.step()
                    schedule.step()
                    wrapped.zero_grad()
        accelerator.save_state(str(tmp_path / "saved"))
        return network

    run(0, 1)
    assert_same(run(1, 2), own_regression(preset))
