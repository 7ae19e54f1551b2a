"""params.yaml is typed: everything wrong with it is said at once, before anything runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML

from stages.params.schema import Params, ParamsError, Section, check_params, load_params

SHIPPED = Path(__file__).resolve().parents[3] / "params.yaml"

OPTIONAL = {("load", "sources"), ("load", "eval"), ("train", "parameter_groups")}
"""Keys whose entries are written where they are needed."""


@pytest.fixture
def values() -> dict[str, Any]:
    return YAML(typ="safe", pure=True).load(SHIPPED.read_text(encoding="utf-8"))


def test_shipped_file_parses() -> None:
    params = load_params(SHIPPED)
    assert params.train.method == "lora"
    assert isinstance(params.train.learning_rate, float)


def test_every_key_of_the_shipped_file_has_a_comment() -> None:
    silent = []
    for line in SHIPPED.read_text(encoding="utf-8").splitlines():
        key, colon, rest = line.partition(":")
        if colon and not key.strip().startswith("#") and "#" not in rest:
            silent.append(key.strip())
    assert silent == []


def test_the_comment_of_a_key_is_its_description() -> None:
    """The comment on a key's line, continued on the comment lines below it, with white space folded."""
    comments: dict[tuple[str, ...], str] = {}
    parents: list[tuple[int, str]] = []
    for line in SHIPPED.read_text(encoding="utf-8").splitlines():
        text, _, comment = line.partition(" # ")
        if key := re.match(r"( *(?:- )?)(\w+):(?: |$)", text):
            while parents and parents[-1][0] >= len(key[1]):
                parents.pop()
            parents.append((len(key[1]), key[2]))
            comments[tuple(name for _, name in parents)] = comment
        elif parents and line.strip().startswith("# "):
            comments[tuple(name for _, name in parents)] += f" {comment}"
    described = described_keys(Params)
    assert {path: " ".join(comment.split()) for path, comment in comments.items()} == {
        path: text for path, text in described.items() if path in comments
    }
    optional = {path for path in described if path[:2] in OPTIONAL}
    assert described.keys() - comments.keys() <= optional


def described_keys(model: type[BaseModel], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], str]:
    """Path of every key in a model -> the field's description, or the docstring of its section."""
    found: dict[tuple[str, ...], str] = {}
    for name, field in model.model_fields.items():
        parts = (field.annotation, *get_args(field.annotation))
        section = next((part for part in parts if isinstance(part, type) and issubclass(part, Section)), None)
        text = field.description or (section and section.__doc__)
        assert text, f"{above}.{name} has no description"
        assert text.endswith("."), text
        found[*above, name] = text
        if section is not None:
            found |= described_keys(section, (*above, name))
    return found


def test_all_problems_are_listed_at_once_with_place_and_nearest_name(values: dict[str, Any]) -> None:
    values["train"]["lerning_rate"] = 1
    values["pack"]["max_length"] = "512"
    values["load"]["sources"][0]["pth"] = "x"
    del values["merge"]["dtype"]
    values["trian"] = {}
    with pytest.raises(ParamsError) as error:
        check_params(values)
    assert str(error.value).splitlines() == [
        "params.yaml: 5 problems",
        "  load.sources.0.pth: unknown key; did you mean 'path'?",
        "  pack.max_length: Input should be a valid integer, found '512'",
        "  train.lerning_rate: unknown key; did you mean 'learning_rate'?",
        "  merge.dtype: missing; the file must state it",
        "  trian: unknown key; did you mean 'train'?",
    ]


def test_a_number_in_quotes_is_not_a_number(values: dict[str, Any]) -> None:
    values["train"]["learning_rate"] = "fast"
    with pytest.raises(ParamsError, match=r"train\.learning_rate: .*number, found 'fast'"):
        check_params(values)


def test_true_is_not_a_count(values: dict[str, Any]) -> None:
    values["train"]["lora_r"] = True
    with pytest.raises(ParamsError, match=r"train\.lora_r: .*integer, found True"):
        check_params(values)


@pytest.mark.parametrize("number", [float("inf"), float("nan"), 1.5])
def test_a_number_of_steps_is_finite_and_whole(values: dict[str, Any], number: float) -> None:
    values["train"]["eval_steps"] = number
    with pytest.raises(ParamsError, match=r"train\.eval_steps: "):
        check_params(values)


def test_scientific_notation_without_a_dot_is_a_number(tmp_path: Path) -> None:
    text = SHIPPED.read_text(encoding="utf-8").replace("learning_rate: 2.0e-3", "learning_rate: 2e-4")
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    assert load_params(tmp_path / "params.yaml").train.learning_rate == 2e-4


