from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest
from ruamel.yaml import YAML

from flows.runs.forms import (
    Overrides,
    flatten,
    overridden,
    parse_assignments,
    refuse_overrides_without_effect,
)
from flows.runs.graph import RunRefused, read_plan
from stages.params.assignments import apply_overrides
from stages.params.schema import Params, ParamsError
from tests.flows.conftest import known_params


def parameter_schema() -> dict[str, Any]:
    from flows.pipeline import pipeline

    return pipeline.parameters.model_dump_for_openapi()


def test_every_key_of_params_yaml_is_in_the_form_with_title_and_description() -> None:
    schema = Overrides.model_json_schema()

    for section, field in Params.model_fields.items():
        assert section in schema["properties"]
        form = schema["$defs"][f"{field.annotation.__name__.removesuffix('Section')}Overrides"]
        assert list(form["properties"]) == list(field.annotation.model_fields)
        assert "required" not in form
        for shown in form["properties"].values():
            assert shown.get("description")
            assert "default" not in shown


@pytest.mark.parametrize(
    "overrides",
    [
        {"train": {"learning_rate": 1e-4}},
        {"train": {"learning_rate": 1e-4}, "quantize": {"bits": 8}, "model": {"revision": None}},
        {},
    ],
)
def test_schema_takes_what_params_yaml_takes(overrides: dict[str, Any]) -> None:
    jsonschema.validate({"overrides": overrides}, parameter_schema())


@pytest.mark.parametrize(
    "parameters",
    [
        {"overrides": {"train": {"learning_rate": "fast"}}},
        {"overrides": {"train": {"learning_rate": 2.0}}},
        {"overrides": {"train": {"lora_r": 0}}},
        {"overrides": {"train": {"seed": None}}},
        {"overrides": {"quantize": {"bits": 5}}},
        {"overrides": {"train": {"learning_rat": 0.1}}},
        {"overrides": {"trian": {}}},
        {"overrides": {"load": {"eval": {"fractoin": 0.1}}}},
        {"force": "yes please"},
    ],
)
def test_schema_refuses_a_wrong_value_or_an_unknown_key(parameters: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(parameters, parameter_schema())


def test_only_what_was_stated_is_an_override() -> None:
    overrides = Overrides.model_validate({"train": {"lora_r": 8}, "model": {"revision": None}, "pack": {}})

    assert overridden(overrides) == {"train": {"lora_r": 8}, "model": {"revision": None}}
    assert overridden(Overrides()) == {}


def test_form_can_be_sent_whatever_is_left_empty_in_it() -> None:
    # the page sends objects for sections without input, with the defaults of their schema
    definitions = parameter_schema()["definitions"]
    derived = {name: shown for name, shown in definitions.items() if name.endswith("Overrides")}
    assert {"TemplateOverrides", "SourceEntryOverrides", "TrainOverrides"} <= derived.keys()
    assert [name for name, shown in derived.items() if "default" in str(shown)] == []
    sent = {"load": {"eval": {"template": {}}, "checks": {}}, "train": {"launch": {}, "max_steps": 6}}
    jsonschema.validate({"overrides": sent}, parameter_schema())
    assert overridden(Overrides.model_validate(sent)) == {"train": {"max_steps": 6}}
    source = {"path": "data/a.csv", "template": {"user": "{{ a }}", "assistant": "{{ b }}"}, "columns": {}}
    sent = {"load": {"sources": [source, {"path": "data/b.csv", "template": {}}]}}
    jsonschema.validate({"overrides": sent}, parameter_schema())
    assert overridden(Overrides.model_validate(sent)) == {"load": {"sources": [source, {"path": "data/b.csv"}]}}
    with pytest.raises(jsonschema.ValidationError, match="'path' is a required property"):
        jsonschema.validate({"overrides": {"load": {"sources": [{"weight": 1.0}]}}}, parameter_schema())


def test_a_switch_that_is_not_touched_is_not_sent() -> None:
    # the page sends `false` for a boolean, also for one among several types
    train = parameter_schema()["definitions"]["TrainOverrides"]["properties"]
    assert train["padding_free"]["enum"] == [True, False, None]
    kinds = {name: [one.get("type") for one in (shown, *shown.get("anyOf", []))] for name, shown in train.items()}
    assert [name for name, found in kinds.items() if "boolean" in found] == []
    for value in (True, False, None):
        jsonschema.validate({"overrides": {"train": {"padding_free": value}}}, parameter_schema())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"overrides": {"train": {"padding_free": "yes"}}}, parameter_schema())


def test_assignments_are_typed_like_params_yaml() -> None:
    overrides = parse_assignments(["train.learning_rate=1e-4", "load.eval.fraction=0.5", "load.sources=[{path: a}]"])

    assert flatten(overridden(overrides)) == {
        "load.sources": [{"path": "a"}],
        "load.eval.fraction": 0.5,
        "train.learning_rate": 1e-4,
    }


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["train.learning_rat=1"], r"train.learning_rat: unknown key; did you mean 'learning_rate'\?"),
        (["trian.lora_r=1"], r"trian: unknown key; did you mean 'train'\?"),
        (["train.lora_r=x", "quantize.bits=5"], "train.lora_r: .* found 'x'; quantize.bits: .* found 5"),
        (["train.lora_r"], "expected section.key=value"),
        (["train.lora_r=[1"], "is not a YAML value"),
        (["train=1", "train.lora_r=1"], "train was already set to a value"),
    ],
)
def test_wrong_assignment_is_refused_by_name(assignments: list[str], message: str) -> None:
    with pytest.raises(RunRefused, match=message):
        parse_assignments(assignments)


def test_overrides_change_their_lines_of_params_yaml_and_no_others() -> None:
    before = known_params().splitlines()

    after = apply_overrides(known_params(), {"train": {"lora_r": 8}, "model": {"revision": "main"}}).splitlines()

    changed = [(old, new) for old, new in zip(before, after, strict=True) if old != new]
    assert [(old.split()[:2], new.split()[:2]) for old, new in changed] == [
        (["revision:", "null"], ["revision:", "main"]),
        (["lora_r:", "16"], ["lora_r:", "8"]),
    ]
    assert [old.partition("#")[2] for old, _ in changed] == [new.partition("#")[2] for _, new in changed]


def test_overridden_list_replaces_all_entries() -> None:
    text = apply_overrides(known_params(), {"load": {"sources": [{"path": "data/mine.csv"}]}})

    assert YAML(typ="safe").load(text)["load"]["sources"] == [{"path": "data/mine.csv"}]


def test_overrides_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ParamsError, match=r"params.yaml with overrides: 1 problem\n  load.eval: state one of"):
        apply_overrides(known_params(), {"load": {"eval": {"fraction": 0.1}}})


def test_override_that_no_stage_of_the_run_reads_is_refused(project: Path) -> None:
    part = read_plan(project).between("pack", None)

    refuse_overrides_without_effect({"train": {"lora_r": 8}}, part)
    with pytest.raises(RunRefused, match=r"load.seed: no stage of this run reads it; the run is pack, train"):
        refuse_overrides_without_effect({"load": {"seed": 1}, "train": {"lora_r": 8}}, part)
