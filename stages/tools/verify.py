"""`sft verify`: check that outs/ or a shipped folder is as recorded, or that an engine answers as evaluated."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.checkout.worktree import dvc_cache
from stages.params.schema import Params
from stages.shipping.inspection import inspect_folder
from stages.tools.freshness import folder_digest

MAX_SHOWN = 10
"""Most files that are listed per out."""


@dataclass(frozen=True)
class Verdict:
    """What became of one recorded out.

    Args:
        stage: The stage that writes it.
        path: Its path, relative to the checkout.
        state: same, changed or missing.
        files: Files of a folder that differ, if the cache has the recorded list of its files.
    """

    stage: str
    path: str
    state: str
    files: list[str]


def run(
    params: Params | None,
    paths: Paths,
    *,
    folder: str | None = None,
    key: str | None = None,
    engine: str | None = None,
    model: str | None = None,
    as_json: bool = False,
) -> int:
    """Print a line per out, or what a shipped folder is, or how far an engine's answers are the evaluated ones.

    Args:
        params: Values of params.yaml; read with an engine alone.
        paths: Paths of the checkout.
        folder: A shipped folder; None = the outs of the checkout.
        key: Public key that the folder must be signed with.
        engine: Engine to ask the held-out prompts: transformers, vllm or llama_cpp.
        model: Model that it serves: merged, quantized, gguf or adapter; None = the shipped one.
        as_json: Whether to print JSON.

    Returns:
        Exit code: 0 if all files are as recorded, else 1; 0 with an engine that answered.

    Raises:
        ValueError: There is no readable dvc.lock, no readable manifest in the folder, or the engine can't
            serve the model.
    """
    if folder is not None and engine is not None:
        raise ValueError("--engine asks a model of this checkout; leave the folder out")
    if folder is not None:
        return verify_shipped(Path(folder), None if key is None else Path(key), as_json=as_json)
    if key is not None:
        raise ValueError("--key checks the signature of a shipped folder; name the folder, too")
    if engine is not None and params is not None:
        from stages.engines import verify as engine_answers  # imports torch, which comparing files needs not

        return engine_answers.run(params, paths, engine, model, as_json=as_json)
    if model is not None:
        raise ValueError("--model is for --engine: name the engine that serves the model")
    return verify_checkout(paths, as_json=as_json)


def verify_shipped(folder: Path, key: Path | None, *, as_json: bool = False) -> int:
    """Print what a shipped folder was made of, and every file that differs from its manifest; return the exit code."""
    found = inspect_folder(folder, key)
    print(json.dumps(found.as_json(), indent=2) if as_json else "\n".join(found.lines()), flush=True)
    return 0 if found.is_sound else 1


def verify_checkout(paths: Paths, *, as_json: bool = False) -> int:
    """Print a line per out of dvc.lock; return the exit code."""
    verdicts = list(verify(paths.root))
    is_sound = all(verdict.state == "same" for verdict in verdicts)
    if as_json:
        print(json.dumps({"same": is_sound, "outs": [asdict(verdict) for verdict in verdicts]}, indent=2))
        return 0 if is_sound else 1
    for verdict in verdicts:
        print(f"  {verdict.state:<9}{verdict.path}")
        for name in verdict.files[:MAX_SHOWN]:
            print(f"             {name}")
        if len(verdict.files) > MAX_SHOWN:
            print(f"             and {len(verdict.files) - MAX_SHOWN} more")
    num_wrong = sum(verdict.state != "same" for verdict in verdicts)
    if is_sound:
        print(f"  all {len(verdicts)} outs are as dvc.lock records them")
    else:
        print(f"  {num_wrong} of {len(verdicts)} outs are not as dvc.lock records them; `dvc checkout` restores them")
    return 0 if is_sound else 1


def verify(root: Path) -> Iterator[Verdict]:
    """Yield a verdict for each out and metrics file in dvc.lock, by the content of its files.

    Raises:
        ValueError: dvc.lock is missing or can't be read.
    """
    file = root / "dvc.lock"
    try:
        stages = YAML(typ="safe").load(file.read_text(encoding="utf-8"))["stages"]
        outs = [(name, out["path"], str(out["md5"])) for name, entry in stages.items() for out in entry.get("outs", [])]
    except FileNotFoundError:
        raise ValueError(f"{file} is missing: the pipeline has not run here yet; type `sft repro`") from None
    except (YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} can't be read: it is not a lock file of DVC ({error!r:.100})") from None
    for stage, name, digest in outs:
        path = root / name
        if not path.exists():
            yield Verdict(stage, name, "missing", [])
        elif not digest.endswith(".dir"):
            yield Verdict(stage, name, "same" if md5(path) == digest else "changed", [])
        else:
            yield _verify_folder(root, stage, name, digest)


def _verify_folder(root: Path, stage: str, name: str, digest: str) -> Verdict:
    """Compare a folder with its digest, which is that of the sorted list of its files and their digests."""
    path = root / name
    present = {file.relative_to(path).as_posix(): md5(file) for file in path.rglob("*") if file.is_file()}
    if folder_digest(present) == digest:
        return Verdict(stage, name, "same", [])
    listing = dvc_cache(root) / "files" / "md5" / digest[:2] / digest[2:]
    if not listing.is_file():
        return Verdict(stage, name, "changed", [])
    recorded = {entry["relpath"]: entry["md5"] for entry in read_json(listing)}
    wrong = [
        f"{file}: {'missing' if file not in present else 'not recorded' if file not in recorded else 'changed'}"
        for file in sorted(present.keys() | recorded.keys())
        if present.get(file) != recorded.get(file)
    ]
    return Verdict(stage, name, "changed", wrong)


def md5(path: Path) -> str:
    """Return the MD5 of a file, by which DVC knows it."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "md5").hexdigest()
