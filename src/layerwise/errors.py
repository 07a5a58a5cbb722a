"""What users are told: errors that name the thing, its value and the fix, and warnings that point at their line."""

import sys
import warnings

__all__ = ["LayerwiseError", "NonFiniteError"]


class LayerwiseError(ValueError):
    """Bad input, in one line, also of what others said in several. The command line prints it and exits with code 2.

    Examples:
        >>> lw.NoiseAdaptive(beta=2.0)
        Traceback (most recent call last):
            ...
        layerwise.errors.LayerwiseError: NoiseAdaptive(beta=2.0): give a number in [0, 1)
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class NonFiniteError(LayerwiseError):
    """A gradient held NaN or inf, and the step was not taken. Training has diverged; nothing was wrong with the input.

    Examples:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = lw.DMuon(lw.param_groups(model))
        >>> (model(torch.ones(1, 2)).sum() * float("nan")).backward()
        >>> optimizer.step()
        Traceback (most recent call last):
            ...
        layerwise.errors.NonFiniteError: non-finite gradient in 'weight', 'bias'; the weights were not touched. Lower the...
    """


# What may lie between a user's line and ours: torch's constructors and contextlib's managers call back into Layerwise.
_NOT_THE_USER = ("layerwise", "torch", "contextlib")


def warn(message: str) -> None:
    """A UserWarning at the innermost line outside Layerwise and what calls back into it."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in _NOT_THE_USER:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
