"""Check that a training changes all parameters that it is to change.

The gradients of the first updates and the weights before and after them are looked at. A parameter is untrained if the
loss does not depend on it (no gradient), if its gradient is exactly zero in every one of these updates, or if the
optimizer leaves it as it is. One update is not enough to tell: LoRA's first matrix has a gradient of zero until the
second one, which starts at zero, has changed, and the learning rate of the first update is zero under a warm-up.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from sft.inner_model import causal_lm, outside_language_model

logger = logging.getLogger(__name__)

NUM_UPDATES = 5
"""Number of updates after which parameters are called untrained."""

UNTRAINED = "untrained"
"""Key of the log entry about untrained parameters; its value is a list of findings."""

NO_GRADIENT = "no gradient"
ZERO_GRADIENT = "a gradient of exactly zero"
UNCHANGED = "weights that do not change"

NEEDED = (NO_GRADIENT, ZERO_GRADIENT, UNCHANGED)
"""What is wrong with a parameter, in the order in which it is looked for."""

MEANING = {
    NO_GRADIENT: "the loss does not depend on them",
    ZERO_GRADIENT: "the loss does not depend on their values",
    UNCHANGED: "the learning rate is zero or too small for their data type, or the optimizer does not have them",
}

WRAPPERS = re.compile(r"\b(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of a parameter's name that wrappers around a model or its layers add."""

EXPERT = re.compile(r"\bexperts\.\d+\b")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
TOKEN_ROWS = "trainable_tokens_delta"

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Finding:
    """Untrained modules whose names differ only in the numbers of their layers.

    Args:
        modules: Their names, with `*` in place of these numbers.
        count: Number of the modules.
        first: Name of the first of them.
        problem: One of `NEEDED`.
    """

    modules: str
    count: int
    first: str
    problem: str


@dataclass(frozen=True)
class Watched:
    """A trained parameter.

    Args:
        name: Its name, without wrappers.
        parameter: The parameter.
        module: Name of its module; of an adapter's weights, that of the adapted layer.
        is_adapter: Whether it belongs to an adapter.
        is_rare: Whether only some rows reach it: rows of single tokens, and parts for images.
    """

    name: str
    parameter: nn.Parameter
    module: str
    is_adapter: bool
    is_rare: bool


