"""Names in params.yaml that become paths, filters or identifiers, checked by the rules of where they are used.

The rules of MLflow are those of `mlflow.utils.validation`, which takes seconds to import; a test compares both.
"""

from __future__ import annotations

import re
from typing import Any

from stages.checkout.redaction import redact

MAX_NAME, MAX_PART = 256, 255
"""Characters of a name in MLflow's database, and bytes of one part of a path."""

_ALLOWED = re.compile(r"[\w .+,=@()&-]+")
_REVISION = re.compile(r"(?!/|-)(?!.*(?:\.\.|//|@\{|\.lock$|/\.|[/.]$))[^\s~^:?*\[\\\x00-\x1f\x7f]+")


def check_no_secret(value: Any) -> Any:
    """Return a value of params.yaml, and check that no text in it is or contains a secret.

    Raises:
        ValueError: One does: a password or signature in a URL, or a token.
    """
    if isinstance(value, str):
        if redact(value, {}) != value:
            raise ValueError(
                "the secret in this value would be recorded wherever params.yaml is (git, DVC, MLflow). Remove it, and "
                "set it in the environment: the URL of a source may contain ${SFT_SECRET_NAME}, which that variable "
                "fills in; MLflow reads MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, PostgreSQL reads "
                "PGPASSWORD, the hub reads HF_TOKEN"
            )
    elif isinstance(value, dict):
        for name, part in value.items():
            check_no_secret(name)
            check_no_secret(part)
    elif isinstance(value, (list, tuple)):
        for part in value:
            check_no_secret(part)
    return value


def check_model_name(name: str) -> str:
    """Return the name of a registered model, and check that MLflow's registry and its filters take it.

    Raises:
        ValueError: They don't.
    """
    _check_characters(name, "a registered model")
    if name in (".", ".."):
        raise ValueError("MLflow uses the name of a registered model as a part of paths; give another name")
    return name


def check_experiment_name(name: str) -> str:
    """Return the name of an experiment, and check that MLflow takes it; `/` divides it into parts.

    Raises:
        ValueError: It doesn't.
    """
    _check_characters(name.replace("/", ""), "an experiment", whole=name)
    if ".." in name.split("/"):
        raise ValueError("`..` would lead out of the folder of the artifacts; give another name")
    return name


def check_experiment_folder(name: str) -> None:
    """Check that the name of an experiment is that of a folder: in a local store, its artifacts lie in one.

    Raises:
        ValueError: It is not.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") or part != part.strip() for part in parts):
        raise ValueError(
            f"experiment {name!r} is the folder of its artifacts in mlartifacts/, and no part of it may be empty, `.` "
            "or `..`, or begin or end with a space"
        )
    if any(len(part.encode()) > MAX_PART for part in parts):
        raise ValueError(f"experiment: a part of the name has more than {MAX_PART} bytes, too many for a folder")


def _check_characters(name: str, what: str, whole: str | None = None) -> None:
    whole = name if whole is None else whole
    if whole != whole.strip() or not name:
        raise ValueError(f"the name of {what} must have a letter, and no space at its beginning or end")
    if not _ALLOWED.fullmatch(name):
        wrong = sorted({letter for letter in name if not _ALLOWED.fullmatch(letter)})
        allowed = "letters, digits, spaces and . _ - + , = @ & ( )" + (" and /" if what == "an experiment" else "")
        raise ValueError(
            f"the name of {what} can't contain {' '.join(map(repr, wrong[:5]))}, which end paths, filters or markup; "
            f"use {allowed}"
        )
    if len(whole) > MAX_NAME:
        raise ValueError(f"the name of {what} has {len(whole)} characters; MLflow stores {MAX_NAME}")


def check_repository(name: str) -> str:
    """Return the id of a repository or data set on the hub, and check that the hub takes it.

    Raises:
        ValueError: It doesn't.
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id  # needed by few runs

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"not an id on the hub, such as owner/name: {error}") from None
    return name


def check_revision(name: str | None) -> str | None:
    """Return a branch, tag or commit, and check that git takes the name.

    Raises:
        ValueError: It doesn't.
    """
    if name is not None and not _REVISION.fullmatch(name):
        raise ValueError("not a name of a branch, tag or commit (`git check-ref-format` has the rules)")
    return name
