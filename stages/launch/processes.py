"""A stage in several processes: started through `accelerate launch`, ended together, one message when one fails."""

from __future__ import annotations

import ctypes
import logging
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
from stages.params.schema import LaunchSection
from stages.training.out_of_memory import OutOfMemory

RANK_VARIABLES = ("SFT_MACHINE_RANK", "SLURM_NODEID", "JOB_COMPLETION_INDEX")
"""Who may say which machine this is: the user, Slurm, an indexed Kubernetes job."""
_PASSED_ON = re.compile(r"(ACCELERATE|FSDP|GLOO|HF|NCCL|OMP|SFT|TOKENIZERS|TORCH|TQDM)_")
PR_SET_PDEATHSIG = 1
_LOST_PEER = re.compile(
    r"gloo|nccl|connection (closed|reset|refused)|broken pipe|DistNetworkError|DistStoreError", re.I
)


class ProcessKilled(ValueError):
    """A process was ended from outside: another attempt may succeed, so the exit code tells the signal.

    Args:
        message: Which one.
        number: The signal's.
    """

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


def in_launched_process() -> bool:
    """Whether a launcher (this one, torchrun, Slurm with torchrun, Ray) started this process as one of several."""
    return "LOCAL_RANK" in os.environ


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
        stage: Its name.
        section: How many processes, where, and what shares the model among them.
        paths: The checkout.

    Raises:
        ValueError: The section can't be used here, or a process failed: says which one, and why.
        SystemExit: A signal ended this process; the others were ended first.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # DDP's advice, once a process
    if section.launcher == "ray":
        try:
            return launch_with_ray(stage, section, paths, worker_variables(section, paths.root))
        except WorkersFailed as error:
            raise failure_of(error.failures, section.processes) from None
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    if not os.environ.get("SFT_TRACEBACK"):
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # `describe` says it in one line
    print(f"starting {section.processes} processes: {section.engine}", flush=True)
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
    """The section as options of `accelerate launch`; a configuration of a named engine is written to `folder`.

    Raises:
        ValueError: The configuration file is missing, a package is not installed, or it is not known which machine
            this is or where the first one listens.
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
        os.environ["ACCELERATE_USE_CPU"] = "true"  # `accelerate launch --cpu` would start one process
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return [*words, *(["--same_network"] if section.machines > 1 else [])]


def worker_variables(section: LaunchSection, root: Path) -> dict[str, str]:
    """What `accelerate launch` would put into the environment of each process, and what this one has for its tools.

    For processes that another launcher starts, perhaps on other machines. Secrets are left out: those who start such
    processes write their environment into logs.
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
    """Which machine this is, 0 for the first: as stated, else as the environment says.

    Raises:
        ValueError: Nobody says it, or there are not so many machines.
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
        raise ValueError(f"{source} is {rank}, but train.launch.machines {section.machines} are counted from 0")
    return rank


def rendezvous_address(section: LaunchSection, environment: Mapping[str, str]) -> str:
    """Where the first machine listens: as stated, else `MASTER_ADDR`."""
    address = section.address or environment.get("MASTER_ADDR")
    if not address or section.port is None:
        raise ValueError(
            f"train.launch.machines is {section.machines}: set train.launch.address (or MASTER_ADDR) to the first "
            "machine's name or IP and train.launch.port to a free port of it, such as 29500"
        )
    return address


def failure_of(failures: Mapping[int, Any], num_processes: int) -> ValueError:
    """The error that says why the processes ended, of the kind that tells whether another attempt may succeed."""
    text = describe(failures, num_processes)
    if any(isinstance(f.message, dict) and OutOfMemory.__name__ in kind_of(f.message) for f in failures.values()):
        return OutOfMemory(text)
    rank = cause(failures)
    return ProcessKilled(text, -failures[rank].exitcode) if failures[rank].exitcode < 0 else ValueError(text)


def kind_of(message: Mapping[str, Any]) -> str:
    """The name of an error's class, as a process recorded it."""
    return str(message.get("message", "")).partition(": ")[0]


def cause(failures: Mapping[int, Any]) -> int:
    """The rank of the process that failed first for a reason of its own, not because it lost another one."""
    reported = {rank: text for rank, failure in failures.items() if (text := _message(failure))}
    own = [rank for rank, text in reported.items() if not _LOST_PEER.search(text)]
    killed = [rank for rank, failure in failures.items() if failure.exitcode in (-signal.SIGKILL, -signal.SIGSEGV)]
    ranks = next(ranks for ranks in (own, killed, list(reported), list(failures)) if ranks)
    return min(ranks, key=lambda rank: failures[rank].timestamp)


def describe(failures: Mapping[int, Any], num_processes: int) -> str:
    """One message on why the processes ended: the cause, not what the others said when they lost it.

    Args:
        failures: Rank -> `torch.distributed.elastic`'s `ProcessFailure`.
        num_processes: How many there were.
    """
    rank = cause(failures)
    name, said = f"process {rank} of {num_processes}", _message(failures[rank])
    if said:
        return f"{name}: {said}"
    if failures[rank].exitcode < 0:
        hint = " (out of memory?)" if failures[rank].exitcode == -signal.SIGKILL else ""
        return f"{name} was ended by signal {-failures[rank].exitcode}{hint}; type the command again to go on"
    return f"{name} ended with exit code {failures[rank].exitcode}"


def _message(failure: Any) -> str:
    """What a process recorded before it ended, empty when it could not."""
    if not isinstance(failure.message, dict):
        return ""
    text: str = failure.message.get("message", "")
    kind, _, rest = text.partition(": ")
    if os.environ.get("SFT_TRACEBACK"):
        return str(failure.message.get("extraInfo", {}).get("py_callstack", text))
    return rest if kind in ("ValueError", "OSError", OutOfMemory.__name__) and rest else text


def record_failure(error: BaseException) -> None:
    """Leave a launched process's error where the launcher looks for it; print it when that one looks nowhere."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        name = f"process {os.environ.get('RANK', '0')} of {os.environ.get('WORLD_SIZE', '1')}"
        print(f"error: {name}: {redact(str(error) or type(error).__name__)}", file=sys.stderr, flush=True)
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    get_error_handler().record_exception(error)


def tie_to_launcher() -> None:
    """Have the kernel end this process when its launcher is gone, however that happened (Linux)."""
    if sys.platform.startswith("linux"):
        launcher = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        if os.getppid() != launcher:
            os.kill(os.getpid(), signal.SIGKILL)
