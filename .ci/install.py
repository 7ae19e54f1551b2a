"""Install the locked versions into the Python that runs this script: `python .ci/install.py [EXTRA ...]`.

uv installs them (one on PATH, else the locked one, which pip installs first): it takes a fraction of pip's time and
compares each file with the digests in requirements.hashes. Where uv fails, pip installs the same versions.
Both take the packages from the same places: what pip is told by its environment and configuration, uv is told, too.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK, HASHES = ROOT / "requirements.lock", ROOT / "requirements.hashes"
PATIENCE_S = 5
TORCH_INDEX = "https://download.pytorch.org/whl/torch/"
# A key of pip's configuration, and the variable that tells uv the same.
SAME_FOR_UV = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "cert": "SSL_CERT_FILE",
    "no-index": "UV_NO_INDEX",
}


def main(extras: list[str]) -> int:
    """Install the lock and the named extras of pyproject.toml; return the exit code."""
    wanted = ["-r", str(LOCK)]
    for extra in extras:
        wanted += ["--extra", extra]
    if extras:
        wanted += ["-r", str(ROOT / "pyproject.toml")]
    uv = uv_program()
    if uv:
        settings = uv_settings(pip_settings(), dict(os.environ))
        backend = torch_backend(settings)
        command = [uv, "pip", "install", "--python", sys.executable, "--index-strategy", "unsafe-best-match"]
        command += ["--constraints", str(HASHES), *(["--torch-backend", backend] if backend else []), *wanted]
        print("+", *command, flush=True)
        code = subprocess.run(command, env=settings, check=False).returncode
        if code == 0:
            return 0
        print(f"uv ended with {code}; trying pip", flush=True)
    requirements = [f"{ROOT}[{','.join(extras)}]", "--constraint", str(LOCK)] if extras else []
    command = [sys.executable, "-m", "pip", "install", "--progress-bar", "off", "-r", str(LOCK), *requirements]
    print("+", *command, flush=True)
    return subprocess.run(command, check=False).returncode


def uv_program() -> str | None:
    """Return uv from PATH, or install the locked one by pip; None if that fails."""
    found = shutil.which("uv")
    if found:
        return found
    locked = next((line.strip() for line in LOCK.read_text().splitlines() if line.startswith("uv==")), "uv")
    subprocess.run([sys.executable, "-m", "pip", "install", "--progress-bar", "off", locked], check=False)
    program = Path(sys.executable).parent / ("uv.exe" if os.name == "nt" else "uv")
    return str(program) if program.is_file() else None


def pip_settings() -> dict[str, str]:
    """Return what pip is told by files and variables, as `pip config list` prints it: later lines override."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    listed = subprocess.run(command, check=False, capture_output=True, text=True).stdout
    settings: dict[str, str] = {}
    for section in ("global", "install", ":env:"):
        for line in listed.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(section + "."):
                settings[name.removeprefix(section + ".")] = value.strip("'\"").replace("\\n", " ")
    return settings


def uv_settings(pip: dict[str, str], environment: dict[str, str]) -> dict[str, str]:
    """Return the environment for uv: variables of uv win over those of pip."""
    for key, variable in SAME_FOR_UV.items():
        if pip.get(key) and variable not in environment:
            # folders of wheels are separated by commas in uv's variable, indexes by spaces
            separator = "," if key == "find-links" else " "
            environment[variable] = separator.join(pip[key].split())
    return environment


def torch_backend(environment: dict[str, str]) -> str | None:
    """Return uv's `--torch-backend`: `auto` picks the build for this machine's GPU, or for its CPU.

    None, which is the build of the package index, if `UV_TORCH_BACKEND` decides, if there is a folder of wheels, or if
    the index of torch's builds can't be reached.
    """
    if environment.get("UV_TORCH_BACKEND") or environment.get("UV_FIND_LINKS") or environment.get("UV_NO_INDEX"):
        return None
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(PATIENCE_S)  # DNS lookup has no timeout of its own
    try:
        with urllib.request.urlopen(TORCH_INDEX, timeout=PATIENCE_S):
            return "auto"
    except OSError:
        return None
    finally:
        signal.alarm(0)


def give_up(*_: object) -> None:
    """Raise TimeoutError, which `torch_backend` reads as an index that can't be reached."""
    raise TimeoutError(f"no answer within {PATIENCE_S} s")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
