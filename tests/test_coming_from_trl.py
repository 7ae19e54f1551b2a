"""The page for users of trl names what exists, and everything that exists under trl's names."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

import sft
from sft import ModelConfig, SFTConfig

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "coming-from-trl.md").read_text(encoding="utf-8")


def section(title: str) -> list[list[str]]:
    """The rows of the table in a section, as cells; the bars inside of cells are escaped."""
    text = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (body,) = [part for part in text if part.startswith(f"{title}\n")]
    rows = [line for line in body.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]


def test_names_of_the_table_are_public() -> None:
    rows = section("Names")
    assert len(rows) >= 30
    assert [row for row in rows if row[0] != row[1] or row[1].strip("`") not in sft.__all__] == []


@pytest.mark.parametrize("room", ["sft/scripts", "sft/batches/language_modeling_collator.py"])
def test_names_that_exist_for_scripts_of_trl_are_in_the_table(room: str) -> None:
    home = room.removeprefix("sft/").removesuffix(".py").replace("/", ".")
    names = {name for name, module in sft._HOMES.items() if module.startswith(home)}
    helpers = {"conversations_formatting_function", "instructions_formatting_function"}
    assert names
    assert names - {row[1].strip("`") for row in section("Names")} <= helpers


def test_defaults_are_those_of_the_options() -> None:
    defaults = {field.name: field.default for kind in (ModelConfig, SFTConfig) for field in fields(kind)}
    assert (defaults["gradient_checkpointing"], defaults["bf16"], defaults["padding_free"]) == (None, False, None)
    assert (defaults["pad_to_multiple_of"], defaults["max_length"], defaults["dtype"]) == (None, 1024, None)
    assert [row[0] for row in section("Defaults") if row[0].split("`")[1] not in defaults] == []


def test_names_that_are_not_here_are_no_names() -> None:
    words = {word for row in section("What is not here") for word in re.findall(r"`([A-Za-z_]+)`", row[0])}
    assert {"extract_prompt", "BEMACallback"} <= words
    assert words & set(sft.__all__) == set()


def test_every_difference_has_two_sides() -> None:
    rows = section("Where we differ on purpose")
    assert {"packing", "NEFTune", "evaluation", "`setup_chat_format`: padding token"} <= {row[0] for row in rows}
    assert [row[0] for row in rows if len(row) != 4 or not row[1] or not row[2]] == []
