from __future__ import annotations

import importlib.util
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tutelage.data import fashion_loaders
from tutelage.deploy import Exported, ExportError, ParityError, check_exported, export, open_exported
from tutelage.deploy.formats.tracing import trace
from tutelage.models import SmallCNN, SmallDetector, resnet8

PACKAGES = {
    ".onnx": ("onnx", "onnxscript", "onnxruntime"),
    ".pt2": (),
    ".pte": ("executorch",),
    ".xml": ("openvino",),
}
INT8 = {**PACKAGES, ".pt2": ("torchao",), ".pte": ("executorch", "torchao"), ".xml": ("openvino", *PACKAGES[".onnx"])}
FORMATS = {".onnx": "onnx", ".pt2": "torch.export", ".pte": "executorch", ".xml": "openvino"}
endings = pytest.mark.parametrize("ending", FORMATS)


def needs(ending: str, int8: bool = False) -> None:
    # found and not imported: the code under test has its own way of importing openvino
    for package in (INT8 if int8 else PACKAGES)[ending]:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


class Reader(nn.Module):
    """A small transformer, called with keywords and answering with a dict."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.place = nn.Parameter(torch.randn(1, 6, 16) / 10)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids, attention_mask=None, scale=1.0):
        hidden = self.layer(self.embed(input_ids) + self.place, src_key_padding_mask=attention_mask == 0)
        return {"hidden": hidden, "logits": self.head(hidden[:, 0]) * scale}


def trained_statistics(model):
    """Running statistics that a fresh network does not have: with mean 0 and variance 1 a lost norm is not seen."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
    return model


@pytest.fixture(scope="module")
def images():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 5),
    )  # fmt: skip
    return trained_statistics(model), torch.randn(2, 3, 12, 12)


@pytest.fixture(scope="module")
def residual():
    torch.manual_seed(0)
    return trained_statistics(resnet8()), torch.randn(1, 3, 32, 32)


@pytest.fixture(scope="module")
def reader():
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [1, 0, 0, 0, 0, 0]])
    return Reader(), {"input_ids": torch.randint(0, 20, (3, 6)), "attention_mask": mask, "scale": 2.0}


def said(model, example):
    model.eval()
    with torch.no_grad():
        return (model(**example)["logits"] if isinstance(example, dict) else model(example)).numpy()


@pytest.mark.parametrize(
    ("which", "ending"),
    # lowering for ExecuTorch takes seconds: its plain network stands in the other tests
    [(w, e) for w in ("images", "residual", "reader") for e in FORMATS if (w, e) != ("images", ".pte")],
)
def test_a_file_computes_the_model_for_other_batches_and_is_alone(which, ending, request, tmp_path):
    needs(ending)
    model, example = request.getfixturevalue(which)
    model.train()
    path = tmp_path / "deep" / f"net{ending}"
    done = export(model, example, path)
    assert model.training
    assert isinstance(done, Exported)
    assert (done.path, done.format, done.quantized, done.data) == (path, FORMATS[ending], False, "example")
    assert done.opset == (18 if ending == ".onnx" else None)
    assert done.agreement == 1
    assert done.max_abs_error < 1e-5
    beside = {"net.bin"} if ending == ".xml" else set()
    files = {file.name: file.stat().st_size for file in path.parent.iterdir()}
    assert files.keys() == {path.name, *beside}
    assert done.size_bytes == sum(files.values())
    with open_exported(path, threads=1) as run:
        assert run.batch == (1, 64 if ending == ".pte" else None)
        if which == "reader":
            assert run.inputs == ("input_ids", "attention_mask")
        for rows in (1, 5, 17):
            if which == "reader":
                ids = torch.randint(0, 20, (rows, 6))
                mask = torch.ones(rows, 6, dtype=torch.long)
                mask[:, 4:] = 0
                expected = said(model, {"input_ids": ids, "attention_mask": mask, "scale": 2.0})
                named = run(attention_mask=mask, input_ids=ids)
                np.testing.assert_allclose(named, run(ids, mask))
                np.testing.assert_allclose(named, expected, atol=1e-5)
            else:
                batch = torch.randn(rows, *example.shape[1:])
                np.testing.assert_allclose(run(batch), said(model, batch), atol=1e-5)


