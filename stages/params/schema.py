"""Typed mirror of params.yaml: one class per section, in the order of the file, and the functions that read it.

params.yaml states every value, so fields have no defaults, except those of a source. Unknown keys are refused. Each key
is described once, in its field's `Field(description=...)`, and a top-level section in the docstring of its class.
Prefect's form shows these texts, and the comments of params.yaml repeat them word for word.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError

from sft.evaluate.gate import check_ranges, parse_gate
from sft.export.quantization import GROUP_SIZES
from sft.optimizers.names import LAYERWISE, OWN_OPTIMIZERS, check_optim_args
from sft.optimizers.rules import parameter_rules
from sft.optimizers.schedules import SCHEDULES, check_schedule
from sft.options import (
    UNREPEATABLE_STARTS,
    BadLossPolicy,
    LossType,
    NotPrintedPolicy,
    OverflowPolicy,
    PackingStrategy,
    ThinkingPolicy,
    UntrainedPolicy,
)
from sft.suggest import did_you_mean
from stages.checkout.redaction import redact
from stages.params.adapters import check_adapter
from stages.params.arguments import check_arguments, training_options
from stages.params.engines import GGUFKind, read_entry
from stages.params.figures import ENGINE, STOP_RATE, figure_of, metric_names, open_ended_names, range_of
from stages.params.names import (
    check_experiment_folder,
    check_experiment_name,
    check_model_name,
    check_no_secret,
    check_repository,
    check_revision,
)
from stages.params.streaming import against_streaming
from stages.params.tasks import FOLDER, figure_names, task_names

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]

DType = Literal["float32", "bfloat16", "float16"]
Role = Literal["system", "user", "assistant", "tool", "function_call"]
MessageKey = Literal["role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name", "train", "weight"]
Tracker = Literal["mlflow", "tensorboard", "wandb", "trackio"]
Workers = Literal["processes", "ray"]
CheckAction = Literal["off", "warn", "drop", "fail"]
RepairAction = Literal["off", "warn", "repair", "drop", "fail"]

Engine = Literal["ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3"]
ENGINES: tuple[Engine, ...] = get_args(Engine)

BY_LENGTH = "length"
"""Value of `load.curriculum` by which rows are sorted by their tokens instead of a column."""

EVAL_FIGURES = ("eval_loss", "eval_mean_token_accuracy")
"""Figures that every evaluation of a training has."""

REASONS = (
    "bad_flag",
    "bad_history",
    "bad_messages",
    "bad_template_kwargs",
    "bad_tool_call",
    "bad_tools",
    "bad_unicode",
    "content_not_text",
    "control_characters",
    "curriculum",
    "duplicate",
    "empty_answer",
    "empty_content",
    "empty_text",
    "has_media",
    "image_places",
    "image_too_large",
    "image_unreadable",
    "in_eval",
    "length_outlier",
    "missing_column",
    "mojibake",
    "near_duplicate",
    "near_eval",
    "no_answer",
    "no_final_answer",
    "no_messages",
    "not_text",
    "number",
    "placeholder",
    "rare_language",
    "system_of_text",
    "template",
    "tool_call",
    "tool_schema",
    "truncated_answer",
    "two_system_messages",
    "unknown_key",
    "unknown_role",
    "unreadable",
    "wrong_order",
)
"""Reasons in the ledger of `load`, except those of rows that `max_rows`, `weight` and `interleave` do not take."""


class Section(BaseModel):
    """Base of all sections: frozen, strict types, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())

    @field_validator("*")
    @classmethod
    def _refuse_secrets(cls, value: Any) -> Any:
        return check_no_secret(value)


class ModelSection(Section):
    """The base model."""

    name_or_path: Annotated[
        str, Field(min_length=1, description="Hub id, local folder, or `embedded:NAME` for an embedded model.")
    ]
    revision: Annotated[
        str | None,
        AfterValidator(check_revision),
        Field(description="Branch, tag or commit on the hub; null = the branch main."),
    ]
    dtype: Annotated[
        DType, Field(description="Data type in which the base model is loaded: float32, bfloat16 or float16.")
    ]
    attn_implementation: Annotated[
        str, Field(description="auto, sdpa, eager, flash_attention_2, flash_attention_3 or flex_attention.")
    ]
    trust_remote_code: Annotated[bool, Field(description="Whether to run Python code that comes with the model.")]


def _check_template(text: str) -> str:
    try:
        SandboxedEnvironment().parse(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"not a Jinja template: {error.message}, line {error.lineno}") from error
    except RecursionError:
        raise ValueError("not a Jinja template: its expressions lie too deep in one another") from None
    return text


def _check_steps(value: float) -> float:
    """Return steps as an integer, and a fraction of all steps as it is."""
    if value < 1:
        return value
    if not math.isfinite(value) or value != int(value):
        raise ValueError(f"{value:g} is not a number of steps; give an integer, or below 1 a fraction of all steps")
    return int(value)


def _known(fractions: dict[str, float]) -> dict[str, float]:
    for name in fractions:
        if name not in REASONS:
            hint = did_you_mean(name, REASONS, otherwise=f"there are {', '.join(REASONS)}")
            raise ValueError(f"{name!r} is not a reason in the ledger; {hint}")
    return fractions


Template = Annotated[str, AfterValidator(_check_template)]
Fractions = Annotated[dict[str, Fraction], AfterValidator(_known)]


class TemplateSection(Section):
    """What a row says, made of its columns, each text a Jinja template such as `{{ title }}: {{ body }}`.

    Either a conversation (`user`, `assistant`), or text that no chat template prints (`prompt`, `completion`).
    """

    system: Annotated[Template | None, Field(description="System message.")] = None
    user: Annotated[Template | None, Field(description="User message.")] = None
    assistant: Annotated[Template | None, Field(description="Answer of the assistant.")] = None
    prompt: Annotated[
        Template | None, Field(description="Text before the trained one, in place of a conversation.")
    ] = None
    completion: Annotated[Template | None, Field(description="Text that is trained, after `prompt`.")] = None

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        given = {name for name in TemplateSection.model_fields if getattr(self, name) is not None}
        if given - {"system"} != {"user", "assistant"} and given != {"prompt", "completion"}:
            stated = ", ".join(sorted(given)) or "nothing"
            raise ValueError(
                f"state user and assistant (and system, if there is one), or prompt and completion; {stated} given"
            )
        return self


NAMES_ELSEWHERE = {
    "field_messages": "columns: {NAME: messages}",
    "field_system": "columns: {NAME: system}",
    "field_tools": "columns: {NAME: tools}",
    "field_instruction": "columns: {NAME: instruction}",
    "field_input": "columns: {NAME: input}",
    "field_output": "columns: {NAME: output}",
    "field_thinking": "message_keys: {NAME: reasoning_content}",
    "message_property_mappings": "message_keys: {NAME: role, OTHER: content}",
    "message_field_role": "message_keys: {NAME: role}",
    "message_field_content": "message_keys: {NAME: content}",
    "message_field_training": "message_keys: {NAME: train}",
    "role_tag": "message_keys: {NAME: role}",
    "content_tag": "message_keys: {NAME: content}",
    "user_tag": "roles: {NAME: user}",
    "assistant_tag": "roles: {NAME: assistant}",
    "system_tag": "roles: {NAME: system}",
    "observation_tag": "roles: {NAME: tool}",
    "function_tag": "roles: {NAME: function_call}",
    "hf_hub_url": "path: OWNER/NAME and hub: true",
    "file_name": "path: data/NAME",
    "subset": "config: NAME",
    "num_samples": "max_rows: NUMBER",
}
"""Options of a data set in Axolotl and LLaMA-Factory -> how they are written here."""


