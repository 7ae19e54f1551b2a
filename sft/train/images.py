"""Choice of the collator for rows with images, and of the options that such rows need."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any, cast

from datasets import Dataset, IterableDataset
from transformers import ProcessorMixin

from sft.chat.stops import TurnEnds
from sft.config import SFTConfig
from sft.data.messages import IMAGE_COLUMNS, IMAGE_PARTS
from sft.inner_model import causal_lm
from sft.options import NotPrintedPolicy, ThinkingPolicy

NUM_CHECKED_ROWS = 2
"""Rows of which it is checked that what they end in ends generation; their images are decoded for it."""

if TYPE_CHECKING:
    from sft.vision.collator import DataCollatorForVisionLanguageModeling


def choose_vision_collator(
    processing_class: Any, config: SFTConfig, datasets_given: list[Any], *, formatted: bool = False
) -> DataCollatorForVisionLanguageModeling | None:
    """Return the collator for rows with images if the data has images, and set the options it needs.

    The collator reads raw rows: `remove_unused_columns` is set to False, and `skip_prepare_dataset` to True. A template
    of `chat_template_path` is copied from the tokenizer to the processor, which would otherwise use its own.

    Args:
        processing_class: A processor if there are images.
        config: Lengths, and which tokens are trained; changed in place.
        datasets_given: All data sets as the user gave them: data sets, dicts of data sets, or None.
        formatted: Whether the user gave a `formatting_func`, which makes text of the rows.

    Returns:
        The collator; None if no data set has images, or the user prepares the rows.

    Raises:
        ValueError: There are images, but no processor, or a `formatting_func` that would drop them, or an option that
            joins rows.
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
            f"the data is vision-related: it has images ({where}), and processing_class is a "
            f"{type(processing_class).__name__}; give a vision-language model and its "
            "processing_class=AutoProcessor.from_pretrained(...), or remove the images to train on text alone"
        )
    joined = [name for name in ("packing", "eval_packing", "padding_free") if getattr(config, name)]
    if joined:
        raise ValueError(f"{joined[0]}=True joins rows, but rows with images ({where}) can't be joined; leave it out")
    if config.truncation_mode != "keep_start":
        raise ValueError(
            f"truncation_mode={config.truncation_mode!r} would cut off the images of rows with images ({where}); "
            "leave it out"
        )
    if config.overflow is not None:
        raise ValueError(
            f"overflow={config.overflow!r} would separate images from their text in rows with images ({where}); leave "
            "it out"
        )
    if config.chat_template_path is not None or config.chat_template_kwargs:
        processing_class.chat_template = processing_class.tokenizer.chat_template
    config.remove_unused_columns = False
    given = config.dataset_kwargs if isinstance(config.dataset_kwargs, dict) else {}
    config.dataset_kwargs = {**given, "skip_prepare_dataset": True}
    from sft.vision.collator import DataCollatorForVisionLanguageModeling  # only loaded for images

    return DataCollatorForVisionLanguageModeling(
        processing_class,
        max_length=config.max_length if config.is_max_length_given else None,
        completion_only_loss=config.completion_only_loss,
        pad_to_multiple_of=config.padding_multiple,
        dataset_text_field=config.dataset_text_field,
        assistant_only_loss=config.assistant_only_loss,
        last_turn_only_loss=config.last_turn_only_loss,
        image_folder=config.image_folder,
        not_printed=cast(NotPrintedPolicy, config.not_printed),
        thinking=cast(ThinkingPolicy, config.thinking),
    )


def check_image_types(model: Any, token_types: dict[str, int], collator: Any) -> None:
    """Check that a collator for images does not give the model types of tokens that let them see later ones.

    Args:
        model: The model, for its name.
        token_types: What `add_token_types` adds to rows of text.
        collator: The collator in use, or None.

    Raises:
        ValueError: Text is causal only with a type that processors do not give to the rows that they read.
    """
    if not any(token_types.values()) or not hasattr(collator, "processor"):
        return
    name, value = next(iter(token_types.items()))
    raise ValueError(
        f"{type(causal_lm(model)).__name__} attends in both directions among tokens whose {name} is not {value}. Its "
        "processor gives such types to rows with images, where the model would see the tokens that it is to predict. "
        "Train it on text alone: remove the images, and give processing_class=AutoTokenizer.from_pretrained(...)"
    )


def check_image_turn_ends(turn_ends: TurnEnds, collator: Any, dataset: Any) -> None:
    """Check the first rows that a collator for images reads by `TurnEnds`; invalid rows are left to the collator."""
    if not hasattr(collator, "processor") or not isinstance(dataset, (Dataset, IterableDataset)):
        return
    from sft.vision.collator import DataCollatorForVisionLanguageModeling  # only loaded for images

    if not isinstance(collator, DataCollatorForVisionLanguageModeling):
        return
    try:
        rows = [collator.read(row, place).rendered for place, row in enumerate(islice(dataset, NUM_CHECKED_ROWS))]
    except (ValueError, OSError):
        return
    turn_ends.check_rendered(rows)


def images_in(dataset: Any) -> str | None:
    """Return where a data set has images: the name of a column, or of messages with image parts in the first row.

    Returns:
        The place, for messages; None without images, and for rows that are tokenized already.
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
            if isinstance(parts, list) and any(part.get("type") in IMAGE_PARTS for part in parts):
                return f"image parts in {column}"
    return None
