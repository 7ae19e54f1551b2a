"""Assembly of the shipped folder: the model, its card, what it was made of, digests, and a signature."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from sft.folders import replacing_folder
from stages.checkout.artifacts import write_json
from stages.checkout.paths import Paths
from stages.params.schema import Params
from stages.shipping.bom import BOM, make_bom
from stages.shipping.data_card import DATA_CARD, make_data_card
from stages.shipping.manifest import write_manifest
from stages.shipping.record import make_record, write_record
from stages.shipping.signature import sign

SMALLEST_LINKED = 2**24
"""Bytes from which on a file is linked instead of copied, so that weights take no space twice."""


def write_shipped_folder(
    folder: Path,
    model: Path,
    card: Path,
    params: Params,
    paths: Paths,
    *,
    shipped: str,
    digest: str,
    results: dict[str, Any],
    key: Path | None,
) -> str:
    """Write the folder that is shipped, which says itself what it was made of.

    Everything but the signature is the same whenever the same result is published.

    Args:
        folder: Folder to write; an existing one is replaced.
        model: Plain checkpoint.
        card: The model card.
        params: Values of params.yaml.
        paths: The checkout.
        shipped: Which model of the result it is.
        digest: Digest of the result.
        results: Content of outs/evaluate/results.json.
        key: Private key to sign with; None = no signature.

    Returns:
        SHA-256 of the manifest, which stands for all files of the folder.
    """
    with replacing_folder(folder) as place:
        for file in sorted(path for path in model.rglob("*") if path.is_file()):
            take_file(file, place / file.relative_to(model))
        shutil.copyfile(card, place / "README.md")
        record = make_record(params, paths, shipped, digest)
        write_record(place, record, params, paths.root)
        write_json(place / BOM, make_bom(place, record, results, paths.root / "requirements.lock"))
        write_json(place / DATA_CARD, make_data_card(record, params))
        manifest = write_manifest(place)
        if key is not None:
            sign(place, key)
    return manifest


def take_file(source: Path, target: Path) -> None:
    """Copy a file; link a large one if both places are on one file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    source = source.resolve()  # DVC may have made it a link into its cache
    if source.stat().st_size >= SMALLEST_LINKED:
        try:
            os.link(source, target)
        except OSError:
            pass
        else:
            return
    shutil.copyfile(source, target)
