"""The comparison of a repeated run; the repetition itself is tested in tests/test_operations.py."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow.entities import Run

from stages.__main__ import main
from stages.checkout.artifacts import file_digest, write_json, write_text
from stages.params.schema import load_params
from stages.shipping.replay import place_data
from stages.tools.compare import Difference, metrics_of
from stages.tools.reproduce import (
    Addition,
    Record,
    addition,
    changed_files,
    check_trusted,
    circumstances,
    compare,
    fetched_record,
    read_lock,
    recorded_checkout,
)
from stages.tracking.lineage import versions
from stages.tracking.recorded import recorded_run
from stages.tracking.result import DIGEST_TAG
from stages.tracking.store import Tracking, open_tracking
from tests.stages.shipping.test_folder import BASE, make_checkout, ship

ROOT = Path(__file__).resolve().parents[3]
PUBLISH = load_params(ROOT / "params.yaml").publish
LOCK = """\
schema: '2.0'
stages:
  train:
    cmd: python -m stages train
    deps:
    - {{path: outs/pack/train, hash: md5, md5: p.dir}}
    - {{path: stages/train.py, hash: md5, md5: {code}}}
    outs:
    - {{path: outs/train, hash: md5, md5: {train}.dir}}
    - {{path: reports/metrics/train.json, hash: md5, md5: m}}
  pack:
    cmd: python -m stages pack
    outs:
    - {{path: outs/pack, hash: md5, md5: q.dir}}
  publish:
    cmd: python -m stages publish
    outs:
    - {{path: outs/publish, hash: md5, md5: r.dir}}
