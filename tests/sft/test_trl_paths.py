"""Module paths of trl after `trl` is replaced by `sft`."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys

import pytest

import sft
from sft.trl_paths import PATHS


@pytest.mark.parametrize("path", PATHS)
def test_every_path_offers_the_public_names(path: str) -> None:
    module = importlib.import_module(f"sft.{path}")
    assert module.__all__ == sft.__all__
    assert module.SFTConfig is sft.SFTConfig
    assert "SFTTrainer" in dir(module)


def test_names_are_imported_as_from_trl() -> None:
    code = (
        "from sft.trainer import ConstantLengthDataset\n"
        "from sft.trainer.utils import get_kbit_device_map\n"
        "from sft.models.utils import ChatMlSpecialTokens\n"
        "from sft.extras.dataset_formatting import get_formatting_func_from_dataset\n"
        "import sft.data_utils, sft\n"
        "print(ConstantLengthDataset.__module__, sft.data_utils.is_conversational({}), sft.models.__file__)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    constant, conversational, models = done.stdout.split()
    assert (constant, conversational) == ("sft.tokens.constant_length", "False")
    assert models.endswith("sft/models/__init__.py")  # the room is still found


def test_names_that_the_library_lacks_are_no_names_there() -> None:
    with pytest.raises(ImportError, match="cannot import name 'pad'"):
        exec("from sft.trainer.utils import pad")
    with pytest.raises(ModuleNotFoundError, match=r"sft\.trainer\.dpo_trainer"):
        importlib.import_module("sft.trainer.dpo_trainer")


def test_importing_them_loads_no_torch() -> None:
    code = "import sft.trainer.utils, sys\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_no_path_hides_a_file_of_the_library() -> None:
    for path in PATHS:
        spec = importlib.util.find_spec(f"sft.{path}")
        assert spec is not None
        assert spec.origin is None, f"{path} is a file"
