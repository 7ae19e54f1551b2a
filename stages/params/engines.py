"""Names of serving engines, of the models that each serves, and of the kinds of GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

ENGINES = ("transformers", "vllm", "llama_cpp")

SERVED_MODELS = ("merged", "quantized", "gguf", "adapter")
"""The folders of `merge` and `quantize`, the GGUF files, and the base with its adapter."""

SERVED: Mapping[str, tuple[str, ...]] = {
    "transformers": ("merged", "quantized"),
    "vllm": ("merged", "quantized", "adapter"),
    "llama_cpp": ("gguf",),
}
"""Engine -> the models that it serves."""

GGUFKind = Literal[
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q5_0",
    "q5_1",
    "q4_0",
    "q4_1",
    "q2_k",
    "q3_k_s",
    "q3_k_m",
    "q3_k_l",
    "q4_k_s",
    "q4_k_m",
    "q5_k_s",
    "q5_k_m",
    "q6_k",
    "iq4_nl",
    "iq4_xs",
    "iq3_m",
    "iq3_s",
    "iq3_xs",
    "iq3_xxs",
    "iq2_m",
    "iq2_s",
    "iq2_xs",
    "iq2_xxs",
]
"""Kinds of GGUF files, as llama.cpp's quantizer calls them."""

IMPORTANCE_KINDS = tuple(kind for kind in get_args(GGUFKind) if "_k" in kind or kind.startswith("iq"))
"""Kinds that are rounded by the importance of each weight, which is measured on training rows."""
