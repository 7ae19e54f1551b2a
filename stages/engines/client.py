"""Requests to an engine's OpenAI API: greedy answers to prompts, several at once."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from sft.evaluate.generation import Generation
from stages.engines.programs import NUM_AT_ONCE
from stages.engines.prompts import Prompt
from stages.engines.server import Running

TIMEOUT_S = 600

GREEDY: dict[str, Any] = {"temperature": 0}

OPTIONS: dict[str, dict[str, Any]] = {
    "vllm": {
        "top_p": 1.0,
        "top_k": -1,
        "repetition_penalty": 1.0,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "return_token_ids": True,
    },
    "llama_cpp": {"repeat_penalty": 1.0, "top_k": 1, "return_tokens": True, "cache_prompt": True},
    "transformers": {},
}
"""Fields of a request besides OpenAI's, by engine: nothing but the most likely token, and its special tokens too."""


class RequestFailed(ValueError):
    """An engine that refused a request; the message has its answer."""


@dataclass(frozen=True)
class Answers:
    """Answers of an engine.

    Args:
        generations: One for each prompt.
        prompt_tokens: Token ids of each prompt as the engine read it, or their number where it tells no more.
        seconds: Wall time of all.
        num_tokens: Number of generated tokens.
    """

    generations: list[Generation]
    prompt_tokens: list[list[int] | int]
    seconds: float
    num_tokens: int


def ask_all(
    engine: str,
    server: Running,
    name: str,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    on_progress: Callable[[int, int], None],
    stops: Sequence[str] = (),
) -> Answers:
    """Ask an engine all prompts.

    Args:
        engine: transformers, vllm or llama_cpp.
        server: The engine.
        name: Name of the model in requests.
        prompts: The prompts.
        max_new_tokens: Largest number of tokens of an answer, stop token included.
        on_progress: Called with the number of answers, which is 0 before the first request, and of prompts.
        stops: Texts of the stop tokens, which llama.cpp writes at the end of an answer if it writes special tokens.

    Raises:
        RequestFailed: The engine refused a request.
    """
    started = time.monotonic()
    found: list[tuple[Generation, list[int] | int]] = []
    on_progress(0, len(prompts))
    pool = ThreadPoolExecutor(NUM_AT_ONCE)
    try:
        for one in pool.map(lambda prompt: ask(engine, server, name, prompt, max_new_tokens, stops), prompts):
            found.append(one)
            on_progress(len(found), len(prompts))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    generations = [generation for generation, _ in found]
    seconds = time.monotonic() - started
    return Answers(generations, [tokens for _, tokens in found], seconds, sum(g.num_tokens for g in generations))


def ask(
    engine: str, server: Running, name: str, prompt: Prompt, max_new_tokens: int, stops: Sequence[str] = ()
) -> tuple[Generation, list[int] | int]:
    """Ask one prompt: as messages if it is a chat, else as text.

    Returns:
        The answer, and the prompt's token ids or their number, as the engine read it.
    """
    body = {"model": name, "max_tokens": max_new_tokens, **GREEDY, **OPTIONS[engine]}
    if prompt.messages is not None:
        tools = {"tools": prompt.tools, "tool_choice": "none"} if prompt.tools else {}
        path, body = "/v1/chat/completions", {**body, "messages": prompt.messages, **tools}
    else:
        path = "/v1/completions"
        body["prompt"] = prompt.text if engine == "transformers" else prompt.token_ids
    answer = post(server, path, body)
    choice, usage = answer["choices"][0], answer["usage"]
    text = choice["message"].get("content") if prompt.messages is not None else choice["text"]
    stopped = choice["finish_reason"] != "length"
    ids = choice.get("prompt_token_ids") or answer.get("prompt_token_ids")
    num_tokens = max(0, usage["completion_tokens"] - stopped)
    generation = Generation(without_stop(text or "", stops if stopped else ()), stopped, num_tokens)
    return generation, ids or int(usage["prompt_tokens"])


def without_stop(text: str, stops: Sequence[str]) -> str:
    """Return an answer without the stop token at its end, as `evaluate` records it."""
    found = next((stop for stop in stops if stop and text.endswith(stop)), "")
    return text.removesuffix(found)


def post(server: Running, path: str, body: dict[str, Any]) -> Any:
    """Send a JSON request and return the JSON answer.

    Raises:
        RequestFailed: The engine refused it, or ended.
    """
    headers = {"Authorization": f"Bearer {server.key}", "Content-Type": "application/json"}
    request = urllib.request.Request(f"{server.address}{path}", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        raise RequestFailed(f"{path} answered {error.code}: {error.read().decode(errors='replace')[:500]}") from None
    except OSError as error:
        raise RequestFailed(f"{path} got no answer: {error}; the engine has ended or is overloaded") from None