class MappedSection(Section):
    """How to read rows whose columns or roles have other names than the pipeline's."""

    # pydantic copies a mutable default for each instance
    columns: Annotated[dict[str, str], Field(description="Name of a column in the data -> its name here.")] = {}
    roles: Annotated[
        dict[str, Role],
        Field(description="Name of a role in the data -> system, user, assistant, tool or function_call."),
    ] = {}
    message_keys: Annotated[
        dict[str, MessageKey],
        Field(
            description="Name of a key of messages in the data -> role, content, reasoning_content, tool_calls, "
            "tool_call_id, name, train or weight."
        ),
    ] = {}
    template: Annotated[
        TemplateSection | None,
        Field(description="Jinja templates that make a conversation, or prompt and completion, of any columns."),
    ] = None

    @model_validator(mode="after")
    def _check_template_is_alone(self) -> Self:
        if self.template is not None and (self.columns or self.roles or self.message_keys):
            raise ValueError(
                "template reads columns by their own names and sets the roles; remove columns, roles and message_keys"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _refuse_names_of_others(cls, values: Any) -> Any:
        for name in values if isinstance(values, dict) else ():
            if name in NAMES_ELSEWHERE:
                raise ValueError(f"{name} is called otherwise here; write {NAMES_ELSEWHERE[name]}")
        return values


class SourceSection(MappedSection):
    """One source of training rows. Only `path` is required."""

    path: Annotated[
        str,
        AfterValidator(check_no_secret),
        Field(
            min_length=1,
            description="File (.jsonl, .json, .csv, .parquet), folder or pattern in data/, whose changes DVC sees; a "
            "URL; or a hub id with `hub: true`.",
        ),
    ]
    hub: Annotated[bool, Field(description="Whether `path` is the id of a data set on the hub.")] = False
    config: Annotated[str | None, Field(description="Configuration of the hub data set.")] = None
    split: Annotated[str, Field(description="Split of the hub data set.")] = "train"
    revision: Annotated[
        str | None, AfterValidator(check_revision), Field(description="Branch, tag or commit of the hub data set.")
    ] = None
    streaming: Annotated[
        bool, Field(description="Whether to read the hub data set as a stream, without a copy on disk.")
    ] = False
    max_rows: Annotated[
        int | None,
        Field(ge=1, description="Number of rows to take, chosen with load.seed; of a stream, the first rows."),
    ] = None
    weight: Annotated[
        float,
        Field(
            gt=0.0,
            le=100.0,
            description="How often to train on each row: 0.5 = on half of the rows, 2 = on each twice.",
        ),
    ] = 1.0

    share: Annotated[
        float | None,
        Field(gt=0.0, description="How often the next row is of this source, relative to the others; load.interleave."),
    ] = None

    @model_validator(mode="after")
    def _check_streaming(self) -> Self:
        if self.streaming and not self.hub:
            raise ValueError("streaming is for data sets of the hub; remove it, or state hub: true")
        return self

    @model_validator(mode="after")
    def _check_id(self) -> Self:
        if self.hub:
            check_repository(self.path)
        return self


class EvalSection(MappedSection):
    """Where held-out rows come from. Exactly one of `path`, `fraction` and `count` is given."""

    path: Annotated[
        str | None,
        AfterValidator(check_no_secret),
        Field(description="File in data/; null if `fraction` or `count` is given."),
    ]
    fraction: Annotated[
        float | None,
        Field(
            gt=0.0,
            lt=1.0,
            description="Fraction of the sources' rows to hold out, e.g. 0.1. Rows are chosen by a hash of their "
            "content, so appending rows does not change the choice.",
        ),
    ]
    count: Annotated[
        int | None, Field(ge=1, description="Number of rows to hold out, e.g. 200; each source gives its share.")
    ] = None

    @model_validator(mode="after")
    def _check_one_is_stated(self) -> Self:
        given = {name: getattr(self, name) for name in ("path", "fraction", "count")}
        stated = {name: value for name, value in given.items() if value is not None}
        if len(stated) != 1:
            raise ValueError(f"state one of path, fraction and count, not {stated or 'none'}")
        mapped = [name for name in MappedSection.model_fields if getattr(self, name)]
        if self.path is None and mapped:
            raise ValueError(
                f"{', '.join(mapped)} belong to the sources here, since held-out rows are taken from them; remove them"
            )
        return self

    def source(self) -> SourceSection | None:
        """Return the file of held-out rows as a source, or None if there is no such file."""
        if self.path is None:
            return None
        return SourceSection(
            path=self.path,
            columns=self.columns,
            roles=self.roles,
            message_keys=self.message_keys,
            template=self.template,
        )


class ChecksSection(Section):
    """Problems that are looked for in rows, each with an action."""

    duplicate: Annotated[CheckAction, Field(description="Training row that equals an earlier training row.")]
    in_eval: Annotated[CheckAction, Field(description="Training row that equals a held-out row.")]
    near_duplicate: Annotated[CheckAction, Field(description="Training row that nearly equals an earlier one.")]
    near_eval: Annotated[CheckAction, Field(description="Training row that nearly equals a held-out row.")]
    similarity: Annotated[
        float,
        Field(ge=0.3, le=1.0, description="Smallest fraction of shared word triples of nearly equal rows; 0.3 to 1."),
    ]
    unreadable: Annotated[
        Literal["drop", "fail"],
        Field(
            description="Line that is not a JSON object in UTF-8, CSV row with a wrong quote or length: drop or fail."
        ),
    ]
    empty_answer: Annotated[CheckAction, Field(description="Assistant message or completion without text.")]
    number: Annotated[
        Literal["repair", "drop", "fail"],
        Field(description="Number where text is needed: drop, fail, or repair (write it as text)."),
    ]
    image: Annotated[
        Literal["drop", "fail"],
        Field(description="Image that is missing, damaged, too large or without a place: drop or fail."),
    ]
    truncated_answer: Annotated[
        CheckAction, Field(description="Answer that ends inside a code block, JSON or a sentence.")
    ]
    mojibake: Annotated[
        RepairAction, Field(description="Text decoded with the wrong encoding (cafÃ©), lost characters; also repair.")
    ]
    control_characters: Annotated[
        RepairAction, Field(description="Control characters, reversed text direction, invisible tags; also repair.")
    ]
    placeholder: Annotated[
        CheckAction, Field(description="Place of a template that was not filled in: {{name}}, <your text>.")
    ]
    tool_schema: Annotated[CheckAction, Field(description="Tool whose parameters are not a valid JSON Schema.")]
    tool_call: Annotated[
        CheckAction, Field(description="Call of a tool that is not offered, or arguments that its schema forbids.")
    ]
    length_outlier: Annotated[CheckAction, Field(description="Training row far longer or shorter than the others.")]
    rare_language: Annotated[
        CheckAction, Field(description="Training row in a language of less than 1 % of them; takes 0.1 ms per row.")
    ]


class ImagesSection(Section):
    """Images of rows, which are written to outs/load/images."""

    max_side: Annotated[
        Positive, Field(description="Pixels of an image's longer side; larger images are made smaller.")
    ]
    max_megabytes: Annotated[
        float, Field(gt=0.0, description="Size of an image's file; rows with larger ones are dropped.")
    ]
    urls: Annotated[bool, Field(description="Whether to download images that rows name by http(s) URL.")]


def _check_prompts(value: str) -> str:
    if value != "builtin" and (not value.startswith("data/") or ".." in value.split("/")):
        raise ValueError("prompts must be builtin, or a file or folder in data/, whose changes DVC sees")
    return value


class RehearsalSection(Section):
    """General prompts that the base model answers before training, so that it does not forget what it can."""

    prompts: Annotated[
        str,
        AfterValidator(_check_prompts),
        Field(description="File or folder of prompts in data/, or builtin: general ones that come with the project."),
    ]
    share: Annotated[float, Field(gt=0.0, lt=1.0, description="Share of the trained tokens that are of these answers.")]
    max_new_tokens: Annotated[Positive, Field(description="Tokens of the longest answer.")]
    temperature: Annotated[
        float, Field(ge=0.0, description="Temperature of the answers; 0 = the most likely token each time.")
    ]
    kl: Annotated[
        float,
        Field(
            ge=0.0,
            le=1.0,
            description="Share of these tokens' loss that is the KL divergence from the base model, as recorded with "
            "its answers; 0 = train on the answers alone.",
        ),
    ]
    top_k: Annotated[int, Field(ge=0, description="Most likely tokens that are recorded for it; 0 = none.")]
    seed: Annotated[Seed, Field(description="Seed for the order of the prompts, and for sampling.")]

    @model_validator(mode="after")
    def _check_recorded(self) -> Self:
        if self.kl and not self.top_k:
            raise ValueError(f"kl {self.kl} needs recorded tokens; state top_k: 32, or kl: 0")
        return self


class InterleaveSection(Section):
    """How the rows of several sources are mixed."""

    strategy: Annotated[
        Literal["concat", "first_exhausted", "all_exhausted", "all_exhausted_without_replacement"],
        Field(
            description="concat (all rows, source after source), first_exhausted (until a source is used up), "
            "all_exhausted (until all are; rows of the others repeat), or all_exhausted_without_replacement."
        ),
    ]
    seed: Annotated[Seed, Field(description="Seed of the choice of the next source, if sources state a `share`.")]


class LoadSection(Section):
    """From data sources to validated records."""

    sources: Annotated[
        list[SourceSection],
        Field(min_length=1, description="Where training rows come from. docs/data.md lists the options of a source."),
    ]
    interleave: Annotated[
        InterleaveSection,
        Field(
            description="How the rows of several sources are mixed, as datasets.interleave_datasets mixes them "
            "(docs/data.md)."
        ),
    ]
    eval: Annotated[EvalSection, Field(description="Held-out rows: a file of their own, or a part of the sources.")]
    streaming: Annotated[
        bool,
        Field(
            description="Whether `train` reads the training rows as a stream, without writing them to the disk; needs "
            "train.max_steps (docs/streaming.md)."
        ),
    ]
    streaming_window: Annotated[
        int, Field(ge=100, description="Rows of a stream that are checked, packed and shuffled together.")
    ]
    require_alternation: Annotated[bool, Field(description="Whether user and assistant must take turns.")]
    checks: Annotated[
        ChecksSection,
        Field(description="What to do with a row that has a problem: off, warn (list it), drop or fail."),
    ]
    images: Annotated[
        ImagesSection, Field(description="Images of rows, for a base model that reads images (docs/data.md).")
    ]
    rehearsal: Annotated[
        RehearsalSection | None,
        Field(
            description="Rows in which the base model answers general prompts, mixed into training against forgetting; "
            "null = none (docs/training.md)."
        ),
    ]
    curriculum: Annotated[
        str | None,
        Field(
            min_length=1,
            description="Column with the number by which `train.order: curriculum` sorts training rows, lowest first, "
            "or length (their tokens); null = none (docs/training.md).",
        ),
    ]
    max_dropped_fraction: Annotated[
        Fraction, Field(description="Stop if more than this fraction of the training or held-out rows is dropped.")
    ]
    max_fractions: Annotated[
        Fractions, Field(description="Like max_dropped_fraction, per reason, dropped or not, e.g. {duplicate: 0.01}.")
    ]
    seed: Annotated[
        Seed, Field(description="Seed for choosing held-out rows, and the rows of `max_rows` and `weight`.")
    ]

    @model_validator(mode="after")
    def _check_interleave(self) -> Self:
        strategy, stated = self.interleave.strategy, [source.share is not None for source in self.sources]
        if strategy == "concat":
            if any(stated):
                raise ValueError(
                    f"sources[{stated.index(True)}].share would be ignored with interleave.strategy: concat; state "
                    "first_exhausted or all_exhausted, or `weight` to train on each row more or less often"
                )
            return self
        if len(self.sources) < 2:
            raise ValueError(f"interleave.strategy: {strategy} mixes several sources, and there is one; state concat")
        if any(stated) != all(stated):
            raise ValueError(
                f"sources[{stated.index(False)}] has no share and others do; state it for all, or for none (in turn)"
            )
        for number, source in enumerate(self.sources):
            if source.weight != 1.0:
                raise ValueError(
                    f"sources[{number}].weight: {source.weight} and interleave.strategy: {strategy} both say how often "
                    "rows are trained; state `share` instead of weight"
                )
        return self


def _refuse_blank(token: str) -> str:
    if not token.strip():
        raise ValueError("a token must have a character other than white space; remove it, or write the token")
    return token


Token = Annotated[str, AfterValidator(_refuse_blank)]


class FormatSection(Section):
    """From records to rendered chats, with the spans that are trained."""

    chat_template: Annotated[
        str | None,
        Field(
            description="chatml, gemma, llama3, mistral, phi3, zephyr, or the path of a Jinja file in data/; null = "
            "the model's own template."
        ),
    ]
    train_on: Annotated[
        Literal["assistant", "last_assistant", "completion", "all"],
        Field(description="Text that is trained: assistant, last_assistant, completion or all."),
    ]
    system_message: Annotated[str | None, Field(description="System message for conversations that have none.")]
    add_special_tokens: Annotated[list[Token], Field(description='New special tokens, e.g. ["<|tool|>"].')]
    special_text: Annotated[
        Literal["off", "warn", "neutralise", "drop", "fail"],
        Field(
            description="Special tokens spelled out in messages: off, warn, drop, fail, or neutralise (read them as "
            "plain text). Those of add_special_tokens are allowed."
        ),
    ]
    not_printed: Annotated[
        NotPrintedPolicy,
        Field(
            description="Conversation that says more than the template prints (reasoning, a tool call): fail, warn "
            "(train on what is printed) or drop."
        ),
    ]
    thinking: Annotated[
        ThinkingPolicy,
        Field(
            description="Reasoning of the assistant: keep (all must be printed), last (remove that of earlier answers "
            "that the template does not print; these are not trained), unroll (a row for each answer, with the prompt "
            "that the model gets), or drop (remove all)."
        ),
    ]
    chat_template_kwargs: Annotated[
        dict[str, Any],
        Field(description="Values of the template's variables, e.g. {enable_thinking: false}; saved in the template."),
    ]
    max_dropped_fraction: Annotated[
        Fraction, Field(description="Stop if more than this fraction of the rows is dropped.")
    ]
    num_proc: Annotated[
        Positive, Field(description="Processes that render tens of thousands of rows; the result is the same.")
    ]
    workers: Annotated[
        Workers,
        Field(
            description="processes (on this machine), or ray (num_proc actors of Ray, also on a cluster; see "
            "docs/data.md)."
        ),
    ]


class PackSection(Section):
    """From rendered chats to token rows."""

    max_length: Annotated[
        int, Field(ge=8, description="Tokens per packed row, and the longest document that is kept intact.")
    ]
    strategy: Annotated[
        Literal[PackingStrategy, "none"],
        Field(
            description="How rows are filled: bfd (best-fit decreasing), bfd_split (the same with `overflow: split`), "
            "in_order (documents keep their order), wrapped (the same, cut at full rows), or none (one document per "
            "row)."
        ),
    ]
    overflow: Annotated[
        OverflowPolicy,
        Field(
            description="Documents longer than max_length: truncate, drop, error, split, or split_with_prompt (each "
            "part of an answer keeps its prompt)."
        ),
    ]
    max_lost_fraction: Annotated[
        Fraction,
        Field(description="Stop if more than this fraction of the trained tokens is lost or cut from its prompt."),
    ]
    num_proc: Annotated[
        Positive, Field(description="Processes that tokenize tens of thousands of rows; the result is the same.")
    ]
    workers: Annotated[
        Workers,
        Field(
            description="processes (on this machine), or ray (num_proc actors of Ray, also on a cluster; see "
            "docs/data.md)."
        ),
    ]

    @model_validator(mode="after")
    def _check_overflow_fits_strategy(self) -> Self:
        if self.strategy == "bfd_split" and self.overflow != "split":
            raise ValueError(
                f"strategy bfd_split divides longer documents, and overflow {self.overflow} would not; state overflow: "
                "split, or strategy: bfd"
            )
        if self.strategy == "wrapped" and self.overflow == "split_with_prompt":
            raise ValueError(
                "strategy wrapped divides documents wherever a row is full, so that overflow: split_with_prompt could "
                "not keep their prompts; state strategy: bfd"
            )
        return self


class LaunchSection(Section):
    """How the processes of a training are started and what they share."""

    launcher: Annotated[
        Literal["accelerate", "ray"],
        Field(description="accelerate, or ray (Ray Train, here or on a cluster; needs the extra `ray`)."),
    ]
    engine: Annotated[
        str, Field(description="ddp, fsdp2, deepspeed_zero2, deepspeed_zero3, or an accelerate YAML file.")
    ]
    processes: Annotated[Positive, Field(description="Number of processes on all machines together.")]
    machines: Annotated[Positive, Field(description="Number of machines, each with an equal share of the processes.")]
    machine_rank: Annotated[
        int | None,
        Field(ge=0, description="Number of this machine; null = from SFT_MACHINE_RANK, Slurm or Kubernetes."),
    ]
    address: Annotated[
        str | None,
        Field(
            description="Name or IP of the first machine; null = MASTER_ADDR. Under ray: address of the cluster, such "
            "as auto; null = RAY_ADDRESS, else Ray on this machine alone."
        ),
    ]
    port: Annotated[
        int | None,
        Field(ge=1, le=65535, description="Free port of the first machine; null = any, if there is only one machine."),
    ]

    @model_validator(mode="after")
    def _check_launch(self) -> Self:
        if self.engine not in ENGINES and not self.engine.endswith((".yaml", ".yml", ".json")):
            otherwise = f"use one of {', '.join(ENGINES)} or a YAML file"
            hint = did_you_mean(self.engine, ENGINES, otherwise=otherwise)
            raise ValueError(f"engine {self.engine!r} is unknown; {hint}")
        if self.processes % self.machines:
            raise ValueError(f"{self.processes} processes can't be shared equally by {self.machines} machines")
        if self.launcher == "ray":
            self._check_ray()
        elif self.machines == 1 and (self.machine_rank or self.address):
            raise ValueError("machine_rank and address would be ignored on one machine; set them to null")
        return self

    def _check_ray(self) -> None:
        if self.machines > 1 or self.machine_rank is not None or self.port is not None:
            raise ValueError(
                "machines, machine_rank and port would be ignored: Ray places the processes itself; set machines to 1, "
                "the others to null"
            )
        if self.engine.startswith("deepspeed"):
            raise ValueError(
                f"engine {self.engine!r} needs launcher accelerate; with launcher ray, use fsdp2, which also divides "
                "the model among the processes"
            )


LORA_STARTS = ("gaussian", "orthogonal", "pissa", "olora", "loftq", "eva", "mica")
CHANGES_BASE = ("pissa", "olora", "loftq")


def _check_lora_start(value: bool | str) -> bool | str:
    for start, reason in UNREPEATABLE_STARTS.items():
        if str(value).startswith(start):
            raise ValueError(
                f"{value} changes the weights of the base, and the adapter could not be merged as it was trained: "
                f"{reason}; use pissa, olora or eva"
            )
    if isinstance(value, str) and value not in LORA_STARTS:
        known = ", ".join(["true", "false", *LORA_STARTS])
        raise ValueError(did_you_mean(value, LORA_STARTS, otherwise=f"use one of {known}"))
    return value


def _check_adapter(value: dict[str, Any] | None) -> dict[str, Any] | None:
    return None if value is None else check_adapter(value)


def _check_schedule_name(value: str) -> str:
    if value not in SCHEDULES:
        raise ValueError(did_you_mean(value, SCHEDULES, otherwise=f"use one of {', '.join(SCHEDULES)}"))
    return value


def _check_optim(value: str) -> str:
    known = (*OWN_OPTIMIZERS, *training_options()["optim"].choices)
    if value not in known:
        raise ValueError(did_you_mean(value, known, otherwise=f"use one of {', '.join(known)}"))
    if value.endswith(LAYERWISE):
        raise ValueError("the state of layerwise optimizers is not in checkpoints, so that it can't be resumed")
    return value


def _no_as_text(value: Any) -> Any:
    return "no" if value is False else value  # YAML 1.1 reads `no` as false


class ParameterGroup(Section):
    """Parameters that are trained otherwise than the rest."""

    pattern: Annotated[str, Field(min_length=1, description="Regular expression, searched in names of parameters.")]
    learning_rate: Annotated[
        float | None, Field(ge=0.0, le=1.0, description="Their peak learning rate; null = that of the others.")
    ] = None
    weight_decay: Annotated[
        float | None, Field(ge=0.0, description="Their weight decay; null = that of the others.")
    ] = None
    frozen: Annotated[bool, Field(description="Whether they are not trained.")] = False


def _check_tasks(value: str | list[str]) -> str | list[str]:
    figure_names(value)
    return value


Tasks = Annotated[str | list[str], AfterValidator(_check_tasks)]


def _check_no_own_task(value: str | list[str] | None) -> str | list[str] | None:
    own = [name for name in task_names(value or []) if name.startswith(f"{FOLDER}.")]
    if own:
        raise ValueError(
            f"{own[0]} can't score answers during training: a change in {FOLDER}/ would repeat the training. Use a "
            "task by name here; evaluate.task scores the final answers with it"
        )
    return value


class SelectSection(Section):
    """Which step of the training is shipped, and when training stops early."""

    metric: Annotated[
        str | None,
        Field(
            description="eval_loss, eval_mean_token_accuracy, or a figure of `samples` such as exact_match; null = "
            "ship the last step."
        ),
    ]
    mode: Annotated[
        Literal["min", "max"] | None,
        Field(description="min or max: which value is best; null = known from the figure."),
    ]
    patience: Annotated[
        int | None,
        Field(ge=1, description="Stop after this many evaluations without an improvement; null = train to the end."),
    ]
    min_delta: Annotated[float, Field(ge=0.0, description="Smallest change that patience counts as an improvement.")]

    @model_validator(mode="after")
    def _check_metric_is_stated(self) -> Self:
        if self.metric is None and (self.mode is not None or self.patience is not None):
            raise ValueError("mode and patience would be ignored without a metric; state one, or set them to null")
        return self

    def higher_is_better(self) -> bool:
        """Return whether the largest value is the best one; the mode of an unknown figure was checked to be given."""
        if self.mode is not None:
            return self.mode == "max"
        return self.metric != "eval_loss"


class SamplesSection(Section):
    """Held-out prompts that are answered at each evaluation, to see what the model learns."""

    count: Annotated[int, Field(ge=0, description="Held-out prompts answered at each evaluation; 0 = none.")]
    max_new_tokens: Annotated[Positive, Field(description="Tokens of the longest answer.")]
    task: Annotated[
        Tasks | None,
        AfterValidator(_check_no_own_task),
        Field(description="How answers are scored, as evaluate.task, without functions of tasks/; null = not at all."),
    ]
    max_share: Annotated[
        float | None,
        Field(
            gt=0.0,
            le=1.0,
            description="Largest share of the training time (10 s are always allowed); an evaluation beyond it has no "
            "answers. null = no limit. No limit applies where they decide `select`.",
        ),
    ]
    seed: Annotated[Seed, Field(description="Seed for choosing the prompts.")]


class TrainSection(Section):
    """From packed rows to an adapter or full weights."""

    method: Annotated[
        Literal["lora", "qlora", "full"], Field(description="lora, qlora (LoRA on a 4-bit base) or full (all weights).")
    ]
    lora_r: Annotated[Positive, Field(description="Rank of the LoRA matrices.")]
    lora_alpha: Annotated[Positive, Field(description="LoRA updates are scaled by lora_alpha / lora_r.")]
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0, description="Dropout probability before the LoRA matrices.")]
    lora_target_modules: Annotated[
        str | list[str],
        Field(
            description="all-linear (linear layers and experts; not the head, not routers), or a list of module names."
        ),
    ]
    lora_target_parameters: Annotated[
        list[str] | None,
        Field(
            description="Parameters with LoRA matrices, such as mlp.experts.down_proj; needs lora_dropout 0. null = "
            "under all-linear, those of the experts; [] = none."
        ),
    ]
    use_rslora: Annotated[
        bool, Field(description="Scale LoRA updates by lora_alpha / sqrt(lora_r) instead (arXiv:2312.03732).")
    ]
    use_dora: Annotated[bool, Field(description="Learn magnitude and direction apart (DoRA, arXiv:2402.09353).")]
    init_lora_weights: Annotated[
        bool | str,
        AfterValidator(_check_lora_start),
        Field(
            description="Start of the LoRA matrices: true (no change at first), gaussian, orthogonal, pissa, olora, "
            "loftq, or eva (by activations on the first rows)."
        ),
    ]
    rank_pattern: Annotated[
        dict[str, Positive],
        Field(description="Other ranks by regular expression of module names, e.g. {down_proj: 32}."),
    ]
    alpha_pattern: Annotated[dict[str, Positive], Field(description="The same for lora_alpha.")]
    layers_to_transform: Annotated[
        list[Index] | None, Field(description="Numbers of the layers with LoRA matrices, from 0; null = all.")
    ]
    exclude_modules: Annotated[
        list[str] | None, Field(description="Names of modules without LoRA matrices; null = none.")
    ]
    modules_to_save: Annotated[
        list[str] | None,
        Field(description="Modules trained in full beside LoRA, e.g. [embed_tokens, lm_head]; null = none."),
    ]
    trainable_token_indices: Annotated[
        list[Index] | None,
        Field(description="Ids of tokens whose embeddings are trained beside LoRA; null = those of new tokens."),
    ]
    adapter: Annotated[
        dict[str, Any] | None,
        AfterValidator(_check_adapter),
        Field(
            description="Another adapter of peft instead of LoRA, with its own options, e.g. {type: VERA, r: 64}; see "
            "docs/training.md."
        ),
    ]
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0, description="Peak learning rate.")]
    embedding_learning_rate: Annotated[
        float | None, Field(gt=0.0, le=1.0, description="The same for embeddings and head; null = learning_rate.")
    ]
    loraplus_lr_ratio: Annotated[
        float | None,
        Field(gt=0.0, description="Rate of LoRA's second matrices over learning_rate (arXiv:2402.12354); null = 1."),
    ]
    parameter_groups: Annotated[
        list[ParameterGroup],
        Field(
            description="Parameters with their own rate or decay, or frozen; the first pattern found in a name holds, "
            'e.g. [{pattern: "layers[.]0[.]", frozen: true}].'
        ),
    ]
    num_train_epochs: Annotated[float, Field(gt=0.0, description="Passes over the data.")]
    max_steps: Annotated[int, Field(ge=-1, description="Number of steps, if positive; overrides num_train_epochs.")]
    per_device_train_batch_size: Annotated[Positive, Field(description="Packed rows per forward pass.")]
    padding_free: Annotated[
        bool | None,
        Field(
            description="Whether rows of one document (`pack.strategy: none`) are joined instead of padded; null = if "
            "this is not slower. Packed rows are always joined."
        ),
    ]
    gradient_accumulation_steps: Annotated[Positive, Field(description="Forward passes per step.")]
    lr_scheduler_type: Annotated[
        str,
        AfterValidator(_check_schedule_name),
        Field(
            description="linear, cosine, constant, constant_with_warmup, cosine_with_restarts, cosine_with_min_lr, "
            "cosine_warmup_with_min_lr, polynomial, inverse_sqrt, warmup_stable_decay, reduce_lr_on_plateau or greedy."
        ),
    ]
    lr_scheduler_kwargs: Annotated[
        dict[str, Any], Field(description="Arguments of the schedule, e.g. {min_lr_rate: 0.1} of cosine_with_min_lr.")
    ]
    warmup_ratio: Annotated[
        Fraction, Field(description="Fraction of the steps in which the learning rate rises from 0.")
    ]
    warmup_steps: Annotated[
        int | None, Field(ge=0, description="The same in steps, in place of warmup_ratio; null = by warmup_ratio.")
    ]
    optim: Annotated[
        str,
        AfterValidator(_check_optim),
        Field(
            description="Optimizer: adamw_torch_fused, muon, sgd, adafactor, lion_32bit, adamw_bnb_8bit, "
            "paged_adamw_8bit, schedule_free_adamw, ...; see docs/training.md."
        ),
    ]
    optim_args: Annotated[
        dict[str, float | bool | str],
        Field(description="Further arguments of the optimizer, e.g. {momentum: 0.9} of sgd."),
    ]
    adam_beta1: Annotated[float, Field(ge=0.0, lt=1.0, description="Decay rate of AdamW's gradients.")]
    adam_beta2: Annotated[
        float, Field(ge=0.0, lt=1.0, description="Decay rate of AdamW's squared gradients; 0.999 for long trainings.")
    ]
    adam_epsilon: Annotated[float, Field(gt=0.0, description="Added to the root of AdamW's squared gradients.")]
    weight_decay: Annotated[float, Field(ge=0.0, description="Decoupled weight decay, as in AdamW.")]
    max_grad_norm: Annotated[
        float, Field(ge=0.0, description="Gradients are scaled down to this norm; 0 = they are not.")
    ]
    mixed_precision: Annotated[
        Literal["no", "bf16", "fp16"],
        BeforeValidator(_no_as_text),
        Field(description="Precision of matrix products: no (that of model.dtype), bf16, or fp16 (GPUs only)."),
    ]
    neftune_noise_alpha: Annotated[
        float | None, Field(gt=0.0, description="Noise on embeddings (NEFTune, arXiv:2310.05914), e.g. 5; null = none.")
    ]
    loss_type: Annotated[
        LossType,
        Field(description="Loss on trained tokens: nll (cross entropy) or dft (arXiv:2508.05629)."),
    ]
    label_smoothing_factor: Annotated[
        float, Field(ge=0.0, lt=1.0, description="Share of the target that is spread over all tokens; loss_type nll.")
    ]
    router_aux_loss_coef: Annotated[
        float | None,
        Field(
            ge=0.0,
            description="Weight of the loss that balances the load of experts; 0 = none; null = as the model's "
            "config.json says.",
        ),
    ]
    gradient_checkpointing: Annotated[
        bool | Literal["full", "selective"],
        Field(
            description="Compute activations twice, to save memory: false, true or full (about a third more time), or "
            "selective (all but matrix products and attention)."
        ),
    ]
    activation_offloading: Annotated[
        bool, Field(description="Keep activations in the host's memory until the backward pass; for GPUs.")
    ]
    torch_compile: Annotated[bool, Field(description="Compile the model with torch.compile; needs a C++ compiler.")]
    use_kernels: Annotated[
        bool, Field(description="Use layers of the package `kernels`, which loads them from the hub.")
    ]
    use_liger_kernel: Annotated[
        bool, Field(description="Whether to use Liger's kernels; needs a device that Triton supports.")
    ]
    on_bad_loss: Annotated[
        BadLossPolicy | None,
        Field(
            description="Policy for updates with a non-finite or spiking loss: stop, skip (and record), or rollback "
            "(to the last checkpoint); null = apply them (needed by fp16 and lomo)."
        ),
    ]
    bad_loss_factor: Annotated[
        float | None,
        Field(gt=1.0, description="Spike: a loss this many times the median of the last 50, e.g. 10; null = none."),
    ]
    on_untrained: Annotated[
        UntrainedPolicy,
        Field(
            description="Parameters without a gradient, with one of exactly zero, or that do not change in the first 5 "
            "steps: warn (and record them) or fail."
        ),
    ]
    on_oom: Annotated[
        Literal["fail", "halve"],
        Field(description="Out of memory: fail, or halve (half the rows per pass, twice as many passes)."),
    ]
    logging_steps: Annotated[Positive, Field(description="Steps between points of the training curve.")]
    eval_steps: Annotated[
        float,
        AfterValidator(_check_steps),
        Field(
            gt=0.0,
            description="Steps between evaluations on held-out rows: a number, or below 1 a fraction of all steps.",
        ),
    ]
    save_steps: Annotated[
        float,
        AfterValidator(_check_steps),
        Field(
            gt=0.0,
            description="Steps between checkpoints in .state/: a number, or below 1 a fraction of all steps.",
        ),
    ]
    order: Annotated[
        Literal["shuffled", "sequential", "curriculum"],
        Field(
            description="Order of the packed rows: shuffled (anew in each epoch), sequential (as `pack` wrote them), "
            "or curriculum (by load.curriculum)."
        ),
    ]
    seed: Annotated[Seed, Field(description="Seed of the adapter's initial weights, the order of rows and dropout.")]
    report_to: Annotated[
        list[Tracker],
        Field(
            description="Trackers that get the curve while the model trains: tensorboard, wandb, trackio "
            "(docs/operations.md). MLflow always gets it."
        ),
    ]
    arguments: Annotated[
        dict[str, Any],
        AfterValidator(check_arguments),
        Field(
            description="Any other option of transformers.TrainingArguments or sft.SFTConfig by its name, e.g. "
            "{dataloader_num_workers: 2}; see docs/training_options.md."
        ),
    ]
    select: Annotated[SelectSection, Field(description="Which evaluated step is shipped (docs/operations.md).")]
    samples: Annotated[
        SamplesSection, Field(description="A look at the answers while the model trains (docs/operations.md).")
    ]
    launch: Annotated[
        LaunchSection,
        Field(description="Processes of the training: one, or one per GPU (docs/many_machines.md)."),
    ]

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        for problem in filter(None, (check(self) for check in TRAIN_CHECKS)):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _check_select(self) -> Self:
        metric = self.select.metric
        figures = self.sample_figures()
        if metric is None or metric in EVAL_FIGURES:
            return self
        if metric not in figures:
            known = [*EVAL_FIGURES, *figures]
            hint = did_you_mean(metric, known, otherwise=f"there are {', '.join(known)}")
            more = "" if figures else "; with train.samples.count and task, there are figures of answers"
            raise ValueError(f"select.metric {metric!r} is not a figure of the training; {hint}{more}")
        if self.select.mode is None and figure_of(metric).direction <= 0:
            raise ValueError(
                f"select.metric {metric!r}: state select.mode, min or max, as it is not known from the name"
            )
        return self

    def sample_figures(self) -> tuple[str, ...]:
        """Return the names of the figures of answers that are measured during training."""
        if not self.samples.count:
            return ()
        return (*(figure_names(self.samples.task) if self.samples.task else ()), STOP_RATE)

    def samples_decide(self) -> bool:
        """Return whether the step that is shipped is chosen by answers."""
        return self.select.metric is not None and self.select.metric not in EVAL_FIGURES


