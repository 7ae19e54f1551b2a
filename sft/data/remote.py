"""Download of data files from URLs (`s3://`, `gs://`, `https://`, ...) with fsspec, and the version of each file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sft.data.source_row import SourceError
from sft.data.sources import SAVED_DATASET, SAVED_SPLITS, is_readable, readable
from sft.folders import partial_file

LOCAL = ("file", "local")
# Names under which file systems report a file's etag or checksum, and the time of its last change.
_ETAGS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "Last-Modified", "created")


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


def fetch_files(url: str, folder: Path) -> list[RemoteFile]:
    """Download all data files of a URL: a file, a folder (searched recursively), or a glob pattern.

    Args:
        url: Such as `s3://bucket/chats/*.jsonl`; its file system looks up credentials as usual.
        folder: Where copies are kept. A copy of an earlier call is reused if the file's etag is the same.

    Raises:
        SourceError: There is no data file, the URL can't be reached, or its protocol needs a package that is not
            installed.
    """
    protocol = urlsplit(url).scheme
    if protocol in LOCAL:
        raise SourceError(f"{url} is on this machine; give its path, without {protocol}://")
    system, path = _reached(url, _file_system, url)
    names = _reached(url, _names, system, path, protocol)
    if not names:
        raise SourceError(f"{url} contains no data file; supported are {readable()}")
    return [_reached(url, _fetch, system, name, folder) for name in names]


def _reached(url: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function that accesses a file system, and convert the file system's own errors to SourceError."""
    try:
        return function(*args)
    except SourceError:
        raise
    except FileNotFoundError as error:
        # fsspec raises this also for a web server that can't be reached
        raise SourceError(f"{url} does not exist, or can't be reached ({error})") from error
    except ImportError as error:
        raise SourceError(f"{url}: its protocol needs another package: {error}") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise SourceError(f"{url} can't be read ({reason}); check address, connection, credentials") from error


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url)
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


def _fetch(system: Any, name: str, folder: Path) -> RemoteFile:
    info, url = system.info(name), system.unstrip_protocol(name)
    stated = {"size": info.get("size"), "etag": _first(info, _ETAGS), "modified": _first(info, _TIMES)}
    version = {key: value for key, value in stated.items() if value is not None}
    key = hashlib.sha256(f"{url} {version.get('etag')}".encode()).hexdigest()[:32]
    path = folder / key / _file_name(name)
    if "etag" not in version or not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial_file(path) as partial:
            system.get_file(name, str(partial))
            found = partial.stat().st_size
            size = version.get("size")
            if size not in (None, found):
                raise SourceError(f"{url}: {found} bytes came of {size}; the connection broke off, try again")
    return RemoteFile(url, path, version)


def _first(info: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((str(info[name]).strip('"') for name in names if info.get(name) is not None), None)
