"""Module paths of trl, under which the public names of `sft` can be imported, too.

Scripts and tests import from paths such as `trl.trainer.utils`, and trl has moved its names between them from release
to release. After `trl` is replaced by `sft`, each path in `PATHS` is a module that offers all public names of `sft`.
There are no such files: a finder makes the modules when they are imported.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

PATHS = (
    "trainer",
    "trainer.callbacks",
    "trainer.model_config",
    "trainer.sft_config",
    "trainer.sft_trainer",
    "trainer.utils",
    "commands",
    "commands.cli_utils",
    "data_utils",
    "extras",
    "extras.dataset_formatting",
    "models.utils",
    "chat_template_utils",
    "scripts.utils",
)
"""Paths below `sft`, in the order of their releases: 0.8 to 1.16. `models` and `scripts` are rooms of their own."""


class TrlPathFinder(MetaPathFinder, Loader):
    """Finder and loader of the modules in `PATHS`."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return how to make a module of `PATHS`; None for any other."""
        package, _, name = fullname.partition(".")
        if package != "sft" or name not in PATHS:
            return None
        is_package = any(other.startswith(f"{name}.") for other in PATHS)
        return ModuleSpec(fullname, self, is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        """Give a module the public names of `sft`, each imported on first use."""
        library = importlib.import_module("sft")
        module.__doc__ = "Public names of `sft` under a module path of trl, see `sft.trl_paths`."
        module.__all__ = list(library.__all__)  # type: ignore[attr-defined]
        module.__dir__ = library.__dir__  # type: ignore[method-assign]

        def public_name(name: str) -> Any:
            if name in library.__all__:
                return getattr(library, name)
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}; it offers the names of `sft`")

        module.__getattr__ = public_name  # type: ignore[method-assign]


def install() -> None:
    """Let Python's import find the modules in `PATHS`."""
    if not any(isinstance(finder, TrlPathFinder) for finder in sys.meta_path):
        sys.meta_path.append(TrlPathFinder())