NO_LORA_OPTIONS = {
    "use_rslora": False,
    "use_dora": False,
    "init_lora_weights": True,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layers_to_transform": None,
    "exclude_modules": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "loraplus_lr_ratio": None,
}
"""Keys of kinds of LoRA, with the values that ask for nothing."""


def _check_adapter_keys(section: TrainSection) -> str | None:
    given = [key for key, value in NO_LORA_OPTIONS.items() if getattr(section, key) != value]
    if section.method == "full" and section.adapter is not None:
        return "adapter would be ignored under method: full, which trains all weights; state method: lora"
    if section.method == "full" and given:
        return f"{given[0]} would be ignored under method: full, which has no adapter; state method: lora, or leave it"
    if section.adapter is not None and given:
        return f"{given[0]} is an option of LoRA, and adapter states another type; state it there, if that type has it"
    if section.method == "qlora" and section.init_lora_weights in CHANGES_BASE:
        return (
            f"init_lora_weights: {section.init_lora_weights} changes the weights of the base, which method: qlora "
            "quantizes; state method: lora"
        )
    return None


def _check_lora_targets(section: TrainSection) -> str | None:
    if section.method != "full" and section.lora_target_parameters and section.lora_dropout:
        return (
            f"lora_dropout {section.lora_dropout} can't be used with lora_target_parameters, whose matrices are added "
            "to the parameters and not applied to an input; set lora_dropout to 0"
        )
    return None


