"""Options of a training: `SFTConfig` (how a model is trained), `ModelConfig` (which model and adapter)."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import InitVar, dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from sft.optimizers.names import IN_BACKWARD, OWN_OPTIMIZERS, check_optim_args, parse_optim_args, updates_in_backward
from sft.optimizers.rules import parameter_rules
from sft.option_types import check_option_types, suggest_option_names
from sft.options import (
    BAD_LOSS_POLICIES,
    LOSS_TYPES,
    NOT_PRINTED_POLICIES,
    OVERFLOW_POLICIES,
    PACKING_STRATEGIES,
    THINKING_POLICIES,
    TRUNCATION_MODES,
    UNTRAINED_POLICIES,
)

logger = logging.getLogger(__name__)


class DefaultLength(int):
    """Default of `max_length`, which differs from the same number given by name: a tokenizer's limit may lower it."""


DEFAULT_MAX_LENGTH = DefaultLength(1024)


CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")
"""Two names of one option: transformers renamed the second to the first."""

CHECKPOINTING_FLAG = {
    "help": "Discard activations in the forward pass and compute them again in the backward pass, to save memory. "
    "activation_checkpointing and gradient_checkpointing are two names of one option. None = no.",
    # a command line may give the option without a value
    "nargs": "?",
    "const": True,
}

CHECKPOINTING_KWARGS = {
    "help": "Arguments of torch.utils.checkpoint, as JSON on a command line; use_reentrant is false unless given here. "
    "selective: true keeps the results of matrix products and attention; every_n_layers: N leaves out layers."
}

FORMER_VALUES = {
    "loss_type": {"chunked_nll": "nll"},
    "packing_strategy": {"bfd-requeue": "bfd_split"},
}
"""Option -> former names of its values, with the present ones."""

DATASET_KWARGS = ("skip_prepare_dataset", "add_special_tokens", "append_concat_token")


