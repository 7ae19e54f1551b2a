"""A model that could never learn to stop is detected before it is trained."""

from __future__ import annotations

import pytest

from sft.chat.render import Rendered, Span, TrainOn, render
from tests.sft.chat.stops import check_stops
from tests.sft.template_styles import CHATML, PLAIN
from tests.tiny import tiny_tokenizer

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def test_turns_that_end_in_a_stop_token_pass() -> None:
    tokenizer = tiny_tokenizer()
    check_stops([("a:1", render({"messages": CHAT}, tokenizer))], tokenizer)


def test_a_stop_token_of_the_generation_config_counts() -> None:
    tokenizer = tiny_tokenizer(eos_token="<|endoftext|>")
    rows = [("a:1", render({"messages": CHAT}, tokenizer))]
    with pytest.raises(
        ValueError, match=r"1 of 1 trained turns .*\('<\|endoftext\|>'\).* a:1 ends in 'Hello<\|im_end\|>'"
    ):
        check_stops(rows, tokenizer)
    check_stops(rows, tokenizer, [tokenizer.convert_tokens_to_ids("<|im_end|>")])


def test_a_template_without_terminator_is_refused() -> None:
    tokenizer = tiny_tokenizer(PLAIN.template)
    with pytest.raises(ValueError, match=r"never learn to stop: a:1 ends in ' Hello'"):
        check_stops([("a:1", render({"messages": CHAT}, tokenizer))], tokenizer)


def test_generation_marks_that_leave_out_the_terminator_are_refused() -> None:
    template = CHATML.template.replace(
        "{{ m['content'] }}",
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}",
    )
    tokenizer = tiny_tokenizer(template)
    rendered = render({"messages": CHAT}, tokenizer)
    assert [rendered.text[start:end] for start, end, _ in rendered.spans] == ["Hello"]
    with pytest.raises(ValueError, match="inside its generation marks"):
        check_stops([("a:1", rendered)], tokenizer)


def test_text_is_closed_by_the_appended_eos() -> None:
    tokenizer = tiny_tokenizer()
    check_stops([("a:1", render({"text": "x"}, tokenizer, TrainOn.ALL))], tokenizer)
    with pytest.raises(ValueError, match="a:2 ends in 'x'"):
        check_stops([("a:2", Rendered("xy", [Span(0, 1)], append_eos=True))], tokenizer)


def test_a_line_break_after_the_terminator_does_no_harm() -> None:
    tokenizer = tiny_tokenizer()
    record = {"prompt": CHAT[:1], "completion": CHAT[1:]}
    rendered = render(record, tokenizer, TrainOn.COMPLETION)
    assert rendered.text.endswith("<|im_end|>\n")
    check_stops([("a:1", rendered)], tokenizer)