def _check_optimizer_keys(section: TrainSection) -> str | None:
    try:
        check_schedule(section.lr_scheduler_type, section.lr_scheduler_kwargs)
        check_optim_args(section.optim, section.optim_args)
        parameter_rules([group.model_dump() for group in section.parameter_groups])
    except ValueError as error:
        return str(error)
    if section.mixed_precision == "fp16" and section.on_bad_loss is not None:
        return (
            f"on_bad_loss: {section.on_bad_loss} can't be used with mixed_precision: fp16, whose loss scaling skips "
            "such updates itself; set on_bad_loss: null, or mixed_precision: bf16"
        )
    if section.label_smoothing_factor and section.loss_type != "nll":
        return f"label_smoothing_factor can't be used with loss_type: {section.loss_type}; set it to 0"
    return None


TRAIN_CHECKS = (_check_adapter_keys, _check_lora_targets, _check_optimizer_keys)
"""Checks of values of the section `train` that belong together; each returns a problem, or None."""


class MergeSection(Section):
    """From base and adapter to one merged checkpoint."""

    dtype: Annotated[DType, Field(description="Data type of the merged checkpoint: float32, bfloat16 or float16.")]
    tolerance: Annotated[
        float, Field(gt=0.0, description="Largest allowed difference between its logits and those of base + adapter.")
    ]
    num_sample_rows: Annotated[Positive, Field(description="Packed eval rows on which the logits are compared.")]


