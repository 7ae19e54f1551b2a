"""The report: one self-contained page with figures, training curves, answers and lineage of a model."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from stages.checkout.artifacts import file_digest, read_json, read_jsonl, write_text
from stages.checkout.paths import Paths
from stages.checkout.redaction import redact
from stages.pages.answers import PER_PAGE, read_answers
from stages.pages.charts import Series, heat_strip, line_chart
from stages.pages.forgotten import forgotten
from stages.pages.page import (
    NBSP,
    Section,
    ledger_summary,
    percent,
    render_page,
    render_section,
    rows_sentence,
    show,
    show_change,
    show_interval,
)
from stages.pages.verdict import read_results, verdict
from stages.params.figures import REGRESSION, figure_of, in_order
from stages.params.schema import Params
from stages.tracking import lineage

TEMPLATE = "report.html.jinja"

PLACES = ("<!-- link to the section of publish -->", "<!-- section of publish -->")
"""Where `publish` adds a link and a section to the page, after the promotion."""

LOSS, GRADIENT_NORM = "Loss", "Gradient norm"

CHARTS = (
    (LOSS, [("train", "loss", "a"), ("held-out", "eval_loss", "b")]),
    ("Token accuracy", [("train", "mean_token_accuracy", "a"), ("held-out", "eval_mean_token_accuracy", "b")]),
    ("Load-balancing loss of the experts", [("train", "aux_loss", "a"), ("held-out", "eval_aux_loss", "b")]),
    ("Learning rate", [("", "learning_rate", "a")]),
    (GRADIENT_NORM, [("", "grad_norm", "a")]),
)

LOGARITHMIC = (LOSS, GRADIENT_NORM)
"""Charts whose y axis is logarithmic if the values span more than a factor of ten."""

BY_CONSTRUCTION = ("kl",)
"""Figures that are not ranked: the merged model's divergence from the tuned one is 0 by construction."""

MAX_BAD_UPDATES = 50

OF_SOURCE = "eval_loss/source/"
"""Beginning of the columns of the curve with the loss on held-out rows of one source."""

MAX_SOURCES = 4
"""Sources of which the report draws a curve; curve.csv has all."""

SAMPLE = "sample_"
"""Beginning of the columns of the curve that are about answers while the model trained."""


def write_evaluation_page(params: Params, paths: Paths) -> None:
    """Build the page from the outs of all stages up to `evaluate`; `publish` completes it (`since_champion.py`)."""
    write_text(paths.evaluation_page, render_page(TEMPLATE, context(params, paths)))


def context(params: Params, paths: Paths) -> dict[str, Any]:
    """Return the values that the template shows."""
    results = read_results(paths)
    return {
        "title": str(lineage.base_model(paths)["name_or_path"]).removeprefix("embedded:"),
        "method": params.train.method,
        "verdict": verdict(results),
        "results": results,
        "sections": [section for make in SECTIONS if (section := make(params, paths)) is not None],
        "places": [Markup(place) for place in PLACES],
    }


def figures_section(params: Params, paths: Paths) -> Section:
    """Return the section with the figures of all models and the paired tests."""
    results = read_json(paths.out("evaluate", "results.json"))
    shown = {
        "results": results,
        "table": comparison(results),
        "changes": [changes(pair) for pair in results["comparisons"]],
    }
    return render_section("figures", "Before and after", "report/figures.html.jinja", shown)


def engines_section(params: Params, paths: Paths) -> Section | None:
    """Return the section with the figures of the serving engines; None if none was asked."""
    results = read_json(paths.out("evaluate", "results.json"))
    engines = results.get("engines", {})  # older results lack it
    if not engines:
        return None
    speeds = read_json(paths.timings("evaluate"))
    shown = {
        "table": comparison({**results, "models": {name: engine["figures"] for name, engine in engines.items()}}),
        "engines": engines,
        "speeds": {name: speeds[name] for name in engines},
    }
    return render_section("engines", "Serving engines", "report/engines.html.jinja", shown)


def promotion_section(params: Params, paths: Paths) -> Section:
    """Return the section that says what `publish` will do with the result."""
    results = read_json(paths.out("evaluate", "results.json"))
    return render_section("promotion", "Promotion", "report/promotion.html.jinja", {"passed": results["passed"]})


def training_section(params: Params, paths: Paths) -> Section:
    """Return the section with the curves, what was trained, the shipped step, the samples, and the bad updates."""
    shown = {
        "curves": curves(paths),
        "selection": selection(paths),
        "effect": effect(paths),
        "weights": weights(paths),
        "bad_updates": bad_updates(paths),
    }
    return render_section("training", "Training", "report/training.html.jinja", shown)


