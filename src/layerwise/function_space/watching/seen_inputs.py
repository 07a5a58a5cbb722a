"""The inputs of a training forward, kept to measure on."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


class SeenInputs:
    """Keeps what the model was last called with in training, while it is listening; a reference, no copy."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._seen: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._handle: RemovableHandle | None = None

    def listen(self, wanted: bool) -> None:
        """Hook the model, or leave it alone: no longer than needed, as models with hooks are copied and saved with them."""
        if wanted and self._handle is None:
            self._handle = self.model.register_forward_pre_hook(self._note, with_kwargs=True)
        elif not wanted and self._handle is not None:
            self._handle.remove()
            self._handle = None

    def take(self) -> Any:
        """The inputs seen last, as measuring takes them: a tensor, a tuple of arguments, a dict of keywords; None: none."""
        seen, self._seen = self._seen, None
        if seen is None:
            return None
        args, kwargs = seen
        if not kwargs:
            return args[0] if len(args) == 1 else args
        if not args:
            return kwargs
        try:
            return dict(inspect.signature(self.model.forward).bind(*args, **kwargs).arguments)
        except (TypeError, ValueError):  # a forward that hides its names
            return None

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module.training and torch.is_grad_enabled():
            self._seen = (args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> SeenInputs:
        """A copy of the model that took a hook along listens to nobody."""
        return SeenInputs(nn.Identity())

    def __reduce__(self) -> tuple[Any, ...]:
        return SeenInputs, (nn.Identity(),)
