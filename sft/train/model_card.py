"""Model card of a fine-tuned model: the README.md that is saved and uploaded with it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from peft import PeftModel

from sft.inner_model import causal_lm
from sft.suggest import did_you_mean

FILE_NAME = "README.md"

TAGS = ("generated_from_trainer", "sft")

BASE_TAG = "base_model:"
"""Beginning of the tag with which peft names the base model, also where that is a folder."""

PACKAGES = ("sft", "transformers", "torch", "datasets", "tokenizers", "peft")
"""Packages whose versions a card lists, where they are installed."""

LISTED_OPTIONS = (
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "packing",
    "completion_only_loss",
    "assistant_only_loss",
    "loss_type",
    "neftune_noise_alpha",
    "seed",
)
"""Options of a training that its card lists."""

METADATA = ("language", "license", "finetuned_from", "tasks", "dataset", "dataset_tags", "dataset_args")
"""What `transformers.Trainer.create_model_card` takes in addition to a name and tags."""


@dataclass
class CardFacts:
    """What a model card states.

    Attributes:
        model_name: Name of the model.
        repository: Id on the hub, or folder, that the example of use loads.
        base_model: Id on the hub of the model that was fine-tuned; None if it came from a folder or from memory.
        datasets: Names of the data sets.
        tags: Tags in addition to `TAGS`.
        has_adapter: Whether only an adapter is saved.
        options: Options of the training that are listed, by name.
        metadata: Further metadata for the hub, such as `language` and `license`.
    """

    model_name: str
    repository: str
    base_model: str | None = None
    datasets: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    has_adapter: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)


def card_facts(
    trainer: Any,
    model_name: str | None,
    dataset_name: str | list[str] | None,
    tags: str | list[str] | None,
    metadata: Mapping[str, Any],
) -> CardFacts:
    """Return what the model card of a trainer states; see `SFTTrainer.create_model_card` for the arguments.

    Raises:
        ValueError: `metadata` has an unknown name.
    """
    for name in metadata:
        if name not in METADATA:
            hint = did_you_mean(name, [*METADATA, "model_name", "dataset_name", "tags"], before="; ")
            raise ValueError(f"a model card has no {name!r}: it takes {', '.join(METADATA)}{hint}")
    args = trainer.args
    inner = causal_lm(trainer.model)
    base = metadata.get("finetuned_from") or getattr(inner.config, "_name_or_path", None) or None
    datasets = (*_names(dataset_name), *_names(metadata.get("dataset_tags")), *_names(metadata.get("dataset")))
    listed = {name: getattr(args, name) for name in LISTED_OPTIONS}
    arguments = _names(metadata.get("dataset_args"))
    return CardFacts(
        model_name=model_name or (args.hub_model_id or Path(args.output_dir).name).split("/")[-1],
        repository=trainer.hub_model_id or args.hub_model_id or args.output_dir,
        base_model=base if base and not Path(base).exists() else None,
        datasets=tuple(dict.fromkeys(name for name in datasets if not Path(name).exists())),
        tags=(*_names(tags), *(getattr(inner, "model_tags", None) or ())),
        has_adapter=isinstance(trainer.model, PeftModel),
        options={**listed, **({"data set": ", ".join(arguments)} if arguments else {})},
        metadata={
            "language": metadata.get("language"),
            "license": metadata.get("license"),
            "pipeline_tag": next(iter(_names(metadata.get("tasks"))), None),
        },
    )


def write_model_card(folder: Path, facts: CardFacts) -> Path:
    """Write the card of a model into its folder; tags of a card that is there already are kept.

    Args:
        folder: Made if needed.
        facts: What the card states.

    Returns:
        The file.
    """
    file = folder / FILE_NAME
    present = [tag for tag in _present_tags(file) if facts.base_model or not tag.startswith(BASE_TAG)]
    tags = list(dict.fromkeys([*TAGS, *facts.tags, *present]))
    data = ModelCardData(
        base_model=facts.base_model,
        datasets=list(facts.datasets) or None,
        library_name="peft" if facts.has_adapter else "transformers",
        model_name=facts.model_name,
        tags=tags,
        **{name: value for name, value in facts.metadata.items() if value is not None},
    )
    folder.mkdir(parents=True, exist_ok=True)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(facts)}").save(file)
    return file


def _present_tags(file: Path) -> list[str]:
    if not file.is_file():
        return []
    try:
        return list(ModelCard.load(file).data.tags or [])
    except ValueError:  # a README without metadata, which is replaced
        return []


def _text(facts: CardFacts) -> str:
    base = f"[{facts.base_model}](https://huggingface.co/{facts.base_model})" if facts.base_model else "a local model"
    on = f" on {', '.join(facts.datasets)}" if facts.datasets else ""
    what = "A LoRA or other adapter" if facts.has_adapter else "A model"
    rows = [f"| {name} | {value} |" for name, value in facts.options.items()]
    return "\n".join(
        [
            f"# {facts.model_name}",
            "",
            f"{what}, made from {base} by supervised fine-tuning{on}.",
            "",
            "## Use",
            "",
            "```python",
            "from transformers import pipeline",
            "",
            f'generate = pipeline("text-generation", model={facts.repository!r})',
            'messages = [{"role": "user", "content": "..."}]',
            'print(generate(messages, max_new_tokens=128, return_full_text=False)[0]["generated_text"])',
            "```",
            "",
            "## Training",
            "",
            "| option | value |",
            "|---|---|",
            *rows,
            "",
            "## Versions",
            "",
            *(f"- {name} {number}" for name, number in _versions(PACKAGES)),
            "",
        ]
    )


def _versions(packages: Iterable[str]) -> list[tuple[str, str]]:
    found = []
    for package in packages:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return found


def _names(value: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return names that were given as one text, as several, or not at all."""
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)
