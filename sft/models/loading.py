"""Loading of models, after checks whose messages name what is wrong and what to do.

Two functions keep the weights as they are where the code of transformers or bitsandbytes changes them:
`keeping_loaded_weights` when they are loaded, and `keep_weights` in evaluations.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    PreTrainedModel,
    trainer,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sft.attention.causality import probe_causality
from sft.attention.choice import check_attention_request
from sft.attention.token_types import add_token_types
from sft.hardware import current_hardware
from sft.inner_model import causal_lm
from sft.models.checkpoint import (
    ADVICE,
    HEADLESS,
    MASKED,
    WAY_OUT,
    CheckpointError,
    auto_class,
    auto_classes,
    check_architecture,
    check_loading_info,
    check_weight_files,
    described,
    explain_load_error,
    generates_text,
    task_of,
)
from sft.models.values import check_values
from sft.suggest import did_you_mean

logger = logging.getLogger(__name__)

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
DTYPE_ALIASES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "float": "float32"}
MIXED_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}

MAYBE_BIDIRECTIONAL = ("bert-generation", "xlnet")
"""Types, besides those with a masked language model, whose causal class attends in both directions by some options."""

PICKLE_WEIGHTS = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype | str:
    """Return the torch dtype of a name such as `bfloat16` or `torch.bfloat16`; return `auto` as it is.

    Raises:
        ValueError: The name is unknown; the message suggests the one that was probably meant.
    """
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return "auto"
    if name in DTYPES:
        return DTYPES[name]
    hint = did_you_mean(DTYPE_ALIASES.get(name, name), DTYPES, after=" ")
    raise ValueError(f"dtype {dtype!r} is not one that models are trained in: {hint}Use auto, {', '.join(DTYPES)}.")


UNFIT = (TypeError, AttributeError, LookupError, ArithmeticError, AssertionError, StrictDataclassError)
"""Errors of transformers' code for values in config.json of another type or size than it expects."""

UNFIT_SIZE = re.compile("negative dimension|non-negative")
"""What torch's RuntimeError says of sizes in config.json that no tensor can have."""


