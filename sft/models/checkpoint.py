"""Whether a checkpoint is whole: files that can be read, a weight for every layer of its config, a tokenizer.

The files of a tokenizer, the same wherever they are written.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

INDEX, SINGLE_FILE = "model.safetensors.index.json", "model.safetensors"

LFS_POINTER = b"version https://git-lfs"

TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")

PROBE = "Hello"

WAY_OUT = "Download or copy the checkpoint again, or write it anew with save_pretrained."


class CheckpointError(ValueError):
    """A checkpoint that training can't start from; the message names the folder, the file or weight, the way out."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that `from_pretrained` reads in a folder.

    Raises:
        CheckpointError: The index of several files can't be read.
    """
    index = folder / INDEX
    if (folder / SINGLE_FILE).is_file() or not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        return sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} can't be read ({type(error).__name__}: {error}). {WAY_OUT}") from error


def check_weight_files(folder: Path) -> None:
    """Read the header of every weight file, which also states how long the file must be.

    Raises:
        CheckpointError: A file that is cut off, or no safetensors at all.
    """
    from safetensors import SafetensorError, safe_open

    for file in weight_files(folder):
        try:
            with safe_open(file, framework="np"):
                pass
        except FileNotFoundError as error:
            raise CheckpointError(f"{file} is not there, and {INDEX} names it. {WAY_OUT}") from error
        except (SafetensorError, OSError) as error:
            with file.open("rb") as stream:
                is_pointer = stream.read(len(LFS_POINTER)) == LFS_POINTER
            if is_pointer:
                raise CheckpointError(f"{file} is a pointer of Git LFS, no weights. Type: git lfs pull") from error
            raise CheckpointError(
                f"{file} ({file.stat().st_size} bytes) is damaged or cut off: {error}. {WAY_OUT}"
            ) from error


def check_loading_info(place: str | Path, info: Mapping[str, Iterable[Any]], *, sizes_may_differ: bool = False) -> None:
    """Refuse a model of which some weights would be random.

    Args:
        place: Folder or hub id, for the message.
        info: What `from_pretrained(..., output_loading_info=True)` returns: tied weights and buffers that no checkpoint
            holds are not among its missing ones.
        sizes_may_differ: Leave weights of another size random, as `ignore_mismatched_sizes` asks for.

    Raises:
        CheckpointError: Weights are missing, or have another size than the config asks for.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        named = ", ".join(missing[:3]) + (" ..." if len(missing) > 3 else "")
        raise CheckpointError(
            f"The checkpoint {str(place)!r} lacks {len(missing)} weights that its config.json asks for, which would "
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
    """Compare the weight files of a folder with its config, without reading the weights.

    A model that can't be built without memory is not checked: whether it can be loaded shows where it is loaded.

    Raises:
        CheckpointError: A file is damaged, or a weight is missing or has another size.
    """
    from transformers import AutoConfig, logging  # slow, and a model that is installed does not need it

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
    """Refuse a config that asks for more layers than there are weights: building them all could take for ever.

    Raises:
        CheckpointError: Names both numbers.
    """
    from safetensors import safe_open

    asked = getattr(config.get_text_config(), "num_hidden_layers", None)
    found = 0
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as weights:
            found += len(weights.keys())
    if isinstance(asked, int) and asked > found:
        raise CheckpointError(
            f"The config.json of '{folder}' asks for {asked} layers, and there are {found} weights in all. {WAY_OUT}"
        )


def auto_class(config: Any) -> Any:
    """The factory that builds the class which the checkpoint was saved from: with its image tower, or text alone."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    saved_as = (getattr(config, "architectures", None) or [None])[0]
    with_images = saved_as in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()
    text_alone = saved_as in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    return AutoModelForImageTextToText if with_images and not text_alone else AutoModelForCausalLM


def load_tokenizer(
    name_or_path: str | Path, *, revision: str | None = None, trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedTokenizerBase:
    """Load a tokenizer that reports character offsets, which the masks of what is trained are made from.

    Raises:
        ValueError: There is none at this place, its files are damaged or not there, or it has no fast version.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name_or_path, revision=revision or "main", trust_remote_code=trust_remote_code, **kwargs
        )
    except Exception as error:  # damaged files lead to errors of any kind, bare `Exception` included
        raise CheckpointError(_explain_tokenizer_error(name_or_path, error)) from error
    check_tokenizer(tokenizer, name_or_path)
    return tokenizer


