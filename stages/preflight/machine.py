"""Checks of values against this machine: kernels, packages, processes, memory, disk."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psutil

from sft.optimizers.names import check_device, check_package
from stages.params.schema import LaunchSection, Params, TrainSection
from stages.preflight.checkpoint import Outline
from stages.preflight.engines import check_engine
from stages.preflight.findings import Problem, from_error
from stages.preflight.memory import check_memory, find_shape, rooms
from stages.recipes.offline import BYTES
from stages.tracking.trackers import INSTALL as TRACKERS

GPU_FILES = (Path("/dev/nvidia0"), Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))
"""Files of the drivers of NVIDIA and AMD, also under WSL; without any, torch need not be asked, which takes seconds."""

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
GB = 1e9

BF16_FROM = (8, 0)
"""CUDA compute capability from which GPUs multiply in bfloat16."""

COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class Machine:
    """What the checks ask of a machine.

    Args:
        num_cores: Processor cores that this process may use.
        memory: Bytes of memory, within the limit of the container.
        swap: Bytes of swap space.
        gpus: Bytes of memory of each GPU.
        device: Kind of device that a training uses: cpu, cuda, ...
        capability: Lowest CUDA compute capability of the GPUs; (0, 0) without any, or if they are AMD's.
    """

    num_cores: int
    memory: int
    gpus: tuple[int, ...] = ()
    device: str = "cpu"
    capability: tuple[int, int] = (0, 0)
    swap: int = 0


def this_machine() -> Machine:
    """Return what this machine has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # no such file, or `max`
        memory = min(memory, int(CGROUP_LIMIT.read_text(encoding="ascii")))
    swap = psutil.swap_memory().total
    if not any(file.exists() for file in GPU_FILES):
        return Machine(cores, memory, swap=swap)
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = tuple(torch.cuda.get_device_properties(number).total_memory for number in range(count))
    capabilities = [] if torch.version.hip else [torch.cuda.get_device_capability(number) for number in range(count)]
    return Machine(cores, memory, gpus, "cuda" if gpus else "cpu", min(capabilities, default=(0, 0)), swap)


def check_machine(
    params: Params, root: Path, outline: Outline | None, machine: Machine, folder: Path | None = None
) -> Iterator[Problem]:
    """Yield what this machine can't do, or will hardly do.

    Args:
        params: Values of params.yaml.
        root: The checkout.
        outline: What the files of the base model say; None if they are not on this machine.
        machine: See `this_machine`.
        folder: Folder of the base model; None if it is not on this machine.
    """
    yield from _check_attention(params, machine)
    yield from _check_precision(params, machine)
    yield from _check_packages(params, machine)
    yield from _check_optimizer(params.train, machine)
    try:
        check_engine(params.train.launch, root)
    except ValueError as error:
        yield from_error(error, "train.launch.engine")
    yield from _check_processes(params, machine)
    if outline is not None and outline.num_weights:
        yield from _check_disk(params, root, outline)
    shape = None if _is_on_a_cluster(params.train.launch) else find_shape(params, root, folder, outline)
    if shape is not None:
        here = math.ceil(params.train.launch.processes / params.train.launch.machines)
        host, device = rooms(machine.gpus, machine.memory, machine.swap, here)
        yield from check_memory(params, shape, outline, host, device)


def _check_attention(params: Params, machine: Machine) -> Iterator[Problem]:
    name = params.model.attn_implementation
    if name in ("auto", "sdpa", "eager"):
        return
    import torch

    from sft.attention.choice import check_attention_request
    from sft.hardware import current_hardware

    try:
        dtype = getattr(torch, params.model.dtype)
        check_attention_request(name, dtype, current_hardware(torch.device(machine.device)))
    except ValueError as error:
        yield Problem("model.attn_implementation", str(error), is_error=True)


def _check_precision(params: Params, machine: Machine) -> Iterator[Problem]:
    """Check that the device computes in the precision that is asked for."""
    if params.train.mixed_precision == "fp16" and machine.device == "cpu":
        yield Problem("train.mixed_precision", "fp16 needs a GPU, and this machine has none; use bf16", is_error=True)
    if not (0, 0) < machine.capability < BF16_FROM:
        return
    found = ".".join(map(str, machine.capability))
    for key, value, way_out in (
        ("model.dtype", params.model.dtype, "float32 with train.mixed_precision: fp16"),
        ("train.mixed_precision", params.train.mixed_precision, "fp16"),
    ):
        if value in ("bfloat16", "bf16"):
            yield Problem(
                key,
                f"a GPU of this machine has compute capability {found}; products in {value}, which GPUs have from "
                f"{'.'.join(map(str, BF16_FROM))} on, are emulated there and several times slower; use {way_out}",
            )