"""


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    return open_tracking(PUBLISH, tmp_path_factory.mktemp("reproduce"))


def recorded(tracking: Tracking, tags: dict[str, str], files: dict[str, str]) -> Run:
    """A finished run with a loss of 0.5 and these files of its lineage."""
    folder = Path(tracking.uri.removeprefix("sqlite:///")).parent
    with tracking.whole_run("one", {DIGEST_TAG: "a", **tags}) as run:
        run.log_metrics({"train.loss": 0.5, "train.steps": 3, "evaluate.tuned.loss": 1.0})
        for name, text in files.items():
            write_text(folder / name, text)
            run.log_file(folder / name, folder="lineage")
    return tracking.client.get_run(run.run_id)


def write_listing(cache: Path, digest: str, files: dict[str, str]) -> None:
    entries = [{"relpath": name, "md5": value} for name, value in files.items()]
    write_text(cache / "files" / "md5" / digest[:2] / digest[2:], json.dumps(entries))


def test_lock_is_split_into_what_was_read_from_outside_and_what_was_made(tmp_path: Path) -> None:
    write_text(tmp_path / "dvc.lock", LOCK.format(code="c1", train="t1"))
    lock = read_lock(tmp_path / "dvc.lock")
    assert lock.deps == {"stages/train.py": "c1"}
    assert lock.outs == {"outs/train": "t1.dir", "outs/pack": "q.dir"}


def test_what_differs_is_named_to_the_file_and_the_figure(tracking: Tracking, tmp_path: Path) -> None:
    run = recorded(tracking, {}, {})
    record, folder = tmp_path / "record", tmp_path / "folder"
    write_text(record / "dvc.lock", LOCK.format(code="c1", train="t1"))
    write_text(folder / "dvc.lock", LOCK.format(code="c2", train="t2"))
    write_listing(folder / ".dvc" / "cache", "t1.dir", {"model/adapter.safetensors": "x", "curve.csv": "y"})
    write_listing(folder / ".dvc" / "cache", "t2.dir", {"model/adapter.safetensors": "z", "curve.csv": "y"})
    write_json(folder / "reports" / "metrics" / "train.json", {"loss": 0.75, "steps": 3})

    outcome = compare(
        metrics_of(recorded_run(run)), Record(record, "c", dirty=False), folder, [folder / ".dvc" / "cache"]
    )

    text = "\n".join(outcome.lines)
    assert "code and data: 1 differ\n  stages/train.py: c1 -> c2\n" in text
    assert "outs/train: 1 of 2 files differ: model/adapter.safetensors\n" in text
    assert "outs/pack: the same, bit for bit\n" in text
    assert "figures: 1 of 2 differ\n  train.loss: 0.5 -> 0.75 (+0.25)" in text
    assert (outcome.same, outcome.reason) == (False, "outs/train, train.loss differ")


def test_same_outs_and_figures_are_a_reproduction(tracking: Tracking, tmp_path: Path) -> None:
    run = recorded(tracking, {}, {})
    write_text(tmp_path / "dvc.lock", LOCK.format(code="c1", train="t1"))
    write_json(tmp_path / "reports" / "metrics" / "train.json", {"loss": 0.5, "steps": 3})
    outcome = compare(metrics_of(recorded_run(run)), Record(tmp_path, "c", dirty=False), tmp_path, [])
    assert outcome.same
    assert "figures: every figure is the same (2 of them)" in outcome.lines
    assert outcome.lines[-1] == "reproduced: every result is the same, bit for bit"


def test_versions_machine_and_uncommitted_changes_are_printed_first(tracking: Tracking, tmp_path: Path) -> None:
    tags = {"version.torch": "1.0", "version.python": versions()["python"], "machine.cores": "many"}
    write_text(tmp_path / "uncommitted.patch", "diff --git a/stages/x.py b/stages/x.py\n--- a/stages/x.py\n")
    lines = circumstances(recorded(tracking, tags, {}).data.tags, Record(tmp_path, "c", dirty=True), ROOT)
    assert lines[0] == "uncommitted changes: stages/x.py (applied)"
    assert lines[1:3] == ["versions: 1 differ", f"  version.torch: 1.0 -> {versions()['torch']}"]
    assert lines[3] == "machine: 1 differ"
    assert lines[4].startswith("  machine.cores: many -> ")


@pytest.mark.parametrize(("rank", "same"), [(4, True), (8, False)])
def test_folder_of_the_base_model_in_a_config_is_no_difference_of_the_result(
    tmp_path: Path, rank: int, same: bool
) -> None:
    write_json(
        tmp_path / "files" / "md5" / "c1" / "0", {"r": 4, "target_modules": ["q", "v"], "base_model_name_or_path": "/a"}
    )
    write_json(
        tmp_path / "files" / "md5" / "c2" / "0",
        {"r": rank, "target_modules": ["v", "q"], "base_model_name_or_path": "/b"},
    )
    write_listing(tmp_path, "t1.dir", {"model/adapter_config.json": "c10", "model/README.md": "x"})
    write_listing(tmp_path, "t2.dir", {"model/adapter_config.json": "c20", "model/README.md": "y"})

    words = changed_files(Difference("outs/train", "t1.dir", "t2.dir"), [tmp_path])

    assert words.startswith("the same, bit for bit, but for model/adapter_config.json, model/README.md, which") == same
    assert words.startswith("2 of 2 files differ") != same


def test_difference_without_listings_is_reported(tmp_path: Path) -> None:
    assert changed_files(Difference("outs/train", "a.dir", "b.dir"), [tmp_path]) == "differs"


@pytest.mark.parametrize(
    ("tags", "files", "missing"),
    [
        ({}, {"params.yaml": "x", "dvc.lock": "y"}, "a git commit"),
        ({"git.commit": "c"}, {"params.yaml": "x"}, "dvc.lock"),
    ],
)
def test_record_that_does_not_suffice_is_refused(
    tracking: Tracking, tags: dict[str, str], files: dict[str, str], missing: str
) -> None:
    run = recorded(tracking, tags, files)
    with pytest.raises(ValueError, match=f"recorded without {missing}"), fetched_record(tracking, run):
        pass


def test_commit_that_is_not_here_is_named(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    record = Record(tmp_path, "1234567", dirty=False)
    with (
        pytest.raises(ValueError, match="commit 1234567 is not in this repository; fetch it"),
        recorded_checkout(tmp_path, record, "reproduce-1", keep=False),
    ):
        pass
    assert not (tmp_path / ".worktrees").exists()


def test_command_line_takes_one_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["reproduce"])
    assert "reproduce takes one run: its id, name or alias; 0 given" in capsys.readouterr().err


def repository(folder: Path, params: str) -> str:
    """A repository with a params.yaml; the hash of its commit."""
    write_text(folder / "params.yaml", params)
    run = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*run, *command], check=True)
    return subprocess.run([*run, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()


PATCH_TEXT = "diff --git a/x.py b/x.py\n--- /dev/null\n+++ b/x.py\n@@ -0,0 +1 @@\n+print(1)  # \x1b[2K\u202e\n"


@pytest.mark.parametrize(
    ("params", "patch", "shown"),
    [
        ("model: {trust_remote_code: false, name_or_path: b}\ntrain: {seed: 2}\n", "", ()),
        ("model: {trust_remote_code: false, name_or_path: a}\ntrain: {seed: 1}\n", PATCH_TEXT, ()),
        (
            "model: {trust_remote_code: true, name_or_path: b}\ntrain: {seed: 1}\n",
            "",
            ("model.trust_remote_code: None -> True", "model.name_or_path: None -> b"),
        ),
        (
            "model: {trust_remote_code: false}\ntrain: {seed: 1, launch: {address: evil}}\n",
            "",
            ("train.launch.address: None -> evil",),
        ),
    ],
)
def test_what_a_record_would_run_beside_its_commit_is_found(
    tmp_path: Path, params: str, patch: str, shown: tuple[str, ...]
) -> None:
    commit = repository(tmp_path / "home", "model: {trust_remote_code: false, name_or_path: a}\ntrain: {seed: 1}\n")
    write_text(tmp_path / "lineage" / "params.yaml", params)
    write_text(tmp_path / "lineage" / "uncommitted.patch", patch)
    found = addition(tmp_path / "home", Record(tmp_path / "lineage", commit, dirty=bool(patch)))
    assert found == Addition(patch.encode(), shown)
    assert bool(found.digest) == bool(patch or shown)


def test_params_of_the_commit_need_no_trust(tmp_path: Path) -> None:
    params = "model: {trust_remote_code: true, name_or_path: a}\ntrain: {launch: {address: here}}\n"
    commit = repository(tmp_path / "home", params)
    write_text(tmp_path / "lineage" / "params.yaml", params)
    assert addition(tmp_path / "home", Record(tmp_path / "lineage", commit, dirty=False)).digest == ""


def test_a_recorded_patch_is_shown_without_control_characters_and_must_be_trusted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = Addition(PATCH_TEXT.encode(), ("train.launch.address: None -> evil",))
    for trusted, message in (
        (None, rf"if you trust them: python -m stages reproduce one --trust-patch {found.digest}"),
        ("0" * 16, rf"--trust-patch 0{{16}}: the changes above are {found.digest}; read them"),
        (found.digest[:7], r"the changes above are"),
    ):
        with pytest.raises(ValueError, match=message):
            check_trusted(found, trusted, "one")
        assert "+print(1)  # \\x1b[2K\\u202e\ntrain.launch.address: None -> evil\n" in capsys.readouterr().out
    for trusted in (found.digest, found.digest[:8], ""):
        check_trusted(found, trusted, "one")
        assert "+print(1)" in capsys.readouterr().out
    assert Addition(PATCH_TEXT.encode() + b" ", found.params).digest != found.digest
    check_trusted(Addition(b"", ()), None, "one")
    assert capsys.readouterr().out == ""


def test_a_store_from_elsewhere_starts_no_command(
    tmp_path: Path, tracking: Tracking, capsys: pytest.CaptureFixture[str]
) -> None:
    """The patch of the record would run a command as soon as a stage is started; nothing is checked out."""
    home = tmp_path / "home"
    commit = repository(home, (ROOT / "params.yaml").read_text(encoding="utf-8"))
    text = (ROOT / "params.yaml").read_text(encoding="utf-8").replace("sqlite:///mlflow.db", tracking.uri)
    (home / "params.yaml").write_text(text)
    run = recorded(
        tracking,
        {"git.commit": commit, "git.dirty": "true"},
        {"params.yaml": text, "dvc.lock": LOCK.format(code="c", train="t"), "uncommitted.patch": PATCH_TEXT},
    )
    assert main(["reproduce", run.info.run_id, "--root", str(home)]) == 1
    assert "whoever can write to the store could have written the changes above" in capsys.readouterr().err
    assert not (home / ".worktrees").exists()
    assert main(["reproduce", run.info.run_id, "--root", str(home), "--trust-patch", "12345678"]) == 1
    assert not (home / ".worktrees").exists()


@pytest.mark.parametrize("commit", ["--output=x", "HEAD", "main", "123456", "", "../x"])
def test_only_a_hash_is_a_commit(tmp_path: Path, commit: str) -> None:
    repository(tmp_path, "model: {}\n")
    with (
        pytest.raises(ValueError, match="is not in this repository"),
        recorded_checkout(tmp_path, Record(tmp_path, commit, dirty=False), "reproduce-1", keep=False),
    ):
        pass


@pytest.mark.parametrize("text", ["", "stages: 1", "a: [", "stages: {load: {outs: [1]}}"])
def test_a_damaged_lock_is_one_message(tmp_path: Path, text: str) -> None:
    write_text(tmp_path / "dvc.lock", text)
    with pytest.raises(ValueError, match=r"dvc\.lock can't be read: it is not a lock file of DVC"):
        read_lock(tmp_path / "dvc.lock")


def test_a_hash_of_the_store_leads_out_of_no_cache(tmp_path: Path) -> None:
    write_text(tmp_path / "secret", "[]")
    write_text(tmp_path / "cache" / "files" / "md5" / "aa" / "x", "[]")
    difference = Difference("outs/train", "aa/../../../../secret.dir", "..x.dir")
    assert changed_files(difference, [tmp_path / "cache"]) == "differs"


def test_a_shipped_folder_runs_no_code_that_the_user_did_not_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a checkout nor its commit is here, so all of the code comes with the folder."""
    shipped = Path(shutil.move(ship(make_checkout(tmp_path / "checkout")), tmp_path / "downloaded"))
    digest = file_digest(shipped / "provenance" / "code.tar.gz")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")

    assert main(["reproduce", str(shipped)]) == 1

    captured = capsys.readouterr()
    assert f"all of the code in provenance/code.tar.gz: SHA-256 {digest}\n" in captured.out
    assert "whoever made this folder could have written the changes above" in captured.err
    trusted = captured.err.rpartition("--trust-patch ")[2].strip()
    assert main(["reproduce", str(shipped), "--trust-patch", "0" * 16]) == 1
    assert f"the changes above are {trusted}; read them" in capsys.readouterr().err
    assert main(["reproduce", str(shipped), "--trust-patch", trusted]) == 1
    assert "data/tiny.jsonl is missing: the run read it (SHA-256 5e5e5e5e5e5e)" in capsys.readouterr().err
    (shipped / "config.json").write_text("{}")
    assert main(["reproduce", str(shipped), "--trust-patch", trusted]) == 1
    assert "is not as it was written: config.json (changed)" in capsys.readouterr().err


