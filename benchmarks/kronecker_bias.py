"""How far off each estimator of function-space rates is, by type of layer: the table of results/kronecker_bias.md.

    python benchmarks/kronecker_bias.py

For each tensor the estimate over very many probes (so that what is left is bias) over the exact rate, minus one; the
range is over seeds, optimizers and depths. The last column is the relative standard error at 32 probes.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import torch
from torch import Tensor, nn

from layerwise.function_space import Measurement, function_space_rates
from layerwise.function_space.measuring.moments import (
    Estimator,
    Moments,
    TensorUpdate,
    combine,
    full_cov,
    iid,
    kronecker,
)
from layerwise.function_space.measuring.outputs import Outputs, draw_probes
from layerwise.function_space.measuring.process_group import Collector
from layerwise.function_space.measuring.runners import Runner, in_evaluation_mode
from script import documented_parser


class Experts(nn.Module):
    """Softly routed two-layer experts, their weights stacked as `[experts, out, in]`."""

    def __init__(self, width: int, experts: int = 4) -> None:
        super().__init__()
        self.route = nn.Linear(width, experts)
        self.up = nn.Parameter(torch.randn(experts, 2 * width, width) * width**-0.5)
        self.down = nn.Parameter(torch.randn(experts, width, 2 * width) * (2 * width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("eoi,bti->bteo", self.up, x).relu()
        return torch.einsum("bte,eio,bteo->bti", self.route(x).softmax(-1), self.down, hidden)


class Block(nn.Module):
    def __init__(self, width: int, experts: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.experts = Experts(width) if experts else None

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.proj(attended.transpose(1, 2).reshape(batch, length, width))
        h = self.norm2(x)
        return x + (self.down(self.up(h).relu()) if self.experts is None else self.experts(h))


class Transformer(nn.Module):
    def __init__(self, width: int, experts: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, width)
        self.position = nn.Parameter(torch.randn(24, width) * 0.1)
        self.blocks = nn.Sequential(Block(width, experts), Block(width, experts))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embedding(x) + self.position)))


def resmlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(24, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def convnet(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, groups=width),
        nn.ReLU(),
        nn.Conv2d(width, width, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )


def layer_type(kind: str, name: str, p: Tensor) -> str:
    """A row of the table."""
    last = name.rsplit(".", 1)[-1]
    if p.ndim <= 1:
        return "bias or gain"
    if kind == "conv" and p.ndim == 4:
        return f"conv {p.shape[2]}x{p.shape[3]}" + (" depthwise" if p.shape[1] == 1 else "")
    if kind == "conv":
        return "conv net's head"
    if kind == "mlp":
        return {"0": "MLP input", "2": "MLP hidden", "4": "MLP output"}[name.split(".")[0]]
    if p.ndim == 3:
        return f"experts {last} [E, out, in]"
    return next(
        (t for t in ("embedding", "position", "qkv", "proj", "up", "down", "route", "head") if t in name),
        name,
    )


def views(shape: tuple[int, ...]) -> dict[str, Estimator]:
    """The estimators to compare for a tensor of this shape."""
    found = {"full_cov": full_cov(shape), "iid": iid(shape)}
    if len(shape) >= 2:
        found["kronecker"] = kronecker(shape)
    if len(shape) > 2:
        found["(out, rest)"] = kronecker((shape[0], math.prod(shape[1:])))
        found["(lead, in)"] = kronecker((math.prod(shape[:-1]), shape[-1]))
    return found


def one_update(model: nn.Module, kind: str, rule: str, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """A gradient's update by Adam's first step, SGD or orthogonalised SGD, and other inputs to measure on."""
    torch.manual_seed(seed + 1000)
    if kind == "mlp":
        data, target = torch.randn(2, 64, 24), None
        target = data[0][:, :10].argmax(1)
    elif kind == "conv":
        data = torch.randn(2, 16, 3, 12, 12)
        target = data[0].mean((2, 3)).argmax(1)
    else:
        data = torch.randint(0, 64, (2, 6, 24))
        target = data[0]
    outputs = model(data[0])
    nn.functional.cross_entropy(outputs.flatten(0, -2), target.flatten()).backward()
    update = {}
    for name, p in model.named_parameters():
        g = p.grad if p.grad is not None else torch.zeros_like(p)
        if rule == "Adam":
            update[name] = -1e-3 * g / (g.abs() + 1e-8)
        elif rule == "Muon" and p.ndim >= 2:
            u, _, v = torch.linalg.svd(g.flatten(1) if p.ndim != 3 else g, full_matrices=False)
            update[name] = -1e-3 * (u @ v).reshape(p.shape)
        else:
            update[name] = -1e-3 * g
    return update, data[1]


class WholeGradients(Runner):
    """Takes no moments from the factors of a product: these are of one estimator alone."""

    def outputs(self, batch: Tensor, mask: Tensor | None) -> Outputs:
        leaves = {name: p.detach().requires_grad_() for name, p in self.points.items()}
        return replace(self.outputs_at(leaves, batch, mask), leaves=leaves)


def estimates(model: nn.Module, update: dict[str, Tensor], inputs: Tensor, probes: int, forward: str) -> dict:
    """`{tensor: {estimator: (value, standard error)}}`, all estimators from the same probes."""
    chosen = {name: views(tuple(u.shape)) for name, u in update.items()}
    rows = {
        (name, which): Moments(estimator, TensorUpdate(update[name].reshape(estimator.view)))
        for name, estimators in chosen.items()
        for which, estimator in estimators.items()
    }

    class AllEstimators(Collector):
        def add(self, name: str, grads: Tensor) -> None:
            for which, estimator in chosen[name].items():
                rows[name, which].add(grads.reshape(-1, *estimator.view))

    with in_evaluation_mode(model):
        runner = WholeGradients(Measurement(forward), model, {name: TensorUpdate(u) for name, u in update.items()})
        runner.collector = AllEstimators
        outputs = runner.outputs(inputs, None)
        runner.probe(outputs, draw_probes(outputs, probes, seed=0))
    found: dict = defaultdict(dict)
    for (name, which), moments in rows.items():
        logs = moments.logs(probes) - math.log(outputs.values.numel())
        [found[name][which]] = combine(chosen[name][which].exponents, logs[None])
    return found


def main() -> None:
    parser = documented_parser(__doc__)
    parser.add_argument("--probes", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64])
    args = parser.parse_args()
    torch.set_num_threads(1)
    table: dict = defaultdict(lambda: defaultdict(list))
    makers = {
        "mlp": resmlp,
        "conv": lambda w: convnet(w // 2),
        "transformer": lambda w: Transformer(w, False),
        "experts": lambda w: Transformer(w // 2, True),
    }
    for kind, make in makers.items():
        for width in args.widths:
            for seed in range(args.seeds):
                for rule in ("Adam", "SGD", "Muon"):
                    torch.manual_seed(seed)
                    model = make(width)
                    update, inputs = one_update(model, kind, rule, seed)
                    for forward in ("output", "log_softmax") if kind == "transformer" else ("output",):
                        exact = function_space_rates(model, update, inputs, forward, "exact")
                        found = estimates(model, update, inputs, args.probes, forward)
                        largest = max(rate.value for rate in exact.values())
                        for name, p in model.named_parameters():
                            if exact[name].value < 1e-4 * largest:
                                continue  # key biases, and what is as good as them
                            row = layer_type(kind, name, p) + (
                                " behind log-softmax" if forward != "output" and name == "head.weight" else ""
                            )
                            for which, (value, stderr) in found[name].items():
                                relative = stderr / value * math.sqrt(args.probes / 32)
                                table[row][which].append((width, value / exact[name].value - 1, relative))
    columns = ["kronecker", "(out, rest)", "(lead, in)", "full_cov", "iid"]
    low, high = min(args.widths), max(args.widths)
    print(f"| layer | {' | '.join(columns)} | kronecker, width {low} / {high} | stderr at 32: kronecker / full_cov |")
    print("|---" * (len(columns) + 3) + "|")
    for row in sorted(table):
        cells = []
        for which in columns:
            bias = [b for _, b, _ in table[row].get(which, [])]
            cells.append(
                f"{100 * sum(bias) / len(bias):+.0f} ({100 * min(bias):+.0f}..{100 * max(bias):+.0f})" if bias else ""
            )
        by_width = []
        for width in (low, high):
            bias = [b for w, b, _ in table[row].get("kronecker", []) if w == width]
            by_width.append(f"{100 * sum(bias) / len(bias):+.0f}" if bias else "")
        errors = []
        for which in ("kronecker", "full_cov"):
            found_errors = [e for _, _, e in table[row].get(which, [])]
            errors.append(f"{100 * sum(found_errors) / len(found_errors):.0f}" if found_errors else "")
        print(f"| {row} | {' | '.join(cells)} | {' / '.join(by_width)} | {' / '.join(errors)} |")


if __name__ == "__main__":
    main()