def _check_distinct_kinds(kinds: list[str]) -> list[str]:
    twice = sorted({kind for kind in kinds if kinds.count(kind) > 1})
    if twice:
        raise ValueError(f"every kind can be stated once, found {', '.join(twice)} twice")
    return kinds


class QuantizeSection(Section):
    """From the merged checkpoint to a smaller one."""

    method: Annotated[
        Literal["gptq", "int8", "nf4", "none"],
        Field(description="gptq, int8, nf4 (both of bitsandbytes, without calibration) or none."),
    ]
    export_gguf: Annotated[
        list[GGUFKind] | None,
        Field(
            min_length=1,
            description="Kinds of GGUF files of the merged model, e.g. [q4_k_m, q8_0, f16]; needs `make engines`; null "
            "= none.",
        ),
        AfterValidator(lambda kinds: kinds if kinds is None else _check_distinct_kinds(kinds)),
    ]
    bits: Annotated[
        Literal[2, 3, 4, 8],
        Field(description="Bits per weight: 2, 3, 4 or 8. This and the options below are for gptq."),
    ]
    group_size: Annotated[
        int, Field(description="Weights per scale; must divide the width of every layer; -1 = one scale per row.")
    ]
    sym: Annotated[bool, Field(description="Whether quantization is symmetric.")]
    desc_act: Annotated[bool, Field(description="Whether to quantize columns in order of activation size.")]
    damp_percent: Annotated[
        float, Field(gt=0.0, lt=1.0, description="Fraction of the mean Hessian diagonal that is added to the diagonal.")
    ]
    num_calibration_rows: Annotated[Positive, Field(description="Number of packed training rows for calibration.")]
    calibration_length: Annotated[int, Field(ge=8, description="Tokens per calibration row.")]
    seed: Annotated[Seed, Field(description="Seed for choosing calibration rows.")]

    @model_validator(mode="after")
    def _check_group_size(self) -> QuantizeSection:
        if self.group_size not in (-1, *GROUP_SIZES):
            known = ", ".join(map(str, GROUP_SIZES))
            raise ValueError(
                f"group_size {self.group_size} is not supported by all programs that load GPTQ checkpoints; use "
                f"{known}, or -1 for one scale per row"
            )
        return self


