"""Muon for the matrices of a model, and AdamW for its other parameters, as one optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from sft.optimizers.groups import embedding_parameters

IS_MUON = "is_muon"
"""Key of a group of parameters: whether Muon updates it."""


class MuonWithAdamW(torch.optim.Optimizer):
    """Optimizer that updates some groups of parameters by Muon and the others by AdamW.

    Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) moves a matrix by its momentum, made
    orthogonal. Its step is scaled so that its root mean square is that of AdamW (Liu et al., arXiv:2502.16982): one
    learning rate is for both.

    Both are torch's own optimizers. They read groups and state of this one, so that schedules, checkpoints and
    loading see a single optimizer.

    Args:
        groups: Groups of parameters, each with the key `is_muon`.
        lr: Learning rate.
        betas: For AdamW.
        eps: For AdamW.
        momentum: For Muon.
        nesterov: For Muon.
        ns_steps: Iterations that make a matrix orthogonal.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
    ) -> None:
        matrix = nn.Parameter(torch.zeros(1, 1))  # torch's optimizers refuse an empty list
        self._muon = torch.optim.Muon(
            [matrix], lr, 0.0, momentum, nesterov, ns_steps=ns_steps, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW([matrix], lr, betas, eps, weight_decay=0.0)
        complete = []
        for group in groups:
            inner = self._muon if group[IS_MUON] else self._adamw
            complete.append({**inner.defaults, **group})
        super().__init__(complete, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters.

        Args:
            closure: Computes the loss again, as for torch's optimizers.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for inner, is_muon in ((self._muon, True), (self._adamw, False)):
            inner.param_groups = [group for group in self.param_groups if group[IS_MUON] is is_muon]
            inner.state = self.state
            if inner.param_groups:
                inner.step()
        return loss


def muon_groups(model: nn.Module, decayed: Iterable[str], weight_decay: float) -> list[dict[str, Any]]:
    """Return the groups of a model's trained parameters.

    Muon gets the matrices, but neither embeddings nor the head, whose rows are not mixed with each other.

    Args:
        model: The model.
        decayed: Names of the parameters that decay.
        weight_decay: Their decay.
    """
    embeddings, decayed = embedding_parameters(model), set(decayed)
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_muon = parameter.ndim == 2 and id(parameter) not in embeddings
            groups.setdefault((is_muon, name in decayed), []).append(parameter)
    return [
        {"params": parameters, IS_MUON: is_muon, "weight_decay": weight_decay if decays else 0.0}
        for (is_muon, decays), parameters in sorted(groups.items(), key=lambda item: item[0], reverse=True)
    ]
