"""Two recorded runs side by side: every cause and every effect is named, and a run is found by what a person types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stages.__main__ import main
from stages.params.schema import load_params
from stages.tools.compare import find_result, find_run, report
from stages.tracking.lineage import PARENT_TAG
from stages.tracking.recorded import recorded_run
from stages.tracking.result import DIGEST_TAG
from stages.tracking.store import KIND_TAG, SWEEP, Tracking, open_tracking

ROOT = Path(__file__).resolve().parents[3]
PUBLISH = load_params(ROOT / "params.yaml").publish
MODEL = PUBLISH.registered_model


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with four runs: the first, one of another rate, the first one again, one that differs in everything."""
    folder = tmp_path_factory.mktemp("compare")
    tracking = open_tracking(PUBLISH, folder)
    first = add(tracking, "one-11111111")
    add(tracking, "two-22222222", rate="0.002", exact_match=0.8, digest="b")
    add(tracking, "one-again", data="d" * 64)
    add(tracking, "all-other", rate="1", data="e" * 64, commit="c2", torch="2.14", digest="c", extra={"load.seed": "1"})
    version = tracking.register(MODEL, first, {DIGEST_TAG: "a"}, {}, DIGEST_TAG)
    tracking.set_alias(MODEL, "champion", version)
    return folder


@pytest.fixture
def tracking(home: Path) -> Tracking:
    return open_tracking(PUBLISH, home)


def add(
    tracking: Tracking,
    name: str,
    rate: str = "0.001",
    data: str = "d" * 64,
    commit: str = "c1",
    torch: str = "2.13",
    exact_match: float = 0.9,
    digest: str = "a",
    extra: dict[str, str] | None = None,
    **tags: str,
) -> str:
    of_result = {DIGEST_TAG: digest, "sft.gate": "passed"} if digest else {}
    tags = {"git.commit": commit, "git.dirty": "false", "version.torch": torch, **of_result, **tags}
    with tracking.whole_run(name, tags) as run:
        run.log_params({"train.learning_rate": rate, "train.lora_r": "16"} | (extra or {}))
        run.log_metrics(
            {"evaluate.tuned.exact_match": exact_match, "evaluate.tuned.loss": 1 - exact_match, "pack.rows": 3}
        )
        run.log_data({"data/train.jsonl": data})
    return run.run_id


def compared(tracking: Tracking, first: str, second: str) -> str:
    return "\n".join(report(*(recorded_run(find_run(tracking, name, MODEL)) for name in (first, second))))


def test_one_cause_is_the_reason_for_every_effect(tracking: Tracking) -> None:
    text = compared(tracking, "one-11111111", "two-22222222")
    assert "params: 1 difference\n  train.learning_rate: 0.001 -> 0.002\n" in text
    assert all(f"{cause}: no differences" in text for cause in ("data", "code", "versions", "base model"))
    assert "  evaluate.tuned.exact_match: 0.9 -> 0.8 (-0.1, worse)" in text
    assert "  evaluate.tuned.loss: 0.1 -> 0.2 (+0.1, worse)" in text
    assert "pack.rows" not in text
    assert "B differs from A in params; 0 figures of the evaluation are better in B, 2 worse. That is all" in text


def test_several_causes_are_all_named_and_none_is_blamed(tracking: Tracking) -> None:
    text = compared(tracking, "two-22222222", "all-other")
    assert "params: 2 differences\n  load.seed: - -> 1\n  train.learning_rate: 0.002 -> 1\n" in text
    assert "data: 1 difference\n  data/train.jsonl: dddd" in text
    assert "code: 1 difference\n  git.commit: c1 -> c2\n" in text
    assert "versions: 1 difference\n  version.torch: 2.13 -> 2.14\n" in text
    assert (
        "code, data, params, versions; 2 figures of the evaluation are better in B, 0 worse. The comparison can't tell"
        in text
    )
    assert text.endswith("The data differ, so the figures may have been measured on different rows.")


def test_same_result_and_same_run(tracking: Tracking) -> None:
    assert "Same params, same result to the last digit." in compared(tracking, "one-11111111", "one-again")
    assert "These are the same run." in compared(tracking, "champion", "one-11111111")


def store(folder: Path) -> Tracking:
    """A store of a test's own."""
    return open_tracking(PUBLISH, folder)


