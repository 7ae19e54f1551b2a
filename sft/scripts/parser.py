"""Command line of training scripts: options of several dataclasses, which a YAML file may also give."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, get_args

import yaml
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool

from sft.suggest import did_you_mean

CONFIG_FLAG = "--config"
NONE_WORDS = ("none", "null")

YAML_BOOLEAN_WORDS = ("yes", "no", "on", "off")
"""Words that YAML 1.1 reads as booleans, and that options may have as values: `save_strategy: no`."""


class TrlParser(HfArgumentParser):
    """`transformers.HfArgumentParser` with `--config FILE`, a YAML file whose values replace the defaults.

    The file maps names of options to values; what the command line gives takes precedence. Its key `env` sets
    environment variables.

    Further differences from `HfArgumentParser`:

    * An option that several dataclasses have is one option of the command line, whose value all of them get.
    * `none` and `null` are None for numbers and booleans that may be None.
    * Values of the file are converted and checked as those of the command line are.

    Args:
        dataclass_types: Dataclasses that describe the options; None = none, for a parser that gets subparsers.
        kwargs: Arguments of `argparse.ArgumentParser`.

    Raises:
        ValueError: A dataclass has a field `config`, or two have an option of one name with different defaults.
    """

    def __init__(self, dataclass_types: Any = None, **kwargs: Any) -> None:
        if dataclass_types is None:
            dataclass_types = []
        kinds = list(dataclass_types) if isinstance(dataclass_types, Iterable) else [dataclass_types]
        for kind in kinds:
            if any(field.name == "config" for field in dataclasses.fields(kind)):
                raise ValueError(
                    f"dataclass {kind.__name__} has a field named 'config', and --config names the YAML file with "
                    "options; rename the field"
                )
        kwargs.setdefault("epilog", f"{CONFIG_FLAG} FILE reads options from a YAML file; the command line wins.")
        super().__init__(dataclass_types=kinds, **kwargs)
        self._uses = Counter(field.name for kind in kinds for field in dataclasses.fields(kind) if field.init)

    @staticmethod
    def _parse_dataclass_field(parser: Any, field: dataclasses.Field) -> None:
        """Add the option of a field, unless a dataclass before has added it."""
        flag, may_be_none = f"--{field.name}", type(None) in get_args(field.type)
        known = parser._option_string_actions.get(flag)
        if known is not None:
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if default != known.default:
                raise ValueError(
                    f"two dataclasses have the option {flag}, with the defaults {known.default!r} and {default!r}; "
                    "rename one, or give both the same default"
                )
            return
        HfArgumentParser._parse_dataclass_field(parser, field)
        action = parser._option_string_actions[flag]
        if may_be_none and action.type in (int, float, string_to_bool):
            action.type = _or_none(action.type)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, to a namespace that keeps values of options that several dataclasses have."""
        if namespace is None:
            namespace = _SharedValues()
            namespace.uses = Counter(self._uses)
        return super().parse_known_args(args, namespace)

    def parse_args_into_dataclasses(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Parse as `HfArgumentParser` does; what a dataclass takes at construction only is set from its namesakes."""
        output = super().parse_args_into_dataclasses(*args, **kwargs)
        parsed = output[: len(self.dataclass_types)]
        values = {field.name: getattr(item, field.name) for item in parsed for field in dataclasses.fields(item)}
        for item in parsed:
            for name in set(_init_only(type(item))) & set(values):
                setattr(item, name, values[name])
        return output

    def parse_args_and_config(
        self,
        args: Iterable[str] | None = None,
        return_remaining_strings: bool = False,
        fail_with_unknown_args: bool = True,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """Parse the command line and the file of `--config` to one instance of each dataclass.

        Args:
            args: The command line; None = that of the process.
            return_remaining_strings: Return what no option takes, as one more item: first of the file, as
                `["--name", "value"]`, then of the command line.
            fail_with_unknown_args: Raise an error for keys of the file that no option has. What the command line has
                too much is always an error unless it is returned.
            separate_remaining_strings: Return what remains of the file and of the command line as two items.

        Returns:
            Instances of the dataclasses, in order; then a namespace with options that were added by hand, if there are
            any; then what remains, if asked for.

        Raises:
            ValueError: The file is not a mapping, its `env` is not one, or an option is unknown.
        """
        rest = list(sys.argv[1:] if args is None else args)
        path, rest = self._take_config(rest)
        unknown = [] if path is None else self._read_config(path)
        if unknown and fail_with_unknown_args and not return_remaining_strings:
            raise ValueError(f"{path}: {self._unknown_options(unknown)}")
        output = self.parse_args_into_dataclasses(args=rest, return_remaining_strings=return_remaining_strings)
        if not return_remaining_strings:
            return output
        *parsed, remaining = output
        of_file = [part for name, value in unknown for part in (f"--{name}", str(value))]
        return (*parsed, of_file, remaining) if separate_remaining_strings else (*parsed, of_file + remaining)

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Replace the defaults of options, here and in all subparsers; these options need not be given any more.

        Returns:
            What no option takes, as `["--name", "value", ...]`.
        """
        unknown = self._set_defaults(kwargs, {})
        return [part for name, value in unknown for part in (f"--{name}", str(value))]

    def _set_defaults(self, values: dict[str, Any], words: dict[str, str]) -> list[tuple[str, Any]]:
        """Set defaults; return the names and values that no option has.

        Args:
            values: Name of option -> value.
            words: Name of option -> what the file says there, for values that YAML read as booleans.
        """
        used = set()
        for action in _all_actions(self):
            if action.dest in values:
                action.default = self._default(action, values[action.dest], words.get(action.dest))
                action.required = False
                used.add(action.dest)
        return [(name, value) for name, value in values.items() if name not in used]

    def _default(self, action: argparse.Action, value: Any, word: str | None) -> Any:
        """Return a value of the file as an option's default: converted and checked as on a command line."""
        takes_words = action.type is str or bool(action.choices)
        if word is not None and takes_words:
            value = word
        if action.nargs in ("+", "*") and isinstance(value, (str, int, float)):
            value = [value]
        if isinstance(value, (str, bool, int, float)) and not (takes_words and isinstance(value, bool)):
            try:
                converted = self._get_value(action, str(value))
                self._check_value(action, converted)
            except argparse.ArgumentError as error:
                self.error(f"{CONFIG_FLAG}: {error}")
            return value if action.type is str and not isinstance(value, str) else converted
        return value

    def _take_config(self, args: list[str]) -> tuple[str | None, list[str]]:
        """Return the path that `--config` gives, if any, and the other arguments."""
        found: list[str] = []
        rest: list[str] = []
        given = iter(args)
        for arg in given:
            if arg == CONFIG_FLAG:
                path = next(given, "--")
                if path.startswith("--"):
                    self.error(f"{CONFIG_FLAG} needs the path of a YAML file")
                found.append(path)
            elif arg.startswith(f"{CONFIG_FLAG}="):
                found.append(arg.partition("=")[2])
            else:
                rest.append(arg)
        if len(found) > 1:
            self.error(f"{CONFIG_FLAG} is given {len(found)} times ({', '.join(found)}); put all options into one file")
        return (found[0] if found else None), rest

    def _read_config(self, path: str) -> list[tuple[str, Any]]:
        """Take the environment and the defaults of a file; return the names and values that no option has."""
        try:
            with open(path, encoding="utf-8") as file:  # noqa: PTH123  # what tests of scripts replace
                text = file.read()
            values = yaml.safe_load(text)
            words = _boolean_words(text)
        except OSError as error:
            self.error(f"{CONFIG_FLAG} {path} can't be read: {error.strerror}")
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.error(f"{CONFIG_FLAG} {path} is not a YAML file: {error}")
        if not isinstance(values, dict):
            raise ValueError(
                f"{path} must contain a YAML mapping of option to value, such as 'max_length: 512', not {values!r:.60}"
            )
        values = {str(name): value for name, value in values.items()}
        environment = values.pop("env", {})
        if not isinstance(environment, dict):
            raise ValueError(f"`env` field should be a dict in the YAML file. {path} has env: {environment!r:.60}")
        os.environ.update({str(name): str(value) for name, value in environment.items()})
        return self._set_defaults(values, words)

    def _unknown_options(self, unknown: list[tuple[str, Any]]) -> str:
        names = [action.dest for action in _all_actions(self)]
        hints = [f"{name!r}{did_you_mean(name, names, before=' (', after=')')}" for name, _ in unknown]
        return (
            f"Unknown arguments from config file: {', '.join(hints)}. Correct or remove them, or pass "
            "fail_with_unknown_args=False to leave them out"
        )


class _SharedValues(argparse.Namespace):
    """Namespace in which a value is deleted as many times as dataclasses have it before it is gone.

    `HfArgumentParser` deletes the values of a dataclass before it fills the next one.
    """

    __slots__ = ("uses",)  # not in `vars()`, which lists the options
    uses: Counter[str]

    def __delattr__(self, name: str) -> None:
        self.uses[name] -= 1
        if self.uses[name] <= 0:
            super().__delattr__(name)


def _init_only(kind: Any) -> list[str]:
    """Return the names that a dataclass declares as `InitVar`, which are options of no command line by themselves."""
    fields = {field.name for field in dataclasses.fields(kind)}
    declared = kind.__dataclass_fields__
    return [name for name in declared if name not in fields and "ClassVar" not in str(declared[name].type)]


def _or_none(convert: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a conversion that also takes the words for None."""

    def parse(word: Any) -> Any:
        return None if isinstance(word, str) and word.lower() in NONE_WORDS else convert(word)

    parse.__name__ = getattr(convert, "__name__", "value")  # argparse's messages name the type
    return parse


def _all_actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield the options of a parser and of all its subparsers."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from _all_actions(subparser)
        elif action.option_strings:
            yield action


def _boolean_words(text: str) -> dict[str, str]:
    """Return what a YAML file says at the top level where it says yes, no, on or off."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    scalars = [(key, value) for key, value in pairs if isinstance(value, yaml.ScalarNode) and value.style is None]
    return {key.value: value.value for key, value in scalars if value.value.lower() in YAML_BOOLEAN_WORDS}
