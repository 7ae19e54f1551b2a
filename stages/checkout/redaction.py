"""Secrets taken out of what is printed or recorded: passwords in URLs, tokens and keys of the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

HIDDEN = "***"
MIN_LENGTH = 8
_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_SECRET_NAME = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|API_KEY|ACCESS_KEY|CREDENTIALS?)$", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret."""
    return _SECRET_NAME.search(name) is not None


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """The text without secrets.

    Args:
        text: Anything that leaves the process: a message, a patch, an address.
        environment: Variables whose names end in TOKEN, PASSWORD, SECRET and the like hold secrets; None = this
            process's own. Values shorter than 8 characters are words rather than secrets.
    """
    values = os.environ if environment is None else environment
    secrets = [value for name, value in values.items() if is_secret(name) and len(value) >= MIN_LENGTH]
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _IN_URL.sub(HIDDEN, text)
