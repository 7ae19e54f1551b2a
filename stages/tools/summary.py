"""`sft summary`: print the figures of the last run and where its results are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.pages.verdict import read_results
from stages.params.figures import EQUAL_ANSWERS, VERDICTS, all_figures
from stages.params.schema import Params
from stages.tools.freshness import find_stale, read_lock, warn_if_stale


def run(params: Params, paths: Paths, *, as_json: bool = False) -> None:
    """Print the figures of every model, the outcome of the gate, and the places of report, metrics and pages.

    Args:
        params: Values of params.yaml.
        paths: Paths of the checkout.
        as_json: Whether to print JSON.

    Raises:
        ValueError: The pipeline has not run in this checkout yet.
    """
    file = paths.out("evaluate", "results.json")
    if not file.exists():
        raise ValueError(f"{file} is missing: the pipeline has not run here yet; type `sft repro`")
    results = read_results(paths)
    if as_json:
        print(json.dumps(as_values(results, params, paths), indent=2, ensure_ascii=False))
        return
    warn_if_stale(params, paths, "evaluate")
    print(
        "\n".join(
            [
                "",
                *table(all_figures(results), ["loss", "token_accuracy", *results["figures"], EQUAL_ANSWERS, "size_mb"]),
                "",
                *gate_lines(results),
                *promotion_lines(paths),
                "",
                *places(params, paths),
            ]
        )
    )


def as_values(results: dict[str, Any], params: Params, paths: Paths) -> dict[str, Any]:
    """Return the values for JSON.

    `stale` lists why the result is older than params.yaml or than its inputs; it is empty for a present one.
    """
    promotion = paths.out("publish", "promotion.json")
    return {
        "passed": results["passed"],
        "gate": results["gate"],
        "models": all_figures(results),
        "figures": results["figures"],
        "promotion": read_json(promotion) if promotion.exists() else None,
        "report": str(newest_report(paths)),
        "model": str(shipped_model(params, paths)),
        "stale": list(find_stale(params, paths, "evaluate")),
    }


def shipped_model(params: Params, paths: Paths) -> Path:
    """Return the folder of the model that is shipped: the quantized one, if there is one."""
    return paths.out("quantize" if params.quantize.method != "none" else "merge", "model")


def newest_report(paths: Paths) -> Path:
    """Return the report, or the page of `evaluate` while `publish` has not completed it."""
    lock, page = read_lock(paths.root / "dvc.lock"), paths.evaluation_page.relative_to(paths.root).as_posix()
    files = [*lock.get("evaluate", {}).get("outs", ()), *lock.get("publish", {}).get("deps", ())]
    is_of_earlier_page = len({file["md5"] for file in files if file["path"] == page}) > 1
    return paths.report if paths.report.exists() and not is_of_earlier_page else paths.evaluation_page


def table(models: Mapping[str, Mapping[str, float]], columns: list[str]) -> list[str]:
    """Return a table with one line per model and one column per figure that any model has."""
    columns = [name for name in columns if any(name in figures for figures in models.values())]
    width = max(10, *(len(name) + 1 for name in models))
    lines = ["  " + "model".ljust(width) + "".join(name.rjust(16) for name in columns)]
    for name, figures in models.items():
        cells = [f"{figures[column]:.4g}" if column in figures else "" for column in columns]
        lines.append("  " + name.ljust(width) + "".join(cell.rjust(16) for cell in cells))
    return lines


def gate_lines(results: dict[str, Any]) -> list[str]:
    """Return a line per condition of the gate, and one with the outcome."""
    lines = [f"  {VERDICTS[row['verdict']]:<9}  {row['condition']}" for row in results["gate"]]
    verdict = "gate passed" if results["passed"] else "gate FAILED: the champion does not change"
    return [*lines, f"  {verdict}"]


def promotion_lines(paths: Paths) -> list[str]:
    """Return a line with what `publish` did with the last result that it got; none before its first run."""
    file = paths.out("publish", "promotion.json")
    return [f"  {read_json(file)['verdict']}: {file.with_suffix('.html')}"] if file.exists() else []


def places(params: Params, paths: Paths) -> list[str]:
    """Return lines with the places of report, metrics, model and pages."""
    return [
        f"  report    {newest_report(paths)}",
        "  metrics   dvc metrics show",
        f"  model     {shipped_model(params, paths)}",
        "  pages     sft ui     (Prefect and MLflow)",
    ]
