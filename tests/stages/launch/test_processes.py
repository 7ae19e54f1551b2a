"""A training in several real processes: what it writes, and how it ends if one of them fails."""

from __future__ import annotations

import csv
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from datasets import Dataset
from ruamel.yaml import YAML
from safetensors.torch import load_file

from stages.checkout.artifacts import read_json
from stages.checkout.paths import Paths
from stages.launch.engines import SETTINGS, engine_file
from stages.launch.processes import describe, launch, machine_rank, rendezvous_address
from stages.params.schema import ENGINES, ParamsError, load_params
from tests.stages.training_root import (
    ENDLESS,
    NUM_ROWS,
    REPO,
    launch_section,
    make_training_root,
    packed_row,
    run_stage,
    set_params,
    start_stage,
    train_here,
)

TWO = {"processes": 2}
WEIGHTS = {"lora": "adapter_model.safetensors", "full": "model.safetensors"}


def curve(paths: Paths) -> list[dict[str, str]]:
    with paths.out("train", "curve.csv").open() as file:
        return list(csv.DictReader(file))


def assert_same_training(found: Paths, expected: Paths, method: str) -> None:
    weights, others = (load_file(paths.out("train", "model", WEIGHTS[method])) for paths in (found, expected))
    assert weights.keys() == others.keys()
    assert max(float((weights[name] - others[name]).abs().max()) for name in weights) < 1e-5
    assert read_json(found.metrics("train")) == pytest.approx(read_json(expected.metrics("train")), abs=1e-5)
    assert len(curve(found)) == len(curve(expected)) == 8
    for row, other in zip(curve(found), curve(expected), strict=True):
        assert float(row["loss"]) == pytest.approx(float(other["loss"]), abs=1e-5)
        assert row["num_input_tokens_seen"] == other["num_input_tokens_seen"]


