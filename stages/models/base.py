"""The base model of a run: its name, the version that was found, a digest of its files, and their folder.

`load` records all of it but the folder, so that the record is the same on every machine. `read_base_model` finds the
files again and checks that they are those that were recorded.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stages.checkout.artifacts import file_digest, read_json, write_json, write_text
from stages.checkout.paths import cache_folder, main_checkout

EMBEDDED_PREFIX = "embedded:"
EMBEDDED_RECORD = ".sft-model.json"

BASE_KEY = "base_model_name_or_path"
"""Key of an adapter's config in which peft writes the folder of the base model."""

WEIGHTS_PATTERN = "*.safetensors"

MODEL_PATTERNS = (WEIGHTS_PATTERN, "*.json", "*.jinja", "*.model", "*.txt", "*.py")
"""Files that determine what a model computes and how text becomes tokens; readmes and pickled weights do not."""

HUB_IGNORED = ("*/*", "consolidated*", "*.gguf")
"""Copies of the weights in other layouts, which would be downloaded but never read."""

ACCEPT = "To use the model as it is now: dvc repro -f load"
FETCH = "To get it: dvc repro -f load"


@dataclass(frozen=True)
class BaseModel:
    """A base model that was found.

    Args:
        name_or_path: As params.yaml states it.
        revision: As params.yaml states it.
        resolved: Commit on the hub, the folder as named, or `wheel==version` of an embedded model.
        digest: SHA-256 over names and contents of its files.
        path: Folder that `from_pretrained` loads.
    """

    name_or_path: str
    revision: str | None
    resolved: str
    digest: str
    path: str

    @property
    def is_on_hub(self) -> bool:
        """Whether it came from the hub; a folder is resolved to its own name."""
        return not self.name_or_path.startswith(EMBEDDED_PREFIX) and self.resolved != self.name_or_path

    def record(self) -> dict[str, Any]:
        """Return the content of outs/load/base_model.json: all fields but the path, which differs between machines."""
        fields = asdict(self)
        del fields["path"]
        return fields


def name_base(adapter: Path, record_file: Path) -> None:
    """Name the base model in the files of a saved adapter as params.yaml does, instead of by its folder here.

    Args:
        adapter: Folder that peft saved the adapter to; nothing is done where it contains a full model.
        record_file: Path of base_model.json.
    """
    config_file, card = adapter / "adapter_config.json", adapter / "README.md"
    if not config_file.is_file():
        return
    config = json.loads(config_file.read_text(encoding="utf-8"))
    base = BaseModel(**{**read_json(record_file), "path": config[BASE_KEY]})
    config[BASE_KEY] = base.name_or_path
    if base.is_on_hub:
        config["revision"] = base.resolved
    write_text(config_file, json.dumps(config, indent=2, sort_keys=True))
    if card.is_file():
        write_text(card, card.read_text(encoding="utf-8").replace(base.path, base.name_or_path))


def embedded_folder(name: str) -> Path:
    """Return the folder of an embedded model, installed or not."""
    return cache_folder() / "models" / name.removeprefix(EMBEDDED_PREFIX)


def local_folder(name: str, root: Path) -> Path:
    """Return the folder that a name in params.yaml refers to; it need not exist.

    A run with overrides works in a git worktree, and `dvc exp run --temp` in a temporary folder; both have the
    committed files but no models. There, a relative name refers to the folder in the main checkout.

    Args:
        name: `model.name_or_path`.
        root: The checkout.
    """
    folder = (root / Path(name).expanduser()).resolve()
    return folder if folder.is_dir() else (main_checkout(root) / Path(name).expanduser()).resolve()


def read_base_model(record_file: Path) -> BaseModel:
    """Read outs/load/base_model.json, and find and verify the model's files on this machine.

    Args:
        record_file: Path of base_model.json.

    Raises:
        ValueError: The files are missing or changed; the message states how to get them back.
    """
    record = read_json(record_file)
    root = record_file.absolute().parents[2]  # not resolved, as DVC may have made the file a link into its cache
    base_model = BaseModel(**{**record, "path": str(_find(record, root))})
    verify(base_model)
    return base_model


def verify(base_model: BaseModel) -> None:
    """Check that the files are those that `load` found, so that no two stages use different models.

    Raises:
        ValueError: The files are missing, incomplete or changed; the message states how to get them back.
    """
    folder = Path(base_model.path)
    if not folder.is_dir():
        raise ValueError(f"The base model {base_model.name_or_path!r} is no longer at {folder}. {FETCH}")
    found = installed_digest(folder) if base_model.name_or_path.startswith(EMBEDDED_PREFIX) else folder_digest(folder)
    if found != base_model.digest:
        raise ValueError(
            f"The files of the base model {base_model.name_or_path!r} in {folder} changed since `load` ran: their "
            f"digest is {found[:12]}, but {base_model.digest[:12]} was recorded. {ACCEPT}"
        )


