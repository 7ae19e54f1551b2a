"""Damaged and hostile input: `python -m benchmarks.reliability.fuzz --kind rows --count 1000`.

Each case is a valid file, row, template or `params.yaml` with random changes, read by the functions that the pipeline
reads it with. A case passes if it is read, or refused by one error with a message for the user. A fault is an error of
any other class, an end of the process, a call of more than 60 s, or memory beyond the limits. Templates have a time
limit of 0.3 s here instead of 10 s. "Peak" is the largest memory of the reading process, and of its child processes.

A worker process works through the cases, so that a case that ends it is found. `--only NUMBER` repeats a case.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.reliability import mutate, record

SLOWEST_S = 60.0
"""Time that a case may take."""

SILENT_S = 300.0
"""Time without a word after which the worker is killed."""

Case = Callable[[random.Random, Path], str]
"""Runs a case in a folder; returns `read` or `refused`."""


class Refused(Exception):
    """A case that was refused by an error with a message for the user."""


def refusing(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function of the library; errors that the command line prints as one line become `Refused`."""
    try:
        return function(*arguments, **options)
    except UnicodeError:  # a ValueError whose message names neither file nor way out
        raise
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        if not str(error).strip():
            raise
        raise Refused(str(error)) from error


# ---- rows


def rows(rng: random.Random, folder: Path) -> str:
    """Read a file of rows, and turn each into a checked record."""
    from sft.data.messages import RowError, validate_record
    from sft.data.records import detect_layout, normalize
    from sft.data.sources import read_rows
    from stages.loading.checks import RowChecks

    path = _rows_file(rng, folder)
    found = refusing(lambda: list(read_rows(path, with_damaged=rng.random() < 0.5)))
    whole = [row for row in found if row.damage is None]
    columns = tuple(dict.fromkeys(name for row in whole for name in row.columns))
    layout = refusing(detect_layout, columns)
    checks = RowChecks(_checks())
    outcome = "read"
    for row in whole:
        try:
            rendered, _ = checks.inspect(normalize(row.columns, layout, prune_nulls=row.has_added_nulls))
            validate_record(rendered, require_alternation=True)
            json.dumps(rendered).encode()
        except RowError:
            outcome = "refused"
    return outcome


def _checks() -> Any:
    from stages.params.schema import load_params

    global _shipped
    if _shipped is None:
        _shipped = load_params(record.ROOT / "params.yaml").load.checks
    return _shipped


_shipped: Any = None

CALL = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {"x": {}}}}}
ROWS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "train": True}]},
    {"prompt": "Q", "completion": "A"},
    {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A"}]},
    {"text": "a text"},
    {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["a", "b"]]},
    {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "t"}]},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "1", "reasoning_content": "r"},
        ],
        "tools": [TOOL],
    },
)


def _rows_file(rng: random.Random, folder: Path) -> Path:
    base = rng.choice(ROWS)
    content = [base if rng.random() < 0.2 else mutate.changed(rng, base) for _ in range(rng.randrange(1, 5))]
    kind = rng.choice(("jsonl", "jsonl", "json", "csv", "txt"))
    if kind == "json":
        text = mutate.to_json(content if rng.random() < 0.8 else mutate.value(rng))
    elif kind == "csv":
        text = "prompt,completion\n" + "".join(f'"{mutate.value(rng)!s:.200}","b"\n' for _ in range(3))
    elif kind == "txt":
        text = str(mutate.value(rng))[:5000]
    else:
        text = "".join(mutate.to_json(row) + "\n" for row in content)
    data = text.encode("utf-8", "surrogatepass")
    path = folder / f"rows.{kind}"
    path.write_bytes(mutate.damaged(rng, data) if rng.random() < 0.4 else data)
    return path


# ---- templates

