"""The data card of a shipped model: Croissant 1.0, and its vocabulary for responsible AI for what was done to rows.

Sources: https://docs.mlcommons.org/croissant/docs/croissant-spec.html and .../croissant-rai-spec.html.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

from stages.params.schema import Params
from stages.shipping.record import Record, Source

DATA_CARD = "data_card.json"

ENCODINGS = {
    ".jsonl": "application/jsonlines",
    ".ndjson": "application/jsonlines",
    ".json": "application/json",
    ".csv": "text/csv",
    ".tsv": "text/tab-separated-values",
    ".parquet": "application/x-parquet",
    ".txt": "text/plain",
}

_CR = {
    **{
        name: f"cr:{name}" for name in ("citeAs", "column", "extract", "field", "fileProperty", "fileObject", "fileSet")
    },
    **{name: f"cr:{name}" for name in ("format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField")},
    **{name: f"cr:{name}" for name in ("path", "recordSet", "references", "regex", "repeated", "replace", "separator")},
    **{name: f"cr:{name}" for name in ("source", "subField", "transform")},
}

CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    **_CR,
}
"""The terms that the specification prescribes."""


def make_data_card(record: Record, params: Params) -> dict[str, Any]:
    """Return the data card of a result. It describes the files by name and digest; they are not shipped.

    Args:
        record: Its record.
        params: Values of params.yaml: how rows were checked and formatted.
    """
    files = [(name, digest, source) for source in record.sources for name, digest in source.files.items()]
    stamp = {} if record.code is None else {"datePublished": record.code.date[:10]}
    return {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": ["http://mlcommons.org/croissant/1.0", "http://mlcommons.org/croissant/RAI/1.0"],
        "name": f"{record.name}-data",
        "description": f"Rows that {record.name} was trained on ({record.num_train:,}) and measured on "
        f"({record.num_eval:,}). The files are not part of this folder; their digests identify them.",
        "version": f"1.0.0+{record.result_digest[:12]}",
        **stamp,
        "distribution": [_object(number, *file) for number, file in enumerate(files)],
        "recordSet": [
            _record_set(number, name, source.columns)
            for number, (name, _, source) in enumerate(files)
            if source.columns
        ],
        "rai:dataPreprocessingProtocol": _protocol(record, params),
        "rai:dataUseCases": [
            f"{source.path}: {_purpose(source)}, {source.num_rows:,} rows" for source in record.sources
        ],
    }


def _purpose(source: Source) -> str:
    return "training" if source.purpose == "train" else "evaluation"


def _object(number: int, name: str, digest: str, source: Source) -> dict[str, Any]:
    suffix = PurePosixPath(name).suffix
    size = {"contentSize": f"{source.sizes[name]} B"} if name in source.sizes else {}
    return {
        "@type": "cr:FileObject",
        "@id": f"file-{number}",
        "name": name,
        "description": f"{_purpose(source)} rows",
        "contentUrl": f"data/{name}" if source.is_local else name,
        **size,
        "encodingFormat": ENCODINGS.get(suffix, "application/octet-stream"),
        "sha256": digest,
    }


def _record_set(number: int, name: str, columns: list[str]) -> dict[str, Any]:
    """Return the columns of a file. Ids hold no names, as readers of the format accept no spaces in them."""
    return {
        "@type": "cr:RecordSet",
        "@id": f"rows-{number}",
        "name": f"rows of {name}",
        "field": [
            {
                "@type": "cr:Field",
                "@id": f"rows-{number}/column-{place}",
                "name": column,
                "dataType": "sc:Text",
                "source": {"fileObject": {"@id": f"file-{number}"}, "extract": {"column": column}},
            }
            for place, column in enumerate(columns)
        ],
    }


def _protocol(record: Record, params: Params) -> list[str]:
    """Return what was done to the rows: the checks that were on, and what the ledgers count."""
    checks = ", ".join(
        f"{name}: {action}" for name, action in params.load.checks.model_dump().items() if action != "off"
    )
    done = [f"{what}: {number:,} rows" for what, number in record.ledger.items()]
    return [
        f"Checks of rows: {checks}.",
        f"Trained text: {params.format.train_on}; at most {params.pack.max_length:,} tokens per row.",
        *(done or ["No row was dropped, changed or warned of."]),
    ]
