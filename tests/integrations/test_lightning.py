"""The callback for Lightning, with the real trainer."""

from __future__ import annotations

import copy
import csv
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gradflow as gf
from tests.integrations.trainings import batches, bits, network

pytest.importorskip("lightning")
import lightning.pytorch as pl
import torchmetrics
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from gradflow.integrations.lightning import GradflowCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:GPU available but not used"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]


MODES: list[torch.dtype] = []  # of the outputs, in all runs of a training step


class Classifier(pl.LightningModule):
    """Counts, keeps a metric and a list, and logs: all that a second run of its step must not change."""

    def __init__(self, *, dead: bool = False) -> None:
        super().__init__()
        self.net = network(dead=dead)
        self.accuracy = torchmetrics.MeanMetric()
        self.inner = Inner()
        self.calls, self.seen, self.factor = 0, [], 1.0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        output = self.net(x)
        loss = self.factor * F.cross_entropy(output, y)
        MODES.append(output.dtype)
        self.accuracy((output.argmax(1) == y).float())
        self.inner(loss)
        self.calls += 1
        self.seen.append(batch_idx)
        self.log("loss", loss, on_step=True)
        self.log("accuracy", self.accuracy, on_step=False, on_epoch=True)
        if self.logger is not None:
            self.logger.log_metrics({"by_hand": float(loss.detach())}, step=batch_idx)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


class Inner(pl.LightningModule):
    """A module of Lightning's within another."""

    def forward(self, loss: Tensor) -> None:
        if self.logger is not None:
            self.logger.log_metrics({"inner": float(loss.detach())}, step=self.trainer.global_step)


