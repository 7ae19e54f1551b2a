"""Bad updates never change the weights: training stops, skips them, or goes back to a checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback

from sft.config import SFTConfig
from sft.train.bad_updates import BAD_UPDATE, MAX_IN_A_ROW, NUM_NEEDED, LossWatch
from sft.train.trainer import SFTTrainer
from tests.sft.test_processes import free_port
from tests.tiny import tiny_model, tiny_tokenizer

ROWS = [{"prompt": f"What is {number}?", "completion": f" It is {number}."} for number in range(40)]
NAN = float("nan")


class Poisoned(SFTTrainer):
    """Real training, with the losses of some updates multiplied by a factor."""

    poison: dict[int, float]
    weights: dict[int, torch.Tensor]

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs) * self.poison.get(self.state.global_step + 1, 1.0)


def train(folder: Path, poison: dict[int, float], kind: type[Poisoned] = Poisoned, **options: Any) -> Poisoned:
    config = SFTConfig(
        output_dir=str(folder),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"max_steps": 8, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "max_length": 32, **options},
    )
    trainer = kind(tiny_model(), args=config, train_dataset=Dataset.from_list(ROWS), processing_class=tiny_tokenizer())
    trainer.poison = poison
    trainer.weights = {}
    trainer.add_callback(KeepWeights(trainer.weights))
    trainer.train()
    return trainer


class KeepWeights(TrainerCallback):
    """Copies of all weights after each update."""

    def __init__(self, weights: dict[int, torch.Tensor]) -> None:
        self.weights = weights

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any, **kwargs: Any) -> None:
        self.weights[state.global_step] = torch.cat([value.detach().flatten() for value in model.parameters()])


def test_one_bad_part_makes_an_accumulated_update_bad(tmp_path: Path) -> None:
    class OnePart(Poisoned):
        """Only the second of five parts is not a number."""

        parts = 0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            self.parts += 1
            return super().training_step(*args, **kwargs)

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = SFTTrainer.compute_loss(self, *args, **kwargs)
            return loss * (NAN if self.parts == 5 * 3 + 2 else 1.0)

    trainer = train(tmp_path, {}, OnePart, on_bad_loss="skip", gradient_accumulation_steps=5)
    assert actions(trainer) == [(4, "skipped")]
    torch.testing.assert_close(trainer.weights[4], trainer.weights[3], rtol=0, atol=0)
    assert trainer.weights[8].isfinite().all()
    assert not torch.equal(trainer.weights[5], trainer.weights[4])


def actions(trainer: Poisoned) -> list[tuple[int, str]]:
    return [(entry["step"], entry["action"]) for entry in trainer.state.log_history if BAD_UPDATE in entry]


def losses(trainer: Poisoned) -> dict[int, float]:
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def test_without_a_policy_a_broken_update_reaches_the_weights(tmp_path: Path) -> None:
    trainer = train(tmp_path, {4: NAN})
    assert trainer.weights[4].isnan().any()


def test_without_a_policy_one_warning_names_the_first_broken_update(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(tmp_path, poison={3: NAN})
    (warning,) = [record.getMessage() for record in caplog.records if "norm of the gradient" in record.getMessage()]
    assert warning.startswith("step 3: the norm of the gradient is nan, and on_bad_loss=None applies every update")


def test_stopping_names_the_step_and_leaves_the_weights_alone(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"step 4: the norm of the gradient is nan; training stopped before this update"
    ):
        train(tmp_path, {4: NAN}, on_bad_loss="stop")
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2"]


def test_a_skipped_update_changes_nothing_and_is_in_the_log(tmp_path: Path) -> None:
    trainer = train(tmp_path, {4: NAN}, on_bad_loss="skip")
    assert actions(trainer) == [(4, "skipped")]
    torch.testing.assert_close(trainer.weights[4], trainer.weights[3], rtol=0, atol=0)
    assert not torch.equal(trainer.weights[5], trainer.weights[4])
    assert sorted(losses(trainer)) == [1, 2, 3, 5, 6, 7, 8]
    assert trainer.weights[8].isfinite().all()


def test_a_rolled_back_training_goes_on_from_the_last_checkpoint_with_the_next_rows(tmp_path: Path) -> None:
    trainer = train(tmp_path, {4: NAN}, on_bad_loss="rollback")
    assert actions(trainer) == [(4, "went back to checkpoint-2")]
    torch.testing.assert_close(trainer.weights[4], trainer.weights[2], rtol=0, atol=0)
    assert not torch.equal(trainer.weights[5], trainer.weights[4])
    rates = {entry["step"]: entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry}
    untroubled = train(tmp_path / "other", {})
    assert rates[8] == pytest.approx(untroubled.state.log_history[-2]["learning_rate"])


def test_going_back_needs_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no checkpoint yet"):
        train(tmp_path, {1: NAN}, on_bad_loss="rollback")


def test_updates_that_are_bad_again_and_again_end_the_training(tmp_path: Path) -> None:
    poison = dict.fromkeys(range(3, 30), NAN)
    with pytest.raises(ValueError, match=rf"step {3 + MAX_IN_A_ROW}: .* in the {MAX_IN_A_ROW} updates before"):
        train(tmp_path, poison, on_bad_loss="skip", max_steps=30)


def test_a_spike_is_bad_when_a_factor_is_set(tmp_path: Path) -> None:
    options = {"max_steps": NUM_NEEDED + 4, "save_steps": 1000, "per_device_train_batch_size": 2}
    step = NUM_NEEDED + 2
    trainer = train(tmp_path, {step: 100.0}, on_bad_loss="skip", bad_loss_factor=10.0, **options)
    assert actions(trainer) == [(step, "skipped")]
    assert actions(train(tmp_path, {step: 100.0}, on_bad_loss="skip", **options)) == []


def test_too_few_losses_make_no_spike() -> None:
    watch = LossWatch("skip", 2.0, recent=[1.0] * (NUM_NEEDED - 1))
    watch.add(torch.tensor(100.0))
    assert watch.problem(1.0, lambda tensor: tensor) is None
    watch = LossWatch("skip", 2.0, recent=[1.0] * NUM_NEEDED)
    watch.add(torch.tensor(100.0))
    assert "100" in str(watch.problem(1.0, lambda tensor: tensor))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "bad"),
    [("stop", []), ("skip", [[4, "skipped"]]), ("rollback", [[4, "went back to checkpoint-2"]])],
)
def test_all_processes_follow_the_policy_when_one_has_a_bad_part(
    tmp_path: Path, policy: str, bad: list[list[Any]]
) -> None:
    module = ["tests.sft.poisoned_training", str(tmp_path), policy]
    launcher = ["torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}", "-m"]
    result = subprocess.run(
        [sys.executable, "-m", *launcher, *module],
        cwd=Path(__file__).resolve().parents[3],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    ends = [json.loads((tmp_path / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    assert ends[0] == ends[1]
    assert ends[0]["finite"]
    assert ends[0]["bad"] == bad
    if policy == "stop":
        assert "step 4: the norm of the gradient is nan; training stopped" in ends[0]["error"]
        assert ends[0]["step"] == 3
    else:
        assert ends[0]["error"] is None
        assert ends[0]["losses"] == [1, 2, 3, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"on_bad_loss": "ignore"}, "use one of stop, skip, rollback"),
        ({"bad_loss_factor": 5.0}, "would be ignored without on_bad_loss"),
        ({"on_bad_loss": "skip", "bad_loss_factor": 1.0}, "give more than 1"),
    ],
)
def test_policies_that_can_not_be_followed_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SFTConfig(output_dir=str(tmp_path), use_cpu=True, **options)
