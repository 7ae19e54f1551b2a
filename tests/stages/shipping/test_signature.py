"""Signatures of shipped folders; needs the package model-signing (the extra `signing`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from stages.shipping.manifest import write_manifest
from stages.shipping.signature import KEY_VARIABLE, PASSWORD_VARIABLE, check_signature, sign, signing_key

SECRET = b"hunter2secret99"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    place = tmp_path / "model"
    (place / "provenance").mkdir(parents=True)
    (place / "model.safetensors").write_bytes(bytes(range(256)))
    (place / "provenance" / "record.json").write_text("{}")
    write_manifest(place)
    return place


def write_keys(place: Path, password: bytes | None = None) -> tuple[Path, Path]:
    key = ec.generate_private_key(ec.SECP256R1())
    locked = serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password)
    pem = serialization.Encoding.PEM
    private, public = place / "signer.pem", place / "signer.pub"
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, locked))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return private, public


def test_any_changed_file_and_any_other_key_breaks_the_signature(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verifying = pytest.importorskip("model_signing.verifying")
    private, public = write_keys(tmp_path, SECRET)
    monkeypatch.setenv(PASSWORD_VARIABLE, SECRET.decode())
    assert check_signature(folder, public) == "there is no signature (model.sig)"
    sign(folder, private)
    assert check_signature(folder, public) == ""
    verifying.Config().use_elliptic_key_verifier(public_key=str(public)).verify(folder, folder / "model.sig")
    assert str(tmp_path).encode() not in (folder / "model.sig").read_bytes()

    (folder / ".cache").mkdir()  # as the hub's client leaves it
    (folder / ".cache" / "x").write_text("")
    assert check_signature(folder, public) == ""
    (tmp_path / "other").mkdir()
    assert check_signature(folder, write_keys(tmp_path / "other")[1]) != ""
    (folder / "model.safetensors").write_bytes(bytes(255))
    write_manifest(folder)
    assert "model.safetensors" in check_signature(folder, public)
    (folder / "model.sig").write_text("{")
    assert check_signature(folder, public) != ""


def test_a_key_that_can_not_be_used_is_one_message(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert signing_key() is None
    pytest.importorskip("model_signing")
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "none.pem"))
    with pytest.raises(ValueError, match="SFT_SIGNING_KEY names a key that does not exist"):
        signing_key()
    private, _ = write_keys(tmp_path, SECRET)
    monkeypatch.setenv(KEY_VARIABLE, str(private))
    assert signing_key() == private
    monkeypatch.setenv(PASSWORD_VARIABLE, "another")
    with pytest.raises(ValueError, match="SFT_SIGNING_KEY: the key can't be used"):
        sign(folder, private)
    private.write_text("no key")
    with pytest.raises(ValueError, match="must be an elliptic-curve key in PEM"):
        sign(folder, private)
