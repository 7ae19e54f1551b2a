"""Types of params.yaml: what a section holds, and one message that lists everything wrong with it.

The file states every value, so nothing here has a default; `extra="forbid"` makes a misspelt key an error.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.reader import ReaderError

from sft.evaluate.gate import parse_gate
from sft.evaluate.gate_ranges import check_ranges
from sft.export.quantization import GROUP_SIZES
from stages.params.evaluate_params import EvaluateSection
from stages.params.figures import range_of
from stages.params.load_params import LoadSection
from stages.params.measured import metric_names, open_ended_names
from stages.params.section import Fraction, Positive, Section, Seed


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
    strategy: Annotated[Literal["bfd", "bfd_split", "wrapped", "none"], Field(description="How rows are filled")]
    overflow: Annotated[
        Literal["truncate", "drop", "error", "split"], Field(description="What happens to longer documents")
    ]
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
            near = difflib.get_close_matches(self.engine, ENGINES, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(ENGINES)} or a YAML file"
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
    loss_type: Annotated[Literal["nll", "dft"], Field(description="Loss on trained tokens")]
    gradient_checkpointing: Annotated[bool, Field(description="Recompute activations to save memory")]
    use_liger_kernel: Annotated[bool, Field(description="Liger's Triton kernels")]
    on_bad_loss: Annotated[
        Literal["stop", "skip", "rollback"], Field(description="What becomes of an update that is no number or a spike")
    ]
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
