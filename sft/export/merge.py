"""Merge of an adapter into its base, and comparison of the checkpoint on disk with the trained model."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel, PreTrainedTokenizerBase

from sft.export.merge_by_file import NotStreamableError, Progress, ShardMerge
from sft.export.merge_in_memory import AdapterMix, grow_to_adapter, load_mix, merge_into_base
from sft.export.proof import LogitDifference, Row, check_logits, compare_logits, logits_of
from sft.folders import replacing_folder
from sft.models.checkpoint import copy_processor_files, save_tokenizer
from sft.models.loading import load_model, parse_dtype
from sft.models.saved_adapters import check_adapter_folder, count_adapted_modules, load_adapter
from sft.models.token_rows import is_tied

logger = logging.getLogger(__name__)

ROUNDING_ADVICE = "The cause is the rounding of the weights to this dtype: raise the tolerance, or save float32."

Rows = Sequence[Row]


@dataclass(frozen=True)
class MergeReport:
    """Difference between the checkpoint on disk and the model that was trained, over all positions of the sample rows.

    Args:
        max_logit_diff: Largest absolute difference of a logit.
        mean_logit_diff: Mean absolute difference.
        top_token_agreement: Share of positions with the same most likely token.
        num_positions: Number of positions compared.
        adapter_effect: Largest absolute change of a logit of the base that the adapter causes, over the first row; 0
            without adapter.
        num_adapted_modules: Number of modules with adapter weights; 0 without adapter.
        dtype: Data type of the checkpoint.
        tied_embeddings: Whether head and embeddings share one tensor in the checkpoint.
    """

    max_logit_diff: float
    mean_logit_diff: float
    top_token_agreement: float
    num_positions: int
    adapter_effect: float
    num_adapted_modules: int
    dtype: str
    tied_embeddings: bool

    def to_dict(self) -> dict[str, float | int | str | bool]:
        """Return all fields by name."""
        return asdict(self)


def merge_adapter(
    base: str | Path,
    adapter: str | Path | AdapterMix | None,
    output_dir: str | Path,
    sample_input_ids: Rows,
    tolerance: float = 1e-3,
    dtype: str | torch.dtype = "float32",
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    on_progress: Progress | None = None,
) -> MergeReport:
    """Merge an adapter into its base and write one plain checkpoint, with tokenizer and generation config.

    The base is merged in float32, file by file, with at most the weights of one file in memory. Adapters and models
    for which this is not possible are merged by peft with the complete model in memory, and a warning gives the reason.
    An adapter that was trained on a 4- or 8-bit copy is merged into the plain base, so that the result does not contain
    the quantization error of the copy. The checkpoint is read back from disk and compared with base + adapter.

    Args:
        base: Hub id or folder of the plain base.
        adapter: Folder that `PeftModel.save_pretrained` wrote, or several of them as an `AdapterMix`. None = write a
            copy of the base, such as a checkpoint whose weights were all trained.
        output_dir: Missing or empty folder. It is not changed if the merge fails.
        sample_input_ids: Rows of token ids to compare on, `(num_rows, length)`, ragged, or the model's inputs for each
            row, such as token ids and images. The logits of one row are in memory at a time (tokens x vocabulary x 4
            bytes), or those of all rows if the complete model is.
        tolerance: Largest accepted absolute difference of a logit.
        dtype: Data type of the checkpoint. Half precision rounds the weights, which changes logits by some hundredths.
        tokenizer: Tokenizer to save with the model. If training resized the embeddings to its length, the merge does
            so too.
        trust_remote_code: Whether to run Python code that comes with the base.
        on_progress: Called with (done, total, what is counted) while the base is merged file by file.

    Raises:
        ValueError: The logits differ by more than the tolerance; the adapter does not fit the base, changes nothing, or
            is of a type that cannot be merged; the base on disk is quantized.
    """
    sources = [adapter, base] if isinstance(adapter, str | Path) else [base]
    output = _Output(Path(output_dir), tolerance, _plain_dtype(dtype), tokenizer, sources)
    output.check(sample_input_ids)
    if isinstance(adapter, AdapterMix):
        adapter.check()
    elif adapter is not None:
        adapter = Path(adapter)
        check_adapter_folder(adapter)
    _check_plain(base, trust_remote_code)
    try:
        return _merge_by_file(base, adapter, output, sample_input_ids, on_progress)
    except NotStreamableError as reason:
        work = "copied" if adapter is None else "merged"
        logger.warning("the base %s is %s with the complete model in memory: %s", base, work, reason)
    return _merge_in_memory(base, adapter, output, sample_input_ids, trust_remote_code)


def _merge_by_file(
    base: str | Path,
    adapter: Path | AdapterMix | None,
    output: _Output,
    rows: Rows,
    on_progress: Progress | None,
) -> MergeReport:
    """Merge with at most the weights of one file of the base in memory; without an adapter, copy.

    Raises:
        NotStreamableError: The base or the adapter cannot be merged file by file; nothing was written.
        ValueError: See `merge_adapter`.
    """
    if isinstance(adapter, AdapterMix):
        raise NotStreamableError("several adapters are combined by peft on the model")
    job = ShardMerge(Path(base), adapter, output.dtype, output.tokenizer)
    effect = job.effect(rows)
    if adapter is not None:
        _check_effect(effect)
    difference = output.fill(job, rows, on_progress)
    return _report(difference, effect, job.num_adapted, output.dtype, tied=job.tied)


def _merge_in_memory(
    base: str | Path, adapter: Path | AdapterMix | None, output: _Output, rows: Rows, trust_remote_code: bool
) -> MergeReport:
    """Merge by peft with the complete model in memory; without an adapter, copy."""
    model = load_model(base, trust_remote_code=trust_remote_code)
    if adapter is None:
        difference = output.save(model, rows, logits_of(model, rows))
        return _report(difference, 0.0, 0, output.dtype, tied=is_tied(model))
    if not isinstance(adapter, AdapterMix):
        grow_to_adapter(model, adapter, output.tokenizer)
    plain = logits_of(model, rows[:1])  # before the adapter, which may change the base, is put on it
    peft_model = load_mix(model, adapter) if isinstance(adapter, AdapterMix) else load_adapter(model, adapter)
    reference = logits_of(peft_model, rows)
    effect = compare_logits(reference[:1], plain).largest
    _check_effect(effect)
    num_adapted = count_adapted_modules(peft_model)
    merged = merge_into_base(peft_model)
    difference = output.save(merged, rows, reference)
    return _report(difference, effect, num_adapted, output.dtype, tied=is_tied(merged))


@dataclass(frozen=True)
class _Output:
    """Where and how to write the checkpoint, and the accepted difference of its logits.

    Args:
        sources: Folders, or a hub id, whose processor is copied; a file is taken from the first that has it.
    """

    folder: Path
    tolerance: float
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase | None
    sources: Sequence[str | Path] = ()

    def check(self, rows: Rows) -> None:
        if self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(f"{self.folder} is not empty: give a new or empty folder for the checkpoint.")
        if not len(rows) or not all(len(row) for row in rows):
            raise ValueError("sample_input_ids has no rows, or empty ones: there would be no logits to compare.")

    def save(self, model: PreTrainedModel, rows: Rows, reference: list[torch.Tensor]) -> LogitDifference:
        """Save a model, read it back and compare it with the reference; the folder appears only if the logits agree."""
        if self.dtype is not torch.float32:
            in_memory = compare_logits(reference, logits_of(model, rows))
            check_logits(in_memory, self.tolerance, "merged in memory and not yet rounded")
        model.to(self.dtype)
        with replacing_folder(self.folder, overwrite=False) as folder:
            if self.tokenizer is not None:
                _stop_at_eos(model, self.tokenizer)
                self._save_tokenizer(self.tokenizer, folder)
            model.save_pretrained(folder)
            # a model with its own Python code was loaded before, so running that code was allowed
            written = load_model(folder, trust_remote_code=hasattr(model.config, "auto_map"))
            difference = compare_logits(reference, logits_of(written, rows))
            self._check_written(difference)
        return difference

    def fill(self, job: ShardMerge, rows: Rows, on_progress: Progress | None) -> LogitDifference:
        """Write file by file and compare with base + adapter; the folder appears only if the logits agree."""
        with replacing_folder(self.folder, overwrite=False) as folder:
            if self.tokenizer is not None:
                _stop_at_eos(job.plain, self.tokenizer)
                self._save_tokenizer(self.tokenizer, folder)
            job.write(folder, on_progress)
            difference = job.compare(folder, rows, on_progress)
            self._check_written(difference)
        return difference

    def _save_tokenizer(self, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
        save_tokenizer(tokenizer, folder)
        for source in self.sources:
            copy_processor_files(source, folder)

    def _check_written(self, difference: LogitDifference) -> None:
        advice = "" if self.dtype is torch.float32 else ROUNDING_ADVICE
        check_logits(difference, self.tolerance, f"read back from disk as {_name(self.dtype)}", advice)


def _plain_dtype(dtype: str | torch.dtype) -> torch.dtype:
    parsed = parse_dtype(dtype)
    if isinstance(parsed, str):
        raise ValueError("dtype 'auto' is not supported, as a merge is computed in float32: name the dtype to save.")
    return parsed


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _check_plain(base: str | Path, trust_remote_code: bool) -> None:
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
    except OSError:
        return  # load_model fails on the same and explains it
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise ValueError(
            f"The weights of the base {str(base)!r} are quantized ({method}): rounding would erase the adapter in a "
            f"merge. Give the plain base that they were quantized from."
        )


def _check_effect(effect: float) -> None:
    if effect == 0.0:
        raise ValueError(
            "The adapter changes no logit of the first sample row: it was not trained, or its weights were not loaded. "
            "A merge would give back the base."
        )


def _stop_at_eos(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make generation stop at the tokenizer's eos token too, which may be that of the trained chat template."""
    config = model.generation_config
    if config is None or tokenizer.eos_token_id is None:
        return
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if tokenizer.eos_token_id not in known:
        stops = [tokenizer.eos_token_id, *(index for index in known if index is not None)]
        config.eos_token_id = stops if len(stops) > 1 else stops[0]
        model.config.eos_token_id = config.eos_token_id
    if tokenizer.pad_token_id is not None:
        config.pad_token_id = model.config.pad_token_id = tokenizer.pad_token_id


def _report(
    difference: LogitDifference, effect: float, num_adapted: int, dtype: torch.dtype, *, tied: bool
) -> MergeReport:
    report = MergeReport(
        max_logit_diff=difference.largest,
        mean_logit_diff=difference.mean,
        top_token_agreement=difference.top_token_agreement,
        num_positions=difference.num_positions,
        adapter_effect=effect,
        num_adapted_modules=num_adapted,
        dtype=_name(dtype),
        tied_embeddings=tied,
    )
    logger.info("%s", report)
    return report