def test_two_processes_write_what_one_does(tmp_path: Path) -> None:
    one = make_training_root(tmp_path / "one")
    train_here(one)
    two = make_training_root(tmp_path / "two", per_device_train_batch_size=2, launch=TWO)
    output = run_stage(two)
    assert_same_training(two, one, "lora")
    assert output.count("train: 8 of 8 steps (100 %), loss") == 2, output
    assert "Warning" not in output


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("method", ["lora", "full"])
def test_fsdp2_trains_resumes_with_other_numbers_of_processes_and_merges_to_the_same(
    tmp_path: Path, method: str
) -> None:
    one = make_training_root(tmp_path / "one", method=method)
    run_stage(one)
    run_stage(one, "merge")
    shared = make_training_root(tmp_path / "shared", method=method)
    for processes, resumed in ((2, None), (1, "checkpoint-6"), (4, "checkpoint-6")):
        launch = {"processes": processes, "engine": "fsdp2"}
        set_params(shared.root, method=method, per_device_train_batch_size=4 // processes, launch=launch)
        output = run_stage(shared)
        assert ("resuming from checkpoint-6" in output) == (resumed is not None), output
        assert_same_training(shared, one, method)
        (last,) = (shared.state / "train").glob("*/checkpoint-8")
        shutil.rmtree(last)
    run_stage(shared, "merge")
    merged, expected = (load_file(paths.out("merge", "model", "model.safetensors")) for paths in (shared, one))
    assert merged.keys() == expected.keys()
    assert max(float((merged[name] - expected[name]).abs().max()) for name in merged) < 1e-5


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_ddp_goes_on_with_another_number_of_processes(tmp_path: Path, before: int, after: int) -> None:
    one = make_training_root(tmp_path / "one")
    run_stage(one)
    shared = make_training_root(tmp_path / "shared")
    for processes, resumed in ((before, False), (after, True)):
        set_params(shared.root, per_device_train_batch_size=4 // processes, launch={"processes": processes})
        output = run_stage(shared)
        assert ("resuming from checkpoint-6" in output) == resumed, output
        assert_same_training(shared, one, "lora")
        (last,) = (shared.state / "train").glob("*/checkpoint-8")
        shutil.rmtree(last)
        shutil.rmtree(shared.out("train"))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_machines_meet_at_the_address_of_the_first(tmp_path: Path) -> None:
    one = make_training_root(tmp_path / "one")
    run_stage(one)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    launch = {"processes": 2, "machines": 2, "address": "127.0.0.1", "port": port}
    two = make_training_root(tmp_path / "two", per_device_train_batch_size=2, launch=launch)
    # both train on this machine's processor, which one training has for itself
    second = start_stage(two, SFT_MACHINE_RANK="1", SFT_LOCK_DIR=str(tmp_path / "locks"))
    run_stage(two, SFT_MACHINE_RANK="0")
    output, _ = second.communicate(timeout=200)
    assert second.returncode == 0, output
    assert_same_training(two, one, "lora")


def workers(stage: subprocess.Popen[str], count: int = 2) -> list[psutil.Process]:
    """The stage's training processes, once they train."""
    assert stage.stdout is not None
    for line in stage.stdout:
        if line.startswith("train: 2 of "):
            break
    children = [child for child in psutil.Process(stage.pid).children() if "--root" in child.cmdline()]
    assert len(children) == count
    return children


def errors_said(output: str) -> list[str]:
    """Return the error lines; progress lines of other processes may follow them."""
    return [line for line in output.splitlines() if line.startswith("error: ")]


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=30)
    assert alive == []


def test_a_process_that_fails_ends_the_others_and_its_error_is_the_one_message(tmp_path: Path) -> None:
    paths = make_training_root(tmp_path, per_device_train_batch_size=2, launch=TWO, **ENDLESS)
    rows = [packed_row(number) for number in range(NUM_ROWS)]
    rows[7]["seq_lengths"] = [1, 2]  # the process that gets this row can't join its batch, the other one waits for it
    shutil.rmtree(paths.out("pack", "train"))
    Dataset.from_list(rows).save_to_disk(str(paths.out("pack", "train")))
    output = run_stage(paths, code=1)
    (message,) = errors_said(output)
    assert message.startswith("error: process ")
    assert "'seq_lengths' of row" in message
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_killed_process_ends_the_others_and_is_named(tmp_path: Path) -> None:
    paths = make_training_root(tmp_path, per_device_train_batch_size=2, launch=TWO, **ENDLESS)
    stage = start_stage(paths)
    processes = workers(stage)
    processes[1].kill()
    output, _ = stage.communicate(timeout=60)
    assert stage.returncode == 137  # flows try again
    (message,) = errors_said(output)
    assert message.startswith("error: process ")
    assert "was ended by signal 9 (out of memory?)" in message
    assert_gone(processes)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ending_the_stage_ends_all_its_processes(tmp_path: Path, number: signal.Signals) -> None:
    paths = make_training_root(tmp_path, per_device_train_batch_size=2, launch=TWO, **ENDLESS)
    stage = start_stage(paths)
    processes = workers(stage)
    stage.send_signal(number)
    stage.communicate(timeout=60)
    # 75: the training has saved a checkpoint within its grace
    assert stage.returncode in (-signal.SIGKILL, 75, 128 + signal.SIGTERM)
    assert_gone(processes)


def failure(text: str | None = None, exitcode: int = 1, timestamp: int = 0) -> SimpleNamespace:
    message = {"message": text, "extraInfo": {}} if text else "To enable traceback see"
    return SimpleNamespace(message=message, exitcode=exitcode, timestamp=timestamp)


def test_the_message_is_the_cause_and_not_what_the_others_said_when_they_lost_it() -> None:
    lost = failure("RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer", timestamp=1)
    assert describe({0: lost, 1: failure("ValueError: bad row", timestamp=2)}, 2) == "process 1 of 2: bad row"
    assert "process 1 of 2 was ended by signal 9" in describe({0: lost, 1: failure(exitcode=-9, timestamp=2)}, 2)
    assert "Connection closed" in describe({0: lost, 1: failure(exitcode=-15, timestamp=2)}, 2)
    assert describe({3: failure(exitcode=7)}, 4) == "process 3 of 4 ended with exit code 7"


def test_which_machine_this_is_comes_from_params_or_from_the_environment() -> None:
    several = launch_section(processes=4, machines=2, port=29500)
    assert machine_rank(several, {"SLURM_NODEID": "1"}) == 1
    assert machine_rank(launch_section(processes=4, machines=2, machine_rank=1), {"SLURM_NODEID": "0"}) == 1
    with pytest.raises(ValueError, match="which one is this"):
        machine_rank(several, {})
    with pytest.raises(ValueError, match="JOB_COMPLETION_INDEX is 2"):
        machine_rank(several, {"JOB_COMPLETION_INDEX": "2"})
    assert rendezvous_address(several, {"MASTER_ADDR": "node0"}) == "node0"
    with pytest.raises(ValueError, match=r"train\.launch\.address"):
        rendezvous_address(several, {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": "fsdp"}, "did you mean 'fsdp2'"),
        ({"processes": 3, "machines": 2}, "can't be shared equally"),
        ({"address": "node0"}, "would be ignored on one machine"),
    ],
)
def test_impossible_launches_are_refused_with_params(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    set_params(tmp_path, launch=values)
    with pytest.raises(ParamsError, match=message):
        load_params(tmp_path / "params.yaml")


def test_every_engine_of_params_has_settings() -> None:
    assert tuple(SETTINGS) == ENGINES


def test_an_engine_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        engine_file(launch_section(engine="mine.yaml"), tmp_path, tmp_path)
    with pytest.raises(ValueError, match="needs the package deepspeed"):
        engine_file(launch_section(engine="deepspeed_zero3"), tmp_path, tmp_path)


@pytest.mark.slow
def test_a_launcher_of_ones_own_must_start_as_many_processes_as_params_state(tmp_path: Path) -> None:
    paths = make_training_root(tmp_path)
    error_file = tmp_path / "error.json"
    variables = {"LOCAL_RANK": "0", "WORLD_SIZE": "4", "TORCHELASTIC_ERROR_FILE": str(error_file)}
    run_stage(paths, code=1, **variables)
    assert "a launcher started 4 processes" in read_json(error_file)["message"]["message"]
    output = run_stage(paths, code=1, LOCAL_RANK="0", RANK="3", WORLD_SIZE="4")
    assert "error: process 3 of 4: train.launch.processes is 1" in output


# what `accelerate config` writes for FSDP2 on one machine
WRITTEN_FILE = """\
compute_environment: LOCAL_MACHINE
debug: false
distributed_type: FSDP
downcast_bf16: 'no'
enable_cpu_affinity: false
fsdp_config:
  fsdp_activation_checkpointing: false
  fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP
  fsdp_cpu_ram_efficient_loading: true
  fsdp_offload_params: false
  fsdp_reshard_after_forward: true
  fsdp_state_dict_type: SHARDED_STATE_DICT
  fsdp_version: 2
machine_rank: 0
main_training_function: main
mixed_precision: 'no'
num_machines: 1
num_processes: 2
rdzv_backend: static
same_network: true
tpu_env: []
tpu_use_cluster: false
tpu_use_sudo: false
use_cpu: false
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("content", [WRITTEN_FILE, "distributed_type: MULTI_CPU\nuse_cpu: true\n"], ids=["fsdp", "cpu"])
def test_a_file_of_accelerate_is_an_engine(tmp_path: Path, content: str) -> None:
    one = make_training_root(tmp_path / "one")
    run_stage(one)
    launch = {"processes": 2, "engine": "mine.yaml"}
    two = make_training_root(tmp_path / "two", per_device_train_batch_size=2, launch=launch)
    (two.root / "mine.yaml").write_text(content)
    assert "starting 2 processes: mine.yaml" in run_stage(two)
    assert_same_training(two, one, "lora")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("distributed_type: NO\n", "does not start several processes"),
        ("distributed_type: 'XLA'\n", "distributed_type is XLA"),
        ("distributed_type: DEEPSPEED\n", r"mine\.yaml: distributed_type DEEPSPEED needs the package deepspeed"),
        (
            WRITTEN_FILE.replace("num_processes: 2", "num_processes: 8"),
            "num_processes is 8, but train.launch.processes 2",
        ),
        (
            WRITTEN_FILE.replace("precision: 'no'", "precision: bf16"),
            "mixed_precision is 'bf16', but model.dtype decides",
        ),
        (WRITTEN_FILE + "main_process_port: 7\n", r"main_process_port is 7, but train\.launch\.port"),
        (WRITTEN_FILE + "dynamo_config: {dynamo_backend: INDUCTOR}\n", "does not compile"),
        (WRITTEN_FILE + "fsdp_konfig: {}\n", "fsdp_konfig"),
        ("a: [\n", r"mine\.yaml can't be read as YAML"),
        ("- a\n", r"mine\.yaml contains no settings"),
        ("", r"mine\.yaml contains no settings"),
    ],
)
def test_a_file_of_accelerate_that_can_not_be_followed_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        launch("train", launch_section(engine="mine.yaml", processes=2), Paths(tmp_path))


@pytest.mark.parametrize("name", ["slurm.sh", "kubernetes.yaml"])
def test_values_that_the_cluster_templates_ask_for_are_valid(name: str) -> None:
    text = (REPO / "docs" / "launch" / name).read_text(encoding="utf-8")
    (values,) = re.findall(r"train\.launch: (\{.*\})", text)
    stated = launch_section(**YAML(typ="safe").load(values))
    assert stated.machines == {"slurm.sh": 8, "kubernetes.yaml": 2}[name]
    assert stated.processes == 8 * stated.machines
    assert stated.machine_rank is None, "the cluster says which machine is which"


def test_pods_of_the_kubernetes_job_find_the_first_one_by_its_name() -> None:
    documents = (REPO / "docs" / "launch" / "kubernetes.yaml").read_text(encoding="utf-8")
    service, job = YAML(typ="safe").load_all(documents)
    pod = job["spec"]["template"]["spec"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    address = {"name": "MASTER_ADDR", "value": f"{job['metadata']['name']}-0.{pod['subdomain']}"}
    assert address in pod["containers"][0]["env"]
