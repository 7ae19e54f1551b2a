"""A serving engine is started, asked the held-out prompts, compared with `evaluate`, and ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from sft.evaluate.generation import Generation
from sft.evaluate.tasks import find_task
from stages import evaluate, quantize
from stages.checkout.artifacts import read_json, write_json
from stages.engines import verify
from stages.engines.asking import stop_texts
from stages.engines.client import Answers, without_stop
from stages.engines.comparison import compare
from stages.engines.programs import Served, command_of, llama_cpp, lora_rank, parser_options, vllm_python
from stages.engines.prompts import Prompt
from stages.engines.server import EngineFailed, free_port, running
from tests.stages.tiny_run import REPO, tiny_params, write_tiny_run
from tests.tiny import tiny_tokenizer

needs_llama_cpp = pytest.mark.skipif(
    not llama_cpp(REPO).ready.is_file(), reason="llama.cpp is not installed: `make engines`"
)
needs_vllm = pytest.mark.skipif(
    not (vllm_python(REPO).parents[1] / ".ready").is_file(), reason="vLLM is not installed: `make engines`"
)


def test_share_of_equal_answers_and_the_first_other_one_are_reported() -> None:
    prompts = [Prompt("a:1", "x", [1, 2]), Prompt("a:2", "y", [3], [{"role": "user", "content": "y"}])]
    given = [Generation("Rome", True, 1), Generation("Paris", False, 2)]
    recorded = [{"text": "Rome", "stopped": True}, {"text": "Paddington", "stopped": True}]
    answers = Answers(given, [[1, 2], 7], seconds=2.0, num_tokens=3)
    task = find_task("text")
    result = compare("vllm", "merged", ("tuned", recorded), prompts, answers, task, ["Rome", "Paddington"])
    figures = result.figures
    assert (figures["equal_answers"], figures["same_prompts"], figures["exact_match"]) == (0.5, 0.5, 0.5)
    assert result.first_difference == {"id": "a:2", "character": 2, "engine": "Paris", "evaluate": "Paddington"}
    assert result.rows[1] == {
        "id": "a:2",
        "text": "Paris",
        "stopped": False,
        "num_tokens": 2,
        "scores": {"exact_match": 0.0, "word_f1": 0.0, "equal_answers": 0.0, "same_prompts": 0.0},
    }
    assert result.first_prompt_difference == {"id": "a:2", "engine": 7, "evaluate": [3]}
    assert (result.num_chats, result.speed["tokens_per_second"]) == (1, 1.5)


def test_stop_token_that_an_engine_writes_is_not_part_of_the_answer(tmp_path: Path) -> None:
    paths = write_tiny_run(tmp_path)
    stops = stop_texts(paths, tiny_tokenizer())
    assert stops[0] == "<|im_end|>"
    assert without_stop("Rome<|im_end|>", stops) == "Rome"
    assert without_stop("Rome<|im_end|> ", stops) == "Rome<|im_end|> "
    assert without_stop("Rome<|im_end|>", ()) == "Rome<|im_end|>"


def test_missing_engine_and_a_model_that_it_does_not_serve_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFT_ENGINES", str(tmp_path / "none"))
    paths = write_tiny_run(tmp_path)
    with pytest.raises(ValueError, match=r"the engine vllm is not installed, .*: `make engines` installs"):
        verify.run(tiny_params(), paths, "vllm", None)
    with pytest.raises(ValueError, match="--model gguf: transformers serves merged or quantized"):
        verify.run(tiny_params(), paths, "transformers", "gguf")


def test_engine_that_ends_shows_its_last_lines(tmp_path: Path) -> None:
    command = command_of("llama_cpp", Served("gguf", tmp_path / "none.gguf", "m"), tmp_path, free_port())
    command.words[:] = [sys.executable, "-c", "raise SystemExit('no memory left')"]
    failed = pytest.raises(EngineFailed, match=r"the engine llama_cpp ended; its last lines:\n  no memory left")
    with failed, running("llama_cpp", command, 9):
        pass


def test_options_of_vllm_follow_the_adapter_and_the_template(tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA", "r": 24, "rank_pattern": {"q_proj": 40}})
    assert lora_rank(tmp_path) == 64
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA", "r": 8, "use_dora": True})
    with pytest.raises(ValueError, match="has DoRA, which vLLM does not load: serve the merged model instead"):
        lora_rank(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("<tool_call> <think> {% if enable_thinking %}")
    tools = ["--tool-call-parser", "hermes", "--enable-auto-tool-choice"]
    assert parser_options(tmp_path) == [*tools, "--reasoning-parser", "qwen3"]


@pytest.mark.slow
@needs_llama_cpp
def test_llama_cpp_answers_as_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SFT_ENGINES", str(llama_cpp(REPO).folder.parent))
    paths, params = write_tiny_run(tmp_path), tiny_params(quantize={"method": "none", "export_gguf": ["f32"]})
    quantize.run(params, paths)
    evaluate.run(params, paths)
    assert verify.run(params, paths, "llama_cpp", None) == 0
    result = read_json(paths.root / "reports" / "engines" / "llama_cpp-gguf-f32.json")
    assert (result["figures"]["equal_answers"], result["figures"]["same_prompts"]) == (1.0, 1.0)


@pytest.mark.slow
@needs_vllm
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("model", ["merged", "adapter"])
def test_vllm_answers_as_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    monkeypatch.setenv("SFT_ENGINES", str(llama_cpp(REPO).folder.parent))
    paths, params = write_tiny_run(tmp_path), tiny_params(quantize={"method": "none"})
    evaluate.run(params, paths)
    assert verify.run(params, paths, "vllm", model) == 0
    result = read_json(paths.root / "reports" / "engines" / f"vllm-{model}.json")
    assert (result["figures"]["equal_answers"], result["figures"]["same_prompts"]) == (1.0, 1.0)


def test_a_killed_caller_leaves_no_engine(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = f"import os, time, pathlib; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    code = (
        "from stages.engines.programs import Command\nfrom stages.engines.server import running\n"
        f"import sys\nwith running('vllm', Command([sys.executable, '-c', {child!r}]), 9):\n    pass"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=REPO, env={**os.environ, "PYTHONPATH": str(REPO)})
    deadline = time.monotonic() + 60
    while not (pid_file.exists() and pid_file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    engine = psutil.Process(int(pid_file.read_text()))
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    engine.wait(timeout=30)
