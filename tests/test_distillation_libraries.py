"""The core on models of timm, torchvision and transformers, as their users have them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tutelage import KD, Distillation, TaskLoss
from tutelage.taps import Observer, UnknownTap, stages, tappable
from tutelage.views import Inputs, read_batch

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3])


def steps(d: Distillation, batch, count: int = 3, lr: float = 0.01) -> list[float]:
    optimizer = torch.optim.SGD(d.parameters(), lr=lr)
    totals = []
    for _ in range(count):
        losses = d(batch)
        losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        totals.append(losses.total.item())
    return totals


def check_steps(student: nn.Module, teacher: nn.Module, batch, **kwargs) -> Distillation:
    """Bind, step, and see that the student moved while the teacher and both models' hooks and modes did not."""
    states = [copy.deepcopy(m.state_dict()) for m in (student, teacher)]
    d = Distillation(student, teacher, **kwargs).bind(batch)
    assert all(torch.equal(v, states[0][k]) for k, v in student.state_dict().items())
    assert all(m.training for m in student.modules())
    totals = steps(d, batch)
    assert all(torch.isfinite(torch.tensor(totals)))
    assert any(not torch.equal(v, states[0][k]) for k, v in student.state_dict().items())
    assert all(torch.equal(v, states[1][k]) for k, v in teacher.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for model in (student, teacher) for m in model.modules())
    return d


# torchvision and timm


def test_torchvision_resnet18_taught_by_resnet34():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    d = check_steps(models.resnet18(num_classes=4), models.resnet34(num_classes=4), IMAGES)
    inputs = read_batch(IMAGES).student
    assert [s.address for s in stages(d.student, inputs)] == ["relu", "layer1", "layer2", "layer3"]


def test_torchvision_in_place_blocks_are_read_before_they_are_overwritten():
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.resnet18(num_classes=4).eval()
    inputs = read_batch(IMAGES).student
    observer = Observer(model, ["layer1.0.bn2", "layer1.0.relu:input", "layer1.0.relu#2:input", "layer1.0"])
    with torch.no_grad():
        observer.dry_run(inputs)
        record = observer(inputs)
        x = model.maxpool(model.relu(model.bn1(model.conv1(IMAGES[0]))))
        block = model.layer1[0]
        inner = block.bn1(block.conv1(x))
        torch.testing.assert_close(record["layer1.0.relu:input"], inner)
        outer = block.bn2(block.conv2(inner.relu()))
        torch.testing.assert_close(record["layer1.0.bn2"], outer)
        torch.testing.assert_close(record["layer1.0.relu#2:input"], outer + x)
        torch.testing.assert_close(record["layer1.0"], (outer + x).relu())


@pytest.mark.parametrize("names", [("resnet10t", "resnet14t"), ("test_vit", "test_efficientnet")])
def test_timm(names):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    small, large = names
    size = {"img_size": 32} if "vit" in small else {}
    check_steps(timm.create_model(small, num_classes=4, **size), timm.create_model(large, num_classes=4), IMAGES)


def test_all_that_tappable_lists_in_timm_can_be_tapped_at_once():
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", num_classes=4)
    inputs = read_batch(IMAGES).student
    lines = tappable(model.eval(), inputs)
    observer = Observer(model, [t.address for t in lines] + ["@logits"])
    with torch.no_grad():
        observer.dry_run(inputs)
    record = observer(inputs)
    assert all(tuple(record[t.address].shape) == t.shape for t in lines)
    assert torch.equal(record.logits, model(IMAGES[0]))


# transformers


def bert(hidden: int = 16, layers: int = 1, **config) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(hidden + layers)
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=30,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=2 * hidden,
            max_position_embeddings=16,
            num_labels=3,
            **config,
        )
    )


@pytest.fixture
def tokens() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    mask = torch.ones(6, 10, dtype=torch.long)
    mask[:2, 7:] = 0
    return {
        "input_ids": torch.randint(0, 30, (6, 10), generator=draw),
        "attention_mask": mask,
        "labels": torch.tensor([0, 1, 2, 0, 1, 2]),
    }


