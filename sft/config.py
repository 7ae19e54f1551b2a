"""Options of a training: `SFTConfig` (what and how), `ModelConfig` (which model and adapter)."""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar

from transformers import TrainingArguments

from sft.options import BAD_LOSS_POLICIES, LOSS_TYPES, PACKING_STRATEGIES

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 1024

FLAG = {"help": "Compute activations again in the backward pass.", "nargs": "?", "const": True}
"""Of an option that a command line may name without a value."""

CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")

DATASET_KWARGS = ("skip_prepare_dataset", "add_special_tokens", "append_concat_token")


@dataclass
class SFTConfig(TrainingArguments):
    """All of `transformers.TrainingArguments`, and what supervised fine-tuning adds.

    Args:
        model_init_kwargs: Arguments of `from_pretrained`, used when the model is given as a name.
        chat_template_path: Jinja file, or folder or hub id of a tokenizer whose chat template replaces the model's.
        dataset_text_field: Column that holds plain text.
        image_folder: Where paths of images in rows start, and which folder they may not lead out of; None = the working
            directory, "/" = anywhere.
        dataset_kwargs: `skip_prepare_dataset`: hand the data set to the collator as it is. Of plain text (a chat
            template prints such tokens itself): `add_special_tokens`: let the tokenizer add its own (a text that begins
            with bos gets no other); `append_concat_token`: put the end-of-sequence token after each document. Both are
            True unless given.
        dataset_num_proc: Processes that prepare the data; None = one.
        dataset_batch_size: Rows prepared at a time.
        eos_token: Token put at the end of texts in place of the tokenizer's eos.
        pad_token: Token that fills batches in place of the tokenizer's pad.
        max_length: Longest sequence in tokens; None = the smaller of 1024 and the tokenizer's limit.
        max_seq_length: Former name of `max_length`; give one of them.
        packing: Put several documents into one row; they never attend to each other.
        packing_strategy: `bfd`, `bfd_split` or `wrapped`.
        eval_packing: The same for evaluation; None = as `packing`.
        num_of_sequences: Pack as `ConstantLengthDataset` does, from a shuffled buffer of this many rows, instead of by
            `packing_strategy`.
        chars_per_token: The same; characters that a token is taken to have while that buffer is filled.
        padding_free: Join a batch's rows into one row without padding; None = where that is faster and nothing needs
            padded batches (`sft.train.batches.settle_batches`).
        share_tokens: In packed and padding-free batches, compute what documents of a row begin with alike once, and
            nothing behind a document's last target: same losses and gradients in less time. Left aside where a model or
            an option draws noise for each token, or logits of all tokens are asked for.
        fused_lora: Run plain LoRA layers as one autograd step each (`sft.kernels.lora`).
        fused_layers: The same for RMS norms and SwiGLU layers in float32 (`sft.kernels.layers`).
        force_flash_sdp: Compute attention with torch's own flash kernel alone (Flash Attention 1's route: needs `sdpa`,
            half precision on a GPU, and packed or padding-free batches, since that kernel takes no mask).
        pad_to_multiple_of: Padded length is a multiple of this.
        activation_offloading: Keep activations in the host's memory until the backward pass asks for them.
        completion_only_loss: Train only on completions; None = yes when rows have prompt and completion.
        assistant_only_loss: Train only on assistant turns of conversations.
        last_turn_only_loss: Train only on the last assistant turn of conversations.
        loss_type: `nll`, or `dft` (Wu et al., arXiv:2508.05629).
        log_entropy: Log the mean entropy of predictions; costs a pass over the logits.
        on_bad_loss: What to do, before it is made, with an update whose gradient is no number: `stop`, `skip` it, or
            `rollback` (weights and optimizer of the last checkpoint, then on with the next rows); None = make it.
        bad_loss_factor: A loss so many times the median of the last 50 updates is treated likewise; None = any is good.
        use_liger: Former name of `use_liger_kernel`; give one of them.
        warmup_ratio: Former name of `warmup_steps` below 1; give one of them.
        group_by_length: Former name of `train_sampling_strategy="group_by_length"`.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *TrainingArguments._VALID_DICT_FIELDS,
        "model_init_kwargs",
        "dataset_kwargs",
    ]  # JSON texts

    # stated again so that the type checker, which does not follow upstream, knows them
    gradient_checkpointing: bool | None = field(default=None, metadata=FLAG)
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = None
    activation_checkpointing: bool | None = field(default=None, metadata=FLAG)
    activation_checkpointing_kwargs: dict[str, Any] | str | None = None

    warmup_steps: float = field(default=0, metadata={"help": "Steps of warm-up; below 1, their share of all steps."})
    learning_rate: float = field(default=2e-5, metadata={"help": "Peak learning rate."})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two log lines."})
    # upstream's `str | bool` has a command line take the default itself for a yes or no
    include_num_input_tokens_seen: str = field(
        default="non_padding", metadata={"help": "Count tokens seen: no, all or non_padding."}
    )

    model_init_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Arguments of from_pretrained for a model given as a name."}
    )
    chat_template_path: str | None = field(default=None, metadata={"help": "Jinja file or tokenizer to take it from."})

    dataset_text_field: str = field(default="text", metadata={"help": "Column that holds plain text."})
    image_folder: str | None = field(default=None, metadata={"help": "Folder that images of rows may lie in."})
    dataset_kwargs: dict[str, Any] | str | None = field(default=None, metadata={"help": "Options of the preparation."})
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that prepare the data."})
    dataset_batch_size: int = field(default=1000, metadata={"help": "Rows prepared at a time."})
    eos_token: str | None = field(default=None, metadata={"help": "Token at the end of texts."})
    pad_token: str | None = field(default=None, metadata={"help": "Token that fills batches."})
    max_length: int | None = field(default=None, metadata={"help": "Longest sequence in tokens."})
    max_seq_length: int | None = field(default=None, metadata={"help": "Former name of max_length."})
    packing: bool = field(default=False, metadata={"help": "Several documents in a row."})
    packing_strategy: str = field(default="bfd", metadata={"help": "bfd, bfd_split or wrapped."})
    eval_packing: bool | None = field(default=None, metadata={"help": "Packing of evaluation rows."})
    num_of_sequences: int | None = field(default=None, metadata={"help": "Rows in the buffer of constant lengths."})
    chars_per_token: float | None = field(default=None, metadata={"help": "Characters a token, for that buffer."})
    padding_free: bool | None = field(default=None, metadata={"help": "Batches as one row without padding."})
    share_tokens: bool = field(default=True, metadata={"help": "Compute what documents begin with alike once."})
    fused_lora: bool = field(default=True, metadata={"help": "LoRA layers as one autograd step each."})
    fused_layers: bool = field(default=True, metadata={"help": "Norms and SwiGLU as one autograd step each."})
    pad_to_multiple_of: int | None = field(default=None, metadata={"help": "Padded length is a multiple of this."})
    force_flash_sdp: bool = field(default=False, metadata={"help": "Attention by torch's flash kernel alone."})

    activation_offloading: bool = field(default=False, metadata={"help": "Activations wait in the host's memory."})

    completion_only_loss: bool | None = field(default=None, metadata={"help": "Train only on completions."})
    assistant_only_loss: bool = field(default=False, metadata={"help": "Train only on assistant turns."})
    last_turn_only_loss: bool = field(default=False, metadata={"help": "Train only on the last assistant turn."})
    loss_type: str = field(default="nll", metadata={"help": "nll or dft."})
    log_entropy: bool = field(default=False, metadata={"help": "Log the mean entropy of predictions."})
    on_bad_loss: str | None = field(
        default=None, metadata={"help": "stop, skip or rollback when an update's loss is no number or too large."}
    )
    bad_loss_factor: float | None = field(
        default=None, metadata={"help": "A loss so many times the median of the last 50 updates is too large."}
    )
    use_liger: bool | None = field(default=None, metadata={"help": "Former name of use_liger_kernel."})
    warmup_ratio: float | None = field(default=None, metadata={"help": "Former name of warmup_steps below 1."})
    group_by_length: bool = field(default=False, metadata={"help": "Batches of rows of similar length."})

    def __post_init__(self) -> None:
        self._settle_checkpointing()
        self._settle_former_names()
        super().__post_init__()
        self._checkpointing = self._given_checkpointing()
        self.settle()

    def settle(self) -> None:
        """Bring former names to their present ones and check the choices; again after an option was set by hand.

        Raises:
            ValueError: Two names of one option disagree, or a value is none of the possible ones.
        """
        self._follow_checkpointing()
        self._settle_lengths()
        if self.use_liger is not None:
            self.use_liger_kernel, self.use_liger = self.use_liger, None
        self._check_choices()

    def _settle_checkpointing(self) -> None:
        # Upstream renamed gradient_* to activation_* and mirrors the new names into the old ones; users know the old.
        if self.activation_checkpointing is None:
            self.activation_checkpointing, self.gradient_checkpointing = self.gradient_checkpointing, None
        given = self.activation_checkpointing_kwargs or self.gradient_checkpointing_kwargs or {}
        self.gradient_checkpointing_kwargs = None
        if self.activation_checkpointing:
            # the reentrant variant loses gradients where all inputs of a block are frozen, as under LoRA
            stated = json.loads(given) if isinstance(given, str) else given
            self.activation_checkpointing_kwargs = {"use_reentrant": False, **stated}

    def _given_checkpointing(self) -> dict[str, Any]:
        """Both names of the two options, as they are now."""
        return {f"{name}{end}": getattr(self, f"{name}{end}") for name in CHECKPOINTING for end in ("", "_kwargs")}

    def _follow_checkpointing(self) -> None:
        """Take over what was set by hand: upstream reads the new names alone, and the old ones would do nothing."""
        before, now = self._checkpointing, self._given_checkpointing()
        if now == before:
            return
        for end in ("", "_kwargs"):
            changed = [name for name in CHECKPOINTING if now[name + end] != before[name + end]]
            value = now[(changed or CHECKPOINTING)[0] + end]
            self.activation_checkpointing = value if end == "" else self.activation_checkpointing
            self.activation_checkpointing_kwargs = value if end else self.activation_checkpointing_kwargs
        self._settle_checkpointing()
        self.gradient_checkpointing = self.activation_checkpointing
        self.gradient_checkpointing_kwargs = self.activation_checkpointing_kwargs
        self._checkpointing = self._given_checkpointing()

    def _settle_former_names(self) -> None:
        if self.warmup_ratio is not None:
            if self.warmup_steps not in (0, self.warmup_ratio):
                raise ValueError(
                    f"warmup_ratio={self.warmup_ratio} and warmup_steps={self.warmup_steps} are two names of one "
                    "option; give warmup_steps alone"
                )
            self.warmup_steps, self.warmup_ratio = self.warmup_ratio, None
        if self.group_by_length:
            self.train_sampling_strategy = "group_by_length"

    def _settle_lengths(self) -> None:
        if self.max_length is not None and self.max_seq_length not in (None, self.max_length):
            raise ValueError(
                f"max_length={self.max_length} and max_seq_length={self.max_seq_length} are two names of one option; "
                "give max_length alone"
            )
        self.max_length = self.max_length if self.max_length is not None else self.max_seq_length
        self.max_seq_length = None
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"max_length={self.max_length}: a sequence needs at least 2 tokens to predict one")

    def _check_choices(self) -> None:
        for name, value, choices in (
            ("packing_strategy", self.packing_strategy, PACKING_STRATEGIES),
            ("loss_type", self.loss_type, LOSS_TYPES),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value!r}: use one of {', '.join(choices)}")
        check_policy(self.on_bad_loss, self.bad_loss_factor, self.fp16)
        if isinstance(self.dataset_kwargs, str):
            raise ValueError(f'dataset_kwargs={self.dataset_kwargs!r} is no JSON object such as {{"name": true}}')
        unknown = set(self.dataset_kwargs or {}) - set(DATASET_KWARGS)
        if unknown:
            raise ValueError(f"dataset_kwargs has unknown keys {sorted(unknown)}; known: {', '.join(DATASET_KWARGS)}")
        for name in ("num_of_sequences", "chars_per_token"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(
                    f"{name}={value}: the buffer of constant lengths must hold something; give more than 0"
                )
            if value is not None and not (self.packing or self.eval_packing):
                raise ValueError(f"{name}={value} says how rows are packed, and would be ignored without packing=True")

    def dataset_option(self, name: str) -> bool | None:
        """One key of `dataset_kwargs`; None when it is not given."""
        value = self.dataset_kwargs.get(name) if isinstance(self.dataset_kwargs, dict) else None
        return None if value is None else bool(value)

    @property
    def autocast_precision(self) -> str | None:
        """`bf16` or `fp16`; None for the model's own precision."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else None

    @property
    def skip_prepare_dataset(self) -> bool:
        """Whether the data set goes to the collator as it is."""
        return bool(self.dataset_option("skip_prepare_dataset"))

    @property
    def constant_length(self) -> dict[str, Any]:
        """The arguments of `ConstantLengthDataset` that were given; then packing is left to it."""
        given = {name: getattr(self, name) for name in ("num_of_sequences", "chars_per_token")}
        return {name: value for name, value in given.items() if value is not None}


