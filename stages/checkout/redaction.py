"""Removal of secrets from texts that are printed or recorded: messages, logs, patches, pages, and what MLflow is sent.

Hidden are the values of environment variables that are secrets, what follows a name such as `password` or
`X-Amz-Signature`, passwords in URLs, and tokens that their form gives away. The forms of services' tokens come from the
library detect-secrets, besides those below. Its search by entropy is not used: a SHA-256 or a git commit looks like a
secret to it. A text without a suspicious part costs a few microseconds, and does not import the library.
"""

from __future__ import annotations

import functools
import html
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TextIO
from urllib.parse import quote, quote_plus

HIDDEN = "***"
MIN_LENGTH = 8

_SECRET_NAME = re.compile(
    r"(TOKEN|PASSWORD|PASSWD|PASSPHRASE|SECRET|CREDENTIALS?|CONNECTION_STRING|AUTH_STRING"
    r"|(API|ACCESS|SECRET|PRIVATE|ACCOUNT|STORAGE|ENCRYPTION|SIGNING|AUTH)_?KEY|(^|_)(PASS|PAT|DSN|SAS))$"
    r"|^SFT_SECRET_",
    re.IGNORECASE,
)


class _Rule(NamedTuple):
    """A form of secrets.

    Args:
        marks: Lower-case texts, one of which every text with such a secret contains; looked for first.
        pattern: Finds a secret, which is the group `secret`.
        is_secret: Whether what was found is a secret.
    """

    marks: tuple[str, ...]
    pattern: re.Pattern[str]
    is_secret: Callable[[str], bool]


def _always(found: str) -> bool:
    return True


def _no_placeholder(found: str) -> bool:
    """Return whether a value is written out, and is neither a placeholder nor the name of one."""
    return not _PLACEHOLDER.match(found)


def _is_random(found: str) -> bool:
    """Return whether a value looks generated: letters and digits. An identifier is a value only if it has digits."""
    return _no_placeholder(found) and bool(re.search(r"[A-Za-z]", found) and re.search(r"\d", found))


def _is_token(found: str) -> bool:
    """Return whether a value of a name such as `token`, which other values have too, looks generated."""
    return _is_random(found) and len(re.findall(r"\d", found)) >= 3


_PLACEHOLDER = re.compile(
    r"\*+$|\.\.\.|…|\$|[<{%[(]|(none|null|true|false|your|my|the|example|changeme|xxx+|x+|str|int|bool|os\.)\b|x{3,}"
    r"|[~.]?/[\w.-]+/",
    re.IGNORECASE,
)

# Quantifiers have limits, so that no text takes longer than a time proportional to its length. Quotes may be escaped as
# in JSON, once or several times, and as in HTML.
_QUOTE = r"""(?:\\{0,8}["']|&quot;|&\#0?3[49];)"""
_IS = r"\]?\s{0,8}(?:=>|:=|=|:)\s{0,8}"
_KEYS = [
    f"{kind}{dash}key"
    for kind in ("api", "access", "secret", "private", "account", "storage", "shared", "encryption", "signing")
    for dash in ("", "_", "-", ".")
]
_PHRASES = ["password", "passwd", "passphrase"]
_STRONG = [*_PHRASES, "pwd", "secret", *_KEYS, "sharedaccesskey", "sharedaccesssignature", "auth_string", "auth-string"]
_PARAMETERS = [
    *("signature", "sig", "hmac", "token", "code", "auth", "key", "credential", "credentials", *_STRONG),
    *("accesskeyid", "accessid", "key-pair-id"),
]


# Beginnings or parts of the tokens of services, in lower case.
_FORMS = """
    akia asia hf_ aiza ya29. gocspx- sk- github_pat_ ghp_ gho_ ghu_ ghs_ ghr_ eyj dapi dop_v1_ dckr_pat_ npm_ hvs. pnu_
    pnb_ gsk_ nvapi- r8_ age-secret-key- xai- glpat- xapp- shpat_ sbp_ 8q~ lin_api_ pplx-
""".split()  # noqa: SIM905 - one line each would be longer


