"""Running a model and differentiating its outputs, at weights of our choice and without a trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from layerwise.function_space.measuring.collect import Collector
from layerwise.function_space.measuring.estimators import TensorUpdate
from layerwise.function_space.measuring.exact import Derivative, exact_derivative
from layerwise.function_space.measuring.isolation import call_with
from layerwise.function_space.measuring.linear_products import Products, SlotMoments, only_products
from layerwise.function_space.measuring.outputs import Forward, Outputs, as_outputs
from layerwise.function_space.measuring.probes import Sink, probes_at_once, run_probes
from layerwise.function_space.measuring.process_group import Processes, is_sharded

if TYPE_CHECKING:
    from layerwise.function_space.measuring.fsdp import ShardedRunner


class Prober(Protocol):
    """How outputs are differentiated along probes."""

    def probe(self, outputs: Outputs, probes: Iterator[Tensor], sink: Sink, memory: int) -> None:
        """Hand the gradients of every measured tensor under each probe to `sink`."""


class Runner(Prober, Protocol):
    """How a model is run besides."""

    model: nn.Module

    def outputs(self, forward: Forward, batch: Any) -> Any:
        """What `forward(model, batch)` returns."""

    def derivative(
        self, forward: Forward, batch: Any, mask: Tensor | None, name: str, update: TensorUpdate
    ) -> Derivative:
        """The exact derivative of the outputs along one tensor's update."""


class LeafRunner:
    """On leaves of our own in the place of the parameters: they share the weights' memory, not their `.grad` and hooks."""

    def __init__(self, model: nn.Module, points: Mapping[str, Tensor], names: Iterable[str]) -> None:
        self.model = model
        self.points = {name: p.detach() for name, p in points.items()}
        self.leaves = {name: points[name].detach().requires_grad_() for name in names}

    def outputs(self, forward: Forward, batch: Any) -> Any:
        return call_with(self.model, forward, {**self.points, **self.leaves}, batch)

    def probe(self, outputs: Outputs, probes: Iterator[Tensor], sink: Sink, memory: int) -> None:
        run_probes(outputs, self.leaves, probes, sink, memory, streaming=True)

    def derivative(
        self, forward: Forward, batch: Any, mask: Tensor | None, name: str, update: TensorUpdate
    ) -> Derivative:
        def outputs(tensor: Tensor) -> Outputs:
            return as_outputs(call_with(self.model, forward, {**self.points, name: tensor}, batch), mask)

        return exact_derivative(outputs, self.points[name], update)


class ProductRunner(LeafRunner):
    """The same on one process: weights used in one product alone are measured from its factors, `full_cov`'s always."""

    def outputs(self, forward: Forward, batch: Any) -> Any:
        with Products(self.leaves):
            return super().outputs(forward, batch)

    def probe(self, outputs: Outputs, probes: Iterator[Tensor], sink: Sink, memory: int) -> None:
        assert isinstance(sink, Collector)
        # Whole gradients of several probes are quicker to square, where there is room for them.
        tight = probes_at_once(outputs, self.leaves, memory) == 1
        products = {
            name: product
            for name, product in only_products(outputs.values, self.leaves).items()
            if tight or sink.moments[name].estimator.total
        }
        leaves = {**self.leaves, **{name: product.slot for name, product in products.items()}}
        first = list(islice(probes, probes_at_once(outputs, leaves, memory)))
        for name, product in products.items():
            moments = sink.moments[name]
            product.watch(moments.estimator, moments.update, len(first))
            sink.moments[name] = SlotMoments(moments.estimator, moments.update)
        probes = chain(first, probes)
        del first
        run_probes(outputs, leaves, probes, sink, memory, streaming=True)


@contextmanager
def runner_for(
    model: nn.Module, points: Mapping[str, Tensor], names: Iterable[str], processes: Processes
) -> Iterator[LeafRunner | ShardedRunner]:
    """What runs this model at the weights `points`; sharded parameters are measured where they are."""
    parameters = dict(model.named_parameters())
    if not any(is_sharded(p) for p in parameters.values()):
        yield (LeafRunner if processes.count > 1 else ProductRunner)(model, points, names)
        return
    from layerwise.function_space.measuring.fsdp import ShardedRunner

    with ShardedRunner(model, {name: parameters[name] for name in names}, processes) as runner:
        yield runner


class GraphRunner:
    """On outputs that the caller computed from `leaves`, whose graph still stands."""

    def __init__(self, leaves: Mapping[str, Tensor]) -> None:
        self.leaves = leaves

    def probe(self, outputs: Outputs, probes: Iterator[Tensor], sink: Sink, memory: int) -> None:
        run_probes(outputs, self.leaves, probes, sink, memory, streaming=False)