FRAGMENTS = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "{{ messages[0].content }}",
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}",
    "{% generation %}{{ messages[-1].content }}{% endgeneration %}",
    "{{ raise_exception('no') }}",
    "{% set ns = namespace(x=0) %}{% for i in range(999) %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}",
    "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}",
    "{{ 'a' * 10 ** 9 }}",
    "{{ 10 ** 10 ** 9 }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.append(1) }}",
    "{% for i in range(10 ** 9) %}x{% endfor %}",
    "{{ messages | map(attribute='content') | join(', ') }}",
    "{{ strftime_now('%Y') }}",
    "{{ 'x'.join(['%999999d'] * 99) | format(1) }}",
    "{% set n = namespace(x=[1]) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x | string }}",
    "{% include 'x' %}",
    "{% extends 'x' %}",
    "{{ cycler('a', 'b').next() }}",
    "{{ lipsum(9) }}",
    "{% break %}",
    "{{ messages | tojson(indent=999999) }}",
    "{{ self }}{{ loop }}{{ undefined_name.x.y }}",
    "{{ (((((((((1)))))))))",
    "{# comment",
    "{{ 'a' | replace('', 'b' * 99999) | replace('', 'c' * 99999) }}",
    "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
    "{{ " + "-" * 3000 + "1 }}",
    "{% if 1 %}" * 120,
)


def templates(rng: random.Random, folder: Path) -> str:
    """Read the variables of a chat template, and render a conversation; fill in a template of a source."""
    from sft.chat.template_syntax import only_prints_contents, template_variables
    from sft.untrusted import templates as limited

    limited.FIRST_CHAT_S = 0.3
    source = "".join(rng.choices(FRAGMENTS, k=rng.randrange(1, 4)))
    if rng.random() < 0.6:
        source = mutate.damaged_text(rng, source, (*FRAGMENTS, "{{", "}}", "{%", "%}", "|", ".", "(", ")", "[", "'"))
    base = rng.choice(ROWS)
    chat = base.get("messages") or [{"role": "user", "content": "Q"}]
    if rng.random() < 0.3:
        damaged = mutate.changed(rng, chat)
        chat = damaged if isinstance(damaged, list) and all(isinstance(part, dict) for part in damaged) else chat
    template_variables(source)
    only_prints_contents(source)
    if rng.random() < 0.3:
        refusing(limited.fill_in_child, {"user": source}, {"q": mutate.value(rng), "messages": chat})
        return "read"
    options = {"return_assistant_tokens_mask": True} if rng.random() < 0.2 else {"add_generation_prompt": True}
    variables = {"bos_token": "<s>", "x": mutate.value(rng)}
    refusing(limited.render_in_child, source, [chat], base.get("tools"), options, variables)
    return "read"


# ---- params.yaml

LINES = (
    "  ? [1, 2]\n  : x\n",
    "a: &a [*a]\n",
    "a: &a [1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a]\nc: [*b,*b,*b,*b,*b,*b,*b,*b]\n",
    "<<: {load: 1}\n",
    "!!python/object/apply:os.system ['true']\n",
    "---\n",
    "%YAML 9.9\n",
    "\t",
    "load: " + "[" * 800 + "\n",
    "model: " + "{a: " * 300 + "\n",
    "- " * 500 + "\n",
    "seed: 0x" + "f" * 300 + "\n",
    "x: 1_000_000:59:59:59\n",
    "x: 2001-99-99\n",
    "x: .nan\n",
    "x: !!binary ====\n",
    "x: !!int 'abc'\n",
    "x: !!float ''\n",
    "x: !!timestamp 2001-01-01T99:99:99\n",
    "x: 'a\\ud800b'\n",
    'x: "\\ud800"\n',
    "? \n",
)
VALUES = (
    "null",
    "-1",
    "0",
    "1e400",
    ".inf",
    ".nan",
    "[]",
    "{}",
    "''",
    "yes",
    "2001-01-01",
    "'${X}'",
    "1" * 5000,
    "'{{'",
)


