"""`function_space_rates`: what an update does to a model's outputs, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from layerwise.common.checked import PositiveInt, checked
from layerwise.common.parameter_names import unwrap
from layerwise.common.similar import nearest
from layerwise.common.tensors import placed_as
from layerwise.errors import LayerwiseError
from layerwise.function_space.measuring.measurement import Measurement
from layerwise.function_space.measuring.moments import TensorUpdate
from layerwise.function_space.measuring.outputs import Forward
from layerwise.function_space.measuring.runners import check_numbers, trainable
from layerwise.function_space.rates import Rates


@checked
def function_space_rates(
    model: nn.Module,
    update: Mapping[str, Tensor],
    inputs: Any,
    forward: Forward | str | None = None,
    method: str = "full_cov",
    probes: PositiveInt = 64,
    seed: int = 0,
    *,
    mask: Tensor | None = None,
    **options: Any,
) -> Rates:
    """What an update does to the model's outputs, to first order, tensor by tensor (arXiv 2502.17405).

    The rate of tensor l is the RMS over output entries of the derivative of the outputs along `dW_l`, the other tensors
    staying at their present values. Nothing is touched: weights, `.grad`, buffers, train/eval mode, global random state
    and autocast are as before.

    Args:
        model: any module; wrappers of torch.compile and data parallelism are seen through.
        update: parameter name -> dW, in the parameter's shape. Frozen parameters are left out of the result.
        inputs: a tensor, a tuple (positional arguments, as many as `forward` takes), a dict (keywords), or a list of such
            batches.
        forward: `forward(model, inputs)` returns the outputs, or `(outputs, mask)`; `"log_softmax"` by name.
        method: `"full_cov"`, `"kronecker"`, `"iid"`, `"exact"` or `"difference"`: see `Measurement`.
        probes: number of random probes, each one backward pass.
        seed: of the probes.
        mask: which outputs count, of the shape that the outputs' shape begins with (such as `[batch, positions]`).
            For dict inputs with an `attention_mask` that mask is the default.
        options: the other fields of `Measurement`.

    Returns:
        Rates by parameter name, in the outputs' unit.

    Raises:
        LayerwiseError: an unknown name, a wrong shape, or outputs that cannot be measured.

    Examples:
        >>> model = torch.nn.Linear(3, 2, bias=False)
        >>> update = {"weight": torch.ones(2, 3)}
        >>> inputs = torch.eye(3)  # each output then moves by one
        >>> lw.function_space_rates(model, update, inputs, method="exact")["weight"].value
        1.0
    """
    inner = unwrap(model)
    _check_update(update, dict(inner.named_parameters()))
    parameters = {name: p for name, p in trainable(inner).items() if name in update}
    check_numbers(parameters)
    updates = {name: TensorUpdate(placed_as(update[name], p)) for name, p in parameters.items()}
    return Measurement(forward, method, probes, seed, **options).rates(inner, updates, inputs, mask)


def _check_update(update: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    if not update:
        raise LayerwiseError("update is empty: give each parameter's name and what is added to it")
    for name, delta in update.items():
        if name not in parameters:
            near = nearest(name, parameters)
            hint = f"; did you mean {near[0]!r}?" if near else ": use names of model.named_parameters()"
            raise LayerwiseError(f"update holds {name!r}, which is no parameter of the model{hint}")
        if delta.shape != parameters[name].shape:
            raise LayerwiseError(
                f"update[{name!r}] has shape {tuple(delta.shape)}, the parameter {tuple(parameters[name].shape)}"
            )
