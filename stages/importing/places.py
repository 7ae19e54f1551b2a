"""Files of other projects: their configurations, and where their data lies."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

MAX_BYTES = 4 << 20
TEMPLATE_FILE = "data/chat_template.jinja"
HELD_OUT = 20
"""Held-out rows where the source has none, since the pipeline measures every model on some."""

FORMATS_OF_FILES = ("json", "jsonl", "csv", "parquet", "text", "arrow")
"""Names under which `datasets.load_dataset` reads files."""

ENDINGS = (".json", ".jsonl", ".csv", ".parquet", ".txt", ".arrow", ".gz", ".zst", ".tsv")


def is_local(path: str) -> bool:
    """Return whether a data set is a file or folder of this machine, rather than an id on the hub."""
    return path.startswith((".", "/", "~", "data/", "$")) or path.endswith(ENDINGS) or path.count("/") > 1


def local_path(path: str) -> str:
    """Return the place in data/ for a file."""
    plain = path.removeprefix("./")
    if plain.startswith("data/") and ".." not in plain.split("/"):
        return plain
    return f"data/{PurePosixPath(path).name}"


def read_yaml(file: Path) -> dict[str, Any]:
    """Read a YAML or JSON file with a mapping.

    Raises:
        ValueError: It does not exist, is not valid, or holds something else.
    """
    try:
        if file.stat().st_size > MAX_BYTES:
            raise ValueError(f"{file}: more than {MAX_BYTES} bytes; this is not a configuration")
        yaml = YAML(typ="safe", pure=True)
        yaml.allow_duplicate_keys = True  # as the other projects read it; the last value counts in PyYAML
        values = yaml.load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: a mapping of options is needed, found {type(values).__name__}")
    return {str(key): value for key, value in values.items()}
