"""Secrets do not reach messages and records."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from stages.__main__ import fail
from stages.checkout.redaction import redact, secret_spans
from stages.params.schema import ParamsError, load_params
from stages.tracking.result import log_patch, log_text
from tests.stages.training_root import REPO


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("postgresql://ada:hunter22@db:5432/mlflow", "postgresql://***@db:5432/mlflow"),
        ("see https://token@host/x and http://host/y", "see https://***@host/x and http://host/y"),
        ("Bearer hf_abcdefgh", "Bearer ***"),
        ("sqlite:///mlflow.db, a@b.org", "sqlite:///mlflow.db, a@b.org"),
        ("short", "short"),
    ],
)
def test_passwords_in_urls_and_tokens_of_the_environment_are_hidden(text: str, shown: str) -> None:
    assert redact(text, {"HF_TOKEN": "hf_abcdefgh", "DB_PASSWORD": "short", "HOME": "/home/ada/db"}) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        # a URL as it is, in JSON, and escaped for another URL, once and twice
        ("https:\\/\\/ada:pw@host\\/x", "https:\\/\\/***@host\\/x"),
        ("u=https%3A%2F%2Fada%3Apw%40host%2Fx", "u=https%3A%2F%2F***%40host%2Fx"),
        ("u=https%253A%252F%252Fada%253Apw%2540host", "u=https%253A%252F%252F***%2540host"),
        ("redis://:pw@h:6379/0", "redis://***@h:6379/0"),
        ("mongodb+srv://u:p%40ss@h/db", "mongodb+srv://***@h/db"),
        # signed URLs
        (
            "s3.amazonaws.com/x?X-Amz-Credential=AKID%2F2026&X-Amz-Date=2026&X-Amz-Signature=abcdef01",
            "s3.amazonaws.com/x?X-Amz-Credential=***&X-Amz-Date=2026&X-Amz-Signature=***",
        ),
        ("https://a.blob/x?sv=2022-11-02&sp=r&sig=Zm9v%3D", "https://a.blob/x?sv=2022-11-02&sp=r&sig=***"),
        ("https://h/x?token=abcdef&page=1", "https://h/x?token=***&page=1"),
        ('"https://h/x?page=1\\u0026sig=abcdef"', '"https://h/x?page=1\\u0026sig=***"'),
        ("https://h/x?page=1&amp;access_token=abcdef&amp;b=2", "https://h/x?page=1&amp;access_token=***&amp;b=2"),
        ("to=https%3A%2F%2Fh%2Fx%3Fa%3D1%26sig%3Dabcdef%26b%3D2", "to=https%3A%2F%2Fh%2Fx%3Fa%3D1%26sig%3D***%26b%3D2"),
        # connection strings
        ("Server=db;Uid=ada;Pwd=swordfish;", "Server=db;Uid=ada;Pwd=***;"),
        ("host=db user=ada password=hunter22 dbname=x", "host=db user=ada password=*** dbname=x"),
        ("AccountName=a;SharedAccessKey=Zm9vYmFy1=;X=y", "AccountName=a;SharedAccessKey=***;X=y"),
        # what a name gives away
        ('{"password": "correct horse", "api_key": "abcd-efgh"}', '{"password": "***", "api_key": "***"}'),
        ('{\\"password\\": \\"hunter2\\"}', '{\\"password\\": \\"***\\"}'),
        ("{&#34;password&#34;: &#34;hunter2&#34;}", "{&#34;password&#34;: &#34;***&#34;}"),
        ('+    client = Client(token="s3cr3tT0kenValue0099")', '+    client = Client(token="***")'),
        ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "aws_secret_access_key = ***"),
        ("Authorization: Basic YWRhOmh1bnRlcjIy", "Authorization: Basic ***"),
        ("-H 'Authorization: token abcdefgh12345'", "-H 'Authorization: token ***'"),
        # what its form gives away
        ("hf_AbCdEfGhIjKlMnOpQrStUvWx1234567890 is", "*** is"),
        ("ghp_0123456789abcdefghijklmnopqrstuvwxyz is", "*** is"),
        ("AKIAIOSFODNN7EXAMPLE, wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "***, ***"),
        ("AIzaSyA1234567890abcdefghijklmnopqrstuv is", "*** is"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3jVmNHl0w5N is", "*** is"),
        (
            "-----BEGIN EC PRIVATE KEY-----\n+MII\n+-----END EC PRIVATE",
            "-----BEGIN EC PRIVATE KEY-----***-----END EC PRIVATE",
        ),
        # forms that only detect-secrets knows
        ("bot xoxb-123456789012-abcdefghijkl is", "bot *** is"),
        ("SG.abcdefghijklmnopqrstu1.abcdefghijklmnopqrstuvwxyz0123456789abcdefg is", "*** is"),
        ("sk_live_abcdefghijklmnopqrstuv12 is", "*** is"),
        ("0123456789abcdef0123456789abcdef-us12 is", "*** is"),
    ],
)  # fmt: skip
def test_secrets_that_are_in_no_variable_are_hidden(text: str, shown: str) -> None:
    assert redact(text, {}) == shown


@pytest.mark.parametrize(
    "form",
    ["p/w %s", "p%2Fw%20%25s", "p%2fw%20%25s", "p/w%20%25s", "p%2Fw+%25s", "p\\/w %s"],
)
def test_a_variables_value_is_hidden_in_every_escaped_form(form: str) -> None:
    environment = {"DB_PASSWORD": 'p/w %s "ä<'}
    escaped = {
        "p/w %s": ['p/w %s "ä<', 'p/w %s \\"\\u00e4<', 'p/w %s \\"ä<', "p/w %s &quot;ä&lt;"],
        "p%2Fw%20%25s": ["p%2Fw%20%25s%20%22%C3%A4%3C"],
        "p%2fw%20%25s": ["p%2fw%20%25s%20%22%c3%a4%3c"],
        "p/w%20%25s": ["p/w%20%25s%20%22%C3%A4%3C"],
        "p%2Fw+%25s": ["p%2Fw+%25s+%22%C3%A4%3C"],
        "p\\/w %s": ['p\\/w %s \\"ä<'],
    }
    for text in escaped[form]:
        assert redact(f"<{text}>", environment) == "<***>"


@pytest.mark.parametrize(
    "text",
    [
        "commit 6079a14b0cf2f2c3b1f4d5a6e7f8090a1b2c3d4e",
        "md5: 5f3759df5f3759df5f3759df5f3759df.dir",
        "sha256: e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "password: required, secret: str, token: int",
        'eos_token: "<|im_end|>", pad_token="<|reserved_special_token_12|>"',
        "tokens_per_second: 1234567890.1234567",
        'api_key=os.environ["OPENAI_API_KEY"]',
        "secret_key = settings.secret_key",
        "PWD=/home/ada1/project, private_key: /etc/ssl/key1.pem",
        "https://host:8080/a@b, git@github.com:a/b.git, ssh://git@github.com/a, postgresql://ada@db/mlflow",
        "https://host/x?${SFT_SECRET_ROWS}, https://${SFT_SECRET_USER}@host/x",
        "https://h/x?download=true&page=2&q=token",
    ],
)
def test_hashes_placeholders_and_ordinary_text_stay(text: str) -> None:
    assert redact(text, {}) == text


def test_no_figure_page_or_code_of_this_repository_is_garbled() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True, check=True).stdout
    names = [name for name in tracked.splitlines() if name.startswith(("reports/", "docs/", "data/", "sft/", "flows/"))]
    assert len(names) > 100
    for name in [*names, "README.md", "params.yaml", "dvc.yaml", "dvc.lock", "requirements.lock"]:
        content = (REPO / name).read_bytes().decode("utf-8", "replace")
        found = [content[max(0, start - 40) : stop] for start, stop in secret_spans(content, {})]
        assert (name, found) == (name, [])


@pytest.mark.parametrize(
    "text",
    [
        "password=",
        "a1_",
        "pass ",
        "://a:",
        "%3A%2F%2Fa",
        "-----BEGIN PRIVATE KEY-----",
        "?token=",
        "eyJaaaaaaa.",
        '\\"',
    ],
)
def test_the_time_is_proportional_to_the_length(text: str) -> None:
    """A text of 16 times the length takes about 16 times as long; a square would be 256 times."""
    redact(text, {})

    def fastest(length: int) -> float:
        times = []
        for _ in range(3):
            started = time.process_time()
            redact(text * (length // len(text)), {})
            times.append(time.process_time() - started)
        return min(times)

    assert fastest(320_000) < 64 * fastest(20_000) + 0.5


def test_an_ordinary_line_does_not_load_the_library() -> None:
    code = """
