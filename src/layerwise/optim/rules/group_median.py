"""The middle of a norm group, by which a rule measures its units."""

from __future__ import annotations

import torch
from torch import Tensor


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """The value at which half of the weight lies below or at it.

    A mean would follow its largest entries: one unit of a gradient ten times the others' lifts it ten-fold. A median that
    counts units would follow the many: four thousand depthwise kernels of four taps outvote ten matrices that hold all the
    weights. Weighted by the number of entries it is the value of the unit that the model's middle weight lies in.

    Args:
        values: ``[units]``, at least 0.
        weights: ``[units]``, at least 0; a unit of weight 0 is left out.

    Returns:
        0-dim, one of ``values``; 0 where all weights are 0.

    Examples:
        >>> weighted_median(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([1.0, 1.0, 3.0]))
        tensor(9.)
    """
    ordered, order = torch.where(weights > 0, values, torch.inf).sort()
    total = weights[order].cumsum(0)
    middle = torch.searchsorted(total, total[-1:] / 2).clamp(max=len(ordered) - 1)
    # gathered: an index of no dimension would wait for the device
    return torch.where(total[-1] > 0, ordered.gather(0, middle)[0], 0.0)
