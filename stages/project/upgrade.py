"""`sft upgrade`: bring the files of a project to the installed version of the package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from stages.checkout.artifacts import write_text
from stages.checkout.code import has_own_code, write_code_digests
from stages.checkout.paths import Paths
from stages.params.schema import load_params
from stages.project.additions import add_missing
from stages.project.init import extend_gitignore, project_files
from stages.project.written import NEW, digest, managed_files, note_written, noted_digests


def run(paths: Paths, *, replace: Sequence[str] = ()) -> None:
    """Add the keys that params.yaml lacks, renew files that the owner has not changed, and print what was done.

    Args:
        paths: Paths of the project.
        replace: Names of files to renew although they were changed.

    Raises:
        ValueError: The folder is not a project of `sft init`, or `replace` names a file that is none of them.
        ParamsError: params.yaml is not valid with the added keys; all problems are listed. What is printed is done.
    """
    root = paths.root
    if has_own_code(root):
        raise ValueError(f"{root} has its own code; `git pull` brings another version of it")
    if not (root / "params.yaml").is_file() or not (root / "dvc.yaml").is_file():
        raise ValueError(f"{root} has no params.yaml and dvc.yaml; `sft init` makes a project")
    files = managed_files(project_files(None, (), no_scm=False))
    if unknown := [name for name in replace if name not in files]:
        raise ValueError(f"--replace {unknown[0]}: not one of {', '.join(files)}")
    text = (root / "params.yaml").read_text(encoding="utf-8")
    added = add_missing(text)
    lines = [f"params.yaml: {name} added, {value}" for name, value in added.values.items()]
    if added.values:
        write_text(root / "params.yaml", added.text)
    lines += _renew(root, files, replace)
    extend_gitignore(root / ".gitignore")
    write_code_digests(root)
    print("\n".join(lines or [f"{root}: all files are those of this version"]), flush=True)
    load_params(root / "params.yaml")


def _renew(root: Path, files: Mapping[str, bytes], replace: Sequence[str]) -> Iterator[str]:
    """Write new contents of files whose present ones the package wrote; yield what was done to each that differs."""
    noted, renewed = noted_digests(root), {}
    for name, content in files.items():
        path = root / name
        present = path.read_bytes() if path.is_file() else None
        if present is None or name in replace or digest(present) in (noted.get(name), digest(content)):
            renewed[name] = content
            if present != content:
                write_text(path, content.decode())
                yield f"{name}: {'written' if present is None else 'renewed'}"
        else:
            write_text(root / NEW / name, content.decode())
            yield (
                f"{name}: kept, as it was changed; compare it with {NEW}/{name}, or renew it by "
                f"`sft upgrade --replace {name}`"
            )
    note_written(root, renewed)