def params(rng: random.Random, folder: Path) -> str:
    """Read params.yaml."""
    from stages.params.schema import ParamsError, load_params

    lines = (record.ROOT / "params.yaml").read_text(encoding="utf-8").splitlines(keepends=True)
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(lines))
        name, colon, _ = lines[at].partition(":")
        match rng.randrange(6):
            case 0:
                del lines[at]
            case 1:
                lines.insert(at, lines[rng.randrange(len(lines))])
            case 2:
                lines.insert(at, rng.choice(LINES))
            case 3 if colon:
                lines[at] = f"{name}: {mutate.to_json(mutate.value(rng))}\n"
            case 4 if colon:
                lines[at] = f"{name}: {rng.choice(VALUES)}\n"
            case _:
                lines[at] = mutate.damaged_text(rng, lines[at])
    data = "".join(lines).encode("utf-8", "surrogatepass")
    path = folder / "params.yaml"
    path.write_bytes(mutate.damaged(rng, data) if rng.random() < 0.2 else data)
    try:
        load_params(path)
    except ParamsError as error:
        raise Refused(str(error)) from error
    return "read"


# ---- tables and images


def tables(rng: random.Random, folder: Path) -> str:
    """Read an Arrow or Parquet file."""
    from sft.data.sources import read_rows

    name = rng.choice(("a.arrow", "stream.arrow", "a.parquet"))
    path = folder / name
    path.write_bytes(mutate.damaged(rng, (_seeds() / name).read_bytes(), head=rng.choice((0, 400))))
    return "read" if refusing(lambda: list(read_rows(path))) is not None else ""


def images(rng: random.Random, folder: Path) -> str:
    """Decode an image."""
    from sft.untrusted.images import check_image

    path = rng.choice(sorted((_seeds() / "images").iterdir()))
    content = path.read_bytes()
    refusing(check_image, mutate.damaged(rng, content, head=rng.choice((0, 60))))
    return "read"


# ---- files of models


def tokenizers(rng: random.Random, folder: Path) -> str:
    """Load a tokenizer, and encode a text."""
    from sft.models.checkpoint import load_tokenizer

    _copy(_seeds() / "base", folder, ("tokenizer.json", "tokenizer_config.json", "config.json"))
    _damage_json(rng, folder / rng.choice(("tokenizer.json",) * 4 + ("tokenizer_config.json",)))
    tokenizer = refusing(load_tokenizer, folder)
    ids = tokenizer("Hello, world! 東京 \n\n x" * 10)["input_ids"]
    if len(ids) > 1_000_000:
        raise RuntimeError(f"{len(ids)} tokens of a short text")
    tokenizer.decode(ids)
    return "read"


def adapters(rng: random.Random, folder: Path) -> str:
    """Check an adapter, and load it onto its base model."""
    import copy

    from sft.models.saved_adapters import check_adapter_folder, load_adapter

    _copy(_seeds() / "adapter", folder, ("adapter_config.json", "adapter_model.safetensors"))
    if rng.random() < 0.6:
        _damage_json(rng, folder / "adapter_config.json")
    else:
        _damage_tensors(rng, folder / "adapter_model.safetensors")
    refusing(check_adapter_folder, folder)
    refusing(load_adapter, copy.deepcopy(_base_model()), folder)
    return "read"


def safetensors(rng: random.Random, folder: Path) -> str:
    """Check the checkpoint of a base model, and load it."""
    from sft.models.checkpoint import check_checkpoint
    from sft.models.loading import load_model

    _copy(_seeds() / "base", folder, ("config.json", "model.safetensors", "generation_config.json"))
    if rng.random() < 0.3:
        _damage_json(rng, folder / "config.json")
    else:
        _damage_tensors(rng, folder / "model.safetensors")
    refusing(check_checkpoint, folder)
    refusing(load_model, folder, dtype="float32", attn_implementation="sdpa", trust_remote_code=False)
    return "read"


def gguf(rng: random.Random, folder: Path) -> str:
    """Read a GGUF file as a model and a tokenizer."""
    from sft.models.gguf import dequantize_gguf

    path = folder / "tiny.gguf"
    path.write_bytes(mutate.damaged(rng, (_seeds() / "tiny.gguf").read_bytes(), head=rng.choice((0, 1000, 8000))))
    refusing(dequantize_gguf, path, folder / "out")
    return "read"


