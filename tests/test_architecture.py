"""The house rules that no linter can say: rooms, what dvc.yaml states of the code, names, docstrings.

Who may import whom is kept by import-linter's contracts in pyproject.toml.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

import sft
from flows.processes import environment
from stages.__main__ import STAGES, TOOLS, home
from stages.checkout.paths import Paths
from stages.launch import ray
from stages.pages.page import TEMPLATES
from stages.params.schema import Params
from stages.training.checkpoints import fingerprint_files

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("sft", "stages", "flows")
MAX_MODULES = 12
# Their effect reaches a stage only through values that DVC tracks anyway (params, paths of outs): a new option of one
# stage must not invalidate the results of the others. Or they only hide messages or refuse files.
PLUMBING = {
    "stages",
    "stages.__main__",
    "stages.tools.check",
    "stages.checkout.code",
    "stages.params.schema",
    "stages.checkout.paths",
    "stages.progress",
    "sft",
    "sft.log_noise",
    "sft.models.values",
    "sft.web",
}
# `train` prepares the rows of a stream by the code of earlier stages, which write a digest of it into their outs.
STREAMING = "stages.streaming."
# Where else a stage reads its params; other modules read only what decides nothing of the result.
OWN_PARTS = {"train": (ROOT / "stages/training/setup.py",)}
# Names of MLflow tags and Prefect events, which look like modules.
TAGS = {
    "sft.manifest_sha256",
    "sft.nightly.promoted",
    "sft.out_of_memory",
    "sft.progress",
    "sft.weights",
    "sft.weights_dvc",
    "sft.weights_out",
}


@functools.cache
def modules(*floors: str) -> dict[str, Path]:
    """Dotted name -> file of every module on these floors."""
    found = {}
    for floor in floors:
        for path in sorted((ROOT / floor).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imported_names(path: Path) -> tuple[str, ...]:
    """Every module that a file imports, at the top or inside a function; `from a import b` gives a and a.b."""
    return tuple(_imported(path))


def _imported(path: Path) -> Iterator[str]:
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@functools.cache
def first_party(path: Path) -> frozenset[str]:
    return frozenset(name for name in imported_names(path) if name in modules(*FLOORS))


def reachable(name: str) -> set[str]:
    """A module and all first-party modules that it needs, directly or not."""
    seen: set[str] = set()
    queue = [name]
    while queue:
        current = queue.pop()
        if current not in seen:
            seen.add(current)
            if current in PLUMBING:
                continue
            needed = first_party(modules(*FLOORS)[current])
            is_streaming = current.startswith(STREAMING)
            queue.extend(name for name in needed if not is_streaming or name.startswith(STREAMING))
    return seen


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in tree_of(path).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield f"{node.name}.{item.name}", item


def rooms() -> dict[str, list[Path]]:
    """Folder of code, relative to the repository -> its modules without `__init__.py`."""
    found: dict[str, list[Path]] = {}
    for path in modules(*FLOORS).values():
        files = found.setdefault(path.parent.relative_to(ROOT).as_posix(), [])
        if path.name != "__init__.py":
            files.append(path)
    return found


def loaded_by(code: str) -> set[str]:
    """Names of the packages and modules that a fresh Python process has loaded after it ran `code`."""
    script = f"{code}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_there_is_code_to_check() -> None:
    counts = {floor: len(modules(floor)) for floor in FLOORS}
    assert all(count >= 5 for count in counts.values()), counts
    assert len(rooms()) >= 30


def test_no_room_is_crowded() -> None:
    assert {room: len(files) for room, files in rooms().items() if len(files) > MAX_MODULES} == {}


@pytest.mark.parametrize("room", [room for room in rooms() if room not in FLOORS])
def test_a_room_says_what_it_is_for_and_imports_nothing(room: str) -> None:
    (only,) = tree_of(ROOT / room / "__init__.py").body
    assert isinstance(only, ast.Expr)
    assert ast.get_docstring(tree_of(ROOT / room / "__init__.py"))
    for page in ("README.md", "docs/house.md"):
        assert f"`{room}/`" in (ROOT / page).read_text(encoding="utf-8"), f"{page} does not name {room}/"


def test_flows_never_import_torch() -> None:
    names = list(modules("flows"))
    loaded = loaded_by(f"import {', '.join(names)}")
    assert set(names) <= loaded
    assert loaded & {"torch", "transformers", "datasets", "peft", "accelerate", "bitsandbytes"} == set()


def test_what_params_flows_and_pages_read_loads_no_torch() -> None:
    names = [
        "sft",
        "sft.data.records",
        "sft.evaluate.gate",
        "sft.evaluate.intervals",
        "sft.evaluate.lm_eval",
        "sft.evaluate.tasks",
        "sft.export.quantization",
        "sft.models.checkpoint",
        *(name for name in modules("stages") if name.startswith(("stages.params", "stages.checkout"))),
        "stages.tracking.store",
        "stages.tracking.lineage",
        "stages.tracking.result",
        "stages.tracking.champion",
        "stages.tracking.trials",
        "stages.pages.page",
        "stages.pages.promotion",
        "stages.pages.model_card",
        "stages.launch.lock",
    ]
    loaded = loaded_by(f"import {', '.join(names)}")
    assert set(names) <= loaded
    assert loaded & {"torch", "transformers"} == set()


def test_a_text_training_does_not_load_the_code_for_images() -> None:
    loaded = loaded_by("import stages.train, sft.train.trainer, sft.train.images")
    assert "sft.train.trainer" in loaded
    assert [name for name in loaded if name.startswith("sft.vision")] == []


def test_every_public_name_and_command_has_a_module() -> None:
    assert sft.__all__ == sorted(sft.__all__)
    assert [name for name in sft.__all__ if getattr(sft, name, None) is None] == []
    assert [name for name in (*STAGES, *TOOLS) if home(name) not in modules("stages")] == []


def test_places_that_modules_find_from_their_own_file() -> None:
    assert environment.ROOT == ROOT
    assert ray._CODE == ROOT
    assert (TEMPLATES / "report.html.jinja").is_file()
    assert sorted(path.name for path in fingerprint_files(Paths(ROOT)) if path.is_relative_to(ROOT / "stages")) == [
        "__init__.py",
        *sorted(path.name for path in rooms()["stages/training"]),
        "train.py",
    ]


def test_modules_that_prose_names_exist() -> None:
    """Docstrings, messages and pages name code as `sft.room.module.name`; after a move such a name must follow."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *modules(*FLOORS).values()]
    wrong = []
    for path in pages:
        for named in re.findall(r"`((?:sft|stages|flows)(?:\.\w+)+)`", path.read_text(encoding="utf-8")):
            parts = named.split(".")
            while parts and ".".join(parts) not in modules(*FLOORS):
                parts.pop()
            target: object = importlib.import_module(".".join(parts)) if ".__main__" not in named else None
            for attribute in named.split(".")[len(parts) :]:
                target = getattr(target, attribute, None)
            if target is None and named not in TAGS:
                wrong.append(f"{path.relative_to(ROOT)}: {named}")
    assert wrong == []


