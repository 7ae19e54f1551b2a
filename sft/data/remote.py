"""Files behind a URL (`s3://`, `gs://`, `https://`, ...), copied here through fsspec, each with its version."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from sft.data.source_row import SourceError
from sft.data.sources import SAVED_DATASET, SAVED_SPLITS, is_readable, readable

LOCAL = ("file", "local")
# How file systems call what changes with a file's content, and when it was changed.
_ETAGS = ("ETag", "etag", "md5Hash", "content_md5", "Content-MD5")
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "Last-Modified", "created")


class RemoteFile(NamedTuple):
    """A file behind a URL.

    Args:
        url: Where it is.
        path: The copy on this machine.
        version: Its size in bytes, and what else its file system says of its version: `etag`, `modified`.
    """

    url: str
    path: Path
    version: dict[str, Any]


def is_url(text: str) -> bool:
    """Whether a path in params.yaml means something that lies elsewhere."""
    return "://" in text


def fetch_files(url: str, folder: Path) -> list[RemoteFile]:
    """Copy all data files that a URL stands for: a file, a folder (searched to the bottom), or a glob pattern.

    Args:
        url: Such as `s3://bucket/chats/*.jsonl`; credentials are found as its file system finds them.
        folder: Where copies are kept. One of an earlier call is used where the file's etag shows that it is the same.

    Raises:
        SourceError: There is nothing, it can't be reached, or its protocol needs a package that is not installed.
    """
    protocol = urlsplit(url).scheme
    if protocol in LOCAL:
        raise SourceError(f"{url} lies on this machine; state its path, without {protocol}://")
    system, path = _reached(url, _file_system, url)
    names = _reached(url, _names, system, path, protocol)
    if not names:
        raise SourceError(f"{url} holds no data file; readable are {readable()}")
    return [_reached(url, _fetch, system, name, folder) for name in names]


def _reached(url: str, function: Callable[..., Any], *args: Any) -> Any:
    """Call what talks to a file system; each of them has errors of its own."""
    try:
        return function(*args)
    except SourceError:
        raise
    except FileNotFoundError as error:
        # also what a web server says that is not there at all
        raise SourceError(f"{url} does not exist, or can't be reached ({error})") from error
    except ImportError as error:
        raise SourceError(f"{url}: its protocol needs another package: {error}") from error
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise SourceError(f"{url} can't be read ({reason}); check address, connection, credentials") from error


def _file_system(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    system, path = url_to_fs(url)
    system.invalidate_cache()  # a process that lives long would see what was there at its first look
    return system, path


def _names(system: Any, path: str, protocol: str) -> list[str]:
    """The data files that a path stands for, in the order of their names."""
    if any(letter in path for letter in ("*[" if protocol.startswith("http") else "*?[")):
        found = system.glob(path)
    elif is_readable(_file_name(path)):
        return [path]
    elif system.isdir(path):
        found = system.find(path)
    else:
        system.info(path)  # says so where it does not exist
        raise SourceError(f"{path} is of an unknown kind; readable are {readable()}")
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
        partial = path.with_name(f".{path.name}.partial")
        system.get_file(name, str(partial))
        found = partial.stat().st_size
        if version.get("size") not in (None, found):
            raise SourceError(f"{url}: {found} bytes came of {version['size']}; the connection broke off, try again")
        partial.replace(path)
    return RemoteFile(url, path, version)


def _first(info: dict[str, Any], names: tuple[str, ...]) -> str | None:
    return next((str(info[name]).strip('"') for name in names if info.get(name) is not None), None)
