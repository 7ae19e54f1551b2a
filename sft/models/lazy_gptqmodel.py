"""Keep peft from importing GPTQModel for models that have no GPTQ layers.

peft asks for every layer whether it is one of GPTQModel's, and imports that package to find out: seconds of start-up, a
banner on the terminal and another logging set-up. But a layer of a package that was never imported does not exist:
loading a GPTQ checkpoint imports the package first.
"""

from __future__ import annotations

import sys

PACKAGE = "gptqmodel"


def gptqmodel_in_use() -> bool:
    """Whether anything in this process has imported GPTQModel, without which none of its layers can exist."""
    return PACKAGE in sys.modules


def ask_peft_to_wait() -> None:
    """Replace peft's question "is GPTQModel installed?" by "is it in use?", wherever peft has imported it to."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "peft" and hasattr(module, "is_gptqmodel_available"):
            vars(module)["is_gptqmodel_available"] = gptqmodel_in_use