def _check_in_folder(value: str) -> str:
    if not value.startswith(f"{FOLDER}/") or ".." in value.split("/"):
        raise ValueError(
            f"the file must lie in {FOLDER}/: DVC tracks it there for `evaluate`, and `train` does not read it"
        )
    return value


def _check_distinct(names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"every task can be stated once, found {', '.join(twice)} twice")
    return names


def _check_entries(entries: list[str]) -> list[str]:
    asked = [read_entry(text) for text in entries]
    twice = [text for number, text in enumerate(entries) if asked[number] in asked[:number]]
    if twice:
        raise ValueError(f"every engine can be stated once with a model, found {', '.join(twice)} twice")
    return entries


OwnFile = Annotated[str, AfterValidator(_check_in_folder)]
LmEvalTask = Annotated[str, Field(min_length=1)]


class RegressionSection(Section):
    """General prompts and how their answers are scored."""

    path: Annotated[OwnFile | None, Field(description="File of rows like those of data/, but in tasks/; null = none.")]
    task: Annotated[Tasks | None, Field(description="As `task` above, e.g. text; null = losses only, without answers.")]
    max_new_tokens: Annotated[Positive, Field(description="Tokens of the longest answer.")]


class LmEvalSection(Section):
    """Tasks of the library lm-eval and how they are run."""

    tasks: Annotated[
        list[LmEvalTask],
        AfterValidator(_check_distinct),
        Field(description="Names, e.g. [arc_easy, gsm8k], or of your own YAML files in tasks/; [] = none."),
    ]
    limit: Annotated[Positive | None, Field(description="Rows of each task; null = all.")]
    num_fewshot: Annotated[
        int | None, Field(ge=0, description="Examples shown before each row; null = as the task states.")
    ]
    apply_chat_template: Annotated[
        bool, Field(description="Whether to ask in the chat template instead of plain text.")
    ]
    batch_size: Annotated[Positive, Field(description="Requests computed at a time.")]