def test_a_key_given_twice_is_an_error_with_its_place(tmp_path: Path) -> None:
    text = SHIPPED.read_text(encoding="utf-8").replace("  lora_r: 16", "  lora_r: 16\n  lora_r: 8")
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    words = (
        r"params\.yaml:\d+:\d+: not valid YAML: found duplicate key \"lora_r\": this section has it already; [^\n]*$"
    )
    with pytest.raises(ParamsError, match=words) as caught:
        load_params(tmp_path / "params.yaml")
    assert "http" not in str(caught.value)


@pytest.mark.parametrize("token", ["", " ", "\n"])
def test_a_blank_token_is_refused(values: dict[str, Any], token: str) -> None:
    values["format"]["add_special_tokens"] = ["<|x|>", token]
    with pytest.raises(ParamsError, match=r"format\.add_special_tokens\.1: a token must have a character"):
        check_params(values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train: [1, 2", r"params\.yaml:1:\d+: not valid YAML"),
        ("train:\n\tlora_r: 1\n", r"params\.yaml:2:1: not valid YAML: a tab where only spaces are allowed[^\n]*$"),
        ("train:\n  lora_r: \x01\n", r"params\.yaml:2: not valid YAML: special characters are not allowed"),
        ("", "expected sections such as `train:`, found an empty file"),
        ("- a\n- b\n", "expected sections such as `train:`, found list"),
        (f"a: {'[' * 20_000}", r"params\.yaml: values are nested far deeper than any"),
        (f"a: {'9' * 5000}", r"params\.yaml: a value can't be read: Exceeds the limit"),
    ],
)
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "params.yaml").write_text(content, encoding="utf-8")
    with pytest.raises(ParamsError, match=message):
        load_params(tmp_path / "params.yaml")


def test_a_missing_file_says_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="no such file; run from the repository's root"):
        load_params(tmp_path / "params.yaml")


def test_eval_needs_exactly_one_of_path_and_fraction(values: dict[str, Any]) -> None:
    values["load"]["eval"] = {"path": "data/x.jsonl", "fraction": 0.1}
    with pytest.raises(ParamsError, match=r"load\.eval: state one of path, fraction and count"):
        check_params(values)


def test_params_are_frozen(values: dict[str, Any]) -> None:
    params = Params.model_validate(values)
    with pytest.raises(ValidationError, match="frozen"):
        params.train.lora_r = 4  # type: ignore[misc]


def refused(tmp_path: Path, text: str) -> str:
    file = tmp_path / "params.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ParamsError) as raised:
        load_params(file)
    assert len(str(raised.value)) < 20_000
    return str(raised.value)


LAUGHS = "\n".join(
    ["a0: &a0 [ha, ha, ha, ha, ha, ha, ha, ha, ha]"]
    + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]
)
MERGES = "\n".join(
    ["a0: &a0 {x: 1}"] + [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, 30)]
)


@pytest.mark.parametrize("text", [LAUGHS, MERGES], ids=["lists", "merges"])
def test_aliases_that_stand_for_many_values_are_refused(tmp_path: Path, text: str) -> None:
    assert "more than 20000 values after its aliases (*) are replaced by what they stand for" in refused(tmp_path, text)


def test_an_alias_that_stands_for_its_own_value_is_refused(tmp_path: Path) -> None:
    assert "params.yaml:1:4: a value contains itself, by an alias (*)" in refused(tmp_path, "a: &a [*a]")


def test_a_few_aliases_are_read(tmp_path: Path) -> None:
    text = SHIPPED.read_text(encoding="utf-8")
    first, *others = re.findall(r"^  seed: \d+", text, re.MULTILINE)
    assert set(others) == {first}
    number = first.removeprefix("  seed: ")
    seeds = re.sub(r"(?m)^  seed: \d+", "  seed: *seed", text).replace("*seed", f"&seed {number}", 1)
    file = tmp_path / "params.yaml"
    file.write_text(seeds, encoding="utf-8")
    assert seeds.count("*seed") == len(others)
    assert load_params(file) == load_params(SHIPPED)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("x" * 1_000_000, "train.method: a text of 1000000 characters, more than 100000"),
        (10**5000, "train.method: a number of 16610 bits, more than 1024"),
        ([0] * 30_000, "more than 20000 values in all"),
        ({"x" * 200_000: 1}, "a text of 200000 characters, more than 100000"),
    ],
    ids=["text", "number", "list", "key"],
)
def test_values_that_no_message_could_hold_are_refused(values: dict[str, Any], value: Any, said: str) -> None:
    values["train"]["method"] = value
    with pytest.raises(ParamsError) as raised:
        check_params(values)
    assert said in str(raised.value)
    assert len(str(raised.value)) < 300


