"""Checkpoint folders: their weight files and class, checks that they are complete, loading and saving of tokenizers.

Imports no torch at module level: only functions that build a model or a tokenizer import transformers.
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.untrusted.tokenizer_files import PANIC, TokenizerFileError, check_tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"

LFS_POINTER = b"version https://git-lfs"
"""First bytes of a file that Git LFS has not downloaded yet."""

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
"""Patterns of files of which a folder with a tokenizer has at least one."""

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
"""Files of a processor besides those of its tokenizer, whose folder it shares."""

PROBE = "Hello"
"""Text of which every usable tokenizer makes at least one token."""

OF_THE_PROCESS = ("local_files_only",)
"""Settings of the process that transformers would write into a tokenizer's files, so that their bytes would differ."""

GENERATES = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
"""Tasks of transformers' auto classes whose models generate text; encoders with decoders are known by their config."""

HEADLESS, MASKED = "HEADLESS", "MASKED_LM"

TASK_NAMES = {MASKED: "masked language modelling", "CTC": "speech recognition"}
"""Tasks whose names in transformers are not words."""

ADVICE = (
    "supervised fine-tuning needs a causal language model, which predicts each token from those before it: load one "
    "with AutoModelForCausalLM"
)

WAY_OUT = "Download or copy the checkpoint again, or write it anew with save_pretrained."


class CheckpointError(ValueError):
    """A checkpoint that can't be used. The message names the folder, the file or weight, and a way out."""


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint folder that `from_pretrained` reads.

    If there is an index and no single file, these are the files that the index names; they may be missing.

    Raises:
        CheckpointError: The index can't be read.
    """
    index = folder / INDEX
    if (folder / SINGLE_FILE).is_file() or not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        outside = next((name for name in sorted(names) if Path(name).name != name), None)
        if outside is not None:
            raise CheckpointError(f"{index} names {outside!r:.80}, which is not a file in its folder. {WAY_OUT}")
        return sorted(folder / name for name in names)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{index} can't be read ({type(error).__name__}: {error}). {WAY_OUT}") from error


def check_weight_files(folder: Path) -> None:
    """Check that every weight file is complete, by its header, which states how long the file must be.

    Raises:
        CheckpointError: A file is missing, cut off, or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    for file in weight_files(folder):
        try:
            with safe_open(file, framework="np"):
                pass
        except FileNotFoundError as error:
            raise CheckpointError(f"{file} does not exist, and {INDEX} names it. {WAY_OUT}") from error
        except (SafetensorError, OSError) as error:
            with file.open("rb") as stream:
                is_pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
            if is_pointer:
                raise CheckpointError(f"{file} is a pointer of Git LFS, not weights. Type: git lfs pull") from error
            raise CheckpointError(
                f"{file} ({file.stat().st_size} bytes) is damaged or cut off: {error}. {WAY_OUT}"
            ) from error


