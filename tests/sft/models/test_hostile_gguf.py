"""GGUF files from elsewhere are converted or refused in one message."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from sft.models.gguf import dequantize_gguf
from sft.untrusted.gguf_files import GgufError, check_gguf_file
from tests.tiny import tiny_model, tiny_tokenizer
from tests.tiny_gguf import write_gguf


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    model = tiny_model(pad_token_id=tiny_tokenizer().pad_token_id)
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model, tiny_tokenizer()).read_bytes()


def changed(whole: bytes, path: Path, key: bytes, value: int) -> Path:
    """Write the file with another value of a 32-bit number in its metadata."""
    at = whole.index(key) + len(key) + 4
    path.write_bytes(whole[:at] + value.to_bytes(4, "little") + whole[at + 4 :])
    return path


@pytest.mark.parametrize(
    ("key", "said"),
    [
        (b"llama.block_count", "it states 2000000000 layers, and has 20 tensors"),
        (b"llama.embedding_length", "it states embedding_length 2000000000, and no tensor has more than 384 rows"),
        (b"llama.vocab_size", "it states vocab_size 2000000000, and no tensor has more than 384 rows or columns"),
    ],
)
def test_sizes_that_no_tensor_has_are_refused(whole: bytes, tmp_path: Path, key: bytes, said: str) -> None:
    path = changed(whole, tmp_path / "a.gguf", key, 2_000_000_000)
    with pytest.raises(GgufError) as raised:
        dequantize_gguf(path, tmp_path / "plain")
    assert said in str(raised.value)


def test_numbers_of_values_and_tensors_without_end_are_refused(whole: bytes, tmp_path: Path) -> None:
    for at in (8, 16):
        path = tmp_path / f"{at}.gguf"
        path.write_bytes(whole[:at] + (1 << 62).to_bytes(8, "little") + whole[at + 8 :])
        with pytest.raises(GgufError, match=rf"{at}\.gguf: "):
            check_gguf_file(path)


def test_a_file_cut_off_anywhere_is_refused(whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for length in (5, 30, 500, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(GgufError):
            check_gguf_file(path)


def test_damage_at_any_place_of_the_metadata_is_read_or_refused(whole: bytes, tmp_path: Path) -> None:
    source, end = random.Random(0), whole.index(b"blk.0")
    for number in range(60):
        damaged = bytearray(whole)
        for _ in range(source.choice((1, 4))):
            damaged[source.randrange(8, end)] = source.randrange(256)
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(damaged)
        message = path.name
        try:
            check_gguf_file(path)
        except GgufError as error:
            message = str(error)
        assert path.name in message


def test_weights_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    model = tiny_model(pad_token_id=tiny_tokenizer().pad_token_id)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    path = write_gguf(tmp_path / "a.gguf", model, tiny_tokenizer())
    with pytest.raises(ValueError, match=r"The weight model\.norm\.weight of '.*a\.gguf' has values that are NaN"):
        dequantize_gguf(path, tmp_path / "plain")