class Gan(pl.LightningModule):
    """Two optimizers; the discriminator steps in every batch, the generator in every second one."""

    def __init__(self, *, toggle: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        self.discriminator = nn.Sequential(nn.Linear(4, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
        self.toggle = toggle

    def losses(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        real, fake = self.discriminator(x), self.discriminator(self.generator(z).detach())
        ones, zeros = torch.ones_like(real), torch.zeros_like(real)
        wrong = F.binary_cross_entropy_with_logits
        return wrong(real, ones) + wrong(fake, zeros), wrong(self.discriminator(self.generator(z)), ones)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, _ = batch
        z = torch.randn(len(x), 3)
        by_d, by_g = self.optimizers()
        (schedule,) = [self.lr_schedulers()]
        if self.toggle:
            self.toggle_optimizer(by_d)
        by_d.zero_grad()
        self.manual_backward(self.losses(x, z)[0])
        by_d.step()
        if self.toggle:
            self.untoggle_optimizer(by_d)
        if batch_idx % 2 == 0:
            if self.toggle:
                self.toggle_optimizer(by_g)
            loss = self.losses(x, z)[1]
            by_g.zero_grad()
            self.manual_backward(loss)
            self.clip_gradients(by_g, gradient_clip_val=1.0, gradient_clip_algorithm="norm")
            by_g.step()
            if self.toggle:
                self.untoggle_optimizer(by_g)
            self.log("g", loss)
        schedule.step()

    def configure_optimizers(self) -> Any:
        by_d = torch.optim.Adam(self.discriminator.parameters(), lr=1e-2)
        by_g = torch.optim.Adam(self.generator.parameters(), lr=1e-2)
        return [by_d, by_g], [torch.optim.lr_scheduler.StepLR(by_d, 10)]


def fit(
    module: Any, folder: Path, *callbacks: Any, steps: int = 60, library: Any = pl, **options: Any
) -> Any:
    """Run a training of as many batches as there are steps in one epoch, and return the trainer."""
    resumed = options.pop("ckpt_path", None)
    options = {"logger": False, "enable_checkpointing": False, **options}
    trainer = library.Trainer(
        accelerator="cpu", max_epochs=1, default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, callbacks=[*callbacks], **options,
    )  # fmt: skip
    torch.manual_seed(3)
    loader = DataLoader(batches(steps), batch_size=None)
    trainer.fit(module, loader, ckpt_path=resumed)
    return trainer


def rows(folder: Path) -> list[dict[str, str]]:
    (path,) = folder.rglob("metrics.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ------------------------------------------------------------------------------- automatic optimisation


def test_a_training_is_the_same_and_logs_the_same(tmp_path: Path) -> None:
    plain, watched = Classifier(), Classifier()
    callback = GradflowCallback(every=20)
    fit(plain, tmp_path / "plain", logger=CSVLogger(tmp_path / "plain"))
    plain_bits = bits(plain)
    fit(watched, tmp_path / "watched", callback, logger=CSVLogger(tmp_path / "watched"))
    assert bits(watched) == plain_bits
    assert watched.calls == plain.calls == 60
    assert watched.seen == plain.seen
    assert rows(tmp_path / "watched") == rows(tmp_path / "plain")
    assert callback.history.steps.tolist() == [0, 1, 4, 16, 20, 40]
    assert callback.history.notes == ()
    assert type(watched) is Classifier
    assert watched.inner.trainer is watched.trainer


def test_what_is_measured_is_the_training_steps_loss(tmp_path: Path) -> None:
    """At the weights after the update, in the module's mode, with the present value of an attribute."""
    module, found = Classifier(), []
    module.net[3] = nn.Identity()  # no dropout: the loss can be computed again

    class Checked(GradflowCallback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *rest: Any) -> None:
            (x, y), pl_module.factor = rest[1], 2.0
            super().on_train_batch_end(trainer, pl_module, *rest)
            twin = copy.deepcopy(pl_module.net)
            found.append(2.0 * float(F.cross_entropy(twin(x), y).detach()))

    callback = Checked(every=20)
    fit(module, tmp_path, callback, steps=21)
    expected = [found[step] for step in callback.history.steps]
    assert callback.history["loss"].tolist() == pytest.approx(expected, rel=1e-6)


def test_loggers_get_the_scalars_where_asked(tmp_path: Path) -> None:
    callback = GradflowCallback(every=20, log="few")
    fit(Classifier(), tmp_path, callback, logger=CSVLogger(tmp_path))
    told = {int(r["step"]): float(r["gradflow/loss"]) for r in rows(tmp_path) if r.get("gradflow/loss")}
    assert list(told) == callback.history.steps.tolist()
    assert list(told.values()) == pytest.approx(callback.history["loss"].tolist())


def test_trouble_is_told(tmp_path: Path) -> None:
    callback, told = GradflowCallback(every=20), []
    callback.on_issue(lambda issue, step: told.append((issue.issue_type.value, step)), severity="HIGH")
    fit(Classifier(dead=True), tmp_path, callback)
    assert ("DEAD", 3) in told
    assert callback.report is not None
    assert not callback.report.ok
    assert any(issue.layer.startswith("net.") for issue in callback.report.issues)


def test_accumulation_counts_updates_and_clips_and_halves_precision(tmp_path: Path) -> None:
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5, "precision": "bf16-mixed"}
    MODES.clear()
    plain, watched, callback = Classifier(), Classifier(), GradflowCallback(every=8)
    fit(plain, tmp_path, **options)
    plain_bits = bits(plain)
    fit(watched, tmp_path, callback, **options)
    assert bits(watched) == plain_bits
    assert callback.history.steps.tolist() == [0, 1, 4, 8, 16]  # of 20 updates
    assert callback.history.notes == ()
    assert len(MODES) > 120
    assert set(MODES) == {torch.bfloat16}


def test_skipped_batches_are_not_looked_at(tmp_path: Path) -> None:
    class Skipping(Classifier):
        def training_step(self, batch: Any) -> Any:  # type: ignore[override]
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            return {"loss": loss} if batch[0].sum() > 0 else None

    callback = GradflowCallback(every=10)
    with pytest.warns(UserWarning, match="`training_step` returned `None`"):
        fit(Skipping(), tmp_path, callback)
    number = sum(float(x.sum()) > 0 for x, _ in batches(60))
    assert callback.history.steps.tolist() == [s for s in (0, 1, 4, 10, 20, 30, 40) if s < number]
    assert callback.history.notes == ()


def test_a_checkpoint_resumes_the_history(tmp_path: Path) -> None:
    def saved() -> ModelCheckpoint:
        return ModelCheckpoint(dirpath=tmp_path, every_n_train_steps=30, save_top_k=-1, filename="at")

    first = GradflowCallback(every=20)
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=30, logger=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[first, saved()],
    )  # fmt: skip
    trainer.fit(Classifier(), DataLoader(batches(60), batch_size=None))
    second = GradflowCallback(every=20)
    fit(Classifier(), tmp_path, second, saved(), enable_checkpointing=True, ckpt_path=tmp_path / "at.ckpt")
    assert second.history.steps.tolist()[:5] == first.history.steps.tolist() == [0, 1, 4, 16, 20]
    assert second.history.steps.tolist()[5:] == [30, 40]
    assert second.history["loss"][:5].tolist() == first.history["loss"].tolist()


def test_a_file_resumes_the_history(tmp_path: Path) -> None:
    path = tmp_path / "history.jsonl"
    fit(Classifier(), tmp_path, GradflowCallback(every=20, path=path), steps=30)
    fit(Classifier(), tmp_path, GradflowCallback(every=20, path=path), steps=30)
    assert gf.read_history(path).steps.tolist() == [0, 1, 4, 16, 20, 21, 40]  # 20 is the last known


def test_the_older_package_will_do(tmp_path: Path) -> None:
    """Lightning has two names, whose classes are not the same."""
    older = pytest.importorskip("pytorch_lightning")

    class Older(older.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    callback = GradflowCallback(every=20)
    fit(Older(), tmp_path, callback, library=older)
    assert callback.history.steps.tolist() == [0, 1, 4, 16, 20, 40]
    assert callback.history.notes == ()


# ---------------------------------------------------------------------------------- manual optimisation


@pytest.mark.parametrize("toggle", [True, False])
def test_two_optimizers(tmp_path: Path, toggle: bool) -> None:
    plain, watched = Gan(toggle=toggle), Gan(toggle=toggle)
    callback = GradflowCallback(every=10, path=tmp_path / "gan.jsonl")
    fit(plain, tmp_path / "plain", logger=CSVLogger(tmp_path / "plain"))
    plain_bits = bits(plain)
    trainer = fit(watched, tmp_path / "watched", callback, logger=CSVLogger(tmp_path / "watched"))
    assert bits(watched) == plain_bits
    assert rows(tmp_path / "watched") == rows(tmp_path / "plain")
    assert all(p.requires_grad for p in watched.parameters())
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 0.1**6)
    assert list(callback.monitors) == ["optimizer-0", "optimizer-1"]
    by_d, by_g = (monitor.history for monitor in callback.monitors.values())
    assert by_d.steps.tolist() == [0, 1, 4, 10, 20, 30, 40, 50]
    assert by_g.steps.tolist() == [0, 1, 4, 10, 20]  # of 30 updates
    assert by_d.notes == by_g.notes == ()
    for history, own, other in ((by_d, "discriminator", "generator"), (by_g, "generator", "discriminator")):
        assert history[f"weight_gradient_rms/{own}.0.weight"].min() > 0
        assert f"update_ratio/{other}.0.weight" not in history
    assert gf.read_history(tmp_path / "gan-optimizer-1.jsonl").steps.tolist() == by_g.steps.tolist()


def test_the_loss_of_each_optimizer_is_its_own(tmp_path: Path) -> None:
    module, found = Gan(toggle=False), []

    class Loss(GradflowCallback):
        def on_train_batch_end(
            self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            state = torch.get_rng_state()
            losses = pl_module.losses(batch[0], torch.randn(len(batch[0]), 3))
            found.append([float(loss.detach()) for loss in losses])
            torch.set_rng_state(state)

    callback = Loss(every=10)
    fit(module, tmp_path, callback, steps=3)
    by_d, by_g = (monitor.history["loss"] for monitor in callback.monitors.values())
    assert by_d.tolist() == pytest.approx([found[0][0], found[1][0]], rel=1e-6)
    assert by_g.tolist() == pytest.approx([found[0][1], found[2][1]], rel=1e-6)


@pytest.mark.parametrize("late", [False, True])
def test_one_optimizer_with_a_closure_and_several_backward_passes(tmp_path: Path, late: bool) -> None:
    """The loss is what was passed backward since `zero_grad`, which may come after the step as well."""

    class Manual(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.automatic_optimization, self.net = False, nn.Linear(4, 3)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer: Any = self.optimizers()

            def closure() -> None:
                if not late:
                    optimizer.zero_grad()
                for part in (slice(0, 8), slice(8, 16)):
                    self.manual_backward(F.cross_entropy(self.net(batch[0][part]), batch[1][part]) / 2)

            optimizer.step(closure)
            if late:
                optimizer.zero_grad()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module, callback = Manual(), GradflowCallback(every=20)
    fit(module, tmp_path, callback, steps=21)
    expected = [float(F.cross_entropy(module.net(x), y).detach()) for x, y in batches(21)]
    assert callback.history["loss"].tolist() == pytest.approx(
        [expected[s] for s in (0, 1, 4, 16, 20)], rel=1e-5
    )


def test_a_backward_pass_past_lightning_is_told(tmp_path: Path) -> None:
    class Past(Gan):
        def manual_backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
            loss.backward()

        def training_step(self, batch: Any, batch_idx: int) -> None:
            by_d, _ = self.optimizers()
            by_d.zero_grad()
            self.losses(batch[0], torch.randn(16, 3))[0].backward()
            by_d.step()

    with pytest.raises(gf.errors.LossError, match=r"took no step of optimizer 0 by a loss that was passed"):
        fit(Past(), tmp_path, GradflowCallback(every=20))


# ------------------------------------------------------------------------------------------- not there


def test_without_lightning_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("gradflow.integrations.lightning")
    for name in ("lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'gradient-flow\[lightning\]'"):
        module._library()


def test_other_scalars_are_refused() -> None:
    with pytest.raises(ValueError, match="which must be few or all, got 'some'"):
        GradflowCallback(log="some")  # type: ignore[arg-type]
