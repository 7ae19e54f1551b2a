"""Types of params.yaml: what a section holds, and one message that lists everything wrong with it.

The file states every value, so nothing here has a default; `extra="forbid"` makes a misspelt key an error.

What all sections of params.yaml share: frozen, strictly typed, unknown keys refused.

Types of the section `load` of params.yaml: sources, held-out rows, and what is looked for in rows.

Types of the section `evaluate` of params.yaml: tasks, general prompts, conditions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import SandboxedEnvironment
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError

from sft.evaluate.gate import check_ranges, parse_gate
from sft.export.quantization import GROUP_SIZES
from sft.options import BadLossPolicy, LossType, OverflowPolicy, PackingStrategy
from sft.suggest import did_you_mean
from stages.checkout.redaction import redact
from stages.params.figures import metric_names, open_ended_names, range_of
from stages.params.tasks import FOLDER, figure_names

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]

Positive = Annotated[int, Field(ge=1)]

Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


class Section(BaseModel):
    """Base of all sections: frozen, strict types, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


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
    columns: Annotated[dict[str, str], Field(description="Column of the data -> its name here")] = {}
    roles: Annotated[dict[str, Role], Field(description="Role in the data -> one of ours")] = {}
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
            hint = did_you_mean(name, REASONS, otherwise=f"there are {', '.join(REASONS)}")
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


def _known_tasks(value: str | list[str]) -> str | list[str]:
    figure_names(value)
    return value


def _in_folder(value: str) -> str:
    if not value.startswith(f"{FOLDER}/") or ".." in value.split("/"):
        raise ValueError(f"the file must lie in {FOLDER}/, where `evaluate` sees its changes and training does not")
    return value


Tasks = Annotated[str | list[str], AfterValidator(_known_tasks)]

OwnFile = Annotated[str, AfterValidator(_in_folder)]


class RegressionSection(Section):
    """General prompts, which must not get worse by the training."""

    path: Annotated[OwnFile | None, Field(description="File of rows in tasks/; null = none are looked at")]
    task: Annotated[Tasks | None, Field(description="What answers are scored with; null = losses only")]
    max_new_tokens: Annotated[Positive, Field(description="Longest answer")]


def _all_different(names: list[str]) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"every task can be stated once, found {', '.join(twice)} twice")
    return names


HarnessTask = Annotated[str, Field(min_length=1)]


class LmEvalSection(Section):
    """Tasks of lm-eval, an optional extra."""

    tasks: Annotated[list[HarnessTask], AfterValidator(_all_different), Field(description="Names; [] = none are run")]
    limit: Annotated[Positive | None, Field(description="Rows of each task; null = all")]
    num_fewshot: Annotated[int | None, Field(ge=0, description="Examples before each row; null = as the task has it")]
    apply_chat_template: Annotated[bool, Field(description="Ask in the chat template, not as plain text")]
    batch_size: Annotated[Positive, Field(description="Requests computed at a time")]


class EvaluateSection(Section):
    """Base, tuned, merged and quantized side by side."""

    task: Annotated[Tasks, Field(description="What answers are scored with, one or several")]
    num_rows: Annotated[Positive | None, Field(description="null = every held-out row")]
    batch_size: Annotated[Positive, Field(description="Rows generated at a time")]
    max_new_tokens: Annotated[Positive, Field(description="Longest generation")]
    regression: Annotated[RegressionSection, Field(description="General prompts that must not get worse")]
    lm_eval: Annotated[LmEvalSection, Field(description="Tasks of lm-eval by name")]
    gate: Annotated[list[str], Field(description="Conditions that must hold before the champion is replaced")]


def _not_blank(token: str) -> str:
    if not token.strip():
        raise ValueError("a token must have a character that is no space; remove it, or write the token")
    return token


Token = Annotated[str, AfterValidator(_not_blank)]

DType = Literal["float32", "bfloat16", "float16"]


