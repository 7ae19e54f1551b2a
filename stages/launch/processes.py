"""A stage in several processes: started by `accelerate launch` or Ray, ended together, one error message."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stages.checkout.paths import Paths
from stages.checkout.redaction import is_secret, redact
from stages.launch.engines import engine_file
from stages.launch.ray import WorkersFailed, launch_with_ray
from stages.launch.stopping import grace_s
from stages.params.schema import LaunchSection
from stages.training.out_of_memory import OutOfMemory

RANK_VARIABLES = ("SFT_MACHINE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX")
"""Variables with the number of this machine, set by the user, by Slurm, or by an indexed Kubernetes job."""

LAUNCHED_VARIABLE = "SFT_LAUNCHED"
"""Environment variable of processes that `launch` started, for which its caller locks the devices."""

_PASSED_ON = re.compile(r"(ACCELERATE|FSDP|GLOO|HF|NCCL|OMP|PARALLELISM|SFT|TOKENIZERS|TORCH|TQDM)_")
"""Environment variables that workers of Ray are given."""

_LOST_PEER = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|DistNetworkError|DistStoreError", re.I
)
"""Errors that a process raises because another one has ended."""


class ProcessKilled(ValueError):
    """A signal ended a process. Another attempt may succeed, so the exit code names the signal, as shells do.

    Args:
        message: The error message.
        number: Number of the signal.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


def in_launched_process() -> bool:
    """Return whether a launcher (accelerate, torchrun, Ray) started this process as one of several."""
    return "LOCAL_RANK" in os.environ


def is_launched_by_stage() -> bool:
    """Return whether the launcher of this process was started by `launch`, and not by the user, such as torchrun."""
    return LAUNCHED_VARIABLE in os.environ


def needs_launcher(section: LaunchSection) -> bool:
    """Return whether the section asks for processes that a launcher has to start."""
    return section.processes > 1 or section.engine != "ddp" or section.launcher == "ray"


def check_num_processes(section: LaunchSection) -> None:
    """Check that the launcher that started this process started as many as the section states.

    Raises:
        ValueError: It started another number.
    """
    found = int(os.environ.get("WORLD_SIZE", "1"))
    if found != section.processes:
        raise ValueError(
            f"train.launch.processes is {section.processes}, but a launcher started {found} processes; make the two "
            "equal, as the number of rows in an update depends on it"
        )