def test_values_that_lie_too_deep_in_one_another_are_refused(values: dict[str, Any], tmp_path: Path) -> None:
    inner: list[Any] = []
    for _ in range(500):
        inner = [inner]
    values["train"]["method"] = inner
    with pytest.raises(ParamsError, match=r"train\.method\.0\.0: values lie more than 50 deep in one another"):
        check_params(values)
    assert "params.yaml: " in refused(tmp_path, "a: " + "[" * 100_000)


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path: Path) -> None:
    assert "params.yaml: 1200001 bytes, more than 1048576" in refused(tmp_path, "#" * 1_200_001)


def test_a_number_beyond_what_python_prints_is_a_message(tmp_path: Path) -> None:
    assert "params.yaml" in refused(tmp_path, "a: 0x" + "f" * 20_000)


def test_messages_are_short_and_few(values: dict[str, Any]) -> None:
    values["train"]["method"] = "x" * 90_000
    values["train"] |= {f"unknown{number}": 1 for number in range(500)}
    with pytest.raises(ParamsError) as raised:
        check_params(values)
    lines = str(raised.value).splitlines()
    assert len(lines) == 52
    assert max(map(len, lines)) < 1100


@pytest.mark.parametrize("pattern", ["(" * 5000, "(?:a", "x" * 20_000], ids=["deep", "open", "long"])
def test_an_expression_that_cannot_be_compiled_is_a_message(values: dict[str, Any], pattern: str) -> None:
    values["evaluate"]["task"] = f"regex:{pattern}"
    with pytest.raises(ParamsError, match="not a regular expression"):
        check_params(values)


@pytest.mark.parametrize(
    ("engines", "changes", "message"),
    [
        (["vlm"], {}, r"evaluate\.engines: 'vlm': there is no engine 'vlm'; did you mean 'vllm'\?"),
        (["vllm.merge"], {}, r"'vllm.merge': vllm serves merged or quantized or adapter; did you mean 'merged'\?"),
        (["llama_cpp"], {}, r"'llama_cpp': llama_cpp serves GGUF files; name the kind of one, such as llama_cpp.q8_0"),
        (["vllm."], {}, r"'vllm.': vllm serves merged or quantized or adapter"),
        (["vllm", "vllm"], {}, r"every engine can be stated once with a model, found vllm twice"),
        (["llama_cpp.q8_0"], {}, r"evaluate\.engines: llama_cpp.q8_0: .*; add q8_0 to quantize\.export_gguf"),
        (["vllm.quantized"], {"quantize": {"method": "none"}}, r"engines: vllm.quantized: quantize\.method is none"),
        (["vllm.adapter"], {"train": {"method": "full"}}, r"engines: vllm.adapter: train\.method is full"),
    ],
)
def test_an_engine_that_can_not_be_asked_is_named_with_the_way_out(
    values: dict[str, Any], engines: list[str], changes: dict[str, dict[str, Any]], message: str
) -> None:
    values["evaluate"] |= {"engines": engines, "gate": []}
    for section, changed in changes.items():
        values[section] |= changed
    with pytest.raises(ParamsError, match=message):
        check_params(values)


def test_conditions_may_name_the_figures_of_the_engines_that_are_asked(values: dict[str, Any]) -> None:
    values["quantize"]["export_gguf"] = ["q8_0"]
    values["evaluate"] |= {"engines": ["vllm", "llama_cpp.q8_0"]}
    values["evaluate"]["gate"] = ["engine.vllm.exact_match >= quantized.exact_match - 0.01"]
    values["publish"]["gate"] = ["engine.llama_cpp.q8_0.stop_rate >= champion.engine.llama_cpp.q8_0.stop_rate - 0.02"]
    check_params(values)
    values["evaluate"]["gate"] = ["engine.llama_cpp.q8_0.equal_answers >= 90"]
    with pytest.raises(ParamsError, match=r"never be true: engine\.llama_cpp\.q8_0\.equal_answers is between 0 and 1"):
        check_params(values)
    values["evaluate"] |= {"engines": [], "gate": ["engine.vllm.equal_answers >= 0.9"]}
    with pytest.raises(ParamsError, match=r"evaluate\.gate: evaluate\.engines does not name the engine: gate cond"):
        check_params(values)
