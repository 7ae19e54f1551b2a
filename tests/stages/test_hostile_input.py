"""Whatever stands in data files, params.yaml and checkpoints is read, or refused in one message."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from sft.data.records import detect_layout, normalize
from sft.data.sources import read_rows
from stages.params.schema import check_params, load_params
from stages.training.checkpoints import SEAL, seal, what_is_wrong
from tests.stages.training_root import REPO

SHIPPED = YAML(typ="safe", pure=True).load((REPO / "params.yaml").read_text(encoding="utf-8"))
TEXT = (REPO / "params.yaml").read_bytes()
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=6,
)
KEYS = [(name, key) for name, values in SHIPPED.items() for key in values]
COLUMNS = st.sampled_from(
    [
        "messages",
        "conversations",
        "prompt",
        "completion",
        "text",
        "instruction",
        "output",
        "input_ids",
        "tools",
        "answer",
    ]
)
MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content", "from", "value", "tool_calls", "train", "weight"]),
    st.one_of(JSON, st.sampled_from(["user", "assistant", "system", "human", "gpt", "tool"])),
    max_size=4,
)
ROW = st.dictionaries(COLUMNS, st.one_of(JSON, st.lists(MESSAGE, max_size=3)), max_size=4)
SUFFIXES = st.sampled_from([".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"])


def refusal(action: Callable[[], Any]) -> str:
    """What a ValueError says; empty when there is none. Any other error fails the test."""
    try:
        action()
    except ValueError as error:
        return str(error) or "nothing"
    return ""


def check_params_value(place: tuple[str, str], value: Any) -> None:
    """One value of params.yaml replaced by anything."""
    section, key = place
    changed = {**SHIPPED, section: {**SHIPPED[section], key: value}}
    said = refusal(lambda: check_params(changed))
    assert not said or said.startswith("params.yaml: 1 problem") or " problems\n" in said


def check_params_text(text: bytes) -> None:
    """Any bytes as params.yaml."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "params.yaml"
        file.write_bytes(text)
        said = refusal(lambda: load_params(file))
        assert not said or str(file) in said


def check_file(suffix: str, content: bytes) -> None:
    """Any bytes as a data file."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"rows{suffix}"
        file.write_bytes(gzip.compress(content) if suffix.endswith(".gz") and len(content) % 2 else content)
        said = refusal(lambda: [dict(row.columns) for row in read_rows(file)])
        assert not said or "rows" in said


def check_row(row: dict[str, Any]) -> None:
    """Any row as a record."""
    assert refusal(lambda: dict(normalize(row, detect_layout(row)))) != "nothing"


def check_checkpoint(content: Any, damage: bytes) -> None:
    """Anything as a checkpoint's seal, and any bytes in its place."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "optimizer.pt").write_bytes(b"state")
        seal(folder)
        assert what_is_wrong(folder) is None
        (folder / SEAL).write_text(json.dumps(content), encoding="utf-8")
        assert what_is_wrong(folder)
        (folder / SEAL).write_bytes(damage)
        assert what_is_wrong(folder)


EDITED = st.tuples(st.integers(0, len(TEXT)), st.integers(0, 40), st.binary(max_size=12)).map(
    lambda edit: TEXT[: edit[0]] + edit[2] + TEXT[edit[0] + edit[1] :]
)
LINES = st.lists(ROW, max_size=3).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
TEXTS = st.text(max_size=80).map(lambda text: text.encode("utf-8", "replace"))
CONTENT = st.one_of(st.binary(max_size=200), LINES, TEXTS)


def fuzz(examples: int) -> None:
    """All checks, each with so many examples."""
    for check, strategies in (
        (check_params_value, (st.sampled_from(KEYS), JSON)),
        (check_params_text, (st.one_of(EDITED, st.binary(max_size=60)),)),
        (check_file, (SUFFIXES, CONTENT)),
        (check_row, (ROW,)),
        (
            check_checkpoint,
            (JSON, st.binary(max_size=40)),
        ),
    ):
        settings(max_examples=examples, deadline=None)(given(*strategies)(check))()


def test_anything_is_read_or_refused() -> None:
    fuzz(examples=40)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_any_of_many_things_is_read_or_refused() -> None:
    fuzz(examples=2000)