def load_model(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype | None = "float32",
    attn_implementation: str | dict[str, str] | None = None,
    quantization_config: Any | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    device_map: Any | None = None,
    mixed_precision: str | None = None,
    **from_pretrained_kwargs: Any,
) -> PreTrainedModel:
    """Load a language model or a vision-language model from safetensors.

    Args:
        name_or_path: Hub id or folder.
        dtype: `float32`, `bfloat16`, `float16`, or `auto` for what the checkpoint states; None = `float32`.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2`, `flash_attention_3`, `flex_attention`,
            `kernels-community/...`; a dict of them by sub-model; None or `auto` = transformers' choice.
        quantization_config: What `sft.models.kbit.get_quantization_config` returns.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run Python code that comes with the model.
        device_map: Placement as accelerate takes it; None = the CPU, from where a trainer moves the model.
        mixed_precision: `bf16` or `fp16` if training runs under autocast. Attention is checked for this precision.
        from_pretrained_kwargs: Further arguments of `from_pretrained`. `torch_dtype` is read as `dtype`, and
            `load_in_8bit` or `load_in_4bit` as a `quantization_config`.

    Returns:
        The model in evaluation mode, as `from_pretrained` returns it.

    Raises:
        ValueError: The dtype or attention does not exist or can't run here; weights are pickled, damaged, missing or
            of another size than the config states; or the model is not a causal language model or can't be found.
    """
    parsed = _one_dtype(dtype, from_pretrained_kwargs)
    quantization_config = _one_quantization(quantization_config, from_pretrained_kwargs, parsed)
    _check_weight_format(name_or_path, from_pretrained_kwargs)
    # "main" is the default branch of the hub; transformers ignores it for a folder
    source = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    attention = None if attn_implementation in (None, "auto") else attn_implementation
    sizes_may_differ = from_pretrained_kwargs.pop("ignore_mismatched_sizes", False)
    arguments = {**from_pretrained_kwargs, **source, "dtype": parsed, "use_safetensors": True}
    # for `check_loading_info`: transformers only warns of missing weights, and does not name those of another size
    arguments |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    for key, value in (
        ("attn_implementation", attention),
        ("quantization_config", quantization_config),
        ("device_map", device_map),
    ):
        if value is not None:
            arguments[key] = value
    try:
        if attention is not None:
            computed = _compute_dtype(name_or_path, parsed, quantization_config, mixed_precision, source)
            for name in attention.values() if isinstance(attention, dict) else [attention]:
                check_attention(name, computed, device_map)
        config = from_pretrained_kwargs.get("config") or AutoConfig.from_pretrained(name_or_path, **source)
        is_decoder = from_pretrained_kwargs.get("is_decoder")
        check_architecture(str(name_or_path), config, **({} if is_decoder is None else {"is_decoder": is_decoder}))
        loader = auto_class(config)
        with keeping_loaded_weights():
            model, info = loader.from_pretrained(name_or_path, **arguments)
    except OSError as error:
        raise ValueError(explain_load_error(name_or_path, error)) from error
    except SafetensorError as error:
        check_weight_files(Path(name_or_path))  # raises an error that names the file, if this is a folder
        raise CheckpointError(f"A weight file of {str(name_or_path)!r} is damaged: {error}. {WAY_OUT}") from error
    except (*UNFIT, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not UNFIT_SIZE.search(str(error)):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
        raise CheckpointError(
            f"No model can be made of the config.json of {str(name_or_path)!r}: {reason}. {WAY_OUT}"
        ) from error
    check_loading_info(name_or_path, info, sizes_may_differ=sizes_may_differ)
    if not sizes_may_differ:
        check_values(model, name_or_path)
    keep_weights(model)
    if _may_be_other(model, [type(model).__name__]):
        add_token_types(model)
    return model


def load_converted_weights(model: Any, folder: str | Path) -> None:
    """Load a checkpoint's weights into a model, through the conversion that `from_pretrained` does.

    Some families are saved under other names, or in other shapes, than their modules have: each expert as a layer where
    the model stacks them, the language model of a vision-language model without its prefix. `load_state_dict` finds
    none of these.

    The weights are read into a second model with eager attention: the attention of a training is set after a model was
    made, and some image towers can't be made with it.

    Args:
        model: Model of transformers, without wrappers.
        folder: Folder of the checkpoint.

    Raises:
        ValueError: The checkpoint lacks weights of the model.
    """
    with keeping_loaded_weights():
        loaded, info = type(model).from_pretrained(
            folder,
            config=model.config,
            dtype=model.dtype,
            attn_implementation="eager",
            output_loading_info=True,
            device_map={"": "cpu"},
        )
    lacking = sorted(set(info["missing_keys"]) - set(model.all_tied_weights_keys or ()))
    if lacking:
        raise ValueError(
            f"the checkpoint {folder} lacks {len(lacking)} weights of {type(model).__name__}, such as {lacking[0]}, so "
            "the training cannot go on from it; start it anew"
        )
    model.load_state_dict(loaded.state_dict())


@contextmanager
def configs_read_as(config_class: type) -> Iterator[None]:
    """Have `transformers.Trainer` read the config of a checkpoint, whose version it looks at, as one of this class.

    It reads it as a `PreTrainedConfig`, which refuses values that only the model's own class knows, such as the
    `mlp_layer_types` of DeepSeek-V4.

    Args:
        config_class: Class of the model's config; another class than one of transformers is not used.
    """
    usual = trainer.PreTrainedConfig
    if issubclass(config_class, usual):
        trainer.PreTrainedConfig = config_class
    try:
        yield
    finally:
        trainer.PreTrainedConfig = usual


def check_attention(attn_implementation: str, dtype: torch.dtype, device_map: Any | None = None) -> None:
    """Check that an attention exists and that this machine can run it in this dtype.

    Args:
        attn_implementation: Name of the attention.
        dtype: The precision that attention computes in.
        device_map: Placement of the model, see `training_device`.

    Raises:
        ValueError: It does not exist or can't run; the message says what is missing and what to use instead.
    """
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    is_kernel = re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w.-]+)?(:[\w.-]+)?", attn_implementation) is not None
    if attn_implementation not in known and not is_kernel:
        hint = did_you_mean(attn_implementation.lower(), known, after=" ")
        raise ValueError(
            f"attn_implementation={attn_implementation!r} does not exist: {hint}"
            f"Use auto, eager, sdpa, flash_attention_2, flash_attention_3, flex_attention or kernels-community/NAME."
        )
    check_attention_request(attn_implementation, dtype, current_hardware(training_device(device_map)))


