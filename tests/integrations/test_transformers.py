"""The callback for the `Trainer` of Hugging Face, with the real one and a small model."""

from __future__ import annotations

import collections
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gradflow as gf
from tests.integrations.trainings import bits, network

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from gradflow.integrations.transformers import GradflowCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found"),
]


def language_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=16, attention_dropout=0.1,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def texts(number: int) -> list[dict[str, Tensor]]:
    """Return texts that count up, of which the last is shorter than the others."""
    found = []
    for start in range(number):
        ids = (torch.arange(8) + 3 * start) % 32
        labels = ids.clone()
        labels[: start % 5] = -100
        found.append({"input_ids": ids, "labels": labels})
    return found


class Plain(nn.Module):
    """A classifier that has no loss of its own."""

    def __init__(self, *, dead: bool = False) -> None:
        super().__init__()
        self.net = network(dead=dead)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x)}


def points(number: int) -> list[dict[str, Tensor]]:
    drawn = torch.randn(number, 4, generator=torch.Generator().manual_seed(1))
    return [{"x": x, "labels": x[:3].argmax()} for x in drawn]


def cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return F.cross_entropy(outputs["logits"], labels)


class Counting(Trainer):
    """Counts and logs where its loss is computed, as the trainers of TRL do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls = 0
        self.kept: dict[str, Any] = {"train": collections.defaultdict(list)}

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.calls += 1
        value = loss[0] if isinstance(loss, tuple) else loss
        self.kept["train"]["loss"].append(float(value.detach()))
        self.log({"by_hand": float(value.detach())})
        return loss


def trainer_of(model: nn.Module, data: Any, folder: Path, *, kind: Any = Trainer, **options: Any) -> Any:
    func = options.pop("compute_loss_func", None)
    given = {
        "max_steps": 60,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        **options,
    }
    args = TrainingArguments(
        output_dir=str(folder), report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
        dataloader_pin_memory=False, remove_unused_columns=False, **given,
    )  # fmt: skip
    return kind(model, args, train_dataset=data, compute_loss_func=func)


def logs(trainer: Any) -> list[dict[str, Any]]:
    """Return what was logged, without what tells of time."""
    timed = ("runtime", "per_second", "total_flos")
    return [
        {k: v for k, v in row.items() if not any(t in k for t in timed)} for row in trainer.state.log_history
    ]


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 3},
    "half": {"bf16": True},
    "smoothed": {"label_smoothing_factor": 0.1},
}


@pytest.mark.parametrize("case", CASES)
def test_a_training_is_the_same_and_logs_the_same(case: str, tmp_path: Path) -> None:
    plain = trainer_of(language_model(), texts(40), tmp_path, kind=Counting, **CASES[case])
    plain.train()
    plain_bits = bits(plain.model)
    watched = trainer_of(language_model(), texts(40), tmp_path, kind=Counting, **CASES[case])
    callback = GradflowCallback(watched, every=20)
    watched.add_callback(callback)
    watched.train()
    assert bits(watched.model) == plain_bits
    assert logs(watched) == logs(plain)
    assert (watched.calls, watched.kept) == (plain.calls, plain.kept)
    assert callback.history.steps.tolist() == [1, 4, 16, 20, 40, 60]
    assert callback.history.notes == ()
    assert "compute_loss" not in vars(watched)


@pytest.mark.parametrize("case", CASES)
def test_what_is_measured_is_the_trainers_loss(case: str, tmp_path: Path) -> None:
    """Before the update, that is with a rate of zero, and without dropout, it is what the trainer saw."""
    model = language_model()
    model.config._attn_implementation = "eager"
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    options = {"learning_rate": 0.0, "max_steps": 20, "weight_decay": 0.0, **CASES[case]}
    trainer = trainer_of(model, texts(48), tmp_path, kind=Counting, **options)
    callback = GradflowCallback(trainer, every=20)
    trainer.add_callback(callback)
    trainer.train()
    parts = CASES[case].get("gradient_accumulation_steps", 1)
    seen = trainer.kept["train"]["loss"][parts - 1 :: parts]
    expected = [parts * seen[step - 1] for step in callback.history.steps]
    assert callback.history["loss"].tolist() == pytest.approx(expected, rel=1e-5)


def test_a_loss_of_the_users_own(tmp_path: Path) -> None:
    plain = trainer_of(Plain(), points(64), tmp_path, compute_loss_func=cross_entropy)
    plain.train()
    trainer = trainer_of(Plain(), points(64), tmp_path, compute_loss_func=cross_entropy)
    callback = GradflowCallback(trainer, every=20, log="few")
    trainer.add_callback(callback)
    trainer.train()
    assert bits(trainer.model) == bits(plain.model)
    told = [row for row in trainer.state.log_history if "gradflow/loss" in row]
    assert [row["step"] for row in told] == callback.history.steps.tolist() == [1, 4, 16, 20, 40, 60]
    assert [row["gradflow/loss"] for row in told] == callback.history["loss"].tolist()


def test_trouble_is_told(tmp_path: Path) -> None:
    trainer = trainer_of(Plain(dead=True), points(64), tmp_path, compute_loss_func=cross_entropy)
    callback, told = GradflowCallback(trainer, every=20), []
    callback.on_issue(lambda issue, step: told.append((issue.issue_type.value, step)))
    trainer.add_callback(callback)
    trainer.train()
    assert ("DEAD", 4) in told
    assert callback.report is not None
    assert any(issue.layer.startswith("net.") for issue in callback.report.issues)


def test_a_training_with_evaluation_that_is_resumed(tmp_path: Path) -> None:
    """Evaluation calls `compute_loss` as well; a checkpoint of step 20 is taken up after step 30."""
    path = tmp_path / "history.jsonl"
    options = {"save_strategy": "steps", "save_steps": 20, "eval_strategy": "steps", "eval_steps": 5}

    def made(steps: int) -> Any:
        args = TrainingArguments(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, disable_tqdm=True, max_steps=steps,
            per_device_train_batch_size=4, dataloader_pin_memory=False, **options,
        )  # fmt: skip
        trainer = Counting(language_model(), args, train_dataset=texts(40), eval_dataset=texts(4))
        trainer.add_callback(GradflowCallback(trainer, every=10, path=path))
        return trainer

    made(30).train()
    assert gf.read_history(path).steps.tolist() == [1, 4, 10, 20, 30]
    made(50).train(resume_from_checkpoint=str(tmp_path / "checkpoint-20"))
    history = gf.read_history(path)
    assert history.steps.tolist() == [1, 4, 10, 20, 30, 31, 40, 50]
    assert history.notes == ()


def test_a_training_that_raises_may_be_begun_again(tmp_path: Path) -> None:
    class Ends(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise KeyboardInterrupt

    trainer = trainer_of(Plain(), points(64), tmp_path, compute_loss_func=cross_entropy, max_steps=20)
    callback, ends = GradflowCallback(trainer, every=20), Ends()
    trainer.compute_loss = trainer.compute_loss  # of the user's own, which comes back
    own = trainer.compute_loss
    trainer.add_callback(callback)
    trainer.add_callback(ends)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    trainer.remove_callback(ends)
    trainer.train()
    assert vars(trainer)["compute_loss"] is own
    assert callback.history.steps.tolist() == [1, 4, 16, 20]


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "gradflow.integrations.transformers")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'gradient-flow\[transformers\]'"):
        importlib.import_module("gradflow.integrations.transformers")
