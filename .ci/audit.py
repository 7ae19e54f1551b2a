"""Check the versions in requirements.lock for known vulnerabilities with pip-audit: `python .ci/audit.py [URL]`.

A database that can't be reached, or knows nothing, must not look like one that found nothing: it is first asked for a
version that is known to be weak. Without an answer the audit is skipped, and says so.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KNOWN_TO_BE_WEAK = "https://pypi.org/pypi/jinja2/3.1.4/json"  # CVE-2024-56201 and others
PATIENCE_S = 8


def main(url: str = KNOWN_TO_BE_WEAK) -> int:
    """Audit if the database answers; return the exit code of pip-audit, or 0 if the database does not answer."""
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(2 * PATIENCE_S)  # looking a name up has no timeout of its own
    try:
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
            weaknesses = json.load(answer).get("vulnerabilities")
    except (OSError, ValueError) as error:
        weaknesses, why = None, f"{type(error).__name__}: {error}"
    else:
        why = "it has no entry on a version that is known to be weak"
    signal.alarm(0)
    if not weaknesses:
        print(f"AUDIT SKIPPED: the database of weaknesses ({url}) does not answer: {why}", flush=True)
        return 0
    lock = ["--requirement", str(ROOT / "requirements.lock"), "--no-deps", "--disable-pip"]
    command = [sys.executable, "-m", "pip_audit", *lock, "--progress-spinner", "off", "--timeout", "15"]
    return subprocess.run(command, check=False).returncode


def give_up(*_: object) -> None:
    """Timeout without an answer; urllib lets it through."""
    raise TimeoutError(f"no answer within {2 * PATIENCE_S} s")


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
