"""Imported configurations give the token ids and labels of the other project's own code.

peer_tokens.json was made by that code, with `tiny_tokenizer` and the tokens of `MARKS`: of Axolotl 0.19,
`AlpacaPromptTokenizingStrategy`, the strategies `user_defined` and `completion`, and `ChatTemplateStrategy`; of
LLaMA-Factory 0.9.5, `SupervisedDatasetProcessor._encode_data_example` with `get_template_and_fix_tokenizer`. `trained`
are ranges of tokens whose label is not -100.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from transformers import AddedToken

from sft.chat.formats import apply_chat_format, find_format
from sft.chat.render import ChatRenderer, TrainOn
from sft.data.records import detect_layout, normalize
from sft.labels import IGNORE_INDEX
from sft.tokens.encoding import Encoder
from stages.importing.command import as_params, import_configuration
from stages.loading.mapping import RowMapping
from stages.params.schema import check_params
from stages.shards.rendering import with_system_message
from tests.tiny import tiny_tokenizer

EXPECTED = json.loads(Path(__file__).with_name("peer_tokens.json").read_text(encoding="utf-8"))
MARKS = (
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
)
CHATS = [
    {
        "conversations": [
            {"from": "human", "value": "What is 2+2?"},
            {"from": "gpt", "value": "Four."},
            {"from": "human", "value": "And 3+3?"},
            {"from": "gpt", "value": "Six, of course."},
        ]
    }
]
TASKS = [
    {"instruction": "Translate to German.", "input": "Good morning", "output": "Guten Morgen"},
    {"instruction": "Name a colour.", "input": "", "output": "Blue"},
]
OWN_TYPE = {
    "system_prompt": "Be brief. ",
    "format": "[Q] {instruction} ({input}) [A]",
    "no_input_format": "[Q] {instruction} [A]",
}


def configuration(case: str) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """Return the project, a configuration, and the rows of a case."""
    peer, name, *options = case.split(" ")
    if peer == "llamafactory":
        info = {"chats": {"hf_hub_url": "org/chats", "formatting": "sharegpt"}}
        values = {"model_name_or_path": "org/model", "template": name, "dataset": "chats", "dataset_dir": info}
        return peer, {**values, "enable_thinking": options == ["True"]}, CHATS
    if name == "chat_template":
        mapped = {"role": "from", "content": "value"}
        entry = {"type": name, "field_messages": "conversations", "message_property_mappings": mapped}
        return (
            peer,
            {"base_model": "org/model", "chat_template": options[0], "datasets": [{"path": "a/b", **entry}]},
            CHATS,
        )
    rows, entry = TASKS, {"type": name.removesuffix(":None")}
    if name == "user_defined":
        entry = {"type": OWN_TYPE}  # type: ignore[dict-item]
    if name == "completion":
        rows, entry = [{"body": "Some plain text."}], {"type": name, "field": "body"}
    return peer, {"base_model": "org/model", "datasets": [{"path": "a/b", **entry}]}, rows


@pytest.mark.parametrize("case", EXPECTED)
def test_ids_and_labels_are_those_of_the_other_project(case: str, tmp_path: Path) -> None:
    peer, values, rows = configuration(case)
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(values), encoding="utf-8")
    draft = import_configuration(peer, [str(file)])
    params = check_params(YAML(typ="safe", pure=True).load(as_params(draft)))
    for name, text in draft.files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS], special_tokens=True)
    template = params.format.chat_template
    if template is not None:
        path = tmp_path / template
        apply_chat_format(tokenizer, find_format(path if path.is_file() else template))
    mapping = RowMapping(params.load.sources[0])
    for row in rows:
        mapping.observe(row)
    layout = detect_layout(mapping.columns())
    renderer = ChatRenderer(tokenizer, TrainOn(params.format.train_on), not_printed=params.format.not_printed)
    for row, wanted in zip(rows, EXPECTED[case], strict=True):
        record = with_system_message(normalize(mapping.apply(row), layout), params.format.system_message)
        (found,) = Encoder(tokenizer).encode([renderer.render(record)])
        trained = [index for start, end in wanted["trained"] for index in range(start, end)]
        assert list(found["input_ids"]) == wanted["ids"]
        assert [index for index, label in enumerate(found["labels"]) if label != IGNORE_INDEX] == trained
