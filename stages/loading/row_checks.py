"""What `load` looks for in single rows, and what it does with a row that has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sft.data.messages import Problem, RowError
from sft.data.quality import FINDERS, REPAIRS
from sft.data.tool_schemas import tool_call, tool_schema
from stages.checkout.ledger import Action
from stages.params.load_params import ChecksSection

ROW_CHECKS = {**FINDERS, "tool_schema": tool_schema, "tool_call": tool_call}


class Note(NamedTuple):
    """Something that was found in a row, and what is done about it."""

    action: Action
    problem: Problem


class RowChecks:
    """Looks at rows one by one, as the section says.

    Args:
        section: The section `load.checks` of params.yaml.
    """

    def __init__(self, section: ChecksSection) -> None:
        actions = {name: getattr(section, name) for name in ROW_CHECKS}
        self._actions = {name: Action(action) for name, action in actions.items() if action != "off"}

    def inspect(self, record: Mapping[str, Any]) -> tuple[dict[str, Any], list[Note]]:
        """Look at a row.

        Returns:
            The record, repaired where that was asked for, and what was found in it.

        Raises:
            RowError: Something was found for which rows are dropped, or that could not be repaired.
        """
        record, notes = dict(record), []
        for name, action in self._actions.items():
            problem = ROW_CHECKS[name](record)
            if problem is None:
                continue
            if action is Action.REPAIR:
                record = REPAIRS[name](record)
                if ROW_CHECKS[name](record) is not None:
                    raise RowError(name, f"can't be repaired: {problem.detail}")
            if action is Action.DROP:
                raise RowError(name, problem.detail)
            notes.append(Note(action, problem))
        return record, notes
