"""Write the pages of the documentation site into a folder: those of docs/, and those that are made from the code.

`make docs` runs it before mkdocs. Made from the code: the keys of params.yaml, the public names, and the messages.
"""

from __future__ import annotations

import ast
import html
import json
import re
import shutil
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pydantic import BaseModel  # noqa: E402
from ruamel.yaml import YAML  # noqa: E402

from stages.params.schema import Params  # noqa: E402
from stages.recipes.catalog import read_recipe, recipe_names  # noqa: E402

MADE = ("recipes.md", "params.md", "api.md", "messages.md", "benchmarks.md", "changelog.md")
"""Pages that docs/ does not have."""

ERRORS = re.compile(r"\w*(Error|Refused|Failed)$")
FINDINGS = ("Problem", "Finding")
"""What `sft check` collects: a key and a message."""

FEWEST_WORDS = 4
"""Messages with fewer words of their own are not listed."""


EXPECTED = re.compile(
    r"Hyperparameters: (.*?) Hardware: (.*?) or more\. Expected by .*?: ([\d.]+) GB per GPU, ([\d.]+) min per million"
)
"""What the comments of each recipe state."""


def write_pages(target: Path) -> None:
    """Write all pages."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "docs", target)
    for page in target.rglob("*.md"):
        page.write_text(relink(page.read_text(encoding="utf-8")), encoding="utf-8")
    sources = {"benchmarks.md": ROOT / "benchmarks" / "README.md", "changelog.md": ROOT / "CHANGELOG.md"}
    for name, source in sources.items():
        if source.exists():
            (target / name).write_text(relink(source.read_text(encoding="utf-8")), encoding="utf-8")
    (target / "recipes.md").write_text(recipes_page(), encoding="utf-8")
    (target / "params.md").write_text(params_page(), encoding="utf-8")
    (target / "api.md").write_text(api_page(), encoding="utf-8")
    (target / "messages.md").write_text(messages_page(), encoding="utf-8")


def relink(text: str) -> str:
    """Return a page with links to pages of the site, where the repository's lead to files beside docs/."""
    text = text.replace("](../benchmarks/README.md", "](benchmarks.md").replace("](../README.md", "](index.md")
    text = re.sub(r"\]\((?:\.\./)?docs/", "](", text)
    return re.sub(r"\[([^\]]+)\]\((?!https?:|#|[\w/-]+\.(?:md|png|svg))[^)]*\)", r"\1", text)


def recipes_page() -> str:
    """Return the page with all recipes, by what they train: model, method, expected memory and time, and source."""
    lines = [
        "# Choose a recipe",
        "",
        "A recipe is a params.yaml for a named model and task. Choose the task, then the largest model that fits your "
        "GPU, and change `load.sources` to your rows:",
        "",
        "```console\n$ sft init my-project --recipe qwen3.5-0.8b-extraction\n```",
        "",
        "Without a GPU, take what `sft init` writes without a recipe: a model of 135 million weights. Memory and time "
        "are what `sft estimate --offline` expects, not measured. For another model of the same family and size, add "
        "`--set model.name_or_path=ORGANISATION/NAME`. `sft recipes NAME` prints the whole file.",
        "",
    ]
    tasks: dict[str, list[tuple[float, str]]] = {}
    for name in recipe_names():
        one = read_recipe(name)
        model, _, rest = one.summary.rstrip(".").partition(": ")
        task, _, method = rest.rpartition(", ")
        notes = EXPECTED.search(" ".join(one.notes))
        assert notes is not None, f"{name} states no hardware, memory and time"
        source, hardware, memory, minutes = notes.groups()
        cells = (f"`{name}`", f"{model}, {method}", hardware, memory, minutes, _cell(source))
        tasks.setdefault(task, []).append((float(memory), f"| {' | '.join(cells)} |"))
    for task in sorted(tasks, key=str.lower):
        lines += [
            f"## {task[0].upper()}{task[1:]}",
            "",
            "| recipe | trains | GPU | GB per GPU | min per million tokens | ",
        ]
        lines[-1] += "hyperparameters |"
        lines += ["|---|---|---|---|---|---|", *(row for _, row in sorted(tasks[task])), ""]
    return "\n".join(lines)


