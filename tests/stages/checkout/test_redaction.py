"""Secrets do not reach messages and records."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.__main__ import fail
from stages.checkout.redaction import redact
from stages.params.schema import ParamsError, load_params
from stages.tracking.result import log_patch, log_text
from tests.stages.training_root import REPO


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://ada:hunter22@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("see https://token@host/x and http://host/y", "see https://***@host/x and http://host/y"),
        ("Bearer hf_abcdefgh", "Bearer ***"),
        ("sqlite:///mlflow.db, a@b.org", "sqlite:///mlflow.db, a@b.org"),
        ("short", "short"),
    ],
)
def test_passwords_in_urls_and_tokens_of_the_environment_are_hidden(text: str, shown: str) -> None:
    assert redact(text, {"HF_TOKEN": "hf_abcdefgh", "DB_PASSWORD": "short", "HOME": "/home/ada/db"}) == shown


def test_an_error_is_printed_without_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    fail(ValueError("https://ada:hunter22@host refused 'correct horse'"), 1)
    assert capsys.readouterr().err == "error: https://***@host refused '***'\n"


def test_a_recorded_patch_holds_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = "+  tracking_uri: postgresql://ada:hunter22@db/mlflow\n"
    monkeypatch.setattr("stages.tracking.lineage.git_diff", lambda root, without=(): patch)
    recorded = []

    class Run:
        def log_file(self, path: Path, folder: str) -> None:
            recorded.append(path.read_text())

    log_patch(Run(), tmp_path)
    assert recorded == ["+  tracking_uri: postgresql://***@db/mlflow\n"]


def test_params_with_a_password_in_a_source_are_refused(tmp_path: Path) -> None:
    text = (REPO / "params.yaml").read_text(encoding="utf-8")
    file = tmp_path / "params.yaml"
    file.write_text(text.replace("- path: data/shop_train.jsonl", "- path: https://ada:hunter22@host/rows.jsonl"))
    with pytest.raises(
        ParamsError, match=r"load\.sources\.0\.path: .*would be recorded wherever params\.yaml is"
    ) as caught:
        load_params(file)
    assert "hunter22" not in redact(str(caught.value))


def test_a_recorded_params_file_holds_no_password() -> None:
    recorded = {}

    class Run:
        def log_file(self, path: Path, folder: str) -> None:
            recorded[f"{folder}/{path.name}"] = path.read_text()

    log_text(Run(), "params.yaml", "tracking_uri: postgresql://ada:hunter22@db/mlflow\n")
    assert recorded == {"lineage/params.yaml": "tracking_uri: postgresql://***@db/mlflow\n"}
