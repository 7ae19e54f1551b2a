"""`sft schema`: print the JSON Schema of params.yaml, by which an editor completes and checks it."""

from __future__ import annotations

from stages.checkout.paths import Paths
from stages.params.json_schema import schema_text


def run(paths: Paths) -> None:
    """Print the schema; a params.yaml is not needed."""
    print(schema_text(), end="")
