"""The text of a params.yaml that is made of values."""

from __future__ import annotations

from itertools import dropwhile
from pathlib import Path

from ruamel.yaml import YAML

from stages.params.schema import check_params
from stages.params.text import neutral_values, params_text

SHIPPED = Path(__file__).resolve().parents[3] / "params.yaml"


def lines_and_comments(text: str) -> list[str]:
    """The words of a file without the places where its lines are broken, and without its head."""
    lines = dropwhile(lambda line: line.startswith("#"), text.splitlines())
    words = " ".join(line.strip().lstrip("#") for line in lines).split()
    return [word.strip('"') for word in words]


def test_text_has_the_values_and_the_comments_of_the_shipped_file() -> None:
    shipped = SHIPPED.read_text(encoding="utf-8")
    values = YAML(typ="safe", pure=True).load(shipped)
    text = params_text(values)
    assert YAML(typ="safe", pure=True).load(text) == values
    comments = [word for word in lines_and_comments(text) if word.isalpha()]
    assert comments == [word for word in lines_and_comments(shipped) if word.isalpha()]


def test_neutral_values_are_valid_in_both_versions_of_yaml() -> None:
    values = neutral_values()
    check_params(values)
    old = YAML(typ="safe", pure=True)
    old.version = (1, 1)  # type: ignore[assignment]
    assert old.load("%YAML 1.1\n---\n" + params_text(values)) == values
