"""Types of the section `load` of params.yaml: sources, held-out rows, and what is looked for in rows."""

from __future__ import annotations

import difflib
from typing import Annotated, Literal, Self

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import AfterValidator, Field, model_validator

from stages.checkout.redaction import redact
from stages.params.section import Fraction, Section, Seed


def _template(text: str) -> str:
    try:
        SandboxedEnvironment().parse(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"not a Jinja template: {error.message}, line {error.lineno}") from error
    return text


def _without_secrets(path: str) -> str:
    if redact(path, {}) != path:
        raise ValueError(
            "a name or password in an address would be recorded wherever params.yaml is (git, DVC, MLflow); leave it "
            "out: credentials are found in ~/.netrc or the environment, as the file system finds them"
        )
    return path


Template = Annotated[str, AfterValidator(_template)]
Role = Literal["system", "user", "assistant", "tool"]


class TemplateSection(Section):
    """A conversation made of a row's columns, each text a Jinja template such as `{{ title }}: {{ body }}`."""

    system: Annotated[Template | None, Field(description="System message")] = None
    user: Annotated[Template, Field(description="What the user says")]
    assistant: Annotated[Template, Field(description="What is to be answered")]


class MappedSection(Section):
    """How rows are read whose columns or roles are not named as usual."""

    # pydantic gives every object a default of its own
    columns: Annotated[dict[str, str], Field(description="Column of the data -> its name here")] = {}  # noqa: RUF012
    roles: Annotated[dict[str, Role], Field(description="Role in the data -> one of ours")] = {}  # noqa: RUF012
    template: Annotated[TemplateSection | None, Field(description="Makes a conversation of any columns")] = None

    @model_validator(mode="after")
    def _template_alone(self) -> Self:
        if self.template is not None and (self.columns or self.roles):
            raise ValueError("template reads columns by their own names and makes the roles; remove columns and roles")
        return self


class SourceSection(MappedSection):
    """One source of training rows; only `path` must be stated."""

    path: Annotated[
        str,
        AfterValidator(_without_secrets),
        Field(min_length=1, description="File, folder or pattern in data/, URL, or hub id"),
    ]
    hub: Annotated[bool, Field(description="path is a data set id on the hub")] = False
    config: Annotated[str | None, Field(description="Configuration of the hub data set")] = None
    split: Annotated[str, Field(description="Split of the hub data set")] = "train"
    revision: Annotated[str | None, Field(description="Branch, tag or commit of the hub data set")] = None
    streaming: Annotated[bool, Field(description="Read the hub data set as it comes, without a copy on disk")] = False
    max_rows: Annotated[int | None, Field(ge=1, description="Take so many rows, by load.seed; a stream's first")] = None
    weight: Annotated[
        float, Field(gt=0.0, le=100.0, description="Times each row is trained on; 0.5 = half of them")
    ] = 1.0

    @model_validator(mode="after")
    def _only_the_hub_streams(self) -> Self:
        if self.streaming and not self.hub:
            raise ValueError("streaming is for data sets of the hub; remove it, or state hub: true")
        return self


class EvalSection(MappedSection):
    """Held-out rows: a file, or a fraction or a number of the sources' rows."""

    path: Annotated[str | None, Field(description="File inside data/")]
    fraction: Annotated[float | None, Field(gt=0.0, lt=1.0, description="Part of the sources that is held out")]
    count: Annotated[int | None, Field(ge=1, description="Rows held out, from every source its share")] = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = {name: getattr(self, name) for name in ("path", "fraction", "count")}
        stated = {name: value for name, value in given.items() if value is not None}
        if len(stated) != 1:
            raise ValueError(f"state one of path, fraction and count, not {stated or 'none'}")
        mapped = [name for name in MappedSection.model_fields if getattr(self, name)]
        if self.path is None and mapped:
            raise ValueError(f"{', '.join(mapped)} belong to the sources here: held-out rows are some of theirs")
        return self

    def source(self) -> SourceSection | None:
        """The file of held-out rows as a source, when there is one."""
        if self.path is None:
            return None
        return SourceSection(path=self.path, columns=self.columns, roles=self.roles, template=self.template)


REASONS = (
    *("bad_flag", "bad_history", "bad_messages", "bad_template_kwargs", "bad_tool_call", "bad_tools"),
    *("bad_unicode", "content_not_text", "control_characters", "duplicate", "empty_answer", "empty_content"),
    *("empty_text", "has_media", "in_eval", "length_outlier", "missing_column", "mojibake", "near_duplicate"),
    *(
        "near_eval",
        "no_answer",
        "no_final_answer",
        "no_messages",
        "not_text",
        "number",
        "rare_language",
        "system_of_text",
    ),
    *("template", "tool_call", "tool_schema", "truncated_answer", "two_system_messages", "unknown_role"),
    *("unreadable", "wrong_order"),
)
"""What the ledger of `load` gives as a reason, what `max_rows` and `weight` leave out aside."""


def _known(fractions: dict[str, float]) -> dict[str, float]:
    for name in fractions:
        if name not in REASONS:
            near = difflib.get_close_matches(name, REASONS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(REASONS)}"
            raise ValueError(f"{name!r} is no reason that the ledger knows; {hint}")
    return fractions


Fractions = Annotated[dict[str, Fraction], AfterValidator(_known)]
Action = Literal["off", "warn", "drop", "fail"]
MendingAction = Literal["off", "warn", "repair", "drop", "fail"]


class ChecksSection(Section):
    """What rows are looked at for, and what happens to a row that has it."""

    duplicate: Annotated[Action, Field(description="The same as an earlier training row")]
    in_eval: Annotated[Action, Field(description="The same as a held-out row")]
    near_duplicate: Annotated[Action, Field(description="Nearly the same as an earlier training row")]
    near_eval: Annotated[Action, Field(description="Nearly the same as a held-out row")]
    similarity: Annotated[float, Field(ge=0.3, le=1.0, description="Word triples shared by rows nearly the same")]
    unreadable: Annotated[Literal["drop", "fail"], Field(description="A line or table row that can't be read")]
    empty_answer: Annotated[Action, Field(description="An answer without text")]
    number: Annotated[Literal["repair", "drop", "fail"], Field(description="A number where text is needed")]
    truncated_answer: Annotated[Action, Field(description="An answer that breaks off")]
    mojibake: Annotated[MendingAction, Field(description="Text decoded with the wrong encoding")]
    control_characters: Annotated[MendingAction, Field(description="Characters that nobody sees")]
    tool_schema: Annotated[Action, Field(description="A tool whose parameters are no JSON Schema")]
    tool_call: Annotated[Action, Field(description="A call that does not fit the tools offered")]
    length_outlier: Annotated[Action, Field(description="A row far longer or shorter than the others")]
    rare_language: Annotated[Action, Field(description="A row in a language of less than 1 % of the rows")]


class LoadSection(Section):
    """Sources to validated records."""

    sources: Annotated[list[SourceSection], Field(min_length=1, description="Where training rows come from")]
    eval: Annotated[EvalSection, Field(description="Where held-out rows come from")]
    require_alternation: Annotated[bool, Field(description="User and assistant must take turns")]
    checks: Annotated[ChecksSection, Field(description="What rows are looked at for")]
    max_dropped_fraction: Annotated[Fraction, Field(description="Stop when more rows than this were dropped")]
    max_fractions: Annotated[Fractions, Field(description="Reason -> stop when more rows than this have it")]
    seed: Annotated[Seed, Field(description="Seed of the eval split")]
