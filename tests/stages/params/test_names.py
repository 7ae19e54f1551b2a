"""Names that end paths, filters or markup are refused with params.yaml, by the rules of the stores that get them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.utils.validation import _validate_experiment_name, _validate_model_name

from stages.params.schema import ParamsError, PublishSection, check_params, load_params
from stages.tracking.store import open_tracking

ROOT = Path(__file__).resolve().parents[3]
GOOD = ("shop-extractor", "Shop (v2), é", "qwen2.5+lora", "a", "a_b", "me@team", "数据")
BAD = (
    " ", "", "a ", " a", "../../evil", "team/shop/..", "..", "a:b", "bob's model", 'a"b', "<b>x</b>", "a`b", "a\\b",
    "a\nb", "a\x00b", "a|b", "a%2Fb", "a*", "a;b", "$(id)", "a#b", "a?b", "x" * 257,
)  # fmt: skip


def problem(**changes: Any) -> str:
    """What check says of params.yaml with these values of `publish`; empty if nothing is wrong."""
    values = load_params(ROOT / "params.yaml").model_dump()
    values["publish"] |= changes
    try:
        check_params(values)
    except ParamsError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", BAD)
def test_a_name_that_would_fail_at_the_end_is_refused_at_the_beginning(name: str) -> None:
    assert "publish.experiment: " in problem(experiment=name) or "publish: experiment" in problem(experiment=name)
    assert "publish.registered_model: " in problem(registered_model=name)


def test_the_parts_of_an_experiment_are_folders_only_in_a_local_store() -> None:
    assert "can't contain '/', which end paths, filters or markup; use letters, digits, spaces and ." in problem(
        registered_model="team/shop"
    )
    assert problem(experiment="team/shop") == ""
    assert "no part of it may be empty" in problem(experiment="/Users/me@x.org/shop")
    assert "no part of it may be empty" in problem(experiment="a/./b")
    assert "more than 255 bytes" in problem(experiment="é" * 128)
    assert problem(experiment="/Users/me@x.org/shop", tracking_uri="https://mlflow.example.org") == ""


@pytest.mark.parametrize("name", GOOD)
def test_a_good_name_is_good_for_mlflow(tmp_path: Path, name: str) -> None:
    assert problem(experiment=name, registered_model=name) == ""
    _validate_experiment_name(name)
    _validate_model_name(name)


@pytest.mark.parametrize("name", ["a/b", "a:b", "", " "])
def test_what_mlflow_refuses_is_refused_here(name: str) -> None:
    with pytest.raises(MlflowException):
        _validate_model_name(name)
    assert "publish.registered_model: " in problem(registered_model=name)


def test_every_good_name_is_registered_and_found_again(tmp_path: Path) -> None:
    """The rules are those of a real store: experiment, artifacts, registered model, logged model, filter."""
    for name in GOOD:
        section = PublishSection(
            tracking_uri="sqlite:///mlflow.db", experiment=f"{name}/{name}", registered_model=name,
            push_to_hub=None, ship_code=True, gate=[],
        )  # fmt: skip
        tracking = open_tracking(section, tmp_path)
        with tracking.whole_run("run", {}) as run:
            (tmp_path / "file.txt").write_text(name)
            run.log_file(tmp_path / "file.txt", "folder")
        version = tracking.register(name, run.run_id, {"key": "a"}, {"loss": 1.0}, "key")
        assert tracking.register(name, run.run_id, {"key": "a"}, {"loss": 1.0}, "key") == version == "1"
        assert len(list((tmp_path / "mlartifacts" / name / name).rglob("file.txt"))) == 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a b/c", "publish.push_to_hub: not an id on the hub"),
        ("../evil", "publish.push_to_hub: not an id on the hub"),
        ("owner/name/more", "publish.push_to_hub: not an id on the hub"),
        ("owner/name", ""),
        (None, ""),
    ],
)
def test_the_repository_is_one_of_the_hub(value: str | None, message: str) -> None:
    assert message in problem(push_to_hub=value)
    assert bool(message) == bool(problem(push_to_hub=value))


@pytest.mark.parametrize(
    ("revision", "good"),
    [("main", True), ("v1.2", True), ("refs/pr/3", True), ("6079a14", True), ("<b>", True), ("a b", False),
     ("a..b", False), ("-x", False), ("a:b", False), ("a^", False), ("x.lock", False), ("a\nb", False),
     ("", False), ("/a", False)],
)  # fmt: skip
def test_a_revision_is_a_name_that_git_takes(revision: str, good: bool) -> None:
    values = load_params(ROOT / "params.yaml").model_dump()
    values["model"]["revision"] = revision
    if good:
        assert check_params(values).model.revision == revision
    else:
        with pytest.raises(ParamsError, match=r"model\.revision: not a name of a branch, tag or commit"):
            check_params(values)


def test_a_data_set_of_the_hub_has_an_id_of_the_hub() -> None:
    values = load_params(ROOT / "params.yaml").model_dump()
    values["load"]["sources"][0] |= {"path": "../../etc", "hub": True}
    with pytest.raises(ParamsError, match=r"load\.sources\.0: not an id on the hub"):
        check_params(values)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("publish.tracking_uri", "postgresql://ada:hunter22@db/mlflow"),
        ("publish.tracking_uri", "https://ada:hunter22@mlflow.example.org"),
        ("load.eval.path", "https://h/rows.jsonl?X-Amz-Signature=hunter22"),
        ("model.name_or_path", "https://ada:hunter22@host/model"),
        ("format.system_message", "call https://h/x?sig=hunter22"),
        ("format.chat_template_kwargs", {"key": ["hf_hunter22hunter22hunter22"]}),
    ],
)
def test_a_secret_anywhere_in_params_is_refused_with_the_way_out(key: str, value: Any) -> None:
    values = load_params(ROOT / "params.yaml").model_dump()
    *sections, last = key.split(".")
    section = values
    for name in sections:
        section = section[name]
    section[last] = value
    with pytest.raises(ParamsError) as caught:
        check_params(values)
    assert f"{key}: the secret in this value would be recorded wherever params.yaml is (git, DVC, MLflow)" in str(
        caught.value
    )
    assert "set it in the environment" in str(caught.value)
    assert "hunter22" not in str(caught.value)


def test_a_variable_in_the_url_of_a_source_is_no_secret() -> None:
    values = load_params(ROOT / "params.yaml").model_dump()
    values["load"]["sources"][0]["path"] = "https://${SFT_SECRET_USER}@h/rows.jsonl?sig=${SFT_SECRET_SIGNATURE}"
    assert check_params(values).load.sources[0].path == values["load"]["sources"][0]["path"]
    values["publish"]["tracking_uri"] = "postgresql://ada@db/mlflow"
    assert check_params(values).publish.tracking_uri == "postgresql://ada@db/mlflow"
