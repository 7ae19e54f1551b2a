from __future__ import annotations

from typing import Any

import pytest

from sft.data.messages import RowError, normalize_messages, tools_text


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"loss": False}, {"train": False}),
        ({"train_on": 0}, {"train": False}),
        ({"trainable": True}, {"train": True}),
        ({"loss_scale": 0.5}, {"weight": 0.5}),
        ({"loss": None}, {}),
    ],
)
def test_flags_of_other_projects_are_read(given: dict[str, Any], expected: dict[str, Any]) -> None:
    message = {"role": "assistant", "content": "4", **given}
    assert normalize_messages([message]) == [{"role": "assistant", "content": "4", **expected}]


def test_flags_that_disagree_or_say_nothing_clear_are_errors() -> None:
    with pytest.raises(RowError, match="are names of one flag and disagree; give train alone"):
        normalize_messages([{"role": "assistant", "content": "4", "loss": False, "train": True}])
    with pytest.raises(RowError, match="loss is 'no'; write train: true or false"):
        normalize_messages([{"role": "assistant", "content": "4", "loss": "no"}])


def test_a_call_under_its_former_key_is_a_tool_call() -> None:
    call = {"name": "weather", "arguments": '{"city": "Lima", "unit": null}'}
    message = {"role": "assistant", "content": "Let me look.", "function_call": call}
    expected = [{"type": "function", "function": call}]
    assert normalize_messages([message], prune_nulls=True) == [
        {"role": "assistant", "content": "Let me look.", "tool_calls": expected}
    ]


def test_nulls_inside_a_text_are_those_of_the_user() -> None:
    tools = '[{"name": "f", "parameters": {"type": "object", "properties": {"x": {"default": null}}}}]'
    assert '"default": null' in tools_text(tools, prune_nulls=True)
