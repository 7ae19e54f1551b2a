"""The model card: README.md of a published model, filled in from the results of the stages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stages.checkout.artifacts import read_json
from stages.checkout.foreign_text import as_code, for_markdown
from stages.checkout.paths import Paths
from stages.checkout.redaction import redact
from stages.pages.page import TEMPLATES
from stages.params.figures import VERDICTS
from stages.params.schema import Params
from stages.tracking import lineage

TEMPLATE = TEMPLATES / "model_card.md.jinja"
COMMIT = re.compile(r"[0-9a-f]{40}")
HEADLINES = ("loss", "perplexity", "token_accuracy", "exact_match", "field_f1", "json_valid", "stop_rate", "size_mb")


def write_card(file: Path, params: Params, paths: Paths, shipped: str, digest: str) -> None:
    """Write the model card of a result.

    Args:
        file: File to write.
        params: Values of params.yaml that the result was computed with.
        paths: Paths of the checkout.
        shipped: The model of the card: `merged` or `quantized`.
        digest: Digest of the result, as recorded in its MLflow run.
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
        versions=lineage.versions(paths.root),
        verdicts=VERDICTS,
        text=for_markdown,
        code=as_code,
    )
    card.content = redact(card.content)
    file.parent.mkdir(parents=True, exist_ok=True)
    card.save(file)


def card_data(params: Params, base: dict[str, Any], results: dict[str, Any], shipped: str) -> ModelCardData:
    """Return the metadata of the card, which the hub reads; it names the base model if that is from the hub."""
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
    """Describe the number format of the weights."""
    if shipped == "merged":
        return params.merge.dtype
    section = params.quantize
    if section.method == "gptq":
        return f"GPTQ, {section.bits} bit in groups of {section.group_size}"
    return f"{section.method} (bitsandbytes)"
