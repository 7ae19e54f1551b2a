"""Checks of one family: what `SFTTrainer` trains with a tiny model, beside a plain loop over single documents.

The plain loop runs a model of transformers with its eager attention, one document per call, and torch's cross entropy.
It uses nothing of this library. The trainer runs with its default speed-ups.
"""

from __future__ import annotations

import copy
import math
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

from benchmarks.float32_parts import no_float32
from benchmarks.tiny_families import NUM_RESERVED, UNBUILDABLE, Sizes, tiny_family
from sft.config import SFTConfig
from sft.export.merge import merge_adapter
from sft.inner_model import causal_lm
from sft.labels import IGNORE_INDEX
from sft.models.loading import load_model
from sft.train.trainer import SFTTrainer

LAYOUTS: dict[str, dict[str, Any]] = {
    "packed": {"packing": True, "max_length": 80},
    "joined": {"padding_free": True},
    "padded": {"padding_free": False},
}
"""How documents share a batch -> the options of the trainer, from the fastest to the slowest."""

METHODS = ("lora", "full")

RUNS = [
    *((layout, method, torch.float32) for layout in LAYOUTS for method in METHODS),
    *((layout, "full", torch.float64) for layout in LAYOUTS),
    ("default", "lora", torch.float32),
]
"""Layout (`default`: chosen by the trainer), method and precision of the steps that are compared."""

QUICK_RUNS = [run for run in RUNS if run[2] is torch.float32 and run[0] != "joined" and run[:2] != ("padded", "full")]

LIMITS = {torch.float32: 1e-5, torch.float64: 1e-9}
"""Precision -> largest difference of the loss, and of a gradient relative to the largest one of its weight."""

LARGEST_LIMITS = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Precision -> largest difference that rounding may explain."""

ROUNDING = 6e-8
"""Relative size of the rounding errors of a layer in float32."""

FACTORS = {torch.float32: 4, torch.float64: 10}
"""Precision -> how many times as large as a measured effect of rounding a difference may be."""

FRACTION_OF_LARGEST = 0.1
"""Gradients of a weight are not compared more finely than this fraction of the largest gradient of all weights."""

TOKEN_TYPES = {"molmo2": {"mm_token_type_ids": 0}, "paligemma": {"token_type_ids": 1}}
"""Type of a configuration -> inputs that its model needs, and their value for every token of a text."""

NUM_DOCUMENTS = 6


class Differs(Exception):
    """A result differs from what it is compared with."""


@dataclass(frozen=True)
class Failure:
    """What went wrong in one run.

    Attributes:
        kind: `refused` (before training, by this library), `crash`, or `differs`.
        reason: The message of the error, in one line.
        place: File and line that raised it, and its type.
    """

    kind: str
    reason: str
    place: str = ""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Describe an error.

        It is a refusal if it is a ValueError that this library or peft raised outside `train`.
        """
        reason = " ".join(str(error).split())[:500]
        if isinstance(error, Differs):
            return cls("differs", reason)
        frames = traceback.extract_tb(error.__traceback__)
        path = Path(frames[-1].filename)
        in_train = any(frame.name == "train" and frame.filename.endswith("trainer.py") for frame in frames)
        refused = isinstance(error, ValueError) and not in_train and {"sft", "peft"} & set(path.parts)
        place = f"{type(error).__name__} in {'/'.join(path.parts[-2:])}:{frames[-1].lineno}"
        return cls("refused" if refused else "crash", reason, place)


@dataclass
class FamilyResult:
    """Result of all checks of a family.

    Attributes:
        family: Name.
        unbuildable: Why there is no plain loop to compare with; None if there is one.
        runs: Names of all runs.
        failures: Name of a run, such as `packed lora float32` -> what went wrong.
        worst: Name of a run -> its largest difference.
        float32_parts: How much loss and gradients of the plain loop in float64 change where no part of the model is
            computed in float32; 0 if its code has no such parts, or can't compute in float64.
        seconds: Time of all runs.
    """

    family: str
    unbuildable: str | None = None
    runs: list[str] = field(default_factory=list)
    failures: dict[str, Failure] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)
    float32_parts: float = 0.0
    seconds: float = 0.0


SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


