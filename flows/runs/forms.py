"""What a run can be asked for, typed: the form on Prefect's page and `--set` read the same models.

The models are made from those of params.yaml, so that a key, its type, its limits and its description are stated
once. Prefect turns them into a JSON schema and refuses a wrong value or an unknown key before there is a run.
"""

from __future__ import annotations

import copy
import io
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
)
from pydantic.fields import FieldInfo
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from flows.runs.graph import Plan, RunRefused
from stages.params.schema import Params, Section, check_params, describe_problem


class _StageChoice:
    """Shows a stage's name as a choice among those of dvc.yaml in the working directory."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        # The form sends null for an empty choice.
        return {"enum": [*stage_names(Path.cwd()), None]}


StageName = Annotated[str | None, _StageChoice()]


def stage_names(root: Path) -> list[str]:
    """The stages that dvc.yaml states, in its order; none where there is no readable dvc.yaml."""
    return list(read_mapping(root / "dvc.yaml").get("stages", {}))


def read_mapping(path: Path) -> dict[str, Any]:
    """A YAML file's mapping; empty when there is none to read, which the run itself will complain of."""
    try:
        content = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    except (OSError, YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


class Partial(BaseModel):
    """Base of the derived models: what was not stated is not there, also when a run is stored and shown."""

    model_config = Section.model_config

    @model_serializer(mode="wrap")
    def _only_stated(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        stated = {name: value for name, value in handler(self).items() if name in self.model_fields_set}
        # a section in which nothing is filled in is nothing either
        return {name: value for name, value in stated.items() if value or not isinstance(getattr(self, name), Partial)}


def partial_model(
    model: type[BaseModel], stated: dict[str, Any] | None, suffix: str = "Overrides", whole: bool = False
) -> type[Partial]:
    """The same model with every field optional, nested sections included.

    A field that is left out is not overridden; null overrides where the type allows it. The fields' own limits
    still hold, those between fields are checked once params.yaml and the overrides are one.

    Args:
        model: A section of params.yaml, or the whole.
        stated: The values it has there, which the form shows beside the descriptions; None where it has none.
        suffix: What the names of the derived models end in.
        whole: What the model itself requires is required, as in an entry of a list, which replaces nothing.
    """
    fields: dict[str, Any] = {
        name: (field.annotation, field) if whole and field.is_required() else _optional(name, field, stated, suffix)
        for name, field in model.model_fields.items()
    }
    name = model.__name__.removesuffix("Section") + suffix
    return create_model(name, __base__=Partial, __doc__=model.__doc__, __module__=__name__, **fields)


def _optional(name: str, field: FieldInfo, section: dict[str, Any] | None, suffix: str) -> tuple[Any, FieldInfo]:
    stated = None if section is None else section.get(name)
    annotation = _partial_members(field.annotation, stated, suffix)
    changed = copy.copy(field)
    changed.title = name
    changed.annotation = annotation
    if _is_model(annotation):
        changed.description = field.description or annotation.__doc__
        changed.default_factory = annotation
    else:
        changed.default, changed.default_factory = None, None
        if section is not None:
            changed.description = f"{field.description} (params.yaml when deployed: `{json.dumps(stated)}`)"
    changed.json_schema_extra = _shape_for_form
    return annotation, changed


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _partial_members(annotation: Any, stated: Any, suffix: str) -> Any:
    """A type with its models made partial: the form sends an empty one for what nobody has filled in."""
    if _is_model(annotation):
        return partial_model(annotation, stated if isinstance(stated, dict) else {}, suffix)
    members = get_args(annotation)
    if isinstance(annotation, UnionType) and any(map(_is_model, members)):
        return Union[tuple(_partial_members(member, stated, suffix) for member in members)]  # noqa: UP007
    if get_origin(annotation) is list and _is_model(members[0]):
        return list[partial_model(members[0], None, f"Entry{suffix}", whole=True)]  # type: ignore[misc]
    return annotation


def _shape_for_form(schema: dict[str, Any]) -> None:
    """Let the form send nothing for what nobody has filled in; it sends defaults, and `false` for a switch."""
    schema.pop("default", None)
    if schema.get("type") == "boolean":
        del schema["type"]
        schema["enum"] = [True, False]


if TYPE_CHECKING:
    Overrides = Partial
else:
    Overrides = partial_model(Params, read_mapping(Path.cwd() / "params.yaml"))


def overridden(overrides: Partial) -> dict[str, Any]:
    """Only what was stated, as nested plain values; sections without anything are left out."""
    # A field that was left out holds None whatever its type, which the serializer drops but would warn of first.
    return overrides.model_dump(mode="json", exclude_unset=True, warnings=False)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values by their dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def parse_assignments(assignments: list[str]) -> Partial:
    """Overrides from `section.key=value` texts, each value read as YAML.

    Raises:
        RunRefused: A text has no `=`, names an unknown key, or holds a value of the wrong kind; all are listed.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator or not name:
            raise RunRefused(f"--set {assignment}: expected section.key=value")
        target = values
        *parents, last = name.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
            if not isinstance(target, dict):
                raise RunRefused(f"--set {assignment}: {parent} was already set to a value")
        try:
            target[last] = YAML(typ="safe").load(text)
        except YAMLError:
            raise RunRefused(f"--set {assignment}: {text!r} is not a YAML value") from None
    return typed_overrides(values)


def typed_overrides(values: dict[str, Any]) -> Partial:
    """Overrides from nested plain values.

    Raises:
        RunRefused: A key is unknown or a value of the wrong kind; all are listed.
    """
    try:
        return Overrides.model_validate(values)
    except ValidationError as error:
        problems = [describe_problem(detail, Overrides) for detail in error.errors()]
        raise RunRefused("overrides: " + "; ".join(problems)) from None


def with_values(overrides: Partial, flat: dict[str, Any]) -> Partial:
    """Overrides with some more values, given by their dotted names; raises what `typed_overrides` raises."""
    values = overridden(overrides)
    for name, value in flat.items():
        target = values
        *parents, last = name.split(".")
        for parent in parents:
            target = target.setdefault(parent, {})
        target[last] = value
    return typed_overrides(values)


def apply_overrides(params_text: str, values: dict[str, Any]) -> str:
    """params.yaml with some values replaced, its comments and order kept, and checked as a whole.

    Raises:
        stages.params.schema.ParamsError: The values don't go together.
    """
    yaml = _round_trip()
    document = yaml.load(params_text)
    _merge(document, values)
    text = io.StringIO()
    yaml.dump(document, text)
    check_params(YAML(typ="safe", pure=True).load(text.getvalue()), source="params.yaml with overrides")
    return text.getvalue()


def _round_trip() -> YAML:
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096
    yaml.indent(mapping=2, sequence=4, offset=2)
    yaml.representer.add_representer(type(None), _represent_null)
    return yaml


def _represent_null(representer: Any, value: None) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _merge(document: Any, values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(document.get(key), dict):
            _merge(document[key], value)
        else:
            document[key] = value


def refuse_overrides_without_effect(values: dict[str, Any], plan: Plan) -> None:
    """An override that no stage of the run reads is a mistake, not something to ignore.

    Raises:
        RunRefused: Names those overrides and who would read them.
    """
    read = {key for stage in plan.stages for key in stage.params}
    idle = [name for name in flatten(values) if not any(_touches(name, key) for key in read)]
    if idle:
        raise RunRefused(f"{', '.join(idle)}: no stage of this run reads it; the run is {', '.join(plan.names)}")


def _touches(name: str, key: str) -> bool:
    return name == key or name.startswith(f"{key}.") or key.startswith(f"{name}.")
