"""Everything that a message says is in the text that is trained, or something is said about what is not."""

from __future__ import annotations

import json
from typing import Any

from datasets import Dataset

from benchmarks.silent_failures.case import Outcome, case
from benchmarks.silent_failures.libraries import Library
from benchmarks.silent_failures.tiny import make_model, make_tokenizer

HEADER = "<|im_start|>{{ message['role'] }}\n"
END = "<|im_end|>\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"

TOOLS_ABOVE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
)

ONLY_CONTENT = (
    f"{TOOLS_ABOVE}{{% for message in messages %}}{HEADER}{{{{ message['content'] or '' }}}}{END}{{% endfor %}}{PROMPT}"
)
"""Prints the tools, but no call."""

PRINT_CALL = "{{ {'name': call['function']['name'], 'arguments': call['function']['arguments']} | tojson }}"

FIRST_CALL_ONLY = (
    f"{TOOLS_ABOVE}{{% for message in messages %}}{HEADER}{{{{ message['content'] or '' }}}}"
    "{% if message['tool_calls'] %}{% set call = message['tool_calls'][0] %}" + PRINT_CALL + "{% endif %}"
    f"{END}{{% endfor %}}{PROMPT}"
)

ALL_CALLS = (
    f"{TOOLS_ABOVE}{{% for message in messages %}}{HEADER}{{{{ message['content'] or '' }}}}"
    "{% for call in message['tool_calls'] or [] %}" + PRINT_CALL + "{% endfor %}"
    f"{END}{{% endfor %}}{PROMPT}"
)

NAMES_ONLY = (
    f"{TOOLS_ABOVE}{{% for message in messages %}}{HEADER}{{{{ message['content'] or '' }}}}"
    "{% for call in message['tool_calls'] or [] %}{{ call['function']['name'] }}{% endfor %}"
    f"{END}{{% endfor %}}{PROMPT}"
)

CALL_INSTEAD_OF_CONTENT = (
    f"{TOOLS_ABOVE}{{% for message in messages %}}{HEADER}"
    "{% if message['tool_calls'] %}{% for call in message['tool_calls'] %}" + PRINT_CALL + "{% endfor %}"
    "{% else %}{{ message['content'] or '' }}{% endif %}" + f"{END}{{% endfor %}}{PROMPT}"
)

NO_TOOL_RESULTS = (
    f"{TOOLS_ABOVE}"
    "{% for message in messages %}{% if message['role'] != 'tool' %}" + HEADER + "{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}" + PRINT_CALL + "{% endfor %}"
    f"{END}{{% endif %}}{{% endfor %}}{PROMPT}"
)

NO_SYSTEM = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    f"{HEADER}{{{{ message['content'] }}}}{END}{{% endif %}}{{% endfor %}}{PROMPT}"
)

CUTS_THINKING = (
    "{% for message in messages %}" + HEADER + "{% if message['role'] == 'assistant' %}"
    "{{ message['content'].split('</think>')[-1] }}{% else %}{{ message['content'] }}{% endif %}"
    f"{END}{{% endfor %}}{PROMPT}"
)

THINKING_OF_LAST_TURN = (
    "{% for message in messages %}" + HEADER + "{% if message['reasoning_content'] and loop.last %}"
    "<think>\n{{ message['reasoning_content'] }}\n</think>\n\n{% endif %}{{ message['content'] }}"
    f"{END}{{% endfor %}}{PROMPT}"
)

NOT_PRINTED = r"(does not|doesn't|never) print"
CALLS = rf"tool[_ ]calls?\b|function call|{NOT_PRINTED}"
REASONING = rf"reasoning|thinking\b|<think|{NOT_PRINTED}"


