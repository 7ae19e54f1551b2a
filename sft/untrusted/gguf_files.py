"""GGUF files: read in a child process, before this one reads them.

The reader takes numbers of values, tensors and bytes from the file as they are. Only its metadata and the places of its
tensors are read in the child: converting the weights takes as long as it takes, and their sizes are checked there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft.untrusted.child import Child, ChildError, RaisedError, problem

MAX_BYTES = 4 << 30
"""Memory in bytes that reading the metadata may need."""

SECONDS = 120.0
"""Time limit for reading the metadata; a large vocabulary takes some seconds."""

SIZES = ("embedding_length", "feed_forward_length", "vocab_size")
"""Sizes that a model is built from, and that some tensor of the file must have."""

_child = Child(MAX_BYTES)


class GgufError(ValueError):
    """A GGUF file that can't be read; the message says why."""


def check_gguf_file(path: Path) -> None:
    """Read the metadata of a GGUF file in the child process.

    Raises:
        GgufError: It is damaged, takes too long or too much memory, or states sizes that none of its tensors has.
    """
    try:
        found = _child.call(_problem, str(path.absolute()), seconds=SECONDS)
    except RaisedError as error:
        found = f"it is damaged or cut off ({str(error)[:200]})"
    except ChildError as error:
        found = problem(error, "reading it")
    if found:
        raise GgufError(f"{path}: {found}. Download or copy the file again.")


def _problem(path: str) -> str:
    """Read a file in the child; return what is wrong with it, or an empty text."""
    import numpy
    from gguf import GGUFReader

    numpy.seterr(all="ignore")
    reader: Any = GGUFReader(path)
    values = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("tokenizer.")}
    num_bytes, largest = Path(path).stat().st_size, 0
    for tensor in reader.tensors:
        shape = [int(size) for size in tensor.shape]
        if tensor.data_offset + tensor.n_bytes > num_bytes:
            return f"the tensor {tensor.name!r:.80} ends after the file"
        largest = max([largest, *shape])
    architecture = values.get("general.architecture")
    if not isinstance(architecture, str):
        return "it does not state an architecture (general.architecture)"
    layers = values.get(f"{architecture}.block_count")
    if isinstance(layers, int) and layers > len(reader.tensors):
        return f"it states {layers} layers, and has {len(reader.tensors)} tensors"
    for name in SIZES:
        size = values.get(f"{architecture}.{name}")
        if isinstance(size, int) and size > largest:
            return f"it states {name} {size}, and no tensor has more than {largest} rows or columns"
    for name in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges", "tokenizer.ggml.pre"):
        if name in reader.fields:
            reader.fields[name].contents()
    return ""