@endings
def test_nothing_of_the_machine_stands_in_a_file(ending, images, tmp_path, capfd):
    needs(ending)
    export(*images, tmp_path / f"net{ending}")
    assert capfd.readouterr() == ("", "")
    content = b""
    for file in tmp_path.iterdir():
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                content += b"".join(archive.read(name) for name in archive.namelist())
        else:
            content += file.read_bytes()
    places = (tmp_path, Path.home(), Path(torch.__file__).parent, Path(__file__).parent, Path(sys.prefix))
    for word in (*(str(place).encode() for place in places), b"site-packages", b"stack_trace", b'File "'):
        assert word not in content, word


@endings
def test_the_example_is_not_kept_in_the_file(ending, tmp_path):
    needs(ending)
    secret = torch.full((2, 4), 0.7370194)
    export(nn.Linear(4, 3), secret, tmp_path / f"net{ending}")
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert secret[0, :1].numpy().tobytes() not in content


@endings
def test_a_fixed_batch_is_fixed_and_other_batches_are_compared_in_parts(ending, images, tmp_path):
    needs(ending)
    model, example = images
    path = tmp_path / f"net{ending}"
    other = torch.randn(7, 3, 12, 12)
    done = export(model, torch.cat([example, example[:1]]), path, dynamic_batch=False, data=[other])
    assert (done.samples, done.data) == (7, "given")
    with open_exported(path) as run:
        assert run.batch == (3, 3)
        np.testing.assert_allclose(run(other[:3]), said(model, other[:3]), atol=1e-5)
        with pytest.raises(Exception, match=r".+"):
            run(other[:4])
    assert check_exported(path, model, other).samples == 7


@endings
def test_channels_last_weights_and_inputs_make_the_same_file(ending, images, tmp_path):
    needs(ending)
    _, example = images
    last = SmallCNN(width=4, in_channels=3).to(memory_format=torch.channels_last)
    example = example.contiguous(memory_format=torch.channels_last)
    assert export(last, example, tmp_path / f"net{ending}").max_abs_error < 1e-5
    assert last.stage2[0].weight.is_contiguous(memory_format=torch.channels_last)
    with open_exported(tmp_path / f"net{ending}") as run:
        np.testing.assert_array_equal(run(example), run(example.contiguous()))


@pytest.fixture(scope="module")
def fashion():
    """A network that has learned a little on real images: one that has not gives nearly equal logits."""
    torch.manual_seed(0)
    loaders = fashion_loaders(limit=2000, batch_size=50)
    model = SmallCNN(width=8)
    optimiser = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(2):
        for images, labels, _ in loaders.train:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
    return model, loaders


@endings
def test_int8_is_smaller_and_mostly_agrees_on_real_images(ending, fashion, tmp_path):
    needs(ending, int8=True)
    model, loaders = fashion
    batches = list(loaders.train)[:4]
    example = batches[0][0][:2]
    path = tmp_path / f"net{ending}"
    done = export(model, example, path, quantize="int8", calibration=iter(batches), data=loaders.validation)
    assert (done.quantized, done.samples, done.data) == (True, 500, "given")
    assert done.agreement >= 0.9
    assert done.max_abs_error > 1e-3, "it is no float file under another name"
    export(model, example, tmp_path / f"whole{ending}")
    weights = {".xml": ".bin"}.get(ending, ending)
    ratio = path.with_suffix(weights).stat().st_size / (tmp_path / f"whole{weights}").stat().st_size
    assert ratio < (1 if ending == ".pt2" else 0.7)
    inputs = torch.cat([images for images, *_ in loaders.validation])[:500]
    parity = check_exported(path, model, inputs)
    assert (parity.max_abs_error, parity.agreement) == pytest.approx((done.max_abs_error, done.agreement))
    with open_exported(path) as run:
        assert run(inputs[:1]).shape == (1, 10)


def test_int8_weights_of_an_archive_are_int8_alone(fashion, tmp_path):
    needs(".pt2", int8=True)
    model, loaders = fashion
    images = next(iter(loaders.validation))[0]
    export(model, images[:2], tmp_path / "net.pt2", quantize="int8", calibration=[images])
    program = torch.export.load(tmp_path / "net.pt2")
    big = [value for value in program.state_dict.values() if value.numel() > 100]
    assert {value.dtype for value in big} == {torch.int8}
    assert sum(value.numel() for value in big) == sum(
        p.numel() for p in model.parameters() if p.ndim > 1 and p.numel() > 100
    )


