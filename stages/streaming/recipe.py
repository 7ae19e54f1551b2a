"""What `load`, `format` and `pack` wrote about a stream: the values and facts by which `train` prepares its rows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.checkout.artifacts import read_json
from stages.checkout.paths import STREAM, Paths
from stages.models.base import read_base_model
from stages.params.schema import FormatSection, LoadSection, PackSection
from stages.shards.rendering import RenderingWork


@dataclass(frozen=True)
class Recipe:
    """How the rows of a stream are read and prepared.

    Args:
        load: The section `load` of params.yaml.
        format: The section `format`.
        pack: The section `pack`.
        sources: The sources, as `describe_stream` describes them.
        held_out: Digest of each held-out row and the row's id.
        work: How rows are rendered.
    """

    load: LoadSection
    format: FormatSection
    pack: PackSection
    sources: list[dict[str, Any]]
    held_out: dict[bytes, str]
    work: RenderingWork

    @classmethod
    def read(cls, paths: Paths, *, trust_remote_code: bool) -> Recipe | None:
        """Return the recipe of a checkout; None if its rows are not streamed."""
        if not paths.out("pack", STREAM).exists():
            return None
        rendering, packing = read_json(paths.out("format", STREAM)), read_json(paths.out("pack", STREAM))
        stream = packing["stream"]
        section = FormatSection.model_validate(rendering["format"])
        base = Path(read_base_model(paths.out("load", "base_model.json")).path)
        work = RenderingWork(
            paths.out("format", "tokenizer"),
            trust_remote_code,
            section.train_on,
            section.system_message,
            section.special_text,
            section.not_printed,
            section.thinking,
            tuple(section.add_special_tokens),
            tuple(rendering["stop_token_ids"]),
            with_prompts=False,
            image_model=base if rendering["reads_images"] else None,
        )
        return cls(
            LoadSection.model_validate(stream["load"]),
            section,
            PackSection.model_validate(packing["pack"]),
            stream["sources"],
            {bytes.fromhex(key): row_id for key, row_id in stream["held_out"].items()},
            work,
        )