class EvaluateSection(Section):
    """Scores of base, tuned, merged and quantized model on the held-out rows."""

    task: Annotated[
        Tasks,
        Field(
            description="One or several: json (exact match, valid JSON, field F1), text (exact match, word F1), "
            "number (the last one), regex:PATTERN, rouge, bleu, chrf, or tasks.FILE.FUNCTION "
            "(docs/evaluation.md)."
        ),
    ]
    num_rows: Annotated[Positive | None, Field(description="Number of held-out rows to use; null = all.")]
    batch_size: Annotated[Positive, Field(description="Rows generated at a time.")]
    max_new_tokens: Annotated[
        Positive, Field(description="Tokens of the longest answer; more than the longest reference has.")
    ]
    test: Annotated[
        OwnFile | None,
        Field(
            description="File of rows in tasks/ that no one looks at while developing, scored like the held-out rows; "
            "null = none."
        ),
    ]
    regression: Annotated[
        RegressionSection,
        Field(description="General prompts, on which the training must not make the model worse."),
    ]
    lm_eval: Annotated[
        LmEvalSection, Field(description="Tasks of lm-eval. Needs the extra `lm-eval` (docs/evaluation.md).")
    ]
    engines: Annotated[
        list[str],
        AfterValidator(_check_entries),
        Field(
            description="Serving engines that are asked the held-out prompts, too, as ENGINE or ENGINE.MODEL, e.g. "
            "[vllm, llama_cpp.q8_0]; needs `make engines` (docs/engines.md); [] = none."
        ),
    ]
    gate: Annotated[list[str], Field(description="Conditions that must be true before the alias `champion` moves.")]
    gate_needs: Annotated[
        Literal["interval", "value"],
        Field(
            description="What a condition of a gate needs: interval (its 95 % interval excludes the limit) or value "
            "(the measured figures meet it)."
        ),
    ]


class PublishSection(Section):
    """All results to one MLflow run and a registered model version."""

    tracking_uri: Annotated[
        str,
        AfterValidator(check_no_secret),
        Field(min_length=1, description="MLflow tracking URI. A relative SQLite path lies in the main checkout."),
    ]
    experiment: Annotated[
        str, AfterValidator(check_experiment_name), Field(min_length=1, description="MLflow experiment.")
    ]
    registered_model: Annotated[
        str, AfterValidator(check_model_name), Field(min_length=1, description="Name in MLflow's model registry.")
    ]
    push_to_hub: Annotated[
        str | None,
        Field(
            min_length=1,
            description="owner/name of a hub repository for the shipped folder; private if new; null = none.",
        ),
        AfterValidator(lambda name: name if name is None else check_repository(name)),
    ]
    ship_code: Annotated[
        bool,
        Field(
            description="Whether the shipped folder holds the code, without data/, so that it can be repeated without "
            "this repository."
        ),
    ]
    gate: Annotated[
        list[str],
        Field(
            description="More conditions for `champion`, against the current one on the same rows, e.g. "
            "tuned.exact_match >= champion.tuned.exact_match - 0.02."
        ),
    ]

    @model_validator(mode="after")
    def _check_folder(self) -> Self:
        if self.tracking_uri.startswith("sqlite:"):
            check_experiment_folder(self.experiment)
        return self


class Params(Section):
    """All sections of params.yaml."""

    model: ModelSection
    load: LoadSection
    format: FormatSection
    pack: PackSection
    train: TrainSection
    merge: MergeSection
    quantize: QuantizeSection
    evaluate: EvaluateSection
    publish: PublishSection

    @model_validator(mode="after")
    def _check_rows(self) -> Params:
        if self.train.padding_free is False and self.pack.strategy != "none":
            raise ValueError(
                f"train.padding_free: false would be ignored: with pack.strategy {self.pack.strategy}, a row holds "
                "several documents and no padding; set pack.strategy: none, or train.padding_free: null"
            )
        return self

    @model_validator(mode="after")
    def _check_order(self) -> Params:
        column, order, strategy = self.load.curriculum, self.train.order, self.pack.strategy
        if column is None and order == "curriculum":
            raise ValueError(
                "train.order: curriculum needs load.curriculum: the column whose number rows are sorted by, or length"
            )
        if column is None:
            return self
        if order != "curriculum":
            raise ValueError(
                f"load.curriculum: {column} would be ignored with train.order: {order}; state train.order: curriculum, "
                "or load.curriculum: null"
            )
        if strategy.startswith("bfd"):
            raise ValueError(
                f"load.curriculum: {column} sorts rows, and pack.strategy: {strategy} would sort them by their length, "
                "longest first, to fill packed rows; state in_order, which keeps their order (or wrapped, or none)"
            )
        return self

    @model_validator(mode="after")
    def _check_streaming(self) -> Params:
        problems = against_streaming(self) if self.load.streaming else []
        if problems:
            raise ValueError(f"load.streaming: true can't be used with these values: {'; '.join(problems)}")
        return self

    @model_validator(mode="after")
    def _check_engines(self) -> Params:
        for text in self.evaluate.engines:
            engine, model = read_entry(text)
            problem = ""
            if engine == "llama_cpp" and model not in (self.quantize.export_gguf or ()):
                problem = f"`quantize` writes no such GGUF file; add {model} to quantize.export_gguf"
            elif model == "quantized" and self.quantize.method == "none":
                problem = "quantize.method is none, so there is no quantized model; ask merged"
            elif model == "adapter" and self.train.method == "full":
                problem = "train.method is full, so there is no adapter; ask merged"
            if problem:
                raise ValueError(f"evaluate.engines: {text}: {problem}")
        return self

    @model_validator(mode="after")
    def _check_gates(self) -> Params:
        is_quantized = self.quantize.method != "none"
        available = metric_names(self.evaluate, with_quantized=is_quantized)
        prefixes = open_ended_names(self.evaluate, with_quantized=is_quantized)
        champion_names = {f"champion.{name}" for name in available}
        champion_prefixes = [f"champion.{name}" for name in prefixes]
        for key, gate, names, known_prefixes in (
            ("evaluate.gate", self.evaluate.gate, available, prefixes),
            ("publish.gate", self.publish.gate, available | champion_names, prefixes + champion_prefixes),
        ):
            try:
                check_ranges(parse_gate(gate, names, known_prefixes), range_of)
            except ValueError as error:
                is_engine = f"nothing is called {ENGINE}." in str(error)
                hint = "evaluate.engines does not name the engine: " if is_engine else ""
                raise ValueError(f"{key}: {hint}{error}") from None
        return self


