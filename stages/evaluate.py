"""Stage `evaluate`: base, tuned, merged and quantized model on the held-out rows to figures, answers, report, gate."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from datasets import load_from_disk
from transformers import PreTrainedTokenizerBase

from sft.evaluate.evidence import Evidence
from sft.evaluate.gate import GateRow, check_gate, parse_gate
from sft.evaluate.generation import BegunAnswers, generate_batch, generate_from_inputs
from sft.evaluate.likelihood import DocumentScores, evaluate_model, split_documents
from sft.models.checkpoint import load_tokenizer
from stages.checkout.artifacts import read_json, write_json, write_jsonl
from stages.checkout.paths import Paths
from stages.engines.comparison import EngineResult
from stages.engines.evaluation import ask_runs, entries_of, find_runs
from stages.evaluation.lm_eval import load_harness
from stages.evaluation.results import ModelResult, comparisons
from stages.evaluation.row_scores import (
    ANSWERS,
    DOCUMENTS,
    GENERAL_ANSWERS,
    TEST_ANSWERS,
    evidence_of,
    read_row_scores,
    row_keys,
)
from stages.evaluation.rows import KEYS, EvalRows, read_prompts, read_records, render_records, test_rows
from stages.evaluation.soundness import check_finite, failed_checks
from stages.models.images import image_collator
from stages.models.variants import Variant, find_variants, load_variant, size_mb
from stages.pages.report import write_evaluation_page
from stages.params.figures import ANSWERING, LIKELIHOOD, REFERENCE, REGRESSION, TEST, VERDICTS
from stages.params.schema import EvaluateSection, Params
from stages.params.tasks import load_tasks, task_names
from stages.progress import progress, stage_progress

if TYPE_CHECKING:
    from sft.vision.collator import DataCollatorForImageRows

TOKENS_PER_BATCH = 2048

SCORED, ANSWERED, HARNESS, SENT = "documents evaluated", "prompts answered", "lm-eval", "prompts sent"
"""What is counted; the first two are the texts that the functions of `sft.evaluate` report."""


class Meter:
    """Progress over all models: documents scored and prompts answered, which take different times.

    Args:
        amounts: Number of documents or prompts of all models, by what is done to them, such as `prompts answered`.
    """

    def __init__(self, amounts: Mapping[str, int]) -> None:
        self.model = ""
        self._left, self._total = dict(amounts), sum(amounts.values())
        self._seconds = dict.fromkeys(amounts, 0.0)
        self._num_timed = dict.fromkeys(amounts, 0)
        self._done, self._time = 0, time.monotonic()

    def start(self) -> None:
        """Start the clock, so that what was done before, such as loading a model, is not counted."""
        self._time = time.monotonic()

    def __call__(self, done: int, of: int, text: str) -> None:
        """Show the progress.

        Args:
            done: Documents or prompts of this part that are done.
            of: Documents or prompts of this part.
            text: What they are.
        """
        now = time.monotonic()
        self._seconds[text] += now - self._time
        self._num_timed[text] += done - self._done
        self._left[text] -= done - self._done
        self._done, self._time = done if done < of else 0, now
        num_left = sum(self._left.values())
        what = f"{self.model}: {done} of {of} {text}"
        progress(self._total - num_left, self._total, "documents and prompts", what, left_s=self.seconds_left())

    def seconds_left(self) -> float:
        """Estimate the seconds until the last prompt; NaN as long as no prompt was answered."""
        if any(number and not self._num_timed[text] for text, number in self._left.items()):
            return math.nan
        return sum(n * self._seconds[text] / self._num_timed[text] for text, n in self._left.items() if n)


@stage_progress("evaluate")
def run(params: Params, paths: Paths) -> None:
    """Write outs/evaluate, reports/evaluation.html and the figures; a failed gate is a result, not an error."""
    section = params.evaluate
    tokenizer = load_tokenizer(paths.out("format", "tokenizer"))
    held_out = read_held_out(section, paths, tokenizer)
    others = read_others(section, paths, tokenizer)
    harness = load_harness(section.lm_eval, paths.root)
    runs = find_runs(params, paths, held_out)
    variants = find_variants(paths)
    conditions = parse_gate(section.gate)  # the names in it were checked with params.yaml
    amounts = Counter({SENT: len(runs) * len(held_out.prompts)})
    for variant in variants:
        amounts += sum((amount(rows, variant) for rows in (held_out, *others.values())), Counter())
        amounts[HARNESS] += harness is not None and harness.answers(variant.name)
    meter = Meter(amounts)
    collator = image_collator(paths, tokenizer) if paths.has_images() else None
    measuring = Measuring(tokenizer, section.batch_size, meter, collator)
    new_token_ids = read_json(paths.out("format", "summary.json"))["new_token_ids"]
    measured: dict[str, ModelResult] = {}
    # the tuned model is first, as the others are compared with it
    for variant in sorted(variants, key=lambda variant: variant.name != REFERENCE):
        meter.model = variant.name
        model = load_variant(variant, params.model, len(tokenizer), new_token_ids)
        meter.start()
        tuned = measured.get(REFERENCE)
        result = measuring.measure(model, variant, held_out, tuned)
        check_finite(variant, result)
        result.figures["size_mb"] = size_mb(variant)
        for prefix, rows in others.items():
            reference = tuned.others[prefix] if tuned else None
            result.add_others(prefix, measuring.measure(model, variant, rows, reference))
        if harness is not None and harness.answers(variant.name):
            harness.measure(model, tokenizer, result)
            meter(1, 1, HARNESS)
        measured[variant.name] = result
        del model
    measured = {variant.name: measured[variant.name] for variant in variants}

    def show_sent(name: str, done: int, total: int) -> None:
        meter.model = name
        if done:
            meter(done, total, SENT)
        else:
            meter.start()

    engines = ask_runs(runs, params, paths, held_out, tokenizer, measured, show_sent)
    figures = {name: result.with_errors() for name, result in measured.items()}
    write_rows(paths, held_out, others, measured, engines)
    evidence = read_evidence(paths, held_out, measured, engines)
    with_engines = figures | {name: result.figures for name, result in engines.items()}
    checked = check_gate(conditions, with_engines, evidence, section.gate_needs)
    gate = [*failed_checks(figures, params, paths), *checked]
    sizes: dict[str, Any] = {"num_general": 0, "num_test": 0, "lm_eval": harness.notes() if harness else {}}
    sizes["engines"] = entries_of(runs, engines, paths)
    for name, prefix in (("num_general", REGRESSION), ("num_test", TEST)):
        sizes[name] = others[prefix].num_documents if prefix in others else 0
    write_outputs(paths, section, held_out, sizes, measured, engines, gate)
    write_evaluation_page(params, paths)
    print(summary(with_engines, gate, paths), flush=True)


def read_held_out(section: EvaluateSection, paths: Paths, tokenizer: PreTrainedTokenizerBase) -> EvalRows:
    """Read the packed held-out rows and the prompts, and check the references before a model is loaded."""
    task = load_tasks(section.task, paths.root)
    prompts = read_prompts(section, task, paths)
    rows = load_from_disk(str(paths.out("pack", "eval"))).to_list()
    return EvalRows.of(rows, prompts, tokenizer, task, section.max_new_tokens)


def read_others(section: EvaluateSection, paths: Paths, tokenizer: PreTrainedTokenizerBase) -> dict[str, EvalRows]:
    """Read the rows besides the held-out ones that params.yaml names, by the prefix of their figures."""
    found = {}
    for prefix, rows in ((TEST, test_rows(section)), (REGRESSION, section.regression)):
        if records := read_records(rows, paths.root, KEYS[prefix]):
            found[prefix] = render_records(records, rows, tokenizer, paths.root, KEYS[prefix])
    return found


def amount(rows: EvalRows, variant: Variant) -> Counter[str]:
    """Return the number of documents that a model scores and of prompts that it answers."""
    return Counter({SCORED: rows.num_documents, ANSWERED: len(rows.prompts) * (variant.name in ANSWERING)})


@dataclass(frozen=True)
class Measuring:
    """Settings with which all models are measured.

    Args:
        tokenizer: Tokenizer of the run.
        batch_size: Prompts per batch of the generation.
        meter: Progress of the evaluation.
        collator: Reads the images of rows; None = no row has images.
    """

    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    meter: Meter
    collator: DataCollatorForImageRows | None = None

    def measure(self, model: Any, variant: Variant, asked: EvalRows, reference: ModelResult | None) -> ModelResult:
        """Measure one model on one set of rows: likelihood, and answers if it generates.

        Args:
            model: The model on its device.
            variant: Which of the four models it is.
            asked: The rows.
            reference: Results of the tuned model on the rows, for the KL divergence; None for the tuned model itself.
        """
        started = time.monotonic()
        documents = DocumentScores(reference.documents.kept if reference else None, keep=reference is None)
        begun = BegunAnswers(asked.token_ids)
        likelihood = evaluate_model(
            model,
            asked.rows,
            TOKENS_PER_BATCH,
            on_progress=self.meter,
            on_predictions=begun.learn,
            on_logits=documents.add,
            collate_images=self.collator,
        )
        result = ModelResult({name: likelihood[name] for name in LIKELIHOOD}, documents)
        result.add_documents()
        result.seconds["likelihood"] = round(time.monotonic() - started, 1)
        if variant.name in ANSWERING and asked.prompts:
            self.answer(model, asked, begun.tokens(), result)
        return result

    def answer(self, model: Any, asked: EvalRows, given: list[list[int]], result: ModelResult) -> None:
        """Generate answers to the prompts and add them to the result.

        Args:
            model: The model on its device.
            asked: The rows.
            given: First tokens of each answer, known from scoring, which need not be generated.
            result: Results of the model.
        """
        started = time.monotonic()
        with_images = asked.prompts_with_images
        of_text = [number for number in range(len(asked.prompts)) if number not in set(with_images)]
        answers: list[Any] = [None] * len(asked.prompts)
        if of_text:
            generated = generate_batch(
                model,
                self.tokenizer,
                [asked.token_ids[number] for number in of_text],
                asked.max_new_tokens,
                self.batch_size,
                on_progress=self.meter,
                begun=[given[number] for number in of_text],
            )
            for number, answer in zip(of_text, generated, strict=True):
                answers[number] = answer
        for done, number in enumerate(with_images, start=1):
            assert self.collator is not None, "prompts have images, and `load` wrote none"
            inputs = self.collator.prompt(asked.prompts[number]["prompt"], asked.prompts[number]["images"])
            answers[number] = generate_from_inputs(model, self.tokenizer, inputs, asked.max_new_tokens)
            self.meter(done, len(with_images), ANSWERED)
        seconds = time.monotonic() - started
        num_tokens = sum(answer.num_tokens for answer in answers) - sum(map(len, given))
        result.seconds |= {"generation": round(seconds, 1), "tokens_per_second": round(max(0, num_tokens) / seconds, 1)}
        result.add_answers(answers, asked.task, asked.references)


def write_outputs(
    paths: Paths,
    section: EvaluateSection,
    held_out: EvalRows,
    sizes: dict[str, Any],
    measured: dict[str, ModelResult],
    engines: dict[str, EngineResult],
    gate: list[GateRow],
) -> None:
    """Write results.json, the metrics for DVC, and the timings.

    Args:
        paths: The checkout.
        section: Section `evaluate` of params.yaml.
        held_out: The held-out rows.
        sizes: More entries of results.json: number of general documents, sizes of the tasks of lm-eval, and engines.
        measured: Model -> its results.
        engines: Engine -> its result.
        gate: The checked conditions.
    """
    passed = all(row.passed for row in gate)
    figures = {name: result.figures for name, result in measured.items()}
    results = {
        "tasks": task_names(section.task),
        "figures": list(held_out.task.names),
        "num_prompts": len(held_out.prompts),
        **sizes,
        "max_new_tokens": section.max_new_tokens,
        "models": figures,
        "intervals": intervals_of(measured, engines),
        "comparisons": comparisons(measured),
        "not_generated": {"merged": merge_note(paths)},
        "gate": [asdict(row) for row in gate],
        "passed": passed,
    }
    write_json(paths.out("evaluate", "results.json"), results)
    with_errors = {name: result.with_errors() for name, result in measured.items()}
    of_engines = {name: result.figures for name, result in engines.items()}
    write_json(paths.metrics("evaluate"), {**with_errors, **of_engines, "gate_passed": int(passed)})
    seconds = {name: result.seconds for name, result in measured.items()}
    write_json(paths.timings("evaluate"), seconds | {name: result.speed for name, result in engines.items()})


def intervals_of(measured: Mapping[str, ModelResult], engines: Mapping[str, EngineResult]) -> dict[str, Any]:
    """Return the intervals of all figures by model; engines are called `engine.NAME`."""
    of_engines = {name: result.intervals for name, result in engines.items()}
    return {name: result.intervals for name, result in measured.items()} | of_engines


def write_rows(
    paths: Paths,
    held_out: EvalRows,
    others: Mapping[str, EvalRows],
    measured: dict[str, ModelResult],
    engines: dict[str, EngineResult],
) -> None:
    """Write the answers to generations.jsonl, general.jsonl and test.jsonl, and the sums over each document.

    An earlier general.jsonl or test.jsonl is deleted if there are no such rows.
    """
    folder = paths.out("evaluate")
    rows = generation_rows(held_out, measured)
    for name, result in engines.items():
        for row, sent in zip(rows, result.rows, strict=True):
            row["answers"][name] = {key: value for key, value in sent.items() if key != "id"}
    write_jsonl(folder / ANSWERS, rows)
    documents = document_rows(held_out, measured)
    for prefix, file in ((REGRESSION, GENERAL_ANSWERS), (TEST, TEST_ANSWERS)):
        (folder / file).unlink(missing_ok=True)
        if prefix in others:
            results = {name: result.others[prefix] for name, result in measured.items()}
            documents += document_rows(others[prefix], results, prefix)
            if others[prefix].prompts:
                write_jsonl(folder / file, generation_rows(others[prefix], results))
    write_jsonl(folder / DOCUMENTS, documents)


def read_evidence(
    paths: Paths, held_out: EvalRows, measured: dict[str, ModelResult], engines: dict[str, EngineResult]
) -> Evidence:
    """Return how certain the figures are, from the rows that `write_rows` has written."""
    intervals = intervals_of(measured, engines)
    return evidence_of(intervals, read_row_scores(paths.out("evaluate")), len(held_out.prompts))


def merge_note(paths: Paths) -> str:
    """Explain why the merged model generates no answers, for results.json."""
    note = "not generated, as the stage merge has proved that its logits are those of the tuned model"
    metrics = paths.metrics("merge")
    difference = read_json(metrics).get("max_logit_diff") if metrics.exists() else None
    return note if difference is None else f"{note} (largest difference {difference:.2g})"


def generation_rows(asked: EvalRows, measured: dict[str, ModelResult]) -> list[dict[str, Any]]:
    """Return one row per prompt: id, prompt, reference, and the answer of each model with its scores."""
    rows = []
    for index, prompt in enumerate(asked.prompts):
        answers = {
            name: {**asdict(result.answers[index]), "scores": result.scores[index]}
            for name, result in measured.items()
            if result.answers
        }
        rows.append({**{name: prompt[name] for name in ("id", "prompt", "reference")}, "answers": answers})
    return rows


def document_rows(asked: EvalRows, measured: Mapping[str, ModelResult], prefix: str = "") -> list[dict[str, Any]]:
    """Return one row per document: its key, its number of tokens, and the sums of each model over these tokens."""
    documents = list(split_documents(asked.rows))
    kind = prefix if prefix == TEST else prefix == REGRESSION  # keys of earlier results have a bool
    keys = row_keys((kind, document.input_ids, document.labels) for document in documents)
    marks = {"general": prefix == REGRESSION, **({"test": True} if prefix == TEST else {})}
    rows: list[dict[str, Any]] = [{"document": key, **marks, "models": {}} for key in keys]
    for name, result in measured.items():
        scores = result.documents
        columns = {metric: scores.column(metric) for metric in result.summed}
        for number, (row, tokens) in enumerate(zip(rows, scores.column("num_tokens"), strict=True)):
            row["num_tokens"] = int(tokens)
            row["models"][name] = {metric: values[number] for metric, values in columns.items()}
    return rows


def summary(figures: Mapping[str, Mapping[str, float]], gate: list[GateRow], paths: Paths) -> str:
    """Describe the result in a few lines: figures of each model, conditions of the gate, path of the report."""
    lines = [f"  {name:<10} " + "  ".join(f"{k} {v:.4g}" for k, v in each.items()) for name, each in figures.items()]
    lines += [f"  {VERDICTS[row.verdict]:<9}  {row.condition}  ({row.reason})" for row in gate]
    verdict = "gate passed" if all(row.passed for row in gate) else "gate FAILED: the champion will not be replaced"
    return "\n".join([*lines, verdict, f"report: {paths.evaluation_page}"])
