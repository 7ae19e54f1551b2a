"""Set-up: what uv is told, and the file with the digests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.ci_scripts import script

ROOT = Path(__file__).resolve().parent.parent

install, lock = script("install"), script("lock")


def test_uv_is_told_what_pip_is_told() -> None:
    pip = {
        "find-links": "/wheels /more",
        "extra-index-url": "https://one.example https://two.example",
        "cert": "/ca.pem",
    }
    settings = install.uv_settings(pip, {"PATH": "/bin"})
    assert settings == {
        "PATH": "/bin",
        "UV_FIND_LINKS": "/wheels,/more",
        "UV_INDEX": "https://one.example https://two.example",
        "SSL_CERT_FILE": "/ca.pem",
    }


def test_a_variable_of_uv_wins_over_one_of_pip() -> None:
    assert install.uv_settings({"find-links": "/pip"}, {"UV_FIND_LINKS": "/uv"}) == {"UV_FIND_LINKS": "/uv"}


def test_pip_settings_of_the_environment_win_over_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pip.conf").write_text("[global]\nfind-links = /file\nindex-url = https://file.example/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_FIND_LINKS", "/variable")
    settings = install.pip_settings()
    assert settings["find-links"] == "/variable"
    assert settings["index-url"] == "https://file.example/simple"


@pytest.mark.parametrize("variable", ["UV_TORCH_BACKEND", "UV_FIND_LINKS", "UV_NO_INDEX"])
def test_a_named_build_of_torch_is_kept(variable: str) -> None:
    assert install.torch_backend({variable: "x"}) is None


def test_the_build_of_torch_follows_the_machine_where_its_index_answers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(install, "TORCH_INDEX", tmp_path.as_uri() + "/missing")
    assert install.torch_backend({}) is None
    (tmp_path / "index").write_text("")
    monkeypatch.setattr(install, "TORCH_INDEX", (tmp_path / "index").as_uri())
    assert install.torch_backend({}) == "auto"


def test_every_locked_version_has_digests() -> None:
    pins = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line]
    hashed = re.findall(r"^([^\s#]+==[^\s\\]+)( \\\n)?", (ROOT / "requirements.hashes").read_text(), re.M)
    digests = {lock.normalized(pin) + "==" + pin.split("==")[1]: bool(more) for pin, more in hashed}
    for pin in pins:
        name, version = lock.normalized(pin), pin.split("==")[1]
        assert digests[f"{name}=={version}"] or name in lock.ANY_BUILD, f"{pin}: run python .ci/lock.py"


def test_files_for_other_platforms_are_left_out() -> None:
    kept = [
        "a-1-py3-none-any.whl",
        "a-1.tar.gz",
        "a-1-cp312-cp312-manylinux_2_28_x86_64.whl",
        "a-1-cp39-abi3-win_amd64.whl",
        "a-1-py3-none-manylinux_2_12_x86_64.musllinux_1_1_x86_64.whl",
    ]
    left = [
        "a-1-cp314-cp314-manylinux_2_28_x86_64.whl",
        "a-1-cp312-cp312-musllinux_1_2_x86_64.whl",
        "a-1-cp312-cp312-win32.whl",
        "a-1-cp313-cp313t-macosx_11_0_arm64.whl",
        "a-1-pp311-pypy311_pp73-win_amd64.whl",
    ]
    assert [name for name in [*kept, *left] if lock.fits(name)] == kept
