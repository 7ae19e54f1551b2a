"""One small interface over the libraries that are compared: `Trl`, `Unsloth`, `Sft`.

The three take the same scripts (`SFTTrainer`, `SFTConfig`), so most of the interface is shared. Where a library has its
own way to do a thing, as its documentation shows it, the class below uses that way.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from benchmarks.silent_failures.case import NotOffered, TrainingLost

IGNORED = -100


class _Lines(logging.Handler):
    """Collects the text of log records of level WARNING and above."""

    def __init__(self, said: list[str]) -> None:
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


class Library:
    """What the cases ask of a library.

    Attributes:
        name: As the results have it.
        package: Package whose `SFTTrainer` and `SFTConfig` are used.
    """

    name = ""
    package = ""

    def __init__(self) -> None:
        self.module = importlib.import_module(self.package)
        self._folder = tempfile.TemporaryDirectory(prefix="silent_failures_")

    def versions(self) -> dict[str, str]:
        """Return the versions of the library and of the packages under it, which decide some cases."""
        found = {}
        for package in dict.fromkeys((self.name, "trl", "transformers", "peft", "torch", "datasets")):
            try:
                found[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found

    def folder(self) -> Path:
        """Return a new empty folder."""
        return Path(tempfile.mkdtemp(dir=self._folder.name))

    @contextmanager
    def listening(self) -> Iterator[list[str]]:
        """Collect all warnings, log lines from WARNING on, and printed lines of the block."""
        said: list[str] = []
        handler, printed = _Lines(said), io.StringIO()
        loggers = [logging.getLogger(name) for name in (None, "transformers", "datasets", "trl", "sft", "unsloth")]
        for logger in loggers:
            logger.addHandler(handler)
        _forget_warnings_said_once()
        try:
            with warnings.catch_warnings(record=True) as caught, redirect_stdout(printed):
                warnings.simplefilter("always")
                yield said
        finally:
            for logger in loggers:
                logger.removeHandler(handler)
            said.extend(str(warning.message) for warning in caught)
            lines = [line.strip() for line in printed.getvalue().splitlines()]
            said.extend(line for line in lines if line and not line.startswith("{"))  # log lines are no warnings

    def read(self, path: Path) -> Any:
        """Read a JSONL file as the library's documentation does."""
        from datasets import load_dataset

        return load_dataset("json", data_files=str(path), split="train", cache_dir=str(self.folder()))

    def from_sharegpt(self, rows: Any, tokenizer: Any) -> Any:
        """Return a data set of ShareGPT rows as the documentation gives it to the trainer."""
        return as_dataset(rows)

    def read_file(self, path: Path) -> Any:
        """Read a JSONL file with the library's own reader, if it has one."""
        return self.read(path)

    # -- training

    def config(self, **options: Any) -> Any:
        """Return options of a short training on a CPU."""
        defaults = {
            "report_to": [],
            "disable_tqdm": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "bf16": False,
        }
        return self.module.SFTConfig(**{"output_dir": str(self.folder()), **defaults, **options})

    def trainer(self, model: Any, tokenizer: Any, rows: Any, **arguments: Any) -> Any:
        """Return a trainer.

        Args:
            model: A model, or its folder.
            tokenizer: Its tokenizer.
            rows: A list of rows, or a data set.
            arguments: Arguments of the trainer (`eval_rows` may be a list); everything else are options.
        """
        known = ("eval_rows", "peft_config", "callbacks", "data_collator", "formatting_func", "compute_metrics")
        given = {name: arguments.pop(name) for name in known if name in arguments}
        if given.get("eval_rows") is not None:
            given["eval_dataset"] = as_dataset(given.pop("eval_rows"))
        return self.module.SFTTrainer(
            model=model,
            args=self.config(**arguments),
            train_dataset=as_dataset(rows),
            processing_class=tokenizer,
            **given,
        )

    def trainer_with_tokens(self, base: Path, tokens: list[str], rows: Any, **arguments: Any) -> Any:
        """Return a trainer whose model and tokenizer got new special tokens, as the documentation adds them."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_special_tokens({"additional_special_tokens": tokens})
        model = AutoModelForCausalLM.from_pretrained(base)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        return self.trainer(model, tokenizer, rows, **arguments)

    def train(self, trainer: Any, **arguments: Any) -> list[dict[str, float]]:
        """Train and return the logged lines; an error after the first update is a lost training."""
        try:
            trainer.train(**arguments)
        except Exception as error:
            if trainer.state.global_step:
                raise TrainingLost from error
            raise
        return trainer.state.log_history

    def save(self, trainer: Any) -> Path:
        """Save the trained model as the library's documentation does, and return its folder."""
        folder = self.folder()
        try:
            trainer.save_model(str(folder))
        except Exception as error:
            raise TrainingLost from error
        return folder

    def first_loss(self, trainer: Any) -> float:
        """Train one update and return its logged loss."""
        return next(line["loss"] for line in self.train(trainer) if "loss" in line)

    def eval_loss(self, trainer: Any) -> float:
        """Return the loss that `evaluate` reports."""
        return trainer.evaluate()["eval_loss"]

    # -- what is trained

    def sequences(self, trainer: Any) -> list[tuple[list[int], list[int]]]:
        """Return token ids and labels of each row of the training data, as its collator gives them to the model."""
        kept = ("input_ids", "labels", "completion_mask", "assistant_masks", "seq_lengths")
        rows = []
        for row in trainer.train_dataset:
            batch = trainer.data_collator([{name: row[name] for name in kept if name in row}])
            rows.append((batch["input_ids"][0].tolist(), batch["labels"][0].tolist()))
        return rows

    def weights(self, trainer: Any) -> list[list[float]] | None:
        """Return the weights of the tokens' losses, if the library has any."""
        if "loss_weights" not in (trainer.train_dataset.column_names or ()):
            return None
        return [row["loss_weights"] for row in trainer.train_dataset]

    def spans(self, trainer: Any, tokenizer: Any) -> list[list[str]]:
        """Return the trained stretches of each row, as text with special tokens."""
        return [trained_stretches(ids, labels, tokenizer) for ids, labels in self.sequences(trainer)]

    def texts(self, trainer: Any, tokenizer: Any) -> list[str]:
        """Return the text of each row, with special tokens."""
        return [tokenizer.decode(ids) for ids, _ in self.sequences(trainer)]

    def response_trainer(self, model: Any, tokenizer: Any, rows: Any, *, instruction: str, response: str) -> Any:
        """Return a trainer of plain text in which only what follows `response` is trained, up to `instruction`."""
        raise NotImplementedError

    # -- adapters and generation

    def score_of_reference(self, model: Any, tokenizer: Any, reference: str) -> float:
        """Return the exact match of an answer that equals the reference token by token."""
        raise NotOffered("no scores of answers")

    def merge(self, trainer: Any, base: Path) -> Any:
        """Merge a trained adapter into its base on disk and return the merged model."""
        raise NotImplementedError

    def answers(self, model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        """Return the greedy answers to a batch of prompts, without special tokens."""
        raise NotImplementedError


class Trl(Library):
    """trl, with peft for merging and transformers for generation, as its documentation has it."""

    name = "trl"
    package = "trl"

    def response_trainer(self, model: Any, tokenizer: Any, rows: Any, *, instruction: str, response: str) -> Any:
        raise NotOffered("DataCollatorForCompletionOnlyLM was removed")

    def merge(self, trainer: Any, base: Path) -> Any:
        from peft import AutoPeftModelForCausalLM
        from transformers import AutoModelForCausalLM

        folder = self.folder()
        AutoPeftModelForCausalLM.from_pretrained(self.save(trainer)).merge_and_unload().save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder).eval()

    def answers(self, model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        return generate_padded(model, tokenizer, prompts, max_new_tokens)


class Unsloth(Library):
    """unsloth on its CPU backend: models made by `FastLanguageModel`, trained by the trainer of trl that it patches."""

    name = "unsloth"
    package = "unsloth"

    def __init__(self) -> None:
        super().__init__()  # unsloth must be imported before trl and transformers
        import trl

        self.fast, self.module = self.module.FastLanguageModel, trl

    def trainer(self, model: Any, tokenizer: Any, rows: Any, **arguments: Any) -> Any:
        peft_config = arguments.pop("peft_config", None)
        model, tokenizer = self.load(model, tokenizer, peft_config)
        return super().trainer(model, tokenizer, rows, **arguments)

    def from_sharegpt(self, rows: Any, tokenizer: Any) -> Any:
        from unsloth.chat_templates import standardize_sharegpt

        def as_text(row: dict[str, Any]) -> dict[str, str]:
            return {"text": tokenizer.apply_chat_template(row["conversations"], tokenize=False)}

        return standardize_sharegpt(as_dataset(rows)).map(as_text)

    def load(self, model: Any, tokenizer: Any, peft_config: Any, full: bool | None = None) -> tuple[Any, Any]:
        """Load a model as the documentation of unsloth does, with an adapter if there is one."""
        folder = model if isinstance(model, (str, Path)) else self.write(model, tokenizer)
        loaded, tokenizer = self.fast.from_pretrained(
            str(folder),
            max_seq_length=2048,
            dtype=torch.float32,
            load_in_4bit=False,
            full_finetuning=peft_config is None if full is None else full,
        )
        if peft_config is not None:
            loaded = self.with_adapter(loaded, peft_config)
        return loaded, tokenizer

    def write(self, model: Any, tokenizer: Any) -> Path:
        """Write a model and its tokenizer as a user finds them on a hub, whatever transformers refuses to write."""
        folder, generation = self.folder(), getattr(model, "generation_config", None)
        if generation is not None:
            model.generation_config = type(generation)()
        model.save_pretrained(folder)
        if generation is not None:
            model.generation_config = generation
            (folder / "generation_config.json").write_text(json.dumps(generation.to_diff_dict()))
        try:
            tokenizer.save_pretrained(folder)
        except Exception as error:
            raise NotOffered("models are loaded from folders, and this tokenizer can't be written to one") from error
        return folder

    def with_adapter(self, model: Any, peft_config: Any) -> Any:
        """Put an adapter on a model by `get_peft_model`, which takes the options of LoRA one by one."""
        names = ("r", "target_modules", "lora_alpha", "lora_dropout", "bias", "modules_to_save")
        given = {name: getattr(peft_config, name) for name in (*names, "init_lora_weights")}
        if isinstance(given["target_modules"], set):
            given["target_modules"] = sorted(given["target_modules"])
        return self.fast.get_peft_model(model, use_gradient_checkpointing=False, **given)

    def trainer_with_tokens(self, base: Path, tokens: list[str], rows: Any, **arguments: Any) -> Any:
        from unsloth_zoo.tokenizer_utils import add_new_tokens

        model, tokenizer = self.load(base, None, None, full=False)
        add_new_tokens(model, tokenizer, new_tokens=tokens)
        model = self.with_adapter(model, arguments.pop("peft_config"))
        return Library.trainer(self, model, tokenizer, rows, **arguments)

    def response_trainer(self, model: Any, tokenizer: Any, rows: Any, *, instruction: str, response: str) -> Any:
        from unsloth.chat_templates import train_on_responses_only

        trainer = self.trainer(model, tokenizer, rows)
        return train_on_responses_only(trainer, instruction_part=instruction, response_part=response, num_proc=1)

    def merge(self, trainer: Any, base: Path) -> Any:
        from transformers import AutoModelForCausalLM

        folder = self.folder()
        trainer.model.save_pretrained_merged(str(folder), trainer.processing_class, save_method="merged_16bit")
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answers(self, model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        model, tokenizer = self.load(model, tokenizer, None)
        return generate_padded(self.fast.for_inference(model), tokenizer, prompts, max_new_tokens)


class Sft(Library):
    """This project's library."""

    name = "sft"
    package = "sft"

    def read_file(self, path: Path) -> Any:
        from sft.data.sources import read_rows

        return [row.columns for row in read_rows(path)]

    def response_trainer(self, model: Any, tokenizer: Any, rows: Any, *, instruction: str, response: str) -> Any:
        collator = self.module.DataCollatorForCompletionOnlyLM(
            response_template=response, instruction_template=instruction, tokenizer=tokenizer
        )
        return self.trainer(model, tokenizer, rows, data_collator=collator)

    def merge(self, trainer: Any, base: Path) -> Any:
        from transformers import AutoModelForCausalLM

        folder = self.folder() / "merged"
        tokenizer = trainer.processing_class
        self.module.merge_adapter(
            base, self.save(trainer), folder, [tokenizer("the quick brown fox")["input_ids"]], tokenizer=tokenizer
        )
        return AutoModelForCausalLM.from_pretrained(folder).eval()

    def answers(self, model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
        from sft.evaluate.generation import generate_batch

        return [made.text for made in generate_batch(model, tokenizer, prompts, max_new_tokens)]

    def score_of_reference(self, model: Any, tokenizer: Any, reference: str) -> float:
        from sft.evaluate.generation import generate_batch
        from sft.evaluate.tasks import exact_match

        prompt, answer = tokenizer("What is the weather?")["input_ids"], tokenizer(reference)["input_ids"]
        answer.append(tokenizer.eos_token_id)
        (made,) = generate_batch(model, tokenizer, [prompt], len(answer), begun=[answer])
        return float(exact_match(made.text, reference))


LIBRARIES: dict[str, type[Library]] = {kind.name: kind for kind in (Trl, Unsloth, Sft)}


def as_dataset(rows: Any) -> Any:
    """Return a data set of a list of rows; anything else is returned as it is."""
    from datasets import Dataset

    return Dataset.from_list(rows) if isinstance(rows, list) else rows


def trained_stretches(ids: list[int], labels: list[int], tokenizer: Any) -> list[str]:
    """Return the text of each uninterrupted run of trained tokens."""
    runs: list[list[int]] = []
    before = IGNORED
    for token, label in zip(ids, labels, strict=True):
        if label != IGNORED:
            if before == IGNORED:
                runs.append([])
            runs[-1].append(token)
        before = label
    return [tokenizer.decode(run) for run in runs]


def generate_padded(model: Any, tokenizer: Any, prompts: list[list[int]], max_new_tokens: int) -> list[str]:
    """Generate with transformers from a batch padded on the left; return the texts."""
    tokenizer.padding_side = "left"
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _forget_warnings_said_once() -> None:
    """Let every case hear the warnings that transformers and trl say once per process."""
    from transformers.utils import logging as transformers_logging

    for name in ("warning_once", "info_once"):
        cached = getattr(transformers_logging, name, None)
        if hasattr(cached, "cache_clear"):
            cached.cache_clear()
    from accelerate.logging import MultiProcessAdapter

    MultiProcessAdapter.warning_once.cache_clear()
