"""Whether tools are JSON Schema, and calls fit them (https://json-schema.org/draft/2020-12)."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from sft.data.messages import Problem


def tool_schema(record: Mapping[str, Any]) -> Problem | None:
    """Find a tool whose parameters are no JSON Schema, or two tools of one name."""
    return _tools(record["tools"])[1] if record.get("tools") else None


def tool_call(record: Mapping[str, Any]) -> Problem | None:
    """Find a call of a tool that is not offered, or with arguments that its schema forbids; rows without tools pass."""
    if not record.get("tools"):
        return None
    validators, problem = _tools(record["tools"])
    if problem is not None:
        return None
    for place, name, arguments in _calls(record):
        if name not in validators:
            return Problem("tool_call", f"{place} calls {name!r:.80}, offered are {sorted(validators)}"[:300])
        detail = _misfit(validators[name], arguments)
        if detail:
            return Problem("tool_call", f"{place} calls {name!r:.80}: {detail}"[:300])
    return None


def _calls(record: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    messages = record["messages"] if "messages" in record else [*record["prompt"], *record["completion"]]
    for index, message in enumerate(messages):
        for call in message.get("tool_calls") or ():
            yield f"message {index}", call["function"]["name"], call["function"]["arguments"]


@functools.lru_cache(maxsize=1024)
def _tools(text: str) -> tuple[dict[str, Any], Problem | None]:
    """Validator of each tool by its name, and what is wrong with one; many rows share the same tools."""
    from jsonschema import Draft202012Validator, SchemaError
    from referencing import Registry

    validators: dict[str, Any] = {}
    for tool in json.loads(text):
        name, schema = tool["function"]["name"], tool["function"].get("parameters") or {}
        if name in validators:
            return {}, Problem("tool_schema", f"two tools are named {name!r:.80}")
        try:
            Draft202012Validator.check_schema(schema)
        except RecursionError:
            return {}, Problem("tool_schema", f"parameters of {name!r:.80} lie too deep in one another")
        except SchemaError as error:
            place = "".join(f".{part}" for part in error.absolute_path)
            return {}, Problem("tool_schema", f"parameters{place} of {name!r:.80}: {error.message}"[:300])
        # an empty registry: a reference in a row must never make this machine fetch an address
        validators[name] = Draft202012Validator(schema, registry=Registry())
    return validators, None


def _misfit(validator: Any, arguments: str) -> str | None:
    from jsonschema.exceptions import best_match
    from referencing.exceptions import Unresolvable

    try:
        error = best_match(validator.iter_errors(json.loads(arguments)))
    except json.JSONDecodeError as problem:
        return f"the arguments are no JSON ({problem})"
    except Unresolvable as problem:
        return f"its schema refers to what is not in it ({problem})"
    except RecursionError:
        return "its schema refers to itself without end"
    except re.error as problem:
        return f"a pattern of its schema is no regular expression ({problem})"
    return None if error is None else f"arguments{''.join(f'.{part}' for part in error.absolute_path)}: {error.message}"
