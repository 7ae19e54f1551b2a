"""`chat` answers as `evaluate` does, keeps the conversation if the training rows do, and reports what is missing."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from sft.evaluate.generation import generate_batch
from sft.models.checkpoint import load_tokenizer
from stages import quantize
from stages.__main__ import main
from stages.checkout.artifacts import write_jsonl
from stages.checkout.paths import Paths
from stages.models.variants import find_variant, load_variant
from stages.tools import chat
from tests.stages.tiny_run import REPO, tiny_params, write_tiny_run

SYSTEM = {"role": "system", "content": "JSON!"}
QUESTION, ANSWER = {"role": "user", "content": "Paris?"}, {"role": "assistant", "content": "Yes."}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    paths = write_tiny_run(tmp_path_factory.mktemp("chat"))
    quantize.run(tiny_params(), paths)
    return paths


def train_on(paths: Paths, *conversations: list[dict[str, str]]) -> None:
    rows = [{"id": f"tiny.jsonl:{i + 1}", "messages": messages} for i, messages in enumerate(conversations)]
    write_jsonl(paths.out("load", "train.jsonl"), rows)


def say(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], paths: Paths, *lines: str, **options):
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines)))
    chat.run(tiny_params(), paths, **options)
    return capsys.readouterr()


def expected(paths: Paths, model: str, prompt: str, max_new_tokens: int) -> str:
    tokenizer = load_tokenizer(paths.out("format", "tokenizer"))
    loaded = load_variant(find_variant(paths, model), tiny_params().model, len(tokenizer), [])
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return generate_batch(loaded, tokenizer, [ids], max_new_tokens)[0].text


@pytest.mark.parametrize("model", ["base", "tuned", "merged", "quantized"])
def test_every_model_answers_as_it_does_when_it_is_evaluated(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
) -> None:
    train_on(paths, [SYSTEM, QUESTION, ANSWER])
    heard = say(monkeypatch, capsys, paths, "London?", "", model=model, max_new_tokens=6)
    prompt = "<|im_start|>system\nJSON!<|im_end|>\n<|im_start|>user\nLondon?<|im_end|>\n<|im_start|>assistant\n"
    assert heard.out == expected(paths, model, prompt, 6) + "\n"
    assert "system message 'JSON!', as 1 of 1 training rows have it" in heard.err


def test_a_model_trained_on_dialogues_remembers_and_one_trained_on_single_questions_does_not(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_on(paths, [SYSTEM, QUESTION, ANSWER])
    single = say(monkeypatch, capsys, paths, "Hello!", "London?", max_new_tokens=6).out
    alone = say(monkeypatch, capsys, paths, "London?", max_new_tokens=6).out
    assert single.endswith(alone)
    train_on(paths, [SYSTEM, QUESTION, ANSWER, QUESTION, ANSWER])
    dialogue = say(monkeypatch, capsys, paths, "Hello!", "London?", max_new_tokens=6).out
    assert dialogue != single
    assert say(monkeypatch, capsys, paths, "Hello!", "/new", "London?", max_new_tokens=6).out == single


def test_the_system_message_is_the_usual_one_of_the_rows_or_the_given_one(paths: Paths) -> None:
    other = {"role": "system", "content": "Other."}
    train_on(paths, [SYSTEM, QUESTION, ANSWER], [other, QUESTION, ANSWER], [SYSTEM, QUESTION, ANSWER])
    habits = chat.training_habits(tiny_params(), paths)
    assert habits == chat.Habits("JSON!", num_rows=3, num_with_system=2, is_multi_turn=False)
    train_on(paths, [QUESTION, ANSWER])
    assert chat.training_habits(tiny_params(), paths).system is None
    assert chat.training_habits(tiny_params(format={"system_message": "Given."}), paths).system == "Given."


def test_message_that_does_not_fit_is_reported_and_not_answered(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_on(paths, [QUESTION, ANSWER])
    heard = say(monkeypatch, capsys, paths, "London?", max_new_tokens=100_000)
    assert heard.out == ""
    assert "not answered: " in heard.err
    assert "cut after 1 tokens" in say(monkeypatch, capsys, paths, "London?", max_new_tokens=1).err


def test_a_model_trained_on_plain_text_is_not_talked_to(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_jsonl(paths.out("load", "train.jsonl"), [{"id": "tiny.jsonl:1", "text": "Once upon a time"}])
    with pytest.raises(ValueError, match=r"tiny\.jsonl:1: plain text, not a conversation"):
        say(monkeypatch, capsys, paths, "London?")


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("base", "outs/load/base_model.json is missing, so there is no base model yet: type `sft load` first"),
        ("quantized", "so there is no quantized model yet: type `sft quantize` first"),
    ],
)
def test_a_model_that_is_not_there_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: str, words: str
) -> None:
    (tmp_path / "params.yaml").write_bytes((REPO / "params.yaml").read_bytes())
    assert main(["chat", "--model", model, "--root", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    assert words in message
    assert message.count("\n") == 1


def test_quantization_that_was_skipped_is_the_reason_given(tmp_path: Path) -> None:
    paths = write_tiny_run(tmp_path)
    quantize.run(tiny_params(quantize={"method": "none"}), paths)
    with pytest.raises(ValueError, match=r"contains no model: quantize\.method is none"):
        find_variant(paths, "quantized")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (["preview", "--model", "base"], "preview does not take --model: only chat, serve and verify do"),
        (["chat", "--max-new-tokens", "0"], "0 is not in the range x>=1"),
        (["chat", "--model", "best"], "'best' is not one of 'base', 'tuned'"),
    ],
)
def test_a_wrong_call_ends_with_code_2(capsys: pytest.CaptureFixture[str], call: list[str], words: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(call)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err