def _damage_json(rng: random.Random, path: Path) -> None:
    content = path.read_bytes()
    if rng.random() < 0.25:
        path.write_bytes(mutate.damaged(rng, content, head=rng.choice((0, 2000))))
        return
    changed: Any = json.loads(content)
    for _ in range(rng.randrange(1, 3)):
        changed = mutate.changed(rng, changed)
    path.write_text(mutate.to_json(changed), encoding="utf-8")


def _damage_tensors(rng: random.Random, path: Path) -> None:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    if rng.random() < 0.4:
        path.write_bytes(mutate.damaged(rng, content, head=rng.choice((16, 8 + size))))
        return
    header = mutate.to_json(mutate.changed(rng, json.loads(content[8 : 8 + size]))).encode()
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + size :])


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (target / name).write_bytes((source / name).read_bytes())


def _base_model() -> Any:
    global _model
    if _model is None:
        from transformers import AutoModelForCausalLM

        _model = AutoModelForCausalLM.from_pretrained(_seeds() / "base")
    return _model


_model: Any = None


def _seeds() -> Path:
    return Path(os.environ["SFT_FUZZ_SEEDS"])


def make_seeds(folder: Path) -> None:
    """Write the valid files that are damaged."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq
    from peft import LoraConfig, get_peft_model
    from PIL import Image

    from tests.tiny import tiny_model, tiny_tokenizer
    from tests.tiny_gguf import write_gguf

    tokenizer, model = tiny_tokenizer(), tiny_model()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    write_gguf(folder / "tiny.gguf", model, tokenizer)
    get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"])).save_pretrained(
        folder / "adapter"
    )
    table = pa.table(
        {
            "prompt": [f"question {number}" for number in range(40)],
            "completion": [None if number % 7 == 0 else "a" * number for number in range(40)],
            "tags": [["x"] * (number % 3) for number in range(40)],
            "kind": pa.array(["a", "b"] * 20).dictionary_encode(),
            "more": [{"n": number, "t": "z"} for number in range(40)],
        }
    )
    for name, opened in (("a.arrow", pa.ipc.new_file), ("stream.arrow", pa.ipc.new_stream)):
        with pa.OSFile(str(folder / name), "wb") as sink, opened(sink, table.schema) as writer:
            writer.write_table(table)
    pq.write_table(table, folder / "a.parquet")
    (folder / "images").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    for ending in ("png", "jpg", "webp", "gif", "bmp", "tif"):
        Image.fromarray(noise).save(folder / "images" / f"a.{ending}")


KINDS: dict[str, tuple[Case, int]] = {
    "rows": (rows, 36_000),
    "templates": (templates, 20_000),
    "params": (params, 12_000),
    "tables": (tables, 10_000),
    "images": (images, 14_000),
    "tokenizers": (tokenizers, 3_000),
    "adapters": (adapters, 2_000),
    "safetensors": (safetensors, 1_500),
    "gguf": (gguf, 1_500),
}
"""Kind of input -> the function that runs a case, and how many cases are run by default."""


def work(kind: str, seed: int, numbers: range) -> None:
    """Run cases, in the worker process; a line for each."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    out = os.fdopen(os.dup(1), "w", buffering=1)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    run, own = KINDS[kind][0], psutil.Process()
    for number in numbers:
        started, fault = time.monotonic(), None
        with tempfile.TemporaryDirectory(prefix="sft-fuzz-") as name:
            try:
                outcome = run(random.Random(f"{seed}:{kind}:{number}"), Path(name))
            except Refused:
                outcome = "refused"
            except KeyboardInterrupt:
                raise
            except BaseException:
                outcome, fault = "fault", traceback.format_exc()
        seconds = time.monotonic() - started
        if seconds > SLOWEST_S and fault is None:
            outcome, fault = "fault", f"it took {seconds:.0f} s"
        peak = [_peak(os.getpid()), max((_peak(child.pid) for child in own.children()), default=0)]
        line = {"number": number, "outcome": outcome, "seconds": seconds, "fault": fault, "peak": peak}
        out.write(json.dumps(line) + "\n")