@lru_cache(maxsize=1)
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of whole words; documents are token ids, so that only its special tokens are used."""
    words = {word: index for index, word in enumerate([*SPECIAL_TOKENS.values(), "a", "b"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)


def special_tokens() -> dict[str, int]:
    """Return the ids of the tokenizer that every tiny model is trained with."""
    tokenizer = tiny_tokenizer()
    return {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}


def random_documents(sizes: Sizes, seed: int) -> list[dict[str, list[int]]]:
    """Return documents of different lengths, as rows with `input_ids` and `labels`.

    One is longer than the chunks of 64 tokens that recurrent layers compute. Two begin with the same tokens. Of most,
    only a part is trained.
    """
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(4, sizes.vocab - NUM_RESERVED, (count,), generator=generator).tolist()

    lengths = torch.randint(2, 24, (NUM_DOCUMENTS,), generator=generator).tolist()
    rows = [tokens(length) for length in lengths]
    begin = tokens(7)
    rows[1], rows[3] = begin + rows[1], begin + rows[3]
    rows[2] = tokens(67)
    labels = [list(row) for row in rows]
    labels[1][:7] = labels[3][:7] = [IGNORE_INDEX] * 7
    labels[2][-3:] = [IGNORE_INDEX] * 3
    return [{"input_ids": ids, "labels": targets} for ids, targets in zip(rows, labels, strict=True)]


Gradients = dict[str, torch.Tensor]


def plain_loop(model: Any, rows: list[dict[str, list[int]]]) -> tuple[float, Gradients]:
    """Compute loss and gradients, each document alone, without anything of this library."""
    return _plain(model, [[row] for row in rows])


def plain_padded(model: Any, rows: list[dict[str, list[int]]]) -> tuple[float, Gradients]:
    """Compute loss and gradients of one padded batch without anything of this library."""
    return _plain(model, [rows])


def _plain(model: Any, batches: list[list[dict[str, list[int]]]]) -> tuple[float, Gradients]:
    inner = causal_lm(model)
    count = sum(label != IGNORE_INDEX for rows in batches for row in rows for label in row["labels"][1:])
    total = 0.0
    model.train()
    model.zero_grad()
    for rows in batches:
        ids, labels = (
            pad_sequence([torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=padding)
            for name, padding in (("input_ids", special_tokens()["pad_token_id"]), ("labels", IGNORE_INDEX))
        )
        given = text_inputs(inner, ids)
        if len(rows) > 1:
            lengths = torch.tensor([len(row["input_ids"]) for row in rows])
            given["attention_mask"] = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        logits = model(**given).logits[:, :-1].flatten(0, 1)
        targets = labels[:, 1:].flatten()
        loss = F.cross_entropy(logits.double(), targets, ignore_index=IGNORE_INDEX, reduction="sum") / count
        loss.backward()
        total += loss.item()
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return total, found


class _KeepGradients(TrainerCallback):
    def __init__(self) -> None:
        self.found: Gradients = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.found = {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


def trained_step(trainer: SFTTrainer) -> tuple[float, Gradients]:
    """Train, and return loss and gradients of the last step."""
    gradients = _KeepGradients()
    trainer.add_callback(gradients)
    trainer.train()
    loss = next((line["loss"] for line in trainer.state.log_history if "loss" in line), math.nan)
    return loss, gradients.found


def make_trainer(model: Any, rows: list[dict[str, list[int]]], folder: Path, method: str, **options: Any) -> SFTTrainer:
    """Return a trainer of quiet options that reads all documents in each batch, with a LoRA adapter or without."""
    given = {
        "per_device_train_batch_size": len(rows),
        "max_steps": 1,
        "logging_steps": 1,
        "save_strategy": "no",
        "max_length": None,
        "max_grad_norm": 0.0,
        "dataloader_num_workers": 0,
        **options,
    }
    config = SFTConfig(output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, **given)
    adapter = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
        peft_config=adapter if method == "lora" else None,
    )
    if method == "lora":
        move_adapter(trainer.model)
    return trainer


def move_adapter(model: Any) -> None:
    """Move the weights of an adapter, which is a zero update at first, so that every one of them has a gradient."""
    generator = torch.Generator().manual_seed(2)
    for name, weight in model.named_parameters():
        if weight.requires_grad and "lora_" in name:
            weight.data.copy_(torch.randn(weight.shape, generator=generator) * 0.1)


def use_plain_attention(model: PreTrainedModel) -> None:
    """Set transformers' eager attention; in float64 its SDPA, since eager attention computes its softmax in float32."""
    precise = model.dtype is torch.float64 and model._supports_sdpa
    model.set_attn_implementation("sdpa" if precise else "eager")


def plain_copy(trainer: SFTTrainer, base: PreTrainedModel, method: str) -> Any:
    """Return what the trainer trains as a model without anything of this library, made of a fresh base."""
    use_plain_attention(base)
    if method == "full":
        return base
    config = copy.deepcopy(trainer.model.peft_config["default"])
    model = get_peft_model(base, config)
    trained = dict(trainer.model.named_parameters())
    for name, weight in model.named_parameters():
        weight.data.copy_(trained[name].data)
    return model


