"""What `config.json` and the headers of weight files say of the base model, without loading it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from sft.models.checkpoint import weight_files
from stages.models.base import EMBEDDED_PREFIX, embedded_folder, local_folder
from stages.params.schema import ModelSection

MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class Outline:
    """The shape of a model.

    Args:
        folder: Its folder.
        config: Its config.json, of a model with images that of its text part.
        shapes: Shape of each weight by name.
        file_sizes: Number of weights in each file.
    """

    folder: Path
    config: dict[str, Any]
    shapes: dict[str, list[int]]
    file_sizes: tuple[int, ...] = ()

    @property
    def num_weights(self) -> int:
        """Number of weights."""
        return sum(map(math.prod, self.shapes.values()))


def base_folder(model: ModelSection, root: Path) -> Path | None:
    """Return the folder of the base model, if it is on this machine."""
    name = model.name_or_path
    folder = embedded_folder(name) if name.startswith(EMBEDDED_PREFIX) else local_folder(name, root)
    if (folder / "config.json").is_file():
        return folder
    try:
        cached = try_to_load_from_cache(name, "config.json", revision=model.revision)
    except ValueError:  # not a hub id
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def read_outline(folder: Path) -> Outline | None:
    """Read the shape of a model; None if its files can't be read, of which `load` says more."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        files = [_read_shapes(file) for file in weight_files(folder)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    shapes = {name: shape for file in files for name, shape in file.items()}
    sizes = tuple(sum(map(math.prod, file.values())) for file in files)
    return Outline(folder, {**config, **config.get("text_config", {})}, shapes, sizes)


def _read_shapes(file: Path) -> dict[str, list[int]]:
    """Return the shapes in the header of a safetensors file."""
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"{file}: a header of {size} bytes")
        header = json.loads(stream.read(size))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}
