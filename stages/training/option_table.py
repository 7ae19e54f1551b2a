"""What becomes of each option of `SFTConfig` in the pipeline, as a table in docs and as data for `train.arguments`.

Run `python -m stages.training.option_table` after an update of transformers or a new option: it writes
stages/params/training_options.json and docs/training_options.md. A test compares both with the dataclass.
"""

from __future__ import annotations

import enum
import json
import sys
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import TrainingArguments

from sft.config import SFTConfig
from sft.option_types import simple_types
from sft.suggest import did_you_mean
from stages.checkout.artifacts import write_text
from stages.params import adapters
from stages.params.arguments import KEYS, REFUSED, TABLE, TrainingOption, training_options

PAGE = Path("docs/training_options.md")

HEAD = """# Every option of the trainer, and where params.yaml states it

`sft.SFTConfig` has {total} options, {inherited} of them from `transformers.TrainingArguments`. {keys} of them belong to
keys of params.yaml. {named} can be set by their name in `train.arguments`, which is checked before anything runs:

```yaml
train:
  arguments: {{dataloader_num_workers: 2, log_entropy: true}}
```

{refused} cannot be set, for the reason given here. This page is written by `python -m stages.training.option_table`.

| option | in params.yaml | default |
|---|---|---|
"""


def current_table() -> dict[str, dict[str, Any]]:
    """Return types, choices and default of each option, read from the dataclass."""
    kinds = simple_types(SFTConfig)
    # `optim` takes more values here than in transformers, and is text in this library's class
    hints = typing.get_type_hints(SFTConfig) | typing.get_type_hints(TrainingArguments)
    return {
        field.name: {
            "types": [kind.__name__ for kind in kinds.get(field.name, ())],
            "choices": _choices(hints[field.name]),
            "default": _default(field),
        }
        for field in fields(SFTConfig)
        if field.init
    }


def _choices(hint: Any) -> list[str]:
    """Return the values of the enum in a type hint; none if it has no enum, or other types of values beside it."""
    for part in (hint, *typing.get_args(hint)):
        if isinstance(part, type) and issubclass(part, enum.Enum) and typing.get_origin(hint) is not list:
            return [str(member.value) for member in part]
    return []


def _default(field: Field[Any]) -> str:
    if field.default is not MISSING:
        value = field.default
    elif field.default_factory is not MISSING:
        value = field.default_factory()
    else:
        return "required"
    value = value.value if isinstance(value, enum.Enum) else value
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def as_json(table: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a table as JSON, one entry per line."""
    return "{\n" + ",\n".join(f" {json.dumps(name)}: {json.dumps(entry)}" for name, entry in table.items()) + "\n}\n"


def current_adapter_types() -> dict[str, dict[str, list[str]]]:
    """Return the options of each type of adapter of peft, with the types that they take."""
    types = {}
    for kind, config in sorted(PEFT_TYPE_TO_CONFIG_MAPPING.items(), key=lambda item: item[0].value):
        kinds = simple_types(config)
        types[kind.value] = {
            field.name: [each.__name__ for each in kinds.get(field.name, ())] for field in fields(config) if field.init
        }
    return types


def page(options: dict[str, TrainingOption]) -> str:
    """Return docs/training_options.md."""
    inherited = {field.name for base in SFTConfig.__bases__ for field in fields(base)}
    keys = [option for option in options.values() if option.key is not None]
    refused = [option for option in options.values() if option.refusal is not None]
    head = HEAD.format(
        total=len(options),
        inherited=len(inherited & options.keys()),
        keys=len(keys),
        named=len(options) - len(keys) - len(refused),
        refused=len(refused),
    )
    return head + "".join(
        f"| `{option.name}` | {_place(option)} | {_shown(option.default)} |\n" for option in options.values()
    )


def _place(option: TrainingOption) -> str:
    if option.key is not None:
        return f"`{option.key}`"
    return "by name" if option.refusal is None else f"not set: {option.refusal}"


def _shown(default: str) -> str:
    return f"`{default}`" if default else '`""`'


def problems(table: dict[str, Any]) -> list[str]:
    """Return what is wrong with the lists of `stages.params.arguments`: options that do not exist, or in both lists."""
    unknown = [name for name in (*KEYS, *REFUSED) if name not in table]
    found = [f"{name} is not an option of SFTConfig; {did_you_mean(name, table)}" for name in unknown]
    return found + [f"{name} is both a key and refused" for name in KEYS if name in REFUSED]


def main() -> None:
    """Write both files."""
    table = current_table()
    if wrong := problems(table):
        sys.exit("\n".join(wrong))
    write_text(TABLE, as_json(table))
    write_text(adapters.TABLE, as_json(current_adapter_types()))
    training_options.cache_clear()
    write_text(PAGE, page(training_options()))


if __name__ == "__main__":
    main()
