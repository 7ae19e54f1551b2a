"""The model card states figures and origin of the model; a push replaces the hub repository by the shipped folder."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from stages import publish
from stages.checkout.artifacts import read_json, write_json
from stages.checkout.paths import Paths
from stages.pages.model_card import form, write_card
from tests.stages.hub_upload_server import COMMIT, REPO, UploadHandler, serve_uploads
from tests.stages.tiny_run import REPO as CHECKOUT
from tests.stages.tiny_run import tiny_params, write_tiny_run

FIGURES = {"loss": 0.25, "exact_match": 0.9, "size_mb": 1.5}
RESULTS = {
    "num_prompts": 3,
    "max_new_tokens": 4,
    "models": {"base": {"loss": 2.0}, "tuned": FIGURES, "merged": FIGURES},
    "gate": [{"condition": "tuned.exact_match >= 0.5", "passed": True, "verdict": "shown"}],
    "passed": True,
}
PUSH = "import sys; from pathlib import Path; from stages.publish import push; " + (
    "print(push(Path(sys.argv[1]), sys.argv[2], 'a message'))"
)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    paths = write_tiny_run(tmp_path_factory.mktemp("card"))
    write_json(paths.out("evaluate", "results.json"), RESULTS)
    write_card(paths.out("publish", "README.md"), tiny_params(), paths, "merged", "d16e57" * 8)
    shutil.copytree(paths.out("merge", "model"), paths.out("publish", "model"))
    shutil.copyfile(paths.out("publish", "README.md"), paths.out("publish", "model", "README.md"))
    (paths.out("publish", "model") / "provenance").mkdir()
    (paths.out("publish", "model") / "provenance" / "record.json").write_text("{}")
    return paths


@pytest.fixture
def hub() -> Iterator[str]:
    server, address = serve_uploads()
    yield address
    server.shutdown()
    server.server_close()


def push_apart(paths: Paths, repo_id: str, **environment: str) -> tuple[int, str]:
    """Push in a new process, as the hub client reads its environment only once."""
    done = subprocess.run(
        [sys.executable, "-c", PUSH, str(paths.out("publish", "model")), repo_id],
        cwd=CHECKOUT,
        env={**os.environ, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def test_card_holds_figures_gate_and_lineage_as_text_and_for_the_hub(paths: Paths) -> None:
    card = ModelCard.load(paths.out("publish", "README.md"))
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["sft", "lora"]
    assert {result.metric_type: result.metric_value for result in card.data.eval_results} == {
        "loss": 0.25,
        "exact_match": 0.9,
    }
    assert card.data.base_model is None  # a local folder is not a model of the hub
    lines = card.text.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert table == [
        "| model | loss | exact_match | size_mb |",
        "|---|---:|---:|---:|",
        "| base | 2 |  |  |",
        "| tuned | 0.25 | 0.9 | 1.5 |",
        "| merged | 0.25 | 0.9 | 1.5 |",
    ]
    assert "- holds: `tuned.exact_match >= 0.5`" in lines
    assert "- result: " + "d16e57" * 8 in lines
    assert "`tiny.jsonl` (train, SHA-256 5e5e5e5e5e5e)" in card.text
    assert "learning_rate 0.002" in card.text


def test_card_names_a_base_of_the_hub(paths: Paths, tmp_path: Path) -> None:
    record = read_json(paths.out("load", "base_model.json"))
    other = write_tiny_run(tmp_path)
    write_json(other.out("load", "base_model.json"), {**record, "name_or_path": "org/base", "resolved": "ab" * 20})
    write_json(other.out("evaluate", "results.json"), RESULTS)
    write_card(tmp_path / "README.md", tiny_params(), other, "merged", "0" * 64)
    assert ModelCard.load(tmp_path / "README.md").data.base_model == "org/base"


@pytest.mark.parametrize(
    ("quantize", "shipped", "words"),
    [
        ({}, "merged", "float32"),
        ({}, "quantized", "GPTQ, 4 bit in groups of 32"),
        ({"method": "nf4"}, "quantized", "nf4 (bitsandbytes)"),
    ],
)
def test_card_says_in_which_form_the_weights_are(quantize: dict[str, Any], shipped: str, words: str) -> None:
    assert form(tiny_params(quantize=quantize), shipped) == words


def test_push_leaves_the_folder_on_the_hub_and_nothing_else(paths: Paths, hub: str) -> None:
    code, output = push_apart(paths, REPO, HF_ENDPOINT=hub, HF_TOKEN="hf_test")
    assert code == 0, output
    assert f"{REPO}/commit/{COMMIT}" in output
    assert UploadHandler.created[0]["visibility"] == "private"
    assert UploadHandler.messages == ["a message"]
    folder = paths.out("publish", "model")
    files = (file for file in folder.rglob("*") if file.is_file())
    assert UploadHandler.files == {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@pytest.mark.parametrize(
    ("repo_id", "environment", "words"),
    [
        ("org/forbidden", {}, "'org/forbidden': the hub refused or can't be reached: "),
        ("not a name", {}, "'not a name': the hub refused"),
        (REPO, {"HF_ENDPOINT": "http://127.0.0.1:9"}, "can't be reached"),
        (REPO, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set; unset it, or set publish.push_to_hub: null"),
    ],
)
def test_what_the_hub_refuses_names_the_key(
    paths: Paths, hub: str, repo_id: str, environment: dict[str, str], words: str
) -> None:
    code, output = push_apart(paths, repo_id, **{"HF_ENDPOINT": hub, "HF_TOKEN": "hf_test", **environment})
    assert code == 1
    assert "ValueError: publish.push_to_hub" in output
    assert words in output


def test_nothing_is_pushed_unless_asked_for_or_if_the_gate_is_closed(
    paths: Paths, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = paths.out("publish", "model")
    assert publish.push_shipped(tiny_params(), folder, "merged", "0" * 64, promoted=True) is None
    asked = tiny_params(publish={"push_to_hub": REPO})
    assert publish.push_shipped(asked, folder, "merged", "0" * 64, promoted=False) is None
    assert f"the gate is closed, so nothing was pushed to {REPO}" in capsys.readouterr().out
