"""Groups' values that libraries dropped without a word, as their issues tell it: not here."""

import pytest
import torch
from tiny import net, set_gradients
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

import layerwise as lw


def signs(**groups):
    """One vector of ones in each group; a step of Signum moves its entries by the rate of its group."""
    made = [
        {
            "params": [(name, nn.Parameter(torch.ones(4)))],
            "role": "hidden",
            "layout": lw.VectorLayout(),
            **options,
        }
        for name, options in groups.items()
    ]
    return [{**group, "geometry": lw.Sign()} for group in made]


def moved(optimizer):
    before = [group["params"][0].detach().clone() for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones(4)
    optimizer.step()
    after = [group["params"][0].detach() for group in optimizer.param_groups]
    return [float((old - new).mean()) for old, new in zip(before, after, strict=True)]


def test_lr_scale_is_applied_without_a_scheduler_that_knows_it():
    """huggingface/pytorch-image-models#2532: layer decay had no effect outside timm's own schedulers."""
    optimizer = lw.Signum(signs(deep={"lr_scale": 0.25}, top={"lr_scale": 1.0}), lr=0.5, momentum=0.0)
    assert moved(optimizer) == pytest.approx([0.125, 0.5])
    LambdaLR(optimizer, lambda step: 0.5)
    assert moved(optimizer) == pytest.approx([0.0625, 0.25])


def test_a_schedule_made_before_loading_moves_the_groups_that_are_stepped():
    """NVIDIA/apex#766: after load_state_dict the groups that the schedule wrote to were not those of the step."""
    optimizer = lw.Signum(signs(a={"lr": 0.5}, b={"lr": 0.25}), momentum=0.0)
    schedule = LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.load_state_dict(lw.Signum(signs(a={"lr": 0.5}, b={"lr": 0.25}), momentum=0.0).state_dict())
    assert moved(optimizer) == pytest.approx([0.5, 0.25])
    schedule.step()
    assert moved(optimizer) == pytest.approx([0.25, 0.125])


def test_one_rate_written_into_all_groups_leaves_their_ratios():
    """katsura-jp/pytorch-cosine-annealing-with-warmup#14: the scheduler's max_lr replaced every group's own rate."""
    optimizer = lw.Signum(signs(a={"lr_scale": 0.1}, b={}), momentum=0.0)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    assert moved(optimizer) == pytest.approx([0.05, 0.5])
    assert "0.05 = 0.5 * 0.1" in optimizer.groups_table()


@pytest.mark.parametrize("preset", [lw.Muon, lw.DMuon, lw.Scion, lw.Signum, lw.Lanton])
def test_every_value_that_a_group_was_given_is_the_one_it_has(preset):
    """The kind: whatever a preset says of a role, what the user gave a group stands, and the step takes it."""
    given = {
        "lr": 0.0123,
        "weight_decay": 0.0321,
        "momentum": 0.77,
        "eps": 1e-5,
        "lr_scale": 0.5,
        "name": "mine",
    }
    model = net()
    optimizer = preset(lw.param_groups(model, overrides={"*": given}))
    assert all(group[key] == value for group in optimizer.param_groups for key, value in given.items())
    plain = preset(
        [
            {
                "params": [("w", nn.Parameter(torch.ones(3, 3)))],
                "role": "hidden",
                "layout": lw.MatrixLayout(),
                "geometry": lw.Spectral(),
                **given,
            }
        ]
    )
    assert all(plain.param_groups[0][key] == value for key, value in given.items())
    set_gradients(model, 0)
    optimizer.step()
    assert all(group[key] == value for group in optimizer.param_groups for key, value in given.items())
