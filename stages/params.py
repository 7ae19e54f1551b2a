"""Types of params.yaml: what a section holds, and one message that lists everything wrong with it.

The file states every value, so nothing here has a default; `extra="forbid"` makes a misspelt key an error.
"""

from __future__ import annotations

import difflib
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

from sft.gate import parse_gate
from sft.gptq_checks import GROUP_SIZES
from stages.measured import metric_names
from stages.scoring import figure_names

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]


def _not_blank(token: str) -> str:
    if not token.strip():
        raise ValueError("a token must have a character that is no space; remove it, or write the token")
    return token


Token = Annotated[str, AfterValidator(_not_blank)]
DType = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """Base of all sections: frozen, strict types, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, protected_namespaces=())


class ModelSection(Section):
    """The base model."""

    name_or_path: Annotated[str, Field(min_length=1, description="Hub id, local folder, or embedded:NAME")]
    revision: Annotated[str | None, Field(description="Hub branch, tag or commit")]
    dtype: Annotated[DType, Field(description="Data type in which the base model is loaded")]
    attn_implementation: Annotated[str, Field(description="auto, sdpa, eager, flash_attention_2, ...")]
    trust_remote_code: Annotated[bool, Field(description="Run Python code that comes with the model")]


def _template(text: str) -> str:
    try:
        SandboxedEnvironment().parse(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"not a Jinja template: {error.message}, line {error.lineno}") from error
    return text


Template = Annotated[str, AfterValidator(_template)]
Role = Literal["system", "user", "assistant", "tool"]


class TemplateSection(Section):
    """A conversation made of a row's columns, each text a Jinja template such as `{{ title }}: {{ body }}`."""

    system: Annotated[Template | None, Field(description="System message")] = None
    user: Annotated[Template, Field(description="What the user says")]
    assistant: Annotated[Template, Field(description="What is to be answered")]


class MappedSection(Section):
    """How rows are read whose columns or roles are not named as usual."""

    columns: Annotated[dict[str, str], Field(description="Column of the data -> the name it is read as")] = {}
    roles: Annotated[dict[str, Role], Field(description="Role in the data -> system, user, assistant or tool")] = {}
    template: Annotated[TemplateSection | None, Field(description="Makes a conversation of any columns")] = None

    @model_validator(mode="after")
    def _template_alone(self) -> Self:
        if self.template is not None and (self.columns or self.roles):
            raise ValueError("template reads columns by their own names and makes the roles; remove columns and roles")
        return self


class SourceSection(MappedSection):
    """One source of training rows; only `path` must be stated."""

    path: Annotated[str, Field(min_length=1, description="File or folder inside data/, or a hub id when hub is true")]
    hub: Annotated[bool, Field(description="path is a data set id on the hub")] = False
    config: Annotated[str | None, Field(description="Configuration of the hub data set")] = None
    split: Annotated[str, Field(description="Split of the hub data set")] = "train"
    revision: Annotated[str | None, Field(description="Branch, tag or commit of the hub data set")] = None
    max_rows: Annotated[int | None, Field(ge=1, description="Take only so many rows, chosen by load.seed")] = None
    weight: Annotated[
        float, Field(gt=0.0, le=100.0, description="Times each row is trained on; 0.5 = half of them")
    ] = 1.0


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


class LoadSection(Section):
    """Sources to validated records."""

    sources: Annotated[list[SourceSection], Field(min_length=1, description="Where training rows come from")]
    eval: Annotated[EvalSection, Field(description="Where held-out rows come from")]
    require_alternation: Annotated[bool, Field(description="User and assistant must take turns")]
    max_dropped_fraction: Annotated[Fraction, Field(description="Stop when more rows than this were dropped")]
    seed: Annotated[Seed, Field(description="Seed of the eval split")]


class FormatSection(Section):
    """Records to rendered chats."""

    chat_template: Annotated[str | None, Field(description="null = the model's own, a named format, or a Jinja file")]
    train_on: Annotated[
        Literal["assistant", "last_assistant", "completion", "all"], Field(description="What the loss is taken on")
    ]
    system_message: Annotated[str | None, Field(description="Put before conversations that have none")]
    add_special_tokens: Annotated[list[Token], Field(description="Tokens to add to the vocabulary")]


class PackSection(Section):
    """Rendered chats to token rows."""

    max_length: Annotated[int, Field(ge=8, description="Tokens in a packed row")]
    strategy: Annotated[Literal["bfd", "bfd_split", "wrapped", "none"], Field(description="How rows are filled")]
    overflow: Annotated[
        Literal["truncate", "drop", "error", "split"], Field(description="What happens to longer documents")
    ]
    max_lost_fraction: Annotated[Fraction, Field(description="Stop when more trained tokens than this are cut")]


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
    loss_type: Annotated[Literal["nll", "dft"], Field(description="Loss on trained tokens")]
    gradient_checkpointing: Annotated[bool, Field(description="Recompute activations to save memory")]
    use_liger_kernel: Annotated[bool, Field(description="Liger's Triton kernels")]
    logging_steps: Annotated[Positive, Field(description="Steps between points of the curve")]
    eval_steps: Annotated[Positive, Field(description="Steps between evaluations on held-out rows")]
    save_steps: Annotated[Positive, Field(description="Steps between checkpoints")]
    seed: Annotated[Seed, Field(description="Seed of the adapter, the order of rows and dropout")]


class MergeSection(Section):
    """Base and adapter to one checkpoint."""

    dtype: Annotated[DType, Field(description="Data type of the merged checkpoint")]
    tolerance: Annotated[float, Field(gt=0.0, description="Largest difference of logits")]
    num_sample_rows: Annotated[Positive, Field(description="Packed eval rows on which logits are compared")]


class QuantizeSection(Section):
    """Merged checkpoint to a quantized one."""

    method: Annotated[Literal["gptq", "none"], Field(description="Quantization method")]
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


def _known_tasks(value: str | list[str]) -> str | list[str]:
    figure_names(value)
    return value


class EvaluateSection(Section):
    """Base, tuned, merged and quantized side by side."""

    task: Annotated[
        str | list[str], AfterValidator(_known_tasks), Field(description="What answers are scored with, one or several")
    ]
    num_rows: Annotated[Positive | None, Field(description="null = every held-out row")]
    batch_size: Annotated[Positive, Field(description="Rows generated at a time")]
    max_new_tokens: Annotated[Positive, Field(description="Longest generation")]
    gate: Annotated[list[str], Field(description="Conditions that must hold before the champion is replaced")]


class PublishSection(Section):
    """All figures to MLflow."""

    tracking_uri: Annotated[str, Field(min_length=1, description="MLflow tracking URI")]
    experiment: Annotated[str, Field(min_length=1, description="MLflow experiment")]
    registered_model: Annotated[str, Field(min_length=1, description="Name in MLflow's model registry")]
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
        available = metric_names(self.evaluate.task, with_quantized=self.quantize.method != "none")
        champions = {f"champion.{name}" for name in available}
        for key, gate, names in (
            ("evaluate.gate", self.evaluate.gate, available),
            ("publish.gate", self.publish.gate, available | champions),
        ):
            try:
                parse_gate(gate, names)
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
        near = difflib.get_close_matches(str(detail["loc"][-1]), names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(names)}"
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
