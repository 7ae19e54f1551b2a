"""What later stages would refuse, asked before the hours of training are spent."""

from __future__ import annotations

from pathlib import Path

from sft.gptq_checks import check_layers_fit
from stages.base_model import read_base_model
from stages.params import Params
from stages.paths import Paths
from stages.references import read_prompts
from stages.scoring import load_tasks


def check_later_stages(params: Params, paths: Paths) -> None:
    """Check the values of `quantize` and `evaluate` against the base model and the held-out rows.

    Raises:
        ValueError: Names the params key, and what does not fit.
    """
    if params.quantize.method == "gptq":
        folder = Path(read_base_model(paths.out("load", "base_model.json")).path)
        try:
            check_layers_fit(folder, params.quantize.bits, params.quantize.group_size)
        except ValueError as error:
            raise ValueError(f"quantize.bits, quantize.group_size: {error}") from None
    read_prompts(params.evaluate, load_tasks(params.evaluate.task, paths.root), paths)
