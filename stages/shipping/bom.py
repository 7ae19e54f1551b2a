"""The bill of materials of a shipped model: a CycloneDX 1.6 ML-BOM.

It is written here as JSON: the package cyclonedx-python-lib has no model cards (https://cyclonedx.org/docs/1.6/json/).
"""

from __future__ import annotations

import re
import uuid
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from stages.checkout.artifacts import file_digest, read_json
from stages.shipping.record import Record

BOM = "ml-bom.cdx.json"

MODEL, BASE, DATA = "model", "base-model", "data"
"""References to the components within the file."""

PINNED = re.compile(r"^([A-Za-z0-9._-]+)==", re.MULTILINE)


def make_bom(folder: Path, record: Record, results: dict[str, Any], lock: Path) -> dict[str, Any]:
    """Return the bill of materials of a folder.

    Args:
        folder: The shipped folder with the model's files.
        record: Its record.
        results: Content of outs/evaluate/results.json.
        lock: requirements.lock, which names the packages; if it is missing, those of the record are listed.
    """
    sources = [_data(number, source.path, source.files) for number, source in enumerate(record.sources)]
    packages = [_package(name, found) for name, found in sorted(installed(lock, record.versions).items())]
    stamp = {} if record.code is None else {"timestamp": record.code.date}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, record.result_digest)}",
        "version": 1,
        "metadata": {**stamp, "component": _model(folder, record, results, [part["bom-ref"] for part in sources])},
        "components": [_base(record), *sources, *packages],
        "dependencies": [
            {"ref": MODEL, "dependsOn": [BASE, *(part["bom-ref"] for part in [*sources, *packages])]},
            *({"ref": part["bom-ref"]} for part in [{"bom-ref": BASE}, *sources, *packages]),
        ],
    }


def installed(lock: Path, recorded: dict[str, str]) -> dict[str, str]:
    """Return package -> installed version, of the packages of a lock file and of those of a record but Python."""
    text = lock.read_text(encoding="utf-8") if lock.is_file() else ""
    found = {name: known for name, known in recorded.items() if name != "python"}
    for name in PINNED.findall(text):
        try:
            found[name.lower()] = version(name)
        except PackageNotFoundError:  # an optional package, or one for another platform
            continue
    return found


def _model(folder: Path, record: Record, results: dict[str, Any], data: list[str]) -> dict[str, Any]:
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    quantization = config.get("quantization_config", {}).get("quant_method")
    facts = {
        "sft:result_digest": record.result_digest,
        "sft:gate": "passed" if record.gate_passed else "failed",
        **({"sft:commit": record.code.commit} if record.code else {}),
        **({"sft:quantization": str(quantization)} if quantization else {}),
    }
    return {
        "type": "machine-learning-model",
        "bom-ref": MODEL,
        "name": record.name,
        "version": record.result_digest[:12],
        "modelCard": {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": "text-generation",
                **({"architectureFamily": config["model_type"]} if "model_type" in config else {}),
                **({"modelArchitecture": config["architectures"][0]} if config.get("architectures") else {}),
                "datasets": [{"ref": ref} for ref in data],
                "inputs": [{"format": "text"}],
                "outputs": [{"format": "text"}],
            },
            "quantitativeAnalysis": {"performanceMetrics": _metrics(record.model, results)},
        },
        "pedigree": {"ancestors": [{**_base(record), "bom-ref": f"{BASE}-ancestor"}]},
        "components": [
            {"type": "file", "bom-ref": f"file:{file.name}", "name": file.name, "hashes": [_sha256(file_digest(file))]}
            for file in sorted(folder.glob("*.safetensors"))
        ],
        "properties": [{"name": name, "value": value} for name, value in facts.items()],
    }


def _metrics(model: str, results: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the figures of the shipped model with their 95 % intervals."""
    intervals = results.get("intervals", {}).get(model, {})
    rows = []
    for name, value in results["models"][model].items():
        row: dict[str, Any] = {"type": name, "value": repr(value), "slice": "held-out rows"}
        if name in intervals:
            low, high = intervals[name][:2]
            row["confidenceInterval"] = {"lowerBound": repr(low), "upperBound": repr(high)}
        rows.append(row)
    return rows


def _base(record: Record) -> dict[str, Any]:
    base = record.base_model
    return {
        "type": "machine-learning-model",
        "bom-ref": BASE,
        "name": base.name_or_path,
        "version": base.resolved,
        "properties": [{"name": "sft:files_sha256", "value": base.digest}],
    }


def _data(number: int, path: str, files: dict[str, str]) -> dict[str, Any]:
    return {
        "type": "data",
        "bom-ref": f"{DATA}-{number}",
        "name": path,
        "data": [{"type": "dataset", "name": path}],
        "components": [
            {"type": "file", "bom-ref": f"{DATA}-{number}:{name}", "name": name, "hashes": [_sha256(digest)]}
            for name, digest in files.items()
        ],
    }


def _package(name: str, found: str) -> dict[str, Any]:
    purl = f"pkg:pypi/{re.sub(r'[-_.]+', '-', name).lower()}@{found.replace('+', '%2B')}"
    return {"type": "library", "bom-ref": purl, "name": name, "version": found, "purl": purl}


def _sha256(digest: str) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest}