@pytest.mark.parametrize("kind", ["dict", "BatchEncoding"])
def test_bert_with_named_inputs(tokens, kind):
    transformers = pytest.importorskip("transformers")
    batch = transformers.BatchEncoding(tokens) if kind == "BatchEncoding" else tokens
    d = check_steps(bert(), bert(24, 2), batch)
    d.eval()
    total = d(batch).total
    without_labels = {k: v for k, v in tokens.items() if k != "labels"}
    output = d.student(**tokens)
    torch.testing.assert_close(d(batch)["TaskLoss"], output.loss.detach(), msg="the loss that BERT computes itself")
    kd = Distillation(d.student, d.teacher, [KD(weight=0.9)]).bind(without_labels)
    torch.testing.assert_close(total, 0.1 * output.loss + kd(without_labels).total)


def test_fields_modules_and_inputs_of_bert(tokens):
    model = bert(16, 2, output_hidden_states=True, output_attentions=True, attn_implementation="eager").eval()
    inputs = read_batch(tokens).student
    layer = "bert.encoder.layer"
    addresses = ["@hidden_states[-1]", "@hidden_states[0]", "@attentions[1]", f"{layer}.1", f"{layer}.0:input"]
    observer = Observer(model, [*addresses, ":input", "classifier:input"])
    with torch.no_grad():
        observer.dry_run(inputs)
        record = observer(inputs)
        output = model(**tokens)
    assert torch.equal(record["@hidden_states[-1]"], output.hidden_states[2])
    assert torch.equal(record["@hidden_states[0]"], output.hidden_states[0])
    assert torch.equal(record["@attentions[1]"], output.attentions[1])
    assert torch.equal(record[f"{layer}.1"], output.hidden_states[2])
    assert torch.equal(record[f"{layer}.0:input"], output.hidden_states[0])
    assert torch.equal(record[":input"], tokens["input_ids"])
    assert torch.equal(record.logits, output.logits)
    assert torch.equal(model.classifier(record["classifier:input"]), output.logits)


@pytest.mark.parametrize("config", [{}, {"attn_implementation": "eager"}, {"output_attentions": True}])
def test_the_stages_of_bert_are_its_layers_and_not_its_attention_maps(tokens, config):
    if "output_attentions" in config:
        config = {**config, "attn_implementation": "eager"}
    found = stages(bert(16, 2, **config).eval(), read_batch(tokens).student)
    assert [s.address for s in found] == ["bert.encoder.layer.0", "bert.encoder.layer.1"]


def test_the_stages_of_vision_transformers_are_their_blocks():
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    images = torch.randn(2, 3, 64, 64)
    model = timm.create_model("test_vit", img_size=64).eval()
    found = [s.address for s in stages(model, Inputs((images,)))]
    assert found == [f"blocks.{i}" for i in range(len(model.blocks))]
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=64,
        attn_implementation="eager",
    )
    model = transformers.ViTForImageClassification(config).eval()
    found = stages(model, Inputs((), {"pixel_values": images}))
    assert [(s.kind, s.shape) for s in found] == [("ViTLayer", (2, 17, 16))] * 3


def test_hidden_states_that_the_model_was_not_asked_for(tokens):
    model = bert().eval()
    with pytest.raises(UnknownTap, match=r"'@hidden_states\[-1\]'.*None there"):
        Observer(model, ["@hidden_states[-1]"]).dry_run(read_batch(tokens).student)


def test_a_dictionary_teacher_beside_a_student_that_takes_one_tensor(tokens):
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(30, 8), nn.Linear(8, 3)

        def forward(self, input_ids):
            return self.fc(self.embed(input_ids).mean(1))

    check_steps(Bag(), bert(), tokens, losses=[TaskLoss(), KD()])
    with pytest.raises(ValueError, match=r"Linear.forward knows none of the batch's fields"):
        Inputs((), {k: v.float() for k, v in tokens.items()}).call(nn.Linear(10, 3))
