"""What an import has found so far: values of params.yaml, and for each key of the source what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from sft.suggest import did_you_mean
from stages.importing.places import HELD_OUT
from stages.params.schema import NO_LORA_OPTIONS


class Effect(StrEnum):
    """What became of a key."""

    SAME = "same effect"
    NEAREST = "nearest"
    UNSUPPORTED = "not supported"
    IRRELEVANT = "irrelevant"


@dataclass(frozen=True)
class Row:
    """A key of the source.

    Args:
        key: Its name, such as `datasets[0].path`.
        value: Its value.
        effect: What became of it.
        written: Keys of params.yaml that state it, with their values.
        note: The difference of the nearest value, why it is not supported, or why it is irrelevant.
    """

    key: str
    value: Any
    effect: Effect
    written: Mapping[str, Any] = field(default_factory=dict)
    note: str = ""


@dataclass
class Draft:
    """An import in progress.

    Args:
        peer: Name of the other project.
        source: All keys of the configuration.
        processes: Number of processes that train together.
    """

    peer: str
    source: Mapping[str, Any]
    processes: int = 1
    values: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    hints: list[str] = field(default_factory=list)

    def get(self, *names: str, default: Any = None) -> Any:
        """Return the value of the first of several keys that the source states, else the default."""
        return next((self.source[name] for name in names if self.source.get(name) is not None), default)

    def is_on(self, *names: str) -> bool:
        """Return whether the source states one of several keys, and not as false or null."""
        return any(is_on(self.source.get(name)) for name in names)

    def row(self, key: str, value: Any, effect: Effect, note: str = "", **written: Any) -> None:
        """Record what became of a key, and the values that state it (`train__lora_r` is `train.lora_r`)."""
        placed = {name.replace("__", "."): item for name, item in written.items()}
        self.values |= placed
        self.rows.append(Row(key, value, effect, placed, note))

    def same(self, key: str, value: Any, note: str = "", **written: Any) -> None:
        """Record a key whose effect is the same here."""
        self.row(key, value, Effect.SAME, note, **written)

    def nearest(self, key: str, value: Any, note: str, **written: Any) -> None:
        """Record a key for which there is something similar here; the note is the difference."""
        self.row(key, value, Effect.NEAREST, note, **written)

    def unsupported(self, key: str, value: Any, note: str) -> None:
        """Record a key whose effect can't be had here; the note is the reason."""
        self.row(key, value, Effect.UNSUPPORTED, note)

    def irrelevant(self, key: str, value: Any, note: str = "") -> None:
        """Record a key that does not change the result here."""
        self.row(key, value, Effect.IRRELEVANT, note)


Rule = Callable[[Draft, str, Any], None]
"""What becomes of a key: records at least one row."""


def is_on(value: Any) -> bool:
    """Return whether a switch is on: a text such as "false" is off."""
    return value not in (None, False, "", "false", "False", "no", "none", 0, [], {})


def keep(target: str, convert: Callable[[Any], Any] | None = None, note: str = "") -> Rule:
    """Return the rule of a key that params.yaml has, too.

    Args:
        target: Key of params.yaml.
        convert: Function for the value; by default it is taken as it is.
        note: Remark for the table.
    """

    def rule(draft: Draft, key: str, value: Any) -> None:
        draft.same(key, value, note, **{target.replace(".", "__"): convert(value) if convert else value})

    return rule


def by_name(draft: Draft, key: str, value: Any) -> None:
    """Put an option of transformers.TrainingArguments into train.arguments."""
    argument(draft, key, value, key)


def argument(draft: Draft, key: str, value: Any, name: str, note: str = "") -> None:
    """Record a key as an option in train.arguments."""
    arguments = {**draft.values.get("train.arguments", {}), name: value}
    draft.values["train.arguments"] = arguments
    draft.rows.append(Row(key, value, Effect.SAME, {f"train.arguments.{name}": value}, note))


def ignore(note: str) -> Rule:
    """Return the rule of a key that does not change the result here."""
    return lambda draft, key, value: draft.irrelevant(key, value, note)


