"""Only what follows the response template is trained, however the template happens to be tokenized."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from sft.batches.completion_collator import DataCollatorForCompletionOnlyLM
from sft.labels import IGNORE_INDEX
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
RESPONSE, QUESTION = " ### Response:", "Question:"


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def trained_text(batch: Any, tokenizer: Any = TOKENIZER) -> list[str]:
    """Return the trained tokens of each row as text."""
    rows = zip(batch["input_ids"], batch["labels"], strict=True)
    return [tokenizer.decode(ids[labels != IGNORE_INDEX]) for ids, labels in rows]


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer that merges ':\\n' and '\\n#', so that templates are tokenized differently next to text."""
    tokens = ["#", "A", "I", ":", "\n", ":\n", "\n#", "x", "y", "z", " ", "<pad>"]
    merges = [(":", "\n"), ("\n", "#")]
    model = models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>")


def test_only_what_follows_the_last_response_template_is_trained() -> None:
    ids = encode("Question: how ### Response: no ### Response: yes")
    collator = DataCollatorForCompletionOnlyLM(RESPONSE, tokenizer=TOKENIZER)
    batch = collator([{"input_ids": ids}])
    assert batch["input_ids"].tolist() == [ids]
    answer = encode(" yes")
    assert batch["labels"].tolist() == [[IGNORE_INDEX] * (len(ids) - len(answer)) + answer]


def test_every_answer_of_a_conversation_is_trained_up_to_the_next_instruction() -> None:
    ids = encode("Question: a ### Response: one.Question: b ### Response: two.")
    collator = DataCollatorForCompletionOnlyLM(RESPONSE, QUESTION, TOKENIZER)
    assert trained_text(collator([{"input_ids": ids}])) == [" one. two."]


def test_answers_that_follow_each_other_do_not_train_the_template_between_them() -> None:
    ids = encode("Question: a ### Response: one. ### Response: two.")
    collator = DataCollatorForCompletionOnlyLM(RESPONSE, QUESTION, TOKENIZER)
    assert trained_text(collator([{"input_ids": ids}])) == [" one. two."]


def test_token_ids_serve_as_templates() -> None:
    ids = encode("Question: a ### Response: one.")
    collator = DataCollatorForCompletionOnlyLM(encode(RESPONSE), encode(QUESTION), tokenizer=TOKENIZER)
    assert trained_text(collator([{"input_ids": ids}])) == [" one."]


def test_padding_is_masked_but_an_end_token_that_doubles_as_padding_is_trained() -> None:
    tokenizer = tiny_tokenizer(pad_token="<|im_end|>")
    end = tokenizer.eos_token_id
    rows = [
        {"input_ids": [*encode("a ### Response: one"), end]},
        {"input_ids": encode("a ### Response: a longer one.")},
    ]
    labels = DataCollatorForCompletionOnlyLM(RESPONSE, tokenizer=tokenizer)(rows)["labels"]
    first = labels[0][labels[0] != IGNORE_INDEX].tolist()
    assert first == [*encode(" one"), end]


@pytest.mark.parametrize("as_ids", [False, True])
def test_template_tokenized_differently_in_context_is_found_by_its_text(as_ids: bool) -> None:
    tokenizer = merging_tokenizer()
    ids = tokenizer.encode("I:x\n#A:\nyz")
    template: Any = "#A:"
    assert tokenizer.convert_ids_to_tokens(ids) == ["I", ":", "x", "\n#", "A", ":\n", "y", "z"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(template)) == ["#", "A", ":"]
    if as_ids:
        template = tokenizer.encode(template)
    batch = DataCollatorForCompletionOnlyLM(template, tokenizer=tokenizer)([{"input_ids": ids}])
    assert batch["labels"].tolist() == [[IGNORE_INDEX] * 6 + ids[6:]]


def test_first_instruction_found_by_ids_does_not_hide_later_ones_tokenized_differently() -> None:
    tokenizer = merging_tokenizer()
    ids = tokenizer.encode("#I:x\n#A:y\n#I:x\n#A:z")
    collator = DataCollatorForCompletionOnlyLM("#A:", "#I:", tokenizer)
    assert trained_text(collator([{"input_ids": ids}]), tokenizer) == ["yz"]
    assert tokenizer.convert_ids_to_tokens(ids)[:5] == ["#", "I", ":", "x", "\n#"]


