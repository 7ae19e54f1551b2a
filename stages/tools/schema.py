"""`sft schema`: print the JSON Schema of params.yaml, by which an editor completes and checks it."""

from __future__ import annotations

import json

from stages.checkout.paths import Paths
from stages.params.schema import Params


def run(params: Params, paths: Paths) -> None:
    """Print the schema."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Params.model_json_schema()}
    print(json.dumps({**schema, "title": "params.yaml"}, indent=2, ensure_ascii=False))