def test_what_differed_from_the_commit_is_part_of_the_code_and_changed_params_are_not(tmp_path: Path) -> None:
    tracking = store(tmp_path)
    for name, dirty, changed in (("clean", "false", "none"), ("params", "true", "none"), ("code", "true", "abc")):
        tags = {"git.dirty": dirty, "git.changed_code": changed}
        add(tracking, name, digest=name, exact_match=0.1 * len(name), **tags)
    add(tracking, "older", digest="older", **{"git.dirty": "true"})
    assert "code: no differences" in compared(tracking, "clean", "params")
    assert "code: 1 difference\n  git.changed_code: none -> abc\n" in compared(tracking, "params", "code")
    assert "code: 1 difference\n  git.dirty: false -> true\n" in compared(tracking, "clean", "older")


def test_runs_that_ended_before_the_evaluation_are_not_taken_for_the_same_result(tmp_path: Path) -> None:
    tracking = store(tmp_path)
    for name, rate, loss in (("trial-1", "0.1", 0.5), ("trial-2", "0.2", 0.4), ("trial-3", "0.2", 0.4)):
        with tracking.whole_run(name, {"git.commit": "c1"}) as run:
            run.log_params({"train.learning_rate": rate})
            run.log_metrics({"train.eval_loss": loss})
    add(tracking, "whole", rate="0.2", extra={"train.lora_r": "8"})
    assert compared(tracking, "trial-1", "trial-2").endswith(
        "B differs from A in params; 0 figures of the evaluation are better in B, 0 worse. That is all that differs, "
        "so it is the reason."
    )
    assert compared(tracking, "trial-2", "trial-3").endswith(
        "Nothing that is recorded differs; the figures that both have are the same. A and B ended before the "
        "evaluation."
    )
    assert compared(tracking, "trial-2", "whole").endswith(
        "the figures that both have are the same. A ended before the evaluation."
    )


def test_a_sweep_is_no_result_and_its_trials_are_named(tmp_path: Path) -> None:
    tracking = store(tmp_path)
    with tracking.whole_run("sweep rates", {KIND_TAG: SWEEP}) as sweep:
        pass
    trial = add(tracking, "trial-1", **{PARENT_TAG: sweep.run_id})
    with pytest.raises(ValueError, match=f"'sweep rates' is a sweep; give one of its trials:\n  {trial[:12]}  trial-1"):
        find_result(tracking, "sweep rates", MODEL)
    assert find_result(tracking, "trial-1", MODEL).info.run_id == trial


def test_a_run_is_found_by_the_beginning_of_its_id(tracking: Tracking) -> None:
    run = find_run(tracking, "champion", MODEL)
    assert find_run(tracking, run.info.run_id[:12], MODEL).info.run_id == run.info.run_id
    with pytest.raises(ValueError, match=r"no finished run is called 'nobody'; [\s\S]*two-22222222"):
        find_run(tracking, "nobody", MODEL)
    with pytest.raises(ValueError, match="4 runs are called ''"):
        find_run(tracking, "", MODEL)


def test_from_the_command_line(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    assert main(["compare", "champion", "two-22222222", "--root", str(home)]) == 0
    assert "train.learning_rate: 0.001 -> 0.002" in capsys.readouterr().out
    assert main(["compare", "champion", "nobody", "--root", str(home)]) == 1
    assert "error: no finished run is called 'nobody'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["compare", "champion", "--root", str(home)])
    assert "compare takes two runs" in capsys.readouterr().err


def test_json_has_the_runs_what_differs_and_the_verdict(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    assert main(["compare", "one-11111111", "two-22222222", "--json", "--root", str(home)]) == 0
    value = json.loads(capsys.readouterr().out)
    assert (value["a"]["name"], value["b"]["name"], value["a"]["gate"]) == ("one-11111111", "two-22222222", "passed")
    assert value["inputs"]["params"] == [{"name": "train.learning_rate", "before": "0.001", "after": "0.002"}]
    assert {kind: len(found) for kind, found in value["inputs"].items() if kind != "params"} == {
        "data": 0,
        "base model": 0,
        "code": 0,
        "versions": 0,
        "machine": 0,
    }
    (match, loss) = value["figures"]
    assert (match["name"], match["before"], match["after"], match["better"], match["paired"]) == (
        "evaluate.tuned.exact_match",
        0.9,
        0.8,
        False,
        None,
    )
    assert (loss["name"], loss["better"], value["same_rows"]) == ("evaluate.tuned.loss", False, True)
    assert value["verdict"].startswith("B differs from A in params; ")


def test_nothing_recorded_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    assert main(["compare", "a", "b", "--root", str(tmp_path)]) == 1
    assert "nothing is recorded yet" in capsys.readouterr().err
    assert not (tmp_path / "mlflow.db").exists()
