"""Models by name, and weights from and to files."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from tutelage import models


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.out = nn.Linear(3, 7, bias=False)
        self.out.weight = self.embedding.weight


def same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("spec", ["resnet8", "tutelage:resnet8", "tutelage.models:resnet8"])
def test_one_model_by_three_names(spec: str) -> None:
    model = models.create(spec, num_classes=3)
    assert isinstance(model, models.CifarResNet)
    assert model.linear.out_features == 3


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"tutelage has no model 'smalcnn'; nearest: 'SmallCNN'"):
        models.create("smalcnn")
    with pytest.raises(ValueError, match=r"torch.nn has no callable 'Liner'; nearest: .*'Linear'"):
        models.create("torch.nn:Liner")
    with pytest.raises(ValueError, match="'nowhere_at_all' is neither"):
        models.create("nowhere_at_all:model")
    with pytest.raises(ValueError, match="source:name"):
        models.create("timm:")
    with pytest.raises(TypeError, match=r"not a torch\.nn\.Module"):
        models.create("collections:OrderedDict")


def test_torchvision_models() -> None:
    pytest.importorskip("torchvision")
    model = models.create("torchvision:squeezenet1_1", num_classes=4)
    assert model.classifier[1].out_channels == 4
    with pytest.raises(ValueError, match=r"torchvision has no model 'resnet19'; nearest: .*'resnet18'"):
        models.create("torchvision:resnet19")


def test_timm_models() -> None:
    pytest.importorskip("timm")
    model = models.create("timm:test_vit", num_classes=4, pretrained=False)
    assert model.head.out_features == 4
    with pytest.raises(ValueError, match=r"timm has no model 'resnet1888'; nearest: .*'resnet18'"):
        models.create("timm:resnet1888")


def test_transformers_from_a_folder(tmp_path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "base")
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    base = models.create(f"transformers:{tmp_path / 'base'}")
    assert type(base).__name__ == "BertModel"
    assert models.create(f"transformers:{tmp_path / 'base'}", num_labels=5).classifier.out_features == 5
    assert type(models.create(f"transformers:{tmp_path / 'classifier'}")).__name__ == "BertForSequenceClassification"
    with pytest.raises(ValueError, match="transformers has no model"):
        models.create(f"transformers:{tmp_path / 'missing'}")


def test_safetensors_round_trip(tmp_path) -> None:
    torch.manual_seed(0)
    a, b = models.resnet8(), models.resnet8()
    a(torch.randn(4, 3, 32, 32))  # moves the batch statistics
    assert not same(a, b)
    models.save_weights(a, tmp_path / "deep" / "a.safetensors")
    assert models.load_weights(b, tmp_path / "deep" / "a.safetensors") == ([], [])
    assert same(a, b)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a.safetensors"]


def test_tied_weights_are_written_once_and_stay_tied(tmp_path) -> None:
    from safetensors import safe_open

    a, b = Tied(), Tied()
    models.save_weights(a, tmp_path / "tied.safetensors")
    with safe_open(tmp_path / "tied.safetensors", "pt") as file:
        assert len(list(file.keys())) == 1
    models.load_weights(b, tmp_path / "tied.safetensors")
    assert torch.equal(b.out.weight, a.embedding.weight)
    assert b.out.weight is b.embedding.weight


def test_a_tied_file_does_not_fit_an_untied_model(tmp_path) -> None:
    models.save_weights(Tied(), tmp_path / "tied.safetensors")
    untied = Tied()
    untied.out.weight = nn.Parameter(torch.zeros(7, 3))
    with pytest.raises(ValueError, match="1 missing in the file"):
        models.load_weights(untied, tmp_path / "tied.safetensors")


@pytest.mark.parametrize("field", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_pt_files_of_training_scripts(tmp_path, field, prefix) -> None:
    a, b = models.MLP(4, (3,), 2), models.MLP(4, (3,), 2)
    state = {prefix + name: tensor for name, tensor in a.state_dict().items()}
    torch.save(state if field is None else {field: state, "epoch": 3}, tmp_path / "a.pt")
    models.load_weights(b, tmp_path / "a.pt")
    assert same(a, b)


def test_missing_and_unreadable_files(tmp_path) -> None:
    model = models.MLP(4, (3,), 2)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*none\.pt"):
        models.load_weights(model, tmp_path / "none.pt")
    garbage = [
        b"this is not a checkpoint",
        bytes(range(256)) * 9,
        b"\x80\x02garbage",
        b"PK\x03\x04" + b"\0" * 60,
        b"{}",
    ]
    for suffix in (".pt", ".safetensors"):
        (tmp_path / f"empty{suffix}").touch()
        with pytest.raises(ValueError, match=r"empty.*is not a checkpoint: the file is empty"):
            models.load_weights(model, tmp_path / f"empty{suffix}")
        for content in garbage:
            (tmp_path / f"bad{suffix}").write_bytes(content)
            with pytest.raises(ValueError, match=r"bad.*is not a .*checkpoint"):
                models.load_weights(model, tmp_path / f"bad{suffix}")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="expected names with tensors, got list"):
        models.load_weights(model, tmp_path / "list.pt")


def test_truncated_files_are_refused(tmp_path) -> None:
    model = models.MLP(40, (30,), 2)
    models.save_weights(model, tmp_path / "a.safetensors")
    torch.save(model.state_dict(), tmp_path / "a.pt")
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match=r"is not a .*checkpoint"):
            models.load_weights(model, path)


class Harmful:
    def __reduce__(self):
        return exec, ("raise SystemExit('code in a checkpoint was run')",)


def test_code_in_a_checkpoint_is_not_run(tmp_path) -> None:
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"weight": Harmful()}, protocol=2))
    torch.save({"weight": Harmful()}, tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match="not a checkpoint of plain tensors"):
            models.load_weights(models.MLP(4, (3,), 2), tmp_path / name)


def test_another_architecture_is_described_and_nothing_is_changed(tmp_path) -> None:
    models.save_weights(models.resnet14(), tmp_path / "r14.safetensors")
    model = models.resnet8()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"CifarResNet; 36 not in the model: layer1\.1\."):
        models.load_weights(model, tmp_path / "r14.safetensors")
    models.save_weights(models.SmallCNN(width=8), tmp_path / "small.safetensors")
    with pytest.raises(
        ValueError, match=r"missing in the file: conv1\..*not in the model: stage1.*first 'linear.weight'"
    ):
        models.load_weights(model, tmp_path / "small.safetensors")
    models.save_weights(models.resnet8(num_classes=5), tmp_path / "five.safetensors")
    with pytest.raises(ValueError, match=r"'linear.weight': \(5, 64\) in the file, \(10, 64\) in the model"):
        models.load_weights(model, tmp_path / "five.safetensors", strict=False)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_not_strict_reports_what_does_not_match(tmp_path) -> None:
    a, b = models.MLP(4, (3,), 2), models.MLP(4, (3,), 2)
    state = a.state_dict()
    bias = state.pop("linear.bias")
    torch.save({**state, "extra": bias}, tmp_path / "a.pt")
    assert models.load_weights(b, tmp_path / "a.pt", strict=False) == (["linear.bias"], ["extra"])
    assert torch.equal(b.linear.weight, a.linear.weight)


def test_weights_are_saved_as_safetensors_only(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"must end in '\.safetensors', got 'a\.pt'"):
        models.save_weights(models.MLP(4, (3,), 2), tmp_path / "a.pt")
