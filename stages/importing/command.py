"""`sft import`: params.yaml from the configuration of another project, and a table of what became of each key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sft.folders import partial_file
from stages.checkout.paths import Paths
from stages.importing import axolotl, llamafactory, trl, unsloth
from stages.importing.draft import Draft, Effect, Row, apply_rules, share
from stages.importing.places import read_yaml
from stages.params.assignments import apply_overrides, parse_assignments
from stages.params.schema import ParamsError, check_params
from stages.params.text import neutral_values, overlay, params_text

PEERS = ("axolotl", "llamafactory", "trl", "unsloth")


def run(
    paths: Paths,
    *,
    peer: str,
    source: Sequence[str],
    dataset_info: str | None = None,
    processes: int = 1,
    force: bool = False,
    as_json: bool = False,
    assignments: Sequence[str] = (),
) -> None:
    """Write params.yaml and print the table.

    Args:
        paths: The folder that gets params.yaml.
        peer: Name of the other project.
        source: The configuration's file; for trl, also a command line.
        dataset_info: LLaMA-Factory's dataset_info.json.
        processes: Number of GPUs that train together.
        force: Whether an existing params.yaml is replaced.
        as_json: Whether to print JSON.
        assignments: Values of `--set`, in the place of the imported ones.

    Raises:
        ValueError: The configuration can't be read or is not of supervised fine-tuning, a value is not valid, or
            params.yaml exists.
    """
    if paths.params.exists() and not force:
        raise ValueError(
            f"{paths.params} exists; state --force to replace it, or --root FOLDER to write into another folder"
        )
    draft = import_configuration(peer, list(source), dataset_info=dataset_info, processes=processes)
    text = as_params(draft)
    if assignments:
        text = apply_overrides(text, parse_assignments(assignments), source="the imported params.yaml with --set")
    for name in draft.files:
        if (paths.root / name).exists() and not force:
            raise ValueError(f"{paths.root / name} exists, and the import would write it; state --force to replace it")
    for name, content in {**draft.files, "params.yaml": text}.items():
        file = paths.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial_file(file) as partial:
            partial.write_text(content, encoding="utf-8")
    if as_json:
        print(json.dumps(as_values(draft), indent=2, ensure_ascii=False, default=str))
    else:
        print("\n".join(report(draft)))


def import_configuration(peer: str, source: list[str], *, dataset_info: str | None = None, processes: int = 1) -> Draft:
    """Read the configuration of another project.

    Raises:
        ValueError: It can't be read, or is not of supervised fine-tuning.
    """
    if not source:
        raise ValueError(f"sft import {peer}: name the configuration's file")
    if dataset_info is not None and peer != "llamafactory":
        raise ValueError(f"--dataset-info is for llamafactory alone, not for {peer}")
    file = Path(source[0])
    if peer == "trl":
        return trl.read(source, processes)
    if len(source) > 1:
        raise ValueError(f"sft import {peer} takes one file, not {len(source)}: {' '.join(source)}")
    if peer == "unsloth":
        return unsloth.read(file, processes)
    values = read_yaml(file)
    if peer == "axolotl":
        axolotl.check_task(values)
        draft = Draft("Axolotl", values, processes, defaults=axolotl.DEFAULTS)
        apply_rules(draft, axolotl.RULES)
        axolotl.finish(draft)
        return draft
    draft = Draft("LLaMA-Factory", values, processes, defaults=llamafactory.DEFAULTS)
    llamafactory.fill(draft, file, None if dataset_info is None else Path(dataset_info))
    return draft


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Return values by dotted keys as sections."""
    result: dict[str, Any] = {}
    for key, value in flat.items():
        *parents, last = key.split(".")
        section = result
        for parent in parents:
            section = section.setdefault(parent, {})
        section[last] = value
    return result


def as_params(draft: Draft) -> str:
    """Return the text of params.yaml.

    Raises:
        ValueError: The values do not fit together; the message has the reason.
    """
    values = overlay(overlay(neutral_values(), nested(draft.defaults)), nested(draft.values))
    values["merge"] = {**values["merge"], **merge_values(values["model"]["dtype"])}
    try:
        check_params(values, source=f"params.yaml, made of {draft.peer}'s configuration")
    except ParamsError as error:
        raise ValueError(str(error)) from None
    return params_text(values)


def merge_values(dtype: str) -> dict[str, Any]:
    """Return the merged checkpoint's data type and tolerance for a base model's data type."""
    return {"dtype": dtype, "tolerance": 1e-3 if dtype == "float32" else 0.5}


def as_values(draft: Draft) -> dict[str, Any]:
    """Return what became of each key, for JSON."""
    return {
        "peer": draft.peer,
        "keys": [
            {
                "key": row.key,
                "value": row.value,
                "effect": row.effect.value,
                "written": dict(row.written),
                "note": row.note,
            }
            for row in draft.rows
        ],
        "share": share(draft.rows),
        "files": ["params.yaml", *draft.files],
        "hints": draft.hints,
        "defaults": {key: value for key, value in draft.defaults.items() if key not in draft.values},
    }


def report(draft: Draft) -> list[str]:
    """Return the table as lines of text, the keys that need a look first."""
    order = (Effect.UNSUPPORTED, Effect.NEAREST, Effect.SAME, Effect.IRRELEVANT)
    lines = []
    for effect in order:
        rows = [row for row in draft.rows if row.effect is effect]
        if rows:
            lines += [f"{effect.value} ({len(rows)})", *_table(rows), ""]
    missing = {key: value for key, value in draft.defaults.items() if key not in draft.values}
    if missing:
        lines.append(f"not stated there, so {draft.peer}'s default")
        lines += [f"  {key}: {_shown(value)}" for key, value in missing.items()]
        lines.append("")
    for hint in dict.fromkeys(draft.hints):
        lines.append(f"note: {hint}")
    written = ", ".join(["params.yaml", *draft.files])
    lines.append(
        f"wrote {written}: {share(draft.rows):.0%} of {len(draft.rows)} keys have the same effect or are irrelevant. "
        "Next: sft check"
    )
    return lines


def _table(rows: Iterable[Row]) -> list[str]:
    shown = [(f"{row.key}: {_shown(row.value)}", _became(row)) for row in rows]
    width = min(52, max(len(left) for left, _ in shown))
    return [f"  {left:<{width}}  {right}".rstrip() for left, right in shown]


def _became(row: Row) -> str:
    parts = [f"{key}: {_shown(value)}" for key, value in row.written.items()]
    return "; ".join([*parts, *([row.note] if row.note else [])])


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = " ".join(str(text).split())
    return text if len(text) <= 60 else f"{text[:57]}..."
