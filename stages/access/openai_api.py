"""OpenAI's conventions for `transformers serve`: names, tool calls, `finish_reason`, error bodies, refused options."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import AsyncIterable, AsyncIterator, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from openai.types.chat import ChatCompletionMessageFunctionToolCall
from openai.types.chat.chat_completion_message_function_tool_call import Function
from openai.types.completion_usage import CompletionUsage
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.routing import Route
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import (
    ReasoningText,
    ToolCall,
    build_response_parser,
    response_events_to_chunks,
)

from stages.access.answers import CALL_FORMATS, REASONING_MARKS, AnswerParser

NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
    "functions": ([],),
    "function_call": ("auto",),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
}
"""Options that the server ignores though they would change the answer -> values with which they change nothing."""

STREAM_ERROR = 'data: {"error": "'
"""How the server begins the event of a generation that failed; the message is not escaped as JSON needs it."""

TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
}


PROMPT_END = 32
"""Tokens of a prompt in which the beginning of the reasoning is looked for."""

_PARSES_CALLS: ContextVar[bool] = ContextVar("parses_calls", default=False)


class RequestError(HTTPException):
    """A request that can't be answered.

    Args:
        status: Status of the answer.
        message: What is wrong, and the way out.
        param: Field of the request that is wrong.
        code: OpenAI's name of the error.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(status, message)
        self.param, self.code = param, code


@dataclass(frozen=True)
class Forms:
    """How a model writes what is not text.

    Args:
        calls: Name of the form of tool calls, such as `hermes`; None if it has none.
        reasoning: Name of the form of reasoning.
        plain: Whether answers stay as the model writes them.
    """

    calls: str | None = None
    reasoning: str | None = None
    plain: bool = False


class ChatCompletions(ChatCompletionHandler):
    """Handler that checks requests, finds tool calls and reasoning, and reports `stop` where a stop token ends."""

    forms = Forms()

    def _validate_request(self, body: dict[str, Any]) -> None:
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            raise RequestError(400, "`messages` must be a list of at least one message", "messages")
        for number, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise RequestError(400, f"`messages[{number}]` must have a `role`", f"messages[{number}]")
        for name, values in NEUTRAL.items():
            if body.get(name) is not None and body[name] not in values:
                wanted = "leave it out" if not values else f"leave it out or send {values[0]!r}"
                raise RequestError(
                    400, f"`{name}` is not supported by this server: {wanted}", name, "unsupported_parameter"
                )
        for name in ("max_tokens", "max_completion_tokens"):
            value = body.get(name)
            if value is not None and (type(value) is not int or value < 1):
                raise RequestError(400, f"`{name}` is {value!r}; it must be an integer of at least 1", name)
        super()._validate_request(body)

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Any:
        """Answer a request; with `tool_choice: none` calls stay text."""
        if isinstance(body.get("messages"), list):  # clients state fields that a message does not have as null
            body = {**body, "messages": [_stated(message) for message in body["messages"]]}
        if self.forms.calls == "mistral":
            body = {**body, "messages": with_short_ids(body.get("messages"))}
        parses_calls = bool(body.get("tools")) and body.get("tool_choice") != "none"
        token = _PARSES_CALLS.set(parses_calls)
        try:
            return await super().handle_request(body, request_id)
        finally:
            _PARSES_CALLS.reset(token)

    async def _non_streaming(
        self,
        request_id: str,
        model: Any,
        processor: Any,
        model_id: str,
        inputs: Any,
        gen_config: Any,
        gen_manager: Any,
        tools: Any = None,
    ) -> JSONResponse:
        text, length, ids = await gen_manager.generate_non_streaming(
            model, processor, inputs, gen_config, request_id=request_id
        )
        parser = self._parser(processor, model, inputs, tools)
        parts = [text]
        if parser is not None:
            # of transformers' parser: a call that it can't read
            with suppress(ValueError, KeyError, TypeError):
                parts = _parts(parser, getattr(processor, "tokenizer", processor).decode(ids))
        content = "".join(part for part in parts if type(part) is str)
        reasoning = "".join(part for part in parts if isinstance(part, ReasoningText))
        calls = [
            ChatCompletionMessageFunctionToolCall(
                id=f"{request_id}_tool_call_{number}",
                type="function",
                function=Function(name=part.name, arguments=part.arguments),
            )
            for number, part in enumerate(part for part in parts if isinstance(part, ToolCall))
        ]
        limit = gen_config.max_new_tokens
        is_cut = limit is not None and len(ids) >= limit and int(ids[-1]) not in _stop_ids(model, gen_config)
        answer = self._build_completion(
            request_id,
            content if content or not calls else None,
            model_id,
            finish_reason="tool_calls" if calls else "length" if is_cut else "stop",
            usage=CompletionUsage(prompt_tokens=length, completion_tokens=len(ids), total_tokens=length + len(ids)),
            tool_calls=calls or None,
            reasoning_content=reasoning or None,
        )
        return JSONResponse(answer)

    def _streaming(
        self,
        request_id: str,
        model: Any,
        processor: Any,
        model_id: str,
        inputs: Any,
        gen_config: Any,
        gen_manager: Any,
        tools: Any = None,
    ) -> Any:
        manager = _Stopped(gen_manager, self._parser(processor, model, inputs, tools))
        response = super()._streaming(
            request_id, model, processor, model_id, inputs, gen_config, gen_manager=manager, tools=tools
        )
        response.body_iterator = _as_openai_ends_it(response.body_iterator)
        return response

    def _parser(self, processor: Any, model: Any, inputs: Any, tools: Any) -> Any:
        """Return the parser of one answer, for the template's forms or by transformers; None if all of it is text."""
        if self.forms.plain:
            return None
        tokenizer = getattr(processor, "tokenizer", processor)
        if self.forms.calls not in CALL_FORMATS and self.forms.reasoning not in REASONING_MARKS:
            return build_response_parser(processor, model, inputs["input_ids"], tools=tools)
        calls = CALL_FORMATS.get(self.forms.calls or "") if _PARSES_CALLS.get() else None
        reasoning = REASONING_MARKS.get(self.forms.reasoning or "")
        if calls is None and reasoning is None:
            return None
        special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(tokenizer.all_special_tokens)
        prompt = tokenizer.decode(inputs["input_ids"].reshape(-1)[-PROMPT_END:])
        return AnswerParser(calls, reasoning, special, prompt, tools or ())