def load_processor(name_or_path: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The processor of a model with an image tower, the tokenizer of any other.

    A processor that can't be made here (many need torchvision) is left out with a warning that says why: text can be
    trained without it.

    Args:
        name_or_path: Hub id or folder.
        revision: Hub branch, tag or commit.
        trust_remote_code: Run Python code that comes with the model.

    Raises:
        ValueError: There is no tokenizer that can be trained with.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, ProcessorMixin

    arguments: dict[str, Any] = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name_or_path, **arguments)
        sees = auto_class(config) is AutoModelForImageTextToText
    except (OSError, ValueError):  # a folder of a tokenizer alone
        sees = False
    if not sees:
        return load_tokenizer(name_or_path, **arguments)
    try:
        processor = AutoProcessor.from_pretrained(name_or_path, **arguments)
    except (ImportError, OSError, ValueError) as error:
        logger.warning("no processor for images is made of %s, only text can be trained: %s", name_or_path, error)
        return load_tokenizer(name_or_path, **arguments)
    if not isinstance(processor, ProcessorMixin):
        return load_tokenizer(name_or_path, **arguments)
    check_tokenizer(processor.tokenizer, name_or_path)
    return processor


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name_or_path: str | Path) -> None:
    """Refuse a tokenizer that was loaded and can't be trained with.

    Raises:
        CheckpointError: It reports no character offsets, or its vocabulary is empty.
    """
    if not tokenizer.is_fast:
        raise CheckpointError(
            f"The tokenizer of {str(name_or_path)!r} ({type(tokenizer).__name__}) has no fast version, and only "
            f"fast ones report which characters a token stands for. Convert it, or use a model with a tokenizer.json."
        )
    if not tokenizer(PROBE, add_special_tokens=False)["input_ids"]:
        # for some families transformers makes an empty one where the files are missing
        raise CheckpointError(
            f"The tokenizer of {str(name_or_path)!r} makes no token of {PROBE!r}: its vocabulary is empty. "
            f"{_tokenizer_way_out(name_or_path)}"
        )


def explain_load_error(name_or_path: str | Path, error: Exception, what: str = "model") -> str:
    """One message for a model or tokenizer that can't be loaded: where it was looked for, why not, what to do."""
    reason = " ".join(str(error).split())
    reason = reason if len(reason) <= 300 else reason[:300] + " ..."
    if Path(name_or_path).exists():
        return f"The folder {str(name_or_path)!r} can't be loaded as a {what}: {reason}"
    return (
        f"{what} {str(name_or_path)!r} was found neither as a folder nor on the hub: {reason} "
        f"Check the spelling and revision, log in with `hf auth login` if it is private, or give a local folder."
    )


def _explain_tokenizer_error(name_or_path: str | Path, error: Exception) -> str:
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
        "Copy the model's tokenizer.json and tokenizer_config.json there again, or write them anew with "
        f"AutoTokenizer.from_pretrained(ORIGINAL).save_pretrained({str(name_or_path)!r})."
    )


OF_THE_PROCESS = ("local_files_only",)
"""What transformers writes down of the environment: with HF_HUB_OFFLINE the same tokenizer would be other bytes."""


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer, or a processor, without what depends on how this process was started.

    Args:
        tokenizer: With `save_pretrained`.
        folder: Made if need be.
    """
    for part in (tokenizer, getattr(tokenizer, "tokenizer", None)):
        for name in OF_THE_PROCESS:
            getattr(part, "init_kwargs", {}).pop(name, None)
    tokenizer.save_pretrained(folder)