def _any(words: list[str]) -> str:
    return "(?:" + "|".join(map(re.escape, sorted(words, key=len, reverse=True))) + ")"


def _rule(
    marks: list[str], pattern: str, is_secret: Callable[[str], bool] = _always, flags: int = re.IGNORECASE
) -> _Rule:
    return _Rule(tuple(marks), re.compile(pattern, flags | re.VERBOSE), is_secret)


_RULES = (
    # URL as it is, in JSON (`:\/\/`), and escaped for another URL (`%3A%2F%2F`), also twice
    _rule(
        ["://", ":\\/"],
        r":(?:\\{0,8}/){2}(?P<secret>[^\s/@:'\"<>?\#\\]{0,256}:[^\s/'\"<>?\#\\]{1,1024})@",
        _no_placeholder,
    ),
    _rule(["http"], r"\bhttps?:(?:\\{0,8}/){2}(?P<secret>[^\s/@:'\"<>?\#\\]{1,1024})@", _no_placeholder),
    _rule(
        ["3a%"],
        r"%(?:25){0,4}3A(?:%(?:25){0,4}2F){2}(?P<secret>(?:(?!%(?:25){0,4}(?:2F|3A|40|3F))[^\s/@'\"<>&]){0,256}"
        r"%(?:25){0,4}3A(?:(?!%(?:25){0,4}(?:2F|40))[^\s/@'\"<>&]){1,1024})%(?:25){0,4}40",
    ),
    # parameters of URLs that sign them or log in
    _rule(
        ["=", "%3d", "u003d"],
        r"(?:[?&;\#]|&amp;|\\u0026|%(?:25){0,4}(?:3F|26))(?:[a-z]{1,20}[-_]){0,4}?"
        + _any(_PARAMETERS)
        + r"(?:=|\\{1,8}u003d|%(?:25){0,4}3D)"
        r"(?P<secret>(?:(?!%(?:25){0,4}26|\\{1,8}u0026|&amp;)[^\s&\#'\"<>;\\`)\]}]){4,4096})",
        _no_placeholder,
    ),
    _rule(
        ["authorization", "bearer"],
        r"(?:authorization" + _QUOTE + "?" + _IS + _QUOTE + r"?(?:basic|bearer|token|digest|apikey)?|\bbearer)"
        r"\s{1,8}(?P<secret>[\w.~+/=:-]{8,4096})",
        lambda found: _no_placeholder(found) and bool(re.search(r"[\d=]", found)),
    ),
    # what is quoted after a name: `"password": "..."`, `api_key = '...'`, `--client-secret "..."`
    _rule(
        ["pass", "pwd", "secret", "key", "accesssignature", "auth"],
        _any(_STRONG) + _QUOTE + "?(?:" + _IS + r"|\s)[rbfu]?(?P<quote>" + _QUOTE + r")"
        r"(?P<secret>[^\s\"'<>]{4,1024}?)(?P=quote)",
        _no_placeholder,
    ),
    _rule(
        ["passw", "passp"],
        _any(_PHRASES) + _QUOTE + "?" + _IS + "[rbu]?(?P<quote>" + _QUOTE + r")"
        r"(?P<secret>[^\"'<>\n]{4,80}?)(?P=quote)",
        _no_placeholder,
    ),
    # without quotes: `password=hunter22`, `AccountKey=...;`, `aws_secret_access_key = ...`
    _rule(
        ["pass", "pwd", "secret", "key", "accesssignature", "auth"],
        _any(_STRONG) + _IS + r"(?P<secret>[^\s\"'<>&,;`\\()\[\]{}]{6,4096})(?![(\[])",
        _is_random,
    ),
    _rule(
        [
            *(f"token{end}" for end in "=:\"'\\]& "),
            "credential",
            "auth",
            "sas=",
            "pat=",
            'sas"',
            'pat"',
            "sas:",
            "pat:",
        ],
        r"(?:token|credentials?|auth|(?<![a-z])(?:sas|pat))"
        + _QUOTE
        + "?"
        + _IS
        + _QUOTE
        + r"?(?P<secret>[\w.~+/=-]{16,4096})(?![(\[\w])",
        _is_token,
    ),
    # DSN of ODBC and ADO: `Server=db;Uid=ada;Pwd=...;`
    _rule(["pwd", "password"], r";\s{0,8}(?:pwd|password)\s{0,8}=\s{0,8}(?P<secret>[^;\"'\s]{3,256})", _no_placeholder),
    _rule(
        ["private key"],
        r"-----BEGIN\ [A-Z0-9\ ]{0,40}PRIVATE\ KEY(?:\ BLOCK)?-----(?P<secret>(?:(?!-----END).){1,20000})",
        flags=re.DOTALL,
    ),
    _rule(
        ["putty-user-key"],
        r"PuTTY-User-Key-File-\d:(?P<secret>(?:(?!Private-MAC).){1,20000})",
        flags=re.DOTALL,
    ),
    # the secret half of AWS's keys has no form of its own, but stands beside the public one
    _rule(
        ["akia", "asia"],
        r"(?<![A-Za-z0-9/+=])(?P<secret>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])",
        lambda found: all(re.search(letters, found) for letters in ("[a-z]", "[A-Z]", "[0-9]")),
        flags=0,
    ),
    # tokens by their form
    _rule(
        _FORMS,
        r"(?<![A-Za-z0-9_])(?P<secret>(?:AKIA|ASIA)[A-Z0-9]{16}|hf_(?:oauth_)?[A-Za-z0-9]{20,200}|AIza[\w-]{35}"
        r"|ya29\.[\w-]{20,2048}|GOCSPX-[\w-]{20,64}|sk-(?:[a-z0-9]{1,16}-){0,4}[A-Za-z0-9_-]{20,256}"
        r"|github_pat_\w{22,256}|gh[pousr]_[A-Za-z0-9]{36,256}"
        r"|eyJ[\w=-]{8,4096}\.[\w=-]{8,8192}(?:\.[\w=-]{0,4096}){0,3}|dapi[0-9a-f]{32}(?:-\d)?|dop_v1_[0-9a-f]{64}"
        r"|dckr_pat_[\w-]{20,64}|npm_[A-Za-z0-9]{36}|hvs\.[\w-]{24,256}|pn[ub]_[A-Za-z0-9]{30,64}"
        r"|gsk_[A-Za-z0-9]{40,64}|nvapi-[\w-]{40,128}|r8_[A-Za-z0-9]{37}|AGE-SECRET-KEY-1[A-Z0-9]{50,64}"
        r"|xai-[A-Za-z0-9]{40,128}|glpat-[\w-]{20,64}|xapp-[\w-]{20,256}|shpat_[0-9a-f]{32}|sbp_[0-9a-f]{40}"
        r"|[\w~.-]{3}8Q~[\w~.-]{31,34}|lin_api_\w{30,64}|pplx-[A-Za-z0-9]{40,64})",
        lambda found: bool(re.search(r"\d", found)),
        flags=0,
    ),
)

