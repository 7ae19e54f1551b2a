"""Capabilities of a device and of the installed packages, as plain values that tests can construct."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch

HALF_PRECISIONS = (torch.float16, torch.bfloat16)
"""The 16-bit floating-point types, which the flash attention kernels need."""

PACKAGES = ("flash_attn", "flash_attn_interface", "kernels", "liger_kernel", "triton", "torch.nn.attention.varlen")
"""Optional packages and modules that decide which kernels can be used."""


@dataclass(frozen=True)
class Hardware:
    """A device and the optional packages that are installed.

    Attributes:
        device_type: `cpu`, `cuda`, ...
        capability: CUDA compute capability; (0, 0) for any other device.
        packages: Those of `PACKAGES` that can be imported.
    """

    device_type: str
    capability: tuple[int, int] = (0, 0)
    packages: frozenset[str] = frozenset()


@lru_cache
def current_hardware(device: torch.device) -> Hardware:
    """Return the capabilities of a device, and the installed packages."""
    return Hardware(
        device_type=device.type,
        capability=torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0),
        packages=frozenset(name for name in PACKAGES if find_spec(name) is not None),
    )