@pytest.mark.parametrize("ending", [".onnx", ".pt2", pytest.param(".pte", marks=pytest.mark.slow), ".xml"])
def test_int8_of_a_residual_network_and_of_keywords(ending, residual, reader, tmp_path):
    needs(ending, int8=True)
    model, example = residual
    batch = torch.randn(70, 3, 32, 32)
    done = export(model, example, tmp_path / f"r{ending}", quantize="int8", calibration=[batch])
    assert (done.samples, done.data) == (70, "calibration")
    assert done.agreement > 0.9
    model, example = reader
    done = export(model, example, tmp_path / f"t{ending}", quantize="int8", calibration=[example, example])
    assert done.samples == 6
    assert done.max_abs_error > 1e-5


def test_int8_of_nothing_that_can_be_rounded_is_refused(tmp_path):
    needs(".pt2", int8=True)
    with pytest.raises(ValueError, match="nothing that int8 is made for"):
        export(nn.ReLU(), torch.randn(2, 4), tmp_path / "net.pt2", quantize="int8", calibration=[torch.randn(2, 4)])
    assert list(tmp_path.iterdir()) == []


class Airy(nn.Module):
    """An operator of PyTorch that no other runtime has."""

    def forward(self, x):
        return torch.special.airy_ai(x)


def odd():
    model = nn.Sequential()
    model.layer1 = nn.Linear(4, 4)
    model.layer3 = nn.Sequential(nn.ReLU(), Airy())
    model.head = nn.Linear(4, 3)
    return model


@pytest.mark.parametrize(("ending", "by"), [(".onnx", "ONNX opset 18"), (".pte", "ExecuTorch"), (".xml", "OpenVINO")])
def test_an_unsupported_operator_is_named_with_its_module_and_the_old_file_stays(ending, by, tmp_path):
    needs(ending)
    path = tmp_path / f"net{ending}"
    path.write_bytes(b"the old file")
    with pytest.raises(ExportError, match=rf"^layer3\.1: operator aten::special_airy_ai is not supported by {by}$"):
        export(odd(), torch.randn(2, 4), path)
    with pytest.raises(ExportError, match=r"^the model itself \(Airy\): operator aten::special_airy_ai is not"):
        export(Airy(), torch.randn(2, 4), path)
    twice = nn.Sequential(odd(), nn.Linear(3, 4), odd())
    with pytest.raises(ExportError, match=r"^0\.layer3\.1, 2\.layer3\.1: operator aten::special_airy_ai"):
        export(twice, torch.randn(2, 4), path)
    assert path.read_bytes() == b"the old file"
    assert list(tmp_path.iterdir()) == [path]


def test_pytorch_itself_runs_every_operator(tmp_path):
    assert export(odd(), torch.randn(2, 4), tmp_path / "net.pt2").max_abs_error < 1e-6


