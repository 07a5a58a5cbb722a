"""`lw.check` of a model that a config describes, or of what a user's function makes."""

from __future__ import annotations

import pkgutil
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerwise.errors import LayerwiseError
from layerwise.function_space import SizeCheck, check
from layerwise.lab.config.schema import Config
from layerwise.lab.data.batches import open_data
from layerwise.lab.models.families import build_model, loss, resized
from layerwise.lab.models.family import Examples
from layerwise.lab.optimizers.registry import build_optimizer
from layerwise.lab.training.observers import depth_map, quiet_matching
from layerwise.lab.training.run import complete


def check_sizes(
    config: Config, sizes: Sequence[float], *, axis: str = "width", match: str | None = None, **options: Any
) -> SizeCheck:
    """`lw.check` of a config's model, optimizer and data at several sizes, at a constant rate without clipping.

    Args:
        config: of the model at any of the sizes; its `function_space` section says how rates are measured.
        sizes: values of the axis.
        axis: what is varied.
        match: see `lw.check`; None: what the config's `function_space.match` says.
        options: of `lw.check`: `steps`, `seeds`, `tolerance`, `judge`.

    Raises:
        LayerwiseError: as `lw.check`, and for a config that cannot be run.
    """
    quiet_matching()
    config = complete(config)  # a preset's default rate is that of one size: all sizes take the same
    configs = {size: config.replace(resized(config.model, axis, size)) for size in sizes}
    data, settings = open_data(config), config.function_space
    examples = Examples(data.vocab_size, config.data.seq_len, data.features)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        found = data.batch(step)
        return found.inputs, found.targets

    match = settings.match if match is None else match
    return check(
        lambda size: build_model(configs[size].model, examples, torch.initial_seed()),
        sizes,
        lambda model: build_optimizer(model, config.optimizer),
        batch,
        loss=lambda model, given: loss(model, *given),
        match=match,
        depth=None if match is None else depth_map(config),
        match_step=settings.match_step,
        axis=axis,
        **settings.measured,
        **options,
    )


def check_function(target: str, sizes: Sequence[float], **options: Any) -> SizeCheck:
    """`lw.check` of `package.module:function`, which is called with a size and returns `(model, optimizer, batch)`.

    Args:
        target: the function, found from the current folder on.
        sizes: what it is called with; the first size's batch serves all.
        options: of `lw.check`.

    Raises:
        LayerwiseError: as `lw.check`, and where there is no such function.
    """
    function = _function(target)
    latest: list[Optimizer] = []  # of the model that was made last

    def made(size: float) -> tuple[Any, ...]:
        found = function(int(size) if size == int(size) else size)
        if not isinstance(found, tuple) or len(found) not in (3, 4):
            what = f"{target} returned {type(found).__name__}"
            raise LayerwiseError(f"{what}: return (model, optimizer, batch), or a loss(model, batch) too")
        return found

    def model(size: float) -> nn.Module:
        found, optimizer, *_ = made(size)
        latest[:] = [optimizer]
        return found

    _, _, batch, *loss_of_batch = made(sizes[0])
    return check(model, sizes, lambda _: latest[0], batch, loss=loss_of_batch[0] if loss_of_batch else None, **options)


def _function(target: str) -> Callable[[Any], Any]:
    sys.path.insert(0, "")
    try:
        function = pkgutil.resolve_name(target)
    except (ImportError, AttributeError, ValueError) as error:
        raise LayerwiseError(f"{target}: {error}; give package.module:function") from None
    finally:
        sys.path.remove("")
    if not callable(function):
        raise LayerwiseError(f"{target} is no function, and one of the size is needed")
    return cast("Callable[[Any], Any]", function)
