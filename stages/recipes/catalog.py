"""The recipes that come with the package: their names, what they say of themselves, and the params.yaml that they make.

A recipe is a YAML file with a few keys of params.yaml. Its first comment lines say what it is for, where its
hyperparameters come from, on which hardware it runs, and what `sft estimate --offline` expects.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from sft.suggest import did_you_mean
from stages.params.text import neutral_values, overlay, params_text

FOLDER = Path(__file__).with_name("files")


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Args:
        name: Name for `sft init --recipe`.
        summary: Its first comment line.
        notes: Its other comment lines.
        values: The keys of params.yaml that it sets.
    """

    name: str
    summary: str
    notes: tuple[str, ...]
    values: dict[str, Any]

    def params(self) -> dict[str, Any]:
        """Return all values of params.yaml with those of the recipe."""
        return overlay(neutral_values(), self.values)

    def text(self) -> str:
        """Return a params.yaml with the recipe's comments at its head."""
        last = "Change a value and type `sft repro`: only the stages that depend on it run again."
        head = [self.summary, *self.notes, last]
        return params_text(self.params(), head="\n".join(f"# {line}" for line in head) + "\n")


def recipe_names() -> list[str]:
    """Return the names of all recipes."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def read_recipe(name: str) -> Recipe:
    """Read a recipe.

    Raises:
        ValueError: There is none of this name; the message has the nearest one.
    """
    names = recipe_names()
    if name not in names:
        hint = did_you_mean(name, names, otherwise=f"there are {', '.join(names)}")
        raise ValueError(f"there is no recipe {name!r}; {hint}")
    text = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")
    comments = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    values: dict[str, Any] = YAML(typ="safe", pure=True).load(text)
    return Recipe(name, comments[0], tuple(comments[1:]), values)
