"""An adapter on a plain model does not import GPTQModel; on a GPTQ model peft finds its layers."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from peft import LoraConfig
from sft.models.adapters import wrap_adapter
from tests.tiny import tiny_model, tiny_tokenizer
model = wrap_adapter(tiny_model(), LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"), tiny_tokenizer())
print("imported" if "gptqmodel" in sys.modules else "not imported")
"""


def test_adapter_on_a_plain_model_leaves_gptqmodel_alone() -> None:
    result = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "not imported"
    assert "GPT-QModel" not in result.stdout + result.stderr
