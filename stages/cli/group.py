"""Classes of click for the command line: sections in the help, examples, and suggestions for misspelled names.

click, rather than typer: typer takes a command's options from the signature of its function, so that `sft --help` would
import every tool, and torch with it. Here a command is an entry of a table and its module is imported when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import click

from sft.suggest import did_you_mean


@dataclass(frozen=True)
class Entry:
    """A command of `sft`.

    Args:
        summary: What it does, for lists of commands.
        home: Module that runs it.
        options: Its options and arguments, besides those that all commands have.
        examples: Command lines to show in its help.
        details: More text for its help.
        writes_params: Whether `--set` writes params.yaml, because the results must belong to that file.
        reads_params: Whether it needs a params.yaml.
        takes_values: Whether it takes `--set`, as all that read or write a params.yaml do.
        folder: Name of the argument that may name a shipped folder, which needs no params.yaml; empty if there is none.
    """

    summary: str
    home: str
    options: tuple[click.Parameter, ...] = ()
    examples: tuple[str, ...] = ()
    details: str = ""
    writes_params: bool = False
    reads_params: bool = True
    takes_values: bool = True
    folder: str = ""


class Command(click.Command):
    """A command whose help ends with examples."""

    def __init__(self, *args: Any, examples: tuple[str, ...] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._examples = examples

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        if self._examples:
            with formatter.section("Examples"):
                formatter.write("".join(f"{'':>{formatter.current_indent}}$ {line}\n" for line in self._examples))


class Group(click.Group):
    """The command `sft`: its help lists commands by section, and an unknown name gets a suggestion.

    Args:
        sections: Titles of sections, each with its commands in the order in which they are listed.
    """

    def __init__(self, *, sections: Mapping[str, tuple[click.Command, ...]], **kwargs: Any) -> None:
        commands = {str(command.name): command for found in sections.values() for command in found}
        super().__init__(commands=commands, **kwargs)
        self._sections = sections

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the sections."""
        return list(self.commands)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by section."""
        for title, commands in self._sections.items():
            with formatter.section(title):
                formatter.write_dl([(str(command.name), command.short_help or "") for command in commands])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command.

        Raises:
            click.UsageError: There is none of this name; the message has the nearest one, and all of them.
        """
        name = args[0]
        if name not in self.commands:
            hint = did_you_mean(name, self.commands, after=" ")
            raise click.UsageError(f"unknown command {name!r}; {hint}There are {', '.join(self.commands)}", ctx)
        return super().resolve_command(ctx, args)


def describe_usage_error(error: click.UsageError) -> str:
    """Return the message about a wrong command line, with the command whose help says more."""
    message = error.message
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        message = _describe_unknown_option(error.option_name, error.ctx)
    elif isinstance(error, (click.BadParameter, click.BadOptionUsage)):
        message = error.format_message()
    command = error.ctx.command_path if error.ctx is not None else "sft"
    return f"{message[:1].lower()}{message[1:]}\nType `{command} --help` for its options."


def _describe_unknown_option(name: str, context: click.Context) -> str:
    """Return the message about an option that a command lacks: who takes it, or the nearest name."""
    root = context.find_root().command
    commands = root.commands if isinstance(root, click.Group) else {}
    owners = [owner for owner, command in commands.items() if name in _option_names(command, context)]
    if owners:
        listed = " and ".join(filter(None, (", ".join(owners[:-1]), owners[-1])))
        return f"{context.info_name} does not take {name}: only {listed} {'do' if owners[1:] else 'does'}"
    known = _option_names(context.command, context)
    otherwise = f"there are {', '.join(known)}"
    return f"unknown option {name}; {did_you_mean(name, known, otherwise=otherwise)}"


def _option_names(command: click.Command, context: click.Context) -> list[str]:
    options = [one for one in command.get_params(context) if isinstance(one, click.Option)]
    return [name for option in options for name in option.opts if name.startswith("--")]


def make_command(name: str, entry: Entry, common: tuple[click.Parameter, ...], run: Callable[..., Any]) -> Command:
    """Return the command of an entry.

    Args:
        name: Its name.
        entry: What it does and which options it has.
        common: Options that all commands have.
        run: Called with the name and the values of the options.
    """
    text = entry.summary[:1].upper() + entry.summary[1:] + "."
    return Command(
        name,
        params=[*entry.options, *common],
        callback=lambda **values: run(name, **values),
        help=f"{text}\n\n{entry.details}" if entry.details else text,
        short_help=entry.summary,
        examples=entry.examples,
    )
