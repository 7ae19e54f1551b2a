"""Check the versions in requirements.lock for known vulnerabilities with pip-audit: `python .ci/audit.py [URL]`.

Query the database first for a version with known vulnerabilities. If it is unreachable or returns none, skip the audit
with a message, because an empty result would look like a clean one.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KNOWN_TO_BE_VULNERABLE = "https://pypi.org/pypi/jinja2/3.1.4/json"  # CVE-2024-56201 and others
PATIENCE_S = 8


def main(url: str = KNOWN_TO_BE_VULNERABLE) -> int:
    """Run the audit if the database is usable; return the exit code of pip-audit, or 0 if the audit is skipped."""
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(2 * PATIENCE_S)  # DNS lookup has no timeout of its own
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            vulnerabilities = json.load(answer).get("vulnerabilities")
    except (OSError, ValueError) as error:
        vulnerabilities, why = None, f"{type(error).__name__}: {error}"
    else:
        why = "it lists no vulnerability for a version known to have some"
    signal.alarm(0)
    if not vulnerabilities:
        print(f"AUDIT SKIPPED: the vulnerability database ({url}) is not usable: {why}", flush=True)
        return 0
    lock = ["--requirement", str(ROOT / "requirements.lock"), "--no-deps", "--disable-pip"]
    command = [sys.executable, "-m", "pip_audit", *lock, "--progress-spinner", "off", "--timeout", "15"]
    return subprocess.run(command, check=False).returncode


def give_up(*_: object) -> None:
    """Raise TimeoutError, which urllib propagates to `main`."""
    raise TimeoutError(f"no answer within {2 * PATIENCE_S} s")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
