"""The short form: filled in with params.yaml; what is sent as it was shown overrides nothing."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from flows.pipeline import pipeline
from flows.runs.basics import basics_model, read_forms, with_basics
from flows.runs.forms import Overrides, overridden, read_mapping
from flows.runs.graph import RunRefused
from tests.stages.tiny_run import REPO

CURRENT = read_mapping(REPO / "params.yaml")
SHOWN = {
    "model": "embedded:smollm2-135m-instruct",
    "data": "data/shop_train.jsonl",
    "learning_rate": CURRENT["train"]["learning_rate"],
    "epochs": 1,
    "length": 512,
    "gate": CURRENT["evaluate"]["gate"],
}


def combined(basics: dict[str, Any], overrides: dict[str, Any] | None = None) -> dict[str, Any]:
    short = basics_model(CURRENT).model_validate(basics)
    return overridden(with_basics(Overrides.model_validate(overrides or {}), short, SHOWN, CURRENT))


def test_form_shows_the_present_values_first_and_no_section_before_it_is_chosen() -> None:
    schema = pipeline.parameters.model_dump_for_openapi()
    shown = schema["definitions"]["Basics"]["properties"]
    assert {name: field["default"] for name, field in shown.items()} == SHOWN
    first, second = sorted(schema["properties"].items(), key=lambda entry: entry[1]["position"])[:2]
    assert (first[0], second[0]) == ("basics", "overrides")
    assert second[1]["anyOf"][0] == {"type": "null"}
    assert second[1]["default"] is None
    sections = schema["definitions"]["Overrides"]["properties"].values()
    assert [section["anyOf"][0] for section in sections] == [{"type": "null"}] * 9
    sent = {"basics": SHOWN, "overrides": None, "from_stage": None, "to_stage": None, "force": False}
    jsonschema.validate(sent, schema)


def test_what_is_sent_as_it_was_shown_overrides_nothing() -> None:
    assert combined(SHOWN) == {}
    assert combined(SHOWN | {"epochs": 2.0}) == {"train": {"num_train_epochs": 2.0}}
    assert combined(SHOWN, {"train": None, "pack": {"strategy": "none"}}) == {"pack": {"strategy": "none"}}


def test_other_data_keep_the_other_options_of_the_source() -> None:
    current = CURRENT | {"load": {"sources": [{"path": "data/shop_train.jsonl", "weight": 0.5}]}}
    short = basics_model(current).model_validate({"data": "data/faq.csv"})
    found = overridden(with_basics(Overrides(), short, SHOWN, current))
    assert found == {"load": {"sources": [{"path": "data/faq.csv", "weight": 0.5}]}}
    several = {"load": {"sources": [{"path": "data/a.csv"}, {"path": "data/b.csv"}]}}
    assert "data" not in basics_model(CURRENT | several).model_fields
    with pytest.raises(RunRefused, match=r"data: params\.yaml has 2 sources; set load\.sources among the overrides"):
        with_basics(Overrides(), short, SHOWN, several)


def test_a_value_that_is_given_twice_is_refused() -> None:
    with pytest.raises(RunRefused, match=r"length and pack\.max_length: the same value is given twice"):
        combined({"length": 256}, {"pack": {"max_length": 1024}})


def test_outside_of_a_deployment_every_given_value_counts() -> None:
    assert overridden(read_forms(None, {"length": 512})) == {"pack": {"max_length": 512}}
    assert overridden(read_forms({"pack": {"max_length": 8}}, None)) == {"pack": {"max_length": 8}}
