"""Download of data files from URLs (`s3://`, `gs://`, `https://`, ...) with fsspec, and the version of each file."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from sft.data.source_row import SourceError
from sft.data.sources import SAVED_DATASET, SAVED_SPLITS, is_readable, readable
from sft.folders import partial_file
from sft.web import UrlRefused, check_host, limited_client

WEB = frozenset({"http", "https"})
# Their URLs name a host, and not a bucket or repository of a service.
HOSTED = WEB | {"arrow_hdfs", "ftp", "hdfs", "sftp", "smb", "ssh", "webdav", "webhdfs"}
REMOTE = HOSTED | {
    "abfs", "adl", "az", "box", "dbfs", "dropbox", "gcs", "gdrive", "gist", "github", "gs", "hf", "lakefs", "memory",
    "oci", "ocilake", "oss", "s3", "s3a", "tos", "tosfs", "wandb",
}  # fmt: skip
"""Protocols of fsspec whose files lie elsewhere. The others read this machine's files, or URLs that a file states."""

LAYERS = frozenset({"blockcache", "cached", "dir", "filecache", "libarchive", "simplecache", "tar", "zip"})
"""Protocols that may precede one of `REMOTE` in a chain, such as `zip://*.jsonl::https://host/rows.zip`."""

_VARIABLE = re.compile(r"\$\{(\w+)\}")
SECRET_VARIABLE = "SFT_SECRET_"
"""Beginning of the names of environment variables that a URL may contain as `${NAME}`."""

# Names under which file systems report a file's etag or checksum, and the time of its last change.
_ETAGS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "Last-Modified", "created")


OnBytes = Callable[[int, int, str], None]
"""Called with the bytes of a file that have arrived, those of all of it, and its name."""


class RemoteFile(NamedTuple):
    """A downloaded file.

    Args:
        url: URL of the file.
        path: The copy on this machine.
        version: Its `size` in bytes, and its `etag` and `modified` time if the file system reports them.
    """

    url: str
    path: Path
    version: dict[str, Any]


def is_url(text: str) -> bool:
    """Return whether a path in params.yaml is a URL."""
    return "://" in text


def fetch_files(url: str, folder: Path, on_bytes: OnBytes | None = None) -> list[RemoteFile]:
    """Download all data files of a URL: a file, a folder (searched recursively), or a glob pattern.

    Args:
        url: Such as `s3://bucket/chats/*.jsonl`; its file system looks up credentials as usual. `${SFT_SECRET_NAME}`
            is replaced by that environment variable for the download only: names, messages and records keep the text.
        folder: Where copies are kept. A copy of an earlier call is reused if the file's etag is the same.
        on_bytes: Called while a file arrives, if the file system tells its size.

    Raises:
        SourceError: There is no data file, the URL can't be reached or leads to this machine or a private network, or
            its protocol needs a package that is not installed.
    """
    secrets = _secrets(url)
    opened = _VARIABLE.sub(lambda found: secrets[found[1]], url)
    try:
        return [file._replace(url=_hidden(file.url, secrets)) for file in _fetched(opened, folder, on_bytes)]
    except SourceError as error:
        if not secrets:
            raise
        raise SourceError(_hidden(str(error), secrets)) from None  # the causes contain the secret


def check_url(url: str) -> None:
    """Check a URL without reaching it: its protocols, and that its variables are set.

    Raises:
        SourceError: It leads to this machine, a protocol is unknown, or a variable is not set.
    """
    secrets = _secrets(url)
    _reached(url, _layers, _VARIABLE.sub(lambda found: secrets[found[1]], url))


def _secrets(url: str) -> dict[str, str]:
    """Return the environment variables that a URL contains, by name.

    Raises:
        SourceError: One is not set, or its name is not that of a variable for URLs: who writes params.yaml must not be
            able to send any variable to any server.
    """
    names = _VARIABLE.findall(url)
    for name in names:
        if not name.startswith(SECRET_VARIABLE):
            raise SourceError(f"{url}: variables of URLs are called {SECRET_VARIABLE}...; rename {name}")
        if not os.environ.get(name):
            raise SourceError(f"{url}: the environment variable {name} is not set; set it where the pipeline runs")
    return {name: os.environ[name] for name in names}


def _hidden(text: str, secrets: dict[str, str]) -> str:
    """Return a text with the values of variables replaced by `${NAME}`, also where they were escaped for a URL."""
    for name, value in secrets.items():
        for form in {value, quote(value), quote(value, safe="")}:
            text = text.replace(form, f"${{{name}}}")
    return text


def _fetched(url: str, folder: Path, on_bytes: OnBytes | None) -> list[RemoteFile]:
    layers = _reached(url, _layers, url)
    system, path = _reached(url, _file_system, url, layers[-1])
    names = _reached(url, _names, system, path, layers[0])
    if not names:
        raise SourceError(f"{url} contains no data file; supported are {readable()}")
    return [_reached(url, _fetch, system, name, folder, on_bytes) for name in names]


