"""The short form of a run: the values that are changed most often, filled in with those of params.yaml.

A value that is sent as the form showed it is not an override: the run then works with params.yaml as it is by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import runtime
from prefect.client.orchestration import get_client
from pydantic import Field, create_model

from flows.runs.forms import Overrides, Partial, flatten, overridden, read_mapping, with_values
from flows.runs.graph import RunRefused
from stages.params.schema import Params

SOURCES = "load.sources"

PLACES = {
    "model": "model.name_or_path",
    "data": SOURCES,
    "learning_rate": "train.learning_rate",
    "epochs": "train.num_train_epochs",
    "length": "pack.max_length",
    "gate": "evaluate.gate",
}
"""Field of the short form -> its place in params.yaml."""


def basics_model(current: Mapping[str, Any]) -> type[Partial]:
    """Derive the model of the short form, with the present values as defaults.

    `data` is the path of the only source; it is left out if params.yaml has several.

    Args:
        current: The values in params.yaml.
    """
    fields: dict[str, Any] = {}
    for name, place in PLACES.items():
        section, key = place.split(".")
        field = Params.model_fields[section].annotation.model_fields[key]  # type: ignore[union-attr]
        value = current.get(section, {}).get(key)
        annotation, description = field.annotation, f"{field.description} `{place}`"
        if place == SOURCES:
            if not isinstance(value, list) or len(value) != 1:
                continue
            annotation, value = str, value[0].get("path")
            description = "File, folder or pattern with the training rows. `load.sources[0].path`"
        limits: Any = Field(default=None, title=name, description=description, json_schema_extra={"default": value})
        fields[name] = (annotation, limits.merge_field_infos(field, limits) if place != SOURCES else limits)
    return create_model("Basics", __base__=Partial, __doc__="The values that are changed most often.", **fields)


if TYPE_CHECKING:
    Basics = Partial
else:
    Basics = basics_model(read_mapping(Path.cwd() / "params.yaml"))


def form_defaults() -> dict[str, Any]:
    """Return the values with which the form of this run's deployment was filled in; empty without a deployment."""
    if runtime.deployment.id is None:
        return {}
    with get_client(sync_client=True) as client:
        schema = client.read_deployment(runtime.deployment.id).parameter_openapi_schema or {}
    properties = schema.get("definitions", {}).get("Basics", {}).get("properties", {})
    return {name: shown.get("default") for name, shown in properties.items()}


def read_forms(overrides: Partial | Mapping[str, Any] | None, basics: Partial | Mapping[str, Any] | None) -> Partial:
    """Return the overrides of this flow run: those of the advanced form, and what was changed in the short one.

    Raises:
        RunRefused: See `with_basics`.
    """
    overrides = overrides if isinstance(overrides, Partial) else Overrides.model_validate(overrides or {})
    basics = basics if isinstance(basics, Partial) else Basics.model_validate(basics or {})
    if not overridden(basics):
        return overrides
    return with_basics(overrides, basics, form_defaults(), read_mapping(Path.cwd() / "params.yaml"))


def with_basics(overrides: Partial, basics: Partial, shown: Mapping[str, Any], current: Mapping[str, Any]) -> Partial:
    """Return overrides with the values of the short form that were changed.

    Args:
        overrides: Overrides by their place in params.yaml.
        basics: The short form as it was sent.
        shown: The values with which it was filled in.
        current: The values in params.yaml.

    Raises:
        RunRefused: A value is given in both forms, or `data` is given and params.yaml has several sources by now.
    """
    sent = overridden(basics)
    changed = {name: value for name, value in sent.items() if value is not None and value != shown.get(name)}
    values = {PLACES[name]: value for name, value in changed.items()}
    twice = [f"{name} and {place}" for name, place in PLACES.items() if name in changed and _has(overrides, place)]
    if twice:
        raise RunRefused(f"{', '.join(twice)}: the same value is given twice; leave one of them as it was")
    if "data" in changed:
        sources = current.get("load", {}).get("sources", [])
        if len(sources) != 1:
            raise RunRefused(f"data: params.yaml has {len(sources)} sources; set {SOURCES} among the overrides instead")
        values[SOURCES] = [{**sources[0], "path": changed["data"]}]
    return with_values(overrides, values) if values else overrides


def _has(overrides: Partial, place: str) -> bool:
    return any(name == place or name.startswith(f"{place}.") for name in flatten(overridden(overrides)))
