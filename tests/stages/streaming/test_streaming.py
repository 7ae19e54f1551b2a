"""A stream of rows is trained as rows on the disk are: same records, same accounts; a kill changes no bit."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from huggingface_hub import HfApi
from ruamel.yaml import YAML

from stages import format as format_stage
from stages import load, pack, train
from stages.checkout.artifacts import read_json, read_jsonl
from stages.checkout.paths import Paths
from stages.params.schema import Params, ParamsError, check_params, load_params
from stages.streaming.dataset import StreamedRows
from stages.streaming.recipe import Recipe
from tests.stages.data_root import ROOT, DataRoot, turn
from tests.stages.training_root import SHORT, start_stage

OFF = dict.fromkeys(("near_duplicate", "near_eval", "length_outlier", "rare_language"), "off")
STREAMED = {"streaming": True, "streaming_window": 100}
NUM_ROWS = 700


def rows() -> list[dict[str, Any]]:
    """Rows of different lengths, some of them with a problem."""
    made = [turn(f"Question {number}?", f"Answer {number}. " * (1 + number % 7)) for number in range(NUM_ROWS)]
    made[120] = made[30]
    made[650] = made[31]
    made[200] = {"messages": [{"role": "user", "content": "Only asked."}]}
    made[333] = turn("What?", "")
    made[400] = turn("Odd", "A <|im_end|> spelled out.")
    made[450] = turn("Long", "word " * 60)
    made[500] = turn("Cafe?", "A cafÃ© with a wrong letter")
    return made


def make_root(folder: Path, load_values: dict[str, Any], **values: Any) -> tuple[DataRoot, Params]:
    """A checkout with these rows, a tiny model and params.yaml."""
    root = DataRoot(folder)
    root.write("train.jsonl", rows())
    plain = root.params({"checks": OFF, "eval": {"path": None, "fraction": 0.05}}).model_dump()
    plain["load"] |= {"rehearsal": None} | load_values
    plain["train"] |= {**SHORT, "max_steps": 24, "eval_steps": 12, "save_steps": 5, **values}
    plain["evaluate"]["gate"] = ["tuned.loss <= base.loss"]
    plain["evaluate"]["task"] = "text"
    plain["quantize"]["method"] = "none"
    plain["pack"]["max_length"] = 128
    with (folder / "params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(plain, file)
    return root, load_params(folder / "params.yaml")


def prepare(root: DataRoot, params: Params) -> Paths:
    """Run the stages before `train`."""
    for stage in (load, format_stage, pack):
        stage.run(params, root.paths)
    return root.paths


def stream(paths: Paths, folder: Path, **values: Any) -> StreamedRows:
    """The stream of a checkout, without a training."""
    recipe = Recipe.read(paths, trust_remote_code=False)
    assert recipe is not None
    return StreamedRows(recipe, paths, folder, **{"seed": 0, "with_weights": False} | values)


def take(rows: StreamedRows, count: int) -> list[dict[str, Any]]:
    """The first packed rows."""
    reading = iter(rows)
    return [next(reading) for _ in range(count)]


def test_a_stream_has_the_accounts_of_rows_on_the_disk(tmp_path: Path) -> None:
    whole = make_root(tmp_path / "whole", {})
    packed = read_json(prepare(*whole).metrics("pack"))["train"]
    streamed = make_root(tmp_path / "streamed", STREAMED)
    paths = prepare(*streamed)
    rows = stream(paths, tmp_path / "ledgers")
    num_rows = packed["rows"] + 20  # a window's last row may not be full, so that a pass has a few more
    taken = take(rows, num_rows)
    figures = rows.write_accounts(tmp_path / "accounts", num_rows)
    names = ("documents", "tokens", "trained_tokens", "tokens_lost", "trained_tokens_lost")
    assert {name: figures[name] for name in names} == {name: packed[name] for name in names}
    assert figures["rows_read"] + figures["held_out"] == NUM_ROWS
    assert figures["passes_begun"] == 2
    assert {len(row["input_ids"]) for row in taken} <= set(range(1, 129))
    held_out = whole[0].rows("load", "eval.jsonl")
    assert streamed[0].rows("load", "eval.jsonl") == held_out
    ids = {row["id"] for row in held_out}
    expected = [entry for stage in ("load", "format", "pack") for entry in whole[0].rows(stage, "ledger.jsonl")]
    ledger = list(read_jsonl(tmp_path / "accounts" / "ledger.jsonl"))
    assert ledger == [entry for entry in expected if entry["id"] not in ids]
    reasons = {entry["reason"] for entry in ledger}
    assert reasons == {"duplicate", "empty_answer", "mojibake", "no_answer", "special_text", "truncated"}
    assert len(streamed[0].rows("load", "train.jsonl")) < 100
    assert (
        paths.out("load", "train.jsonl").stat().st_size < whole[0].paths.out("load", "train.jsonl").stat().st_size / 5
    )


def test_a_stream_goes_on_from_any_row_with_the_same_rows(tmp_path: Path) -> None:
    root, params = make_root(
        tmp_path / "root",
        {**STREAMED, "sources": [{"path": "data/train.jsonl", "weight": 0.5}, {"path": "data/more.jsonl"}]},
    )
    root.write("more.jsonl", [turn(f"More {number}?", f"Yes {number}.") for number in range(150)])
    paths = prepare(root, params)
    whole = stream(paths, tmp_path / "whole")
    rows = take(whole, 400)
    assert whole.write_accounts(tmp_path / "accounts", 400)["passes_begun"] >= 2
    assert rows != take(stream(paths, tmp_path / "other", seed=1), 400)
    ledger = (tmp_path / "accounts" / "ledger.jsonl").read_bytes()
    for place in (7, 61, 230):
        before = stream(paths, tmp_path / "ledgers")
        reading = iter(before)
        for _ in range(place + 2):  # loaders read ahead
            next(reading)
        checkpoint = tmp_path / f"checkpoint-{place}"
        checkpoint.mkdir()
        before.save_place(checkpoint, place)
        resumed = stream(paths, tmp_path / "ledgers", checkpoint=checkpoint, num_trained=place)
        assert take(resumed, 400 - place) == rows[place:]
        resumed.write_accounts(tmp_path / "resumed", 400)
        assert (tmp_path / "resumed" / "ledger.jsonl").read_bytes() == ledger
        reading.close()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_training_on_a_stream_goes_on_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SFT_LIVE_RUN", "off")
    values = {"lora_dropout": 0.1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    root, params = make_root(tmp_path / "root", STREAMED, **values)
    whole = prepare(root, params)
    shutil.copytree(whole.root, tmp_path / "killed")
    killed = Paths(tmp_path / "killed")
    stage = start_stage(killed, SFT_LIVE_RUN="off", SFT_LOCK_DIR=str(tmp_path / "locks"))
    assert stage.stdout is not None
    for line in stage.stdout:
        if line.startswith("train: 13 of "):
            stage.send_signal(signal.SIGKILL)
            break
    stage.communicate()
    train.run(params, killed)
    assert "resuming from checkpoint-10" in capsys.readouterr().out
    train.run(params, whole)
    for name in ("model/adapter_model.safetensors", "curve.csv", "stream/ledger.jsonl", "stream/stream.json"):
        assert killed.out("train", name).read_bytes() == whole.out("train", name).read_bytes(), name
    assert read_json(killed.metrics("train"))["stream"]["rows_trained"] == 24 * 4


def test_a_hub_data_set_is_streamed_from_the_commit_that_load_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [{"path": "team/rows", "hub": True}, {"path": "data/train.jsonl"}]
    root, params = make_root(
        tmp_path / "root",
        {**STREAMED, "sources": sources, "eval": {"path": "data/eval.jsonl", "fraction": None}},
    )
    root.write("eval.jsonl", [turn(f"Held {number}?", f"Out {number}.") for number in range(5)])
    root.write("../hub/train.jsonl", [turn(f"Hub {number}?", f"Yes {number}.") for number in range(150)])
    folder, read, asked = str(root.paths.root / "hub"), datasets.load_dataset, []

    def load_dataset(_: str, *args: Any, revision: str | None, **options: Any) -> Any:
        asked.append((revision, options["streaming"]))
        return read(folder, *args, **options)

    # a folder in the place of the hub, which tests can't reach
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(HfApi, "dataset_info", lambda *_, **__: SimpleNamespace(sha="c0ffee"))
    paths = prepare(root, params)
    rows = stream(paths, tmp_path / "ledgers")
    assert len(take(rows, 300)) == 300
    assert set(asked) == {("c0ffee", True)}
    first = [row["id"] for row in root.rows("load", "train.jsonl")][:3]
    assert first == ["team/rows/train:1", "train.jsonl:1", "team/rows/train:2"]


def test_a_changed_file_is_not_streamed(tmp_path: Path) -> None:
    root, params = make_root(tmp_path / "root", STREAMED)
    paths = prepare(root, params)
    root.write("train.jsonl", rows()[:-1])
    with pytest.raises(ValueError, match=r"load\.sources\[0\]\.path: train\.jsonl has changed since `load` ran"):
        take(stream(paths, tmp_path / "ledgers"), 1)


def test_what_needs_all_rows_is_refused_by_the_name_of_its_key(tmp_path: Path) -> None:
    _, params = make_root(tmp_path / "root", {})
    plain = params.model_dump()
    plain["load"] |= {**STREAMED, "eval": {"path": None, "fraction": None, "count": 5}}
    plain["load"]["checks"]["near_eval"] = "warn"
    plain["load"]["sources"][0]["max_rows"] = 5
    plain["train"] |= {"max_steps": -1, "init_lora_weights": "eva", "arguments": {"dataloader_num_workers": 1}}
    plain["pack"]["workers"] = "ray"
    plain["load"]["rehearsal"] = load_params(ROOT / "params.yaml").model_dump()["load"]["rehearsal"]
    with pytest.raises(ParamsError) as error:
        check_params(plain)
    for key in (
        "load.checks.near_eval: warn compares all rows",
        "load.eval.count chooses",
        "load.sources[0].max_rows chooses",
        "load.rehearsal gets its share",
        "train.max_steps: -1, but a stream has no length",
        "train.init_lora_weights: eva",
        "train.arguments.dataloader_num_workers",
        "pack.workers: ray",
    ):
        assert key in str(error.value)
