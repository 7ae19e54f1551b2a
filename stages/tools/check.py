"""`python -m stages check`: params.yaml, data, own metrics and the base model's name, before DVC removes any result.

What later stages would refuse, asked before the hours of training are spent.
"""

from __future__ import annotations

from pathlib import Path

from sft.data.remote import is_url
from sft.export.quantization import check_layers_fit, pick_device
from sft.models.checkpoint import load_tokenizer
from stages.checkout.paths import Paths
from stages.evaluation.lm_eval import check_installed, load_harness
from stages.evaluation.rows import read_prompts, read_records, render_records
from stages.loading.sources import data_size, open_source
from stages.models.base import read_base_model
from stages.models.resolve import check_named
from stages.params.schema import Params, QuantizeSection
from stages.params.tasks import load_tasks

LARGEST_READ_BYTES = 100_000_000
"""Larger data are only looked for: reading them at every `make repro` would cost more than it saves."""


def run(params: Params, paths: Paths) -> None:
    """Look at what `load` is going to read; what lies on the hub or behind a URL is left to it.

    Raises:
        ValueError: A source is missing, damaged or empty, a task can't be used, or the base model can't be the one
            that is named.
    """
    check_named(params.model, paths.root)
    load_tasks(params.evaluate.task, paths.root)
    read_records(params.evaluate.regression, paths.root)
    check_installed(params.evaluate.lm_eval)
    sources = [(part, f"load.sources[{i}].path") for i, part in enumerate(params.load.sources)]
    held_out = params.load.eval.source()
    if held_out is not None:
        sources.append((held_out, "load.eval.path"))
    for section, key in sources:
        if not (section.hub or is_url(section.path)) and data_size(section, paths, key) <= LARGEST_READ_BYTES:
            open_source(section, paths, key, with_damaged=params.load.checks.unreadable == "drop")


def check_later_stages(params: Params, paths: Paths) -> None:
    """Check the values of `quantize` and `evaluate` against the base model and the held-out rows.

    Raises:
        ValueError: Names the params key, and what does not fit.
    """
    folder = Path(read_base_model(paths.out("load", "base_model.json")).path)
    try:
        check_quantization(params.quantize, folder)
    except ValueError as error:
        key = "bits, quantize.group_size" if params.quantize.method == "gptq" else "method"
        raise ValueError(f"quantize.{key}: {error}") from None
    if params.quantize.export_gguf is not None:
        from sft.export.gguf import check_exportable  # imports slowly, and most runs export nothing

        try:
            check_exportable(folder)
        except ValueError as error:
            raise ValueError(f"quantize.export_gguf: {error}") from None
    read_prompts(params.evaluate, load_tasks(params.evaluate.task, paths.root), paths)
    load_harness(params.evaluate.lm_eval, paths.root)
    general = params.evaluate.regression
    if general.path is not None:
        tokenizer = load_tokenizer(paths.out("format", "tokenizer"))
        render_records(read_records(general, paths.root), general, tokenizer, paths.root)


def check_quantization(section: QuantizeSection, folder: Path) -> None:
    """Whether the method takes the base model's layers; raises ValueError where it does not."""
    if section.method == "gptq":
        check_layers_fit(folder, section.bits, section.group_size, pick_device("auto"), section.sym)
    elif section.method != "none":
        from sft.export.kbit import check_widths  # imports bitsandbytes

        check_widths(folder, section.method)
