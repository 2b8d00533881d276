from __future__ import annotations

import copy
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("transformers")

import transformers
from transformers import Trainer, TrainingArguments

from tutelage import KD, Distillation, Loss, Ramp, TaskLoss
from tutelage.adapters import first_batch
from tutelage.adapters.transformers import DistillationMixin, DistillationTrainer
from tutelage.connectors import projector
from tutelage.views import UNLABELLED, Paired


def bert(hidden: int = 16, layers: int = 1, seed: int = 0, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(seed)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=20,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=2 * hidden,
            max_position_embeddings=16,
            num_labels=2,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def sentences(count: int, seed: int = 0) -> list[dict]:
    """Does the word 1 or the word 2 stand more often?"""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 3, (count, 7), generator=draw)
    return [{"input_ids": row, "labels": int((row == 2).sum() > 3)} for row in ids]


class Hint(Loss):
    def build(self, student, teacher, batch):
        ((s, t),) = self.tensors(student, teacher)
        self.map = projector(s.shape, t.shape)

    def forward(self, student, teacher, batch):
        ((s, t),) = self.tensors(student, teacher)
        return F.mse_loss(self.map(s), t)


LAYERS = ("bert.encoder.layer.0", "bert.encoder.layer.1")


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    """Two layers, trained until it knows the task."""
    model = bert(32, 2, seed=1)
    data = sentences(256, seed=5)
    batch = torch.stack([d["input_ids"] for d in data]), torch.tensor([d["labels"] for d in data])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(40):
        F.cross_entropy(model(batch[0]).logits, batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def arguments(folder: Path, **changes) -> TrainingArguments:
    settings = {
        "per_device_train_batch_size": 16,
        "learning_rate": 3e-3,
        "max_steps": 30,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 5,
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
    }
    return TrainingArguments(str(folder), **{**settings, **changes})


def accuracy(predictions) -> dict[str, float]:
    assert predictions.predictions.shape == (len(predictions.label_ids), 2)
    return {"accuracy": float((predictions.predictions.argmax(1) == predictions.label_ids).mean())}


def test_a_real_training_from_two_layers_to_one(teacher, tmp_path):
    before = copy.deepcopy(teacher.state_dict())
    student = bert()
    d = Distillation(student, teacher, [TaskLoss(weight=0.5), KD(temperature=2.0, weight=Ramp(0.5, 1.0)), Hint(LAYERS)])
    trainer = DistillationTrainer(
        d,
        arguments(tmp_path, eval_strategy="steps", eval_steps=30, max_steps=60),
        train_dataset=sentences(256),
        eval_dataset=sentences(64, seed=9),
        compute_metrics=accuracy,
    )
    trainer.train()

    assert trainer.model is d
    held = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in d.parameters()}
    assert {id(p) for p in d.losses.parameters()} < held
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert d.progress == 59 / 60

    history = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["step"] for line in history] == list(range(5, 61, 5))
    for term in ("TaskLoss", "KD", "Hint"):
        assert history[-1][term] < history[0][term], term
    evaluation = [line for line in trainer.state.log_history if "eval_loss" in line][-1]
    assert evaluation["eval_accuracy"] > 0.9

    # what was evaluated is the student alone
    data = sentences(64, seed=9)
    with torch.no_grad():
        logits = student.eval()(torch.stack([s["input_ids"] for s in data])).logits
    labels = torch.tensor([s["labels"] for s in data])
    assert evaluation["eval_loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-4)
    assert evaluation["eval_accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    predictions = trainer.predict(data).predictions
    np.testing.assert_allclose(predictions, logits.numpy(), rtol=1e-4, atol=1e-5)

    # what is saved is the plain student
    trainer.save_model(str(tmp_path / "student"))
    loaded, info = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "student", output_loading_info=True
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in student.state_dict().items())
    assert not (tmp_path / "student" / "distillation.pt").exists()


def test_logged_terms_are_the_means_of_the_steps(teacher, tmp_path):
    d = Distillation(bert(), teacher, [TaskLoss(weight=0.3), KD(weight=0.7)])
    trainer = DistillationTrainer(
        d,
        arguments(tmp_path, max_steps=6, logging_steps=3, gradient_accumulation_steps=2),
        train_dataset=sentences(256),
    )
    trainer.train()
    for line in (line for line in trainer.state.log_history if "loss" in line):
        assert line["loss"] == pytest.approx(0.3 * line["TaskLoss"] + 0.7 * line["KD"], rel=1e-4, abs=1e-4)


def trained(teacher, folder, size: int, parts: int, unlabelled: bool, cls=DistillationTrainer) -> nn.Module:
    data = sentences(40)
    if unlabelled:
        for i in (0, 1, 2, 9, 17, 30):
            data[i]["labels"] = UNLABELLED
    student = bert()
    trainer = cls(
        Distillation(student, teacher, [TaskLoss(weight=0.5), KD(weight=0.5)]),
        arguments(
            folder,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            num_train_epochs=2,
            max_steps=-1,
            optim="sgd",
            learning_rate=0.1,
        ),
        train_dataset=data,
    )
    trainer.train()
    return student


@pytest.mark.parametrize("unlabelled", [False, True])
def test_accumulation_changes_nothing(teacher, tmp_path, unlabelled):
    # 40 samples: five steps of eight, in one part or in eight; three steps of 18, of which the last has 4 in one part
    for size, parts in ((8, 8), (18, 3)):
        whole = trained(teacher, tmp_path, size, 1, unlabelled)
        split = trained(teacher, tmp_path, size // parts, parts, unlabelled)
        for (name, p), q in zip(whole.named_parameters(), split.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=name)


def test_the_task_alone_trains_as_the_plain_trainer_does(tmp_path):
    data, settings = sentences(40), {"optim": "sgd", "learning_rate": 0.1, "max_steps": 8}
    plain, student = bert(dropout=0.1), bert(dropout=0.1)
    Trainer(plain, arguments(tmp_path, **settings), train_dataset=data).train()
    d = Distillation(student, None, [TaskLoss()])
    DistillationTrainer(d, arguments(tmp_path, **settings), train_dataset=data).train()
    # the same batches in the same order with the same dropout: binding drew no random number
    for (name, p), q in zip(plain.named_parameters(), student.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)


def test_training_resumes_from_a_checkpoint_with_its_projectors(teacher, tmp_path):
    def make(folder: str, student: nn.Module) -> DistillationTrainer:
        d = Distillation(student, teacher, [TaskLoss(), Hint(LAYERS)])
        args = arguments(tmp_path / folder, max_steps=8, save_strategy="steps", save_steps=5)
        return DistillationTrainer(d, args, train_dataset=sentences(64))

    whole = make("a", bert(dropout=0.1))
    whole.train()
    checkpoint = tmp_path / "a" / "checkpoint-5"
    plain = transformers.BertForSequenceClassification.from_pretrained(checkpoint)
    assert plain.state_dict().keys() == whole.distillation.student.state_dict().keys()
    assert sorted(torch.load(checkpoint / "distillation.pt", weights_only=True)["owned"]) == [
        "losses.Hint.map.bias",
        "losses.Hint.map.weight",
    ]
    resumed = make("b", bert(seed=3, dropout=0.1))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for (name, p), q in zip(whole.distillation.named_parameters(), resumed.distillation.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_the_best_student_is_loaded_at_the_end(teacher, tmp_path):
    trainer = DistillationTrainer(
        Distillation(bert(), teacher),
        arguments(
            tmp_path,
            max_steps=4,
            eval_strategy="steps",
            save_strategy="steps",
            eval_steps=1,
            save_steps=1,
            load_best_model_at_end=True,
            learning_rate=0.3,
        ),
        train_dataset=sentences(64),
        eval_dataset=sentences(32, seed=9),
    )
    trainer.train()
    best = transformers.BertForSequenceClassification.from_pretrained(trainer.state.best_model_checkpoint)
    assert all(torch.equal(v, best.state_dict()[k]) for k, v in trainer.distillation.student.state_dict().items())
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, rel=1e-5)


def test_evaluation_comes_before_training_and_without_labels(teacher, tmp_path):
    student = bert()
    trainer = DistillationTrainer(
        Distillation(student, teacher), arguments(tmp_path, max_steps=1), train_dataset=sentences(16)
    )
    data = sentences(8, seed=9)
    assert np.isfinite(trainer.evaluate(data)["eval_loss"])
    bare = trainer.predict([{"input_ids": d["input_ids"]} for d in data])
    assert "test_loss" not in bare.metrics
    with torch.no_grad():
        expected = student.eval()(torch.stack([d["input_ids"] for d in data])).logits
    np.testing.assert_allclose(bare.predictions, expected.numpy(), rtol=1e-4, atol=1e-5)
    assert trainer.distillation.observer is None
    trainer.train()
    assert all(m.training for m in student.modules())


def test_students_of_plain_torch_and_views_of_their_own(tmp_path):
    class MyTrainer(DistillationMixin, Trainer):
        pass

    torch.manual_seed(0)
    x = torch.randn(64, 6)
    data = [{"depth": r[:3], "rgb": r[3:] + r[:3], "label": int(r[0] > 0)} for r in x]
    student, teacher = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
    d = Distillation(student, teacher, [TaskLoss(), KD()], views=Paired(student="depth", teacher="rgb"))
    trainer = MyTrainer(
        d, arguments(tmp_path, learning_rate=0.1), train_dataset=data, eval_dataset=data, compute_metrics=accuracy
    )
    trainer.train()
    assert trainer.evaluate()["eval_accuracy"] > 0.9
    trainer.save_model(str(tmp_path))
    from safetensors.torch import load_file

    nn.Sequential(nn.Linear(3, 2)).load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)


def test_mixed_precision_trains_and_evaluates(teacher, tmp_path):
    d = Distillation(bert(), teacher, [TaskLoss(), KD(), Hint(LAYERS)])
    data = sentences(32)
    trainer = DistillationTrainer(d, arguments(tmp_path, max_steps=6, bf16=True), train_dataset=data, eval_dataset=data)
    assert np.isfinite(trainer.train().training_loss)
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    assert all(p.dtype == torch.float32 for p in d.parameters())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"gradient_checkpointing": True}, "enable it on the student"),
        ({"neftune_noise_alpha": 0.1}, "neftune_noise_alpha=0.1"),
    ],
)
def test_arguments_that_go_past_the_distillation_are_refused(teacher, tmp_path, changes, match):
    with pytest.raises(ValueError, match=match):
        DistillationTrainer(Distillation(bert(), teacher), arguments(tmp_path, **changes))


