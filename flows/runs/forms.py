"""Typed overrides of params.yaml, for the form on Prefect's page and for `--set`.

The models are derived from those of params.yaml, so that a key, its type, its limits and its description are defined
once. Prefect converts them to a JSON schema and rejects an invalid value or an unknown key before a run is created.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    GetJsonSchemaHandler,
    SerializerFunctionWrapHandler,
    ValidationError,
    create_model,
    model_serializer,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.runs.graph import Plan, RunRefused
from stages.params.assignments import parse_assignments as parse_text_assignments
from stages.params.schema import Params, ParamsError, Section, describe_problem


class _StageChoice:
    """JSON schema of a stage's name: a choice among the stages of dvc.yaml in the working directory."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        # the form sends null for an empty choice
        return {"enum": [*stage_names(Path.cwd()), None]}


StageName = Annotated[str | None, _StageChoice()]


def stage_names(root: Path) -> list[str]:
    """Return the names of the stages in dvc.yaml; none if it can't be read."""
    found = read_mapping(root / "dvc.yaml").get("stages", {})
    return [name for name, stage in found.items() if not stage.get("always_changed")]


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file; empty if it can't be read, which the run itself will report."""
    try:
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (OSError, YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


class Partial(BaseModel):
    """Base of the derived models: values that were not set are left out when a run is stored and shown."""

    model_config = Section.model_config

    @model_serializer(mode="wrap")
    def _only_set(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        values = {name: value for name, value in handler(self).items() if name in self.model_fields_set}
        # a section without values is left out, too
        return {name: value for name, value in values.items() if value or not isinstance(getattr(self, name), Partial)}


class Sections(Partial):
    """Base of the model of all sections: one that is not chosen in the form, which sends null for it, is left out."""

    @model_validator(mode="before")
    @classmethod
    def _without_unchosen(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: value for name, value in values.items() if value is not None}


def partial_model(
    model: type[BaseModel], current: dict[str, Any] | None, suffix: str = "Overrides", keep_required: bool = False
) -> type[Partial]:
    """Derive a model in which every field is optional, including those of nested sections.

    A field that is not set is not overridden; null overrides if the type allows it. Limits of single fields are
    checked by the derived model, limits between fields after the overrides were applied to params.yaml.

    Args:
        model: The model of params.yaml or of one of its sections.
        current: Its values in params.yaml, which the form shows next to the descriptions; None if it has none.
        suffix: Suffix of the derived models' names.
        keep_required: Required fields remain required, as in an entry of a list, which replaces no other values.
    """
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        required = keep_required and field.is_required()
        fields[name] = (field.annotation, field) if required else _optional(name, field, current, suffix)
    name = model.__name__.removesuffix("Section") + suffix
    return create_model(name, __base__=Partial, __doc__=model.__doc__, __module__=__name__, **fields)


def all_sections(current: dict[str, Any]) -> type[Sections]:
    """Derive the model of all sections of params.yaml. The form shows the values of a section once it is chosen.

    Args:
        current: The values in params.yaml.
    """
    fields: dict[str, Any] = {}
    for name, field in Params.model_fields.items():
        annotation, changed = _optional(name, field, current, "Overrides")
        changed.json_schema_extra = _shape_for_choice
        fields[name] = (annotation, changed)
    return create_model("Overrides", __base__=Sections, __doc__=Params.__doc__, __module__=__name__, **fields)


def _shape_for_choice(schema: dict[str, Any]) -> None:
    """Let the form ask for a section first; it would send an empty object for a section that is always shown."""
    schema.pop("default", None)
    chosen = schema.pop("allOf", None) or [{"$ref": schema.pop("$ref")}]
    schema["anyOf"] = [{"type": "null"}, *chosen]


def _optional(name: str, field: FieldInfo, section: dict[str, Any] | None, suffix: str) -> tuple[Any, FieldInfo]:
    current = None if section is None else section.get(name)
    annotation = _partial_members(field.annotation, current, suffix)
    changed = copy.copy(field)
    changed.title = name
    changed.annotation = annotation
    if _is_model(annotation):
        changed.description = field.description or annotation.__doc__
        changed.default_factory = annotation
    else:
        changed.default, changed.default_factory = None, None
        if section is not None:
            changed.description = f"{field.description} (params.yaml when deployed: `{json.dumps(current)}`)"
    changed.json_schema_extra = _shape_for_form
    return annotation, changed


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _partial_members(annotation: Any, current: Any, suffix: str) -> Any:
    """Return a type with its models made partial, because the form sends an empty object for an empty section."""
    if _is_model(annotation):
        return partial_model(annotation, current if isinstance(current, dict) else {}, suffix)
    members = get_args(annotation)
    if isinstance(annotation, UnionType) and any(map(_is_model, members)):
        return Union[tuple(_partial_members(member, current, suffix) for member in members)]  # noqa: UP007
    if get_origin(annotation) is list and _is_model(members[0]):
        return list[partial_model(members[0], None, f"Entry{suffix}", keep_required=True)]  # type: ignore[misc]
    return annotation


def _shape_for_form(schema: dict[str, Any]) -> None:
    """Let the form send nothing for an empty field; it would send defaults, and `false` for a boolean."""
    schema.pop("default", None)
    kinds = [schema.get("type"), *(member.get("type") for member in schema.get("anyOf", []))]
    if "boolean" in kinds:
        for keyword in ("type", "anyOf"):
            schema.pop(keyword, None)
        schema["enum"] = [True, False, None] if "null" in kinds else [True, False]


if TYPE_CHECKING:
    Overrides = Partial
else:
    Overrides = all_sections(read_mapping(Path.cwd() / "params.yaml"))


class _NoneFirst:
    """JSON schema of a choice that is empty at first."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        shown = handler(schema)
        return {**shown, "anyOf": sorted(shown["anyOf"], key=lambda member: member.get("type") != "null")}


Chosen = Annotated[Overrides | None, _NoneFirst()]


def overridden(overrides: Partial) -> dict[str, Any]:
    """Return only the values that were set, as nested plain values; sections without any are left out."""
    # fields that were not set are None whatever their type; the serializer would warn about them before it drops them
    return overrides.model_dump(mode="json", exclude_unset=True, warnings=False)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def parse_assignments(assignments: list[str]) -> Partial:
    """Parse overrides from `section.key=value` texts, with each value parsed as YAML.

    Raises:
        RunRefused: A text has no `=`, an unknown key, or a value that is not valid; all problems are listed.
    """
    try:
        values = parse_text_assignments(assignments)
    except ParamsError as error:
        raise RunRefused(str(error)) from None
    return typed_overrides(values)


def typed_overrides(values: dict[str, Any]) -> Partial:
    """Validate overrides that are given as nested plain values.

    Raises:
        RunRefused: A key is unknown or a value is not valid; all problems are listed.
    """
    try:
        return Overrides.model_validate(values)
    except ValidationError as error:
        problems = [describe_problem(detail, Overrides) for detail in error.errors()]
        raise RunRefused("overrides: " + "; ".join(problems)) from None


def with_values(overrides: Partial, flat: dict[str, Any]) -> Partial:
    """Return overrides with additional values, given by their dotted names.

    Raises:
        RunRefused: See `typed_overrides`.
    """
    values = overridden(overrides)
    for name, value in flat.items():
        target = values
        *parents, last = name.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
    return typed_overrides(values)


def refuse_overrides_without_effect(values: dict[str, Any], plan: Plan) -> None:
    """Check that some stage of the run reads every override.

    Raises:
        RunRefused: An override has no effect; the message names it and the stages of the run.
    """
    read = {key for stage in plan.stages for key in stage.params}
    idle = [name for name in flatten(values) if not any(_touches(name, key) for key in read)]
    if idle:
        raise RunRefused(f"{', '.join(idle)}: no stage of this run reads it; the run is {', '.join(plan.names)}")


def _touches(name: str, key: str) -> bool:
    return name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.")