@suggest_option_names
@dataclass
class SFTConfig(TrainingArguments):
    """All options of `transformers.TrainingArguments`, and those of supervised fine-tuning.

    Each option is described where it is declared, in its field's `metadata["help"]`. `--help` of a script that uses
    `HfArgumentParser` prints these descriptions, and docs/library.md explains how to print them.

    Call `validate` after setting an option on an existing configuration.

    Raises:
        ValueError: Two names of one option disagree, or a value is not one of the possible ones.
    """

    # options that may be given as JSON text
    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "chat_template_kwargs",
        "dataset_kwargs",
        "prepare_in_int8_kwargs",
    ]

    # options of TrainingArguments, declared again for the type checker, which does not read transformers
    gradient_checkpointing: bool | None = field(default=None, metadata=CHECKPOINTING_FLAG)
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = field(default=None, metadata=CHECKPOINTING_KWARGS)
    activation_checkpointing: bool | None = field(default=None, metadata=CHECKPOINTING_FLAG)
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(default=None, metadata=CHECKPOINTING_KWARGS)

    # an option of TrainingArguments with more values
    optim: str = field(
        default="adamw_torch_fused",
        metadata={
            "help": "Optimizer: muon (Muon for matrices, AdamW for embeddings, head and vectors), or a name of "
            "transformers.training_args.OptimizerNames."
        },
    )

    # options of TrainingArguments with another default
    warmup_steps: float = field(
        default=0,
        metadata={"help": "Steps in which the learning rate rises to its peak; below 1, a share of all steps."},
    )
    learning_rate: float = field(
        default=2e-5, metadata={"help": "Peak learning rate, reached after the warm-up steps."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between two log lines; below 1, a share of all steps."}
    )
    # declared as str: with `str | bool`, as transformers has it, a command line would parse the default as a boolean
    include_num_input_tokens_seen: str = field(
        default="non_padding",
        metadata={"help": "Which input tokens are counted and logged: no (none), all, or non_padding."},
    )

    # model and chat template
    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of from_pretrained, as JSON on a command line. Used when the model is given as a name."
        },
    )
    # not a field, so that `--trust_remote_code` is one option of a command line: that of `ModelConfig`
    trust_remote_code: InitVar[bool] = False
    prepare_in_int8_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of prepare_model_for_kbit_training (use_gradient_checkpointing, "
            "gradient_checkpointing_kwargs), as JSON on a command line, for a model in 4 or 8 bits. None = as "
            "activation_checkpointing says."
        },
    )
    router_aux_loss_coef: float | None = field(
        default=None,
        metadata={
            "help": "Weight of the load-balancing loss of a mixture of experts; 0 = leave this loss out. None = as "
            "output_router_logits and router_aux_loss_coef of the model's configuration say."
        },
    )
    chat_template_path: str | None = field(
        default=None,
        metadata={
            "help": "Chat template that replaces the tokenizer's: a named format (chatml, llama3, zephyr), a Jinja "
            "file, or the folder or hub id of a tokenizer. None = the tokenizer's own."
        },
    )

    chat_template_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Values of the chat template's variables, as JSON on a command line, e.g. "
            '{"enable_thinking": false}. They become defaults of the template that is saved with the model. A column '
            "of this name overrides them row by row."
        },
    )
    not_printed: str = field(
        default="fail",
        metadata={
            "help": "What to do with a conversation that says more than the chat template prints, such as reasoning or "
            "a tool call: fail, warn (train on what is printed) or drop (leave the row out)."
        },
    )
    thinking: str = field(
        default="keep",
        metadata={
            "help": "What to do with the reasoning of the assistant. keep: all of it must be printed, if need be by a "
            "variable of the chat template such as preserve_thinking. last: remove that of earlier answers where the "
            "template does not print it; those answers are not trained. unroll: make one row of each trained answer, "
            "with the prompt that the model gets for it. drop: remove all of it, and turn it off in the template."
        },
    )

    # data
    dataset_text_field: str = field(default="text", metadata={"help": "Column that contains plain text."})
    image_folder: str | None = field(
        default=None,
        metadata={
            "help": "Folder that image paths in rows are relative to and may not lead out of. None = the working "
            "directory, / = any path."
        },
    )
    dataset_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Options of the preparation of the data, as JSON on a command line. skip_prepare_dataset (default "
            "false): pass the rows to the collator as they are. For plain text only, since a chat template writes the "
            "special tokens of a conversation itself: add_special_tokens (default true): let the tokenizer add its "
            "special tokens, but no second bos; append_concat_token (default true): append the end-of-sequence token "
            "to each document."
        },
    )
    dataset_num_proc: int | None = field(
        default=None, metadata={"help": "Number of processes that prepare the data; None = 1."}
    )
    dataset_batch_size: int = field(default=1000, metadata={"help": "Number of rows that are prepared at a time."})
    eos_token: str | None = field(
        default=None,
        metadata={"help": "End-of-sequence token, which must be in the vocabulary; None = the tokenizer's own."},
    )
    pad_token: str | None = field(
        default=None,
        metadata={
            "help": "Padding token, which must be in the vocabulary. None = the tokenizer's own, or eos if it has none."
        },
    )
    max_length: int | None = field(
        default=DEFAULT_MAX_LENGTH,
        metadata={
            "help": "Longest sequence in tokens, at least 2; None = no limit. If it is not given, text is limited to "
            "the smaller of 1024 and the tokenizer's limit, and rows with images are not limited."
        },
    )
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Former name of max_length; give one of the two."}
    )
    truncation_mode: str = field(
        default="keep_start",
        metadata={"help": "Part of a too long sequence that is kept: keep_start or keep_end."},
    )
    overflow: str | None = field(
        default=None,
        metadata={
            "help": "What becomes of documents longer than max_length: truncate, split, split_with_prompt (each part "
            "of an answer keeps its prompt), drop or error. None = truncate, or what packing_strategy does."
        },
    )
    shuffle_dataset: bool = field(
        default=False,
        metadata={
            "help": "Shuffle the data sets by seed before rows are packed. Training draws rows in random order without "
            "this, too; it matters for which documents share a row, and for streams, which are read in order."
        },
    )
    packing: bool = field(
        default=False, metadata={"help": "Put several documents into one row. They never attend to each other."}
    )
    packing_strategy: str = field(
        default="bfd",
        metadata={
            "help": "How documents are put into rows: bfd (best-fit decreasing, longer documents are truncated), "
            "bfd_split (the same, longer documents are split), in_order (as many as fit, in the given order; longer "
            "documents are truncated) or wrapped (all documents joined and cut at max_length)."
        },
    )
    eval_packing: bool | None = field(
        default=None, metadata={"help": "The same as packing, for evaluation rows; None = as packing."}
    )
    num_of_sequences: int | None = field(
        default=None,
        metadata={
            "help": "Pack as ConstantLengthDataset does, from a shuffled buffer of this many rows, instead of by "
            "packing_strategy; needs packing. None = pack by packing_strategy, unless chars_per_token is given."
        },
    )
    chars_per_token: float | None = field(
        default=None,
        metadata={
            "help": "Pack as ConstantLengthDataset does; characters per token by which the size of its buffer is "
            "estimated; needs packing. None = pack by packing_strategy, unless num_of_sequences is given."
        },
    )

    # batches and computation
    padding_free: bool | None = field(
        default=None,
        metadata={
            "help": "Join the rows of a batch into one row without padding. None = do so where it is faster and "
            "nothing needs padded batches."
        },
    )
    share_tokens: bool = field(
        default=True,
        metadata={
            "help": "In packed and padding-free batches, compute a beginning that several documents have in common "
            "only once, and no token after a document's last target. Losses and gradients stay the same and take "
            "less time. Has no effect where noise is drawn per token (dropout, NEFTune) or the logits of all tokens "
            "are needed."
        },
    )
    fused_lora: bool = field(default=True, metadata={"help": "Run each plain LoRA layer as one autograd operation."})
    fused_layers: bool = field(
        default=True, metadata={"help": "Run each RMS norm and SwiGLU layer in float32 as one autograd operation."}
    )
    pad_to_multiple_of: int | str | None = field(
        default=None,
        metadata={"help": "Pad batches to a length that is a multiple of this; None or auto = to the longest row."},
    )
    force_flash_sdp: bool = field(
        default=False,
        metadata={
            "help": "Compute attention with torch's own flash kernel only. Needs sdpa, half precision on a GPU, and "
            "packed or padding-free batches, since this kernel takes no mask."
        },
    )
    activation_offloading: bool = field(
        default=False,
        metadata={"help": "Keep activations in the host's memory between the forward and the backward pass."},
    )

    # learning rates of parts of the model
    embedding_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of embeddings and head, where they are trained; None = learning_rate."},
    )
    loraplus_lr_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Learning rate of LoRA's second matrices, divided by learning_rate (LoRA+, arXiv:2402.12354), e.g. "
            "16. None = 1."
        },
    )
    parameter_groups: list[dict[str, Any]] | None = field(
        default=None,
        metadata={
            "help": "Parameters with a learning_rate or weight_decay of their own, or frozen: a list of dicts such as "
            '{"pattern": "layers\\.0\\.", "frozen": true}. The pattern is a regular expression that is searched in '
            "parameter names, and the first one that matches holds."
        },
    )

    # loss
    completion_only_loss: bool | None = field(
        default=None,
        metadata={"help": "Train only on completions; None = yes where rows have a prompt and a completion."},
    )
    assistant_only_loss: bool = field(
        default=False, metadata={"help": "Train only on the assistant turns of conversations."}
    )
    last_turn_only_loss: bool = field(
        default=False, metadata={"help": "Train only on the last assistant turn of conversations."}
    )
    loss_type: str = field(
        default="nll",
        metadata={
            "help": "nll (cross entropy) or dft (each token's loss times its probability, Wu et al., arXiv:2508.05629)."
        },
    )
    log_entropy: bool = field(
        default=False, metadata={"help": "Log the mean entropy of the predictions; costs a pass over the logits."}
    )
    on_bad_loss: str | None = field(
        default=None,
        metadata={
            "help": "What to do with an update whose gradients are not finite, before it is applied: stop (raise an "
            "error), skip it, or rollback (restore weights and optimizer from the last checkpoint and go on with the "
            "next rows). None = apply it."
        },
    )
    bad_loss_factor: float | None = field(
        default=None,
        metadata={
            "help": "Apply on_bad_loss also to an update whose loss is more than this many times the median of the "
            "last 50 updates; above 1. None = accept any finite loss."
        },
    )
    on_untrained: str | None = field(
        default="warn",
        metadata={
            "help": "What to do if parameters that require a gradient have none, or one of exactly zero, or do not "
            "change in the first 5 updates: warn (and record it) or fail. None = do not check."
        },
    )

    # former names
    use_liger: bool | None = field(
        default=None, metadata={"help": "Former name of use_liger_kernel; give one of the two."}
    )
    warmup_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of all steps in which the learning rate rises to its peak; 1 = all of them. Former name of "
            "warmup_steps below 1; give one of the two."
        },
    )
    group_by_length: bool = field(
        default=False,
        metadata={
            "help": "Make batches of rows of similar length; former name of train_sampling_strategy=group_by_length."
        },
    )

    def __post_init__(self, trust_remote_code: bool) -> None:
        self.trust_remote_code = trust_remote_code
        check_option_types(self)
        self._set_checkpointing()
        self._replace_former_names()
        layout = {name: getattr(self, name) for name in ("packing", "eval_packing", "padding_free")}
        optim = str(getattr(self.optim, "value", self.optim))
        if optim in OWN_OPTIMIZERS:
            self.optim = "adamw_torch"  # transformers knows its own names only
        super().__post_init__()
        self.optim = optim if optim in OWN_OPTIMIZERS else self.optim
        # unsloth turns these off in all TrainingArguments on CPUs, where its own attention mixes documents of a row
        for name, value in layout.items():
            setattr(self, name, value)
        self._checkpointing = self._checkpointing_options()
        self.validate()

    def validate(self) -> None:
        """Move values of former names to their present ones and check all choices.

        Called at construction; call it again after setting an option by hand.

        Raises:
            ValueError: Two names of one option disagree, or a value is not one of the possible ones.
        """
        check_option_types(self, SFTConfig.__annotations__)
        self._update_checkpointing()
        self._set_max_length()
        self._set_pad_to_multiple_of()
        for name, values in FORMER_VALUES.items():
            setattr(self, name, values.get(getattr(self, name), getattr(self, name)))
        if self.use_liger is not None:
            self.use_liger_kernel, self.use_liger = self.use_liger, None
        self._check_choices()

    def _set_checkpointing(self) -> None:
        """Move gradient_checkpointing to activation_checkpointing, which transformers copies back to the former."""
        if self.activation_checkpointing is None:
            self.activation_checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None
        given = self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs or {}
        self.gradient_checkpointing_kwargs = None
        if self.activation_checkpointing:
            # the reentrant variant loses gradients where all inputs of a block are frozen, as under LoRA
            stated = json.loads(given) if isinstance(given, str) else given
            self.activation_checkpointing_kwargs = {"use_reentrant": False, **stated}

    def _checkpointing_options(self) -> dict[str, Any]:
        """Return the present values of both names of the two options."""
        return {f"{name}{end}": getattr(self, f"{name}{end}") for name in CHECKPOINTING for end in ("", "_kwargs")}

    def _update_checkpointing(self) -> None:
        """Copy what was set by hand to the other name: transformers reads the present names alone."""
        before, now = self._checkpointing, self._checkpointing_options()
        if now == before:
            return
        for end in ("", "_kwargs"):
            changed = [name for name in CHECKPOINTING if now[name + end] != before[name + end]]
            value = now[(changed or CHECKPOINTING)[0] + end]
            self.activation_checkpointing = value if end == "" else self.activation_checkpointing
            self.activation_checkpointing_kwargs = value if end else self.activation_checkpointing_kwargs
        self._set_checkpointing()
        self.gradient_checkpointing = self.activation_checkpointing
        self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs
        self._checkpointing = self._checkpointing_options()

    def _replace_former_names(self) -> None:
        if self.warmup_ratio is not None:
            if self.warmup_steps not in (0, self.warmup_ratio):
                raise ValueError(
                    f"warmup_ratio={self.warmup_ratio} and warmup_steps={self.warmup_steps} are two names of one "
                    "option; give warmup_steps alone"
                )
            if not 0 <= self.warmup_ratio <= 1:
                raise ValueError(
                    f"warmup_ratio={self.warmup_ratio} is a share of all steps, from 0 to 1; give a number of steps as "
                    "warmup_steps"
                )
            # warmup_steps=1.0 would be one step
            self.warmup_steps, self.warmup_ratio = min(self.warmup_ratio, math.nextafter(1.0, 0.0)), None
        if self.group_by_length:
            self.train_sampling_strategy = "group_by_length"

    def _set_max_length(self) -> None:
        if self.max_seq_length is not None:
            if not isinstance(self.max_length, DefaultLength) and self.max_length != self.max_seq_length:
                raise ValueError(
                    f"max_length={self.max_length} and max_seq_length={self.max_seq_length} are two names of one "
                    "option; give max_length alone"
                )
            self.max_length, self.max_seq_length = self.max_seq_length, None
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length={self.max_length}: a sequence needs at least 2 tokens to predict one")

    def _set_pad_to_multiple_of(self) -> None:
        """Convert what a command line gave as text to a number, or None for `auto` and `none`."""
        given = self.pad_to_multiple_of
        if isinstance(given, str):
            if given.lower() not in ("auto", "none", "null") and not given.isdecimal():
                raise ValueError(f"pad_to_multiple_of={given!r} is not a number; give one, auto or none")
            self.pad_to_multiple_of = int(given) if given.isdecimal() else None
        if self.pad_to_multiple_of is not None and int(self.pad_to_multiple_of) < 1:
            raise ValueError(f"pad_to_multiple_of={given}: give a number of at least 1, or None")

    def _check_choices(self) -> None:
        for name, value, choices in (
            ("packing_strategy", self.packing_strategy, PACKING_STRATEGIES),
            ("loss_type", self.loss_type, LOSS_TYPES),
            ("not_printed", self.not_printed, NOT_PRINTED_POLICIES),
            ("thinking", self.thinking, THINKING_POLICIES),
            ("truncation_mode", self.truncation_mode, TRUNCATION_MODES),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}: use one of {', '.join(choices)}")
        check_policy(self.on_bad_loss, self.bad_loss_factor, self.fp16)
        if self.on_untrained not in (None, *UNTRAINED_POLICIES):
            known = ", ".join(UNTRAINED_POLICIES)
            raise ValueError(f"on_untrained={self.on_untrained!r}: use one of {known}, or None to check nothing")
        self._check_optimizer()
        if isinstance(self.dataset_kwargs, str):
            raise ValueError(f'dataset_kwargs={self.dataset_kwargs!r} is not a JSON object such as {{"name": true}}')
        if isinstance(self.chat_template_kwargs, str):
            given = self.chat_template_kwargs
            raise ValueError(f'chat_template_kwargs={given!r} is not a JSON object such as {{"name": true}}')
        unknown = set(self.dataset_kwargs or {}) - set(DATASET_KWARGS)
        if unknown:
            raise ValueError(f"dataset_kwargs has unknown keys {sorted(unknown)}; known: {', '.join(DATASET_KWARGS)}")
        divides = self.packing_strategy in ("bfd_split", "wrapped")
        splits = divides or bool(self.constant_length)
        self._check_overflow(splits=splits)
        if self.truncation_mode == "keep_end" and self.packing and self.eval_packing is not False and splits:
            what = f"packing_strategy={self.packing_strategy!r}" if divides else "num_of_sequences"
            raise ValueError(
                f"truncation_mode='keep_end' would be ignored: packing with {what} splits long documents and truncates "
                "none; leave it out, or use packing_strategy='bfd' alone"
            )
        for name in ("num_of_sequences", "chars_per_token"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be above 0: it sets the size of the buffer that packing fills")
            if value is not None and not (self.packing or self.eval_packing):
                raise ValueError(f"{name}={value} sets how rows are packed, and would be ignored without packing=True")

    def _check_overflow(self, *, splits: bool) -> None:
        if self.overflow is None:
            return
        if self.overflow not in OVERFLOW_POLICIES:
            raise ValueError(f"overflow={self.overflow!r}: use one of {', '.join(OVERFLOW_POLICIES)}")
        if self.max_length is None:
            raise ValueError(f"overflow={self.overflow!r} would be ignored, since max_length=None limits no sequence")
        if splits and (self.packing or self.eval_packing):
            raise ValueError(
                f"overflow={self.overflow!r} would be ignored: packing by packing_strategy={self.packing_strategy!r}, "
                "num_of_sequences or chars_per_token divides long documents itself; leave it out, or use "
                "packing_strategy='bfd' alone"
            )
        if self.truncation_mode == "keep_end" and self.overflow != "truncate":
            raise ValueError(
                f"truncation_mode='keep_end' would be ignored with overflow={self.overflow!r}, which truncates "
                "nothing; leave one of them out"
            )

    def _check_optimizer(self) -> None:
        optim = str(getattr(self.optim, "value", self.optim))
        check_optim_args(optim, parse_optim_args(self.optim_args))
        for name in ("embedding_learning_rate", "loraplus_lr_ratio"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value} must be above 0; freeze parameters by parameter_groups")
        parameter_rules(self.parameter_groups)
        own_rates = [
            name for name in ("embedding_learning_rate", "loraplus_lr_ratio", "parameter_groups") if getattr(self, name)
        ]
        if own_rates and updates_in_backward(optim):
            raise ValueError(
                f"{own_rates[0]} can't be used with optim={optim!r}, which updates each weight in the backward pass "
                "with one rate; use another optimizer"
            )
        if optim in IN_BACKWARD:
            self._check_updates_in_backward(optim)

    def _check_updates_in_backward(self, optim: str) -> None:
        why = f"optim={optim!r} updates each weight in the backward pass"
        if self.max_grad_norm:
            raise ValueError(
                f"{why}, before the gradient's norm is known: max_grad_norm={self.max_grad_norm} would have no effect; "
                "set max_grad_norm=0"
            )
        if self.on_bad_loss is not None:
            raise ValueError(
                f"{why}, so that on_bad_loss={self.on_bad_loss!r} can't keep it from doing so; set it to None"
            )
        if self.gradient_accumulation_steps > 1:
            raise ValueError(
                f"{why}, so that gradient_accumulation_steps={self.gradient_accumulation_steps} would take as many "
                "steps; set it to 1"
            )

    def dataset_option(self, name: str) -> bool | None:
        """Return one entry of `dataset_kwargs`; None where it is not given."""
        value = self.dataset_kwargs.get(name) if isinstance(self.dataset_kwargs, dict) else None
        return None if value is None else bool(value)

    @property
    def is_max_length_given(self) -> bool:
        """Whether `max_length` was given by name, as a number or as None."""
        return not isinstance(self.max_length, DefaultLength)

    @property
    def padding_multiple(self) -> int | None:
        """`pad_to_multiple_of` as a number."""
        return None if self.pad_to_multiple_of is None else int(self.pad_to_multiple_of)

    @property
    def autocast_precision(self) -> str | None:
        """Precision of autocast, `bf16` or `fp16`; None without autocast."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else None

    @property
    def skip_prepare_dataset(self) -> bool:
        """Whether rows are passed to the collator as they are."""
        return bool(self.dataset_option("skip_prepare_dataset"))

    @property
    def constant_length(self) -> dict[str, Any]:
        """Arguments of `ConstantLengthDataset` that were given; where there are some, it does the packing."""
        given = {name: getattr(self, name) for name in ("num_of_sequences", "chars_per_token")}
        return {name: value for name, value in given.items() if value is not None}


@suggest_option_names
@dataclass
class ModelConfig:
    """Which model is loaded, and which adapter is put on it.

    Each option is described in its field's `metadata["help"]`, as those of `SFTConfig` are.

    Raises:
        ValueError: Two options exclude each other, or two names of one option disagree.
    """

    model_name_or_path: str | None = field(default=None, metadata={"help": "Hub id or folder of the model."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "Precision of the weights: auto (the checkpoint's), bfloat16, float16 or float32. None = float32."
        },
    )
    torch_dtype: str | None = field(default=None, metadata={"help": "Former name of dtype; give one of the two."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the Python code that comes with the model on the hub."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "eager, sdpa, flash_attention_2, flash_attention_3, flex_attention or kernels-community/NAME. "
            "None or auto = chosen for the model and the device."
        },
    )
    use_peft: bool = field(
        default=False, metadata={"help": "Put a LoRA adapter on the model (Hu et al., arXiv:2106.09685)."}
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the LoRA matrices."})
    lora_alpha: int = field(default=32, metadata={"help": "LoRA's update is scaled by lora_alpha / lora_r."})
    lora_dropout: float = field(
        default=0.05, metadata={"help": "Dropout probability on the input of the LoRA matrices."}
    )
    lora_target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of the layers that get LoRA matrices, or one regular expression. None or all-linear = all "
            "linear layers and experts, but neither the head nor routers.",
            "nargs": "+",  # a command line would take one name without it
        },
    )
    lora_target_parameters: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Names of parameters that get LoRA matrices themselves, such as mlp.experts.gate_up_proj of a "
            "mixture of experts, whose experts are not layers of their own. None = under all-linear, those of the "
            "experts (which needs lora_dropout=0); none = no parameter.",
            "nargs": "+",
        },
    )
    lora_modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Names of modules that are trained in full and saved with the adapter; None = no module."},
    )
    lora_task_type: str = field(default="CAUSAL_LM", metadata={"help": "Task type that peft records in the adapter."})
    use_rslora: bool = field(
        default=False, metadata={"help": "Scale LoRA's update by lora_alpha / sqrt(lora_r) (arXiv:2312.03732)."}
    )
    use_dora: bool = field(default=False, metadata={"help": "Use weight-decomposed LoRA (DoRA, arXiv:2402.09353)."})
    load_in_8bit: bool = field(
        default=False, metadata={"help": "Load the weights in 8 bits (LLM.int8 of bitsandbytes, arXiv:2208.07339)."}
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Load the weights in 4 bits (bitsandbytes); with LoRA this is QLoRA (arXiv:2305.14314)."},
    )
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "Data type of 4-bit weights: nf4 or fp4."})
    use_bnb_nested_quant: bool = field(
        default=False, metadata={"help": "Quantize the scales of 4-bit weights, too (double quantization)."}
    )
    bnb_4bit_compute_dtype: str | None = field(
        default=None, metadata={"help": "Precision of products with 4-bit weights; None = dtype."}
    )
    bnb_4bit_quant_storage: str | None = field(
        default=None,
        metadata={
            "help": "Type of the tensors that contain 4-bit weights: uint8, bfloat16, float16 or float32. FSDP needs "
            "that of the other weights. None = uint8."
        },
    )

    def __post_init__(self) -> None:
        if self.load_in_8bit and self.load_in_4bit:
            raise ValueError("load_in_8bit and load_in_4bit exclude each other; set one of them")
        if self.dtype is not None and self.torch_dtype not in (None, self.dtype):
            raise ValueError(
                f"dtype={self.dtype!r} and torch_dtype={self.torch_dtype!r} are two names of one option; give dtype"
            )
        self.dtype = self.dtype if self.dtype is not None else self.torch_dtype
        self.torch_dtype = self.dtype
        if isinstance(self.lora_target_modules, list) and len(self.lora_target_modules) == 1:
            # a command line gives a list even of one entry, which may be "all-linear" or a regular expression
            self.lora_target_modules = self.lora_target_modules[0]


def check_policy(policy: str | None, factor: float | None, fp16: bool) -> None:
    """Check `on_bad_loss` and `bad_loss_factor`.

    Args:
        policy: Value of `on_bad_loss`.
        factor: Value of `bad_loss_factor`.
        fp16: Whether training runs in fp16 autocast, whose loss scaling skips non-finite updates itself.

    Raises:
        ValueError: A value is not possible, or would be ignored.
    """
    if policy is not None and policy not in BAD_LOSS_POLICIES:
        known = ", ".join(BAD_LOSS_POLICIES)
        raise ValueError(f"on_bad_loss={policy!r}: use one of {known}, or None to apply every update")
    if factor is not None and policy is None:
        raise ValueError(
            f"bad_loss_factor={factor} would be ignored without on_bad_loss={' or '.join(BAD_LOSS_POLICIES)}"
        )
    if factor is not None and factor <= 1:
        raise ValueError(f"bad_loss_factor={factor}: half of all losses are above the median; give more than 1")
    if policy is not None and fp16:
        raise ValueError("on_bad_loss can't be used with fp16, whose loss scaling skips such updates itself; use bf16")
