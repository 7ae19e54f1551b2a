"""Write requirements.hashes from requirements.lock and the extras of pyproject.toml: `python .ci/lock.py`.

The file holds, for each locked package and for what the extras add, the version and the digests of its files for the
supported versions of Python. uv compares what it downloads with them. torch and triton have none: their builds are
many, and any build of the locked version will do.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK, HASHES = ROOT / "requirements.lock", ROOT / "requirements.hashes"
INDEX = os.environ.get("UV_DEFAULT_INDEX", "https://pypi.org/simple").rstrip("/")
ANY_BUILD = {"torch", "torchvision", "triton"}
PYTHONS = ("cp311", "cp312", "cp313")
# Wheels for platforms on which torch has no builds
ELSEWHERE = re.compile(
    r"-(musllinux[\w.]*|\w*_i686[\w.]*|win32|\w*_(armv\w+|ppc64\w*|s390x|riscv64|loongarch64)|pyodide\w*|wasm\w*|ios_\w+|android_\w+)\.whl$"
    r"|-pp\d|-cp\d+t-"
)
HEAD = """# Versions of requirements.lock and of the extras, with SHA-256 of their files, for uv (--constraints).
# Written by `python .ci/lock.py`; plain pip reads requirements.lock alone.
"""


def main() -> int:
    """Resolve, fetch the digests, write the file; return 0."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    command = [str(uv), "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--python-version", "3.11"]
    command += ["--constraints", "requirements.lock", "pyproject.toml"]
    command += [part for extra in extras for part in ("--extra", extra)]
    resolved = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    pins = {normalized(line): line.strip() for line in resolved.splitlines() if "==" in line}
    pins |= {normalized(line): line.strip() for line in LOCK.read_text().splitlines() if "==" in line}
    with ThreadPoolExecutor(8) as pool:
        digests = dict(zip(pins, pool.map(digests_of, pins.values()), strict=True))
    lines = []
    for name, pin in sorted(pins.items()):
        if name in ANY_BUILD:
            lines.append(pin.split("+")[0])
        elif digests[name]:
            lines.append(" \\\n    ".join([pin, *(f"--hash=sha256:{digest}" for digest in sorted(digests[name]))]))
        else:
            raise SystemExit(f"error: {INDEX} lists no file of {pin}")
    HASHES.write_text(HEAD + "\n".join(lines) + "\n")
    print(f"{HASHES.name}: {len(lines)} packages")
    return 0


def normalized(pin: str) -> str:
    """Return a package's name as indexes spell it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", re.split(r"[=\[ ]", pin)[0]).lower()


def digests_of(pin: str) -> set[str]:
    """Return the SHA-256 of the files of one pinned version, from the index's JSON (PEP 691)."""
    name, version = normalized(pin), pin.split("==")[1].split(";")[0].strip()
    if name in ANY_BUILD:
        return set()
    request = urllib.request.Request(f"{INDEX}/{name}/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    return {
        file["hashes"]["sha256"] for file in files if version_of(file["filename"]) == version and fits(file["filename"])
    }


def version_of(filename: str) -> str:
    """Return the version in the name of a wheel or source archive."""
    if filename.endswith(".whl"):
        return filename.split("-")[1]
    return re.sub(r"\.(tar\.gz|zip|tar\.bz2|tgz)$", "", filename).rpartition("-")[2]


def fits(filename: str) -> bool:
    """Say whether a file can be installed on a supported Python and platform."""
    if not filename.endswith(".whl"):
        return True
    python, abi = filename.removesuffix(".whl").split("-")[-3:-1]
    return not ELSEWHERE.search(filename) and (abi in ("abi3", "none") or any(tag in python for tag in PYTHONS))


if __name__ == "__main__":
    sys.exit(main())
