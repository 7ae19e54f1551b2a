"""A checkout in a temporary folder, with a tiny base model and the parameters that a test changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stages.checkout.artifacts import read_jsonl
from stages.checkout.paths import Paths
from stages.params.schema import Params, load_params
from tests.tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
Run = Callable[[Params, Paths], None]


def turn(question: str, answer: str) -> dict[str, Any]:
    """A row with one question and its answer."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


ROWS = [turn(f"Question {number}?", f"Answer {number}.") for number in range(20)]


class DataRoot:
    """Files of a checkout: data/, a base model, parameters; runs stages in it."""

    def __init__(self, root: Path, **tokenizer: Any) -> None:
        self.paths = Paths(root)
        self.paths.data.mkdir(parents=True)
        self.model = root / "model"
        tiny_model().save_pretrained(self.model)
        tiny_tokenizer(**tokenizer).save_pretrained(self.model)

    def write(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Write a JSON lines file below data/."""
        path = self.paths.data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def params(self, load: dict[str, Any] | None = None, format: dict[str, Any] | None = None) -> Params:
        """The shipped parameters with other values for load and format; eval rows are a fraction unless given."""
        values = load_params(ROOT / "params.yaml").model_dump()
        values["evaluate"]["test"] = values["evaluate"]["regression"]["path"] = None
        values["evaluate"]["gate"] = ["tuned.exact_match >= 0.8"]
        values["model"]["name_or_path"] = str(self.model)
        checks = values["load"]["checks"] | (load or {}).get("checks", {})
        values["load"]["rehearsal"] = None
        values["load"] |= {"sources": [{"path": "data/train.jsonl"}], "eval": {"path": None, "fraction": 0.3}} | (
            load or {}
        )
        values["load"]["checks"] = checks
        values["format"] |= format or {}
        return Params.model_validate(values)

    def rows(self, *parts: str) -> list[dict[str, Any]]:
        """Rows of an output file."""
        return list(read_jsonl(self.paths.root.joinpath("outs", *parts)))
