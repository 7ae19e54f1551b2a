"""The JSON Schema of params.yaml, by which an editor completes and checks it."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from stages.params.schema import Params, ParamsError


def schema_text(proposed: Mapping[str, Any] | None = None) -> str:
    """Return the schema as the text of a file.

    Args:
        proposed: Dotted key -> value that an editor proposes for it (`default`).

    Raises:
        ParamsError: A key lies in a list, whose entries have no names.
    """
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Params.model_json_schema()}
    for name, value in (proposed or {}).items():
        _at(schema, name)["default"] = value
    return json.dumps({**schema, "title": "params.yaml"}, indent=2, ensure_ascii=False, default=str) + "\n"


def _at(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the schema of a key; definitions on the way are copied, as other keys may use them, too."""
    found = schema
    for part in name.split("."):
        properties = found.get("properties", {})
        if part not in properties:
            raise ParamsError(f"--set {name}: the schema has no place for the value of an entry of a list or a mapping")
        references = [properties[part], *properties[part].get("anyOf", ())]
        reference = next((each["$ref"] for each in references if "$ref" in each), None)
        if reference is not None:
            copied = copy.deepcopy(schema["$defs"][reference.rpartition("/")[2]])
            if "$ref" in properties[part]:
                properties[part] = copied
            else:
                properties[part]["anyOf"][references.index({"$ref": reference}) - 1] = copied
            found = copied
        else:
            found = properties[part]
    return found
