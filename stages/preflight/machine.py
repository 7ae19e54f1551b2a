"""Checks of values against this machine: kernels, packages, processes, memory, disk."""

from __future__ import annotations

import contextlib
import math
import os
import re
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
from stages.tracking.trackers import INSTALL as TRACKERS

GPU_FILES = (Path("/dev/nvidia0"), Path("/dev/nvidiactl"), Path("/dev/kfd"), Path("/dev/dxg"))
"""Files of the drivers of NVIDIA and AMD, also under WSL; without any, torch need not be asked, which takes seconds."""

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
GB = 1e9
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BYTES_4BIT = 0.56
"""Bytes per weight of a 4-bit base with its scales."""

MOMENTS_BYTES = 8
"""Bytes of AdamW's two moments per trained weight, in float32."""

BF16_FROM = (8, 0)
"""CUDA compute capability from which GPUs multiply in bfloat16."""

COMPILERS = ("c++", "g++", "clang++")


@dataclass(frozen=True)
class Machine:
    """What the checks ask of a machine.

    Args:
        num_cores: Processor cores that this process may use.
        memory: Bytes of memory, within the limit of the container.
        gpus: Bytes of memory of each GPU.
        device: Kind of device that a training uses: cpu, cuda, ...
        capability: Lowest CUDA compute capability of the GPUs; (0, 0) without any, or if they are AMD's.
    """

    num_cores: int
    memory: int
    gpus: tuple[int, ...] = ()
    device: str = "cpu"
    capability: tuple[int, int] = (0, 0)


def this_machine() -> Machine:
    """Return what this machine has."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = psutil.virtual_memory().total
    with contextlib.suppress(OSError, ValueError):  # no such file, or `max`
        memory = min(memory, int(CGROUP_LIMIT.read_text(encoding="ascii")))
    if not any(file.exists() for file in GPU_FILES):
        return Machine(cores, memory)
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = tuple(torch.cuda.get_device_properties(number).total_memory for number in range(count))
    capabilities = [] if torch.version.hip else [torch.cuda.get_device_capability(number) for number in range(count)]
    return Machine(cores, memory, gpus, "cuda" if gpus else "cpu", min(capabilities, default=(0, 0)))


def check_machine(params: Params, root: Path, outline: Outline | None, machine: Machine) -> Iterator[Problem]:
    """Yield what this machine can't do, or will hardly do.

    Args:
        params: Values of params.yaml.
        root: The checkout.
        outline: The base model; None if it is not on this machine.
        machine: See `this_machine`.
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
        yield from _check_memory(params, outline, machine)
        yield from _check_disk(params, root, outline)


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


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process of the training needs, at least roughly.

    Args:
        weights: Weights of the base model.
        training: Gradients and AdamW's moments of the trained weights, and an adapter's weights.
        activations: Values kept for the backward pass.
    """

    weights: float
    training: float
    activations: float

    @property
    def total(self) -> float:
        """Sum of the parts."""
        return self.weights + self.training + self.activations


def estimate_memory(params: Params, outline: Outline) -> MemoryEstimate:
    """Estimate the memory of a training from the shapes of the weights. `sft estimate` measures it.

    Activations are those of a decoder layer without a fused kernel: per token some 10 values per unit of its width and
    3 per unit of its MLP's width (after Korthikanti et al., arXiv:2205.05198, without the attention matrix, which no
    kernel here keeps); with gradient checkpointing, one width per layer, and one whole layer.
    """
    train, config = params.train, outline.config
    bytes_each = BYTES[params.model.dtype]
    shards = train.launch.processes if train.launch.engine in ("fsdp2", "deepspeed_zero3") else 1
    halves = train.launch.processes if train.launch.engine == "deepspeed_zero2" else shards
    weights = outline.num_weights * (BYTES_4BIT if train.method == "qlora" else bytes_each)
    num_trained = outline.num_weights if train.method == "full" else adapter_size(train, outline)
    own_weights = 0 if train.method == "full" else 4
    gradients = bytes_each if train.method == "full" else 4
    layers, width = int(config.get("num_hidden_layers", 0)), int(config.get("hidden_size", 0))
    mlp = int(config.get("intermediate_size") or 4 * width)
    layer = 10 * width + 3 * mlp
    per_token = layers * width + layer if train.gradient_checkpointing else layers * layer
    tokens = params.pack.max_length * train.per_device_train_batch_size
    return MemoryEstimate(
        weights=weights / shards,
        training=num_trained * (own_weights / shards + gradients / halves + MOMENTS_BYTES / halves),
        activations=float(tokens * per_token * bytes_each),
    )


def adapter_size(train: TrainSection, outline: Outline) -> int:
    """Return the number of weights of a LoRA adapter on the named modules, or on all matrices inside of layers."""
    targets = train.lora_target_modules
    names = None if isinstance(targets, str) or targets == ["all-linear"] else targets
    total = 0
    for name, shape in outline.shapes.items():
        module = name.removesuffix(".weight")
        is_target = (
            re.search(r"\.\d+\.", name) is not None
            if names is None
            else any(f".{module}".endswith(f".{target}") for target in names)
        )
        if len(shape) == 2 and is_target:
            total += train.lora_r * sum(shape)
    return total


def _check_memory(params: Params, outline: Outline, machine: Machine) -> Iterator[Problem]:
    found = estimate_memory(params, outline)
    there = min(machine.gpus) if machine.gpus else machine.memory
    per_machine = math.ceil(params.train.launch.processes / params.train.launch.machines)
    needed = found.total if machine.gpus else found.total * per_machine
    if needed <= there:
        return
    name = "the GPU" if machine.gpus else "this machine"
    parts = f"weights {found.weights / GB:.1f}, gradients and optimizer {found.training / GB:.1f}, activations "
    parts += f"{found.activations / GB:.1f}"
    key, ways = _way_out(params.train, found)
    yield Problem(
        key,
        f"the training needs about {needed / GB:.1f} GB ({parts}), and {name} has {there / GB:.1f} GB; {ways}",
        is_error=found.weights > there,
    )


def _way_out(train: TrainSection, found: MemoryEstimate) -> tuple[str, str]:
    """Return the key that decides most of the memory, and what would lower it."""
    if found.activations > found.weights + found.training:
        ways = ["a smaller pack.max_length"]
        ways += ["fewer rows per pass"] * (train.per_device_train_batch_size > 1)
        ways += ["train.gradient_checkpointing: true"] * (not train.gradient_checkpointing)
        return "train.per_device_train_batch_size", "ways out: " + ", ".join(ways)
    if train.method == "full":
        return "train.method", "ways out: lora, or more devices with train.launch.engine: fsdp2"
    ways = ["a smaller model", "train.method: qlora"] if train.method == "lora" else ["a smaller model"]
    return "model.name_or_path", "ways out: " + ", ".join(ways)


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
