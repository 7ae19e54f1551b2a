"""`sft init`: write the files of a project that uses the installed package."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from sft.folders import partial_file
from stages.checkout.code import DIGESTS, FLOORS, STAGE, shipped, write_code_digests
from stages.checkout.paths import Paths
from stages.params.assignments import apply_overrides, parse_assignments
from stages.params.json_schema import schema_text
from stages.project.written import NEW, note_written
from stages.recipes.catalog import read_recipe

SCHEMA = "params.schema.json"
SCHEMA_LINE = "# yaml-language-server: $schema="

COPIED = (".dvcignore", ".dvc/config", ".dvc/.gitignore", ".dvc/plots", "data", "tasks")
"""Files and folders of the repository that a project has, too."""

NOT_COPIED = {".py": "data", ".md": "data"}
"""Suffix -> folder of files that belong to the repository only: the generator of its data and their card."""

IGNORED = (
    "__pycache__/",
    ".venv/",
    ".state/",
    ".worktrees/",
    f"/{DIGESTS}/",
    f"/{NEW}/",
    "/outs/",
    "/reports/evaluation.html",
    "/reports/report.html",
    "/reports/data.html",
    "/reports/comparison.html",
    "/reports/timings/",
    "/reports/engines/",
    "/mlflow.db*",
    "/mlruns/",
    "/mlartifacts/",
    "/dvc_plots/",
)
"""Lines of a project's .gitignore."""


def run(
    paths: Paths,
    *,
    folder: Path,
    recipe: str | None = None,
    keep: bool = False,
    git: bool = True,
    assignments: Sequence[str] = (),
) -> None:
    """Write the files of a project and print what to type next.

    Args:
        paths: Paths of the folder in which the command was typed.
        folder: Folder of the project; it may exist, and may be in a git repository.
        recipe: Name of a recipe, whose params.yaml takes the place of the example's.
        keep: Whether files that exist already are left as they are, instead of refusing.
        git: Whether to make a git repository if the folder is in none.
        assignments: Values of `--set`.

    Raises:
        ValueError: The folder has files that would be overwritten or Python packages that would hide the package's, or
            there is no such recipe.
    """
    root = (paths.root / folder).resolve()
    _refuse_packages(root)
    in_git = _in_git(root)
    files = project_files(recipe, assignments, no_scm=not in_git and not (git and shutil.which("git")))
    kept = [name for name, content in files.items() if _differs(root / name, content)]
    if kept and not keep:
        raise ValueError(
            f"{root} has {', '.join(kept)} with other content, and nothing was written; move "
            f"{'them' if kept[1:] else 'it'} away, or leave {'them' if kept[1:] else 'it'} in place by --keep"
        )
    written = [name for name in files if not (root / name).exists()]
    for name in written:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        with partial_file(root / name) as partial:
            partial.write_bytes(files[name])
    note_written(root, {name: files[name] for name in written})
    extend_gitignore(root / ".gitignore")
    if not in_git and git and shutil.which("git"):
        subprocess.run(["git", "init", "--quiet", str(root)], check=True)
    write_code_digests(root)
    print(_report(root, written, kept, recipe), flush=True)


def project_files(recipe: str | None, assignments: Sequence[str], *, no_scm: bool) -> dict[str, bytes]:
    """Return path -> content of the files of a project, except .gitignore.

    Args:
        recipe: Name of a recipe; None = the values of the repository's params.yaml.
        assignments: Values of `--set`.
        no_scm: Whether the project is in no git repository.

    Raises:
        ValueError: There is no such recipe, or a value is not valid.
    """
    files: dict[str, bytes] = {
        "params.yaml": params_text(recipe, assignments).encode(),
        "dvc.yaml": project_dvc_yaml(shipped("dvc.yaml").read_text(encoding="utf-8")).encode(),
        "prefect.yaml": project_prefect_yaml(shipped("prefect.yaml").read_text(encoding="utf-8")).encode(),
        SCHEMA: schema_text().encode(),
    }
    for name in COPIED:
        source = shipped(name)
        for path in sorted(source.rglob("*")) if source.is_dir() else [source]:
            if path.is_file() and "__pycache__" not in path.parts and NOT_COPIED.get(path.suffix) != name:
                files[(Path(name) / path.relative_to(source)).as_posix()] = path.read_bytes()
    if no_scm:
        files[".dvc/config"] = files[".dvc/config"].replace(b"[core]\n", b"[core]\n    no_scm = true\n")
    return files


