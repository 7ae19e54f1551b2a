"""Whether results in outs/ belong to the present params.yaml and to each other, by what dvc.lock records."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.checkout.worktree import dvc_cache
from stages.params.assignments import flat_values
from stages.params.schema import Params

MAX_SHOWN = 3
"""Most changed values that a warning names."""


def warn_if_stale(params: Params, paths: Paths, stage: str) -> bool:
    """Print a warning to standard error if the result of a stage is older than params.yaml or than its inputs.

    Args:
        params: Values of params.yaml.
        paths: Paths of the checkout.
        stage: The stage whose result is about to be shown.

    Returns:
        Whether a warning was printed.
    """
    reasons = list(find_stale(params, paths, stage))
    for reason in reasons:
        print(f"warning: {reason}", file=sys.stderr)
    if reasons:
        print(f"warning: what follows is of the earlier run; `sft {stage}` makes it anew", file=sys.stderr, flush=True)
    return bool(reasons)


def find_stale(params: Params, paths: Paths, stage: str) -> Iterator[str]:
    """Yield why the result of a stage does not belong to params.yaml or to the results before it.

    Without a dvc.lock, or if the stage is not in it, nothing is known, and nothing is yielded.
    """
    lock = read_lock(paths.root / "dvc.lock")
    if stage not in lock:
        return
    needed = upstream(lock, stage)
    now = params.model_dump(exclude_unset=True)
    for name in needed:
        then = lock[name].get("params", {}).get("params.yaml", {})
        before = flat_values({key: value for key, value in then.items() if key in now})
        after = flat_values({key: now[key] for key in then if key in now})
        changed = [key for key in {**after, **before} if before.get(key) != after.get(key)]
        if changed:
            shown = [f"{key} was {before.get(key)!r} and is {after.get(key)!r} now" for key in changed[:MAX_SHOWN]]
            more = f", and {len(changed) - MAX_SHOWN} more" if len(changed) > MAX_SHOWN else ""
            yield f"outs/{name} is older than params.yaml: {', '.join(shown)}{more}"
    made = {out["path"]: str(out["md5"]) for name in needed for out in lock[name].get("outs", [])}
    for name in needed:
        for dep in lock[name].get("deps", []):
            out = next((out for out in made if dep["path"] == out or dep["path"].startswith(f"{out}/")), None)
            if out is not None and _digest_within(paths.root, out, made[out], dep["path"]) not in (None, dep["md5"]):
                yield (
                    f"outs/{name} was made from an earlier {dep['path']}, which has changed since: the stage `{name}` "
                    "has not succeeded with the present one"
                )
                break


def read_lock(path: Path) -> dict[str, Any]:
    """Return the stages of a dvc.lock by name; none if it is missing or can't be read."""
    try:
        return dict(YAML(typ="safe").load(path.read_text(encoding="utf-8"))["stages"])
    except (OSError, YAMLError, KeyError, TypeError, ValueError):
        return {}


def upstream(lock: Mapping[str, Any], stage: str) -> list[str]:
    """Return a stage and those whose outs it reads, directly or not, in the order of the file."""
    makers = {out["path"]: name for name, entry in lock.items() for out in entry.get("outs", [])}
    found: set[str] = set()
    waiting = [stage]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        for dep in lock[name].get("deps", []):
            waiting += [maker for out, maker in makers.items() if f"{dep['path']}/".startswith(f"{out}/")]
    return [name for name in lock if name in found]


def _digest_within(root: Path, out: str, digest: str, path: str) -> str | None:
    """Return the digest of a file or folder inside an out, from DVC's list of the out's files; None if it is unknown.

    Args:
        root: The checkout.
        out: Path of the out.
        digest: Its digest.
        path: Path of the out, or inside it.
    """
    if path == out:
        return digest
    listing = dvc_cache(root) / "files" / "md5" / digest[:2] / digest[2:]
    if not listing.is_file():
        return None
    within = path.removeprefix(f"{out}/")
    files = {entry["relpath"]: str(entry["md5"]) for entry in read_json(listing)}
    if within in files:
        return files[within]
    inside = {name.removeprefix(f"{within}/"): md5 for name, md5 in files.items() if name.startswith(f"{within}/")}
    return folder_digest(inside)


def folder_digest(files: Mapping[str, str]) -> str:
    """Return DVC's digest of a folder.

    Args:
        files: MD5 of each file by its path in the folder.
    """
    entries = [{"md5": files[name], "relpath": name} for name in sorted(files)]
    return hashlib.md5(json.dumps(entries, sort_keys=True).encode()).hexdigest() + ".dir"
