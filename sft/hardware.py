"""What a device and the installed packages can do, as plain values: tests make their own."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch

HALF_PRECISIONS = (torch.float16, torch.bfloat16)
"""The 16-bit floating-point types, which the flash attention kernels need."""

PACKAGES = ("flash_attn", "flash_attn_interface", "kernels", "liger_kernel", "triton", "torch.nn.attention.varlen")


@dataclass(frozen=True)
class Hardware:
    """A device.

    Attributes:
        device_type: `cpu`, `cuda`, ...
        capability: CUDA compute capability, (0, 0) elsewhere.
        packages: those of `PACKAGES` that can be imported.
    """

    device_type: str
    capability: tuple[int, int] = (0, 0)
    packages: frozenset[str] = frozenset()


@lru_cache
def current_hardware(device: torch.device) -> Hardware:
    """Look at a device."""
    return Hardware(
        device_type=device.type,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0),
        packages=frozenset(name for name in PACKAGES if find_spec(name) is not None),
    )