def samples_section(params: Params, paths: Paths) -> Section | None:
    """Return the section with the answers to a few held-out prompts while the model trained; None if there are none."""
    file = paths.out("train", "samples.jsonl")
    rows = [without_secrets(row) for row in (read_jsonl(file) if file.exists() else ())]
    if not any(row["answers"] for row in rows):
        return None
    shown = {
        "rows": [{**row, "answers": changed_answers(row["answers"])} for row in rows],
        "charts": sample_charts(paths),
    }
    return render_section("samples", "Answers while it trained", "report/samples.html.jinja", shown)


def answers_section(params: Params, paths: Paths) -> Section:
    """Return the section with the answers of all models to held-out and general prompts."""
    general = paths.out("evaluate", "general.jsonl")
    shown = {
        "results": read_json(paths.out("evaluate", "results.json")),
        "generations": read_answers(paths.out("evaluate", "generations.jsonl")),
        "general": read_answers(general) if general.exists() else None,
        "per_page": PER_PAGE,
    }
    return render_section("answers", "Answers", "report/answers.html.jinja", shown)


def forgotten_section(params: Params, paths: Paths) -> Section | None:
    """Return the section with the general prompts that the tuned model answers worse than the base model."""
    file = paths.out("evaluate", "general.jsonl")
    found = forgotten(read_jsonl(file)) if file.exists() else None
    if found is None:
        return None
    results = read_json(paths.out("evaluate", "results.json"))
    losses = {name: figures.get(f"{REGRESSION}loss") for name, figures in results["models"].items()}
    return render_section("forgotten", "What it forgot", "report/forgotten.html.jinja", {**found, "losses": losses})


def quantization_section(params: Params, paths: Paths) -> Section:
    """Return the section with the error of every quantized layer."""
    quantization = layer_errors(read_json(paths.out("quantize", "report.json")))
    return render_section("quantization", "Quantization", "report/quantization.html.jinja", quantization)


def data_section(params: Params, paths: Paths) -> Section:
    """Return the section with the sources of the rows and the summary of the ledgers."""
    return render_section("data", "Data", "report/data.html.jinja", data_facts(paths))


def lineage_section(params: Params, paths: Paths) -> Section:
    """Return the section with commit, base model, hashes, versions and params."""
    facts = lineage_facts(params, paths)
    return render_section("lineage", "Lineage", "report/lineage.html.jinja", facts)


SECTIONS: tuple[Callable[[Params, Paths], Section | None], ...] = (
    figures_section,
    engines_section,
    promotion_section,
    training_section,
    samples_section,
    answers_section,
    forgotten_section,
    quantization_section,
    data_section,
    lineage_section,
)
"""The sections of the report in their order. One that has nothing to show returns None and is left out."""