def _parts(parser: Any, text: str) -> list[Any]:
    """Return the parts of a whole answer: text, reasoning and calls."""
    return list(response_events_to_chunks([*parser.initial_events, *parser.feed(text), *parser.finalize()[1]]))


def _stated(message: Any) -> Any:
    return {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else message


def with_short_ids(messages: Any) -> Any:
    """Return messages whose calls have ids of nine letters and digits, as Mistral's templates ask for.

    Ids that are equal stay equal, so that a result still belongs to its call.
    """
    if not isinstance(messages, list):
        return messages

    def short(value: Any) -> Any:
        is_id = isinstance(value, str) and not re.fullmatch(r"[a-zA-Z0-9]{9}", value)
        return hashlib.sha256(value.encode()).hexdigest()[:9] if is_id else value

    found = []
    for message in messages:
        if isinstance(message, dict) and isinstance(message.get("tool_calls"), list):
            calls = [
                {**call, "id": short(call["id"])} if isinstance(call, dict) and "id" in call else call
                for call in message["tool_calls"]
            ]
            message = {**message, "tool_calls": calls}
        if isinstance(message, dict) and "tool_call_id" in message:
            message = {**message, "tool_call_id": short(message["tool_call_id"])}
        found.append(message)
    return found


async def _as_openai_ends_it(parts: AsyncIterable[Any]) -> AsyncIterator[str]:
    """Yield the events of a stream, an error in OpenAI's shape, and `[DONE]` as the last event."""
    async for part in parts:
        before, found, message = str(part).rpartition(STREAM_ERROR)
        if found:
            body = error_body(500, message.removesuffix('"}\n\n'))
            yield f"{before}data: {json.dumps(body)}\n\n"
        else:
            yield str(part)
    yield "data: [DONE]\n\n"


class _Stopped:
    """Manager of generations that raises the limit of one that has ended in a stop token.

    The handler calls an answer that is as long as the limit cut off, also where its last token is a stop token.

    Args:
        manager: The manager that generates.
        parser: The parser of the answer; None if it is text.
    """

    def __init__(self, manager: Any, parser: Any) -> None:
        self._manager, self._parser = manager, parser

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, response_parser: Any = None
    ) -> Any:
        queue, streamer = self._manager.generate_streaming(
            model, processor, inputs, gen_config, request_id=request_id, response_parser=self._parser
        )
        put, stops = streamer.put, _stop_ids(model, gen_config)

        def put_and_look(value: Any) -> None:
            put(value)
            if streamer.total_tokens and int(value.reshape(-1)[-1]) in stops:
                gen_config.max_new_tokens = streamer.total_tokens + 1

        streamer.put = put_and_look
        return queue, streamer


