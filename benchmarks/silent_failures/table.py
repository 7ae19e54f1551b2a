"""The page docs/silent_failures.md, made from the stored results."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.silent_failures.case import VERDICTS, Case
from benchmarks.silent_failures.cases import KINDS, load_cases

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "silent_failures.md"
LIBRARIES = ("sft", "trl", "unsloth")

CELLS = {"wrong": "**wrong**", "crash": "**crash**", "not offered": "not offered", "not run": "not run"}
"""Verdicts that are printed otherwise than by their names."""

INTRODUCTION = """# Silent failures

<!-- Written by `python -m benchmarks.silent_failures table`; edit benchmarks/silent_failures/table.py instead. -->

Inputs that some library trains wrongly without a word. Each is small: a chat template, a few rows, a random model of
two layers. Its right value is derived without the library under test: from the characters of the text, from the
model's own forward pass over single documents, or from the model in memory after training.
[benchmarks/README.md](../benchmarks/README.md#silent-failures) says how to run the suite.

| verdict | meaning |
|---|---|
| right | the library did what is right |
| refused | it raised an error, before the first update, whose message names what is wrong with the input |
| warned | it did something else, and a warning names what is wrong |
| **wrong** | it did something else and said nothing about it |
| **crash** | any other error: raised by Python itself, naming nothing of the input, or after training has begun |
| not offered | the library has no such function |

An error or a warning "names what is wrong" if it has one of the words without which a user could not know what to
change: an option, a key of a row, a token, a module. The words belong to the case and are the same for all libraries;
`benchmarks/silent_failures/case.py` has the rule, and the folder `results` every message. Where another way of using a
library avoids the fault, the verdict stays as it is, because nothing tells the user who took this way.
"""


def results_path(name: str) -> Path:
    """Return the file with the results of a library."""
    return Path(__file__).parent / "results" / f"{name}.json"


def read_results(name: str) -> dict[str, Any]:
    """Return the stored results of a library: its versions, and the result of each case."""
    return json.loads(results_path(name).read_text(encoding="utf-8"))


def write_page() -> None:
    """Write the page from the stored results."""
    PAGE.write_text(page({name: read_results(name) for name in LIBRARIES}), encoding="utf-8")


def page(results: dict[str, Any]) -> str:
    """Return the text of the page.

    Args:
        results: Content of the results by library.
    """
    cases = load_cases()
    parts = [INTRODUCTION, "## Versions and counts\n", counts(results, cases)]
    for kind, heading in KINDS.items():
        rows = [row(case, results) for case in cases.values() if case.kind == kind]
        header = f"| case | {' | '.join(LIBRARIES)} | reports |\n|---|{'---|' * (len(LIBRARIES) + 1)}"
        parts.append("\n".join([f"## {heading}\n", header, *rows]) + "\n")
    return "\n".join(parts)


def counts(results: dict[str, Any], cases: dict[str, Case]) -> str:
    """Return the table of versions, and of how often each verdict was given."""
    header = f"| library | versions | {' | '.join(VERDICTS)} |\n|---|---|{'---|' * len(VERDICTS)}"
    lines = []
    for name in LIBRARIES:
        found = Counter(verdict(results[name], case) for case in cases.values())
        versions = ", ".join(f"{package} {version}" for package, version in results[name]["versions"].items())
        lines.append(f"| {name} | {versions} | {' | '.join(str(found[verdict]) for verdict in VERDICTS)} |")
    return "\n".join([header, *lines]) + "\n"


def row(case: Case, results: dict[str, Any]) -> str:
    """Return a case's line of the table."""
    verdicts = [verdict(results[name], case) for name in LIBRARIES]
    cells = [CELLS.get(found, found) for found in verdicts]
    return f"| {case.title} | {' | '.join(cells)} | {', '.join(map(link, case.threads)) or 'none known'} |"


def verdict(result: dict[str, Any], case: Case) -> str:
    """Return a library's verdict on a case; "not run" if its results have none."""
    return result["cases"].get(case.name, {}).get("verdict", "not run")


def link(thread: str) -> str:
    """Return a Markdown link to a thread, given as `owner/repository#number`."""
    repository, number = thread.split("#")
    return f"[{repository.split('/')[1]}#{number}](https://github.com/{repository}/issues/{number})"
