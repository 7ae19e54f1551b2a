"""Templates that come from elsewhere, filled in and rendered in the child process as they are in this one."""

from __future__ import annotations

import datetime
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase, tokenization_utils_base
from transformers.utils import chat_template_utils

from sft import apply_chat_template
from sft.chat.template_syntax import template_variables
from sft.scripts.formatting import conversations_formatting_function
from sft.untrusted import templates
from sft.untrusted.templates import FillError, chat_templates_in_child, fill_in_child
from tests.tiny import tiny_tokenizer

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello there"}]
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
MARKED = (
    "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
    "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{% for d in documents or [] %}{{ d.text }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}{{ mood }}"
)


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: The first.
        b: The second.
    """
    return a + b


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.fixture
def short_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "FIRST_CHAT_S", 0.3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_generation_prompt": True, "mood": "calm"},
        {"continue_final_message": True},
        {"tools": [add]},
        {"documents": [{"title": "t", "text": "words"}]},
    ],
)
def test_chats_are_rendered_in_the_child_as_by_transformers(
    tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]
) -> None:
    tokenizer.chat_template = MARKED
    here = tokenizer.apply_chat_template(CHAT, tokenize=False, **options)

    with chat_templates_in_child():
        assert tokenizer.apply_chat_template(CHAT, tokenize=False, **options) == here


def test_assistant_tokens_are_those_of_transformers(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = MARKED
    options: dict[str, Any] = {"return_dict": True, "return_assistant_tokens_mask": True}
    here: Any = tokenizer.apply_chat_template(CHAT, **options)

    with chat_templates_in_child():
        assert tokenizer.apply_chat_template(CHAT, **options)["assistant_masks"] == here["assistant_masks"]


def test_transformers_is_as_before_after_rendering() -> None:
    with chat_templates_in_child(), chat_templates_in_child():
        pass
    assert tokenization_utils_base.render_jinja_template is chat_template_utils.render_jinja_template


def test_endless_template_ends_a_script_with_a_message(tokenizer: PreTrainedTokenizerBase, short_limit: None) -> None:
    tokenizer.chat_template = LOOP
    with pytest.raises(ValueError, match=r"takes more than 0\.4 s for 1 conversations"):
        apply_chat_template({"messages": CHAT}, tokenizer)
    with pytest.raises(ValueError, match=r"takes more than 0\.4 s for 1 conversations"):
        conversations_formatting_function(tokenizer)({"messages": CHAT})


def test_row_is_filled_in_as_here() -> None:
    row = {"when": datetime.date(2024, 2, 3), "note": None, "parts": ["a", "b"], "n": 3}

    texts = {"user": "{{ when.year }}{{ note }}\n", "assistant": "{{ parts | join('+') }}{{ n * 2 }}"}

    assert fill_in_child(texts, row) == {"user": "2024\n", "assistant": "a+b6"}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (LOOP, r"filling it in takes more than 0\.3 s"),
        ("{{ 'ab' * 10 ** 11 }}", "filling it in takes more than 2 GiB of memory"),
        ("{{ missing }}", "the template of user can't be filled in: 'missing' is undefined"),
        ("{{ 10 ** (10 ** 9) }}", "a number of"),
        ("{{ thing.close }}", "has no attribute 'close'"),
    ],
)
def test_template_that_can_not_be_filled_in_says_why(text: str, found: str, short_limit: None) -> None:
    with pytest.raises(FillError, match=found):
        fill_in_child({"user": text}, {"thing": object()})


def test_constants_that_would_fill_the_memory_are_computed_in_the_child() -> None:
    source = "{{ 'a' | replace('', 'b' * 99999) | replace('', 'c' * 99999) }}{{ x }}"

    assert template_variables(source) == ("x",)
