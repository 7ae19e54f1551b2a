"""Whether what a training makes can be saved, found out before it begins, and the same files for equal trainings.

* `check_saving`: configs, tokenizer and arguments are written to a temporary folder, and the tokenizer is read again;
  weights that share memory are declared as tied.
* `check_disk`: the disk has space for the checkpoints that will be kept at a time.
* `sort_adapter_lists`: lists in an adapter's configuration that come from sets.
"""

from __future__ import annotations

import json
import logging
import math
import pickle
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from datasets.fingerprint import Hasher
from torch import nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainingArguments,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from sft.inner_model import causal_lm
from sft.models.saved_adapters import ADAPTER_CONFIG

logger = logging.getLogger(__name__)

PROBE_TEXTS = ("Hello, world! It's 12345 o'clock.", " a  b\n\nc\t\n", "Ça, 中文 😀 ﬁ e\u0301", "x=[1]; # <b>\r\n")
"""Texts that a tokenizer should turn into the same tokens after it was saved and loaded."""

MAX_PROBED_TOKENS = 200
"""Added tokens that are tried out at most."""

STATES_OF_OPTIMIZERS = {"adamw": 2, "adafactor": 0, "sgd": 0, "rmsprop": 1, "adagrad": 1, "lion": 1}
"""Beginning of an optimizer's name -> tensors of a parameter's size that it saves for each trained parameter."""

_REFUSED_FLAG = re.compile(r"^- `(\w+)`:", re.MULTILINE)
"""Flags that transformers refuses in a generation config, in its message."""

_KEPT: set[str] = set()
"""Digests of tokenizers that were found to stay the same when they are saved."""


def check_saving(model: nn.Module, processing_class: Any, args: TrainingArguments) -> None:
    """Check that the parts of a checkpoint can be saved; mend the model's generation config.

    Args:
        model: Model with its adapter, if it has one.
        processing_class: Tokenizer or processor.
        args: Options of the training, which checkpoints contain.

    Raises:
        ValueError: A part can't be saved, or the saved tokenizer gives other tokens; the message names it and a way
            out.
    """
    base = causal_lm(model)
    configs = dict(getattr(model, "peft_config", {}))
    with tempfile.TemporaryDirectory(prefix="sft-saving-") as folder:
        if not configs and hasattr(base.config, "save_pretrained"):
            _try("the model's config", lambda: base.config.save_pretrained(folder), "change or delete the value")
            mend_generation_config(model, getattr(processing_class, "tokenizer", processing_class))
            check_shared_weights(base)
        for name, config in configs.items():
            _try(f"the config of adapter {name!r}", lambda: config.save_pretrained(folder), "change the value")  # noqa: B023
        check_tokenizer(processing_class, Path(folder) / "tokenizer")
    where = "define its class or function at the top level of a module, or leave it out"
    _try(f"args ({type(args).__name__})", lambda: pickle.dumps(args), where)


def check_shared_weights(model: nn.Module) -> None:
    """Check that transformers can save all weights that share memory.

    Args:
        model: The model as it is saved. One that is not transformers' own is not checked.

    Raises:
        ValueError: Weights share memory, and the model does not declare them as tied.
    """
    if isinstance(model, PreTrainedModel):
        way_out = (
            "give each its own memory (module.weight = torch.nn.Parameter(module.weight.clone())), or declare them in "
            "the model's _tied_weights_keys"
        )
        ignored = model._keys_to_ignore_on_save or ()
        weights = {name: weight for name, weight in model.state_dict().items() if name not in ignored}
        _try("the model's weights", lambda: remove_tied_weights_from_state_dict(weights, model), way_out)


def _try(what: str, save: Any, way_out: str) -> None:
    try:
        save()
    except OSError as error:
        logger.warning("it could not be tried whether %s can be saved: %s", what, error)
    except Exception as error:  # whatever a part raises now, it would raise after the training
        reason = " ".join(str(error).split())[:500]
        raise ValueError(
            f"{what} can't be saved with the model ({type(error).__name__}: {reason}); {way_out}"
        ) from error