# What a text must contain before detect-secrets is imported, which takes longer than to redact a thousand lines.
_RUN = re.compile(r"[0-9a-z]{32}-us\d|[A-Za-z0-9_]{16,}|xox[a-z]-|_authToken|cloudant|softlayer|hooks\.slack")
_NO_TOKEN = re.compile(r"[0-9a-f]+\Z|[A-Za-z_]+\Z|\d+\Z")
"""Runs of letters and digits that are hashes, identifiers and numbers."""

_REACH = 256
"""Letters before and after such a run in which a pattern of detect-secrets may match."""

_PIECE = 1024
"""Letters that are searched at once: some patterns take a time proportional to the square of the length."""

_NOT_USED = {"IPPublicDetector", "BasicAuthDetector", "KeywordDetector", "PrivateKeyDetector"}
"""Plugins of detect-secrets whose findings are not secrets, or that the rules above replace."""


def is_secret(name: str) -> bool:
    """Return whether an environment variable of this name contains a secret."""
    return _is_secret(name)


@functools.lru_cache(maxsize=4096)
def _is_secret(name: str) -> bool:
    return _SECRET_NAME.search(name) is not None


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """Replace the secrets in a text by `***`.

    Args:
        text: A text that leaves the process, such as a message, a patch or a URL.
        environment: Variables; None = those of this process. Values of variables whose names end in TOKEN, PASSWORD,
            SECRET and the like are secrets, also escaped for URLs, JSON or HTML, unless they are shorter than 8
            characters.
    """
    spans = secret_spans(text, environment)
    if not spans:
        return text
    parts, end = [], 0
    for start, stop in spans:
        parts += [text[end:start], HIDDEN]
        end = stop
    return "".join([*parts, text[end:]])


