"""Stage `merge`: base and adapter to one plain checkpoint, with a check that its logits equal theirs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datasets import load_from_disk
from transformers import PreTrainedTokenizerBase

from sft.export.merge import MergeReport, merge_adapter
from sft.export.proof import Row
from sft.folders import replacing_folder
from sft.models.checkpoint import load_tokenizer
from stages.checkout.artifacts import write_json
from stages.checkout.paths import Paths
from stages.models.base import read_base_model
from stages.models.images import image_collator
from stages.params.schema import Params
from stages.progress import progress, stage_progress

ADAPTER_CONFIG = "adapter_config.json"
NUM_STEPS = 2


@stage_progress("merge")
def run(params: Params, paths: Paths) -> None:
    """Write outs/merge/model, and the largest difference of its logits from those of base and adapter.

    Raises:
        ValueError: The difference exceeds merge.tolerance; an earlier result is kept.
    """
    started = time.monotonic()
    trained = paths.out("train", "model")
    has_adapter = (trained / ADAPTER_CONFIG).is_file()
    tokenizer = load_tokenizer(trained)
    base = read_base_model(paths.out("load", "base_model.json")).path if has_adapter else trained
    progress(0, NUM_STEPS, "steps", "merging the adapter into its base" if has_adapter else "copying the weights")
    with replacing_folder(paths.out("merge", "model")) as folder:
        report = merge_adapter(
            base,
            trained if has_adapter else None,
            folder,
            sample_rows(paths, params.merge.num_sample_rows, tokenizer),
            params.merge.tolerance,
            params.merge.dtype,
            tokenizer,
            params.model.trust_remote_code,
            progress,
        )
    progress(NUM_STEPS, NUM_STEPS, "steps", summary(report))
    write_json(paths.metrics("merge"), {"merged": has_adapter, **report.to_dict(), "size_mb": size_mb(paths)})
    write_json(paths.timings("merge"), {"seconds": time.monotonic() - started})


def sample_rows(paths: Paths, num_rows: int, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    """Return the token ids of the documents of the first packed eval rows, or the model's inputs if they have images.

    The logits of each document are compared alone, without the others of its row.

    Raises:
        ValueError: There are no eval rows.
    """
    rows = load_from_disk(str(paths.out("pack", "eval")))
    chosen = [rows[index] for index in range(min(num_rows, len(rows)))]
    documents: list[Row] = []
    for row in chosen:
        if row.get("images"):
            documents.append(image_collator(paths, tokenizer).inputs(row))
        else:
            documents.extend(split_row(row))
    if not documents:
        raise ValueError(
            f"{paths.out('pack', 'eval')} contains no documents, on which the merged logits must be compared"
        )
    return documents


def split_row(row: dict[str, Any]) -> Iterator[list[int]]:
    """Yield the token ids of each document of a packed row; a row without `seq_lengths` is one document."""
    ids: list[int] = row["input_ids"]
    start = 0
    for length in row.get("seq_lengths", [len(ids)]):
        yield ids[start : start + length]
        start += length


def summary(report: MergeReport) -> str:
    """Describe the result in one line."""
    proof = f"logits differ by at most {report.max_logit_diff:.2g} over {report.num_positions} positions"
    if report.num_adapted_modules == 0:
        return f"all weights were trained, so there is no adapter to merge: a copy; {proof}"
    return f"merged {report.num_adapted_modules} modules into the unquantized base; {proof}"


def size_mb(paths: Paths) -> float:
    """Return the size of the merged checkpoint's weights in megabytes (10^6 bytes)."""
    folder: Path = paths.out("merge", "model")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6