@dataclass
class ModelConfig:
    """Which model is loaded, and which adapter is put on it.

    Args:
        model_name_or_path: Hub id or folder.
        model_revision: Branch, tag or commit.
        dtype: `auto`, `bfloat16`, `float16` or `float32`; None = float32.
        torch_dtype: Former name of `dtype`; give one of them.
        trust_remote_code: Run Python code that comes with the model.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2`, `flash_attention_3`, `flex_attention`, `kernels-...`.
        use_peft: Put a LoRA adapter on the model.
        lora_r: Rank.
        lora_alpha: The update is scaled by `lora_alpha / lora_r`.
        lora_dropout: Dropout before the LoRA matrices.
        lora_target_modules: Names of the layers; None = all linear layers but the head.
        lora_modules_to_save: Modules that are trained in full and saved with the adapter.
        lora_task_type: Task type of peft.
        use_rslora: Scale by `lora_alpha / sqrt(lora_r)` (arXiv:2312.03732).
        use_dora: Weight-decomposed LoRA (arXiv:2402.09353).
        load_in_8bit: Base weights in LLM.int8 (bitsandbytes).
        load_in_4bit: Base weights in 4 bits (bitsandbytes), with LoRA: QLoRA, arXiv:2305.14314.
        bnb_4bit_quant_type: `nf4` or `fp4`.
        use_bnb_nested_quant: Quantize the quantization constants too.
        bnb_4bit_compute_dtype: dtype of the products; None = `dtype`.
    """

    model_name_or_path: str | None = None
    model_revision: str = "main"
    dtype: str | None = None
    torch_dtype: str | None = None
    trust_remote_code: bool = False
    attn_implementation: str | None = None
    use_peft: bool = False
    lora_r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    # the command line would take one name without `nargs`
    lora_target_modules: list[str] | str | None = field(default=None, metadata={"nargs": "+"})
    lora_modules_to_save: list[str] | None = None
    lora_task_type: str = "CAUSAL_LM"
    use_rslora: bool = False
    use_dora: bool = False
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    bnb_4bit_quant_type: str = "nf4"
    use_bnb_nested_quant: bool = False
    bnb_4bit_compute_dtype: str | None = None

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
            # a command line can only give a list, and "all-linear" is a word of its own
            self.lora_target_modules = self.lora_target_modules[0]


def check_policy(policy: str | None, factor: float | None, fp16: bool) -> None:
    """Refuse values that can't be followed.

    Raises:
        ValueError: Says which and why.
    """
    if policy is not None and policy not in BAD_LOSS_POLICIES:
        raise ValueError(f"on_bad_loss={policy!r}: use one of {', '.join(BAD_LOSS_POLICIES)}, or None to never look")
    if factor is not None and policy is None:
        raise ValueError(
            f"bad_loss_factor={factor} would be ignored without on_bad_loss={' or '.join(BAD_LOSS_POLICIES)}"
        )
    if factor is not None and factor <= 1:
        raise ValueError(f"bad_loss_factor={factor}: every second loss is above the median; give more than 1")
    if policy is not None and fp16:
        raise ValueError("on_bad_loss can't be used with fp16, whose loss scaling skips such updates itself; use bf16")
