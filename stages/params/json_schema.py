"""The JSON Schema of params.yaml, by which an editor completes and checks it."""

from __future__ import annotations

import json

from stages.params.schema import Params


def schema_text() -> str:
    """Return the schema as the text of a file."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Params.model_json_schema()}
    return json.dumps({**schema, "title": "params.yaml"}, indent=2, ensure_ascii=False) + "\n"
