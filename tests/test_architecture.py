"""The house rules, kept by the machine: floors, names, sizes, and what dvc.yaml says of the code."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from stages.__main__ import STAGES
from stages.params.schema import Params

ROOT = Path(__file__).resolve().parent.parent
FLOORS = ("sft", "stages", "flows")
MAX_FUNCTION_LINES, MAX_FILE_LINES, MAX_ARGUMENTS = 60, 400, 8
MAX_SIBLINGS = 6
# Signatures that users know from upstream, with all their arguments.
UPSTREAM_SIGNATURES = {
    "SFTTrainer.__init__",
    "ConstantLengthDataset.__init__",
    "DataCollatorForCompletionOnlyLM.__init__",
}
# Their effect reaches a stage only through values that DVC tracks anyway (params, paths of outs): a new option of one
# stage must not invalidate the results of the others.
PLUMBING = {
    "stages",
    "stages.__main__",
    "stages.tools.preflight",
    "stages.training.curve",  # only hands figures on to MLflow; nothing comes back
    "stages.params.schema",
    "stages.params.load_params",
    "stages.params.evaluate_params",
    "stages.params.section",
    "stages.checkout.paths",
    "sft",
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
            queue.extend(first_party(modules(*FLOORS)[current]))
    return seen


def functions(path: Path) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for node in tree_of(path).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node.name, node
        elif isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    yield f"{node.name}.{item.name}", item


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    docstring = ast.get_docstring(node, clean=False)
    first = node.body[0]
    spent = (first.end_lineno or 0) - first.lineno + 1 if docstring is not None else 0
    return (node.end_lineno or 0) - node.lineno + 1 - spent


def test_there_is_code_to_check() -> None:
    counts = {floor: len(modules(floor)) for floor in FLOORS}
    assert all(count >= 5 for count in counts.values()), counts


@pytest.mark.parametrize(("floor", "forbidden"), [("sft", {"stages", "flows"}), ("stages", {"flows"})])
def test_imports_point_down_only(floor: str, forbidden: set[str]) -> None:
    wrong = [
        (name, up)
        for name, path in modules(floor).items()
        for up in imported_names(path)
        if up.split(".")[0] in forbidden
    ]
    assert wrong == []


def test_library_knows_no_orchestration() -> None:
    outside = {"yaml", "ruamel", "dvc", "prefect", "mlflow"}
    wrong = [
        (name, up)
        for name, path in modules("sft").items()
        for up in imported_names(path)
        if up.split(".")[0] in outside
    ]
    assert wrong == []


def test_nothing_uses_the_trl_package() -> None:
    everywhere = modules(*FLOORS)
    assert [
        name for name, path in everywhere.items() if any(up.split(".")[0] == "trl" for up in imported_names(path))
    ] == []


def test_flows_never_import_torch() -> None:
    heavy = {"torch", "transformers", "datasets", "peft", "accelerate", "sft"}
    wrong = []
    for name in modules("flows"):
        for needed in reachable(name):
            wrong += [
                (name, needed, up)
                for up in imported_names(modules(*FLOORS)[needed])
                if up.split(".")[0] in heavy - {"sft"}
            ]
    assert wrong == []


def test_a_stage_never_imports_a_stage() -> None:
    verbs = {f"stages.{verb}" for verb in STAGES}
    wrong = [(name, up) for name in verbs for up in first_party(modules("stages")[name]) if up in verbs]
    assert wrong == []


def test_library_has_no_import_cycle() -> None:
    graph = {name: first_party(path) - {name} for name, path in modules("sft").items()}
    done: set[str] = set()
    while left := {name: needs - done for name, needs in graph.items() if name not in done}:
        ready = {name for name, needs in left.items() if not needs}
        assert ready, f"cycle among {sorted(left)}"
        done |= ready


def test_only_the_trainer_knows_many_siblings() -> None:
    counts = {name: len(first_party(path) - {name, "sft"}) for name, path in modules("sft").items()}
    assert {
        name: count
        for name, count in counts.items()
        if count > MAX_SIBLINGS and name not in ("sft.train.trainer", "sft")
    } == {}


def test_functions_and_files_stay_readable() -> None:
    wrong = []
    for name, path in modules(*FLOORS).items():
        num_lines = len(path.read_text(encoding="utf-8").splitlines())
        if num_lines > MAX_FILE_LINES:
            wrong.append(f"{name}: {num_lines} lines")
        for function, node in functions(path):
            if code_lines(node) > MAX_FUNCTION_LINES:
                wrong.append(f"{name}.{function}: {code_lines(node)} lines")
            num_arguments = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
            num_arguments -= bool(node.args.args) and node.args.args[0].arg in ("self", "cls")
            if num_arguments > MAX_ARGUMENTS and function not in UPSTREAM_SIGNATURES:
                wrong.append(f"{name}.{function}: {num_arguments} arguments")
    assert wrong == []


def test_no_function_is_defined_inside_a_function() -> None:
    wrong = []
    for name, path in modules(*FLOORS).items():
        for function, node in functions(path):
            inner = [
                n for n in ast.walk(node) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef)) and n is not node
            ]
            wrong += [f"{name}.{function}.{n.name}" for n in inner]
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
    open_ends = re.compile(r"TODO|FIXME|XXX|NotImplementedError|pragma: no cover")
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
def test_dvc_deps_list_the_modules_that_a_stage_uses(verb: str) -> None:
    files = {modules(*FLOORS)[name] for name in reachable(f"stages.{verb}") - PLUMBING}
    expected = sorted(path.relative_to(ROOT).as_posix() for path in files)
    listed = sorted(dep for dep in dvc_stages()[verb]["deps"] if dep.endswith(".py"))
    assert listed == expected


@pytest.mark.parametrize("verb", STAGES)
def test_dvc_params_list_the_sections_that_a_stage_reads(verb: str) -> None:
    read = set()
    for node in ast.walk(tree_of(ROOT / "stages" / f"{verb}.py")):
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


def test_the_map_in_the_readme_names_every_module_and_nothing_else() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = text.split("## Map")[1].split("```")[1]
    listed, folder = set(), ""
    for line in tree.strip().splitlines():
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
        assert (ROOT / folder / name if line.startswith(" ") else ROOT / name).exists(), f"{folder}{name} is not there"
        listed.add(f"{folder}{name}" if line.startswith(" ") else name)
    modules_here = {path.relative_to(ROOT).as_posix() for path in modules(*FLOORS).values() if path.stat().st_size}
    empty_or_obvious = {"stages/__init__.py", "flows/__init__.py"}
    assert modules_here - empty_or_obvious - listed == set()
