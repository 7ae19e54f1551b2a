"""The model card: README.md of a published model, filled from what the stages recorded."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.pages.page import TEMPLATES
from stages.params.schema import Params
from stages.tracking import lineage

TEMPLATE = TEMPLATES / "model_card.md.jinja"
COMMIT = re.compile(r"[0-9a-f]{40}")
HEADLINES = ("loss", "perplexity", "token_accuracy", "exact_match", "field_f1", "json_valid", "stop_rate", "size_mb")


def write_card(file: Path, params: Params, paths: Paths, shipped: str, digest: str) -> None:
    """Write the card of a result.

    Args:
        file: Where to.
        params: The values that led to the result.
        paths: The checkout.
        shipped: merged or quantized: which model the card is of.
        digest: Of the result, as its MLflow run carries it.
    """
    results, base = read_json(paths.out("evaluate", "results.json")), lineage.base_model(paths)
    columns = [name for name in HEADLINES if any(name in figures for figures in results["models"].values())]
    git = lineage.git_state(paths.root)
    card = ModelCard.from_template(
        card_data(params, base, results, shipped),
        template_path=str(TEMPLATE),
        name=params.publish.registered_model,
        base=base,
        params=params,
        form=form(params, shipped),
        shipped=shipped,
        columns=columns,
        results=results,
        card=read_json(paths.out("load", "card.json")),
        digest=digest,
        commit=f"{git.commit}{' with uncommitted changes' if git.dirty else ''}" if git else "not in git",
        versions=lineage.versions(),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    card.save(file)


def card_data(params: Params, base: dict[str, Any], results: dict[str, Any], shipped: str) -> ModelCardData:
    """The head of the card, which the hub reads; the base is named where it is one of the hub's models."""
    figures = results["models"][shipped]
    return ModelCardData(
        model_name=params.publish.registered_model,
        base_model=base["name_or_path"] if COMMIT.fullmatch(base["resolved"]) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["sft", params.train.method, *([params.quantize.method] if shipped == "quantized" else [])],
        eval_results=[
            EvalResult(
                task_type="text-generation",
                dataset_type="held-out",
                dataset_name="held-out rows",
                metric_type=name,
                metric_value=figures[name],
            )
            for name in HEADLINES
            if name in figures and name != "size_mb"
        ],
    )


def form(params: Params, shipped: str) -> str:
    """In which form the weights are."""
    if shipped == "merged":
        return params.merge.dtype
    section = params.quantize
    if section.method == "gptq":
        return f"GPTQ, {section.bits} bit in groups of {section.group_size}"
    return f"{section.method} (bitsandbytes)"