def mend_generation_config(model: nn.Module, tokenizer: Any) -> None:
    """Reset flags of a model's generation config that have no effect and that transformers refuses to save.

    A config that is saved as it was loaded is not refused; the trainer changes it if the tokenizer has other special
    tokens. An adapter is saved without one.

    Args:
        model: Model, whose generation config is changed in place.
        tokenizer: Tokenizer of the training.

    Raises:
        ValueError: The config can't be saved after that, either.
    """
    base = causal_lm(model)
    config = getattr(base, "generation_config", None)
    if hasattr(model, "peft_config") or config is None or not base.can_generate():
        return
    problem = _refusal(config, tokenizer)
    if problem is None:
        return
    default = GenerationConfig()
    before = {flag: getattr(config, flag) for flag in _REFUSED_FLAG.findall(problem) if hasattr(config, flag)}
    for flag in before:
        setattr(config, flag, getattr(default, flag))
    problem = _refusal(config, tokenizer)
    if problem is not None:
        raise ValueError(
            f"the model's generation_config can't be saved with the model ({' '.join(problem.split())[:500]}); set "
            "model.generation_config right before training, or to GenerationConfig() if it does not matter"
        )
    logger.warning(
        "transformers does not save a generation_config with %s, which have no effect there (do_sample=%s, "
        "num_beams=%s): they were reset. To keep them, set what makes them effective before training, such as "
        "model.generation_config.do_sample = True",
        ", ".join(f"{flag}={value!r}" for flag, value in before.items()),
        config.do_sample,
        config.num_beams,
    )


def _refusal(config: GenerationConfig, tokenizer: Any) -> str | None:
    """Return why transformers will refuse to save a generation config; None if it will not."""
    try:
        if any(_changes(config, tokenizer, name) for name in ("eos_token_id", "bos_token_id", "pad_token_id")):
            config.validate(strict=True)
        with tempfile.TemporaryDirectory(prefix="sft-saving-") as folder:
            config.save_pretrained(folder)
    except OSError as error:
        logger.warning("it could not be tried whether the generation config can be saved: %s", error)
    except (ValueError, TypeError) as error:
        return str(error)
    return None


def _changes(config: GenerationConfig, tokenizer: Any, name: str) -> bool:
    """Return whether the trainer will set a token id of the config to the tokenizer's."""
    wanted, current = getattr(tokenizer, name, None), getattr(config, name, None)
    return wanted is not None and wanted not in (current if isinstance(current, list) else [current])


def check_tokenizer(processing_class: Any, folder: Path) -> None:
    """Check that a tokenizer gives the same tokens and has the same template after it was saved and loaded.

    Args:
        processing_class: Tokenizer or processor. Of a processor, the tokenizer is loaded again.
        folder: Folder to save to.

    Raises:
        ValueError: It can't be saved or loaded, or differs.
    """
    tokenizer = processing_class.tokenizer if isinstance(processing_class, ProcessorMixin) else processing_class
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        return
    name = type(processing_class).__name__
    digest = _digest(processing_class, tokenizer)
    if digest in _KEPT:
        return
    reload = (
        "train with what is loaded from the saved files: processing_class.save_pretrained(FOLDER), then "
        "AutoTokenizer.from_pretrained(FOLDER)"
    )
    _try(f"processing_class ({name})", lambda: processing_class.save_pretrained(folder), "give a tokenizer that can be")
    if not folder.is_dir():
        return
    try:
        is_known = type(tokenizer).__module__.startswith("transformers.")
        loaded = (AutoTokenizer if is_known else type(tokenizer)).from_pretrained(folder)
    except Exception as error:  # loading a tokenizer may fail in any way
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"processing_class ({name}) can't be loaded again after it was saved ({type(error).__name__}: {reason}), "
            f"so the trained model could not be used; give a tokenizer that can be, or {reload}"
        ) from error
    difference = _difference(tokenizer, loaded, is_processor=isinstance(processing_class, ProcessorMixin))
    if difference is not None:
        raise ValueError(
            f"processing_class ({name}) changes when it is saved: {difference}. The trained model would be given other "
            f"tokens than it was trained on; {reload}"
        )
    _KEPT.add(digest)