class ParamsError(ValueError):
    """params.yaml can't be used; the message lists every problem."""


MAX_FILE_BYTES = 1 << 20
"""Largest params.yaml in bytes; the shipped one has 40 thousand."""

MAX_VALUES, MAX_DEPTH, MAX_TEXT, MAX_INTEGER_BITS = 20_000, 50, 100_000, 1024
"""Most values, most sections and lists in one another, longest text, and longest number."""

MAX_PROBLEMS = 50
"""Most problems that a message lists."""


def load_params(path: Path) -> Params:
    """Read and check params.yaml.

    Args:
        path: The file.

    Returns:
        The typed, frozen parameters.

    Raises:
        ParamsError: The file is missing, is not YAML, repeats a key, or contains unknown keys or invalid values. All
            problems are listed, each with its place and, for a misspelt key, the nearest name.
    """
    try:
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise ParamsError(f"{path}: {size} bytes, more than {MAX_FILE_BYTES}; rows belong into data/")
        text = path.read_text(encoding="utf-8")
        yaml = YAML(typ="safe", pure=True)
        if "&" in text and "*" in text:
            _check_aliases(yaml.compose(text), path)
        values = yaml.load(text)
    except ParamsError:
        raise
    except FileNotFoundError:
        raise ParamsError(f"{path}: no such file; run from the repository's root, or give --root") from None
    except UnicodeDecodeError as error:
        raise ParamsError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        place = f":{mark.line + 1}:{mark.column + 1}" if mark is not None else ""
        raise ParamsError(f"{path}{place}: not valid YAML: {_yaml_problem(error)}") from None
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ParamsError(f"{path}:{line}: not valid YAML: {error.reason} ({error.character!r})") from None
    except YAMLError as error:
        raise ParamsError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise ParamsError(f"{path}: values are nested far deeper than any value of params.yaml") from None
    except ValueError as error:  # a number of thousands of digits
        raise ParamsError(f"{path}: a value can't be read: {' '.join(str(error).split())}") from None
    except (LookupError, TypeError, AttributeError) as error:  # such as !!float '' and %YAML 9.9
        reason = f"{type(error).__name__}: {error}"
        raise ParamsError(f"{path}: a tag (!!) or a line with % can't be read ({reason}); remove it") from None
    return check_params(values, source=str(path))


def _check_aliases(root: Any, path: Path) -> None:
    """Check that a YAML document has few values also after its aliases are replaced by what they stand for.

    Raises:
        ParamsError: It has more than `MAX_VALUES`, or a value contains itself.
    """
    sizes: dict[int, int] = {}
    inside: set[int] = set()

    def count(node: Any) -> int:
        if id(node) in sizes:
            return sizes[id(node)]
        if id(node) in inside:
            mark = node.start_mark
            raise ParamsError(f"{path}:{mark.line + 1}:{mark.column + 1}: a value contains itself, by an alias (*)")
        inside.add(id(node))
        children = node.value if isinstance(node.value, list) else []
        parts = [part for child in children for part in (child if isinstance(child, tuple) else (child,))]
        sizes[id(node)] = min(1 + sum(map(count, parts)), MAX_VALUES + 1)
        inside.discard(id(node))
        return sizes[id(node)]

    if root is not None and count(root) > MAX_VALUES:
        raise ParamsError(
            f"{path}: more than {MAX_VALUES} values after its aliases (*) are replaced by what they stand for; write "
            "them out"
        )


def _check_extent(values: Any, source: str) -> None:
    """Check that values are few, short and not deep, so that they can be validated and written into messages.

    Raises:
        ParamsError: They are not; the message has the place.
    """
    num_values = 0
    waiting: list[tuple[Any, tuple[Any, ...]]] = [(values, ())]
    while waiting:
        value, place = waiting.pop()
        num_values += 1
        problem = ""
        if num_values > MAX_VALUES:
            problem = f"more than {MAX_VALUES} values in all"
        elif len(place) > MAX_DEPTH:
            problem = f"values lie more than {MAX_DEPTH} deep in one another"
        elif isinstance(value, (str, bytes)) and len(value) > MAX_TEXT:
            problem = f"a text of {len(value)} characters, more than {MAX_TEXT}"
        elif isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            problem = f"a number of {value.bit_length()} bits, more than {MAX_INTEGER_BITS}"
        if problem:
            shown = ".".join(f"{part!s:.40}" for part in place[:4])
            raise ParamsError(f"{source}: {shown}: {problem}" if shown else f"{source}: {problem}")
        if isinstance(value, dict):
            waiting += [(key, (*place, "a key")) for key in value if not isinstance(key, str) or len(key) > MAX_TEXT]
            waiting += [(item, (*place, key if isinstance(key, str) else "a key")) for key, item in value.items()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            waiting += [(item, (*place, number)) for number, item in enumerate(value)]


def _yaml_problem(error: MarkedYAMLError) -> str:
    """Describe a YAML error in one line."""
    problem = " ".join(str(error.problem or error.context).split())
    if isinstance(error, DuplicateKeyError):
        return f"{problem.partition(' with value')[0]}: this section has it already; remove one of the two"
    if "\\t" in problem or "\t" in str(error.problem):
        return "a tab where only spaces are allowed; indent with spaces"
    return problem


def check_params(values: Any, source: str = "params.yaml") -> Params:
    """Check plain values, as YAML gives them, and return them as `Params`.

    Args:
        values: Sections by name.
        source: Name of the values' origin, for messages.

    Raises:
        ParamsError: Lists all problems.
    """
    if not isinstance(values, dict):
        found = "an empty file" if values is None else type(values).__name__
        raise ParamsError(f"{source}: expected sections such as `train:`, found {found}")
    _check_extent(values, source)
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        details = error.errors()
    count = f"{len(details)} problem{'s' if len(details) > 1 else ''}"
    problems = [_clipped(describe_problem(detail, Params), 1000) for detail in details[:MAX_PROBLEMS]]
    more = ["..."] if len(details) > MAX_PROBLEMS else []
    raise ParamsError("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in [*problems, *more])]))


def _clipped(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]} ..."


def describe_problem(detail: ErrorDetails, root: type[BaseModel]) -> str:
    """Describe one pydantic error in a line: the key's path, what was found, and the nearest name for an unknown key.

    Args:
        detail: The error.
        root: Model class that was validated.
    """
    place = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        parent = model_at(root, detail["loc"][:-1])
        names = list(parent.model_fields) if parent else []
        otherwise = f"known keys: {', '.join(names)}"
        hint = did_you_mean(str(detail["loc"][-1]), names, otherwise=otherwise, cutoff=0.5)
        return f"{place}: unknown key; {hint}"
    if detail["type"] == "missing":
        return f"{place}: missing; the file must state it"
    message = detail["msg"].removeprefix("Value error, ")
    if not place:
        return message
    if isinstance(detail["input"], (dict, BaseModel)):
        return f"{place}: {message}"
    return f"{place}: {message}, found {redact(_clipped(repr(detail['input']), 200))}"


def model_at(root: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    """Return the model class that a pydantic error location leads to; None if the path leaves the models."""
    current: type[BaseModel] = root
    for part in loc:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part)
        if field is None:
            return None
        candidates = [field.annotation, *get_args(field.annotation)]
        models = [item for item in candidates if isinstance(item, type) and issubclass(item, BaseModel)]
        if not models:
            return None
        current = models[0]
    return current


def leaf_fields(root: type[BaseModel] = Params, prefix: str = "") -> dict[str, str]:
    """Return the keys of params.yaml that are not sections, such as `train.lora_r`, with their descriptions."""
    found: dict[str, str] = {}
    for name, field in root.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found |= leaf_fields(field.annotation, f"{prefix}{name}.")
        else:
            found[prefix + name] = field.description or ""
    return found
