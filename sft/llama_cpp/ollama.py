"""Ollama's Modelfile for a GGUF file: the chat template in Go's syntax, stop texts and parameters.

Ollama does not run the Jinja template of a GGUF file. Its template is derived from what the Jinja template prints for
system, user and assistant messages, and it is used only if it prints the same text for real conversations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.untrusted.templates import chat_templates_in_child

Render = Callable[[list[dict[str, str]], bool], str]
"""Function from messages, and whether an answer begins after them, to the text that the chat template prints."""

SYSTEM, USER, ASSISTANT, NEXT = "Ssystems", "Uusersu", "Aassista", "Nnextusn"
"""Contents of the messages of which a template is printed to find out how it surrounds them."""


@dataclass(frozen=True)
class Pieces:
    """What a chat template prints around the messages of a conversation.

    Args:
        start: Text before the first message.
        default_system: Text before the first message if that is not a system message.
        around: Role -> text before and after the content.
        generation: Text after which the model answers.
    """

    start: str
    default_system: str
    around: Mapping[str, tuple[str, str]]
    generation: str

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return the text of messages up to where the answer begins, as Ollama prints it.

        Raises:
            ValueError: A message has a role or a content that the template does not print.
        """
        has_system = bool(messages) and messages[0]["role"] == "system"
        text = self.start if has_system else self.default_system
        for message in messages:
            if message["role"] not in self.around or not isinstance(message.get("content"), str):
                raise ValueError(f"a message of the role {message['role']!r} that Ollama's template does not print")
            before, after = self.around[message["role"]]
            text += before + message["content"] + after
        return text + self.generation

    def go_template(self) -> str:
        """Return the same as a template of Go."""
        roles = [
            f'{{{{ {"if" if number == 0 else "else if"} eq .Role "{role}" }}}}{literal(before)}{{{{ .Content }}}}'
            f"{literal(after)}"
            for number, (role, (before, after)) in enumerate(self.around.items())
        ]
        first = (
            '{{ if and .Messages (eq (index .Messages 0).Role "system") }}'
            f"{literal(self.start)}{{{{ else }}}}{literal(self.default_system)}{{{{ end }}}}"
        )
        head = literal(self.start) if self.start == self.default_system else first
        return f"{head}{{{{ range .Messages }}}}{''.join(roles)}{{{{ end }}}}{{{{ end }}}}{literal(self.generation)}"


def literal(text: str) -> str:
    """Return a text as a template of Go prints it."""
    return text.replace("{{", '{{ "{{" }}')


def find_pieces(render: Render, bos: str) -> Pieces | None:
    """Return what a chat template prints around messages; None if that depends on more than their roles.

    Args:
        render: The chat template.
        bos: The beginning-of-sequence token, which llama.cpp adds itself; empty if it does not.
    """
    system, user = {"role": "system", "content": SYSTEM}, {"role": "user", "content": USER}
    assistant, following = {"role": "assistant", "content": ASSISTANT}, {"role": "user", "content": NEXT}
    try:
        first = render([system, user], False)
        asked = render([system, user], True)
        answered = render([system, user, assistant], False)
        again = render([system, user, assistant, following], False)
        alone = render([user], False)
    except Exception:  # a template raises errors of any class, such as for a system message that it does not know
        return None
    if not (asked.startswith(first) and answered.startswith(first) and again.startswith(answered)):
        return None
    around_user = _split(again.removeprefix(answered), NEXT)
    around_assistant = _split(answered.removeprefix(first), ASSISTANT)
    if around_user is None or around_assistant is None:
        return None
    of_user = USER.join(around_user)
    around_system = _split(first.removesuffix(of_user), SYSTEM)
    if around_system is None or not first.endswith(of_user) or not alone.endswith(of_user):
        return None
    around = {"system": around_system, "user": around_user, "assistant": around_assistant}
    start = ""
    default_system = alone.removesuffix(of_user)
    if bos and around_system[0].startswith(bos) and default_system.startswith(bos):
        around["system"] = (around_system[0].removeprefix(bos), around_system[1])
        default_system = default_system.removeprefix(bos)
    return Pieces(start, default_system, around, asked.removeprefix(first))


def _split(text: str, content: str) -> tuple[str, str] | None:
    before, found, after = text.partition(content)
    return (before, after) if found and content not in after else None


def modelfile(
    file_name: str,
    pieces: Pieces | None,
    stops: Sequence[str],
    context: int | None,
    system: str | None = None,
) -> str:
    """Return the text of a Modelfile.

    Args:
        file_name: The GGUF file beside it.
        pieces: What the chat template prints; None = Ollama chooses a template by what it knows.
        stops: Texts at which an answer ends.
        context: Longest sequence in tokens; None = Ollama's default.
        system: System message of conversations that have none.
    """
    lines = [f"FROM ./{file_name}"]
    if pieces is None or '"""' in pieces.go_template():
        lines.append("# The chat template can't be written in Ollama's syntax: Ollama chooses one by the GGUF file.")
    else:
        lines.append(f'TEMPLATE """{pieces.go_template()}"""')
    if system is not None and '"""' not in system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f'PARAMETER stop "{stop}"' for stop in stops if '"' not in stop]
    # as the model was evaluated: the most likely token, without a penalty
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    if context is not None:
        lines.append(f"PARAMETER num_ctx {context}")
    return "\n".join(lines) + "\n"


def write_modelfile(folder: Path, file_name: str, model_dir: Path, chats: Sequence[list[dict[str, Any]]]) -> str:
    """Write a Modelfile with stops, context and, where it prints the chats as the tokenizer does, a template.

    Args:
        folder: Folder of the GGUF file.
        file_name: The GGUF file.
        model_dir: Folder of the checkpoint.
        chats: Messages of real conversations, each before an answer.

    Returns:
        Why Ollama's template is not the model's; an empty text if it is.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    tokenizer: Any = AutoTokenizer.from_pretrained(model_dir)
    config: Any = AutoConfig.from_pretrained(model_dir)
    generation: Any = GenerationConfig.from_pretrained(model_dir)
    ids = generation.eos_token_id if isinstance(generation.eos_token_id, list) else [generation.eos_token_id]
    known = [index for index in [tokenizer.eos_token_id, *ids] if index is not None]
    stops = list(dict.fromkeys(str(tokenizer.convert_ids_to_tokens(index)) for index in known))

    def render(messages: list[dict[str, Any]], begins: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begins))

    adds_bos = tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    bos = str(tokenizer.bos_token) if adds_bos else ""
    pieces, why = None, "the tokenizer has no chat template"
    if tokenizer.chat_template:
        with chat_templates_in_child():
            pieces = find_pieces(render, bos)
            other = None if pieces is None else _first_other(pieces, chats, render, bos)
        why = "what the chat template prints around a message depends on more than its role" if pieces is None else ""
        if other is not None:
            pieces, why = None, f"it prints another text for held-out row {other + 1} than the chat template"
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    (folder / "Modelfile").write_text(modelfile(file_name, pieces, stops, context), encoding="utf-8")
    return f"the Modelfile has no template for Ollama, which chooses one by the GGUF file: {why}" if why else ""


def _first_other(
    pieces: Pieces, chats: Sequence[list[dict[str, Any]]], render: Callable[..., str], bos: str
) -> int | None:
    """Return the number of the first conversation that both print differently; None if there is none."""
    for number, chat in enumerate(chats):
        try:
            if pieces.render(chat) != render(chat, True).removeprefix(bos):
                return number
        except Exception:  # a template raises errors of any class
            return number
    return None