def _digest(processing_class: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else repr(tokenizer)
    names = [type(processing_class).__name__, type(tokenizer).__name__, id(type(tokenizer))]
    return Hasher.hash([*names, rules, tokenizer.chat_template, tokenizer.special_tokens_map, tokenizer.init_kwargs])


def _difference(before: Any, after: Any, *, is_processor: bool) -> str | None:
    """Return how a loaded tokenizer differs from the one that was saved; None if it does not."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        if getattr(before, name) != getattr(after, name):
            return f"{name} is {getattr(before, name)} before and {getattr(after, name)} after"
    if not is_processor and before.chat_template != after.chat_template:
        return "it loses its chat template" if not after.chat_template else "its chat template is another one"
    added = [str(token) for token in before.added_tokens_decoder.values()][:MAX_PROBED_TOKENS]
    for text in (*PROBE_TEXTS, *(f"a{token}b {token} c" for token in added)):
        ids, again = before(text)["input_ids"], after(text)["input_ids"]
        if list(ids) != list(again):
            return f"{text!r} is {list(ids)[:12]} before and {list(again)[:12]} after"
    return None


def check_disk(
    model: nn.Module, args: TrainingArguments, num_steps: int, *, resumes: bool = False, copies: int = 0
) -> None:
    """Check that the disk has space for the checkpoints that a training keeps at a time.

    Sizes are counted from below: weights that are saved, and what the optimizer keeps for each trained parameter.

    Args:
        model: Model with its adapter, if it has one.
        args: How often checkpoints are saved, how many are kept, and where.
        num_steps: Optimizer steps of the training.
        resumes: Whether it continues from a checkpoint, so that fewer are still to be written.
        copies: Copies of the weights that callbacks keep beside the checkpoints.

    Raises:
        ValueError: The space is not enough. The message names the sizes and ways out.
    """
    folder = Path(args.output_dir or ".").absolute()
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    weights, states = weight_bytes(model), optimizer_bytes(model, args)
    size = weights + states
    num_saves = number_of_saves(args, num_steps)
    if num_saves == 0:
        if weights > free:
            logger.warning(
                "the trained weights take %s, and the disk of output_dir %s has %s left: free some space before they "
                "are saved",
                _gb(weights),
                folder,
                _gb(free),
            )
        return
    there = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    limit = args.save_total_limit if args.save_total_limit and args.save_total_limit > 0 else None
    if limit is not None:
        # the oldest one is deleted after the new one is complete
        kept = min(num_saves, limit + 1)
        free += sum(file.stat().st_size for path in there for file in path.rglob("*") if file.is_file())
    else:
        kept = max(1, num_saves - len(there)) if resumes else num_saves
    needed = kept * size + copies * weights
    if needed <= free:
        return
    possible = (free - copies * weights) // size - 1 if size else 0
    ways = [f"save_total_limit={possible}"] if possible >= 1 and (limit is None or possible < limit) else []
    ways += (
        ["save_only_model=True"] if states and not args.save_only_model and (kept + copies) * weights <= free else []
    )
    beside = f" and {copies} more of the weights" if copies else ""
    raise ValueError(
        f"this training keeps {kept} checkpoint{'s' if kept > 1 else ''} of {_gb(size)} at a time (weights "
        f"{_gb(weights)}, optimizer {_gb(states)}){beside}, {_gb(needed)} together, and the disk of output_dir "
        f"{folder} has {_gb(free)} left. Free some space, give another "
        f"output_dir{''.join(f', or set {way}' for way in ways)}"
    )


def number_of_saves(args: TrainingArguments, num_steps: int) -> int:
    """Return how many checkpoints a training writes, counted from below."""
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "no":
        return 0
    if strategy == "epoch":
        return max(1, math.ceil(args.num_train_epochs)) if args.max_steps <= 0 else 1
    if strategy == "steps":
        every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * num_steps))
        return max(1, math.ceil(num_steps / every))
    return 1


def weight_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights that a checkpoint has: those of an adapter, or else of the whole model."""
    is_adapter = hasattr(model, "peft_config")
    saved = [parameter for parameter in model.parameters() if parameter.requires_grad or not is_adapter]
    return sum(parameter.numel() * parameter.element_size() for parameter in saved)


def optimizer_bytes(model: nn.Module, args: TrainingArguments) -> int:
    """Return the bytes that a checkpoint has of the optimizer; 0 for one that is not known."""
    if args.save_only_model:
        return 0
    name = str(getattr(args.optim, "value", args.optim)).removeprefix("paged_")
    num_states = next((count for begin, count in STATES_OF_OPTIMIZERS.items() if name.startswith(begin)), 0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = (parameter.numel() * (1 if "8bit" in name else parameter.element_size()) for parameter in trained)
    return num_states * sum(sizes)


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def sort_adapter_lists(model: nn.Module, folder: Path) -> None:
    """Sort the lists in saved configurations of adapters that peft writes from sets, such as `target_modules`.

    The order of a set of strings differs from process to process, so that equal trainings would write other files.

    Args:
        model: The trained model; without adapters nothing is done.
        folder: Folder that it was saved to.
    """
    for name, config in getattr(model, "peft_config", {}).items():
        file = (folder if name == "default" else folder / name) / ADAPTER_CONFIG
        if not file.is_file():
            continue
        values = json.loads(file.read_text(encoding="utf-8"))
        for option, value in config.to_dict().items():
            if isinstance(value, set | frozenset):
                values[option] = sorted(values[option], key=str)
        file.write_text(json.dumps(values, indent=2, sort_keys=True), encoding="utf-8")