def launch(stage: str, section: LaunchSection, paths: Paths) -> None:
    """Run a stage in `section.processes` processes and wait for all of them.

    Args:
        stage: Name of the stage.
        section: Section `train.launch` of params.yaml.
        paths: The checkout.

    Raises:
        ValueError: The section can't be used on this machine, or a process failed; names the process and the cause.
        SystemExit: A signal ended this process, after the others were ended.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # advice of DDP, printed by each process
    os.environ[LAUNCHED_VARIABLE] = "1"
    if section.launcher == "ray":
        try:
            return launch_with_ray(stage, section, paths, worker_variables(section, paths.root))
        except WorkersFailed as error:
            raise failure_of(error.failures, section.processes) from None
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not os.environ.get("SFT_TRACEBACK"):
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # `describe` does this in one line
    print(f"starting {section.processes} processes: {section.engine}", flush=True)
    # the agent passes SIGTERM on, and would kill the processes after 30 s whatever time they have
    LocalElasticAgent._shutdown.__defaults__ = (signal.SIGTERM, math.ceil(grace_s()))
    with tempfile.TemporaryDirectory(prefix="sft-launch-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        command = [*launch_options(section, paths.root, Path(folder)), "--module", "stages", stage]
        try:
            launch_command(launch_command_parser().parse_args([*command, "--root", str(paths.root)]))
        except ChildFailedError as error:
            raise failure_of(error.failures, section.processes) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            sys.exit(128 + int(error.sigval))
        except ConnectionError as error:
            raise ValueError(f"train.launch.port {section.port} is taken: {error}") from None


def launch_options(section: LaunchSection, root: Path, folder: Path) -> list[str]:
    """Return the options of `accelerate launch` for the section.

    Args:
        section: Section `train.launch` of params.yaml.
        root: The checkout.
        folder: Where the configuration file of a named engine is written.

    Raises:
        ValueError: The configuration file is missing, a package is not installed, or neither params.yaml nor the
            environment states this machine's number or the first machine's address.
    """
    options = {
        "config_file": str(engine_file(section, root, folder)),
        "num_processes": str(section.processes),
        "num_machines": str(section.machines),
        "machine_rank": "0",
        "main_process_port": "0" if section.port is None else str(section.port),
        "mixed_precision": "no",  # params.yaml's model.dtype decides
        "dynamo_backend": "no",
    }
    if section.machines > 1:
        options["machine_rank"] = str(machine_rank(section, os.environ))
        options["main_process_ip"] = rendezvous_address(section, os.environ)
    local = section.processes // section.machines
    options["num_cpu_threads_per_process"] = os.environ.get(
        "OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // local))
    )
    import torch

    if not torch.accelerator.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"  # with `--cpu`, accelerate starts one process
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [*words, *(["--same_network"] if section.machines > 1 else [])]


def worker_variables(section: LaunchSection, root: Path) -> dict[str, str]:
    """Return the environment variables for workers that Ray starts, perhaps on other machines.

    These are the variables that `accelerate launch` would set, and those of this process that concern its packages.
    Secrets are not passed on, as Ray writes the environment of its workers to logs.
    """
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    with tempfile.TemporaryDirectory(prefix="sft-launch-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        words = [*launch_options(section, root, Path(folder)), "--module", "stages"]
        args, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
        found = prepare_multi_gpu_env(args)
    return {name: value for name, value in found.items() if _PASSED_ON.match(name) and not is_secret(name)}


def machine_rank(section: LaunchSection, environment: Mapping[str, str]) -> int:
    """Return the number of this machine, from 0, as stated in params.yaml or else in the environment.

    Raises:
        ValueError: It is stated in neither, or it is not below the number of machines.
    """
    rank, source = section.machine_rank, "train.launch.machine_rank"
    if rank is None:
        source = next((name for name in RANK_VARIABLES if environment.get(name, "").isdigit()), "")
        if not source:
            raise ValueError(
                f"train.launch.machines is {section.machines}, but which one is this? Set train.launch.machine_rank or "
                f"one of {', '.join(RANK_VARIABLES)} to 0 on the first machine, 1 on the next"
            )
        rank = int(environment[source])
    if rank >= section.machines:
        raise ValueError(
            f"{source} is {rank}, but train.launch.machines is {section.machines}: they are numbered from 0 to "
            f"{section.machines - 1}"
        )
    return rank


def rendezvous_address(section: LaunchSection, environment: Mapping[str, str]) -> str:
    """Return the address of the first machine, as stated in params.yaml or else in `MASTER_ADDR`.

    Raises:
        ValueError: It is stated in neither, or there is no port.
    """
    address = section.address or environment.get("MASTER_ADDR")
    if not address or section.port is None:
        raise ValueError(
            f"train.launch.machines is {section.machines}: set train.launch.address (or MASTER_ADDR) to the first "
            "machine's name or IP and train.launch.port to a free port of it, such as 29500"
        )
    return address


def failure_of(failures: Mapping[int, Any], num_processes: int) -> ValueError:
    """Return the error to raise for failed processes; its class shows whether another attempt may succeed.

    Args:
        failures: Rank -> `ProcessFailure` of `torch.distributed.elastic`.
        num_processes: Number of processes in total.

    Returns:
        `OutOfMemory` or `ProcessKilled` where that was the cause, otherwise a plain `ValueError`.
    """
    text = describe(failures, num_processes)
    if any(isinstance(f.message, dict) and OutOfMemory.__name__ in kind_of(f.message) for f in failures.values()):
        return OutOfMemory(text)
    rank = cause(failures)
    return ProcessKilled(text, -failures[rank].exitcode) if failures[rank].exitcode < 0 else ValueError(text)


def kind_of(message: Mapping[str, Any]) -> str:
    """Return the class name of the error that a process recorded."""
    return str(message.get("message", "")).partition(": ")[0]


def cause(failures: Mapping[int, Any]) -> int:
    """Return the rank of the process that caused the failure.

    It is the first that reported an error other than a lost connection, else one that was killed, else any.
    """
    reported = {rank: text for rank, failure in failures.items() if (text := _message(failure))}
    own = [rank for rank, text in reported.items() if not _LOST_PEER.search(text)]
    killed = [rank for rank, failure in failures.items() if failure.exitcode in (-signal.SIGKILL, -signal.SIGSEGV)]
    ranks = next(ranks for ranks in (own, killed, list(reported), list(failures)) if ranks)
    return min(ranks, key=lambda rank: failures[rank].timestamp)


def describe(failures: Mapping[int, Any], num_processes: int) -> str:
    """Describe in one message why the processes ended: the cause, without the lost connections that followed.

    Args:
        failures: Rank -> `ProcessFailure` of `torch.distributed.elastic`.
        num_processes: Number of processes in total.
    """
    rank = cause(failures)
    name, message = f"process {rank} of {num_processes}", _message(failures[rank])
    if message:
        return f"{name}: {message}"
    if failures[rank].exitcode < 0:
        hint = " (out of memory?)" if failures[rank].exitcode == -signal.SIGKILL else ""
        return f"{name} was ended by signal {-failures[rank].exitcode}{hint}; type the command again to resume"
    return f"{name} ended with exit code {failures[rank].exitcode}"


def _message(failure: Any) -> str:
    """Return the error that a process recorded before it ended, empty if it recorded none."""
    if not isinstance(failure.message, dict):
        return ""
    text: str = failure.message.get("message", "")
    kind, _, rest = text.partition(": ")
    if os.environ.get("SFT_TRACEBACK"):
        return str(failure.message.get("extraInfo", {}).get("py_callstack", text))
    return rest if kind in ("ValueError", "OSError", OutOfMemory.__name__) and rest else text


def record_failure(error: BaseException) -> None:
    """Write a launched process's error to the file that the launcher reads, or print it if there is no such file."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        name = f"process {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}"
        print(f"error: {name}: {redact(str(error) or type(error).__name__)}", file=sys.stderr, flush=True)
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)