def test_an_operator_that_only_fails_when_run_is_named_too(tmp_path):
    needs(".pte")

    class Spectrum(nn.Module):
        def forward(self, x):
            return torch.fft.fft(x).real

    with pytest.raises(ExportError, match=r"^1: operator aten::_fft_r2c is not supported by executorch's runtime$"):
        export(nn.Sequential(nn.Linear(4, 4), Spectrum()), torch.randn(2, 4), tmp_path / "net.pte")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_traced_is_named_with_its_module(tmp_path):
    class Branch(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Branch(), nn.ReLU()))
    with pytest.raises(ExportError, match=r"^1\.0: torch\.export cannot trace it: .*data-dependent"):
        export(model, torch.randn(2, 4), tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_model_for_one_number_of_samples(tmp_path):
    class Three(nn.Module):
        def forward(self, x):
            return x.reshape(3, 2, -1).flatten(1)

    class Small(nn.Module):
        def forward(self, x):
            return x * len(x) if len(x) < 4 else x

    x = torch.randn(3, 4)
    with pytest.raises(ExportError, match=r"3 samples but not 1 .*; dynamic_batch=False exports it for 3"):
        export(Three(), x, tmp_path / "net.pt2")
    with pytest.raises(ExportError, match=r"it fixes the number of samples; dynamic_batch=False"):
        export(Small(), x, tmp_path / "net.pt2")
    assert list(tmp_path.iterdir()) == []
    assert export(Three(), x, tmp_path / "net.pt2", dynamic_batch=False).samples == 3


def test_the_most_samples_of_an_executorch_file(tmp_path):
    needs(".pte")
    model = nn.Linear(4, 3)
    x = torch.randn(40, 4)
    done = export(model, x[:2], tmp_path / "net.pte", max_batch=16, data=[x])
    assert done.samples == 40
    with open_exported(tmp_path / "net.pte") as run:
        assert run.batch == (1, 16)
        assert run(x[:16]).shape == (16, 3)
        with pytest.raises(RuntimeError):
            run(x[:17])
    for options in ({"max_batch": 1}, {"max_batch": 8, "dynamic_batch": False}):
        with pytest.raises(ValueError, match="max_batch is"):
            export(model, x, tmp_path / "net.pte", **options)
    with pytest.raises(ValueError, match=r"max_batch is 8: only \.pte"):
        export(model, x, tmp_path / "net.pt2", max_batch=8)


class Table(nn.Module):
    def forward(self, table, x):
        return x @ table.T


def test_a_tensor_that_is_no_batch_stays_so_when_the_batch_grows_to_its_size(tmp_path):
    needs(".pte")
    x, table = torch.randn(3, 4), torch.randn(8, 4)
    export(Table(), {"x": x, "table": table}, tmp_path / "net.pte", max_batch=8)
    with open_exported(tmp_path / "net.pte") as run:
        assert run(x=x[:2], table=table).shape == (2, 8)


@pytest.mark.parametrize("ending", [".onnx", ".pt2", ".xml"])
def test_a_table_beside_the_batch_is_fixed(ending, tmp_path):
    needs(ending)
    x, table = torch.randn(3, 4), torch.randn(8, 4)
    done = export(Table(), {"x": x, "table": table}, tmp_path / f"net{ending}")
    assert done.samples == 8
    with open_exported(tmp_path / f"net{ending}") as run:
        assert run.batch == (1, None)
        np.testing.assert_allclose(run(x=x[:1], table=table), (x[:1] @ table.T).numpy(), atol=1e-6)


def test_a_changed_file_of_any_format_is_found(tmp_path, monkeypatch):
    """The check reads the file, not the program that it was made from."""
    module = sys.modules["tutelage.deploy.formats.torch_export"]
    write = module.write

    def alter(program, file):
        program.state_dict["model.weight"] = torch.nn.Parameter(program.state_dict["model.weight"] + 0.5)
        write(program, file)

    monkeypatch.setattr(module, "write", alter)
    path = tmp_path / "net.pt2"
    path.write_bytes(b"the old file")
    with pytest.raises(ParityError, match=r"is 2 .*beyond the tolerance 0\.0001"):
        export(nn.Linear(4, 3), torch.ones(2, 4), path)
    assert path.read_bytes() == b"the old file"
    assert list(tmp_path.iterdir()) == [path]


def test_a_good_pair_of_openvino_files_survives_a_failure(tmp_path):
    needs(".xml")
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    export(model, x, tmp_path / "net.xml")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert before.keys() == {"net.xml", "net.bin"}
    with pytest.raises(ExportError):
        export(odd(), x, tmp_path / "net.xml")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    export(nn.Linear(4, 3), x, tmp_path / "net.xml")
    assert (tmp_path / "net.bin").read_bytes() != before["net.bin"]


def test_openvino_is_imported_without_what_reports_over_the_network(monkeypatch):
    module = sys.modules["tutelage.deploy.formats.openvino"]
    for name in ("openvino", "openvino_telemetry"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    seen = []
    monkeypatch.setattr(module, "require", lambda name, extra: seen.append((name, "openvino_telemetry" in sys.modules)))
    module.library()
    assert seen == [("openvino", True)]
    with pytest.raises(ImportError):
        import openvino_telemetry  # noqa: F401


def test_openvino_runs_with_its_stand_in_for_that():
    """Otherwise its name has changed, and the import above keeps nothing out."""
    needs(".xml")
    sys.modules["tutelage.deploy.formats.openvino"].library()
    utilities = pytest.importorskip("openvino.tools.ovc.telemetry_utils")
    assert utilities.tm.__name__.startswith("openvino.")


@pytest.mark.parametrize(
    ("ending", "missing", "int8", "extra"),
    [
        (".onnx", "onnxscript", False, "export"),
        (".pte", "executorch.exir", False, "executorch"),
        (".xml", "openvino", False, "openvino"),
        (".xml", "onnxruntime", True, "export"),
        (".pt2", "torchao.quantization.pt2e", True, "quantize"),
        (".pte", "torchao.quantization.pt2e", True, "quantize"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(ending, missing, int8, extra, tmp_path, monkeypatch):
    for package in INT8[ending] if int8 else PACKAGES[ending]:
        if package != missing.partition(".")[0] and importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    monkeypatch.setitem(sys.modules, missing, None)
    x = torch.randn(2, 4)
    options = {"quantize": "int8", "calibration": [x]} if int8 else {}
    with pytest.raises(ImportError, match=rf"'{missing}'.*pip install 'tutelage\[{extra}\]'"):
        export(nn.Linear(4, 3), x, tmp_path / f"net{ending}", **options)
    assert list(tmp_path.iterdir()) == []


def test_the_ending_chooses_and_a_wrong_one_names_the_others(tmp_path):
    x = torch.randn(2, 4)
    with pytest.raises(ValueError, match=r"net\.onx ends in '\.onx': expected \.onnx, .* or \.xml; nearest: '\.onnx'"):
        export(nn.Linear(4, 3), x, tmp_path / "net.onx")
    with pytest.raises(ValueError, match=r"net has no ending"):
        export(nn.Linear(4, 3), x, tmp_path / "net")
    assert export(nn.Linear(4, 3), x, tmp_path / "net.PT2").format == "torch.export"
    (tmp_path / "folder.pt2").mkdir()
    with pytest.raises(IsADirectoryError):
        export(nn.Linear(4, 3), x, tmp_path / "folder.pt2")


def test_the_opset_is_what_the_file_says(tmp_path):
    needs(".onnx")
    import onnx

    x = torch.randn(2, 4)
    assert export(nn.Linear(4, 3), x, tmp_path / "net.onnx", opset=20).opset == 20
    assert onnx.load(tmp_path / "net.onnx").opset_import[0].version == 20
    with pytest.raises(ExportError, match=r"opset is 99: .* opset \d+ only"):
        export(nn.Linear(4, 3), x, tmp_path / "new.onnx", opset=99)
    with pytest.raises(ValueError, match=r"opset is 18: only \.onnx files have one, not \.pt2"):
        export(nn.Linear(4, 3), x, tmp_path / "net.pt2", opset=18)
    assert [file.name for file in tmp_path.iterdir()] == ["net.onnx"]


def test_data_are_compared_up_to_so_many_samples(tmp_path):
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    taken = []

    def batches():
        for _ in range(9):
            taken.append(torch.randn(10, 4))
            yield taken[-1], torch.zeros(10)

    done = export(model, x, tmp_path / "net.pt2", data=batches(), samples=25)
    assert (done.samples, done.data, len(taken)) == (25, "given", 3)
    with pytest.raises(ValueError, match="data is empty"):
        export(model, x, tmp_path / "net.pt2", data=[])
    with pytest.raises(ValueError, match=r"data batch has samples of shape \(5,\), the example \(4,\)"):
        export(model, x, tmp_path / "net.pt2", data=[torch.randn(3, 5)])
    with pytest.raises(ValueError, match="samples is 0"):
        export(model, x, tmp_path / "net.pt2", data=[x], samples=0)


def test_a_difference_on_the_data_alone_is_found(tmp_path):
    class Other(nn.Module):
        """Differs from its traced form only where inputs are large."""

        def forward(self, x):
            return x + torch.relu(x - 10) if torch.compiler.is_compiling() else x

    x = torch.randn(2, 4)
    export(Other(), x, tmp_path / "net.pt2")
    with pytest.raises(ParityError, match="is 5 "):
        export(Other(), x, tmp_path / "net.pt2", data=[x + 0 * x, torch.full((1, 4), 15.0)])


def test_inputs_of_a_traced_program_have_the_names_of_the_arguments():
    program = trace(Reader(), {"attention_mask": torch.ones(2, 6), "input_ids": torch.zeros(2, 6, dtype=torch.long)})
    assert tuple(program.graph_signature.user_inputs) == ("attention_mask", "input_ids")


def test_an_archive_is_called_as_the_model_is(reader, tmp_path):
    model, example = reader
    export(model, example, tmp_path / "net.pt2")
    call = torch.export.load(tmp_path / "net.pt2").module()
    tensors = {name: value for name, value in example.items() if name != "scale"}
    np.testing.assert_allclose(call(**tensors).detach().numpy(), said(model, example), atol=1e-6)


def test_the_model_and_its_buffers_are_left_alone(images, tmp_path):
    model, example = images
    model.train()
    model[7].eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    needs(".pt2", int8=True)
    export(model, example, tmp_path / "net.pt2", quantize="int8", calibration=[example])
    assert model.training
    assert not model[7].training
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    model.train()


def test_what_a_file_leaves_out_is_said(tmp_path, capsys):
    export(SmallDetector(width=4), torch.zeros(2, 1, 48, 48), tmp_path / "detector.pt2")
    assert "has the logits alone, and not boxes" in " ".join(capsys.readouterr().err.split())
    export(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), torch.zeros(2, 1, 4, 4), tmp_path / "plain.pt2")
    assert "alone" not in capsys.readouterr().err
