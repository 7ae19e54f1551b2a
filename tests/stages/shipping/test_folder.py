"""The shipped folder: repeatable to the byte, complete alone, and no changed byte in it goes unnoticed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from stages.__main__ import main
from stages.checkout.artifacts import file_digest, read_json, write_json, write_text
from stages.checkout.paths import Paths
from stages.shipping.folder import write_shipped_folder
from stages.shipping.manifest import FileVerdict, compare_with_manifest
from stages.shipping.record import make_record
from tests.stages.tiny_run import CARD, SOURCE, tiny_params

FIGURES = {"loss": 0.5, "exact_match": 0.75, "size_mb": 1.25}
RESULTS: dict[str, Any] = {
    "models": {"merged": FIGURES},
    "intervals": {"merged": {"loss": [0.25, 0.75]}},
    "passed": True,
}
BASE = {"name_or_path": "models/base", "revision": None, "resolved": "models/base", "digest": "ab" * 32}
GIT = ["git", "-c", "user.name=a", "-c", "user.email=a@b.org"]
DAY = "2026-01-02T03:04:05+00:00"


def make_checkout(root: Path) -> Paths:
    """What `publish` reads, with a checkpoint of one file of weights; committed, with one uncommitted change."""
    paths = Paths(root)
    write_json(
        paths.out("merge", "model", "config.json"), {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    )
    (paths.out("merge", "model") / "model.safetensors").write_bytes(bytes(range(256)))
    write_json(paths.out("load", "base_model.json"), BASE)
    sources = [{**SOURCE, "path": "data/tiny.jsonl", "columns": ["messages"]}]
    write_json(paths.out("load", "card.json"), {**CARD, "sources": sources})
    write_text(
        paths.out("load", "ledger.jsonl"), json.dumps({"stage": "load", "action": "drop", "reason": "duplicate"})
    )
    write_json(paths.out("evaluate", "results.json"), RESULTS)
    write_json(paths.metrics("train"), {"loss": 0.5})
    write_text(paths.out("publish", "README.md"), "# card\n")
    write_text(root / "data" / "tiny.jsonl", '{"text": "private row"}\n')
    write_text(root / "code.py", "x = 1\n")
    write_text(root / "params.yaml", "model: {name_or_path: models/base}\n")
    write_text(root / "dvc.lock", "stages: {}\n")
    for command in (["init", "-q"], ["add", "code.py", "params.yaml", "data"], ["commit", "-q", "-m", "one"]):
        environment = {"GIT_COMMITTER_DATE": DAY, "GIT_AUTHOR_DATE": DAY, "PATH": "/usr/bin:/bin:/usr/local/bin"}
        subprocess.run([*GIT, *command], cwd=root, check=True, env=environment)
    write_text(root / "code.py", "x = 2  # api_key = 'hunter2secret99'\n")
    write_text(root / "data" / "tiny.jsonl", '{"text": "another private row"}\n')
    return paths


def ship(paths: Paths, **publish: Any) -> Path:
    folder = paths.out("publish", "model")
    write_shipped_folder(
        folder,
        paths.out("merge", "model"),
        paths.out("publish", "README.md"),
        tiny_params(publish=publish),
        paths,
        shipped="merged",
        digest="cd" * 32,
        results=RESULTS,
        key=None,
    )
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ship(make_checkout(tmp_path_factory.mktemp("ship") / "checkout"))


@pytest.fixture
def shipped(made: Path, tmp_path: Path) -> Path:
    """A copy of the folder alone, far from the checkout."""
    return Path(shutil.copytree(made, tmp_path / "downloaded"))


def test_the_folder_has_everything_and_its_manifest_lists_all_of_it(made: Path) -> None:
    names = sorted(path.relative_to(made).as_posix() for path in made.rglob("*") if path.is_file())
    assert names == [
        "README.md",
        "config.json",
        "data_card.json",
        "manifest.json",
        "ml-bom.cdx.json",
        "model.safetensors",
        "provenance/code.tar.gz",
        "provenance/dvc.lock",
        "provenance/params.yaml",
        "provenance/record.json",
        "provenance/uncommitted.patch",
    ]
    files = read_json(made / "manifest.json")["files"]
    assert sorted([*files, "manifest.json"]) == names
    assert files["model.safetensors"] == {"size": 256, "sha256": file_digest(made / "model.safetensors")}


def test_the_same_result_gives_the_same_bytes_elsewhere_and_later(made: Path, tmp_path: Path) -> None:
    again = ship(make_checkout(tmp_path / "other place"))
    assert (again / "manifest.json").read_bytes() == (made / "manifest.json").read_bytes()


def test_neither_rows_nor_secrets_are_shipped(made: Path) -> None:
    subprocess.run(["tar", "xzf", str(made / "provenance" / "code.tar.gz"), "-C", str(made.parent)], check=True)
    assert (made.parent / "code.py").read_text() == "x = 2  # api_key = '***'\n"
    assert not (made.parent / "data").exists()
    everything = b"".join(path.read_bytes() for path in made.rglob("*") if path.is_file())
    for secret in (b"private row", b"hunter2secret99"):
        assert secret not in everything


@pytest.mark.parametrize("offset", [0, 128, 255])
def test_one_flipped_byte_is_named(shipped: Path, offset: int, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((shipped / "model.safetensors").read_bytes())
    content[offset] ^= 1
    (shipped / "model.safetensors").write_bytes(content)
    assert main(["verify", str(shipped)]) == 1
    assert "  changed  model.safetensors  (same size, other SHA-256)\n" in capsys.readouterr().out


def test_changed_missing_and_added_files_are_named(shipped: Path) -> None:
    (shipped / "config.json").write_text("{}")
    (shipped / "README.md").unlink()
    (shipped / "provenance" / "more.py").write_text("import os\n")
    (shipped / ".cache").mkdir()  # as the hub's client leaves it
    (shipped / ".cache" / "x").write_text("")
    assert compare_with_manifest(shipped) == [
        FileVerdict("README.md", "missing", "7 bytes"),
        FileVerdict("config.json", "changed", "2 bytes instead of 77"),
        FileVerdict("provenance/more.py", "added", "10 bytes"),
    ]


def test_a_folder_alone_says_what_it_was_made_of(
    shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # no params.yaml here
    assert main(["verify", str(shipped)]) == 0
    said = capsys.readouterr().out
    commit = read_json(shipped / "provenance" / "record.json")["code"]["commit"]
    for line in (
        "  all 10 files are as manifest.json lists them",
        "  trained on: tiny.jsonl (SHA-256 5e5e5e5e5e5e), 5 rows",
        "  rows: load: drop duplicate: 1",
        "  base model: models/base (models/base, SHA-256 abababababab)",
        f"  code: commit {commit} of {DAY} with uncommitted changes to code.py; a copy is in provenance/code.tar.gz",
        f"  can be repeated: sft reproduce {shipped} --data FOLDER",
    ):
        assert f"{line}\n" in said
    assert main(["verify", str(shipped), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["can_be_repeated"] is True


def test_a_folder_that_names_no_lock_can_not_be_repeated(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shipped / "provenance" / "dvc.lock").unlink()
    assert main(["verify", str(shipped)]) == 1
    assert "  can't be repeated: it was recorded without dvc.lock\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("manifest.json", "{"),
        ("manifest.json", '{"format": 1, "files": {"a": {"size": -1, "sha256": "x"}}}'),
        ("manifest.json", '{"format": 2, "files": {}}'),
        ("provenance/record.json", '{"format": 1, "name": "\\u001b[2K"}'),
        ("provenance/record.json", "[" * 100_000),
    ],
)
def test_a_damaged_folder_is_one_message(
    shipped: Path, name: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (shipped / name).write_text(text)
    assert main(["verify", str(shipped)]) == 1
    captured = capsys.readouterr()
    assert f"{name} can't be read: " in captured.out + captured.err
    assert "\x1b" not in captured.out + captured.err


def test_the_bill_of_materials_follows_the_schema_and_names_model_data_and_packages(made: Path) -> None:
    text = (made / "ml-bom.cdx.json").read_text(encoding="utf-8")
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    bom = json.loads(text)
    assert bom["metadata"]["timestamp"] == DAY
    model = bom["metadata"]["component"]
    assert model["modelCard"]["modelParameters"]["architectureFamily"] == "llama"
    assert model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][0] == {
        "type": "loss",
        "value": "0.5",
        "slice": "held-out rows",
        "confidenceInterval": {"lowerBound": "0.25", "upperBound": "0.75"},
    }
    assert model["components"][0]["hashes"] == [{"alg": "SHA-256", "content": file_digest(made / "model.safetensors")}]
    kinds = {part["bom-ref"]: part["type"] for part in bom["components"]}
    assert (kinds["base-model"], kinds["data-0"]) == ("machine-learning-model", "data")
    assert any(name.startswith("pkg:pypi/torch@") for name in kinds)


def test_the_data_card_names_files_digests_and_what_was_done_to_rows(made: Path) -> None:
    card = read_json(made / "data_card.json")
    (file,) = card["distribution"]
    assert (file["name"], file["contentUrl"], file["sha256"]) == ("tiny.jsonl", "data/tiny.jsonl", "5e" * 32)
    assert file["encodingFormat"] == "application/jsonlines"
    assert card["recordSet"][0]["field"][0]["source"] == {
        "fileObject": {"@id": "file-0"},
        "extract": {"column": "messages"},
    }
    assert card["datePublished"] == DAY[:10]
    assert card["rai:dataPreprocessingProtocol"][-1] == "load: drop duplicate: 1 rows"
    croissant = pytest.importorskip("mlcroissant")
    assert croissant.Dataset(jsonld=str(made / "data_card.json")).metadata.name == "shop-extractor-data"


def test_the_code_is_left_out_if_params_say_so(tmp_path: Path) -> None:
    folder = ship(make_checkout(tmp_path / "checkout"), ship_code=False)
    assert not (folder / "provenance" / "code.tar.gz").exists()


def test_outside_of_git_the_record_has_no_code(tmp_path: Path) -> None:
    paths = make_checkout(tmp_path / "checkout")
    shutil.rmtree(paths.root / ".git")
    assert make_record(tiny_params(), paths, "merged", "cd" * 32).code is None