GRAPH = """\
stages:
  load:
    cmd: python code.py load
    deps: [data, code.py]
    outs: [outs/load]
  evaluate:
    cmd: python code.py evaluate
    deps: [outs/load, code.py]
    outs: [outs/evaluate]
    metrics: [{reports/metrics/evaluate.json: {cache: false}}]
"""

CODE = """\
import json, os, pathlib, sys
stage, root = sys.argv[1], pathlib.Path()
(root / "outs" / stage).mkdir(parents=True, exist_ok=True)
if stage == "load":
    rows = (root / "data" / "tiny.jsonl").read_text().splitlines()
    (root / "outs" / "load" / "card.json").write_text((root / "models" / "base" / "card.json").read_text())
    (root / "outs" / "load" / "train.jsonl").write_text("".join(sorted(rows)))
else:
    loss = len((root / "outs" / "load" / "train.jsonl").read_text()) + float(os.environ.get("NOISE", 0))
    (root / "outs" / "evaluate" / "results.json").write_text(json.dumps({"passed": True, "loss": loss}))
    (root / "reports" / "metrics").mkdir(parents=True, exist_ok=True)
    (root / "reports" / "metrics" / "evaluate.json").write_text(json.dumps({"tuned": {"loss": loss}}))
"""
"""A graph of two stages with its own code, which is repeated as the pipeline is."""


