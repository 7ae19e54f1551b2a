"""`sft check`: find mistakes in params.yaml, in the data, and of this machine and its services before a run.

`check_later_stages` is called by `train`: it checks the values of the stages after it before the training starts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from sft.export.quantization import NOT_FOR_IMAGES, check_experts, check_layers_fit, pick_device
from sft.llama_cpp.programs import check_exportable
from sft.models.checkpoint import empty_model, is_image_model, load_tokenizer
from stages.checkout.paths import Paths, main_checkout
from stages.engines.programs import check_installed, llama_cpp
from stages.evaluation.rows import KEYS, read_prompts, read_records, render_records, test_rows
from stages.loading.preflight import inspect_data
from stages.loading.rehearsal import read_asked
from stages.models.base import read_base_model
from stages.models.resolve import check_named
from stages.params.engines import read_entry
from stages.params.figures import REGRESSION, TEST
from stages.params.schema import EvaluateSection, LmEvalSection, Params, QuantizeSection
from stages.params.tasks import load_tasks
from stages.preflight.checkpoint import base_folder, read_outline
from stages.preflight.findings import Located, Problem, from_error, locate
from stages.preflight.machine import check_machine, this_machine
from stages.preflight.model import check_model_values
from stages.preflight.recipe import check_recipe
from stages.preflight.services import check_services, check_tracking


class CheckFailed(ValueError):
    """`check` found mistakes. Its message lists them."""


def run(params: Params, paths: Paths, *, as_json: bool = False) -> int:
    """Print all that can be known without computing: warnings to standard error, or everything as JSON.

    Args:
        params: Values of params.yaml.
        paths: Paths of the checkout.
        as_json: Whether to print JSON to standard output.

    Returns:
        Exit code: 0, or 1 if JSON was asked for and there are errors.

    Raises:
        CheckFailed: There are errors.
    """
    text = paths.params.read_text(encoding="utf-8") if paths.params.is_file() else ""
    found = list(locate(find_problems(params, paths), text))
    errors = [one for one in found if one.problem.is_error]
    warnings = [one for one in found if not one.problem.is_error]
    if as_json:
        lists = {"errors": errors, "warnings": warnings}
        value = {name: [one.plain(paths.params) for one in entries] for name, entries in lists.items()}
        print(json.dumps({"ok": not errors, **value}, indent=2, ensure_ascii=False))
        return 1 if errors else 0
    for one in warnings:
        print(f"warning: {one}", file=sys.stderr, flush=True)
    if errors:
        raise CheckFailed(describe(errors))
    more = {0: "", 1: ", 1 warning"}.get(len(warnings), f", {len(warnings)} warnings")
    print(f"check: no errors{more}", flush=True)
    return 0


def describe(errors: list[Located]) -> str:
    """Return the message that lists errors; a single one takes a line of its own."""
    if len(errors) == 1:
        return str(errors[0])
    return "\n".join([f"{len(errors)} problems", *(f"  {error}" for error in errors)])


def find_problems(params: Params, paths: Paths) -> Iterator[Problem]:
    """Yield all problems, those of the model first. A check that fails itself is one, and the others go on."""
    folder = base_folder(params.model, paths.root)
    outline = read_outline(folder) if folder is not None else None

    def data() -> Iterator[Problem]:
        tokenizer = None if folder is None else folder / "tokenizer.json"
        for finding in inspect_data(params, paths, tokenizer):
            yield Problem(finding.key, finding.text, finding.is_error)

    def experts() -> None:
        if folder is not None:
            check_experts_quantizable(params.quantize, folder)

    home = main_checkout(paths.root)
    checks: list[tuple[str, Callable[[], Iterable[Problem] | object]]] = [
        ("model.name_or_path", lambda: check_named(params.model, paths.root)),
        ("model", lambda: check_model_values(params, paths, outline)),
        ("train", lambda: check_machine(params, paths.root, outline, this_machine(), folder)),
        ("train.learning_rate", lambda: check_recipe(params.train, outline.config if outline else {})),
        ("quantize.method", experts),
        ("quantize.export_gguf", lambda: check_gguf(params, paths, folder)),
        ("load.sources", data),
        ("load.rehearsal", lambda: params.load.rehearsal and read_asked(params.load.rehearsal, paths)),
        ("evaluate.task", lambda: load_tasks(params.evaluate.task, paths.root)),
        ("evaluate.regression", lambda: read_records(params.evaluate.regression, paths.root)),
        ("evaluate.test", lambda: read_records(test_rows(params.evaluate), paths.root, KEYS[TEST])),
        ("evaluate.lm_eval", lambda: _check_lm_eval(params.evaluate.lm_eval)),
        ("evaluate.engines", lambda: check_engines(params.evaluate, paths)),
        ("publish.tracking_uri", lambda: check_tracking(params.publish, home)),
        ("publish", lambda: check_services(params, home, folder)),
    ]
    for key, check in checks:
        try:
            found = check()
            if isinstance(found, Iterator):
                yield from found
        except (ValueError, OSError) as error:
            yield from_error(error, key)


def _check_lm_eval(section: LmEvalSection) -> None:
    """Check that lm-eval is installed if tasks are named.

    Raises:
        ValueError: It is not.
    """
    if section.tasks:
        from stages.evaluation.lm_eval import check_installed  # imports torch

        check_installed(section)


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
    check_gguf(params, paths, folder)
    check_engines(params.evaluate, paths)
    read_prompts(params.evaluate, load_tasks(params.evaluate.task, paths.root), paths)
    from stages.evaluation.lm_eval import load_harness  # imports torch, which `check` does without

    load_harness(params.evaluate.lm_eval, paths.root)
    for prefix, rows in ((REGRESSION, params.evaluate.regression), (TEST, test_rows(params.evaluate))):
        if rows.path is not None:
            tokenizer = load_tokenizer(paths.out("format", "tokenizer"))
            records = read_records(rows, paths.root, KEYS[prefix])
            render_records(records, rows, tokenizer, paths.root, KEYS[prefix])


def check_gguf(params: Params, paths: Paths, folder: Path | None) -> None:
    """Check that llama.cpp is installed and knows the base model, if GGUF files are asked for.

    Raises:
        ValueError: It is not, or does not.
    """
    if not params.quantize.export_gguf:
        return
    try:
        llama_cpp(paths.root).check()
        if folder is not None:
            check_exportable(folder, llama_cpp(paths.root))
    except ValueError as error:
        raise ValueError(f"quantize.export_gguf: {error}") from None


def check_engines(section: EvaluateSection, paths: Paths) -> None:
    """Check that the engines that `evaluate` asks are installed.

    Raises:
        ValueError: Some are not.
    """
    try:
        check_installed([read_entry(text).engine for text in section.engines], paths.root)
    except ValueError as error:
        raise ValueError(f"evaluate.engines: {error}") from None


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
