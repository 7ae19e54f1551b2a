"""Results of DVC's run cache that take the place of those a dvc.lock from elsewhere names.

If nothing of a stage has changed since dvc.lock, DVC restores the outs that dvc.lock names, or else runs the stage; it
does not look into its run cache. A dvc.lock of another processor names outs with other roundings, so that a training
would be repeated although its result on this processor is in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sft.folders import partial_file
from stages.checkout.artifacts import read_json


def prefer_cached_results(root: Path) -> list[str]:
    """Let dvc.lock name a result in the run cache, for each stage whose own result there is missing from the cache.

    Both have the same command, params and inputs, which dvc.lock still states. DVC then restores this result.

    Args:
        root: The checkout.

    Returns:
        A line per changed stage.
    """
    file = root / "dvc.lock"
    names = stages_without_outs(root, file)
    if not names:
        return []
    from dvc.exceptions import DvcException
    from dvc.repo import Repo
    from dvc.utils.serialize import dump_yaml

    found: dict[str, Any] = {}
    try:
        with Repo(str(root)) as repo:
            for stage in repo.index.stages:
                name = getattr(stage, "name", None)
                if name not in names or stage.changed_stage() or stage.outs_cached():
                    continue
                cache = Path(repo.cache.local.path)
                for entry in _entries(repo.stage_cache, stage):
                    if all(is_cached(cache, str(out["md5"])) for out in entry["outs"]):
                        found[name] = entry
                        break
    except (DvcException, OSError):
        return []  # `dvc repro`, which follows, says what is wrong
    if not found:
        return []
    lock = YAML(typ="safe").load(file.read_text(encoding="utf-8"))
    lock["stages"] |= found
    with partial_file(file) as partial:
        dump_yaml(str(partial), lock)
    return [f"{name}: dvc.lock names a result that is not in the cache; this machine's result is" for name in found]


def is_cached(cache: Path, digest: str) -> bool:
    """Return whether DVC's cache has a file, or a folder with all its files.

    Args:
        cache: The folder `files/md5` of the cache.
        digest: Digest of the file or folder.
    """
    file = cache / digest[:2] / digest[2:]
    if not file.is_file():
        return False
    return not digest.endswith(".dir") or all(is_cached(cache, str(entry["md5"])) for entry in read_json(file))


def _entries(cache: Any, stage: Any) -> Iterator[Any]:
    """Yield the results in the run cache for the command, params and inputs of a stage, newest first.

    DVC's own look-up hashes the inputs that are present. Here they are those in dvc.lock, as inputs that earlier
    stages write may not have been restored yet.

    Args:
        cache: DVC's run cache.
        stage: A stage as dvc.lock states it.
    """
    from dvc.stage.cache import _get_cache_hash
    from dvc.stage.serialize import to_single_stage_lockfile

    key = _get_cache_hash(to_single_stage_lockfile(stage), key=True)
    folder = Path(cache._get_cache_dir(key))
    files = list(folder.iterdir()) if folder.is_dir() else []
    for file in sorted(files, key=lambda file: file.stat().st_mtime, reverse=True):
        if (entry := cache._load_cache(key, file.name)) is not None:
            yield entry


def stages_without_outs(root: Path, lock: Path) -> set[str]:
    """Return the stages of which dvc.lock names an out that is neither in `outs/` nor in the default cache.

    This is a quick look without DVC, which takes a second to load. A cache elsewhere counts as one without files.
    """
    try:
        entries = YAML(typ="safe").load(lock.read_text(encoding="utf-8"))["stages"]
        cache = root / ".dvc" / "cache" / "files" / "md5"
        return {
            name
            for name, entry in entries.items()
            for out in entry.get("outs", [])
            if not (cache / str(out["md5"])[:2] / str(out["md5"])[2:]).exists()
        }
    except (OSError, YAMLError, KeyError, TypeError, AttributeError):
        return set()
