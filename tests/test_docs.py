"""The pages say what is true: commands, snippets, keys and links in them are checked against the code."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import click
import pytest
from pydantic import BaseModel
from ruamel.yaml import YAML

import sft
from stages.cli.commands import FLOWS, command_line
from stages.params.assignments import apply_overrides, parse_assignments
from stages.params.schema import Params, SourceSection
from stages.recipes.catalog import recipe_names
from tests.ci_scripts import script

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^( *)```(\w+)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
KEY = re.compile(rf"(?:{'|'.join(Params.model_fields)})(?:\.\w+)+")
LINK = re.compile(r"\]\(([^)\s]+)\)")
PLACEHOLDERS = re.compile(r"\b(?:A B|RUN|STAGE|SHELL|NAME|COMMAND|KEY=VALUE)\b|\[|\.\.\.|…")
NOT_KEYS = {"train.lerning_rate", "train.out_of_memory", "train.rows_a_pass", "model.sig"}
"""A misspelt key as an example, tags of runs, and a file."""


class Snippet(NamedTuple):
    """A block of code of a page."""

    page: str
    language: str
    text: str


def snippets(*languages: str) -> list[Snippet]:
    found = []
    for page in PAGES:
        for indent, language, text in FENCE.findall(page.read_text(encoding="utf-8")):
            if language in languages:
                lines = [line.removeprefix(indent) for line in text.splitlines()]
                found.append(Snippet(page.name, language, "\n".join(lines)))
    return found


def commands() -> Iterator[tuple[str, str]]:
    """Yield the page and the words of each command line of `sft`."""
    for snippet in snippets("console", "bash", "sh"):
        for line in snippet.text.splitlines():
            command = line.removeprefix("$ ").partition(" #")[0].strip()
            if command.startswith("sft "):
                yield snippet.page, re.split(r" [<|>]", command)[0]
    for page in PAGES:
        for code in CODE.findall(page.read_text(encoding="utf-8")):
            if code.startswith("sft ") and not PLACEHOLDERS.search(code) and ", " not in code:
                yield page.name, re.split(r" [<|>]", code)[0]


@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_commands_are_those_of_the_command_line(page: str) -> None:
    group = command_line(lambda *arguments, **options: 0, lambda name, arguments: 0)
    for command in (command for place, command in commands() if place == page):
        words = shlex.split(command)[1:]
        name = words[0]
        assert name in group.commands or name.startswith("-"), command
        if name in FLOWS or name.startswith("-"):
            continue
        try:
            with group.commands[name].make_context(name, words[1:]) as context:
                parse_assignments(list(context.params.get("assignments") or ()))
        except (click.exceptions.Exit, click.MissingParameter):  # --help, or a command that prose names
            continue


def test_python_snippets_are_python_and_import_what_there_is() -> None:
    for snippet in snippets("python"):
        for node in ast.walk(ast.parse(snippet.text, snippet.page)):
            if isinstance(node, ast.ImportFrom) and node.module == "sft":
                missing = {alias.name for alias in node.names} - set(sft.__all__)
                assert not missing, (snippet.page, missing)


def test_yaml_snippets_are_values_of_params_yaml() -> None:
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    checked = 0
    for snippet in snippets("yaml"):
        values = YAML(typ="safe").load(snippet.text)
        if isinstance(values, dict) and set(values) <= set(Params.model_fields):
            apply_overrides(text, values)
            checked += 1
    assert checked >= 4


def test_keys_that_pages_name_exist() -> None:
    wrong = []
    for page in PAGES:
        for code in CODE.findall(page.read_text(encoding="utf-8")):
            key = code.partition("=")[0].partition(":")[0].partition("[")[0].strip()
            if KEY.fullmatch(key) and key not in NOT_KEYS and not exists(Params, key.split(".")):
                wrong.append((page.name, code))
    assert wrong == []


def exists(model: Any, names: list[str]) -> bool:
    field = model.model_fields.get(names[0])
    if field is None or len(names) == 1:
        return field is not None
    inner = field.annotation
    models = [inner, *getattr(inner, "__args__", ())]
    sections = [one for one in models if isinstance(one, type) and issubclass(one, BaseModel)]
    return not sections or any(exists(one, names[1:]) for one in sections)


def test_links_lead_to_files_and_headings() -> None:
    for page in PAGES:
        for link in LINK.findall(page.read_text(encoding="utf-8")):
            path, _, anchor = link.partition("#")
            if link.startswith(("http://", "https://")) or path in generator().MADE:
                continue
            target = page if not path else page.parent / path
            assert target.exists(), (page.name, link)
            if anchor and target.suffix == ".md":
                titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}, link


def generator() -> ModuleType:
    return script("docs")


def test_pictures_of_masks_are_what_the_library_finds() -> None:
    drawn = script("mask_pictures").pictures()
    assert {name: (ROOT / "docs" / "masks" / name).read_text(encoding="utf-8") for name in drawn} == drawn


def test_site_has_every_page_key_name_and_message(tmp_path: Path) -> None:
    generator().write_pages(tmp_path / "pages")
    written = {file.relative_to(tmp_path / "pages").as_posix() for file in (tmp_path / "pages").rglob("*.md")}
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": ([\w-]+\.md)$", config, re.MULTILINE))
    assert listed <= written
    params = (tmp_path / "pages" / "params.md").read_text(encoding="utf-8")
    for key in ("train.lora_r", "train.launch.engine", "evaluate.gate", *SourceSection.model_fields):
        assert f"| `{key}` |" in params
    assert "::: sft.train.trainer.SFTTrainer" in (tmp_path / "pages" / "api.md").read_text(encoding="utf-8")
    recipes = (tmp_path / "pages" / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in recipe_names() if f"| `{name}` |" not in recipes] == []
    messages = (tmp_path / "pages" / "messages.md").read_text(encoding="utf-8")
    assert "no such file, and not one of the engines" in messages