def test_no_drawer_for_odds_and_ends() -> None:
    drawers = {"utils", "helpers", "common", "misc"}
    assert [name for name in modules(*FLOORS) if name.split(".")[-1] in drawers] == []


def test_ignored_label_has_one_name() -> None:
    wrong = []
    for name, path in modules(*FLOORS).items():
        for node in ast.walk(tree_of(path)):
            bare = (
                isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant) and node.operand.value == 100
            )
            if bare and name != "sft.labels":
                wrong.append(f"{name}:{node.lineno}")
    assert wrong == []


def test_nothing_is_left_open() -> None:
    open_ends = re.compile(r"TODO|FIXME|XXX")
    wrong = []
    for name, path in modules(*FLOORS).items():
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if open_ends.search(line):
                wrong.append(f"{name}:{number}")
    assert wrong == []


def test_every_public_function_says_what_it_does() -> None:
    wrong = []
    for name, path in modules(*FLOORS).items():
        if ast.get_docstring(tree_of(path)) is None and path.read_text(encoding="utf-8").strip():
            wrong.append(name)
        for function, node in functions(path):
            if not any(part.startswith("_") for part in function.split(".")) and ast.get_docstring(node) is None:
                wrong.append(f"{name}.{function}")
    assert wrong == []


def dvc_stages() -> dict[str, dict]:
    return YAML(typ="safe", pure=True).load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]


def test_a_stage_has_one_name_in_four_places() -> None:
    assert list(dvc_stages()) == list(STAGES)
    assert [name for name in Params.model_fields if name != "model"] == list(STAGES)
    assert all((ROOT / "stages" / f"{verb}.py").is_file() for verb in STAGES)
    assert all((ROOT / "tests" / "stages" / f"test_{verb}.py").is_file() for verb in STAGES)


@pytest.mark.parametrize("verb", STAGES)
def test_dvc_deps_list_the_code_that_a_stage_uses(verb: str) -> None:
    used = {modules(*FLOORS)[name].relative_to(ROOT).as_posix() for name in reachable(f"stages.{verb}") - PLUMBING}
    listed = [dep for dep in dvc_stages()[verb]["deps"] if dep.startswith(("sft/", "stages/", "flows/"))]
    code = [dep for dep in listed if dep.endswith(".py") or dep in rooms()]
    missing = [file for file in used if not any(file == dep or file.startswith(f"{dep}/") for dep in code)]
    assert [file for file in missing if not file.endswith("__init__.py")] == []
    for dep in code:
        under = [file for file in used if file == dep or file.startswith(f"{dep}/")]
        assert under, f"{verb} uses nothing of {dep}"
        if dep in rooms():
            assert 2 * len(set(under) - {f"{dep}/__init__.py"}) > len(rooms()[dep]), f"{verb} uses little of {dep}"
    assert [dep for dep in listed if not (ROOT / dep).exists()] == []


def test_dvc_yaml_can_be_read_in_one_go() -> None:
    assert len((ROOT / "dvc.yaml").read_text(encoding="utf-8").splitlines()) <= 335


@pytest.mark.parametrize("verb", STAGES)
def test_dvc_params_list_the_sections_that_a_stage_reads(verb: str) -> None:
    read = set()
    for path in (ROOT / "stages" / f"{verb}.py", *OWN_PARTS.get(verb, ())):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "params":
                read.add(node.attr)
    sections = read & set(Params.model_fields)
    listed = dvc_stages()[verb]["params"]
    assert sections, f"stages/{verb}.py reads no section of params"
    whole_file = any(isinstance(item, dict) for item in listed)
    assert whole_file or set(listed) == sections


@pytest.mark.parametrize("verb", STAGES)
def test_a_stage_reads_only_what_earlier_stages_wrote(verb: str) -> None:
    earlier: set[str] = set()
    for name, stage in dvc_stages().items():
        if name == verb:
            break
        earlier |= {
            next(iter(out)) if isinstance(out, dict) else out
            for out in stage.get("outs", []) + stage.get("metrics", [])
        }
    inputs = [dep for dep in dvc_stages()[verb]["deps"] if dep.startswith(("outs/", "reports/"))]
    assert [dep for dep in inputs if not any(dep == out or dep.startswith(out + "/") for out in earlier)] == []
