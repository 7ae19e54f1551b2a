"""`sft recipes`: list the recipes, or show one as a params.yaml."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ruamel.yaml import YAML

from stages.checkout.paths import Paths
from stages.params.assignments import apply_overrides, parse_assignments
from stages.recipes.catalog import read_recipe, recipe_names


def run(paths: Paths, *, recipe: str | None = None, as_json: bool = False, assignments: Sequence[str] = ()) -> None:
    """Print the names and summaries of all recipes, or the params.yaml that one makes.

    Args:
        paths: Not used; a recipe belongs to no folder.
        recipe: Name of the recipe to show; None = list all.
        as_json: Whether to print JSON.
        assignments: Values of `--set`, in the place of the recipe's.

    Raises:
        ValueError: There is no recipe of this name, or a value is given without a recipe or is not valid.
    """
    if recipe is None:
        if assignments:
            raise ValueError(f"--set {assignments[0]}: name the recipe that it changes, `sft recipes NAME --set ...`")
        found = [read_recipe(each) for each in recipe_names()]
        if as_json:
            listed: list[dict[str, Any]] = [
                {"name": one.name, "summary": one.summary, "notes": list(one.notes)} for one in found
            ]
            print(json.dumps(listed, indent=2, ensure_ascii=False))
            return
        width = max(len(one.name) for one in found)
        print("\n".join(f"{one.name:<{width}}  {one.summary}" for one in found))
        return
    one = read_recipe(recipe)
    text, values = one.text(), one.params()
    if assignments:
        text = apply_overrides(text, parse_assignments(assignments), source=f"the recipe {recipe} with --set")
        values = YAML(typ="safe", pure=True).load(text)
    print(json.dumps(values, indent=2, ensure_ascii=False) + "\n" if as_json else text, end="")