def check_loading_info(place: str | Path, info: Mapping[str, Iterable[Any]], *, sizes_may_differ: bool = False) -> None:
    """Check that a loaded model has got all of its weights from the checkpoint, so that none is random.

    Args:
        place: Folder or hub id, for the message.
        info: What `from_pretrained(..., output_loading_info=True)` returns. Tied weights and buffers that are not
            saved are not among its missing keys.
        sizes_may_differ: Accept weights of another size, which are then random, as `ignore_mismatched_sizes` does.

    Raises:
        CheckpointError: Weights are missing, or have another size than config.json states.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        named = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise CheckpointError(
            f"The checkpoint {str(place)!r} lacks {len(missing)} weights that its config.json asks for and that would "
            f"be random: {named}. {WAY_OUT} If the weights are right, correct config.json (number of layers, "
            f"architectures)."
        )
    other = [] if sizes_may_differ else sorted(info["mismatched_keys"], key=str)
    if other:
        name, found, needed = other[0]
        raise CheckpointError(
            f"{len(other)} weights of the checkpoint {str(place)!r} have another size than its config.json asks for: "
            f"{name} is {tuple(found)} and should be {tuple(needed)}. {WAY_OUT} If the weights are right, correct "
            f"config.json (sizes of layers and vocabulary)."
        )


def check_checkpoint(folder: Path) -> None:
    """Compare the weight files of a folder with its config.json, without reading the weights.

    A model whose class can't be built on the meta device is not checked here; errors show when it is loaded.

    Raises:
        CheckpointError: A file is damaged, or a weight is missing or has another size.
    """
    from transformers import AutoConfig, logging  # slow, and not needed for models that are known to be complete

    check_weight_files(folder)
    verbosity, has_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        check_number_of_layers(folder, config)
        loader = auto_class(config)
        options = {
            "trust_remote_code": False,
            "device_map": "meta",
            "use_safetensors": True,
            "ignore_mismatched_sizes": True,
        }
        info = loader.from_pretrained(folder, output_loading_info=True, **options)[1]
    except CheckpointError:
        raise
    except Exception:
        return
    finally:
        logging.set_verbosity(verbosity)
        if has_bar:
            logging.enable_progress_bar()
    check_loading_info(folder, info)


def check_number_of_layers(folder: Path, config: Any) -> None:
    """Check that the config does not ask for more layers than there are weights: building them could take forever.

    Raises:
        CheckpointError: It does; the message has both numbers.
    """
    from safetensors import safe_open

    asked = getattr(config.get_text_config(), "num_hidden_layers", None)
    found = 0
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            found += len(weights.keys())
    if isinstance(asked, int) and asked > found:
        raise CheckpointError(
            f"The config.json of '{folder}' asks for {asked} layers, and there are {found} weights in total. {WAY_OUT}"
        )


def auto_class(config: Any) -> Any:
    """Return the auto class for a config: the one for images and text if the checkpoint was saved with an image tower.

    A few language models, as those of Mllama and Emu3, are saved with a config that transformers' auto classes do not
    know, since it is that of a part of a larger model. Their class is registered for it.

    Args:
        config: Model config; `architectures` names the class that the checkpoint was saved from.

    Returns:
        `AutoModelForImageTextToText` or `AutoModelForCausalLM`.
    """
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    saved_as = (getattr(config, "architectures", None) or [None])[0]
    text_alone = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    with_images = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    has_text_class = text_alone is not None or "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    # one class may belong to several types: it reads images in one of them, and text alone in another
    if with_images is not None and saved_as != text_alone and (saved_as == with_images or not has_text_class):
        return transformers.AutoModelForImageTextToText
    if text_alone is None and saved_as in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        model_class = getattr(transformers, saved_as)
        if model_class.config_class is type(config):
            transformers.AutoModelForCausalLM.register(type(config), model_class, exist_ok=True)
    return transformers.AutoModelForCausalLM


def empty_model(folder: str | Path) -> PreTrainedModel:
    """Build the model of a folder from its configuration alone, in eval mode, with its weights on the meta device.

    Buffers are real, and tied weights are one parameter.
    """
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with init_empty_weights(include_buffers=False):
        model: PreTrainedModel = auto_class(config).from_config(config, dtype=torch.float32)
    model.tie_weights()  # `init_empty_weights` replaces parameters one by one, which unties them
    return model.eval()


def load_tokenizer(
    name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedTokenizerBase:
    """Load a fast tokenizer. Only these report character offsets, by which trained tokens are found.

    Args:
        name_or_path: Hub id or folder.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run Python code that comes with the tokenizer.
        kwargs: Further arguments of `AutoTokenizer.from_pretrained`.

    Raises:
        ValueError: There is no tokenizer, its files are damaged or missing, or it has no fast version.
    """
    from transformers import AutoTokenizer

    _try_tokenizer(name_or_path, revision, trust_remote_code=trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, revision=revision or "main", trust_remote_code=trust_remote_code, **kwargs
        )
        tokenizer(PROBE)  # some values of other types than expected show only now
    except BaseException as error:  # damaged files raise errors of any class, even `Exception` itself
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise CheckpointError(_explain_tokenizer_error(name_or_path, error)) from error
    check_tokenizer(tokenizer, name_or_path)
    return tokenizer


def _try_tokenizer(name_or_path: str | Path, revision: str | None, *, trust_remote_code: bool) -> None:
    """Try a tokenizer in a child process, before this one opens it.

    Raises:
        CheckpointError: It takes too long or too much memory, or ends the process.
    """
    from transformers.utils import cached_file

    place = Path(name_or_path) / "tokenizer.json"
    if Path(name_or_path).is_dir() and not place.is_file():
        if trust_remote_code or not any(True for pattern in TOKENIZER_FILES for _ in place.parent.glob(pattern)):
            return
        place = place.parent
    elif not place.is_file():
        try:
            found = cached_file(str(name_or_path), "tokenizer.json", revision=revision or "main")
        except (OSError, ValueError):  # the error is reported when the tokenizer is loaded
            return
        if found is None:
            return
        place = Path(found)
    try:
        check_tokenizer_files(place)
    except TokenizerFileError as error:
        raise CheckpointError(
            f"The tokenizer of {str(name_or_path)!r} can't be used: {error}. {_tokenizer_way_out(name_or_path)}"
        ) from None


def load_processor(name_or_path: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Load the processor of a model with an image tower, or the tokenizer of any other model.

    If the processor can't be created here (many need torchvision), a warning says why, and the tokenizer is returned:
    text can be trained without a processor.

    Args:
        name_or_path: Hub id or folder.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ValueError: There is no tokenizer, or none that can be used for training.
    """
    from transformers import AutoConfig, AutoProcessor, ProcessorMixin

    arguments: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name_or_path, **arguments)
        sees = reads_images(config)
    except (OSError, ValueError):  # a folder with a tokenizer alone
        sees = False
    if not sees:
        return load_tokenizer(name_or_path, **arguments)
    try:
        processor = AutoProcessor.from_pretrained(name_or_path, **arguments)
    except Exception as error:  # AttributeError if the tokenizer lacks the tokens of images, ImportError, ...
        logger.warning("the image processor of %s can't be loaded, only text can be trained: %s", name_or_path, error)
        return load_tokenizer(name_or_path, **arguments)
    if not isinstance(processor, ProcessorMixin):
        return load_tokenizer(name_or_path, **arguments)
    check_tokenizer(processor.tokenizer, name_or_path)
    return processor


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name_or_path: str | Path) -> None:
    """Check that a loaded tokenizer can be used for training.

    Raises:
        CheckpointError: It reports no character offsets, or its vocabulary is empty.
    """
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"The tokenizer of {str(name_or_path)!r} ({type(tokenizer).__name__}) has no fast version, and only "
            f"fast ones report which characters a token stands for. Convert it, or use a model with a tokenizer.json."
        )
    if not tokenizer(PROBE, add_special_tokens=False)["input_ids"]:
        # for some families, transformers makes an empty tokenizer if the files are missing
        raise CheckpointError(
            f"The tokenizer of {str(name_or_path)!r} makes no token of {PROBE!r}: its vocabulary is empty. "
            f"{_tokenizer_way_out(name_or_path)}"
        )


