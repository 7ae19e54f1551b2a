"""`--set`: values have the types of the schema, and replace their own lines of params.yaml."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.params.assignments import load_with_assignments, parse_assignments, write_assignments
from stages.params.schema import ParamsError

SHIPPED = Path(__file__).resolve().parents[3] / "params.yaml"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "params.yaml"
    path.write_bytes(SHIPPED.read_bytes())
    return path


def test_values_are_typed_by_the_schema(file: Path) -> None:
    params = load_with_assignments(
        file,
        [
            "train.learning_rate=3e-4",
            "model.revision=1234567",
            "train.padding_free=true",
            "train.lora_target_modules=[q_proj, v_proj]",
            "load.sources[0].path=data/2024",
            "load.max_fractions.duplicate=0.5",
            "format.system_message=no",
        ],
    )
    assert params.train.learning_rate == 3e-4
    assert params.model.revision == "1234567"
    assert params.train.padding_free is True
    assert params.train.lora_target_modules == ["q_proj", "v_proj"]
    assert params.load.sources[0].path == "data/2024"
    assert params.load.max_fractions == {"duplicate": 0.5}
    assert params.format.system_message == "no"
    assert file.read_bytes() == SHIPPED.read_bytes()


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train.lerning_rate=1", r"params.yaml with --set: 1 problem\n  train.lerning_rate: unknown key; did you mean"),
        ("trian.lora_r=1", "did you mean 'train'"),
        ("train.lora_r=x", "train.lora_r: .* found 'x'"),
        ("train.lora_r", "expected section.key=value"),
        ("=1", "expected section.key=value"),
        ("train.lora_r=[1", "'\\[1' is not a YAML value"),
        ("load.sources[3].path=a", r"load.sources\[3\]: the list has 1 entries, from 0"),
    ],
)
def test_wrong_assignment_is_refused_and_nothing_is_written(file: Path, assignment: str, message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        write_assignments(file, ["train.lora_alpha=8", assignment])
    assert file.read_bytes() == SHIPPED.read_bytes()


def test_written_values_change_their_lines_alone_and_comments_stay_in_their_column(file: Path) -> None:
    told = write_assignments(file, ["train.learning_rate=3e-4", "load.sources.0.path=data/faq.csv"])
    pairs = zip(SHIPPED.read_text().splitlines(), file.read_text().splitlines(), strict=True)
    changed = [(old, new) for old, new in pairs if old != new]
    assert [new.split("#")[0].strip() for _, new in changed] == ["- path: data/faq.csv", "learning_rate: 3e-4"]
    assert all(old.index("#") == new.index("#") for old, new in changed)
    assert [line.partition(": ")[2] for line in told] == [
        "train.learning_rate: 0.002 -> 0.0003",
        "load.sources[0].path: data/shop_train.jsonl -> data/faq.csv",
    ]
    assert all(file.read_text().splitlines()[int(line.split(":")[1]) - 1] in dict(changed).values() for line in told)


def test_file_in_another_style_keeps_it(file: Path) -> None:
    text = file.read_text().replace("  revision: null  ", "  revision:       ").replace("    - path:", "  - path:")
    file.write_text(text)
    write_assignments(file, ["train.lora_r=8", "model.revision=main"])
    pairs = zip(text.splitlines(), file.read_text().splitlines(), strict=True)
    assert [new.split("#")[0].strip() for old, new in pairs if old != new] == ["revision: main", "lora_r: 8"]


def test_section_can_be_replaced_by_a_longer_value(file: Path) -> None:
    write_assignments(file, ["evaluate.gate=[tuned.loss <= base.loss]", "load.max_fractions={duplicate: 0.1}"])
    params = load_with_assignments(file, [])
    assert params.evaluate.gate == ["tuned.loss <= base.loss"]
    assert params.load.max_fractions == {"duplicate": 0.1}


def test_key_inside_of_a_value_that_was_set_is_refused() -> None:
    with pytest.raises(ParamsError, match="train was already set to a value"):
        parse_assignments(["train=1", "train.lora_r=1"])
