"""`sft schema`: print the JSON Schema of params.yaml, by which an editor completes and checks it."""

from __future__ import annotations

from collections.abc import Sequence

from stages.checkout.paths import Paths
from stages.params.assignments import assigned, load_with_assignments, parse_assignments
from stages.params.json_schema import schema_text


def run(paths: Paths, *, assignments: Sequence[str] = ()) -> None:
    """Print the schema; a params.yaml is not needed, unless values are given, which are checked within it.

    Args:
        paths: Paths of the checkout.
        assignments: Values of `--set`, which the schema proposes for their keys.

    Raises:
        ParamsError: A value does not fit into params.yaml.
    """
    if assignments:
        load_with_assignments(paths.params, assignments)
    print(schema_text(assigned(parse_assignments(assignments))), end="")