def explain_load_error(name_or_path: str | Path, error: Exception, what: str = "model") -> str:
    """Return the message for a model or tokenizer that can't be loaded: where it should be, why not, what to do."""
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 300 else reason[:300] + " ..."
    if Path(name_or_path).exists():
        return f"The folder {str(name_or_path)!r} can't be loaded as a {what}: {reason}"
    return (
        f"{what} {str(name_or_path)!r} was found neither as a folder nor on the hub: {reason} "
        f"Check the spelling and revision, log in with `hf auth login` if it is private, or give a local folder."
    )


def _explain_tokenizer_error(name_or_path: str | Path, error: BaseException) -> str:
    folder = Path(name_or_path)
    if not folder.is_dir() and isinstance(error, OSError):
        return explain_load_error(name_or_path, error, what="tokenizer")
    way_out = _tokenizer_way_out(name_or_path)
    for file in sorted(folder.glob("*token*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as damage:
            return f"{file} is not valid JSON ({damage}), so the tokenizer can't be loaded. {way_out}"
    if folder.is_dir() and not any(True for pattern in TOKENIZER_FILES for _ in folder.glob(pattern)):
        return f"The folder {str(folder)!r} holds no tokenizer (tokenizer.json). {way_out}"
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return f"The tokenizer of {str(name_or_path)!r} can't be loaded ({reason}). {way_out}"


def _tokenizer_way_out(name_or_path: str | Path) -> str:
    return (
        "Copy the model's tokenizer.json and tokenizer_config.json there again, or write them again with "
        f"AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained({str(name_or_path)!r})."
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save a tokenizer or a processor, as the same bytes whatever the environment (such as HF_HUB_OFFLINE) is.

    Args:
        tokenizer: Tokenizer or processor.
        folder: Created if it does not exist.
    """
    for part in (tokenizer, getattr(tokenizer, "tokenizer", None)):
        for name in OF_THE_PROCESS:
            getattr(part, "init_kwargs", {}).pop(name, None)
    tokenizer.save_pretrained(folder)


def copy_processor_files(source: str | Path, folder: Path) -> None:
    """Copy the files of a processor besides its tokenizer as they are; files that are there already are kept.

    A processor need not be loadable here for this: many need torchvision.

    Args:
        source: Folder of a model or a tokenizer, or a hub id.
        folder: Folder with the tokenizer.
    """
    for name in PROCESSOR_FILES:
        found = _file_of(source, name)
        if found is not None and not (folder / name).exists():
            shutil.copyfile(found, folder / name)


def _file_of(source: str | Path, name: str) -> Path | None:
    """Return the path of a file in a folder, or of a hub id in the cache; None if there is none."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(str(source), name)
    return Path(found) if isinstance(found, str) else None


def is_image_model(folder: str | Path, *, trust_remote_code: bool = False) -> bool:
    """Return whether a checkpoint is of a model that reads images besides text; the config alone is read."""
    from transformers import AutoConfig

    return reads_images(AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code))


def reads_images(config: Any) -> bool:
    """Return whether a checkpoint with this config was saved with an image tower.

    Some classes, as that of Gemma 3, are among the causal language models, too.
    """
    saved_as = (getattr(config, "architectures", None) or [None])[0]
    return saved_as in auto_classes()["IMAGE_TEXT_TO_TEXT"].values()


def processor_template(folder: Path) -> str | None:
    """Return the chat template that a processor in a folder uses by default, if it has a file of its own.

    `chat_template.jinja` is that of the tokenizer, too.
    """
    file = folder / "chat_template.json"
    if not file.is_file() or (folder / "chat_template.jinja").is_file():
        return None
    template = json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    return template if isinstance(template, str) else None


def load_image_processor(folder: Path, tokenizer: PreTrainedTokenizerBase | None = None) -> Any:
    """Load the processor of a vision-language model, without running code that comes with it.

    Args:
        folder: Folder of the model.
        tokenizer: Tokenizer that replaces the processor's own, and whose chat template it gets.

    Raises:
        CheckpointError: The model reads text alone, or its processor can't be created here.
    """
    from transformers import AutoConfig, AutoProcessor

    config = AutoConfig.from_pretrained(folder)
    if not reads_images(config):
        raise CheckpointError(f"the base model ({config.model_type}) reads text alone")
    try:
        processor = AutoProcessor.from_pretrained(folder)
    except Exception as error:  # AttributeError if the tokenizer lacks the tokens of images, ImportError, ...
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"the image processor of the base model ({config.model_type}) can't be created here ({reason}); many need "
            "the extra `vision`, which installs torchvision"
        ) from error
    if not hasattr(processor, "tokenizer") or not hasattr(processor, "image_processor"):
        raise CheckpointError(
            f"the base model ({config.model_type}) has no processor of images, but a {type(processor).__name__}"
        )
    if tokenizer is not None:
        processor.tokenizer, processor.chat_template = tokenizer, tokenizer.chat_template
    return processor


def check_architecture(place: str, config: Any, **overrides: Any) -> None:
    """Check by a config, before weights are read, that a causal language model can be loaded.

    Args:
        place: Folder or hub id, for the message.
        config: Config object, or the content of config.json.
        overrides: Values that replace those of the config.

    Raises:
        ValueError: The config names a class with another head, an encoder with a decoder, or a type that has no causal
            language model.
    """
    read = _reader(config, overrides)
    architectures, model_type = list(read("architectures") or ()), read("model_type")
    if any(name in auto_classes()["CAUSAL_LM"].values() for name in architectures):
        return
    named = f"{place} holds {architectures[0]}" if architectures else f"{place} holds a model of type {model_type!r}"
    if read("is_encoder_decoder"):
        raise ValueError(f"{named}, an encoder with a decoder, and {ADVICE}")
    task = task_of(architectures)
    if task not in (None, HEADLESS) and not (task == MASKED and read("is_decoder")):
        raise ValueError(f"{named}, a model for {described(str(task))}, and {ADVICE}")
    trainable = {*auto_classes()["CAUSAL_LM"], *auto_classes()["IMAGE_TEXT_TO_TEXT"]}
    is_own_code = "AutoModelForCausalLM" in (read("auto_map") or {})
    if model_type in auto_classes()[HEADLESS] and model_type not in trainable and not is_own_code:
        raise ValueError(f"{named}, of which transformers has no causal language model, and {ADVICE}")


def generates_text(class_names: Iterable[str]) -> bool:
    """Return whether one of the classes generates text, be it with images, speech or an encoder besides."""
    known = {name for task in GENERATES for name in auto_classes()[task].values()}
    return not known.isdisjoint(class_names)


def task_of(class_names: Iterable[str]) -> str | None:
    """Return the task of the first known class of a list: `HEADLESS` without a head, None if it generates text."""
    for name in class_names:
        if generates_text([name]):
            return None
        found = next((task for task, names in auto_classes().items() if name in names.values()), None)
        if found is not None:
            return found
    return None


def described(task: str) -> str:
    """Return a task's name in words, for messages."""
    return TASK_NAMES.get(task, task.lower().replace("_", " "))


@functools.cache
def auto_classes() -> dict[str, dict[str, str]]:
    """Return the classes that transformers' auto classes load: task -> type -> name."""
    from transformers.models.auto import modeling_auto

    begin, end = "MODEL_FOR_", "_MAPPING_NAMES"
    tasks = {
        name.removeprefix(begin).removesuffix(end): names
        for name, names in vars(modeling_auto).items()
        if name.startswith(begin) and name.endswith(end)
    }
    tasks.pop("PRETRAINING", None)  # has models of all tasks
    return {task: _one_by_one(names) for task, names in {**tasks, HEADLESS: modeling_auto.MODEL_MAPPING_NAMES}.items()}


def _one_by_one(names: Mapping[str, Any]) -> dict[str, str]:
    """Return one entry per class; some types have several."""
    classes = ((kind, [found] if isinstance(found, str) else found) for kind, found in names.items())
    return {f"{kind}:{place}" if place else kind: name for kind, found in classes for place, name in enumerate(found)}


def _reader(config: Any, overrides: Mapping[str, Any]) -> Any:
    def read(name: str) -> Any:
        if name in overrides:
            return overrides[name]
        if isinstance(config, Mapping):
            return config.get(name)
        return getattr(config, name, None)

    return read
