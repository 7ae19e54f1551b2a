"""training_options.json and docs/training_options.md say for every option of `SFTConfig` what becomes of it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from sft.config import SFTConfig
from stages.params import adapters
from stages.params.arguments import TABLE, training_options
from stages.training.option_table import PAGE, as_json, current_adapter_types, current_table, page, problems

REPO = Path(__file__).resolve().parents[3]
ADVICE = "run `python -m stages.training.option_table`"


def test_the_table_has_every_option_as_the_dataclass_has_it() -> None:
    table = current_table()
    assert [*table] == [field.name for field in fields(SFTConfig) if field.init]
    assert TABLE.read_text(encoding="utf-8") == as_json(table), ADVICE
    assert problems(table) == []


def test_the_table_of_adapters_has_every_type_and_option_of_peft() -> None:
    assert adapters.TABLE.read_text(encoding="utf-8") == as_json(current_adapter_types()), ADVICE
    assert set(adapters.REFUSED_TYPES) <= set(current_adapter_types())


def test_the_page_has_a_line_for_every_option() -> None:
    text = (REPO / PAGE).read_text(encoding="utf-8")
    assert text == page(training_options()), ADVICE
    assert all(f"\n| `{name}` | " in text for name in current_table())