def largest_difference(found: tuple[float, Gradients], expected: tuple[float, Gradients]) -> tuple[float, str]:
    """Return the largest relative difference, and where it is."""
    loss = abs(found[0] - expected[0]) / max(abs(expected[0]), 1e-30)
    worst = (loss, "loss") if loss == loss else (float("inf"), "loss")
    scale = max((gradient.abs().max().item() for gradient in expected[1].values()), default=1.0)
    for name in sorted(found[1].keys() | expected[1].keys()):
        if name not in found[1] or name not in expected[1]:
            present = found[1].get(name, expected[1].get(name))
            assert present is not None
            difference = own = present.abs().max().item()
        else:
            difference = (found[1][name] - expected[1][name]).abs().max().item()
            own = expected[1][name].abs().max().item()
        relative = difference / max(own, FRACTION_OF_LARGEST * scale)
        if not relative <= worst[0]:
            worst = (relative if relative == relative else float("inf"), f"gradient of {name}")
    return worst


class FamilyChecks:
    """All checks of one family.

    Args:
        family: Name, see `benchmarks.tiny_families.families`.
        sizes: Of the model.
        seed: Of weights and documents.
        quick: Only `QUICK_RUNS`, and no saving.
    """

    def __init__(self, family: str, sizes: Sizes, seed: int, *, quick: bool = False) -> None:
        self.family, self.sizes, self.seed, self.quick = family, sizes, seed, quick
        self.rows = random_documents(sizes, seed)
        self.result = FamilyResult(family)
        self.with_gradient: set[str] = set()

    def model(self, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        """Return the family's tiny model, with the same weights each time."""
        return tiny_family(self.family, self.sizes, special_tokens(), self.seed, dtype)

    def run(self) -> FamilyResult:
        """Run everything; failures are part of the result."""
        self.run_plain()
        if self.result.unbuildable is not None:
            return self.result
        for layout, method, dtype in QUICK_RUNS if self.quick else RUNS:
            if dtype is torch.float64 and not self._has_float64:
                continue
            name = f"{layout} {method} {str(dtype).removeprefix('torch.')}"
            with self._noting(name):
                self._compare(name, layout, method, dtype)
        passed = [layout for layout in LAYOUTS if f"{layout} lora float32" not in self.result.failures]
        if passed and not self.quick:
            for method in METHODS:
                with self._noting(f"resume {method}"):
                    self._save_and_resume(method, passed[0])
        return self.result

    def run_plain(self) -> FamilyResult:
        """Run the plain loop; what is wrong with it is the reason why the family is not buildable."""
        try:
            if self.family in UNBUILDABLE:
                raise ValueError(UNBUILDABLE[self.family])
            model = self.model()
            use_plain_attention(model)
            loss, gradients = plain_loop(model, self.rows)
            broken = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
            if not math.isfinite(loss) or broken:
                self.result.unbuildable = f"its own loss or gradients are not finite: {loss}, {broken[:2]}"
            elif not gradients:
                self.result.unbuildable = "its own code has no gradients"
            self.with_gradient = set(gradients)
        except Exception as error:
            self.result.unbuildable = Failure.of(error).reason
        return self.result

    @cached_property
    def _has_float64(self) -> bool:
        """Return whether the family's own code can compute in float64; measure what its parts in float32 change."""
        model = self.model(torch.float64)
        use_plain_attention(model)
        try:
            expected = plain_loop(model, self.rows)
        except (RuntimeError, NotImplementedError):
            return False
        try:
            self.result.float32_parts = largest_difference(self._without_float32, expected)[0]
        except Exception:  # code of a model that relies on float32 may fail in any way: then nothing is put down to it
            self.result.float32_parts = 0.0
        return True

    @cached_property
    def _without_float32(self) -> tuple[float, Gradients]:
        """The plain loop in float64, where no part of the model is computed in float32."""
        model = self.model(torch.float64)
        use_plain_attention(model)
        with no_float32():
            return plain_loop(model, self.rows)

    @contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        self.result.runs.append(name)
        try:
            yield
        except Exception as error:
            self.result.failures[name] = Failure.of(error)

    def trainer(self, folder: Path, layout: str, method: str, dtype: torch.dtype) -> SFTTrainer:
        """Return the trainer whose step is compared; it changes no weights."""
        options = {"learning_rate": 0.0, "weight_decay": 0.0, **LAYOUTS.get(layout, {})}
        if dtype is torch.float64:
            # gradients of a shared beginning are added up before norms round them to float32, as most do
            options["share_tokens"] = False
        return make_trainer(self.model(dtype), self.rows, folder, method, **options)

    def _compare(self, name: str, layout: str, method: str, dtype: torch.dtype) -> None:
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(Path(folder), layout, method, dtype)
            reference = plain_copy(trainer, self.model(dtype), method)
            expected = plain_loop(reference, self.rows)
            if method == "lora":
                self._check_adapted(reference, expected[1])
            found = trained_step(trainer)
        if layout == "padded" and not math.isfinite(self._own_padding(reference, expected)):
            return  # a padded batch of transformers is not finite either
        difference, place = largest_difference(found, expected)
        self.result.worst[name] = difference
        if difference <= LIMITS[dtype]:
            return
        own = self.result.float32_parts if dtype is torch.float64 else self._own_rounding(reference, expected)
        if difference > min(FACTORS[dtype] * own, LARGEST_LIMITS[dtype]):
            raise Differs(f"{place} differs by {difference:.1e} from that of single documents")
        if dtype is torch.float64:
            self._compare_without_float32(layout)

    def _compare_without_float32(self, layout: str) -> None:
        """Compare a step in float64 with the plain loop where no part of the model is computed in float32."""
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.trainer(Path(folder), layout, "full", torch.float64)
            with no_float32():
                found = trained_step(trainer)
        difference, place = largest_difference(found, self._without_float32)
        if not difference <= LIMITS[torch.float64]:
            raise Differs(
                f"{place} differs by {difference:.1e} from that of single documents where the model's parts in float32 "
                "are computed in float64"
            )

    def _check_adapted(self, model: Any, gradients: Gradients) -> None:
        """Check that an adapter has a gradient wherever the weight that it is for has one in full training."""
        trained = {name.split(".lora_")[0] for name in gradients if ".lora_" in name}
        adapted = {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
        for name in sorted(self.with_gradient):
            if f"base_model.model.{name.removesuffix('.weight')}" in adapted - trained:
                raise Differs(f"the adapter of {name} has no gradient, and the weight itself has one")

    def _own_padding(self, model: Any, expected: tuple[float, Gradients]) -> float:
        """Return the difference between one padded batch of transformers and single documents."""
        return largest_difference(plain_padded(model, self.rows), expected)[0]

    def _own_rounding(self, model: Any, expected: tuple[float, Gradients]) -> float:
        """Return the difference that the plain loop has in float32 with weights moved by rounding errors."""
        generator = torch.Generator().manual_seed(self.seed)
        for weight in model.parameters():
            weight.data.mul_(1 + ROUNDING * torch.randn(weight.shape, generator=generator))
        return largest_difference(plain_loop(model, self.rows), expected)[0]

    def _save_and_resume(self, method: str, layout: str) -> None:
        """Compare a training that was resumed with one that was not, and what was written with what was trained."""
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            options = {"max_steps": 2, "save_steps": 1, "save_strategy": "steps", "learning_rate": 1e-3}
            options |= {"per_device_train_batch_size": 3, **LAYOUTS[layout]}
            whole = make_trainer(self.model(), self.rows, folder / "whole", method, **options)
            whole.train()
            resumed = make_trainer(self.model(), self.rows, folder / "resumed", method, **options)
            resumed.train(resume_from_checkpoint=str(folder / "whole" / "checkpoint-1"))
            theirs = dict(whole.model.named_parameters())
            for weight_name, weight in resumed.model.named_parameters():
                if not torch.equal(weight, theirs[weight_name]):
                    difference = (weight - theirs[weight_name]).abs().max()
                    raise Differs(f"{weight_name} differs by {difference:.1e} after a resume")
            self._compare_written(whole.model, folder, method)

    def _compare_written(self, trained: Any, folder: Path, method: str) -> None:
        ids = [row["input_ids"] for row in self.rows[:2]]
        written = folder / "whole" / "checkpoint-2"
        if method == "lora":
            self.model().save_pretrained(folder / "base")
            merge_adapter(folder / "base", written, folder / "merged", ids, tokenizer=tiny_tokenizer())
            written = folder / "merged"
        loaded = load_model(written)
        for each in (loaded, causal_lm(trained)):
            use_plain_attention(each)
        for row in ids:
            expected, found = logits(trained, row), logits(loaded, row)
            difference = ((expected - found).abs().max() / expected.abs().max()).item()
            if not difference <= 10 * LIMITS[torch.float32]:
                raise Differs(
                    f"logits of the {'merged' if method == 'lora' else 'saved'} model differ by {difference:.1e}"
                )


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    """Return the logits `(length, vocab)` of one document in evaluation mode."""
    return model.eval()(**text_inputs(causal_lm(model), torch.tensor([ids]))).logits[0].float()


def text_inputs(model: PreTrainedModel, ids: torch.Tensor) -> dict[str, Any]:
    """Return the arguments of a model's forward for token ids `(batch, length)` of texts, without a cache."""
    types = TOKEN_TYPES.get(model.config.model_type, {})
    cache = {"use_cache": False} if "use_cache" in signature(model.forward).parameters else {}
    return {"input_ids": ids, **{name: torch.full_like(ids, value) for name, value in types.items()}, **cache}
