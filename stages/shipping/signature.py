"""Signatures of shipped folders, as OpenSSF Model Signing defines them, by its own package `model-signing`."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from stages.checkout.foreign_text import for_terminal
from stages.shipping.manifest import NOT_SHIPPED, SIGNATURE

KEY_VARIABLE, PASSWORD_VARIABLE = "SFT_SIGNING_KEY", "SFT_SIGNING_KEY_PASSWORD"
"""Environment variables with the path of the private key and its password. Neither is ever recorded."""


def signing_key() -> Path | None:
    """Return the file of the private key that the environment names; None if it names none.

    Raises:
        ValueError: There is no such file, or the package is not installed.
    """
    named = os.environ.get(KEY_VARIABLE)
    if not named:
        return None
    _check_installed(KEY_VARIABLE)
    key = Path(named).expanduser()
    if not key.is_file():
        raise ValueError(
            f"{KEY_VARIABLE} names a key that does not exist; give a file with an elliptic-curve key (PEM)"
        )
    return key


def sign(folder: Path, key: Path) -> None:
    """Sign all files of a folder, its manifest included.

    Raises:
        ValueError: The key can't be used.
    """
    from model_signing import signing

    password: Any = os.environ.get(PASSWORD_VARIABLE, "").encode() or None  # cryptography wants bytes
    try:
        config = signing.Config().use_elliptic_key_signer(private_key=str(key), password=password)
    except (ValueError, TypeError) as error:  # the message of a wrong password is a TypeError without one
        raise ValueError(
            f"{KEY_VARIABLE}: the key can't be used ({type(error).__name__}); it must be an elliptic-curve key in PEM, "
            f"and {PASSWORD_VARIABLE} its password if it has one"
        ) from None
    config.set_hashing_config(_hashing()).sign(str(folder), str(folder / SIGNATURE))


def check_signature(folder: Path, public_key: Path) -> str:
    """Compare a folder with its signature.

    Args:
        folder: A shipped folder.
        public_key: Public key of the signer (PEM).

    Returns:
        What is wrong; empty if every file is as it was signed by this key.

    Raises:
        ValueError: The public key can't be used, or the package is not installed.
    """
    _check_installed("--key")
    from model_signing import verifying

    if not (folder / SIGNATURE).is_file():
        return f"there is no signature ({SIGNATURE})"
    if not public_key.is_file():
        raise ValueError(f"--key {public_key}: there is no such file")
    try:
        config = verifying.Config().use_elliptic_key_verifier(public_key=str(public_key))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"--key {public_key}: not a public elliptic-curve key in PEM ({type(error).__name__})"
        ) from None
    try:
        config.verify(str(folder), str(folder / SIGNATURE))
    except Exception as error:  # the file is from elsewhere, and the package raises many kinds
        return for_terminal(" ".join(str(error).split())[:500]) or type(error).__name__
    return ""


def _hashing() -> Any:
    """Return what is signed: every file but the signature and what git and the hub's client add."""
    from model_signing import hashing

    config = hashing.Config().use_file_serialization(allow_symlinks=True).set_allow_symlinks(True)
    return config.set_ignored_paths(paths=[SIGNATURE, *NOT_SHIPPED])


def _check_installed(what: str) -> None:
    # model-signing 1.1 imports OpenSSL without naming it among its requirements
    if any(find_spec(name) is None for name in ("model_signing", "OpenSSL")):
        raise ValueError(f"{what} needs packages; type `pip install model-signing pyopenssl`, or leave {what} out")