def _check_optimizer(section: TrainSection, machine: Machine) -> Iterator[Problem]:
    """Check that the optimizer's package is installed, and that it runs on the device."""
    for check in (lambda: check_package(section.optim), lambda: check_device(section.optim, machine.device)):
        try:
            check()
        except ValueError as error:
            yield Problem("train.optim", str(error), is_error=True)


def _check_packages(params: Params, machine: Machine) -> Iterator[Problem]:
    """Check that packages and programs that values need are installed."""
    launch = params.train.launch
    needs = [
        (launch.launcher == "ray", "ray", "train.launch.launcher", "pip install '.[ray]', or use accelerate"),
        (params.format.workers == "ray", "ray", "format.workers", "pip install '.[ray]', or use processes"),
        (params.pack.workers == "ray", "ray", "pack.workers", "pip install '.[ray]', or use processes"),
        (params.train.method == "qlora", "bitsandbytes", "train.method", "pip install bitsandbytes"),
        (params.quantize.method in ("int8", "nf4"), "bitsandbytes", "quantize.method", "pip install bitsandbytes"),
        (params.quantize.method == "gptq", "gptqmodel", "quantize.method", "pip install gptqmodel"),
        (params.train.use_liger_kernel, "liger_kernel", "train.use_liger_kernel", "pip install liger-kernel"),
        *(
            (name in params.train.report_to, name, "train.report_to", f"pip install {wanted}, or remove {name}")
            for name, wanted in TRACKERS.items()
        ),
    ]
    for is_needed, package, key, way_out in needs:
        if is_needed and find_spec(package) is None:
            yield Problem(key, f"the package {package} is not installed: {way_out}", is_error=True)
    if params.train.use_liger_kernel and machine.device == "cpu":
        yield Problem("train.use_liger_kernel", "Liger's kernels need a GPU, and this machine has none", is_error=True)
    if params.quantize.method == "gptq" and not any(map(shutil.which, (os.environ.get("CXX", ""), *COMPILERS))):
        yield Problem(
            "quantize.method",
            f"gptq needs a C++ compiler ({', '.join(COMPILERS)}), and none is installed",
            is_error=True,
        )


def _check_processes(params: Params, machine: Machine) -> Iterator[Problem]:
    launch = params.train.launch
    here = math.ceil(launch.processes / launch.machines)
    if machine.gpus and here > len(machine.gpus) and not _is_on_a_cluster(launch):
        yield Problem(
            "train.launch.processes",
            f"{here} processes on this machine, which has {len(machine.gpus)} GPU{'s' * (len(machine.gpus) > 1)}; "
            "one process per GPU",
            is_error=True,
        )
    elif not machine.gpus and here > machine.num_cores and not _is_on_a_cluster(launch):
        yield Problem(
            "train.launch.processes",
            f"{here} processes share the {machine.num_cores} cores of this machine, which has no GPU",
        )
    for key, count, workers in (
        ("format.num_proc", params.format.num_proc, params.format.workers),
        ("pack.num_proc", params.pack.num_proc, params.pack.workers),
    ):
        if workers == "processes" and count > max(2, machine.num_cores):
            yield Problem(key, f"{count} processes share the {machine.num_cores} cores of this machine")


def _is_on_a_cluster(launch: LaunchSection) -> bool:
    """Return whether a cluster of Ray, which may have other machines, runs the processes."""
    return launch.launcher == "ray" and (launch.address is not None or "RAY_ADDRESS" in os.environ)


def _check_disk(params: Params, root: Path, outline: Outline) -> Iterator[Problem]:
    """Check that the merged model fits on the disk, in outs/ and in DVC's cache."""
    if (root / "outs" / "merge").exists():
        return  # its place is taken already
    needed = 2 * outline.num_weights * BYTES[params.merge.dtype]
    free = shutil.disk_usage(root).free
    if needed > free:
        yield Problem(
            "merge.dtype",
            f"the merged model takes {needed / GB:.1f} GB in outs/ and in DVC's cache, and {free / GB:.1f} GB are free",
        )