class ModelSection(Section):
    """The base model."""

    name_or_path: Annotated[str, Field(min_length=1, description="Hub id, local folder, or embedded:NAME")]
    revision: Annotated[str | None, Field(description="Hub branch, tag or commit")]
    dtype: Annotated[DType, Field(description="Data type in which the base model is loaded")]
    attn_implementation: Annotated[str, Field(description="auto, sdpa, eager, flash_attention_2, ...")]
    trust_remote_code: Annotated[bool, Field(description="Run Python code that comes with the model")]


Workers = Literal["processes", "ray"]


class FormatSection(Section):
    """Records to rendered chats."""

    chat_template: Annotated[str | None, Field(description="null = the model's own, a named format, or a Jinja file")]
    train_on: Annotated[
        Literal["assistant", "last_assistant", "completion", "all"], Field(description="What the loss is taken on")
    ]
    system_message: Annotated[str | None, Field(description="Put before conversations that have none")]
    add_special_tokens: Annotated[list[Token], Field(description="Tokens to add to the vocabulary")]
    special_text: Annotated[
        Literal["off", "warn", "neutralise", "drop", "fail"],
        Field(description="Special tokens spelled out in messages"),
    ]
    max_dropped_fraction: Annotated[Fraction, Field(description="Stop when more rows than this were dropped")]
    num_proc: Annotated[Positive, Field(description="Processes that render; the result is the same")]
    workers: Annotated[Workers, Field(description="Processes of this machine, or actors of Ray")]


class PackSection(Section):
    """Rendered chats to token rows."""

    max_length: Annotated[int, Field(ge=8, description="Tokens in a packed row")]
    strategy: Annotated[Literal[PackingStrategy, "none"], Field(description="How rows are filled")]
    overflow: Annotated[OverflowPolicy, Field(description="What happens to longer documents")]
    max_lost_fraction: Annotated[Fraction, Field(description="Stop when more trained tokens than this are cut")]
    num_proc: Annotated[Positive, Field(description="Processes that tokenize; the result is the same")]
    workers: Annotated[Workers, Field(description="Processes of this machine, or actors of Ray")]

    @model_validator(mode="after")
    def _agree_on_long_documents(self) -> Self:
        if self.strategy == "bfd_split" and self.overflow != "split":
            raise ValueError(
                f"strategy bfd_split divides longer documents, and overflow {self.overflow} would not; state overflow: "
                "split, or strategy: bfd"
            )
        return self