def comparison(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the before/after table: one per metric, with a cell per model."""
    models, intervals = results["models"], results["intervals"]
    rows = []
    for metric in in_order({name for figures in models.values() for name in figures}):
        label, kind, direction = figure_of(metric)
        if metric.removeprefix(REGRESSION) in BY_CONSTRUCTION:
            direction = 0
        base = _bounds(models.get("base", {}).get(metric), intervals.get("base", {}).get(metric))
        cells = []
        for name, figures in models.items():
            value, interval = figures.get(metric), intervals.get(name, {}).get(metric)
            mark = "" if name == "base" else compared_with_base(_bounds(value, interval), base, direction)
            cells.append(comparison_cell(value, interval, kind, mark))
        rows.append({"label": label, "cells": cells, "better": {1: "more", -1: "less"}.get(direction, "")})
    return rows


def _bounds(value: float | None, interval: Sequence[float] | None) -> Sequence[float] | None:
    """Return the interval of a value; that of an exact value is the value itself."""
    return None if value is None else interval or (value, value)


def compared_with_base(bounds: Sequence[float] | None, base: Sequence[float] | None, direction: int) -> str:
    """Return `better` or `worse` if the interval of a figure lies apart from that of the base model, else ``."""
    if bounds is None or base is None or not direction:
        return ""
    more, less = bounds[0] > base[1], bounds[1] < base[0]
    return "better" if (more, less)[direction < 0] else "worse" if (less, more)[direction < 0] else ""


def comparison_cell(value: float | None, interval: Sequence[float] | None, kind: str, mark: str) -> dict[str, str]:
    """Return a cell: the value as text, its interval as text, and whether it is better or worse than the base's."""
    if value is None:
        return {"text": "–", "interval": "", "mark": ""}
    small = f"{show(interval[0], kind).removesuffix(NBSP + '%')}–{show(interval[1], kind)}" if interval else ""
    return {"text": show(value, kind), "interval": small, "mark": mark}


def changes(pair: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of two models compared row by row: each figure's difference, its interval and its p-value.

    A difference is marked as better or worse if its p-value is below 0.05.
    """
    rows = []
    for metric in in_order(set(pair["figures"])):
        label, kind, direction = figure_of(metric)
        test = pair["figures"][metric]
        difference, (low, high) = test["difference"], test["interval"]
        certain = test["p_value"] < 0.05
        rows.append(
            {
                "label": label,
                "difference": show_change(difference, kind),
                "interval": show_interval(low, high, kind),
                "p_value": "< 0.001" if test["p_value"] < 0.001 else f"{test['p_value']:.3f}",
                "test": test["test"],
                "mark": ("yes" if difference * direction > 0 else "no") if certain and direction else "",
            }
        )
    return {"before": pair["before"], "after": pair["after"], "rows": rows}


def curves(paths: Paths) -> list[Markup]:
    """Draw loss, accuracy, learning rate, gradient norm and throughput over the steps, as far as they were recorded."""
    with paths.out("train", "curve.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    drawn = []
    for title, lines in CHARTS:
        series = [Series(name, points(rows, column), css) for name, column, css in lines]
        if any(s.points for s in series):
            drawn.append(line_chart(title, series, may_be_log=title in LOGARITHMIC))
    of_sources = [name for name in (rows[0] if rows else ()) if name.startswith(OF_SOURCE)][:MAX_SOURCES]
    if of_sources:
        colours = "abcd"
        series = [
            Series(name.removeprefix(OF_SOURCE), points(rows, name), colours[number])
            for number, name in enumerate(of_sources)
        ]
        drawn.insert(1, line_chart("Loss on held-out rows by source", series))
    speed = throughput(paths)
    return [*drawn, line_chart("Tokens per second", [Series("", speed, "a")])] if speed else drawn


def points(rows: Iterable[Mapping[str, str]], column: str) -> list[tuple[float, float]]:
    """Return `(step, value)` of the rows of the curve that have a value in a column."""
    return [(float(row["step"]), float(row[column])) for row in rows if row.get(column)]


def throughput(paths: Paths) -> list[tuple[float, float]]:
    """Return `(step, tokens per second)`, or nothing if the timings are those of another training.

    Timings are not outs: when DVC restores a training from its cache, the file is that of the last training here.
    """
    file = paths.timings("train")
    timings = read_json(file) if file.exists() else {}
    if timings.get("curve_sha256") != file_digest(paths.out("train", "curve.csv")):
        return []
    return [(float(step), float(speed)) for step, speed in timings["throughput"]]


def weights(paths: Paths) -> list[dict[str, Any]]:
    """Return the rows of the table that shows which share of each kind of weight training has changed."""
    file = paths.out("train", "weights.json")
    kinds = read_json(file) if file.exists() else {}
    return [
        {
            "kind": kind,
            "weights": f"{counts['weights']:,}",
            "share": percent(counts["reached"] / counts["weights"]) if counts["weights"] else "–",
            "trained": f"{counts['trained']:,}",
        }
        for kind, counts in kinds.items()
    ]


def selection(paths: Paths) -> str:
    """Return a sentence on the step that was shipped, beside the last one; older trainings have recorded nothing."""
    file = paths.out("train", "selection.json")
    if not file.exists():
        return ""
    chosen = read_json(file)
    ended = f"step {chosen['last_step']} of {chosen['max_steps']}"
    metric, last = chosen["metric"], chosen["last_value"]
    early = f"Training stopped early after {ended}. " if chosen["stopped_early"] else ""
    if metric is None:
        return f"{early}Shipped: the last step, {chosen['step']}."
    better = "highest" if chosen["higher_is_better"] else "lowest"
    kind = figure_of(metric).kind
    value = f"{metric} {show(chosen['value'], kind)}, the {better} of {len(chosen['evaluations'])} evaluations"
    if chosen["step"] == chosen["last_step"]:
        return f"{early}Shipped: the last step, {chosen['step']} ({value})."
    of_last = "" if last is None else f" ({metric} {show(last, kind)})"
    return f"{early}Shipped: step {chosen['step']} ({value}). The last step was {chosen['last_step']}{of_last}."


def without_secrets(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a prompt with the answers of all steps, with secrets replaced."""
    texts = {name: redact(row[name]) for name in ("prompt", "reference")}
    return {**row, **texts, "answers": [{**each, "text": redact(each["text"])} for each in row["answers"]]}


def changed_answers(answers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return answers in the order of their steps; equal ones that follow each other are one, with its steps."""
    found: list[dict[str, Any]] = []
    for answer in answers:
        scores = ", ".join(
            f"{name.replace('_', ' ')} {show(value, figure_of(name).kind)}" for name, value in answer["scores"].items()
        )
        if found and (found[-1]["text"], found[-1]["scores"]) == (answer["text"], scores):
            found[-1]["last"] = answer["step"]
        else:
            kept = {name: answer[name] for name in ("text", "stopped")}
            found.append({**kept, "scores": scores, "first": answer["step"], "last": answer["step"]})
    return found


def sample_charts(paths: Paths) -> list[Markup]:
    """Draw the figures of these answers over the steps."""
    with paths.out("train", "curve.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = [column for column in (rows[0] if rows else ()) if column.startswith(SAMPLE)]
    titles = [(column, figure_of(column.removeprefix(SAMPLE)).label) for column in columns]
    return [line_chart(title, [Series("", points(rows, column), "b")]) for column, title in titles]


def effect(paths: Paths) -> dict[str, Any]:
    """Return modules left untrained, and where the loss stood still; older trainings have recorded nothing."""
    file = paths.out("train", "effect.json")
    return read_json(file) if file.exists() else {"untrained": [], "flat_loss": None}


def bad_updates(paths: Paths) -> dict[str, Any]:
    """Return the number of updates with a non-finite or spiking loss or gradient, and the first of them."""
    file = paths.out("train", "bad_updates.jsonl")
    found = list(read_jsonl(file)) if file.exists() else []
    return {"num": len(found), "rows": found[:MAX_BAD_UPDATES]}


def data_facts(paths: Paths) -> dict[str, Any]:
    """Return the sources with their digests, a sentence on their rows, and the summary of the ledgers."""
    card, packed = read_json(paths.out("load", "card.json")), read_json(paths.metrics("pack"))["train"]
    documents, rows, tokens, trained = (f"{packed[n]:,}" for n in ("documents", "rows", "tokens", "trained_tokens"))
    return {
        "summary": (
            f"{rows_sentence(card)} "
            f"The training rows are {documents} documents of {tokens} tokens, {trained} of them trained, "
            f"packed into {rows} rows that are {percent(packed['fill'])} full.{rehearsal_sentence(packed)}"
        ),
        "sources": card["sources"],
        "ledger": ledger_summary(paths, with_stream=True),
    }


def rehearsal_sentence(packed: Mapping[str, Any]) -> str:
    """Return a sentence on the answers of the base model among the training rows; empty if there are none."""
    if "rehearsal_documents" not in packed:
        return ""
    documents, share = packed["rehearsal_documents"], percent(packed["rehearsal_share"])
    return f" In {documents:,} of the documents the base model answers general prompts: {share} of the trained tokens."


def as_text(value: Any) -> str:
    """Format a value of params.yaml or of a card, such as `yes` for True and `none` for None."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, (list, tuple)):
        return ", ".join(as_text(item) for item in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {as_text(item)}" for key, item in value.items())
    return str(value)


def layer_errors(report: Mapping[str, Any]) -> dict[str, Any]:
    """Return the error of every quantized layer, as a strip of cells and as a table with the worst first."""
    if report["method"] == "none":
        return {"skipped": report["reason"]}
    modules = report["modules"]
    names = sorted({module["module"] for module in modules})
    blocks = sorted({module["layer"] for module in modules})
    values = {(module["module"], str(module["layer"])): module["relative_error"] for module in modules}
    before, after = (show(report[size] / 1e6, "megabytes") for size in ("source_bytes", "quantized_bytes"))
    return {
        "skipped": "",
        "summary": f"{quantization_method(report)}: {before} became {after}.",
        "strip": heat_strip("|W − Wq| / |W| by block", names, [str(block) for block in blocks], values),
        "modules": sorted(modules, key=lambda module: -module["relative_error"]),
        "mean": report["mean_relative_error"],
        "calibrated": report["method"] == "gptq",
        "num_retries": report.get("num_damping_retries", 0),
        "kept": report.get("kept_full_precision", []),
    }


def quantization_method(report: Mapping[str, Any]) -> str:
    """Describe how the model was quantized."""
    if report["method"] != "gptq":
        return f"{report['method']} (bitsandbytes), without calibration"
    settings = report["settings"]
    distinct = report["num_distinct_rows"]
    same = f", of which only {distinct} are distinct" if distinct < report["num_rows"] else ""
    groups = "without groups" if settings["group_size"] == -1 else f"in groups of {settings['group_size']}"
    return (
        f"{settings['bits']} bit {groups}, calibrated on "
        f"{report['num_tokens']:,} tokens in {report['num_rows']} training rows{same}"
    )


def lineage_facts(params: Params, paths: Paths) -> dict[str, Any]:
    """Return commit, base model, hashes, versions and params of the result."""
    git = lineage.git_state(paths.root)
    return {
        "commit": git.commit if git else "not in git",
        "changed": list(git.changed) if git else [],
        "trusted": params.model.trust_remote_code,
        "base": [(key.replace("_", " "), as_text(value)) for key, value in lineage.base_model(paths).items()],
        "hashes": list(lineage.dvc_data_hashes(paths.root).items()),
        "versions": list(lineage.versions(paths.root).items()),
        "params": [(name, as_text(value)) for name, value in lineage.result_params(params).items()],
    }