class UntrainedWatch(TrainerCallback, ExportableState):
    """Callback that finds untrained parameters; as a callback, it is saved in checkpoints with what it has seen.

    Parameters that only some rows reach are called untrained when training ends. An expert is trained if any expert of
    its layer is.

    Args:
        policy: One of `sft.options.UNTRAINED_POLICIES`; None = check nothing.
        num_updates: Number of updates that have been looked at.
        is_decided: Whether the parameters that all rows reach have been checked.
        lacking: For each of `NEEDED`, names of the parameters for which it has been so until now; None = at the start.
    """

    def __init__(
        self,
        policy: str | None = None,
        num_updates: int = 0,
        is_decided: bool = False,
        lacking: dict[str, list[str]] | None = None,
    ) -> None:
        self.policy, self.num_updates, self.is_decided, self.lacking = policy, num_updates, is_decided, lacking
        self._watched: list[Watched] | None = None
        self._is_open = False  # gradients were looked at whose update is not counted yet

    def state(self) -> dict[str, dict[str, Any]]:
        """Return what `transformers.Trainer` writes into a checkpoint and constructs the callback from again."""
        own = {name: getattr(self, name) for name in ("policy", "num_updates", "is_decided", "lacking")}
        return {"args": own, "attributes": {}}

    def settle(self, *, was_skipped: bool) -> None:
        """Count the update whose gradients were looked at last.

        Args:
            was_skipped: Whether the optimizer skipped it, as it does to find the loss scale of fp16.
        """
        self.num_updates += self._is_open and not was_skipped
        self._is_open = False

    def look(self, model: nn.Module, device: torch.device, *, in_backward: bool = False) -> None:
        """Look at the gradients of an update before it is applied.

        Args:
            model: The model, wrapped or not.
            device: Where the processes exchange tensors.
            in_backward: Whether the optimizer has used and deleted the gradients already.
        """
        watched = self._begin(model, device)
        if not watched:
            return
        gradients = [(number, entry.parameter.grad) for number, entry in enumerate(watched)]
        given = [(number, _local(gradient)) for number, gradient in gradients if gradient is not None]
        if in_backward:
            self._flags[:2] = 1
        elif given:
            self._flags[0, [number for number, _ in given]] = 1
            filled = [(number, gradient) for number, gradient in given if gradient.numel()]
            if filled:
                largest = torch._foreach_norm([gradient for _, gradient in filled], torch.inf)
                reached = torch.stack([value.to(device) for value in largest]) != 0
                self._flags[1, [number for number, _ in filled]] |= reached.to(self._flags.dtype)
        self._is_open = True

    @property
    def is_due(self) -> bool:
        """Whether enough updates have been made to check the parameters that all rows reach."""
        return self.policy is not None and not self.is_decided and self.num_updates >= NUM_UPDATES

    def write_down(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Write down what has been seen until now, for a checkpoint.

        Args:
            gather: Collects a tensor from all processes.
        """
        if self._watched is not None:
            flags = self._of_all_processes(gather)
            names = [entry.name for entry in self._watched]
            self.lacking = {
                problem: [name for name, has in zip(names, row, strict=True) if not has]
                for problem, row in zip(NEEDED, flags, strict=True)
            }

    def decide(
        self, model: nn.Module, device: torch.device, gather: Callable[[torch.Tensor], torch.Tensor], *, at_end: bool
    ) -> list[Finding]:
        """Return the untrained parameters, by module.

        Args:
            model: The model, wrapped or not.
            device: Where the processes exchange tensors.
            gather: Collects a tensor from all processes.
            at_end: Whether the training is over, so that parameters which only some rows reach are checked, too.
        """
        if self.policy is None or (self._watched is None and self.lacking is None):
            return []
        watched = self._begin(model, device)
        flags = self._of_all_processes(gather)
        problems = [
            next((problem for problem, has in zip(NEEDED, column, strict=True) if not has), None)
            for column in zip(*flags, strict=True)
        ]
        checked = [
            (entry, problem)
            for entry, problem in zip(watched, problems, strict=True)
            if (not self.is_decided or entry.is_rare) and (at_end or not entry.is_rare)
        ]
        found = findings(_without_excused(checked, is_short=self.num_updates < NUM_UPDATES))
        self.is_decided = True
        # the others need no more looks
        rare = [number for number, entry in enumerate(watched) if entry.is_rare and problems[number]]
        self._keep([] if at_end else rare)
        return found

    def _begin(self, model: nn.Module, device: torch.device) -> list[Watched]:
        """Return the parameters to look at, with their weights now as those to compare with."""
        if self._watched is not None:
            return self._watched
        watched = [] if self.policy is None else list(trained_parameters(model))
        if self.is_decided:
            missing = {name for names in (self.lacking or {}).values() for name in names}
            watched = [entry for entry in watched if entry.is_rare and entry.name in missing]
        lacking = self.lacking or {problem: [entry.name for entry in watched] for problem in NEEDED}
        has = [[entry.name not in set(lacking[problem]) for entry in watched] for problem in NEEDED]
        self._flags = torch.tensor(has, dtype=torch.int32, device=device).reshape(len(NEEDED), len(watched))
        self._before = _fingerprints(watched, device)
        self._watched = watched
        return watched

    def _of_all_processes(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> list[list[bool]]:
        watched = self._watched or []
        if not watched:
            return [[] for _ in NEEDED]
        self._flags[2] |= (_fingerprints(watched, self._flags.device) != self._before).to(self._flags.dtype)
        self._flags = gather(self._flags[None]).reshape(-1, *self._flags.shape).amax(0)
        return [[bool(has) for has in row] for row in self._flags.tolist()]

    def _keep(self, numbers: list[int]) -> None:
        self._watched = [(self._watched or [])[number] for number in numbers]
        self._flags, self._before = self._flags[:, numbers], self._before[numbers]


def trained_parameters(model: nn.Module) -> Iterable[Watched]:
    """Yield the trained parameters of a model, wrapped or not."""
    layers = {
        id(parameter): WRAPPERS.sub("", f"{name}.").rstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
        for parameter in module.parameters()
    }
    base = causal_lm(model)
    outside = {id(weight) for name in outside_language_model(model) for weight in base.get_submodule(name).parameters()}
    for full_name, parameter in model.named_parameters():
        if not parameter.requires_grad or not parameter.numel():
            continue
        name = WRAPPERS.sub("", full_name)
        layer = layers.get(id(parameter))
        is_rare = id(parameter) in outside or TOKEN_ROWS in name
        yield Watched(name, parameter, layer or name.rpartition(".")[0] or name, layer is not None, is_rare)


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of a tensor in this process, and of a sparse one its values."""
    if isinstance(tensor, DTensor):
        tensor = tensor.to_local()
    return tensor._values() if tensor.is_sparse else tensor


def _fingerprints(watched: Sequence[Watched], device: torch.device) -> torch.Tensor:
    """Return for each parameter the sum of its weights read as integers, which any change of a weight changes."""
    sums = []
    with torch.no_grad():
        for entry in watched:
            weights = _local(entry.parameter.detach())
            sums.append(weights.view(INTEGERS[weights.element_size()]).sum(dtype=torch.int64).to(device))
    return torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64, device=device)