def params_text(recipe: str | None, assignments: Sequence[str]) -> str:
    """Return the content of params.yaml: the repository's or that of a recipe, with the values of `--set`."""
    if recipe is None:
        text = shipped("params.yaml").read_text(encoding="utf-8").replace("make repro", "sft repro")
    else:
        text = read_recipe(recipe).text()
    text = f"{SCHEMA_LINE}{SCHEMA}\n" + text.removeprefix(f"{SCHEMA_LINE}{SCHEMA}\n")
    values = parse_assignments(assignments)
    return apply_overrides(text, values, source="params.yaml with --set") if values else text


def project_dvc_yaml(text: str) -> str:
    """Return the dvc.yaml of a project: in place of files of code, each stage depends on the digests of these.

    Args:
        text: The repository's dvc.yaml.
    """
    lines: list[str] = []
    stage, names = "", re.findall(r"^  (\w+):", text.partition("\nplots:")[0], re.MULTILINE)
    for line in text.splitlines()[1:]:
        opened = re.match(r"  (\w+):", line)
        stage = opened[1] if opened else stage
        digests = f"      - {DIGESTS}/{stage}.json"
        if not re.match(rf"      - ({'|'.join(FLOORS)})", line):
            lines.append(line)
        elif digests not in lines:
            lines.append(digests)
    start = lines.index("stages:")
    writer = [
        f"  {STAGE}:  # digests of the package's code that each stage uses; DVC runs it each time",
        f"    cmd: python -m stages {STAGE}",
        "    always_changed: true",
        "    outs:",
        *(f"      - {DIGESTS}/{name}.json: {{cache: false, persist: true}}" for name in names),
        "",
    ]
    head = [
        "# The graph: one entry per stage. The code is that of the installed package: .sft/code/STAGE.json has the",
        "# digests of the files that a stage uses, so that another version re-runs the stages whose code differs.",
    ]
    return "\n".join([*head, "stages:", *writer, *lines[start + 1 :], ""])


def project_prefect_yaml(text: str) -> str:
    """Return the prefect.yaml of a project, whose flows are modules of the installed package.

    Args:
        text: The repository's prefect.yaml.
    """
    text = text.replace("make ui", "sft ui").replace("this checkout", "this project")
    text = re.sub(r"^# For other machines.*\n", "", text, flags=re.MULTILINE)
    return re.sub(r"entrypoint: flows/(\w+)\.py:(\w+)", r"entrypoint: flows.\1.\2", text)


def _refuse_packages(root: Path) -> None:
    """Check that no Python package of the folder has the name of one of this package's, which it would hide.

    Raises:
        ValueError: There is one.
    """
    names = [floor.rstrip("/") for floor in FLOORS]
    hiding = [name for name in names if (root / name / "__init__.py").is_file() or (root / f"{name}.py").is_file()]
    if hiding:
        raise ValueError(
            f"{root} has the Python package {', '.join(hiding)}, which would hide the installed one of this name; make "
            "the project in a folder of its own, such as `sft init training`"
        )


def _in_git(root: Path) -> bool:
    folder = next(path for path in (root, *root.parents) if path.is_dir())
    if shutil.which("git") is None:
        return False
    command = ["git", "-C", str(folder), "rev-parse", "--is-inside-work-tree"]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def _differs(path: Path, content: bytes) -> bool:
    return path.exists() and not (path.is_file() and path.read_bytes() == content)


def extend_gitignore(path: Path) -> None:
    """Append the lines that a .gitignore lacks."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    missing = [line for line in IGNORED if line not in text.splitlines()]
    if missing:
        with partial_file(path) as partial:
            partial.write_text(text + ("\n" if text and not text.endswith("\n") else "") + "\n".join([*missing, ""]))


def _report(root: Path, written: list[str], kept: list[str], recipe: str | None) -> str:
    """Return what was written and what to type next."""
    values = "the example" if recipe is None else f"the recipe {recipe}"
    here = root == Path.cwd()
    return "\n".join(
        [
            f"{root}: {len(written)} files written, params.yaml with {values}",
            *(f"  kept as it was: {name}" for name in kept),
            "",
            *([] if here else [f"  cd {shlex.quote(os.path.relpath(root))}"]),
            "  sft check          # what is wrong with params.yaml, the data and this machine",
            "  sft repro          # run what is not up to date",
            "",
            "Your own data: put a file into data/ and name it in params.yaml, load.sources.",
        ]
    )
