"""Ray does the same work: the same results in the same order, and the same errors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages import format, load, pack
from stages.checkout.artifacts import write_jsonl
from stages.shards import shards
from stages.shards.shards import run_shards, shards_of
from tests.stages.data_root import ROWS, DataRoot
from tests.stages.shards.test_shards import Reading


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(shards, "SHARD_BYTES", 100)
    write_jsonl(tmp_path / "rows.jsonl", ({"number": number} for number in range(60)))
    return tmp_path / "rows.jsonl"


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """A local Ray that all tests here share: each start takes seconds."""
    ray = pytest.importorskip("ray", reason="Ray is not installed (pip install '.[ray]')")
    root = str(Path(__file__).resolve().parents[3])
    environment = {"env_vars": {"PYTHONPATH": root}}
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env=environment,
    )
    yield ray
    ray.shutdown()


def test_without_ray_the_way_out_is_named(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"workers: ray, and Ray is not installed: pip install '\.\[ray\]'"):
        list(run_shards(Reading(2), shards_of(file), 2, "ray"))


@pytest.mark.slow
def test_results_come_in_order(ray: Any, file: Path) -> None:
    found = shards_of(file)
    assert len(found) > 6
    assert list(run_shards(Reading(2), found, 2, "ray")) == list(run_shards(Reading(2), found, 1))
    # more actors than the cluster has processors would wait for ever
    assert list(run_shards(Reading(3), found, 64, "ray")) == list(run_shards(Reading(3), found, 1))


@pytest.mark.slow
def test_the_first_shard_that_fails_is_reported_as_without_ray(ray: Any, tmp_path: Path, file: Path) -> None:
    write_jsonl(tmp_path / "bad.jsonl", ({"number": 20 - number} for number in range(60)))
    bad = shards_of(tmp_path / "bad.jsonl")
    with pytest.raises(ValueError, match="is negative") as alone:
        list(run_shards(Reading(1), bad, 1))
    with pytest.raises(ValueError, match="is negative") as on_ray:
        list(run_shards(Reading(1), bad, 2, "ray"))
    assert str(on_ray.value) == str(alone.value)


def outputs(root: DataRoot) -> dict[str, bytes]:
    folders = (root.paths.out("format"), root.paths.out("pack"))
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(root.paths.root)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_format_and_pack_write_the_same_bytes(ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_BYTES", 600)
    root = DataRoot(tmp_path)
    root.write("train.jsonl", ROWS)
    params = root.params()
    load.run(params, root.paths)
    written = []
    for workers in ("processes", "ray"):
        values = params.model_dump()
        values["format"] |= {"workers": workers, "num_proc": 2}
        values["pack"] |= {"workers": workers, "num_proc": 2, "max_length": 100, "max_lost_fraction": 0.9}
        chosen = type(params).model_validate(values)
        format.run(chosen, root.paths)
        pack.run(chosen, root.paths)
        written.append(outputs(root))
    assert len(shards_of(root.paths.out("format", "train.jsonl"))) > 2
    assert written[0] == written[1]