import sys
from stages.checkout.redaction import redact
for line in ("step 5/10 loss 1.25 (outs/train/adapter)", "ABCDEFGH12345678"):
    redact(line)
    print("detect_secrets" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_an_error_is_printed_without_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "correct horse")
    fail(ValueError("https://ada:hunter22@host refused 'correct horse'"), 1)
    assert capsys.readouterr().err == "error: https://***@host refused '***'\n"


def test_a_recorded_patch_holds_no_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = "+  tracking_uri: postgresql://ada:hunter22@db/mlflow\n"
    monkeypatch.setattr("stages.tracking.lineage.git_diff", lambda root, without=(): patch)
    recorded = []

    class Run:
        def log_file(self, path: Path, folder: str) -> None:
            recorded.append(path.read_text())

    log_patch(Run(), tmp_path)
    assert recorded == ["+  tracking_uri: postgresql://***@db/mlflow\n"]


def test_params_with_a_password_in_a_source_are_refused(tmp_path: Path) -> None:
    text = (REPO / "params.yaml").read_text(encoding="utf-8")
    file = tmp_path / "params.yaml"
    file.write_text(text.replace("- path: data/shop_train.jsonl", "- path: https://ada:hunter22@host/rows.jsonl"))
    with pytest.raises(
        ParamsError, match=r"load\.sources\.0\.path: .*would be recorded wherever params\.yaml is"
    ) as caught:
        load_params(file)
    assert "hunter22" not in redact(str(caught.value))


def test_a_recorded_params_file_holds_no_password() -> None:
    recorded = {}

    class Run:
        def log_file(self, path: Path, folder: str) -> None:
            recorded[f"{folder}/{path.name}"] = path.read_text()

    log_text(Run(), "params.yaml", "tracking_uri: postgresql://ada:hunter22@db/mlflow\n")
    assert recorded == {"lineage/params.yaml": "tracking_uri: postgresql://***@db/mlflow\n"}
