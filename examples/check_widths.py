"""A model of one's own for `layerwise check`: is one learning rate right at every width?

    layerwise check examples.check_widths:make --sizes 64,128,256 -o check

Plain Adam is not flat: the command ends with exit code 1 and names the modules whose updates move the outputs more the
wider they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def make(width: int) -> tuple[nn.Module, torch.optim.Optimizer, tuple[Tensor, Tensor]]:
    """The model of a width, its optimizer and one batch (inputs, classes)."""
    model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    inputs = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    return model, optimizer, (inputs, inputs[:, :4].argmax(1))