def refuse(note: str, off: Iterable[Any] = ()) -> Rule:
    """Return the rule of a key whose effect can't be had here.

    Args:
        note: The reason.
        off: Values beside null, false and empty ones that ask for nothing.
    """

    def rule(draft: Draft, key: str, value: Any) -> None:
        if not is_on(value) or value in tuple(off):
            draft.same(key, value, "off, as here")
        else:
            draft.unsupported(key, value, note)

    return rule


def approach(note: str, target: str = "", convert: Callable[[Any], Any] | None = None) -> Rule:
    """Return the rule of a key for which there is something similar here.

    Args:
        note: The difference.
        target: Key of params.yaml that has the similar value, if any.
        convert: Function for the value.
    """

    def rule(draft: Draft, key: str, value: Any) -> None:
        if not is_on(value):
            draft.same(key, value, "off, as here")
            return
        written = {target.replace(".", "__"): convert(value) if convert else value} if target else {}
        draft.nearest(key, value, note, **written)

    return rule


def always(note: str) -> Rule:
    """Return the rule of a switch for what happens here in any case."""
    return lambda draft, key, value: draft.same(key, value, note if is_on(value) else "off; here it is on: " + note)


def part_of(*others: str) -> Rule:
    """Return the rule of a key that the rules of other keys read."""
    return lambda draft, key, value: draft.same(key, value, f"read with {', '.join(others)}")


def hold_out(draft: Draft, key: str, value: Any, size: float) -> None:
    """Write held-out rows: a fraction of the rows below 1, else their number; some even for 0."""
    if size == 0:
        note = f"{HELD_OUT} rows are held out, since every model is measured on some"
        draft.nearest(key, value, note, load__eval={"path": None, "fraction": None, "count": HELD_OUT})
        return
    fraction, count = (size, None) if size < 1 else (None, int(size))
    draft.same(
        key,
        value,
        "as many rows, chosen by a hash of their content",
        load__eval={"path": None, "fraction": fraction, "count": count},
    )


def apply_rules(draft: Draft, rules: Mapping[str, Rule]) -> None:
    """Record what becomes of each key of the source; a key that no rule knows is in the table, too."""
    for key, value in draft.source.items():
        rule = rules.get(key)
        if rule is None:
            hint = did_you_mean(str(key), [str(name) for name in rules], before="; ")
            draft.unsupported(str(key), value, f"not an option of {draft.peer} that is known here{hint}")
        elif value is None or value == "":
            draft.same(key, value, "not set")
        else:
            rule(draft, key, value)


def share(rows: Iterable[Row]) -> float:
    """Return the share of keys that have the same effect or are irrelevant."""
    kinds = [row.effect for row in rows]
    good = sum(kind in (Effect.SAME, Effect.IRRELEVANT) for kind in kinds)
    return good / len(kinds) if kinds else 1.0


def finish(draft: Draft) -> None:
    """Make the values agree: an adapter's options without an adapter, held-out rows, processes.

    Raises:
        ValueError: The configuration names no data.
    """
    values = draft.values
    if not values.get("load.sources"):
        raise ValueError(f"the configuration names no data set, which {draft.peer} needs, too")
    method = values.get("train.method", draft.defaults.get("train.method", "lora"))
    if method == "full":
        for key, off in NO_LORA_OPTIONS.items():
            if values.get(f"train.{key}", off) != off:
                values[f"train.{key}"] = off
    if "load.eval" not in values:
        values["load.eval"] = {"path": None, "fraction": None, "count": HELD_OUT}
        draft.hints.append(
            f"the source holds no rows out; here {HELD_OUT} rows are, since every model is measured on some (load.eval)"
        )
    if draft.processes > 1:
        values["train.launch.processes"] = draft.processes
    if values.get("train.launch.launcher") == "ray" and str(values.get("train.launch.engine", "ddp")) != "ddp":
        values["train.launch.engine"] = "fsdp2"
        draft.hints.append("with Ray, the engine is fsdp2, which shards the model, too")
    if values.get("pack.strategy") == "wrapped":
        values["pack.overflow"] = "split"
    if values.get("train.gradient_checkpointing") is False:
        arguments: dict[str, Any] = dict(values.get("train.arguments", {}))
        arguments.pop("gradient_checkpointing_kwargs", None)
        values["train.arguments"] = arguments
    if values.get("train.lora_target_parameters") and values.get("train.lora_dropout"):
        values["train.lora_dropout"] = 0.0
