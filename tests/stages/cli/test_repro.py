"""`sft repro`: an incomplete lock file of a killed DVC does not stop it."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.cli.repro import remove_cut_lock, run_dvc


@pytest.mark.parametrize("content", ["", '{"outs/load": {"wri', '{"outs/load": {"read": []}}', "{}"])
def test_a_list_of_files_in_use_that_a_kill_cut_off_is_removed(tmp_path: Path, content: str) -> None:
    file = tmp_path / ".dvc" / "tmp" / "rwlock"
    file.parent.mkdir(parents=True)
    file.write_text(content, encoding="utf-8")
    whole = content.endswith("}")
    assert remove_cut_lock(tmp_path) is not whole
    assert file.exists() is whole
    assert not remove_cut_lock(tmp_path)


def test_dvc_runs_after_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_dvc(tmp_path, "init", "--no-scm", "--quiet") == 0
    (tmp_path / "dvc.yaml").write_text("stages: {one: {cmd: echo done > out, outs: [out]}}\n", encoding="utf-8")
    (tmp_path / ".dvc" / "tmp" / "rwlock").write_text("", encoding="utf-8")
    assert run_dvc(tmp_path, "repro") == 0
    assert (tmp_path / "out").read_text(encoding="utf-8") == "done\n"
    assert "removed .dvc/tmp/rwlock, which is incomplete because DVC was killed" in capfd.readouterr().out