def _without_excused(checked: Sequence[tuple[Watched, str | None]], *, is_short: bool) -> Iterable[tuple[Watched, str]]:
    """Yield the untrained parameters, without experts that no row has reached yet.

    Args:
        checked: Parameters and what is wrong with each.
        is_short: Whether there were too few updates for both matrices of LoRA to get a gradient; then an adapter is
            trained if any of its weights is.
    """
    trained_experts = {EXPERT.sub("", entry.name) for entry, problem in checked if problem is None}
    trained_layers = {entry.module for entry, problem in checked if problem is None and entry.is_adapter}
    for entry, problem in checked:
        is_excused = EXPERT.search(entry.name) and EXPERT.sub("", entry.name) in trained_experts
        starts_later = is_short and entry.is_adapter and entry.module in trained_layers
        if problem is not None and not is_excused and not starts_later:
            yield entry, problem


def findings(untrained: Iterable[tuple[Watched, str]]) -> list[Finding]:
    """Return untrained parameters by module, those of all layers together."""
    modules: dict[tuple[str, str], dict[str, None]] = {}
    for entry, problem in untrained:
        modules.setdefault((NUMBER.sub("*", entry.module), problem), {})[entry.module] = None
    return [Finding(pattern, len(names), next(iter(names)), problem) for (pattern, problem), names in modules.items()]


def describe(found: Sequence[Finding]) -> str:
    """Return findings as text, such as `no gradient: model.layers.*.mlp.up_proj (30 modules)`."""
    parts = []
    for problem in dict.fromkeys(each.problem for each in found):
        named = [
            each.first if each.count == 1 else f"{each.modules} ({each.count} modules)"
            for each in found
            if each.problem == problem
        ]
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        parts.append(f"{problem} ({MEANING[problem]}): {', '.join(named[:5])}{more}")
    return "; ".join(parts)


def report(trainer: Any, found: Sequence[Finding], policy: str | None) -> None:
    """Apply the policy to untrained parameters, and write them into the trainer's log history.

    Args:
        trainer: `transformers.Trainer`.
        found: The untrained parameters, by module.
        policy: One of `sft.options.UNTRAINED_POLICIES`.

    Raises:
        ValueError: The policy is to fail.
    """
    if not found:
        return
    step = trainer.state.global_step
    text = f"after {step} updates, parameters that are to be trained have {describe(found)}"
    if policy == "fail":
        raise ValueError(
            f"{text}. Freeze what should not be trained (requires_grad, parameter_groups), name other modules for the "
            "adapter, raise learning_rate, or set on_untrained to warn"
        )
    logger.warning("%s", text)
    history = trainer.state.log_history
    is_closed = bool(history) and "train_loss" in history[-1]  # a training's last entry, which scripts read
    history.insert(len(history) - is_closed, {"step": step, UNTRAINED: [asdict(each) for each in found]})