def params_page() -> str:
    """Return the page with every key of params.yaml: its type, its value in the shipped file, and its meaning."""
    values = YAML(typ="safe").load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    lines = [
        "# Every key of params.yaml",
        "",
        "The values are those of the shipped file, which states every key. `sft schema` prints them as JSON Schema.",
        "",
    ]
    for name, field in Params.model_fields.items():
        lines += [f"## {name}", "", field.description or "", "", *_table(field.annotation, values[name], f"{name}.")]
    return "\n".join(lines)


def _table(model: Any, values: Any, prefix: str) -> list[str]:
    head = ["| key | type | value | meaning |", "|---|---|---|---|"]
    rows, parts, entries = [], [], []
    for name, field in model.model_fields.items():
        value = values.get(name) if isinstance(values, dict) else None
        key, inner = f"{prefix}{name}", _models(field.annotation)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            parts += ["", f"### {key}", "", field.description or "", "", *_table(field.annotation, value, f"{key}.")]
            continue
        shown = "" if values is None else f"`{_short(value)}`"
        kind, meaning = _type_text(field.annotation), _cell(field.description or "")
        rows.append(f"| `{key}` | {kind} | {shown} | {meaning} |")
        if inner:
            entries += ["", f"### {key}, an entry", "", *_table(inner[0], None, "")]
    return [*head, *rows, *parts, *entries, ""]


def _short(value: Any) -> str:
    text = (value if isinstance(value, str) else json.dumps(value)).replace("|", "\\|")
    return text if len(text) <= 60 else f"{text[:57]}..."


def _cell(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|").replace("{{", "&#123;&#123;")


def _models(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for member in get_args(annotation) for model in _models(member)]


def _type_text(annotation: Any) -> str:
    if annotation is None or annotation is type(None):
        return "null"
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (list, dict, tuple):
        return f"{get_origin(annotation).__name__} of {', '.join(map(_type_text, get_args(annotation)))}"
    if isinstance(annotation, types.UnionType) or "Union" in str(get_origin(annotation)):
        return " or ".join(map(_type_text, get_args(annotation)))
    if get_args(annotation):
        return _type_text(get_args(annotation)[0])
    return str(getattr(annotation, "__name__", annotation)).removesuffix("Section").removesuffix("Entry")


def api_page() -> str:
    """Return the page with the public names, which mkdocstrings fills with their docstrings."""
    import sft

    lines = ["# The library's names", "", "All are imported from `sft`.", ""]
    for name in sorted(sft.__all__):
        home = sft._HOMES.get(name)
        if home is not None:
            lines += [f"## {name}", "", f"::: sft.{home}.{name}", "    options:", "      show_root_heading: false", ""]
    return "\n".join(lines)


def messages_page() -> str:
    """Return the page with every error message: its text, with dots for values, and what was being done."""
    lines = [
        "---\nsearch:\n  boost: 4\n---\n",
        "# Messages",
        "",
        "Every error message of the library, the pipeline and the flows, to be found by the words that you see; `…` is "
        "a value. A message names the place and a way out; the line below it says what was being done.",
        "",
    ]
    for floor in ("sft", "stages", "flows"):
        for file in sorted((ROOT / floor).rglob("*.py")):
            found = list(messages(ast.parse(file.read_text(encoding="utf-8"))))
            if found:
                lines += [f"## `{file.relative_to(ROOT).as_posix()}`", ""]
                for text, doing in dict(found).items():
                    lines += [f"#### {_plain(text)}", "", _plain(doing), ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    text = re.sub(r"([\\`*_\[\]|#])", r"\\\1", " ".join(text.split()))
    return html.escape(text, quote=False).replace("{", "&#123;")


def messages(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield the messages of errors that a module raises, with the first line of the function's docstring."""
    for function in ast.walk(tree):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        doing = (ast.get_docstring(function) or "").partition("\n")[0]
        for node in ast.walk(function):
            call = node.exc if isinstance(node, ast.Raise) else node
            name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
            if (isinstance(node, ast.Raise) and ERRORS.search(name)) or name in FINDINGS:
                assert isinstance(call, ast.Call)
                given = call.args[1:] if name in FINDINGS else call.args
                text = _text(given[0]) if given else ""
                if len(re.findall(r"[a-z]{2,}", text.replace("…", " "))) >= FEWEST_WORDS:
                    yield text, doing


def _text(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) for part in node.values)
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    return "…"


if __name__ == "__main__":
    write_pages(Path(sys.argv[1]))
