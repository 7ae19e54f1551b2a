"""Export of a plain checkpoint to GGUF files by llama.cpp's converter and quantizer, with a proof of each file.

The converter writes the checkpoint in its own precision, and the quantizer writes the files from it. Kinds that round
by the importance of each weight (k- and i-quants) get an importance matrix, which is measured on training rows.
The proof reads a file back with transformers, where that knows the family: its tokenizer must give the same tokens, and
its logits must be those of the checkpoint within what its kind rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.export.proof import compare_logits, logits_of
from sft.folders import partial_file
from sft.llama_cpp import convert_main, quantize_main
from sft.llama_cpp.importance import measure_importance
from sft.llama_cpp.programs import LlamaCpp, check_exportable
from sft.models.gguf import load_gguf_tokenizer

FLOATS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""Dtype of a checkpoint -> the kind of GGUF file that holds it exactly."""

MAX_DEVIATION = {"f32": 0.1, "f16": 0.1, "bf16": 0.1, "q8_0": 0.1, "q6_k": 0.2, "q5_k_m": 0.3, "q5_k_s": 0.3}
"""Kind -> largest accepted mean absolute difference of the logits, divided by their standard deviation.

Rounding to 8 bits causes about 0.01, to 4 bits 0.1 to 0.3, a wrong tensor layout about 1.
"""

MAX_DEVIATION_ELSE = 0.7

PROBE = "It's 10 pm;  we've 2,345 items\n\n\tÜber naïve 東京 😀 -- don't (ever) x=y_1.\r\n   END"
"""Text on which the tokenizers are compared, besides the texts of the sample rows."""

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"

WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"

REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

SPLIT_PATTERNS = {
    rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}": "llama-bpe",
    rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}": "qwen2",
}
"""Regular expression of the pre-tokenizer -> llama.cpp's name for it."""


@dataclass(frozen=True)
class GGUFReport:
    """Size of a file, and its difference from the checkpoint when transformers reads it.

    Args:
        kind: Kind of the file, such as q4_k_m.
        num_bytes: Size of the file.
        tensors: Kind of the tensors -> their number; rows that no block fits are kept wider than asked for.
        not_compared: Why the logits were not compared; None if they were.
        deviation: Mean absolute difference of the logits, divided by their standard deviation.
        max_logit_diff: Largest absolute difference of a logit.
        top_token_agreement: Share of positions with the same most likely token.
        num_positions: Number of positions compared.
    """

    kind: str
    num_bytes: int
    tensors: dict[str, int]
    not_compared: str | None = None
    deviation: float | None = None
    max_logit_diff: float | None = None
    top_token_agreement: float | None = None
    num_positions: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by name."""
        return asdict(self)


def export_gguf(
    model_dir: Path,
    output_dir: Path,
    kinds: Sequence[str],
    rows: Sequence[Sequence[int]],
    llama_cpp: LlamaCpp,
    *,
    by_importance: Sequence[str] = (),
    num_compared_rows: int = 4,
    on_step: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> list[GGUFReport]:
    """Write `output_dir/model-KIND.gguf` for each kind, and compare each with the checkpoint.

    Args:
        model_dir: Folder of a plain checkpoint with its tokenizer.
        output_dir: Folder of the files.
        kinds: Kinds of llama.cpp's quantizer, such as f16, q8_0 and q4_k_m.
        rows: Token ids of training rows, `(num_rows, length)`, ragged, for the importance matrix and the comparison.
        llama_cpp: The installation of llama.cpp.
        by_importance: Kinds that need an importance matrix.
        num_compared_rows: Number of rows on which logits are compared.
        on_step: Called with the number of steps done and in total, and the step that begins.

    Raises:
        ValueError: llama.cpp is not installed or does not know the family or tokenizer, or a file reads back as a
            different model or tokenizer.
    """
    llama_cpp.check()
    check_exportable(model_dir, llama_cpp)
    output_dir.mkdir(parents=True, exist_ok=True)
    needs_importance = [kind for kind in kinds if kind in by_importance]
    steps = ["converting", *(["measuring importance"] if needs_importance else []), *(f"writing {k}" for k in kinds)]
    counted = iter(enumerate(steps))

    def begin() -> None:
        done, text = next(counted)
        on_step(done, len(steps), text)

    reports = []
    with tempfile.TemporaryDirectory(dir=output_dir, prefix=".exporting-") as temporary:
        begin()
        whole = Path(temporary) / "whole.gguf"
        outtype = FLOATS.get(_dtype(model_dir), "f32")
        _convert(model_dir, whole, outtype, llama_cpp)
        proof = Proof(model_dir, rows[:num_compared_rows])
        importance = Path(temporary) / "importance.npz"
        if needs_importance:
            begin()
            measure_importance(proof.model, rows, whole, importance)
        for kind in kinds:
            begin()
            with partial_file(output_dir / f"model-{kind}.gguf") as partial:
                if kind == outtype:
                    os.link(whole, partial)
                else:
                    _quantize(whole, partial, kind, importance if kind in needs_importance else None, llama_cpp)
                reports.append(proof.check(partial, kind))
    return reports


def pre_tokenizer_name(content: dict[str, Any]) -> str | None:
    """Return llama.cpp's name for the pre-tokenizer of a byte-level BPE tokenizer; None if it is not a known one.

    Args:
        content: Content of the tokenizer's JSON file.
    """
    if content["model"]["type"] != "BPE" or content["model"].get("byte_fallback"):
        return None
    steps = content["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0]["use_regex"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"]:
        return "smollm"
    pattern = steps[0].get("pattern", {}).get("Regex") if kinds == ["Split", "ByteLevel"] else None
    return SPLIT_PATTERNS.get(str(pattern))


def _dtype(model_dir: Path) -> str:
    config = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or config.get("text_config", {}).get("dtype"))


def _convert(model_dir: Path, output_file: Path, outtype: str, llama_cpp: LlamaCpp) -> None:
    file = model_dir / "tokenizer.json"
    name = pre_tokenizer_name(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else None
    program = [sys.executable, "-P", str(convert_main.__file__), str(llama_cpp.source), name or ""]
    options = ["--outfile", str(output_file), "--outtype", outtype]
    _run([*program, *options, str(model_dir)], f"llama.cpp's converter could not read {model_dir}")


def _quantize(whole: Path, output_file: Path, kind: str, importance: Path | None, llama_cpp: LlamaCpp) -> None:
    job = whole.with_name("job.json")
    given = {
        "library": str(llama_cpp.library),
        "input": str(whole),
        "output": str(output_file),
        "kind": kind,
        "threads": int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1),
        "importance": None if importance is None else str(importance),
    }
    job.write_text(json.dumps(given), encoding="utf-8")
    program = [str(llama_cpp.python), "-P", str(quantize_main.__file__), str(job)]
    _run(program, f"llama.cpp's quantizer could not write {kind}")


def _run(command: list[str], failure: str) -> None:
    """Run a program of llama.cpp.

    Raises:
        ValueError: It failed; the message has its last words.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment, check=False)
    if done.returncode != 0:
        lines = [line for line in f"{done.stdout}\n{done.stderr}".splitlines() if line.strip()]
        why = "; ".join(line.strip()[:300] for line in _telling(lines))
        raise ValueError(f"{failure}: {why or f'it ended with {done.returncode}'}")


