"""Names of serving engines, of the models that each serves, and of the kinds of GGUF files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

from sft.suggest import did_you_mean

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


class AskedEngine(NamedTuple):
    """An entry of `evaluate.engines`.

    Args:
        engine: transformers, vllm or llama_cpp.
        model: merged, quantized, adapter, or the kind of a GGUF file; None = the model that is shipped.
    """

    engine: str
    model: str | None


def read_entry(text: str) -> AskedEngine:
    """Read an entry of `evaluate.engines`: `ENGINE` or `ENGINE.MODEL`.

    Raises:
        ValueError: There is no such engine, or it does not serve the model.
    """
    engine, dot, model = text.partition(".")
    if engine not in ENGINES:
        hint = did_you_mean(engine, ENGINES, otherwise=f"there are {', '.join(ENGINES)}")
        raise ValueError(f"{text!r}: there is no engine {engine!r}; {hint}")
    serves_files = SERVED[engine] == ("gguf",)
    known = get_args(GGUFKind) if serves_files else SERVED[engine]
    if model in known or not (dot or serves_files):
        return AskedEngine(engine, model or None)
    what = f"GGUF files; name the kind of one, such as {engine}.q8_0" if serves_files else " or ".join(known)
    raise ValueError(f"{text!r}: {engine} serves {what}{did_you_mean(model, known, before='; ')}")