def training_device(device_map: Any | None = None) -> torch.device:
    """Return the device that a model is trained on: the one its device map names, or else CUDA if there is a GPU."""
    placed = device_map.get("") if isinstance(device_map, dict) else device_map
    if isinstance(placed, int):
        return torch.device("cuda", placed)
    if isinstance(placed, torch.device):
        return placed
    if placed in ("cpu", "cuda", "xpu", "mps"):
        return torch.device(placed)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _one_dtype(dtype: str | torch.dtype | None, kwargs: dict[str, Any]) -> torch.dtype | str:
    """Return the dtype, given under either of its two names; remove the former name from `kwargs`."""
    old, dtype = kwargs.pop("torch_dtype", None), "float32" if dtype is None else dtype
    if old is None:
        return parse_dtype(dtype)
    parsed = parse_dtype(old)
    if dtype != "float32" and parse_dtype(dtype) != parsed:
        raise ValueError(f"dtype={dtype!r} and torch_dtype={old!r} are two names of one option: give dtype.")
    return parsed


def _one_quantization(given: Any | None, kwargs: dict[str, Any], dtype: torch.dtype | str) -> Any | None:
    """Return the quantization, given as a config or as `load_in_8bit` or `load_in_4bit`.

    Removes these two from `kwargs`: transformers 5 does not take them any more.
    """
    switches = {name: kwargs.pop(name, False) for name in ("load_in_8bit", "load_in_4bit")}
    if not any(switches.values()):
        return given
    if given is not None or all(switches.values()):
        named = [name for name, is_on in switches.items() if is_on] + ["quantization_config"] * (given is not None)
        raise ValueError(f"{' and '.join(named)} are given together: a base is quantized in one way.")
    if switches["load_in_4bit"] and isinstance(dtype, torch.dtype):
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
    return BitsAndBytesConfig(**switches)


def _check_weight_format(name_or_path: str | Path, kwargs: dict[str, Any]) -> None:
    """Check that weights are safetensors: reading pickled weights runs code, so they are refused."""
    if kwargs.pop("use_safetensors", True) is False:
        raise ValueError(
            f"use_safetensors=False asks for pickled weights of {str(name_or_path)!r}, and unpickling runs code. "
            f"Convert them: load once in a sandbox, then save_pretrained, which writes safetensors."
        )
    folder = Path(name_or_path)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    pickled = sorted(file.name for pattern in PICKLE_WEIGHTS for file in folder.glob(pattern))
    if pickled:
        raise ValueError(
            f"{folder} holds only pickled weights ({', '.join(pickled[:3])}), and unpickling runs code. "
            f"Convert them to safetensors: load once in a sandbox, then save_pretrained."
        )


def _compute_dtype(
    name_or_path: str | Path,
    dtype: torch.dtype | str,
    quantization_config: Any | None,
    mixed_precision: str | None,
    source: dict[str, Any],
) -> torch.dtype:
    """Return the dtype that attention computes in: autocast's, the compute dtype of 4-bit weights, or the model's."""
    if mixed_precision is not None:
        return MIXED_PRECISIONS[mixed_precision]
    if getattr(quantization_config, "load_in_4bit", False):
        return getattr(quantization_config, "bnb_4bit_compute_dtype", torch.float32)
    if isinstance(dtype, torch.dtype):
        return dtype
    return AutoConfig.from_pretrained(name_or_path, **source).dtype or torch.float32


def check_causal(model: Any) -> None:
    """Check that a model is a causal language model.

    1. Its class and its config must not be those of another task.
    2. If they leave it open (code that is not transformers' own, families that may attend in both directions), run the
       model on a few tokens: it must return logits over the vocabulary, in which no token sees the tokens after it.

    Args:
        model: Model, wrapped or not.

    Raises:
        ValueError: It is something else; the message says what.
    """
    base = causal_lm(model)
    name = type(base).__name__
    if not hasattr(base, "config"):
        inner = f"; give {name}.pretrained_model" if hasattr(base, "pretrained_model") else ""
        raise ValueError(f"{name} is not a model of transformers: it has no config, and {ADVICE}{inner}")
    class_names = [kind.__name__ for kind in type(base).__mro__]
    is_causal_class = any(found in auto_classes()["CAUSAL_LM"].values() for found in class_names)
    if not is_causal_class and _is_encoder_decoder(base.config):
        raise ValueError(f"{name} is an encoder with a decoder, and {ADVICE}")
    task = task_of(class_names)
    if task == HEADLESS:
        raise ValueError(f"{name} has no language model head, and {ADVICE}")
    if task is not None:
        raise ValueError(f"{name} is a model for {described(task)}, and {ADVICE}")
    if _may_be_other(base, class_names):
        try:
            probe_causality(base)
        except ValueError as error:
            raise ValueError(f"{error}, and {ADVICE}") from None