def _peak(pid: int) -> int:
    """Return the largest memory of a process so far, in kB; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def drive(kind: str, seed: int, numbers: range, faults: Path) -> dict[str, Any]:
    """Run cases in worker processes, as many as are needed, and return the figures."""
    counts = {"read": 0, "refused": 0, "fault": 0}
    slowest, peaks, following = 0.0, [0, 0], numbers.start
    while following < numbers.stop:
        command = [sys.executable, "-m", "benchmarks.reliability.fuzz", "--kind", kind, "--seed", str(seed)]
        command += ["--worker", "--start", str(following), "--count", str(numbers.stop - following)]
        worker = subprocess.Popen(
            command, cwd=record.ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        lines: queue.Queue[str] = queue.Queue()
        assert worker.stdout is not None
        threading.Thread(target=_read, args=(worker.stdout, lines), daemon=True).start()
        while True:
            try:
                line = lines.get(timeout=SILENT_S)
            except queue.Empty:
                line = ""
            if not line:  # ended or hung
                break
            case = json.loads(line)
            following = case["number"] + 1
            counts[case["outcome"]] += 1
            slowest = max(slowest, case["seconds"])
            peaks = [max(pair) for pair in zip(peaks, case["peak"], strict=True)]
            if case["fault"]:
                _keep(faults, kind, seed, case["number"], case["fault"])
        if following < numbers.stop:
            hung = worker.poll() is None and not _ended(worker)
            worker.kill()
            _keep(faults, kind, seed, following, "the worker hung" if hung else f"the worker ended: {worker.wait()}")
            counts["fault"] += 1
            following += 1
        worker.wait()
    return {
        "cases": len(numbers),
        "read": counts["read"],
        "refused with a message": counts["refused"],
        "faults": counts["fault"],
        "slowest, s": f"{slowest:.1f}",
        "peak, MB": f"{peaks[0] // 1000}, {peaks[1] // 1000}",
        "seed": seed,
    }


def _ended(worker: subprocess.Popen[str]) -> bool:
    try:
        worker.wait(timeout=5)
    except subprocess.TimeoutExpired:
        return False
    return True


def _read(stream: Any, lines: queue.Queue[str]) -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _keep(faults: Path, kind: str, seed: int, number: int, fault: str) -> None:
    faults.parent.mkdir(parents=True, exist_ok=True)
    with faults.open("a", encoding="utf-8") as file:
        file.write(f"== {kind}, --seed {seed} --only {number}\n{fault}\n")
    print(f"fault: {kind}, --seed {seed} --only {number}: {fault.strip().splitlines()[-1][:300]}", flush=True)


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=[*KINDS], nargs="+", default=[*KINDS])
    parser.add_argument("--count", type=int, help="cases of each kind; default: 100,000 for all kinds together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=int, default=0, help="number of the first case")
    parser.add_argument("--only", type=int, help="number of a case to repeat here, with its traceback")
    parser.add_argument("--faults", type=Path, default=Path(".state/fuzz_faults.txt"), help="file that gets faults")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.kind[0], args.seed, range(args.start, args.start + args.count))
        return
    with tempfile.TemporaryDirectory(prefix="sft-fuzz-seeds-") as seeds:
        os.environ["SFT_FUZZ_SEEDS"] = seeds
        # in a process of its own, as it imports torch
        code = "import sys; from pathlib import Path; from benchmarks.reliability import fuzz; "
        code += "fuzz.make_seeds(Path(sys.argv[1]))"
        subprocess.run([sys.executable, "-c", code, seeds], cwd=record.ROOT, check=True, capture_output=True)
        if args.only is not None:
            with tempfile.TemporaryDirectory() as folder:
                print(KINDS[args.kind[0]][0](random.Random(f"{args.seed}:{args.kind[0]}:{args.only}"), Path(folder)))
            return
        for kind in args.kind:
            count = args.count or KINDS[kind][1]
            figures = drive(kind, args.seed, range(args.start, args.start + count), args.faults)
            record.add("fuzz", kind, figures)
            print(kind, figures, flush=True)


if __name__ == "__main__":
    main()
