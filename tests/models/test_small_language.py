"""Small language models: they see nothing of what comes, and a larger one teaches a smaller one."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tutelage import KD, Distillation, GeneralizedJSD, InChunks, TaskLoss, distill, models
from tutelage.data import pydoc_loaders
from tutelage.evaluation import evaluate
from tutelage.models import SmallLanguageModel, SmallLSTM
from tutelage.record import logits_of
from tutelage.taps import stages
from tutelage.views import UNLABELLED, Inputs

BOTH = pytest.mark.parametrize("kind", [SmallLanguageModel, SmallLSTM])


def tokens(rows: int = 3, length: int = 6, words: int = 11) -> torch.Tensor:
    return torch.randint(0, words, (rows, length), generator=torch.Generator().manual_seed(0))


@BOTH
def test_no_logit_knows_a_later_token(kind):
    torch.manual_seed(0)
    model = kind(vocabulary=11, width=8, depth=2).double()
    ids = tokens()
    before = logits_of(model(ids))
    for t in range(6):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        after = logits_of(model(changed))
        torch.testing.assert_close(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


def test_a_causal_layer_is_torchs():
    torch.manual_seed(0)
    model, ids = SmallLanguageModel(vocabulary=11, width=8, depth=1, heads=2).double(), tokens()
    layer, x = model.layers[0], model.embedding(ids) + model.positions[:6]
    own = nn.TransformerEncoderLayer(8, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True, dtype=torch.float64)
    own.self_attn.in_proj_weight.data, own.self_attn.in_proj_bias.data = (
        layer.attention.qkv.weight.data,
        layer.attention.qkv.bias.data,
    )
    own.self_attn.out_proj.load_state_dict(layer.attention.out.state_dict())
    for mine, theirs in ((own.linear1, layer.mlp[0]), (own.linear2, layer.mlp[2])):
        mine.load_state_dict(theirs.state_dict())
    own.norm1.load_state_dict(layer.norm1.state_dict())
    own.norm2.load_state_dict(layer.norm2.state_dict())
    expected = own(x, src_mask=nn.Transformer.generate_square_subsequent_mask(6, dtype=torch.float64), is_causal=True)
    output = model(ids)
    torch.testing.assert_close(output.hidden_states[1], expected)
    torch.testing.assert_close(output.logits, F.linear(model.norm(expected), model.embedding.weight))
    torch.testing.assert_close(output.attentions[0].sum(-1), torch.ones(3, 2, 6, dtype=torch.float64))


@BOTH
@pytest.mark.parametrize("tied", [True, False])
def test_tied_words_are_one_matrix_and_checkpoints_keep_it(kind, tied, tmp_path):
    torch.manual_seed(0)
    model = kind(vocabulary=11, width=8, tied=tied)
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    assert len({p.data_ptr() for p in model.parameters()}) == len(list(model.parameters()))
    logits_of(model(tokens())).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    models.save_weights(model, tmp_path / "model.safetensors")
    other = models.create(kind.__name__, vocabulary=11, width=8, tied=tied)
    models.load_weights(other, tmp_path / "model.safetensors")
    assert torch.equal(logits_of(other(tokens())), logits_of(model(tokens())))


def test_the_first_loss_is_about_that_of_guessing():
    for kind in (SmallLanguageModel, SmallLSTM):
        torch.manual_seed(0)
        model = kind(vocabulary=1000, width=32)
        logits = logits_of(model(tokens(8, 20, 1000)))
        nll = F.cross_entropy(logits.flatten(0, 1), tokens(8, 20, 1000).roll(-1, 1).flatten())
        assert abs(nll - 6.9078) < 1.0


def test_its_stages_are_its_layers():
    found = stages(SmallLanguageModel(vocabulary=11, width=8, depth=3, heads=2), Inputs((), {"input_ids": tokens()}))
    assert [line.address for line in found] == ["layers.0", "layers.1", "layers.2"]


def test_dropout_is_for_training_alone():
    torch.manual_seed(0)
    for kind in (SmallLanguageModel, SmallLSTM):
        model, ids = kind(vocabulary=11, width=8, dropout=0.5), tokens()
        assert not torch.equal(logits_of(model(ids)), logits_of(model(ids)))
        model.eval()
        assert torch.equal(logits_of(model(ids)), logits_of(model(ids)))


@pytest.mark.parametrize("wrong", [{"width": 9}, {"vocabulary": 0}, {"depth": 0}, {"length": 0}])
def test_sizes_that_do_not_fit_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}.*: expected"):
        SmallLanguageModel(**wrong)
    if name != "length" and value == 0:
        with pytest.raises(ValueError, match=f"{name}={value}.*: expected"):
            SmallLSTM(**wrong)


def test_a_sequence_that_is_too_long_is_told():
    with pytest.raises(ValueError, match=r"input_ids: a sequence of 6 tokens, and length=5"):
        SmallLanguageModel(vocabulary=11, width=8, length=5)(tokens())


def batch(kept: int = 4) -> dict[str, torch.Tensor]:
    ids = tokens()
    labels = ids.roll(-1, 1)
    labels[:, kept:] = UNLABELLED
    return {"input_ids": ids, "labels": labels}


@pytest.mark.parametrize("make", [KD, GeneralizedJSD, lambda: InChunks(KD()), lambda: InChunks(GeneralizedJSD())])
def test_what_is_filled_up_changes_neither_value_nor_gradient(make):
    torch.manual_seed(0)
    student, teacher = SmallLSTM(11, width=4), SmallLanguageModel(11, width=8, depth=1)
    d = Distillation(student, teacher, losses=[TaskLoss(), make()]).bind(batch())
    short = {name: value[:, :4] for name, value in batch().items()}
    other = {**batch(), "input_ids": torch.cat([tokens()[:, :4], 10 - tokens()[:, 4:]], 1)}
    found = []
    for some in (batch(), short, other):
        d.zero_grad()
        losses = d(some)
        losses.total.backward()
        found.append((losses.total.detach(), student.embedding.weight.grad.clone()))
    for value, gradient in found[1:]:
        torch.testing.assert_close(value, found[0][0])
        torch.testing.assert_close(gradient, found[0][1])


@functools.cache
def text():
    return pydoc_loaders(vocabulary=300, validation=100, limit=1000)


@functools.cache
def taught_teacher():
    torch.manual_seed(0)
    teacher = SmallLanguageModel(300, width=64, depth=2)
    settings = {"epochs": 4, "optimizer": "adamw", "lr": 0.01, "weight_decay": 0.05, "scheduler": "onecycle"}
    distill(teacher, None, text().train, losses=[TaskLoss()], progress=False, **settings)
    return teacher


@pytest.mark.parametrize("loss", [KD, GeneralizedJSD])
def test_a_larger_model_teaches_a_smaller_one(loss):
    """The student that is taught agrees more with the teacher than the same one that learns from the text alone."""
    teacher, data = taught_teacher(), text()
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    found = {}
    for name, role in (("taught", teacher), ("alone", None)):
        torch.manual_seed(1)
        student = SmallLSTM(300, width=24)
        losses = [TaskLoss(weight=0.1), loss(temperature=1.0, weight=0.9)] if role else [TaskLoss()]
        distill(
            student, role, data.train, losses=losses, epochs=5, optimizer="adamw", lr=0.02, scheduler="onecycle",
            progress=False,
        )  # fmt: skip
        found[name] = evaluate(student, data.validation, teacher)
    assert found["taught"].agreement > found["alone"].agreement
    assert found["taught"].teacher_kl < found["alone"].teacher_kl
    assert found["alone"].nll < 5.70 - 0.5, "it has learned something: ln 300 is 5.70"
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