def secret_spans(text: str, environment: Mapping[str, str] | None = None) -> list[tuple[int, int]]:
    """Return where a text has secrets, as `(start, stop)` in order and without overlaps; see `redact`."""
    found = [span for span in _found(text, os.environ if environment is None else environment) if span[0] < span[1]]
    spans: list[tuple[int, int]] = []
    for start, stop in sorted(found):
        if spans and start < spans[-1][1]:
            spans[-1] = (spans[-1][0], max(stop, spans[-1][1]))
        else:
            spans.append((start, stop))
    return spans


def _found(text: str, environment: Mapping[str, str]) -> Iterator[tuple[int, int]]:
    # `items` of os.environ decodes every value at every call
    names = [name for name in environment if _is_secret(name)]
    values = tuple(value for name in names if len(value := environment[name]) >= MIN_LENGTH)
    if values:
        for match in _values_pattern(values).finditer(text):
            yield match.span()
    lower = text.lower()
    for rule in _RULES:
        if any(mark in lower for mark in rule.marks):
            for match in rule.pattern.finditer(text):
                if rule.is_secret(match["secret"]):
                    yield match.span("secret")
    for start, piece in _suspicious_pieces(text):
        for pattern in _library_patterns():
            for match in pattern.finditer(piece):
                secret = match[0].strip(" \t\r\n=:\"'")
                if any(letter.isdigit() for letter in secret):
                    begin = start + match.start() + match[0].index(secret)
                    yield begin, begin + len(secret)


def _suspicious_pieces(text: str) -> Iterator[tuple[int, str]]:
    """Yield the pieces of a text that may contain a token, each with its start; pieces overlap by `_REACH`."""
    end = 0
    for run in _RUN.finditer(text):
        if _NO_TOKEN.match(run[0]) and len(run[0]) >= 16:
            continue
        start, stop = max(run.start() - _REACH, end - _REACH, 0), min(run.end() + _REACH, len(text))
        while end < stop:
            end = min(start + _PIECE, stop)
            yield start, text[start:end]
            start = end - _REACH


@functools.lru_cache(maxsize=8)
def _values_pattern(values: tuple[str, ...]) -> re.Pattern[str]:
    """Return a pattern for secrets as they are, and as they are escaped for URLs, JSON, HTML and Python."""
    forms = {form for value in values for form in _forms(value)}
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True))))


def _forms(value: str) -> set[str]:
    in_json = [json.dumps(value, ensure_ascii=ascii)[1:-1] for ascii in (True, False)]
    quoted = [quote(value), quote(value, safe=""), quote_plus(value)]
    lower = [re.sub("%[0-9A-F]{2}", lambda found: found[0].lower(), form) for form in quoted]
    slashes = [form.replace("/", "\\/") for form in in_json]
    return {value, *in_json, *slashes, *quoted, *lower, html.escape(value), repr(value)[1:-1]}


@functools.cache
def _library_patterns() -> list[re.Pattern[str]]:
    """Return the patterns of detect-secrets for tokens of services."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector

    plugins: list[Any] = [
        plugin
        for plugin in get_mapping_from_secret_type_to_class().values()
        if issubclass(plugin, RegexBasedDetector) and plugin.__name__ not in _NOT_USED
    ]
    return [pattern for made in (plugin() for plugin in plugins) for pattern in made.denylist]


class RedactedStream:
    """A text stream that redacts what is written to it; everything else is that of the stream.

    Args:
        stream: Where the text is written to, such as `sys.stdout`.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text without its secrets, and return the length of the given text."""
        self._stream.write(redact(text) if len(text) >= MIN_LENGTH else text)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)
