"""`torch.compile(optimizer.step)`: the same numbers, and no recompilation when the learning rate changes."""

import pytest
import torch
from tiny import make, net, set_gradients
from torch._dynamo.testing import CompileCounterWithBackend


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("d-muon-noise", "eager"),  # the matrices' path and AdamW's, with noise
        ("dual-muon", "eager"),  # whose momentum is another one at every step
        *(
            pytest.param(name, backend, marks=SLOW)
            for name in ("lanton", "lanton-momentum", "namo", "muon", "scion", "scion-dual", "dual-muon")
            for backend in ("eager", "aot_eager")
            if (name, backend) != ("dual-muon", "eager")
        ),
    ],
)
def test_a_compiled_step_is_the_step_and_compiles_once(name, backend):
    model, other = net(), net()
    optimizer = make(name, model, lr=torch.tensor(0.01))
    plain = make(name, other, lr=torch.tensor(0.01))
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], torch.Tensor):
            group["lr"] = torch.tensor(group["lr"])
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(optimizer.step, backend=counter)
    counts = []
    for step in range(5):
        set_gradients(model, step)
        set_gradients(other, step)
        for group in (*optimizer.param_groups, *plain.param_groups):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(0.01 / (step + 1))
        if name == "muon":  # its AdamW groups have a rate of their own
            for group in plain.param_groups:
                group["lr"] = torch.tensor(0.01 / (step + 1))
        compiled()
        plain.step()
        counts.append(counter.frame_count)
    assert counts[0] > 0
    assert counts[-1] == counts[1], counts  # the second step may still see a first gradient's strides
    known = ("Tensor.item()", "_fused_adam")  # whether gradients are finite, on a CPU; what torch leaves out itself
    breaks = torch._dynamo.utils.counters["graph_break"]
    if torch.__version__ >= "2.13":  # torch 2.9 cannot trace id(), and goes on in another graph
        assert all(any(word in reason for word in known) for reason in breaks), breaks
    for (n, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=lambda m, n=n: f"{n} {m}")


def test_a_step_at_a_number_as_rate_compiles():
    """torch's AdamW over lists of tensors takes no compiled step on a CPU where `lr` is a number (torch 2.13)."""
    model, other = net(), net()
    optimizer, plain = make("d-muon", model, lr=0.01), make("d-muon", other, lr=0.01)
    compiled = torch.compile(optimizer.step, backend="eager")
    for step in range(3):
        set_gradients(model, step)
        set_gradients(other, step)
        compiled()
        plain.step()
    for (n, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6, msg=lambda m, n=n: f"{n} {m}")
