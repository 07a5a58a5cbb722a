"""Noise between replicas: what the definition gives on one process, on the scale of the other references, in 1/W memory.

Parity is in float64, at the tolerance of test_distributed_parity.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from replica_runs import Case, error_of, literal, noise_of_noise, resumed, watched
from test_distributed_parity import same

CASES = [
    (Case("ddp"), 2),
    (Case("ddp", bucket_view=True, clip=0.05), 4),
    (Case("ddp", parts=2, clip=0.05, loss_scale=1024.0), 2),
    (Case("ddp", parts=2, synced=True, bucket_view=True), 2),
    (Case("ddp", static=True), 2),
    (Case("ddp", partial=True, hook="allreduce"), 2),
    (Case("ddp", measured=True), 2),
    (Case("fsdp", measured=True), 2),
    (Case("fsdp", clip=0.05), 4),
    (Case("fsdp", parts=2), 2),
    (Case("fsdp", parts=2, synced=True, clip=0.05), 2),
    (Case("hsdp", clip=0.05), 4),
]


@pytest.mark.parametrize(("case", "world"), CASES, ids=str)
def test_as_the_definition_on_one_process(cluster, case, world):
    if case.clip and case.how != "ddp" and torch.__version__ < "2.13":
        pytest.skip("clip_grad_norm_ of torch 2.9 adds its 1e-6 to the norm on every process")
    (expected,) = cluster.run(1, literal, case, world, 4)
    found = cluster.run(world, watched, case, 4)
    same(expected, found)
    for other in found[1:]:  # not close: replicas that drift apart never meet again
        assert all(torch.equal(w, found[0]["weights"][name]) for name, w in other["weights"].items())
        assert other["rates"] == found[0]["rates"]
    multipliers = {rate.multiplier for rate in found[0]["rates"].values()}
    assert len(multipliers) > 5  # the rule did something
    total = sum(w.numel() * w.element_size() for w in expected["weights"].values())
    largest = max(w.numel() * w.element_size() for w in expected["weights"].values())
    held = [result["held"] for result in found]
    unused = expected["weights"]["experts"]
    assert sum(held) in (total, total - case.partial * unused.numel() * unused.element_size())
    assert max(held) <= total / world + largest


def test_a_compressing_hook_goes_on_compressing(cluster):
    exact, rounded = (cluster.run(2, watched, Case("ddp", hook=hook), 1)[0]["rates"] for hook in ("", "fp16"))
    for unit, rate in exact.items():
        assert rounded[unit].squared_norm != rate.squared_norm
        # Halves of the entries' precision, 2^-11, twice and squared: well below 1 %.
        assert math.isclose(rounded[unit].squared_norm, rate.squared_norm, rel_tol=0.01)


def test_mixed_precision_of_fsdp(cluster):
    """Rounding to bfloat16 at every layer, 2^-9 each, changes squared norms by up to a fifth, of sums that nearly cancel.

    A part of the batch counted twice, or not, changes them by a factor of two and more.
    """
    exact, rounded = (cluster.run(2, watched, Case("fsdp", parts=2, mixed=mixed), 1)[0]["rates"] for mixed in (False, True))
    for unit, rate in exact.items():
        assert rounded[unit].squared_norm != rate.squared_norm
        assert math.isclose(rounded[unit].squared_norm, rate.squared_norm, rel_tol=0.3), unit


def test_two_replicas_are_two_halves(cluster):
    """`independent` on one process takes the halves of the batch that two replicas have."""
    from distributed_runs import trained

    same(
        cluster.run(1, trained, "single", "Lanton", "independent", 4)[0],
        cluster.run(2, watched, Case("ddp"), 4),
    )


@pytest.mark.parametrize("world", [2, 4])
def test_white_noise_gives_what_the_other_references_give(cluster, world):
    """64 x 64 entries of deviation 1, so sigma^2 = 1 / W and each entry of the difference has variance 2 / W.

    A sum of n absolute values has the relative deviation sqrt(pi/2 - 1) / sqrt(n) = 1.2 % at n = 4096, its square twice
    that. The average with beta = 0.9 is worth 19 steps: 0.54 %; of `previous`, whose neighbouring differences share a
    gradient, at most twice that. Nuclear norms of white noise scatter less still.
    """
    rules = [(ref, geo, 0.9) for geo in ("sign", "spectral") for ref in ("replicas", "previous")]
    results = cluster.run(world, noise_of_noise, [1.0] * world, rules, 30)
    assert all(found == results[0] for found in results)
    by_sign, previous_by_sign, spectral, previous_spectral = results[0]
    expected = (64 * 64 * math.sqrt(2 / math.pi) * math.sqrt(2 / world)) ** 2
    assert math.isclose(by_sign, expected, rel_tol=5 * 0.0054)
    assert math.isclose(previous_by_sign, expected, rel_tol=5 * 0.0108)
    assert math.isclose(spectral, previous_spectral, rel_tol=5 * 0.0108)


def test_a_noisier_replica_slows_no_layer_more_than_another(cluster):
    """All noise is in one replica of four: its difference is 3 times the others', its square 9 times.

    Matrices take their turns there at different steps, so averages differ by beta^3 at most: 0.95^-3 = 1.17. What they
    started from has the weight 0.95^80 = 1.7 % left, and there is a percent of scatter.
    """
    rules = [("replicas", "sign", 0.95)] * 4
    found = cluster.run(4, noise_of_noise, [0.0, 0.0, 1.0, 0.0], rules, 80)[0]
    assert max(found) / min(found) < 1.25


@pytest.mark.parametrize("skip", [False, True])
def test_a_resumed_run_asks_the_same_replicas(cluster, skip):
    for whole, again in cluster.run(4, resumed, skip):
        assert whole["skipped"] == again["skipped"] == int(skip)
        same(whole, [again])  # DDP's first step has other buckets, and so sums in another order


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("unwatched", "watch_replicas"),
        ("plain", "Model"),
        ("hook", "give it here"),
        ("local", "LocalWork"),
        ("unseen", "since the last step"),
    ],
)
def test_where_replicas_cannot_be_seen(cluster, what, message):
    for error in cluster.run(2, error_of, what):
        assert message in error
        assert "'previous'" in error or what == "hook"


def test_one_process_has_no_replicas(cluster):
    (error,) = cluster.run(1, error_of, "single")
    assert "independent" in error


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["hf", "lightning"])
def test_inside_a_trainer(trainer, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = subprocess.run(
        [*command, str(Path(__file__).with_name("trainer_run.py")), str(tmp_path), trainer],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("the same weights") == 2
