"""`sft recipes`: list the recipes, or show one as a params.yaml."""

from __future__ import annotations

import json
from typing import Any

from stages.checkout.paths import Paths
from stages.recipes.catalog import read_recipe, recipe_names


def run(paths: Paths, *, recipe: str | None = None, as_json: bool = False) -> None:
    """Print the names and summaries of all recipes, or the params.yaml that one makes.

    Args:
        paths: Not used; a recipe belongs to no folder.
        recipe: Name of the recipe to show; None = list all.
        as_json: Whether to print JSON.

    Raises:
        ValueError: There is no recipe of this name.
    """
    if recipe is None:
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
    print(json.dumps(one.params(), indent=2, ensure_ascii=False) + "\n" if as_json else one.text(), end="")