def _telling(lines: list[str]) -> Iterator[str]:
    """Yield the lines of an output that say why a program failed: those with an error, else the last two."""
    errors = [line for line in lines if "rror" in line or "failed" in line]
    yield from (errors or lines)[-2:]


class Proof:
    """Comparison of GGUF files with the checkpoint that they were made from.

    Args:
        model_dir: Folder of the checkpoint.
        rows: Token ids of rows to compare on.
    """

    def __init__(self, model_dir: Path, rows: Sequence[Sequence[int]]) -> None:
        self.model_dir, self.rows = model_dir, rows
        self.model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self._reference = logits_of(self.model, rows)

    def check(self, file: Path, kind: str) -> GGUFReport:
        """Check a file and describe it.

        Raises:
            ValueError: It reads back as a different model or tokenizer.
        """
        size, tensors = file.stat().st_size, tensor_kinds(file)
        try:
            theirs: Any = load_gguf_tokenizer(file, 1 << 20)
            written = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        except Exception as error:  # transformers knows fewer families than llama.cpp, and raises errors of any class
            reason = " ".join(str(error).split())[:200]
            return GGUFReport(kind, size, tensors, f"transformers does not read it ({reason})")
        self._check_tokens(theirs)
        difference = compare_logits(self._reference, logits_of(written, self.rows))
        deviation = difference.mean / float(torch.cat(self._reference).std())
        limit = MAX_DEVIATION.get(kind, MAX_DEVIATION_ELSE)
        if not deviation <= limit:
            raise ValueError(
                f"read back from GGUF ({kind}), the model differs from the checkpoint: the logits differ by "
                f"{deviation:.3f} standard deviations, {limit} is the limit"
            )
        agreement, positions = difference.top_token_agreement, difference.num_positions
        return GGUFReport(kind, size, tensors, None, deviation, difference.largest, agreement, positions)

    def _check_tokens(self, theirs: Any) -> None:
        """Check that the tokenizer in the file gives the same tokens, and has the same chat template and eos token."""
        ours: Any = AutoTokenizer.from_pretrained(self.model_dir)
        for text in [PROBE, *(ours.decode(row) for row in self.rows)]:
            if ours(text)["input_ids"] != theirs(text)["input_ids"]:
                raise ValueError(f"read back from GGUF, the tokenizer gives different tokens for {text[:80]!r}")
        if (ours.chat_template, ours.eos_token) != (theirs.chat_template, theirs.eos_token):
            raise ValueError("read back from GGUF, the tokenizer has a different chat template or eos token")


def tensor_kinds(file: Path) -> dict[str, int]:
    """Return the kinds of a file's tensors and their numbers, most frequent first."""
    from gguf import GGUFReader  # slow to import

    counts = Counter(tensor.tensor_type.name.lower() for tensor in GGUFReader(file).tensors)
    return dict(counts.most_common())
