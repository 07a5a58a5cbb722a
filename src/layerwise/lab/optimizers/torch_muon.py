"""torch.optim.Muon for a whole model: torch's own Muon and AdamW side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

Group = dict[str, Any]


class TorchMuon(Optimizer):
    """`torch.optim.Muon` on hidden matrices and `torch.optim.AdamW` on everything else, in one step.

    It sees matrices as torch does: a `Conv1D` weight the wrong way round, a fused projection as one matrix.
    With `adjust_lr_fn="match_rms_adamw"` (torch's form of D-Muon, the default here) one `lr` serves both.

    Args:
        params: groups of `layerwise.param_groups`, told apart by their `role`.
        lr: of all groups.
        weight_decay: decoupled; not applied to gains and biases.
        momentum, nesterov, ns_steps, adjust_lr_fn: as `torch.optim.Muon`.
        betas, eps: as `torch.optim.AdamW`.
    """

    def __init__(
        self,
        params: Iterable[Group],
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        hidden: list[tuple[str, Tensor]] = []
        rest: dict[bool, list[tuple[str, Tensor]]] = {True: [], False: []}
        for group in params:
            for name, p in group["params"]:
                if group["role"] == "hidden" and p.ndim == 2:
                    hidden.append((name, p))
                else:
                    rest[p.ndim >= 2].append((name, p))
        self._muon = torch.optim.Muon(
            hidden, lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov, ns_steps=ns_steps,
            adjust_lr_fn=adjust_lr_fn,
        )  # fmt: skip
        groups: list[Group] = [{"params": rest[True]}, {"params": rest[False], "weight_decay": 0.0}]
        given = [group for group in groups if group["params"]]
        self._adamw = torch.optim.AdamW(given, lr=lr, weight_decay=weight_decay, betas=betas, eps=eps)
        super().__init__([*self._muon.param_groups, *self._adamw.param_groups], {"lr": lr})
        self._share()

    def _share(self) -> None:
        """Both parts work on this optimizer's groups, those of Muon known by an option of its own, and state."""
        self._muon.param_groups = [group for group in self.param_groups if "ns_steps" in group]
        self._adamw.param_groups = [group for group in self.param_groups if "ns_steps" not in group]
        self._muon.state = self._adamw.state = self.state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step of both; `closure` re-evaluates the model and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._share()  # the groups may be others for this step: FLeRM splits them
        self._muon.step()
        self._adamw.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As any torch optimizer."""
        super().load_state_dict(state_dict)
        self._share()