def test_a_folder_alone_is_reproduced_given_the_data_and_the_base_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Elsewhere: neither the checkout nor git nor MLflow."""
    paths = make_checkout(tmp_path / "checkout")
    root = paths.root
    card = json.loads(paths.out("load", "card.json").read_text())
    card["sources"][0]["sha256"] = {"tiny.jsonl": file_digest(root / "data" / "tiny.jsonl")}
    shutil.rmtree(root / "outs" / "load")
    shutil.rmtree(root / "outs" / "evaluate")
    (root / "reports" / "metrics" / "train.json").unlink()
    write_json(root / "models" / "base" / "card.json", card)
    write_text(root / "dvc.yaml", GRAPH)
    write_text(root / "code.py", CODE)
    write_text(root / ".dvc" / "config", "[core]\n    no_scm = true\n    analytics = false\n")
    subprocess.run(["git", "add", "dvc.yaml"], cwd=root, check=True)
    (root / "dvc.lock").unlink()
    subprocess.run([sys.executable, "-m", "dvc", "repro", "--quiet"], cwd=root, check=True)
    write_json(paths.out("load", "base_model.json"), {**BASE, "name_or_path": "models/base"})
    shipped = Path(shutil.move(ship(paths), tmp_path / "downloaded"))
    data = Path(shutil.move(root / "data", tmp_path / "their data"))
    shutil.move(root / "models", tmp_path / "elsewhere" / "models")
    shutil.rmtree(root)
    monkeypatch.chdir(tmp_path / "elsewhere")
    asked = ["reproduce", str(shipped), "--data", str(data), "--trust-patch", ""]

    assert main(asked) == 0

    printed = capfd.readouterr().out
    assert "outs/load: the same, bit for bit\nouts/evaluate: the same, bit for bit\n" in printed
    assert "figures: every figure is the same (1 of them)" in printed
    assert printed.rstrip().endswith("reproduced: every result is the same, bit for bit")
    assert [path.name for path in Path().iterdir()] == ["models"]
    monkeypatch.setenv("NOISE", "0.5")
    assert main(asked) == 1
    captured = capfd.readouterr()
    assert "evaluate.tuned.loss: 31 -> 31.5" in captured.out
    assert "was not reproduced: outs/evaluate, evaluate.tuned.loss differ" in captured.err


def test_data_of_a_shipped_folder_is_checked_before_it_is_used(tmp_path: Path) -> None:
    checkout, data = tmp_path / "checkout", tmp_path / "data"
    write_text(checkout / "data" / "a.jsonl", "old")
    write_text(data / "a.jsonl", "rows")
    digest = file_digest(data / "a.jsonl")
    with pytest.raises(ValueError, match=r"a\.jsonl is another file than the run read: SHA-256 \w{12} instead of"):
        place_data({"a.jsonl": digest}, None, checkout)
    with pytest.raises(ValueError, match=r"names a file outside of data/: \.\./data/a\.jsonl"):
        place_data({"../data/a.jsonl": digest}, data, checkout)
    place_data({"a.jsonl": digest}, data, checkout)
    assert (checkout / "data" / "a.jsonl").read_text() == "rows"
    place_data({}, tmp_path / "none", tmp_path / "of the hub alone")
    assert list((tmp_path / "of the hub alone" / "data").iterdir()) == []