def installed_digest(folder: Path) -> str:
    """Return the digest of an installed embedded model, from the record in its folder.

    The sizes of its files are compared with the record first; their contents are not read.

    Raises:
        ValueError: A file is missing or has another size, or there is no record.
    """
    damage = installed_damage(folder)
    if damage is not None:
        raise ValueError(
            f"The cached model in {folder} is damaged: {damage}. Delete that folder and run: dvc repro -f load"
        )
    return str(json.loads((folder / EMBEDDED_RECORD).read_text(encoding="utf-8"))["digest"])


def installed_damage(folder: Path) -> str | None:
    """Describe what is wrong with an installed embedded model; None if nothing is."""
    record_file = folder / EMBEDDED_RECORD
    if not record_file.is_file():
        return f"{EMBEDDED_RECORD} is missing"
    sizes: dict[str, int] = json.loads(record_file.read_text(encoding="utf-8"))["sizes"]
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def model_files(folder: Path) -> list[Path]:
    """Return the files of a model, sorted by name, without subfolders and hidden files."""
    found = {file for pattern in MODEL_PATTERNS for file in folder.glob(pattern) if file.is_file()}
    return sorted(file for file in found if not file.name.startswith("."))


def folder_digest(folder: Path, remember: bool = True) -> str:
    """Return the SHA-256 over names and contents of a model's files.

    Hashing gigabytes in every stage would be slow, so the hash of a file is stored in the cache folder and reused as
    long as the file's size and modification time are the same.

    Args:
        folder: Folder of the model.
        remember: Whether to store new hashes in the cache folder.
    """
    memory_file = cache_folder() / "digests" / f"{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:24]}.json"
    memory: dict[str, list[Any]] = read_json(memory_file) if memory_file.is_file() else {}
    fresh: dict[str, list[Any]] = {}
    total = hashlib.sha256()
    for file in model_files(folder):
        stat = file.stat()
        stamp = [stat.st_size, stat.st_mtime_ns]
        known = memory.get(file.name, [])
        fresh[file.name] = [*stamp, known[2] if known[:2] == stamp else file_digest(file)]
        total.update(f"{fresh[file.name][2]}  {file.name}\n".encode())
    if remember and fresh != memory:
        write_json(memory_file, fresh)
    return total.hexdigest()


def _find(record: dict[str, Any], root: Path) -> Path:
    name: str = record["name_or_path"]
    if name.startswith(EMBEDDED_PREFIX):
        return embedded_folder(name)
    if record["resolved"] == name:
        return local_folder(name, root)
    return _recorded_snapshot(name, record["resolved"])


def hub_snapshot(
    repo_id: str,
    revision: str | None,
    local_files_only: bool = False,
    on_bytes: Callable[[int], None] | None = None,
) -> Path:
    """Return the folder of the hub cache with a revision's model files.

    Args:
        repo_id: Hub id.
        revision: Branch, tag or commit; None = the default branch.
        local_files_only: Whether to use only files that are in the cache, instead of downloading missing ones.
        on_bytes: Called with the number of bytes that have arrived.
    """
    from huggingface_hub import snapshot_download  # only hub models need it, and it imports slowly

    folder = snapshot_download(
        repo_id,
        revision=revision,
        allow_patterns=list(MODEL_PATTERNS),
        ignore_patterns=list(HUB_IGNORED),
        local_files_only=local_files_only,
        tqdm_class=_byte_counter(on_bytes) if on_bytes is not None else None,
    )
    return Path(folder)


def _byte_counter(on_bytes: Callable[[int], None]) -> type[Any]:
    """Return a class of invisible tqdm bars for `snapshot_download`, which report the bytes that have arrived.

    One of its bars counts what is received and one what is written; which of them moves depends on the protocol.
    """
    from tqdm import tqdm

    lock, counts = threading.Lock(), dict[int, int]()

    class ByteCounter(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            self._counts_bytes = options.get("unit") == "B"
            super().__init__(*args, **{**options, "disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            if self._counts_bytes:
                with lock:  # files are downloaded by several threads
                    counts[id(self)] = counts.get(id(self), 0) + int(n or 0)
                    on_bytes(max(counts.values()))
            return None

    return ByteCounter


def _recorded_snapshot(repo_id: str, commit: str) -> Path:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return hub_snapshot(repo_id, commit, local_files_only=True)
    except LocalEntryNotFoundError:
        raise ValueError(
            f"Commit {commit[:12]} of the base model {repo_id!r} is no longer in the hub cache. {FETCH}"
        ) from None
