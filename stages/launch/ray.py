"""A stage in workers of Ray Train: as many as `accelerate launch` would start, on machines that Ray chooses."""

from __future__ import annotations

import importlib
import importlib.util
import io
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TextIO

import stages
from stages.checkout.paths import Paths
from stages.launch.log_noise import reduce_log_noise
from stages.launch.stopping import STOP_FILE_VARIABLE, grace_s, patience_s
from stages.params.schema import LaunchSection, load_params

_WORKER = re.compile(r"^\(RayTrainWorker [^)]*\) ?")
_QUIET = (
    "RAY_COLOR_PREFIX",
    "RAY_DEDUP_LOGS",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER",  # it asks the dashboard, which is not started
    "RAY_TRAIN_ENABLE_PRINT_PATCH",
    "RAY_USAGE_STATS_ENABLED",
)
_CODE = Path(stages.__file__).resolve().parent.parent


class WorkerFailure(NamedTuple):
    """How a worker ended, with the fields of `ProcessFailure` of `torch.distributed.elastic`."""

    message: dict[str, Any] | str
    exitcode: int = 1
    timestamp: int = 0


class WorkersFailed(RuntimeError):
    """Some workers failed.

    Args:
        failures: Rank -> how the worker ended.
    """

    def __init__(self, failures: Mapping[int, WorkerFailure]) -> None:
        super().__init__(f"workers {sorted(failures)} failed")
        self.failures = failures


class WorkerError(RuntimeError):
    """Error of a worker as text, since the class of the original error may not exist where this one is unpickled.

    Args:
        message: Class name and text of the error.
        callstack: Its traceback.
    """

    def __init__(self, message: str, callstack: str) -> None:
        super().__init__(message, callstack)
        self.message, self.callstack = message, callstack


class WorkerLines(io.TextIOBase):
    """Stream that removes the prefix which Ray puts before each line of a worker.

    Args:
        stream: Where the lines are written.
        only_workers: Drop lines that Ray itself prints.
    """

    def __init__(self, stream: TextIO, *, only_workers: bool) -> None:
        self.stream, self.only_workers = stream, only_workers
        self._passing = True

    def write(self, text: str) -> int:
        """Write a line, or its line break, which Ray writes separately."""
        shown = _WORKER.sub("", text)
        if text.strip():
            self._passing = not self.only_workers or shown != text
        if self._passing:
            self.stream.write(shown)
            self.stream.flush()
        return len(text)


def launch_with_ray(stage: str, section: LaunchSection, paths: Paths, variables: Mapping[str, str]) -> None:
    """Run a stage in `section.processes` workers of Ray Train and wait for all of them.

    Args:
        stage: Name of the stage.
        section: Section `train.launch` of params.yaml. Without `address`, and without RAY_ADDRESS in the environment,
            Ray is started on this machine and stopped after the stage.
        paths: The checkout; all machines of a cluster must see it at the same path.
        variables: Environment variables of the workers.

    Raises:
        ValueError: Ray is not installed, can't be reached, or ended the training.
        WorkersFailed: Some workers failed.
        SystemExit: A signal ended this process, after the workers were ended.
    """
    if importlib.util.find_spec("ray") is None:
        raise ValueError(
            "train.launch.launcher ray needs the package ray, which is not installed; `pip install '.[ray]'`, or use "
            "accelerate"
        )
    for name in _QUIET:
        os.environ.setdefault(name, "0")  # Ray reads them on import
    print(f"starting {section.processes} workers of Ray Train: {section.engine}", flush=True)
    quiet = not os.environ.get("SFT_TRACEBACK")
    out, err = (WorkerLines(stream, only_workers=quiet) for stream in (sys.stdout, sys.stderr))
    paths.state.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="ray-", dir=paths.state) as storage,
        redirect_stdout(out),
        redirect_stderr(err),
        connected(section),
        ending_with_signals(Path(storage) / "stop"),
    ):
        stop_file = {STOP_FILE_VARIABLE: str(Path(storage) / "stop")}
        train_with_ray(stage, section, paths, storage, {**variables, **stop_file})


@contextmanager
def ending_with_signals(stop_file: Path) -> Iterator[None]:
    """Pass SIGTERM on to the workers of Ray within the block, by a file: they save a checkpoint and stop.

    If they have not stopped in time, SystemExit is raised, so that Ray's processes are ended; Ray's own handler aborts.

    Args:
        stop_file: File that the workers look for after each step.
    """
    codes: list[int] = []
    patience = patience_s(grace_s())

    def ask_workers(number: int, frame: FrameType | None) -> None:
        if not stop_file.exists():
            stop_file.touch()
            signal.setitimer(signal.ITIMER_REAL, patience)

    def exit_with_code(number: int, frame: FrameType | None) -> None:
        codes.append(128 + signal.SIGTERM)
        sys.exit(codes[-1])

    before = signal.signal(signal.SIGTERM, ask_workers), signal.signal(signal.SIGALRM, exit_with_code)
    try:
        yield
    except SystemExit:
        if codes:  # Ray may have replaced the exit code while it waited
            sys.exit(codes[-1])
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGALRM, before[1])


