"""Places of llama.cpp's programs in a folder that `make engines` writes, and the families that it knows."""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class LlamaCpp:
    """An installation of llama.cpp.

    Args:
        folder: An environment with its server, its `library`, and the `source` of its converter.
    """

    folder: Path

    @property
    def source(self) -> Path:
        """Its converter and the Python package `gguf` of the same version."""
        return self.folder / "source"

    @property
    def library(self) -> Path:
        """Folder of libllama, which has the quantizer."""
        return self.folder / "library"

    @property
    def python(self) -> Path:
        """The Python that imports its server."""
        return self.folder / "bin" / "python"

    @property
    def ready(self) -> Path:
        """File that is written when all is installed."""
        return self.folder / ".ready"

    def check(self) -> None:
        """Check that everything that an export needs is installed.

        Raises:
            ValueError: It is not; the message says what installs it.
        """
        if not self.ready.is_file():
            raise ValueError(
                f"llama.cpp is not installed, {self.ready} is missing: `make engines` installs it outside .venv"
            )


def check_exportable(model_dir: Path, llama_cpp: LlamaCpp) -> None:
    """Check from the configuration alone that llama.cpp knows a checkpoint.

    Raises:
        ValueError: It does not; the message names the value.
    """
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    known = known_architectures(llama_cpp)
    names = config.get("architectures") or []
    if not known.intersection(names):
        raise ValueError(
            f"{model_dir} is of the architecture {', '.join(names) or 'that its config.json does not name'}, which "
            f"this llama.cpp does not convert; it knows {len(known)} others"
        )
    if config.get("quantization_config"):
        raise ValueError(f"{model_dir} is quantized already; a GGUF file is made from a plain checkpoint")


def known_architectures(llama_cpp: LlamaCpp) -> set[str]:
    """Return the names of model classes that the converter knows, from its source.

    Raises:
        ValueError: It is another program.
    """
    tree = ast.parse((llama_cpp.source / "conversion" / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "TEXT_MODEL_MAP" and node.value:
            return set(ast.literal_eval(node.value))
    raise ValueError(f"{llama_cpp.source} is not the source of llama.cpp that `make engines` installs")