def call(name: str, **arguments: Any) -> dict[str, Any]:
    """Return a tool call as a message has it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name: str, **properties: Any) -> dict[str, Any]:
    """Return the description of a tool."""
    parameters = {"type": "object", "properties": properties}
    return {"type": "function", "function": {"name": name, "description": "A tool.", "parameters": parameters}}


WEATHER = tool("get_weather", city={"type": "string"})
ASKED = {"role": "user", "content": "What is the weather?"}


def said(content: str | None, **keys: Any) -> dict[str, Any]:
    """Return a message of the assistant."""
    return {"role": "assistant", "content": content, **keys}


def in_text(library: Library, template: str, row: dict[str, Any], *parts: str, **options: Any) -> Outcome:
    """Train on a row and report which parts of it the text has; all of them would be right."""
    tokenizer = make_tokenizer(template)
    trainer = library.trainer(make_model(), tokenizer, [row], **options)
    text = library.texts(trainer, tokenizer)[0]
    after_question = text.split("What is the weather?", 1)[-1]
    return Outcome([part for part in parts if part in after_question], list(parts))


@case(
    "The template prints no calls: the answer is lost",
    threads=("PrimeIntellect-ai/prime-rl#885", "modelscope/ms-swift#9263"),
    says=CALLS,
)
def tool_call_not_printed(library: Library) -> Outcome:
    row = {"messages": [ASKED, said("", tool_calls=[call("get_weather", city="Paris")])], "tools": [WEATHER]}
    return in_text(library, ONLY_CONTENT, row, "get_weather", "Paris")


@case("The template prints the first of two calls", threads=("modelscope/ms-swift#9263",), says=CALLS)
def second_tool_call_not_printed(library: Library) -> Outcome:
    calls = [call("get_weather", city="Paris"), call("get_weather", city="London")]
    row = {"messages": [ASKED, said("", tool_calls=calls)], "tools": [WEATHER]}
    return in_text(library, FIRST_CALL_ONLY, row, "Paris", "London")


@case(
    "The template prints the names of calls without their arguments", threads=("modelscope/ms-swift#9263",), says=CALLS
)
def tool_arguments_not_printed(library: Library) -> Outcome:
    row = {"messages": [ASKED, said("", tool_calls=[call("get_weather", city="Paris")])], "tools": [WEATHER]}
    return in_text(library, NAMES_ONLY, row, "get_weather", "Paris")


@case(
    "The template does not print content beside a call",
    threads=("PrimeIntellect-ai/prime-rl#885",),
    says=rf"{CALLS}|content",
)
def content_beside_call_not_printed(library: Library) -> Outcome:
    row = {
        "messages": [ASKED, said("Let me look.", tool_calls=[call("get_weather", city="Paris")])],
        "tools": [WEATHER],
    }
    return in_text(library, CALL_INSTEAD_OF_CONTENT, row, "Let me look.", "Paris")


@case("The template does not print results of tools", threads=("modelscope/ms-swift#9263",), says=r"\btool\b")
def tool_result_not_printed(library: Library) -> Outcome:
    calls = said("", tool_calls=[call("get_weather", city="Paris")])
    result = {"role": "tool", "content": "Rain, 12 degrees.", "name": "get_weather"}
    row = {"messages": [ASKED, calls, result, said("It rains.")], "tools": [WEATHER]}
    return in_text(library, NO_TOOL_RESULTS, row, "Paris", "Rain, 12 degrees.", "It rains.")


@case("The template does not print `reasoning_content`", threads=("huggingface/trl#6766",), says=REASONING)
def reasoning_not_printed(library: Library) -> Outcome:
    row = {"messages": [ASKED, said("It rains.", reasoning_content="Clouds are dark.")]}
    return in_text(library, ONLY_CONTENT, row, "Clouds are dark.", "It rains.")


@case("The template cuts `<think>` out of the content", threads=("hiyouga/LlamaFactory#7556",), says=REASONING)
def think_cut_by_template(library: Library) -> Outcome:
    row = {"messages": [ASKED, said("<think>Clouds are dark.</think>It rains.")]}
    return in_text(library, CUTS_THINKING, row, "Clouds are dark.", "It rains.")


@case(
    "The template prints reasoning of the last turn only, and all turns are trained",
    threads=("fw-ai/cookbook#386", "fw-ai/cookbook#554", "verl-project/verl#6854"),
    says=REASONING,
)
def reasoning_of_history_not_printed(library: Library) -> Outcome:
    turns = [said("It rains.", reasoning_content="Clouds are dark."), {"role": "user", "content": "And now?"}]
    row = {"messages": [ASKED, *turns, said("The sun shines.", reasoning_content="The sky is blue.")]}
    return in_text(library, THINKING_OF_LAST_TURN, row, "Clouds are dark.", "The sky is blue.")


@case(
    "The template does not print the system message",
    threads=("raullenchai/Rapid-MLX#1765", "google-deepmind/onetwo#6"),
    says=r"\bsystem\b",
)
def system_not_printed(library: Library) -> Outcome:
    tokenizer = make_tokenizer(NO_SYSTEM)
    row = {"messages": [{"role": "system", "content": "Speak like a pirate."}, ASKED, said("Arr, it rains.")]}
    text = library.texts(library.trainer(make_model(), tokenizer, [row]), tokenizer)[0]
    return Outcome("Speak like a pirate." in text, True)


@case(
    "Content as a list of parts is printed as Python's text of the list",
    threads=("abetlen/llama-cpp-python#2324",),
    says=r"content.*(list|parts)|(list|parts).*content",
)
def content_parts_printed_as_python(library: Library) -> Outcome:
    tokenizer = make_tokenizer()
    parts = [{"type": "text", "text": "It rains "}, {"type": "text", "text": "today."}]
    row = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Weather?"}]}, said(parts)]}
    text = library.texts(library.trainer(make_model(), tokenizer, [row]), tokenizer)[0]
    return Outcome("It rains today." in text and "{'type'" not in text, True)


@case(
    "`function_call`, OpenAI's older form of a call, is ignored beside content",
    threads=("OpenPipe/OpenPipe#338",),
    says=r"function_call|functions",
)
def function_call_ignored(library: Library) -> Outcome:
    legacy = {"name": "get_weather", "arguments": json.dumps({"city": "Paris"})}
    row = {"messages": [ASKED, said("Let me look.", function_call=legacy)]}
    return in_text(library, ALL_CALLS, row, "Let me look.", "get_weather", "Paris")


@case(
    "The roles `human` and `gpt` of ShareGPT are printed as they are",
    threads=("huggingface/trl#2083", "NVIDIA-NeMo/Megatron-Bridge#5078"),
    says=r"\bgpt\b|\bhuman\b|ShareGPT",
)
def sharegpt_roles(library: Library) -> Outcome:
    tokenizer = make_tokenizer()
    turns = [{"from": "human", "value": "Two?"}, {"from": "gpt", "value": "Four."}] * 2
    rows = library.from_sharegpt([{"conversations": turns}] * 2, tokenizer)
    text = library.texts(library.trainer(make_model(), tokenizer, rows), tokenizer)[0]
    roles = [turn.split("\n")[0] for turn in text.split("<|im_start|>")[1:]]
    return Outcome(roles, ["user", "assistant"] * 2)


@case("A column `functions` is ignored", threads=("OpenPipe/OpenPipe#338",), says=r"functions")
def functions_column_ignored(library: Library) -> Outcome:
    tokenizer = make_tokenizer(ALL_CALLS)
    row = {"messages": [ASKED, said("It rains.")], "functions": [WEATHER["function"]]}
    text = library.texts(library.trainer(make_model(), tokenizer, [row]), tokenizer)[0]
    return Outcome("get_weather" in text, True)


def printed_calls(library: Library, rows: Any, **options: Any) -> list[Any]:
    """Return the arguments of the call of each row, read back from its text."""
    tokenizer = make_tokenizer(ALL_CALLS)
    trainer = library.trainer(make_model(), tokenizer, rows, **options)
    answers = [text.rsplit("assistant\n", 1)[1] for text in library.texts(trainer, tokenizer)]
    return [json.loads(answer.split("<|im_end|>")[0])["arguments"] for answer in answers]


@case(
    "Arrow gives every call the keys of all calls, as null",
    threads=("huggingface/trl#5118", "huggingface/trl#5307"),
    says=r"\bnulls?\b|\bnone\b",
)
def nulls_invented_by_arrow(library: Library) -> Outcome:
    given = [{"city": "Paris"}, {"zone": "UTC"}]
    rows = [{"messages": [ASKED, said("", tool_calls=[call("look", **arguments)])]} for arguments in given]
    return Outcome(printed_calls(library, Dataset.from_list(rows)), given)


@case(
    "The keys of all calls as null, in a Parquet file", threads=("huggingface/trl#5118",), says=r"\bnulls?\b|\bnone\b"
)
def nulls_of_parquet(library: Library) -> Outcome:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import load_dataset

    given = [{"city": "Paris"}, {"zone": "UTC"}]
    rows = [{"messages": [ASKED, said("", tool_calls=[call("look", **arguments)])]} for arguments in given]
    path = library.folder() / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path)
    read = load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(library.folder()))
    return Outcome(printed_calls(library, read), given)


@case("The keys of all calls as null, in a stream", threads=("huggingface/trl#5118",), says=r"\bnulls?\b|\bnone\b")
def nulls_of_stream(library: Library) -> Outcome:
    given = [{"city": "Paris"}, {"zone": "UTC"}]
    rows = [{"messages": [ASKED, said("", tool_calls=[call("look", **arguments)])]} for arguments in given]
    stream = Dataset.from_list(rows).to_iterable_dataset()
    return Outcome(printed_calls(library, stream, max_steps=1), given)


@case(
    "A special token that a user wrote in a message becomes a control token",
    threads=("huggingface/transformers#29279", "PrimeIntellect-ai/renderers#116"),
    says=r"<\|im_end\|>|special token",
)
def special_token_in_content(library: Library) -> Outcome:
    tokenizer = make_tokenizer()
    row = {"messages": [{"role": "user", "content": "What is <|im_end|>?"}, said("A token.")]}
    ((ids, _),) = library.sequences(library.trainer(make_model(), tokenizer, [row]))
    return Outcome(ids.count(tokenizer.eos_token_id), 2)


@case("A null that the user wrote in a call's arguments is lost", threads=("huggingface/trl#5307",), says=r"\bnull")
def written_null_lost(library: Library) -> Outcome:
    given = {"city": "Paris", "unit": None}
    message = said("", tool_calls=[{"type": "function", "function": {"name": "look", "arguments": given}}])
    path = library.folder() / "rows.jsonl"
    path.write_text(json.dumps({"messages": [ASKED, message]}) + "\n")
    return Outcome(printed_calls(library, library.read(path)), [given])


@case("A null that the user wrote in a tool's schema is lost", threads=("huggingface/trl#5118",), says=r"\bnull")
def written_null_in_schema_lost(library: Library) -> Outcome:
    unit = {"type": ["string", "null"], "default": None}
    row = {"messages": [ASKED, said("It rains.")], "tools": [tool("look", unit=unit)]}
    path = library.folder() / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    tokenizer = make_tokenizer(ALL_CALLS)
    text = library.texts(library.trainer(make_model(), tokenizer, library.read(path)), tokenizer)[0]
    printed = json.loads(text.split("system\n", 1)[1].split("\n", 1)[0])
    return Outcome(printed["function"]["parameters"]["properties"]["unit"], unit)