ENGINES = ("ddp", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")


class LaunchSection(Section):
    """The processes of a training."""

    launcher: Annotated[Literal["accelerate", "ray"], Field(description="What starts the processes")]
    engine: Annotated[
        str, Field(description="ddp, fsdp2, deepspeed_zero2, deepspeed_zero3, or an accelerate YAML file")
    ]
    processes: Annotated[Positive, Field(description="Processes on all machines together, one a GPU")]
    machines: Annotated[Positive, Field(description="Machines that share them equally")]
    machine_rank: Annotated[
        int | None, Field(ge=0, description="This machine's number; null = the environment says it")
    ]
    address: Annotated[str | None, Field(description="First machine's name or IP, or the Ray cluster's")]
    port: Annotated[int | None, Field(ge=1, le=65535, description="Free port of the first machine; null = any")]

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if self.engine not in ENGINES and not self.engine.endswith((".yaml", ".yml", ".json")):
            otherwise = f"use one of {', '.join(ENGINES)} or a YAML file"
            hint = did_you_mean(self.engine, ENGINES, otherwise=otherwise)
            raise ValueError(f"engine {self.engine!r} is unknown; {hint}")
        if self.processes % self.machines:
            raise ValueError(f"{self.processes} processes can't be shared equally by {self.machines} machines")
        if self.launcher == "ray":
            self._fits_ray()
        elif self.machines == 1 and (self.machine_rank or self.address):
            raise ValueError("machine_rank and address would be ignored on one machine; set them to null")
        return self

    def _fits_ray(self) -> None:
        if self.machines > 1 or self.machine_rank is not None or self.port is not None:
            raise ValueError(
                "machines, machine_rank and port would be ignored: Ray places the processes itself; set machines to 1, "
                "the others to null"
            )
        if self.engine.startswith("deepspeed"):
            raise ValueError(f"engine {self.engine!r} needs launcher accelerate; fsdp2 shares the model under ray, too")


class TrainSection(Section):
    """Packed rows to an adapter or weights."""

    method: Annotated[Literal["lora", "qlora", "full"], Field(description="What is trained")]
    lora_r: Annotated[Positive, Field(description="LoRA rank")]
    lora_alpha: Annotated[Positive, Field(description="LoRA scale times rank")]
    lora_dropout: Annotated[float, Field(ge=0.0, lt=1.0, description="Dropout before the LoRA matrices")]
    lora_target_modules: Annotated[str | list[str], Field(description="all-linear, or module names")]
    learning_rate: Annotated[float, Field(gt=0.0, le=1.0, description="Peak learning rate")]
    num_train_epochs: Annotated[float, Field(gt=0.0, description="Passes over the data")]
    max_steps: Annotated[int, Field(ge=-1, description="A positive number overrides num_train_epochs")]
    per_device_train_batch_size: Annotated[Positive, Field(description="Packed rows a forward pass")]
    gradient_accumulation_steps: Annotated[Positive, Field(description="Forward passes an update")]
    lr_scheduler_type: Annotated[
        Literal["linear", "cosine", "constant", "constant_with_warmup"], Field(description="Learning rate schedule")
    ]
    warmup_ratio: Annotated[Fraction, Field(description="Part of the steps in which the rate rises")]
    adam_beta2: Annotated[float, Field(ge=0.0, lt=1.0, description="Memory of AdamW's squared gradients")]
    weight_decay: Annotated[float, Field(ge=0.0, description="Decoupled weight decay")]
    max_grad_norm: Annotated[float, Field(gt=0.0, description="Gradients are scaled down to this norm")]
    neftune_noise_alpha: Annotated[float | None, Field(gt=0.0, description="NEFTune noise, arXiv:2310.05914")]
    loss_type: Annotated[LossType, Field(description="Loss on trained tokens")]
    gradient_checkpointing: Annotated[bool, Field(description="Recompute activations to save memory")]
    use_liger_kernel: Annotated[bool, Field(description="Liger's Triton kernels")]
    on_bad_loss: Annotated[BadLossPolicy, Field(description="What becomes of an update that is no number or a spike")]
    bad_loss_factor: Annotated[
        float | None, Field(gt=1.0, description="A loss so many times the recent median is a spike; null = none is")
    ]
    on_oom: Annotated[
        Literal["fail", "halve"],
        Field(description="Out of memory: stop, or go on with half the rows a forward pass and twice the passes"),
    ]
    logging_steps: Annotated[Positive, Field(description="Steps between points of the curve")]
    eval_steps: Annotated[Positive, Field(description="Steps between evaluations on held-out rows")]
    save_steps: Annotated[Positive, Field(description="Steps between checkpoints")]
    seed: Annotated[Seed, Field(description="Seed of the adapter, the order of rows and dropout")]
    launch: Annotated[LaunchSection, Field(description="The processes of the training")]


class MergeSection(Section):
    """Base and adapter to one checkpoint."""

    dtype: Annotated[DType, Field(description="Data type of the merged checkpoint")]
    tolerance: Annotated[float, Field(gt=0.0, description="Largest difference of logits")]
    num_sample_rows: Annotated[Positive, Field(description="Packed eval rows on which logits are compared")]


class QuantizeSection(Section):
    """Merged checkpoint to a quantized one."""

    method: Annotated[Literal["gptq", "int8", "nf4", "none"], Field(description="Quantization method")]
    export_gguf: Annotated[Literal["f16", "q8_0"] | None, Field(description="Merged model as a GGUF file too")]
    bits: Annotated[Literal[2, 3, 4, 8], Field(description="Bits a weight")]
    group_size: Annotated[int, Field(description="Weights that share a scale; -1 = a whole row")]
    sym: Annotated[bool, Field(description="Symmetric quantization")]
    desc_act: Annotated[bool, Field(description="Columns in order of activation size")]
    damp_percent: Annotated[float, Field(gt=0.0, lt=1.0, description="Damping of the Hessian")]
    num_calibration_rows: Annotated[Positive, Field(description="Packed training rows")]
    calibration_length: Annotated[int, Field(ge=8, description="Tokens a calibration row")]
    seed: Annotated[Seed, Field(description="Choice of calibration rows")]

    @model_validator(mode="after")
    def _group_size_is_usable(self) -> QuantizeSection:
        if self.group_size not in (-1, *GROUP_SIZES):
            known = ", ".join(map(str, GROUP_SIZES))
            raise ValueError(f"group_size {self.group_size} is none that readers know: {known}, or -1 for a whole row")
        return self


class PublishSection(Section):
    """All figures to MLflow."""

    tracking_uri: Annotated[str, Field(min_length=1, description="MLflow tracking URI")]
    experiment: Annotated[str, Field(min_length=1, description="MLflow experiment")]
    registered_model: Annotated[str, Field(min_length=1, description="Name in MLflow's model registry")]
    push_to_hub: Annotated[str | None, Field(min_length=1, description="Hub repository for the shipped model")]
    gate: Annotated[list[str], Field(description="Conditions on this result and the champion's, checked at promotion")]


class Params(Section):
    """The whole of params.yaml."""

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
    def _gate_speaks_of_what_is_measured(self) -> Params:
        is_quantized = self.quantize.method != "none"
        available = metric_names(self.evaluate, with_quantized=is_quantized)
        beginnings = open_ended_names(self.evaluate, with_quantized=is_quantized)
        champions = {f"champion.{name}" for name in available}
        of_champion = [f"champion.{name}" for name in beginnings]
        for key, gate, names, begun in (
            ("evaluate.gate", self.evaluate.gate, available, beginnings),
            ("publish.gate", self.publish.gate, available | champions, beginnings + of_champion),
        ):
            try:
                check_ranges(parse_gate(gate, names, begun), range_of)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None
        return self


class ParamsError(ValueError):
    """params.yaml can't be used; the message lists every problem."""


def load_params(path: Path) -> Params:
    """Read and check params.yaml.

    Args:
        path: The file.

    Returns:
        The typed, frozen parameters.

    Raises:
        ParamsError: The file is missing, is not YAML, repeats a key, or holds unknown keys or unusable values; all
            problems are listed, each with its place and, for a misspelt key, the nearest name.
    """
    try:
        text = path.read_text(encoding="utf-8")
        values = YAML(typ="safe", pure=True).load(text)
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
        raise ParamsError(f"{path}: values are nested far deeper than any of params.yaml") from None
    except ValueError as error:  # a number of thousands of digits
        raise ParamsError(f"{path}: a value can't be read: {' '.join(str(error).split())}") from None
    return check_params(values, source=str(path))


def _yaml_problem(error: MarkedYAMLError) -> str:
    """What is wrong, in one line."""
    problem = " ".join(str(error.problem or error.context).split())
    if isinstance(error, DuplicateKeyError):
        return f"{problem.partition(' with value')[0]}: this section has it already; remove one of the two"
    if "\\t" in problem or "\t" in str(error.problem):
        return "a tab where only spaces may stand; indent with spaces"
    return problem


def check_params(values: Any, source: str = "params.yaml") -> Params:
    """Turn plain values (as YAML gives them) into `Params`; raises `ParamsError` naming `source`."""
    if not isinstance(values, dict):
        found = "an empty file" if values is None else type(values).__name__
        raise ParamsError(f"{source}: expected sections such as `train:`, found {found}")
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        problems = [describe_problem(detail, Params) for detail in error.errors()]
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    raise ParamsError("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in problems)]))


def describe_problem(detail: ErrorDetails, root: type[BaseModel]) -> str:
    """One line for one pydantic error: the key's path, what was found, and the nearest name for an unknown key."""
    place = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        parent = _model_at(root, detail["loc"][:-1])
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
    return f"{place}: {message}, found {detail['input']!r}"


def _model_at(root: type[BaseModel], loc: tuple[int | str, ...]) -> type[BaseModel] | None:
    """The model class that a pydantic error location points into, None where the path leaves the models."""
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
