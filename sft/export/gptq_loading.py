"""Two ways to run a GPTQ checkpoint: packed, as everyone loads it, or written out; and whether both agree."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from sft.export.gptq_format import PARTS, dequantize, open_tensors, packed_layers

MAX_TOKENS = 64
MAX_DEVIATION = 0.25


def load_dequantized(quantized_dir: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a GPTQ checkpoint with its quantized weights written out as plain ones.

    The weights are exactly those that the checkpoint stands for, but matrix products run at full speed on a CPU, where
    the packed kernel takes four times as long. For evaluation, not for saving memory.
    """
    config = AutoConfig.from_pretrained(quantized_dir)
    # The file that vLLM reads; transformers reads the section in config.json.
    packing = json.loads((quantized_dir / "quantize_config.json").read_text(encoding="utf-8"))
    del config.quantization_config
    with no_init_weights():  # all of them are read below
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    weights = {}
    for name, packed in packed_layers(quantized_dir):
        weight = dequantize(packed, packing["bits"], zeros_minus_one=packing["checkpoint_format"] == "gptq")
        is_linear = isinstance(model.get_submodule(name), torch.nn.Linear)
        weights[f"{name}.weight"] = (weight.T if is_linear else weight).to(dtype).contiguous()
    packed_parts = {name.removesuffix("weight") + part for name in weights for part in PARTS}
    with open_tensors(quantized_dir) as places:
        for name, file in places.items():
            if name not in packed_parts:
                weights[name] = file.get_tensor(name).to(dtype)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    model.tie_weights()
    unknown = [*(set(missing) - set(model.all_tied_weights_keys or ())), *unexpected]
    assert not unknown, f"the checkpoint and the architecture differ in {unknown}"
    if (quantized_dir / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(quantized_dir)
    return model.eval()


@torch.inference_mode()
def loading_deviation(quantized_dir: Path, input_ids: Sequence[int]) -> float:
    """Load a GPTQ checkpoint plainly, by `from_pretrained`, and compare it with what its files stand for.

    Args:
        quantized_dir: the checkpoint.
        input_ids: tokens of a typical text; the first `MAX_TOKENS` are used.

    Returns:
        Mean absolute difference of the logits over their standard deviation: rounding in the packed kernel, some 0.01.

    Raises:
        ValueError: they differ by more than rounding can explain, so that users would get another model than the one
            that was quantized.
    """
    ids = torch.tensor([list(input_ids[:MAX_TOKENS])])
    expected = load_dequantized(quantized_dir)(input_ids=ids).logits
    loaded = AutoModelForCausalLM.from_pretrained(quantized_dir, dtype=torch.float32)
    # At other widths than 4 bit the kernel compiles itself, which takes longer than this and a C++ compiler.
    with torch.compiler.set_stance("force_eager"):
        logits = loaded(input_ids=ids.to(loaded.device)).logits.to("cpu")
    deviation = float((logits - expected).abs().mean() / expected.std())
    if not deviation <= MAX_DEVIATION:
        raise ValueError(
            f"loaded by transformers, {quantized_dir} computes something else than its weights say: its logits are off "
            f"by {deviation:.3f} standard deviations, {MAX_DEVIATION} is the limit; try another group_size or bits"
        )
    return deviation
