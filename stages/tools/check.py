"""`python -m stages check`: params.yaml, data, own metrics and the base model's name, before DVC removes any result."""

from __future__ import annotations

from sft.data.remote import is_url
from stages.checkout.paths import Paths
from stages.evaluation.lm_eval import check_installed
from stages.evaluation.regression import read_records
from stages.loading.sources import data_size, open_source
from stages.models.resolve import check_named
from stages.params.schema import Params
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
