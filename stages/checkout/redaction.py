"""Removal of secrets from texts that are printed or recorded: passwords in URLs, tokens and keys of the environment."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

HIDDEN = "***"
MIN_LENGTH = 8
_IN_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_SECRET_NAME = re.compile(r"(TOKEN|PASSWORD|PASSWD|SECRET|API_KEY|ACCESS_KEY|CREDENTIALS?)$", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Return whether an environment variable of this name contains a secret."""
    return _SECRET_NAME.search(name) is not None


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Replace the secrets in a text by `***`.

    Args:
        text: A text that leaves the process, such as a message, a patch or a URL.
        environment: Variables; None = those of this process. Values of variables whose names end in TOKEN, PASSWORD,
            SECRET and the like are secrets, unless they are shorter than 8 characters.
    """
    values = os.environ if environment is None else environment
    secrets = [value for name, value in values.items() if is_secret(name) and len(value) >= MIN_LENGTH]
    for secret in sorted(secrets, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _IN_URL.sub(HIDDEN, text)