def test_text_that_only_spells_a_special_token_is_not_a_template() -> None:
    start = TOKENIZER.convert_tokens_to_ids("<|im_start|>")
    spelled = [token for part in "<|im_start|>" for token in encode(part)]
    ids = [start, *encode("assistant yes "), *spelled, *encode("assistant no")]
    batch = DataCollatorForCompletionOnlyLM("<|im_start|>assistant", tokenizer=TOKENIZER)([{"input_ids": ids}])
    template = [start, *encode("assistant")]
    assert batch["labels"][0, len(template) :].tolist() == ids[len(template) :]


def test_rows_without_the_template_are_masked_and_counted_in_a_warning() -> None:
    collator = DataCollatorForCompletionOnlyLM(RESPONSE, QUESTION, TOKENIZER)
    good, bad = encode("Question: a ### Response: one."), encode("nothing of the kind")
    with pytest.warns(UserWarning, match=r"1 of 2 rows of this batch \(1 of 2 so far\) lack ' ### Response:' or"):
        batch = collator([{"input_ids": good}, {"input_ids": bad}])
    assert trained_text(batch) == [" one.", ""]
    with pytest.warns(UserWarning, match=r"1 of 1 rows of this batch \(2 of 3 so far\)"):
        collator([{"input_ids": encode("a ### Response: one.")}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        collator([{"input_ids": good}])
    assert (collator.num_rows, collator.num_rows_without_template) == (4, 2)


def test_template_that_differs_by_white_space_is_an_error_with_both_tokenizations_and_the_ids_to_pass() -> None:
    ids = encode("a### Response:one")
    collator = DataCollatorForCompletionOnlyLM("\n### Response:\n", tokenizer=TOKENIZER)
    with pytest.raises(ValueError, match="is not in the text, but '### Response:' is") as caught:
        collator([{"input_ids": ids}])
    message = str(caught.value)
    assert str(encode("\n### Response:\n")) in message
    assert f"response_template={encode('### Response:')}" in message
    suggested = DataCollatorForCompletionOnlyLM(encode("### Response:"), tokenizer=TOKENIZER)
    assert trained_text(suggested([{"input_ids": ids}])) == ["one"]


def test_labels_of_a_row_that_are_ignored_stay_ignored() -> None:
    ids = encode(" ### Response: one two")
    labels = [*ids[:-1], IGNORE_INDEX]
    batch = DataCollatorForCompletionOnlyLM(RESPONSE, tokenizer=TOKENIZER)([{"input_ids": ids, "labels": labels}])
    assert batch["labels"][0, -1] == IGNORE_INDEX


def test_padding_free_batches_are_flat() -> None:
    rows = [{"input_ids": encode("a ### Response: one")}, {"input_ids": encode("b ### Response: two")}]
    batch = DataCollatorForCompletionOnlyLM(RESPONSE, tokenizer=TOKENIZER, padding_free=True)(rows)
    assert trained_text(batch) == [" one two"]
    assert batch["seq_lengths"].tolist() == [len(row["input_ids"]) for row in rows]
    assert "attention_mask" not in batch


def test_packed_rows_are_searched_document_by_document() -> None:
    first, second = encode("a ### Response: one"), encode("b ### Response: two")
    row = {"input_ids": first + second, "seq_lengths": [len(first), len(second)]}
    assert trained_text(DataCollatorForCompletionOnlyLM(RESPONSE, tokenizer=TOKENIZER)([row])) == [" one two"]


def test_another_ignore_index_is_used() -> None:
    batch = DataCollatorForCompletionOnlyLM(RESPONSE, tokenizer=TOKENIZER, ignore_index=-1)(
        [{"input_ids": encode(" ### Response: one")}]
    )
    assert batch["labels"][0, 0] == -1


@pytest.mark.parametrize("as_lists", [False, True])
def test_batches_are_also_made_by_torch_call_and_from_lists_of_ids(as_lists: bool) -> None:
    ids = encode("a ### Response: one")
    collator = DataCollatorForCompletionOnlyLM(RESPONSE, tokenizer=TOKENIZER)
    batch = collator.torch_call([ids if as_lists else {"input_ids": ids}])
    assert trained_text(batch) == [" one"]
    assert collator.response_token_ids == encode(RESPONSE)
    assert collator.instruction_token_ids is None


def test_subclass_that_changes_torch_call_is_followed() -> None:
    class Reversed(DataCollatorForCompletionOnlyLM):
        def torch_call(self, examples: Any) -> Any:
            return {**super().torch_call(examples), "extra": 1}

    batch = Reversed(RESPONSE, tokenizer=TOKENIZER)([{"input_ids": encode("a ### Response: one")}])
    assert batch["extra"] == 1


def test_padding_is_on_the_side_of_the_tokenizer() -> None:
    tokenizer = tiny_tokenizer(padding_side="left")
    rows = [{"input_ids": encode(text)} for text in ("a ### Response: one", "a ### Response: a longer one.")]
    batch = DataCollatorForCompletionOnlyLM(RESPONSE, tokenizer=tokenizer)(rows)
    missing = len(rows[1]["input_ids"]) - len(rows[0]["input_ids"])
    assert batch["input_ids"][0].tolist() == [tokenizer.pad_token_id] * missing + rows[0]["input_ids"]
    assert batch["attention_mask"].tolist() == [
        [0] * missing + [1] * len(rows[0]["input_ids"]),
        [1] * len(batch["input_ids"][1]),
    ]
    assert trained_text(batch) == [" one", " a longer one."]


@pytest.mark.parametrize(("eos", "padding"), [("<|im_end|>", 2), (None, 0)])
def test_tokenizer_without_padding_token_pads_with_its_end_token(eos: str | None, padding: int) -> None:
    tokenizer = tiny_tokenizer(pad_token=None, eos_token=eos)
    rows = [{"input_ids": encode(text)} for text in ("a ### Response: one", "a ### Response: a longer one.")]
    batch = DataCollatorForCompletionOnlyLM(RESPONSE, tokenizer=tokenizer)(rows)
    assert batch["input_ids"][0, -1] == padding
    assert trained_text(batch, tokenizer) == [" one", " a longer one."]
    assert tokenizer.pad_token is None


def test_near_miss_in_a_later_row_is_a_row_without_the_template() -> None:
    collator = DataCollatorForCompletionOnlyLM("\n### Response:\n", tokenizer=TOKENIZER)
    good, cut = encode("a\n### Response:\none"), encode("what is ### Response: in")
    with pytest.warns(UserWarning, match="1 of 2 rows of this batch"):
        batch = collator([{"input_ids": cut}, {"input_ids": good}])
    assert trained_text(batch) == ["", "one"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"tokenizer": TOKENIZER, "mlm": True}, "mlm=True is not supported"),
        ({}, "tokenizer is missing"),
        ({"tokenizer": TOKENIZER, "response_template": ""}, "response_template='' is empty"),
        ({"tokenizer": TOKENIZER, "response_template": " \n"}, "is empty, so it can't be found"),
        (
            {"tokenizer": TOKENIZER, "response_template": [[5, 6]]},
            r"\[\[5, 6\]\] must be a text or a list of token ids",
        ),
        ({"tokenizer": TOKENIZER, "instruction_template": RESPONSE}, "are both ' ### Response:'"),
    ],
)
def test_unusable_settings_are_refused(arguments: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        DataCollatorForCompletionOnlyLM(**{"response_template": RESPONSE, **arguments})


def test_flat_batch_outside_the_trainer_states_its_documents_to_flash_attention() -> None:
    collator = DataCollatorForCompletionOnlyLM(RESPONSE, tokenizer=TOKENIZER, padding_free=True)
    rows = [{"input_ids": [5, 6, 7]}, {"input_ids": [8, 9]}]
    batch = collator(rows)
    for end in ("q", "k"):
        assert batch[f"cu_seq_lens_{end}"].tolist() == [[0, 3, 5]]
        assert batch[f"max_length_{end}"].tolist() == [3]
    collator.for_trainer = True
    assert "cu_seq_lens_q" not in collator(rows)