@contextmanager
def connected(section: LaunchSection) -> Iterator[None]:
    """Connect to the cluster that is named, or start Ray on this machine and stop it after the block.

    Raises:
        ValueError: The cluster can't be reached, or has too few devices.
    """
    import ray

    address = section.address or os.environ.get("RAY_ADDRESS")
    folder = None
    try:
        if address:
            ray.init(address, logging_level="error", runtime_env={"env_vars": {"PYTHONPATH": str(_CODE)}})
        else:
            folder = tempfile.mkdtemp(prefix="sft-ray-")
            cpus = max(os.cpu_count() or 1, section.processes)
            ray.init("local", num_cpus=cpus, include_dashboard=False, logging_level="error", _temp_dir=folder)
        check_resources(section, ray.cluster_resources(), address or "this machine")
        yield
    except ConnectionError as error:
        raise ValueError(f"the Ray cluster at {address} can't be reached: {error}") from None
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def check_resources(section: LaunchSection, resources: Mapping[str, float], where: str) -> None:
    """Check that there is a device for each worker, as Ray would wait for missing ones forever.

    Args:
        section: Section `train.launch` of params.yaml.
        resources: Name of a resource -> amount that Ray has.
        where: Address of the cluster, for the message.

    Raises:
        ValueError: There are too few devices.
    """
    kind = "GPU" if resources.get("GPU") else "CPU"
    found = int(resources.get(kind, 0))
    if found < section.processes:
        raise ValueError(
            f"train.launch.processes is {section.processes}, but Ray on {where} has {found} {kind}s; lower it, or add "
            "machines to the cluster"
        )


def train_with_ray(
    stage: str, section: LaunchSection, paths: Paths, storage: str, variables: Mapping[str, str]
) -> None:
    """Run the stage in workers of the Ray that this process is connected to.

    Args:
        stage: Name of the stage.
        section: Section `train.launch` of params.yaml.
        paths: The checkout.
        storage: Folder for the files of Ray Train.
        variables: Environment variables of the workers.

    Raises:
        WorkersFailed: Some workers failed.
        ValueError: Ray ended the training for another reason.
    """
    import ray
    from ray.train import LoggingConfig, RunConfig, ScalingConfig, TrainingFailedError, WorkerGroupError
    from ray.train.torch import TorchTrainer

    run_config = RunConfig(
        name=stage,
        storage_path=storage,
        worker_runtime_env={"env_vars": dict(variables)},
        logging_config=LoggingConfig(log_level="INFO" if os.environ.get("SFT_TRACEBACK") else "CRITICAL"),
    )
    trainer = TorchTrainer(
        run_in_worker,
        train_loop_config={"stage": stage, "root": str(paths.root)},
        scaling_config=ScalingConfig(num_workers=section.processes, use_gpu=bool(ray.cluster_resources().get("GPU"))),
        run_config=run_config,
    )
    try:
        trainer.fit()
    except WorkerGroupError as error:
        raise WorkersFailed({rank: worker_failure(end) for rank, end in error.worker_failures.items()}) from None
    except TrainingFailedError as error:
        raise ValueError(f"Ray Train ended the training: {error}") from None


def run_in_worker(config: Mapping[str, str]) -> None:
    """Run a stage as one of several processes, in a worker of Ray.

    Args:
        config: Name of the stage (`stage`) and path of the checkout (`root`).

    Raises:
        WorkerError: The stage raised an error.
    """
    root = Path(config["root"])
    os.chdir(root)  # Ray starts workers in a folder for their files
    reduce_log_noise()
    logging.getLogger().setLevel(logging.WARNING)  # Ray sets a lower level
    try:
        importlib.import_module(f"stages.{config['stage']}").run(load_params(root / "params.yaml"), Paths(root))
    except BaseException as error:
        raise WorkerError(f"{type(error).__name__}: {error}", traceback.format_exc()) from None


def worker_failure(error: BaseException) -> WorkerFailure:
    """Return how a worker ended: with the error that it raised, or killed if there is none."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, WorkerError):
            return WorkerFailure({"message": cause.message, "extraInfo": {"py_callstack": cause.callstack}})
        cause = getattr(cause, "cause", None) or cause.__cause__
    return WorkerFailure("", exitcode=-signal.SIGKILL)
