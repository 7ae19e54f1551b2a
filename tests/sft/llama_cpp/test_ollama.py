"""Ollama's template prints what the chat template prints, or there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft.llama_cpp.ollama import find_pieces, modelfile, write_modelfile
from tests.tiny import tiny_model, tiny_tokenizer

CHAT = [{"role": "system", "content": "JSON!"}, {"role": "user", "content": "London?"}]
DEFAULT = (
    "{% if messages[0]['role'] != 'system' %}<s>Be kind.\n{% endif %}"
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
BY_PLACE = "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}"


def renderer(template: str) -> Any:
    tokenizer = tiny_tokenizer(template)

    def render(messages: list[dict[str, str]], begins: bool) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=begins))

    return render


def test_default_system_message_is_printed_only_where_there_is_none() -> None:
    render = renderer(DEFAULT)
    pieces = find_pieces(render, "")
    assert pieces is not None
    for chat in (CHAT, CHAT[1:]):
        assert pieces.render(chat) == render(chat, True)
    assert pieces.go_template() == (
        '{{ if and .Messages (eq (index .Messages 0).Role "system") }}{{ else }}<s>Be kind.\n{{ end }}'
        '{{ range .Messages }}{{ if eq .Role "system" }}[system]{{ .Content }}\n{{ else if eq .Role "user" }}[user]'
        '{{ .Content }}\n{{ else if eq .Role "assistant" }}[assistant]{{ .Content }}\n{{ end }}{{ end }}[assistant]'
    )


def test_template_that_depends_on_more_than_roles_has_no_pieces() -> None:
    assert find_pieces(renderer(BY_PLACE), "") is None
    assert "TEMPLATE" not in modelfile("a.gguf", None, ["<end>"], 64)


def test_modelfile_is_written_beside_the_file_with_stops_and_context(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert write_modelfile(tmp_path, "model-q8_0.gguf", tmp_path, [CHAT]) == ""
    lines = (tmp_path / "Modelfile").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "FROM ./model-q8_0.gguf"
    assert [line for line in lines if line.startswith("PARAMETER")] == [
        f'PARAMETER stop "{tokenizer.eos_token}"',
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1",
        "PARAMETER num_ctx 2048",
    ]
    unknown = [{"role": "tool", "content": "42"}]
    assert "it prints another text for held-out row 1" in write_modelfile(tmp_path, "a.gguf", tmp_path, [unknown])