def _stop_ids(model: Any, config: Any) -> set[int]:
    ids = config.eos_token_id if config.eos_token_id is not None else model.generation_config.eos_token_id
    return set() if ids is None else {ids} if isinstance(ids, int) else set(ids)


def adapt(server: Any, name: str, aliases: tuple[str, ...], page: str, forms: Forms) -> FastAPI:
    """Make a prepared `transformers serve` follow OpenAI's conventions, and serve a page at `/`.

    Args:
        server: A `transformers.cli.serve.Serve` that is pinned to one model.
        name: Name of the model in requests and answers.
        aliases: Other names by which requests may call it.
        page: HTML of the page.
        forms: How the model writes tool calls and reasoning.

    Returns:
        The server's application.
    """
    app: FastAPI = server.server.config.app
    server._chat_handler.__class__ = ChatCompletions  # `Serve` has no argument for it
    server._chat_handler.forms = forms
    for handler in (server._chat_handler, server._completion_handler, server._response_handler):
        handler._resolve_model = _by_short_name(handler._resolve_model, name, aliases)
    card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "sft"}

    async def list_models(request: Request) -> JSONResponse:
        return JSONResponse({"object": "list", "data": [card]})

    async def show_model(request: Request) -> JSONResponse:
        check_model(request.path_params["model"], name, aliases)
        return JSONResponse(card)

    async def show_page(request: Request) -> HTMLResponse:
        return HTMLResponse(page, headers={"cache-control": "no-store"})

    app.router.routes[:0] = [
        Route("/", show_page),
        Route("/v1/models", list_models),
        Route("/v1/models/{model:path}", show_model),
    ]
    app.add_exception_handler(StarletteHTTPException, _http_error)
    app.add_exception_handler(RequestValidationError, _invalid_body)
    app.add_exception_handler(ValueError, _invalid_value)
    app.add_exception_handler(Exception, _failure)
    return app


def check_model(requested: Any, name: str, aliases: tuple[str, ...]) -> None:
    """Check that a request is for the model that is served.

    Raises:
        RequestError: It is for another one.
    """
    if requested is not None and requested not in (name, *aliases):
        raise RequestError(
            404, f"the model {requested!r} is not served; this server has {name!r}", "model", "model_not_found"
        )


def _by_short_name(resolve: Any, name: str, aliases: tuple[str, ...]) -> Any:
    def resolve_by_short_name(body: dict[str, Any]) -> tuple[str, Any, Any]:
        check_model(body.get("model"), name, aliases)
        _, model, processor = resolve({**body, "model": None})
        return name, model, processor

    return resolve_by_short_name


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the body of an answer to a request that failed, in OpenAI's shape."""
    kind = TYPES.get(HTTPStatus(status), "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


async def _http_error(request: Request, error: Any) -> JSONResponse:
    detail = error.detail if isinstance(error.detail, str) else str(error.detail)
    body = error_body(error.status_code, detail, getattr(error, "param", None), getattr(error, "code", None))
    return JSONResponse(body, error.status_code)


async def _invalid_body(request: Request, error: Any) -> JSONResponse:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    return JSONResponse(error_body(400, f"{place}: {first['msg']}"), 400)


async def _invalid_value(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(400, str(error)), 400)


async def _failure(request: Request, error: Exception) -> JSONResponse:
    return JSONResponse(error_body(500, f"{type(error).__name__}: {error}"), 500)
