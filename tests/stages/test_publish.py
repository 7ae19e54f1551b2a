"""`publish`: one run per result, complete without any other record, found again rather than logged twice."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from ruamel.yaml import YAML

from stages import evaluate, publish
from stages.checkout.artifacts import read_json, read_jsonl, write_json, write_jsonl
from stages.checkout.paths import Paths
from stages.pages.page import NBSP
from stages.params.schema import Params
from stages.tools import compare, summary
from stages.tracking import lineage
from stages.tracking.live_run import LiveRun
from stages.tracking.store import PROGRESS_TAG, TRAINING_TAG, open_tracking
from stages.tracking.trials import log_trial, recorded_sweep
from tests.stages.tiny_run import REPO, tiny_params, write_tiny_run

PUBLISH = """
import json, os, signal, sys
from pathlib import Path
from stages import publish
from stages.checkout.paths import Paths
from stages.params.schema import Params
from stages.tracking.store import Tracking

root, overrides, last = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
move = Tracking.set_alias

def move_and_die(self, name, alias, version):
    move(self, name, alias, version)
    if alias == last:
        os.kill(os.getpid(), signal.SIGKILL)

Tracking.set_alias = move_and_die
publish.run(Params.model_validate(overrides), Paths(root))
"""
OPEN, CLOSED = ["tuned.loss < base.loss"], ["tuned.exact_match >= 0.5"]


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with everything up to `evaluate`, the gate open, committed to git."""
    root = tmp_path_factory.mktemp("publish") / "checkout"
    paths = write_tiny_run(root)
    evaluate.run(tiny_params(evaluate={"gate": OPEN}), paths)
    (root / "code.py").write_text("x = 1\n")
    git(root, "init", "-q")
    git(root, "add", "code.py")
    git(root, "commit", "-q", "-m", "first")
    return root


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its tables made, which takes MLflow several seconds."""
    store(tmp_path_factory.mktemp("store")).search_experiments()
    return tmp_path_factory.getbasetemp() / "store0" / "mlflow.db"


@pytest.fixture
def checkout(evaluated: Path, tmp_path: Path, empty_store: Path) -> Paths:
    shutil.copytree(evaluated, tmp_path / "checkout")
    shutil.copy(empty_store, tmp_path / "checkout" / "mlflow.db")
    return Paths(tmp_path / "checkout")


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    return subprocess.run(["git", *identity, *arguments], cwd=root, check=True, capture_output=True, text=True).stdout


def store(root: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{root / 'mlflow.db'}", f"sqlite:///{root / 'mlflow.db'}")


def runs(root: Path) -> list[Run]:
    client = store(root)
    experiment = client.get_experiment_by_name("sft")
    return client.search_runs([experiment.experiment_id]) if experiment else []


def close_gate(paths: Paths) -> None:
    results = read_json(paths.out("evaluate", "results.json"))
    write_json(paths.out("evaluate", "results.json"), {**results, "passed": False})


def test_run_alone_tells_params_metrics_curve_data_and_lineage(checkout: Paths) -> None:
    publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)
    (run,) = runs(checkout.root)
    assert run.info.status == "FINISHED"
    assert {"train.learning_rate", "pack.max_length", "model.name_or_path"} <= set(run.data.params)
    assert run.data.params["evaluate.gate"] == '["tuned.loss < base.loss"]'
    assert {"train.loss", "evaluate.tuned.loss", "evaluate.base.exact_match", "pack.train.fill"} <= set(
        run.data.metrics
    )
    curve = store(checkout.root).get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in curve] == [(1, 2.5), (2, 1.5), (3, 0.5)]
    assert run.data.tags["git.commit"] == git(checkout.root, "rev-parse", "HEAD").strip()
    assert run.data.tags["git.dirty"] == "false"
    assert run.data.tags["version.torch"]
    (data,) = run.inputs.dataset_inputs
    assert data.dataset.name == "tiny.jsonl"
    names = {item.path for item in store(checkout.root).list_artifacts(run.info.run_id, "reports")}
    assert "reports/report.html" in names


def test_same_result_is_the_same_run_and_the_same_version(checkout: Paths) -> None:
    params = tiny_params(evaluate={"gate": OPEN})
    publish.run(params, checkout)
    first = read_json(checkout.out("publish", "run.json"))
    publish.run(params, checkout)
    assert read_json(checkout.out("publish", "run.json")) == first
    assert len(runs(checkout.root)) == 1
    assert len(store(checkout.root).search_model_versions("name = 'shop-extractor'")) == 1


def test_a_name_says_what_differs_and_the_note_has_the_main_figures(checkout: Paths) -> None:
    publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)
    publish.run(tiny_params(evaluate={"gate": OPEN}, train={"learning_rate": 3e-4, "lora_r": 4}), checkout)
    newest, first = sorted(runs(checkout.root), key=lambda run: -run.info.start_time)
    assert first.info.run_name.startswith("base, lr ")
    assert newest.info.run_name.startswith("lr 0.0003, r 4 · exact ")
    assert newest.data.metrics["eval/tuned_loss"] == newest.data.metrics["evaluate.tuned.loss"]
    note = newest.data.tags["mlflow.note.content"]
    assert "gate passed" in note
    place = f"#/experiments/{newest.info.experiment_id}/runs/{newest.info.run_id}/artifacts/reports"
    assert f"({place}/report.html?workflowType=machine_learning)" in note
    assert f"version 1]({place}/since_champion.html?workflowType=machine_learning)" in note
    view = store(checkout.root).get_experiment(newest.info.experiment_id).tags["mlflow.sharedViewState.sft"]
    shown = json.loads(view)["selectedColumns"]
    assert shown[:3] == ["attributes.`Created`", "tags.`sft.gate`", "metrics.`eval/exact_match`"]
    assert {name.split("`")[1] for name in shown[2:]} <= newest.data.metrics.keys()
    assert not [name for name in newest.data.tags if name.startswith("dvc.")]
    (version, _) = store(checkout.root).search_model_versions("name = 'shop-extractor'")
    assert version.description == checkout.out("publish", "README.md").read_text(encoding="utf-8")[:5000]


def begin_run(checkout: Paths, folder: Path, losses: list[tuple[int, float]]) -> str:
    """What a training of this very result leaves in the store."""
    tracking = open_tracking(tiny_params().publish, checkout.root)
    live = LiveRun(lambda: tracking, folder, "base-unfinished", {"train.seed": tiny_params().train.seed}, {})
    for step, loss in losses:
        live.log({"loss": loss, "tokens_per_second": 10.0 * step}, step, 0)
    live.trained(lineage.training_digest(tiny_params(evaluate={"gate": OPEN}), checkout))
    return tracking.find_unfinished(TRAINING_TAG, lineage.training_digest(tiny_params(), checkout))[0]


def test_run_that_the_training_has_begun_is_completed(checkout: Paths, tmp_path: Path) -> None:
    # a point is missing, and one is of an attempt that was killed and came out otherwise
    begun = begin_run(checkout, tmp_path, [(1, 2.5), (2, 1.25)])
    publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)
    (run,) = runs(checkout.root)
    assert (run.info.run_id, run.info.status) == (begun, "FINISHED")
    assert run.info.run_name.startswith("base, lr ")
    assert run.data.tags["sft.progress"] == "published"
    history = store(checkout.root).get_metric_history(begun, "train/loss")
    assert sorted((point.step, point.value) for point in history) == [(1, 2.5), (2, 1.25), (2, 1.5), (3, 0.5)]
    assert run.data.metrics["train/loss"] == 0.5
    assert run.data.metrics["train/tokens_per_second"] == 20.0
    assert {"train.seed", "pack.max_length"} <= set(run.data.params)


def test_results_of_an_earlier_version_are_one_message(checkout: Paths) -> None:
    file = checkout.out("evaluate", "results.json")
    results = read_json(file)
    write_json(file, results | {"gate": [{"condition": "a < b", "passed": True}]})
    with pytest.raises(ValueError, match=r"it lacks gate\[\].verdict; `sft evaluate` measures the models again"):
        publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)


def test_training_that_came_to_a_known_result_leaves_no_second_run(checkout: Paths, tmp_path: Path) -> None:
    params = tiny_params(evaluate={"gate": OPEN})
    publish.run(params, checkout)
    first = read_json(checkout.out("publish", "run.json"))["run_id"]
    second = begin_run(checkout, tmp_path, [(1, 2.5)])
    publish.run(params, checkout)
    assert [run.info.run_id for run in runs(checkout.root)] == [first]
    assert store(checkout.root).get_run(second).info.lifecycle_stage == "deleted"


def test_training_is_known_again_whatever_later_stages_are_asked_for(checkout: Paths, tmp_path: Path) -> None:
    begun = begin_run(checkout, tmp_path, [(1, 2.5)])
    publish.run(tiny_params(evaluate={"gate": OPEN}, quantize={"bits": 8}), checkout)
    publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)
    assert [run.info.run_id for run in runs(checkout.root)][-1] == begun
    assert [run.info.status for run in runs(checkout.root)] == ["FINISHED", "FINISHED"]


def test_changed_param_or_result_is_another_run(checkout: Paths) -> None:
    publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)
    publish.run(tiny_params(evaluate={"gate": OPEN}, train={"seed": 7}), checkout)
    write_json(checkout.metrics("train"), {"loss": 0.4})
    publish.run(tiny_params(evaluate={"gate": OPEN}, train={"seed": 7}), checkout)
    assert len(runs(checkout.root)) == 3


def test_result_that_the_store_lacks_is_logged_anew(checkout: Paths, tmp_path: Path, empty_store: Path) -> None:
    publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)
    first = read_json(checkout.out("publish", "run.json"))
    # As after deleting mlflow.db; MLflow keeps a store open while its process lives, so that the file can't just go.
    shutil.copytree(checkout.root, tmp_path / "other", ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts"))
    other = Paths(tmp_path / "other")
    shutil.copy(empty_store, other.root / "mlflow.db")
    publish.run(tiny_params(evaluate={"gate": OPEN}), other)
    second = read_json(other.out("publish", "run.json"))
    assert [run.info.run_id for run in runs(other.root)] == [second["run_id"]]
    assert second["run_id"] != first["run_id"]
    assert second["result_digest"] == first["result_digest"]


def test_champion_moves_only_when_the_gate_is_open(checkout: Paths) -> None:
    publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)
    close_gate(checkout)
    publish.run(tiny_params(evaluate={"gate": CLOSED}), checkout)
    client = store(checkout.root)
    assert client.get_model_version_by_alias("shop-extractor", "champion").version == 1
    candidate = client.get_model_version_by_alias("shop-extractor", "candidate")
    assert candidate.version == 2
    assert candidate.tags["sft.gate"] == "failed"
    assert candidate.tags["sft.weights"] == "outs/merge/model"


def test_run_that_was_cut_short_is_not_taken_for_the_result(checkout: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout.evaluation_page.rename(checkout.root / "away.html")
    with pytest.raises(OSError, match=r"evaluation.html"):
        publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)
    assert not checkout.out("publish", "run.json").exists()
    (checkout.root / "away.html").rename(checkout.evaluation_page)
    publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)
    assert sorted(run.info.status for run in runs(checkout.root)) == ["FAILED", "FINISHED"]


def test_uncommitted_changes_are_named_and_kept_as_a_patch(checkout: Paths) -> None:
    (checkout.root / "code.py").write_text("x = 2\n")
    publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)
    (run,) = runs(checkout.root)
    assert run.data.tags["git.dirty"] == "true"
    folder = Path(store(checkout.root).download_artifacts(run.info.run_id, "lineage"))
    assert "+x = 2" in (folder / "uncommitted.patch").read_text()


def test_trial_that_ends_before_the_evaluation_tells_its_data_and_code_all_the_same(checkout: Paths) -> None:
    with checkout.params.open("w") as file:
        YAML().dump(tiny_params().model_dump(), file)
    with recorded_sweep(checkout.root, "sweep", {}) as sweep:
        parent = sweep.parent.run_id
    run_id = log_trial(checkout.root, parent, "trial-1", {"train.eval_loss": 0.7}, {"prefect.flow_run_id": "f1"})
    run = store(checkout.root).get_run(run_id)
    assert [item.dataset.name for item in run.inputs.dataset_inputs] == ["tiny.jsonl"]
    assert run.data.tags["git.changed_code"] == "none"
    assert run.data.tags["git.commit"] == git(checkout.root, "rev-parse", "HEAD").strip()
    assert run.data.tags[PROGRESS_TAG] == "ended before the evaluation"
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert run.data.metrics["train.eval_loss"] == 0.7


def test_worktree_records_into_the_main_checkout(checkout: Paths, tmp_path: Path) -> None:
    worktree = tmp_path / "elsewhere"
    git(checkout.root, "worktree", "add", "-q", "--detach", str(worktree))
    for folder in ("outs", "reports", "models"):
        shutil.copytree(checkout.root / folder, worktree / folder)
    publish.run(tiny_params(evaluate={"gate": OPEN}), Paths(worktree))
    (run,) = runs(checkout.root)
    assert run.info.artifact_uri.startswith((checkout.root / "mlartifacts" / "sft").as_uri())
    assert not (worktree / "mlflow.db").exists()


def test_store_that_can_not_be_used_is_one_clear_error(checkout: Paths) -> None:
    params = tiny_params(evaluate={"gate": OPEN}, publish={"tracking_uri": "sqlite:////proc/nowhere/mlflow.db"})
    with pytest.raises((ValueError, OSError), match="nowhere"):
        publish.run(params, checkout)
    assert not checkout.out("publish", "run.json").exists()


BETTER = ["tuned.loss <= champion.tuned.loss"]


def promotion(checkout: Paths, evaluate: list[str] = OPEN) -> list[tuple[bool, str]]:
    publish.run(tiny_params(evaluate={"gate": evaluate}, publish={"gate": BETTER}), checkout)
    *rows, base = read_json(checkout.out("publish", "run.json"))["promotion"]
    assert (base["condition"], base["passed"]) == ("the gate asks for more than the base model has", True)
    return [(row["passed"], row["reason"]) for row in rows]


def worsen(checkout: Paths, difference: float) -> None:
    """Another result whose tuned model has another loss."""
    for path in (checkout.out("evaluate", "results.json"), checkout.metrics("evaluate")):
        content = read_json(path)
        content.get("models", content)["tuned"]["loss"] += difference
        write_json(path, content)


def champion(checkout: Paths) -> str:
    return str(store(checkout.root).get_model_version_by_alias("shop-extractor", "champion").version)


def test_first_result_becomes_champion_and_stays_it_when_published_again(checkout: Paths) -> None:
    assert promotion(checkout) == [(True, "there is no champion yet")]
    assert promotion(checkout) == [(True, "this result is the champion")]
    assert champion(checkout) == "1"


def test_result_worse_than_the_champion_is_recorded_but_not_promoted(
    checkout: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    promotion(checkout)
    worsen(checkout, 0.5)
    ((passed, reason),) = promotion(checkout)
    assert not passed
    assert reason.endswith("does not hold")
    assert (champion(checkout), len(runs(checkout.root))) == ("1", 2)
    assert "`candidate` only, as a condition for it is not met" in capsys.readouterr().out
    worsen(checkout, -1.0)
    assert [passed for passed, _ in promotion(checkout)] == [True]
    assert champion(checkout) == "3"


def test_page_says_what_changed_since_the_champion_and_leads_to_a_comparison(checkout: Paths) -> None:
    publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)
    assert "What changed since the champion" not in page(checkout)
    assert not checkout.out("publish", publish.SINCE_CHAMPION).exists()
    assert "There was no champion when this result was published." in since_champion(checkout)
    publish.run(tiny_params(evaluate={"gate": OPEN}, train={"seed": 7}), checkout)
    changed = page(checkout).split("What changed since the champion")[1]
    assert re.search(r'train\.seed</th><td class="mono">0</td><td class="mono">7</td>', changed)
    compared = checkout.out("publish", publish.SINCE_CHAMPION).read_text(encoding="utf-8")
    assert "All figures of A and B are the same" in compared
    assert "3 prompts that both results have" in compared
    assert compared.count("<figure") == 5  # the curves of both
    run_id = read_json(checkout.out("publish", "run.json"))["run_id"]
    client = store(checkout.root)
    names = {item.path for item in client.list_artifacts(run_id, "reports")}
    assert {"reports/report.html", "reports/since_champion.html"} <= names
    recorded = Path(client.download_artifacts(run_id, "reports/report.html"))
    assert recorded.read_bytes() == checkout.report.read_bytes()


def since_champion(checkout: Paths) -> str:
    """The section of the report."""
    report = checkout.report.read_text(encoding="utf-8").replace(NBSP, " ")
    assert report.count('href="#since-champion"') == 1
    return report.split('<section id="since-champion">')[1].split("</section>")[0]


def test_report_says_what_changed_since_the_champion(checkout: Paths) -> None:
    publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)
    worsen(checkout, 0.5)
    evaluated = checkout.evaluation_page.read_bytes()
    publish.run(tiny_params(evaluate={"gate": OPEN}, train={"seed": 7}), checkout)
    assert checkout.evaluation_page.read_bytes() == evaluated  # an out of `evaluate`, which `publish` only reads
    section = since_champion(checkout)
    assert "A: the champion when this result was published, version 1" in section
    assert re.search(r'train\.seed</th><td class="mono">0</td><td class="mono">7</td>', section)
    assert "The same in both: data, base model, code, versions, machine." in section
    (loss,) = [line for line in section.splitlines() if "Loss (nats per token)" in line]
    assert '<td class="num ">+0.500</td>' in loss
    assert "1.000</td>" in loss  # the p-value: the losses of the rows are the same
    assert loss.endswith('<td class="num">3</td></tr>')
    short = checkout.out("publish", "since_champion.md").read_text(encoding="utf-8")
    assert "| `train.seed` | `0` | `7` |" in short
    assert "A: the champion, version 1, base, lr" in short


def test_result_that_is_the_champion_keeps_the_recorded_report(checkout: Paths) -> None:
    publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)
    later = tiny_params(evaluate={"gate": OPEN}, train={"seed": 7})
    publish.run(later, checkout)
    compared = checkout.report.read_bytes()
    publish.run(later, checkout)
    assert "This result is the champion, version 2." in since_champion(checkout)
    run_id = read_json(checkout.out("publish", "run.json"))["run_id"]
    assert Path(store(checkout.root).download_artifacts(run_id, "reports/report.html")).read_bytes() == compared


def test_page_of_an_earlier_version_is_one_message(checkout: Paths) -> None:
    page = checkout.evaluation_page.read_text(encoding="utf-8")
    checkout.evaluation_page.write_text(page.replace("<!--", "<"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"evaluation.html is of an earlier version; `sft evaluate` writes it anew"):
        publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)


def test_result_of_the_checkout_is_compared_with_a_run(checkout: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    params = tiny_params(evaluate={"gate": OPEN})
    publish.run(params, checkout)
    compare.run(params, checkout, runs=["champion", "."])
    assert "Same params, same result to the last digit." in capsys.readouterr().out
    worsen(checkout, 0.5)
    rows = list(read_jsonl(checkout.out("evaluate", "generations.jsonl")))
    write_jsonl(checkout.out("evaluate", "generations.jsonl"), rows[1:])
    compare.run(tiny_params(evaluate={"gate": OPEN}, train={"seed": 7}), checkout, runs=["champion", "."], html="")
    printed = capsys.readouterr().out
    assert "params: 1 difference\n  train.seed: 0 -> 7" in printed
    assert "(+0.5, worse; p 1.000 on 3 rows)" in printed
    assert "warning: A was measured on 3 held-out rows and B on 2, 2 of them the same" in printed
    assert f"page: {checkout.root / 'reports' / 'comparison.html'}" in printed
    shown = (checkout.root / "reports" / "comparison.html").read_text(encoding="utf-8")
    assert "the result in this checkout" in shown
    assert "not recorded yet" in shown


def test_gate_that_the_base_model_would_pass_makes_no_champion(checkout: Paths) -> None:
    for number, gate in enumerate(([], ["tuned.loss <= 2 * base.loss"], ["tuned.size_mb < 1e9"])):
        publish.run(tiny_params(evaluate={"gate": gate}, train={"seed": number}), checkout)
        (base,) = read_json(checkout.out("publish", "run.json"))["promotion"]
        assert not base["passed"]
        assert base["reason"].endswith("add one that training must achieve, such as tuned.loss < 0.9 * base.loss")
        assert "there is no champion" in page(checkout).split("</h1>")[0]


def test_condition_on_the_champion_is_not_shown_on_three_rows_unless_the_value_decides(checkout: Paths) -> None:
    promotion(checkout)
    worsen(checkout, -1.0)
    params = tiny_params(evaluate={"gate": OPEN, "gate_needs": "interval"}, publish={"gate": BETTER})
    publish.run(params, checkout)
    row = read_json(checkout.out("publish", "run.json"))["promotion"][0]
    assert (row["verdict"], row["passed"]) == ("not shown", False)
    assert "measured on 3 rows, and fewer than 20 show nothing" in row["reason"]
    assert champion(checkout) == "1"


def test_champion_on_other_held_out_rows_is_not_compared_with(checkout: Paths) -> None:
    promotion(checkout)
    rows = list(read_jsonl(checkout.out("evaluate", "generations.jsonl")))
    write_jsonl(checkout.out("evaluate", "generations.jsonl"), rows[1:])
    ((passed, reason),) = promotion(checkout)
    assert not passed
    assert "measured on other held-out rows" in reason
    assert champion(checkout) == "1"


def test_wrong_name_in_the_promotion_gate_is_refused_with_params() -> None:
    with pytest.raises(ValueError, match=r"publish\.gate: .*did you mean champion\.tuned\.loss"):
        tiny_params(publish={"gate": ["tuned.loss <= champion.tuned.los"]})
    with pytest.raises(ValueError, match=r"evaluate\.gate: .*nothing is called champion\.tuned\.loss"):
        tiny_params(evaluate={"gate": ["tuned.loss <= champion.tuned.loss"]})


def page(checkout: Paths) -> str:
    return checkout.out("publish", "promotion.html").read_text(encoding="utf-8").replace(NBSP, " ")


def test_page_of_the_promotion_says_what_decided_who_was_champion_and_what_moved(
    checkout: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    promotion(checkout)
    first = page(checkout)
    assert "<h1>Promoted: version 1 is the first champion; only 3 held-out rows; exact match is 0 %</h1>" in first
    assert "There was no champion." in first
    assert "<code>candidate</code>: none → version 1, it moves to every result." in first
    assert "<code>champion</code>: none → version 1, every condition is met." in first
    worsen(checkout, 0.5)
    promotion(checkout)
    second = page(checkout)
    assert "<h1>Not promoted: version 1 stays the champion; only 3 held-out rows" in second
    assert "1 of 2 conditions of publish.gate does not hold." in second
    assert "<code>candidate</code>: version 1 → version 2, it moves to every result." in second
    assert "<code>champion</code>: version 1, it stays: a condition is not met." in second
    (row,) = re.findall(r'<th scope="row">tuned: loss \(nats per token\) \*</th>.*', second)
    assert '<td class="no">+0.500</td>' in row
    worsen(checkout, -1.0)
    promotion(checkout)
    assert "<h1>Promoted: version 3 is the champion after version 1; only 3 held-out rows" in page(checkout)
    assert '<td class="yes">-0.500</td>' in page(checkout)
    summary.run(tiny_params(), checkout)
    assert "Promoted: version 3 is the champion after version 1; only 3 held-out rows" in capsys.readouterr().out
    promotion(checkout)
    assert "<h1>Version 3 is the champion, as before; only 3 held-out rows" in page(checkout)


def test_page_of_the_promotion_says_that_the_gate_is_closed_and_other_rows_were_measured(checkout: Paths) -> None:
    publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)
    rows = list(read_jsonl(checkout.out("evaluate", "generations.jsonl")))
    write_jsonl(checkout.out("evaluate", "generations.jsonl"), rows[1:])
    results = read_json(checkout.out("evaluate", "results.json"))
    failed = {**results["gate"][0], "passed": False, "reason": "2 <= 1 does not hold", "verdict": "failed"}
    write_json(checkout.out("evaluate", "results.json"), {**results, "gate": [failed], "passed": False})
    publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)
    assert "Not promoted: version 1 stays the champion" in page(checkout)
    assert "1 of 1 conditions of evaluate.gate does not hold." in page(checkout)
    assert "evaluate.gate: 2 &lt;= 1 does not hold" in page(checkout)
    assert "It was measured on other held-out rows, so the differences are not comparable." in page(checkout)
    assert '<td class="yes">' not in page(checkout)


def start_publish(checkout: Paths, params: Params, last: str = "") -> subprocess.Popen[str]:
    """Publish in another process, which kills itself after it has moved the alias `last`."""
    command = [sys.executable, "-c", PUBLISH, str(checkout.root), json.dumps(params.model_dump()), last]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("last", ["candidate", "champion"])
def test_page_after_a_kill_tells_what_the_aliases_were_before_it(checkout: Paths, last: str) -> None:
    params = tiny_params(evaluate={"gate": OPEN}, publish={"gate": BETTER})
    publish.run(params, checkout)
    worsen(checkout, -0.5)
    killed = start_publish(checkout, params, last)
    killed.communicate()
    assert (killed.returncode, page(checkout).count("version 2")) == (-9, 0)
    assert champion(checkout) == ("2" if last == "champion" else "1")

    publish.run(params, checkout)

    assert "<h1>Promoted: version 2 is the champion after version 1; only 3 held-out rows" in page(checkout)
    assert "<code>candidate</code>: version 1 → version 2, it moves to every result." in page(checkout)
    assert "<code>champion</code>: version 1 → version 2, every condition is met." in page(checkout)
    assert '<td class="yes">-0.500</td>' in page(checkout)
    assert [run.info.status for run in runs(checkout.root)] == ["FINISHED", "FINISHED"]
    publish.run(params, checkout)
    assert "<h1>Version 2 is the champion, as before; only 3 held-out rows" in page(checkout)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_ten_at_once_into_a_fresh_store_give_one_run_and_one_version_per_result(
    checkout: Paths, tmp_path: Path
) -> None:
    (checkout.root / "mlflow.db").unlink()
    copies = [shutil.copytree(checkout.root, tmp_path / f"copy-{number}", symlinks=True) for number in range(10)]
    shared = f"sqlite:///{checkout.root / 'mlflow.db'}"
    processes = [
        start_publish(
            Paths(copy),
            tiny_params(evaluate={"gate": OPEN}, publish={"tracking_uri": shared}, train={"seed": number % 4}),
        )
        for number, copy in enumerate(copies)
    ]
    printed = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * 10, printed
    assert not any("Traceback" in text for text in printed), printed
    assert sorted(run.data.params["train.seed"] for run in runs(checkout.root)) == ["0", "1", "2", "3"]
    assert {run.info.status for run in runs(checkout.root)} == {"FINISHED"}
    versions = store(checkout.root).search_model_versions("name = 'shop-extractor'")
    assert sorted(version.version for version in versions) == [1, 2, 3, 4]
    assert len({version.run_id for version in versions}) == 4
    found = [read_json(Paths(copy).out("publish", "run.json"))["run_id"] for copy in copies]
    assert [found[number] == found[number % 4] for number in range(10)] == [True] * 10


def dvc(checkout: Paths, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "dvc", *arguments], cwd=checkout.root, check=True, capture_output=True)


def test_weights_are_named_by_the_out_of_dvc_that_has_them_or_not_at_all(checkout: Paths) -> None:
    dvc(checkout, "init", "-q")
    shutil.copy(REPO / ".dvcignore", checkout.root)  # the record has copies of dvc.yaml
    dvc(checkout, "stage", "add", "-q", "-n", "merge", "-o", "outs/merge", "true")
    folder = "outs/merge/model"
    publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)
    (version,) = store(checkout.root).search_model_versions("name = 'shop-extractor'")
    assert (version.tags["sft.weights_out"], version.tags["sft.weights_dvc"]) == ("none", "not in dvc.lock")
    dvc(checkout, "commit", "-q", "-f")
    recorded = lineage.dvc_hashes(checkout.root)["outs/merge"]
    publish.run(tiny_params(evaluate={"gate": OPEN}), checkout)
    (version,) = store(checkout.root).search_model_versions("name = 'shop-extractor'")
    assert (version.tags["sft.weights"], version.tags["sft.weights_out"]) == (folder, "outs/merge")
    assert version.tags["sft.weights_dvc"] == recorded
    cached = checkout.root / ".dvc" / "cache" / "files" / "md5" / recorded[:2] / recorded[2:]
    assert "model/model.safetensors" in [entry["relpath"] for entry in json.loads(cached.read_text())]
    checkout.out("merge", "model", "config.json").write_text("{}")  # by a stage that was run without DVC
    assert lineage.dvc_out_of(checkout.root, folder) is None