def test_more_refusals(teacher, tmp_path):
    d = Distillation(bert(), teacher, [TaskLoss(), Hint(LAYERS)])
    with pytest.raises(ValueError, match="give label_smoothing to TaskLoss"):
        DistillationTrainer(d, arguments(tmp_path, label_smoothing_factor=0.1))
    with pytest.raises(TypeError, match=r"expected a tutelage.Distillation, got BertForSequenceClassification"):
        DistillationTrainer(teacher, arguments(tmp_path))
    early = torch.optim.SGD(d.parameters(), lr=0.1)
    trainer = DistillationTrainer(d, arguments(tmp_path), train_dataset=sentences(16), optimizers=(early, None))
    with pytest.raises(
        ValueError, match=r"'losses.Hint.map.weight'.* are not in the optimiser; call distillation.bind"
    ):
        trainer.train()


@pytest.mark.parametrize("workers", [0, 1])
def test_the_first_batch_is_the_loaders_and_draws_nothing(workers):
    class Noisy(torch.utils.data.Dataset):
        def __len__(self):
            return 12

        def __getitem__(self, i):
            return i + random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002

    for generator in (None, torch.Generator().manual_seed(4)):
        loader = torch.utils.data.DataLoader(Noisy(), 4, shuffle=True, generator=generator, num_workers=workers)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
        first = first_batch(loader)
        assert random.getstate() == before[0]
        assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
        assert torch.equal(torch.get_rng_state(), before[2])
        assert torch.equal(first, next(iter(loader)))
    with pytest.raises(ValueError, match="the training loader is empty"):
        first_batch([])


