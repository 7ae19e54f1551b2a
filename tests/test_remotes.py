"""Another machine: a clone and a DVC remote suffice to have every result again; data may lie on S3 too."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from stages import load
from stages.checkout.artifacts import read_json
from tests.flows.conftest import commit, ran_template, run, template
from tests.stages.data_root import ROOT, ROWS, DataRoot

__all__ = ["ran_template", "template"]  # fixtures
DVC = (sys.executable, "-m", "dvc")


@pytest.fixture
def ran_project(ran_template: Path, tmp_path: Path) -> Path:
    """A project whose stages are up to date, as a clone of its own with its own cache."""
    return Path(shutil.copytree(ran_template, tmp_path / "project", symlinks=True))


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real S3 server with a bucket `store`; its address."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = "http://{}:{}".format(*server.get_host_and_port())
    boto3.client("s3", endpoint_url=address).create_bucket(Bucket="store")
    yield address
    server.stop()


def share(project: Path, *remote: str) -> None:
    """Name a remote, push everything to it, and commit where it is."""
    run(project, *DVC, "remote", "add", "--default", "store", remote[0])
    for option in remote[1:]:
        run(project, *DVC, "remote", "modify", "store", *option.split("="))
    run(project, *DVC, "push", "--quiet", "--run-cache")
    run(project, "git", "add", "--force", "reports/metrics")  # figures are git's to keep
    commit(project)


def restored(project: Path, folder: Path) -> Path:
    """A clone elsewhere, with every result from the remote alone, as docs/operations.md says; nothing is run in it."""
    run(folder, "git", "clone", "--quiet", str(project), "clone")
    run(folder / "clone", *DVC, "pull", "--run-cache")
    return folder / "clone"


def check_same(project: Path, clone: Path) -> None:
    assert sorted(path.name for path in (clone / "outs").iterdir()) == ["load.txt", "pack.txt", "train.txt"]
    for name in ("load.txt", "pack.txt", "train.txt"):
        assert (clone / "outs" / name).read_bytes() == (project / "outs" / name).read_bytes()
    assert run(clone, *DVC, "status").strip() == "Data and pipelines are up to date."
    assert "Running stage" not in run(clone, *DVC, "repro")
    assert not (clone / "ran.log").exists()


def test_repro_that_may_miss_outs_restores_none_so_pull_is_the_documented_way(
    ran_project: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    share(ran_project, str(tmp_path / "store"))
    run(tmp_path / "elsewhere", "git", "clone", "--quiet", str(ran_project), "clone")
    clone = tmp_path / "elsewhere" / "clone"
    assert "up to date" in run(clone, *DVC, "repro", "--pull", "--allow-missing")
    assert not (clone / "outs").exists()
    text = " ".join((ROOT / "docs" / "operations.md").read_text(encoding="utf-8").split())
    assert "`dvc repro --pull --allow-missing` restores no files" in text
    run(clone, *DVC, "pull", "--run-cache")
    check_same(ran_project, clone)


def test_folder_as_a_remote(ran_project: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    share(ran_project, str(tmp_path / "store"))
    assert list((tmp_path / "store" / "runs").rglob("*"))

    check_same(ran_project, restored(ran_project, tmp_path / "elsewhere"))


def test_s3_as_a_remote(ran_project: Path, tmp_path: Path, s3: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    share(ran_project, "s3://store/sft", f"endpointurl={s3}")
    keys = [each["Key"] for each in boto3.client("s3", endpoint_url=s3).list_objects_v2(Bucket="store")["Contents"]]
    assert sum("files/md5/" in key for key in keys) == len({*keys} - {key for key in keys if "/runs/" in key}) >= 2

    check_same(ran_project, restored(ran_project, tmp_path / "elsewhere"))


def test_rows_of_s3_are_read_and_a_changed_object_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: str
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    client = boto3.client("s3", endpoint_url=s3)
    for number, part in enumerate((ROWS[:12], ROWS[12:])):
        content = "".join(json.dumps(row) + "\n" for row in part).encode()
        client.put_object(Bucket="store", Key=f"chats/{number}.jsonl.gz", Body=gzip.compress(content))
    root = DataRoot(tmp_path / "root")
    params = root.params(load={"sources": [{"path": "s3://store/chats/*.jsonl.gz"}]})
    load.run(params, root.paths)
    assert read_json(root.paths.metrics("load"))["num_rows_in"] == 20
    assert {row["id"].rpartition(":")[0] for row in root.rows("load", "train.jsonl")} == {
        f"s3://store/chats/{number}.jsonl.gz" for number in (0, 1)
    }
    version = read_json(root.paths.out("load", "card.json"))["sources"][0]["versions"]["s3://store/chats/1.jsonl.gz"]
    assert version["etag"]

    client.put_object(Bucket="store", Key="chats/1.jsonl.gz", Body=gzip.compress(json.dumps(ROWS[12]).encode()))
    load.run(params, root.paths)
    assert read_json(root.paths.metrics("load"))["num_rows_in"] == 13
    with pytest.raises(ValueError, match=r"sources\[0\]\.path: s3://nowhere/a\.jsonl does not exist"):
        load.run(root.params(load={"sources": [{"path": "s3://nowhere/a.jsonl"}]}), root.paths)