def _may_be_other(base: Any, class_names: list[str]) -> bool:
    """Return whether class and config leave open what a model is."""
    if not generates_text(class_names[:1]):
        return True
    config = base.config
    if getattr(config, "model_type", None) in {*auto_classes()[MASKED], *MAYBE_BIDIRECTIONAL}:
        return True
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return bool(getattr(text_config, "use_bidirectional_attention", False)) or (
        getattr(text_config, "is_causal", True) is False
    )


def _is_encoder_decoder(config: Any) -> bool:
    text_config = getattr(config, "text_config", None)
    return any(bool(getattr(part, "is_encoder_decoder", False)) for part in (config, text_config))


@contextmanager
def keeping_loaded_weights() -> Iterator[None]:
    """Have `from_pretrained` initialize only modules that lack a weight or a buffer in the checkpoint.

    transformers (5.23) initializes all modules and relies on `_init_weights` to skip loaded tensors. That of Youtu sets
    the row of the padding token to zero through `weight.data`, which is not skipped. The head shares that row.
    """
    initialize = PreTrainedModel._initialize_weights

    def initialize_incomplete(model: PreTrainedModel, module: nn.Module, is_custom_code: bool = False) -> None:
        tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if tensors and all(getattr(tensor, "_is_hf_initialized", False) for tensor in tensors):
            module._is_hf_initialized = True
        else:
            initialize(model, module, is_custom_code)

    PreTrainedModel._initialize_weights = initialize_incomplete
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = initialize


def keep_weights(model: nn.Module) -> None:
    """Have a model compute evaluations with the weights that it is trained with and saved from.

    Args:
        model: Model, wrapped or not. What evaluations have changed already is changed back as far as possible.
    """
    _keep_4bit_weights(model)
    _keep_rescaled_weights(model)


def _keep_rescaled_weights(model: nn.Module) -> None:
    """Turn off RWKV's division of weights by powers of two in evaluations, which keeps float16 from overflowing.

    It would be part of what is saved after an evaluation. It also changes what an adapter adds: the hidden states are
    divided as well, and the adapter's matrices are not.
    """
    for module in model.modules():
        if not hasattr(module, "layers_are_rescaled"):
            continue
        is_training = module.training
        module.training = True
        module._rescale_layers()  # multiplies the weights again if they are divided
        module.training = is_training
        module._rescale_layers = _leave_layers


def _leave_layers() -> None:
    """Leave the weights of all layers as they are."""


def _keep_4bit_weights(model: nn.Module) -> None:
    """Have 4-bit layers compute evaluations with the weights that they are trained with.

    On a CPU with bfloat16 products, bitsandbytes (0.50) packs the weights of a layer when it is first evaluated,
    whatever the compute dtype is, and goes on with them in training: their scales are rounded to bfloat16 for good, and
    products with them pass no gradient on to the layers before.

    Layers that are packed already are unpacked. Their rounded scales can't be restored, which is said.
    """
    num_packed = 0
    for module in model.modules():
        if not hasattr(module, "support_avx512bf16_for_cpu"):
            continue
        module.support_avx512bf16_for_cpu = False
        state: Any = getattr(module.weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            num_packed += 1
            module.state_dict()  # bitsandbytes unpacks the weights of a layer that is saved
            if not state.nested:  # but leaves their scales as it packed them: (blocks per row, rows) in bfloat16
                state.absmax = state.absmax.T.reshape(-1).float().contiguous()
    if num_packed:
        logger.warning(
            "%d 4-bit layers were evaluated on this CPU before training, for which bitsandbytes rounded the scales of "
            "their weights to bfloat16: they differ from the checkpoint's by up to 0.4 %%. To train with the exact "
            "ones, load the model anew, with sft.load_model if it is to be evaluated first",
            num_packed,
        )