def _layers(url: str) -> list[str]:
    """Return the protocols of a chain such as `zip://*.jsonl::https://host/rows.zip`, the innermost last.

    Raises:
        SourceError: The innermost is not one of `REMOTE`, or another is not one of `LAYERS`.
        ValueError: fsspec does not know a protocol.
    """
    # fsspec's own reading of the URL, since any other could be deceived
    from fsspec.core import _un_chain

    chain = _un_chain(url, {})
    layers = [protocol for _, protocol, _ in chain]
    if layers[-1] not in REMOTE:
        if layers in (["file"], ["local"]):
            raise SourceError(f"{url} is on this machine; give its path, without {layers[0]}://")
        raise SourceError(
            f"{url}: {layers[-1]}:// is the innermost part, and it reads files of this machine; local sources lie in "
            "data/: copy or unpack the file there and give its path, or give the URL of a server"
        )
    for layer in layers[:-1]:
        if layer not in LAYERS:
            raise SourceError(f"{url}: {layer}:: can't be used in a source; supported are {', '.join(sorted(LAYERS))}")
    return layers


def _reached(url: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that accesses a file system, and convert the file system's own errors to SourceError."""
    try:
        return function(*args)
    except SourceError:
        raise
    except Exception as error:
        refused = next((cause for cause in _causes(error) if isinstance(cause, UrlRefused)), None)
        if refused is not None:  # fsspec reports it as a missing file
            raise SourceError(f"{url}: {refused}") from error
        raise SourceError(_description(url, error)) from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and those that led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _description(url: str, error: Exception) -> str:
    # fsspec raises FileNotFoundError also for a web server that can't be reached
    if isinstance(error, FileNotFoundError):
        return f"{url} does not exist, or can't be reached ({error})"
    if isinstance(error, ImportError):
        return f"{url}: its protocol needs another package: {error}"
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return f"{url} can't be read ({reason}); check address, connection, credentials"


def _file_system(url: str, innermost: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    options = {innermost: {"get_client": limited_client()}} if innermost in WEB else {}
    host = urlsplit(url.rpartition("::")[2]).hostname
    if innermost in HOSTED - WEB and host:
        check_host(host)
    system, path = url_to_fs(url, **options)
    system.invalidate_cache()  # otherwise a long-running process sees the listing of its first call
    return system, path


def _names(system: Any, path: str, protocol: str) -> list[str]:
    """List the data files of a path, sorted by name."""
    if any(letter in path for letter in ("*[" if protocol.startswith("http") else "*?[")):
        found = system.glob(path)
    elif is_readable(_file_name(path)):
        return [path]
    elif system.isdir(path):
        found = system.find(path)
    else:
        system.info(path)  # raises FileNotFoundError if the path does not exist
        raise SourceError(f"{path} has an unsupported format; supported are {readable()}")
    saved = [name for name in found if _file_name(name) in (SAVED_DATASET, SAVED_SPLITS)]
    if saved:
        raise SourceError(f"{saved[0]} belongs to a folder of save_to_disk; copy that folder into data/")
    return sorted(name for name in found if is_readable(_file_name(name)))


def _file_name(path: str) -> str:
    return urlsplit(path).path.rsplit("/", 1)[-1]


def _fetch(system: Any, name: str, folder: Path, on_bytes: OnBytes | None) -> RemoteFile:
    info, url = system.info(name), system.unstrip_protocol(name)
    stated = {"size": info.get("size"), "etag": _first(info, _ETAGS), "modified": _first(info, _TIMES)}
    version = {key: value for key, value in stated.items() if value is not None}
    key = hashlib.sha256(f"{url} {version.get('etag')}".encode()).hexdigest()[:32]
    path = folder / key / _file_name(name)
    if "etag" not in version or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial_file(path) as partial:
            size = version.get("size")
            system.get_file(name, str(partial), callback=_callback(size, path.name, on_bytes))
            found = partial.stat().st_size
            if size not in (None, found):
                raise SourceError(f"{url}: {found} bytes came of {size}; the connection broke off, try again")
    return RemoteFile(url, path, version)


def _callback(size: int | None, name: str, on_bytes: OnBytes | None) -> Any:
    """Return fsspec's callback for the bytes of a file."""
    from fsspec.callbacks import DEFAULT_CALLBACK, Callback

    if on_bytes is None or not size:
        return DEFAULT_CALLBACK

    report, total = on_bytes, size

    class Arrived(Callback):
        def call(self, *args: Any, **kwargs: Any) -> None:
            report(min(self.value, total), total, name)

    return Arrived(total)


def _first(info: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((str(info[name]).strip('"') for name in names if info.get(name) is not None), None)
