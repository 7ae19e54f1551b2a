"""`python -m stages check`: check params.yaml, data, tasks, the base model's name and the record before a run.

`check_later_stages` is called by `train`: it checks the values of the stages after it before the training starts.
"""

from __future__ import annotations

from pathlib import Path

from sft.export.quantization import NOT_FOR_IMAGES, check_experts, check_layers_fit, pick_device
from sft.models.checkpoint import empty_model, is_image_model, load_tokenizer
from stages.checkout.paths import Paths, main_checkout
from stages.evaluation.lm_eval import check_installed, load_harness
from stages.evaluation.rows import read_prompts, read_records, render_records
from stages.loading.preflight import inspect_data
from stages.models.base import EMBEDDED_PREFIX, embedded_folder, local_folder, read_base_model
from stages.models.resolve import check_named
from stages.params.schema import Params, PublishSection, QuantizeSection
from stages.params.tasks import load_tasks
from stages.tracking.address import absolute_uri, check_database, database


def run(params: Params, paths: Paths) -> None:
    """Check what `load` will read, except sources on the hub; of URLs, only whether they may be read at all.

    Raises:
        ValueError: A source is missing, damaged or empty, a task can't be used, there is no such base model, its
            experts can't be quantized as params.yaml asks for, or the tracking store can't be reached.
    """
    check_named(params.model, paths.root)
    check_experts_quantizable(params.quantize, local_folder(params.model.name_or_path, paths.root))
    load_tasks(params.evaluate.task, paths.root)
    read_records(params.evaluate.regression, paths.root)
    check_installed(params.evaluate.lm_eval)
    check_tracking(params.publish, main_checkout(paths.root))
    name = params.model.name_or_path
    folder = embedded_folder(name) if name.startswith(EMBEDDED_PREFIX) else local_folder(name, paths.root)
    for finding in inspect_data(params, paths, folder / "tokenizer.json"):
        print(f"warning: params.yaml, {finding.key}: {finding.text}", flush=True)


def check_tracking(section: PublishSection, home: Path) -> None:
    """Check that the tracking store can be reached and used.

    Raises:
        ValueError: It can't be used, or does not answer within 25 s.
    """
    if (file := database(absolute_uri(section.tracking_uri, home))) is not None:
        check_database(file)
        return
    from stages.tracking.store import check_store  # imports MLflow, which is slow, and most stores are files

    check_store(section, home)


def check_later_stages(params: Params, paths: Paths) -> None:
    """Check the values of `quantize` and `evaluate` against the base model and the held-out rows.

    Raises:
        ValueError: A value does not fit; the message names its key.
    """
    folder = Path(read_base_model(paths.out("load", "base_model.json")).path)
    if params.quantize.method == "gptq" and is_image_model(folder, trust_remote_code=params.model.trust_remote_code):
        raise ValueError(f"quantize.method: gptq: {NOT_FOR_IMAGES}")
    check_experts_quantizable(params.quantize, folder)
    try:
        check_quantization(params.quantize, folder)
    except ValueError as error:
        key = "bits, quantize.group_size" if params.quantize.method == "gptq" else "method"
        raise ValueError(f"quantize.{key}: {error}") from None
    if params.quantize.export_gguf is not None:
        from sft.export.gguf import check_exportable  # slow to import, and most runs export nothing

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


def check_experts_quantizable(section: QuantizeSection, folder: Path) -> None:
    """Check that the quantization method is for the experts of a base model, if it has any.

    Raises:
        ValueError: It is not.
    """
    config = folder / "config.json"
    # building a model takes seconds, which are spent on mixtures of experts alone
    if section.method == "none" or not config.is_file() or "expert" not in config.read_text(encoding="utf-8"):
        return
    try:
        check_experts(empty_model(folder), folder, section.method)
    except ValueError as error:
        raise ValueError(f"quantize.method: {section.method}: {error}") from None


def check_quantization(section: QuantizeSection, folder: Path) -> None:
    """Check that the quantization method supports the layers of the base model.

    Raises:
        ValueError: It does not support one.
    """
    if section.method == "gptq":
        check_layers_fit(folder, section.bits, section.group_size, pick_device("auto"), section.sym)
    elif section.method != "none":
        from sft.export.kbit import check_layers  # imports bitsandbytes

        check_layers(folder, section.method)
