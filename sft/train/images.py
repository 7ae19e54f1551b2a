"""Choice of the collator for rows with images, and the options that such rows need."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datasets import IterableDataset
from transformers import ProcessorMixin

from sft.config import SFTConfig
from sft.data.messages import IMAGE_COLUMNS

if TYPE_CHECKING:
    from sft.vision.collator import DataCollatorForVisionLanguageModeling


def choose_vision_collator(
    processing_class: Any, config: SFTConfig, datasets_given: list[Any], *, formatted: bool = False
) -> DataCollatorForVisionLanguageModeling | None:
    """The collator for rows with images, where the data has images; sets `config` so that they reach it.

    Args:
        processing_class: A processor where there are images.
        config: What is trained, and lengths; `remove_unused_columns` becomes False and `skip_prepare_dataset` true. A
            template of `chat_template_path` goes from the tokenizer to the processor, whose own would go before it.
        datasets_given: All data sets as they were given, dicts of them included; None is left out.
        formatted: Whether a `formatting_func` makes text of the rows.

    Returns:
        None where no data set has images, or rows are prepared by the user.

    Raises:
        ValueError: Images without a processor, or that a `formatting_func` would drop, or an option that joins rows.
    """
    if config.skip_prepare_dataset:
        return None
    datasets_flat = [
        dataset for given in datasets_given for dataset in (given.values() if isinstance(given, dict) else [given])
    ]
    where = next((place for dataset in datasets_flat if (place := images_in(dataset))), None)
    if where is None:
        return None
    sees = isinstance(processing_class, ProcessorMixin) and hasattr(processing_class, "image_processor")
    if formatted and sees:
        raise ValueError(
            f"formatting_func would make text alone of rows with images ({where}); leave it out, remove the images, or "
            "give the model's tokenizer as processing_class to train on text alone"
        )
    if formatted:
        return None
    if not sees:
        raise ValueError(
            f"the data has images ({where}), and processing_class is a {type(processing_class).__name__}: give "
            "processing_class=AutoProcessor.from_pretrained(...), or remove the images to train on text alone"
        )
    joined = [name for name in ("packing", "eval_packing", "padding_free") if getattr(config, name)]
    if joined:
        raise ValueError(f"{joined[0]}=True joins rows, which rows with images ({where}) can't be; leave it out")
    if config.chat_template_path is not None:
        processing_class.chat_template = processing_class.tokenizer.chat_template
    config.remove_unused_columns = False
    given = config.dataset_kwargs if isinstance(config.dataset_kwargs, dict) else {}
    config.dataset_kwargs = {**given, "skip_prepare_dataset": True}
    from sft.vision.collator import DataCollatorForVisionLanguageModeling  # trainings on text do not depend on it

    return DataCollatorForVisionLanguageModeling(
        processing_class,
        max_length=config.max_length,
        completion_only_loss=config.completion_only_loss,
        pad_to_multiple_of=config.pad_to_multiple_of,
        dataset_text_field=config.dataset_text_field,
        assistant_only_loss=config.assistant_only_loss,
        last_turn_only_loss=config.last_turn_only_loss,
        image_folder=config.image_folder,
    )


def images_in(dataset: Any) -> str | None:
    """Where a data set has images: a column, or parts of its first row's messages; None where it has none.

    Rows that are tokenized already have none to read.
    """
    if not hasattr(dataset, "column_names"):
        return None
    streamed = isinstance(dataset, IterableDataset)
    columns = dataset.column_names or list(next(iter(dataset), {}))
    if "input_ids" in columns:
        return None
    found = next((f"column {name}" for name in IMAGE_COLUMNS if name in columns), None)
    if found or (not streamed and len(dataset) == 0):
        return found
    first: dict[str, Any] = next(iter(dataset), {})
    for column in ("messages", "prompt"):
        for message in first.get(column) or () if not isinstance(first.get(column), str) else ():
            parts = message.get("content") if isinstance(message, dict) else None
            if isinstance(parts, list) and any(part.get("type") in ("image", "image_url") for part in parts):
                return f"image parts in {column}"
    return None
