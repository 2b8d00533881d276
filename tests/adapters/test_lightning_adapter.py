from __future__ import annotations

import copy
import logging
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("lightning")

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from tutelage import KD, Distillation, Loss, Ramp, TaskLoss
from tutelage.adapters.lightning import DistillationModule, student_weights
from tutelage.beside import SideLearner
from tutelage.connectors import projector
from tutelage.views import UNLABELLED

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9)


def mlp(width: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, 3))


class Hint(Loss):
    def build(self, student, teacher, batch):
        ((s, t),) = self.tensors(student, teacher)
        self.map = projector(s.shape, t.shape)

    def forward(self, student, teacher, batch):
        ((s, t),) = self.tensors(student, teacher)
        return F.mse_loss(self.map(s), t)


class Critic(Loss):
    def build(self, student, teacher, batch):
        self.critic = SideLearner(nn.Linear(3, 1), partial(torch.optim.Adam, lr=0.01))

    def forward(self, student, teacher, batch):
        if self.training:
            self.critic.update((self.critic(student.logits.detach()) - self.critic(teacher.logits)).mean())
        return -self.critic(student.logits).mean()


def data(count: int, seed: int = 0) -> TensorDataset:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(x, x[:, :3].argmax(1))


def loader(count: int = 256, seed: int = 0, **named) -> DataLoader:
    return DataLoader(data(count, seed), batch_size=32, **named)


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    model = mlp(32, seed=1)
    x, y = data(512, seed=7).tensors
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


class Log(Callback):
    """Every value that was logged, step by step."""

    def __init__(self):
        self.lines: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer, *_):
        self.lines.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def runner(folder, *callbacks: Callback, epochs: int = 3, **named) -> Trainer:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    checkpointing = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    return Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        callbacks=list(callbacks),
        enable_checkpointing=checkpointing,
        **{**quiet, **named},
    )


def test_a_real_training(teacher, tmp_path):
    before = copy.deepcopy(teacher.state_dict())
    losses = [TaskLoss(weight=0.5), KD(temperature=2.0, weight=Ramp(1.0, 0.5)), Hint("0", weight=0.1)]
    d = Distillation(mlp(8), teacher, losses)
    module = DistillationModule(d, SGD, lambda o: torch.optim.lr_scheduler.StepLR(o, 2))
    log, best = Log(), ModelCheckpoint(tmp_path, filename="best", monitor="val_loss")
    trainer = runner(tmp_path, log, best, epochs=4)
    trainer.fit(module, loader(shuffle=True), loader(96, seed=9))

    held = {id(p) for g in trainer.optimizers[0].param_groups for p in g["params"]}
    assert held == {id(p) for p in d.parameters()}
    assert {id(p) for p in d.losses.parameters()} < held
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not any(m.training for m in teacher.modules())
    assert d.progress == 31 / 32
    for name in ("train_loss", "train_TaskLoss", "train_KD", "train_Hint"):
        assert log.lines[-1][name] < log.lines[0][name], name
    assert log.lines[-1]["val_accuracy"] > 0.8

    # what was validated is the student alone
    x, y = data(96, seed=9).tensors
    with torch.no_grad():
        logits = module.student.eval()(x)
    assert trainer.callback_metrics["val_accuracy"] == pytest.approx(float((logits.argmax(1) == y).float().mean()))
    assert trainer.callback_metrics["val_loss"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
    assert torch.equal(module(x), logits)

    # the checkpoint: no teacher, and a student for the plain model
    state = torch.load(best.best_model_path, weights_only=True)["state_dict"]
    assert {".".join(k.split(".")[:2]) for k in state} == {"distillation.student", "distillation.losses"}
    assert not any(v.shape == teacher[0].weight.shape for v in state.values())
    mlp(8).load_state_dict(student_weights(best.best_model_path), strict=True)
    again = Distillation(mlp(8, seed=5), teacher, [TaskLoss(), KD(), Hint("0")]).bind((x, y))
    loaded = DistillationModule.load_from_checkpoint(best.best_model_path, distillation=again, optimizer=SGD)
    assert all(torch.equal(v, state[f"distillation.student.{k}"]) for k, v in loaded.student.state_dict().items())


def test_the_task_alone_trains_as_a_plain_module_does(tmp_path):
    class Plain(LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return SGD(self.parameters())

    states = []
    for make in (Plain, lambda m: DistillationModule(Distillation(m, None, [TaskLoss()]), SGD)):
        model = mlp(8)
        torch.manual_seed(3)
        runner(tmp_path).fit(make(model), loader(shuffle=True))
        states.append(model.state_dict())
    # the same batches and the same dropout: binding drew no random number
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_training_resumes_with_projectors_and_side_learners(teacher, tmp_path):
    def fit(folder, epochs, seed=0, ckpt=None):
        d = Distillation(mlp(8, seed), teacher, [TaskLoss(), Hint("0"), Critic(weight=0.1)])
        d.student[3] = nn.Identity()  # dropout would need the random state, which Lightning does not save
        keep = ModelCheckpoint(tmp_path / folder, filename="{epoch}", save_top_k=-1)
        runner(tmp_path, keep, epochs=epochs).fit(DistillationModule(d, SGD), loader(), ckpt_path=ckpt)
        return d

    whole = fit("a", 3)
    resumed = fit("b", 3, seed=4, ckpt=tmp_path / "a" / "epoch=0.ckpt")
    for (name, p), q in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    critics = [d.side_learners()["Critic.critic"].module.weight for d in (whole, resumed)]
    assert torch.equal(*critics)


def test_a_data_module_named_batches_and_unlabelled_samples(teacher, tmp_path):
    class Named(LightningDataModule):
        def rows(self, seed, hide):
            x, y = data(64, seed).tensors
            return [
                {"input": a, "labels": UNLABELLED if i % hide == 0 else int(b)}
                for i, (a, b) in enumerate(zip(x, y, strict=True))
            ]

        def train_dataloader(self):
            return DataLoader(self.rows(0, 4), 16, shuffle=True)

        def val_dataloader(self):
            return [DataLoader(self.rows(1, 2), 16), DataLoader(self.rows(2, 1), 16)]

    module = DistillationModule(Distillation(mlp(8), teacher), SGD)
    trainer = runner(tmp_path, epochs=2)
    trainer.fit(module, datamodule=Named())
    rows = [r for i, r in enumerate(Named().rows(1, 2)) if i % 2]
    with torch.no_grad():
        predicted = module.student.eval()(torch.stack([r["input"] for r in rows])).argmax(1)
    right = float((predicted == torch.tensor([r["labels"] for r in rows])).float().mean())
    assert trainer.callback_metrics["val_accuracy/dataloader_idx_0"] == pytest.approx(right)
    assert "val_accuracy/dataloader_idx_1" not in trainer.callback_metrics, "no sample of it has a label"


def test_what_cannot_be_done_is_said(teacher, tmp_path):
    with pytest.raises(TypeError, match=r"expected a tutelage.Distillation, got Sequential"):
        DistillationModule(teacher, SGD)
    module = DistillationModule(Distillation(mlp(8), teacher), SGD)
    with pytest.raises(TypeError, match=r"not one training loader: call distillation.bind"):
        runner(tmp_path).fit(module, {"a": loader(), "b": loader()})
    torch.save({"state_dict": {"model.weight": torch.ones(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt: no weights of a distillation's student"):
        student_weights(tmp_path / "other.ckpt")