def train_on_uneven_shares(folder: Path, processes: int) -> None:
    """The same 96 samples in six steps, by however many processes there are."""
    data = sentences(64)
    for i in (0, 1, 2, 9, 17, 30, 33):
        data[i]["labels"] = UNLABELLED
    losses = [TaskLoss(weight=0.5), KD(weight=0.5), Hint(LAYERS)]
    d = Distillation(bert(), bert(32, 2, seed=1), losses)
    args = arguments(
        folder,
        per_device_train_batch_size=8 // processes,
        gradient_accumulation_steps=2,
        max_steps=6,
        optim="sgd",
        learning_rate=0.1,
        logging_steps=6,
        ddp_backend="gloo" if processes > 1 else None,
    )
    trainer = DistillationTrainer(d, args, train_dataset=data)
    trainer.train()
    assert (trainer.model_wrapped is d) == (processes == 1)
    if trainer.is_world_process_zero():
        logged = {name: trainer.state.log_history[0][name] for name in ("loss", *d.losses)}
        torch.save({"state": d.state_dict(), "logged": logged}, folder / f"{processes}.pt")


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    train_on_uneven_shares(tmp_path, 1)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*run, __file__, str(tmp_path), "2"], check=True, env=environment, timeout=120)
    one, two = (torch.load(tmp_path / f"{n}.pt", weights_only=True) for n in (1, 2))
    for name, value in one["state"].items():
        torch.testing.assert_close(value, two["state"][name], rtol=1e-4, atol=1e-6, msg=name)
    assert two["logged"] == pytest.approx(one["logged"], rel=1e-4)


if __name__ == "__main__":
    train_on_uneven_shares(Path(sys.argv[1]), int(sys.argv[2]))
