from __future__ import annotations

import copy
import itertools
import os
import subprocess
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tutelage.speedup as speedup
from tutelage import KD, RKD, AttentionTransfer, Distillation, FitNets, Frozen, RouteConstrained, TaskLoss, Training
from tutelage.acceleration import AUTO, accelerated, known_speed
from tutelage.data import fashion_loaders
from tutelage.engine import fit
from tutelage.knowledge.feature.jacobian import Jacobian
from tutelage.models import SmallCNN, resnet8
from tutelage.recipe import RecipeError, load
from tutelage.record import Record
from tutelage.speedup import Deviation, choose, time_ratio
from tutelage.taps import Observer
from tutelage.views import Inputs, read_batch

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randn(12, 1, 28, 28, generator=GENERATOR), torch.arange(12) % 10


def warmed(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """Running statistics and scales that are not those of an untrained batch norm."""
    generator = torch.Generator().manual_seed(1)
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(images * 2 + 0.3)
        for layer in network.modules():
            if isinstance(layer, nn.BatchNorm2d) and layer.affine:
                layer.weight.copy_(torch.rand(layer.weight.shape, generator=generator) + 0.5)
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator) * 0.3)
    return network.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def trained():
    """A teacher that has learned something, and real images."""
    torch.manual_seed(0)
    data = fashion_loaders(limit=600, batch_size=60)
    teacher = SmallCNN(width=12)
    fit(Distillation(teacher), data.train, training=Training(epochs=3, lr=0.1, progress=False, cpu=True))
    images = torch.cat([images for images, *_ in itertools.islice(iter(data.test), 3)])
    return teacher.eval().requires_grad_(False), images


def observed(network: nn.Module, images: torch.Tensor, *reads: str) -> tuple[Observer, Inputs, Record]:
    plain, inputs = Observer(network, reads), Inputs((images,))
    with torch.no_grad():
        return plain, inputs, plain.dry_run(inputs)


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def clock(monkeypatch, seconds):
    """A clock that goes by what a form is made of: ``seconds(names)``."""

    def names(form):
        return getattr(form, "names", ())

    monkeypatch.setattr(speedup, "time_ratio", lambda one, two, inputs: seconds(names(one)) / seconds(names(two)))


# what an accelerated network says


@pytest.mark.parametrize(
    ("names", "error"),
    [(["fold"], 1e-5), (["channels_last"], 1e-5), (["bf16"], 0.02), (AUTO, 0.02)],
    ids=lambda value: "-".join(value) if not isinstance(value, float) else "",
)
def test_a_trained_teacher_says_the_same_within_its_bound(trained, names, error):
    teacher, images = trained
    plain, inputs, said = observed(teacher, images, "stage1", "stage3", "linear:input", "@logits")
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    modules = {name: type(module) for name, module in teacher.named_modules()}
    with torch.no_grad():
        form = accelerated(plain, names, inputs)
        found = Deviation.between(said, form(inputs), [a.text for a in plain.addresses])
    assert found.error < error
    assert found.divergence < 1e-3
    assert all(tensor.dtype == torch.float32 for tensor in form(inputs).taps.values())
    assert same(before, teacher.state_dict())
    assert modules == {name: type(module) for name, module in teacher.named_modules()}
    layers = list(form.observer.model.modules())
    assert any(isinstance(m, nn.BatchNorm2d) for m in layers) == ("fold" not in names)
    weight = next(m.weight for m in layers if isinstance(m, nn.Conv2d) and m.in_channels > 1)
    assert (weight.dtype == torch.bfloat16) == ("bf16" in names)
    assert weight.is_contiguous(memory_format=torch.channels_last) == ("channels_last" in names)
    assert not {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in form.observer.model.parameters()}


@pytest.mark.parametrize("library", ["timm", "torchvision", "package"])
def test_published_networks_keep_their_taps(library):
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    if library == "timm":
        network = pytest.importorskip("timm").create_model("resnet10t", num_classes=10)
        reads = ["layer1", "layer2.0.bn1", "layer2.0.conv2:input", "layer4", "@logits"]
    elif library == "torchvision":
        network = pytest.importorskip("torchvision").models.mobilenet_v2(num_classes=10, width_mult=0.5)
        reads = ["features.3", "features.5.conv.0", "features.18", "@logits"]
    else:
        network, reads = resnet8(), ["layer1", "layer3.0", "@logits"]
    plain, inputs, said = observed(warmed(network, images), images, *reads)
    with torch.no_grad():
        form = accelerated(plain, ["channels_last", "fold"], inputs)
        exact = Deviation.between(said, form(inputs), reads)
        rounded = Deviation.between(said, accelerated(plain, AUTO, inputs)(inputs), reads)
    assert exact.error < 1e-4
    assert rounded.error < 0.05
    assert rounded.divergence < 0.01
    norms = [sum(isinstance(m, nn.BatchNorm2d) for m in n.modules()) for n in (network, form.observer.model)]
    assert norms[1] == 0 < norms[0]


# folding


class Wired(nn.Module):
    """A convolution and a batch norm of each kind that may or may not be folded."""

    def __init__(self):
        super().__init__()
        self.plain, self.plain_norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.twice_read, self.twice_read_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.twice_called, self.twice_called_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.block, self.block_norm = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 4, 1)), nn.BatchNorm2d(4, affine=False)
        self.batch, self.batch_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)
        self.hooked, self.hooked_norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.hooked.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
        self.linear = nn.Linear(4, 10)

    def forward(self, x):
        x = self.plain_norm(self.plain(x)).relu()
        y = self.twice_read(x)
        x = self.twice_read_norm(y) + y
        x = self.twice_called_norm(self.twice_called(self.twice_called(x)))
        x = self.block_norm(self.block(x))
        x = self.batch_norm(self.batch(x))
        x = self.hooked_norm(self.hooked(x))
        return self.linear(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("reads", "folded"),
    [
        ([], {"plain", "block"}),
        (["plain"], {"block"}),
        (["plain_norm:input"], {"block"}),
        (["plain_norm", "plain:input", "block:input"], {"plain", "block"}),
        (["block"], {"plain"}),
        (["block.1"], {"plain"}),
        ([":input", "linear:input"], {"plain", "block"}),
    ],
)
def test_a_batch_norm_is_folded_only_where_nobody_reads_between(reads, folded):
    torch.manual_seed(0)
    images = torch.randn(8, 1, 8, 8)
    plain, inputs, said = observed(warmed(Wired(), images), images, *reads, "@logits")
    with torch.no_grad():
        form = accelerated(plain, ["fold"], inputs)
        found = Deviation.between(said, form(inputs), [*reads, "@logits"])
    assert found.error < 1e-5
    network = form.observer.model
    names = ("plain", "twice_read", "twice_called", "block", "batch", "hooked")
    assert {n for n in names if isinstance(getattr(network, f"{n}_norm"), nn.Identity)} == folded


def test_in_place_layers_behind_a_folded_norm_do_not_corrupt_a_tap():
    torch.manual_seed(0)
    network = warmed(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True)), IMAGES[0])
    outer = nn.Sequential(nn.Sequential(network[0], network[1]), network[2], nn.Flatten(), nn.Linear(4 * 26 * 26, 10))
    plain, inputs, said = observed(outer.eval(), IMAGES[0], "0", "@logits")
    with torch.no_grad():
        form = accelerated(plain, ["fold"], inputs)
        for _ in range(2):  # a dry run, and one that knows what to copy
            torch.testing.assert_close(form(inputs)["0"], said["0"])
    assert isinstance(form.observer.model[0][1], nn.Identity)
    assert (said["0"] < 0).any()


# how far it may be


def test_deviation_is_that_of_a_loop():
    p, q = torch.randn(2, 3, 4, 4, generator=GENERATOR), torch.randn(2, 3, 4, 4, generator=GENERATOR)
    values = []
    for n, y, x in itertools.product(range(2), range(4), range(4)):  # classes at axis 1, a sample is a pixel
        a, b = p[n, :, y, x].softmax(0), q[n, :, y, x].softmax(0)
        values.append(sum(float(a[k]) * float((a[k] / b[k]).log()) for k in range(3)))
    found = Deviation.between(Record(p, {"f": p}), Record(q, {"f": q}), ["f"])
    assert found.divergence == pytest.approx(sum(values) / len(values), rel=1e-4)
    assert found.error == pytest.approx(float((p - q).norm() / p.norm()), rel=1e-5)


@pytest.mark.parametrize(
    "other", [torch.full((2, 3), float("nan")), torch.zeros(2, 4), torch.full((2, 3), float("inf"))]
)
def test_what_cannot_be_compared_is_within_no_bound(other):
    for reads in (["@logits"], ["good", "bad"]):
        plain, odd = Record(torch.ones(2, 3)), Record(other if reads == ["@logits"] else torch.ones(2, 3))
        plain.taps = {"good": torch.ones(2), "bad": torch.ones(2, 3)}
        odd.taps = {"good": torch.full((2,), 1.1), "bad": other}
        assert not Deviation.between(plain, odd, reads).within(1e9, 1e9)


def test_a_dead_layer_that_comes_alive_is_within_no_bound():
    dead, alive = Record(None, {"f": torch.zeros(2)}), Record(None, {"f": torch.full((2,), 1e-30)})
    assert not Deviation.between(dead, alive, ["f"]).within(1e9, 1e9)
    assert Deviation.between(dead, dead, ["f"]).within(0, 0)


def test_a_bound_of_nothing_lets_nothing_pass_that_changes_a_bit(trained, capsys):
    teacher, images = trained
    for bounds in ((0.0, 1.0), (1.0, 0.0)):
        for name in AUTO:
            plain, inputs, said = observed(teacher, images[:40], "@logits")
            with torch.no_grad():
                chosen = choose(plain, inputs, (name,), *bounds)
                exact = torch.equal(accelerated(plain, [name], inputs)(inputs).logits, said.logits)
            assert (chosen is None) != exact, name
        assert not exact  # folding rounds anew
    assert "left out: fold (KL " in capsys.readouterr().err


def test_a_named_acceleration_beyond_the_bound_is_left_out_and_the_others_stay(trained, capsys):
    teacher, images = trained
    plain, inputs, _ = observed(teacher, images[:40], "@logits")
    with torch.no_grad():
        form = choose(plain, inputs, AUTO, 1e-9, 1e-4)
    assert form.names == ("channels_last", "fold")
    assert "left out: bf16 (KL " in capsys.readouterr().err


# which ones pay


def test_auto_keeps_what_pays(trained, monkeypatch, capsys):
    teacher, images = trained
    plain, inputs, _ = observed(teacher, images[:20], "@logits")

    def chosen(seconds):
        clock(monkeypatch, seconds)
        with torch.no_grad():
            form = choose(plain, inputs, "auto", 0.01, 0.05)
        return form and form.names

    cost = {"bf16": 0.5, "channels_last": 0.99, "fold": 0.9}
    assert chosen(lambda names: float(torch.tensor([cost[n] for n in names]).prod())) == ("bf16", "fold")
    assert "SmallCNN: bf16 + fold, 2.2 times as fast (KL " in capsys.readouterr().err
    # alone neither gains anything, and together they do: depthwise convolutions
    assert chosen(lambda names: 0.5 if {"bf16", "channels_last"} <= set(names) else 1.0) == ("bf16", "channels_last")
    assert chosen(lambda names: 1.0 + len(names)) is None
    assert "SmallCNN: plain: nothing faster" in capsys.readouterr().err
    assert chosen(lambda names: 0.97 if names else 1.0) is None


def test_the_clock_gives_up_on_what_is_far_slower():
    calls = {"slow": 0, "fast": 0}
    seconds = {"slow": 0.05, "fast": 0.0}

    def call(name):
        def run(inputs):
            calls[name] += 1
            time.sleep(seconds[name])

        return run

    assert time_ratio(call("slow"), call("fast"), Inputs()) > 2
    assert calls == {"slow": 1, "fast": 1}


def test_a_network_that_allows_nothing_teaches_as_it_is(capsys):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x) * (1 if x.sum() > 0 else 2)  # cannot be traced

        def __deepcopy__(self, memo):
            raise TypeError("no copies")

    teacher, batch = Odd(), torch.randn(5, 4)
    for speed in ("auto", ["fold"]):
        d = Distillation(nn.Linear(4, 3), Frozen(teacher, speed=speed), [KD()]).bind(batch)
        plain = Distillation(d.student, teacher, [KD()]).bind(batch)
        assert d(batch)["KD"] == plain(batch)["KD"]
    assert "left out: fold (no copies)" in capsys.readouterr().err


def test_choosing_draws_no_random_numbers(trained):
    teacher, images = trained
    plain, inputs, _ = observed(teacher, images[:8], "@logits")
    torch.manual_seed(3)
    with torch.no_grad():
        choose(plain, inputs, "auto", 0.01, 0.05)
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))


# the role


def steps(teacher, losses, batch, number=3):
    torch.manual_seed(0)
    student = SmallCNN(width=4)
    d = Distillation(student, teacher, losses).bind(batch).train()
    optimizer = torch.optim.SGD(d.parameters(), lr=0.05)
    values = []
    for _ in range(number):
        losses = d(batch)
        losses.total.backward()
        values.append({k: float(v) for k, v in losses.values.items()})
        optimizer.step()
        optimizer.zero_grad()
    return d, values


def many():
    return [
        TaskLoss(),
        KD(temperature=4),
        AttentionTransfer("stage2", weight=10),
        FitNets("stage3"),
        RKD("linear:input"),
    ]


def test_any_losses_learn_from_an_accelerated_teacher(trained):
    teacher, images = trained
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    batch = images[:40], torch.arange(40) % 10
    _, plain = steps(teacher, many(), batch)
    d, fast = steps(Frozen(teacher, speed=AUTO), many(), batch)
    assert d.teacher.own_state()["chosen"] == list(AUTO)
    assert fast[0] != plain[0]
    for one, two in zip(fast, plain, strict=True):
        assert one == pytest.approx(two, rel=0.03)
    assert d.teacher.module is teacher
    assert same(before, teacher.state_dict())
    assert all(p.dtype == torch.float32 and p.grad is None for p in teacher.parameters())
    held = {p.data_ptr() for p in d.teacher._form.observer.model.parameters()}
    assert not held & {t.data_ptr() for t in (*d.parameters(), *d.buffers())}
    assert not any(type(m) is nn.Identity for m in teacher.modules())


def test_plain_is_what_it_always_was(trained):
    teacher, images = trained
    batch = images[:40], torch.arange(40) % 10
    d, one = steps(Frozen(teacher, speed="plain"), many(), batch)
    assert (d.teacher._form, d.teacher.own_state()) == (None, {})
    assert one == steps(teacher, many(), batch)[1] == steps(Frozen(teacher, speed=[]), many(), batch)[1]


def test_losses_that_derive_the_teacher_get_the_plain_one(trained):
    teacher, images = trained
    batch = images[:20], torch.arange(20) % 10
    d, values = steps(Frozen(teacher, speed=["bf16"]), [Jacobian()], batch, number=2)
    assert values == steps(teacher, [Jacobian()], batch, number=2)[1]
    assert d.teacher._form is None


def test_the_copy_follows_the_network_to_other_types_and_weights(trained):
    teacher, images = copy.deepcopy(trained[0]), trained[1]
    batch = images[:20].double()
    d = Distillation(SmallCNN(width=4), Frozen(teacher, speed=["fold"]), [KD()]).bind(images[:20])
    d(images[:20])
    d.double().eval()
    plain = Distillation(d.student, copy.deepcopy(teacher), [KD()]).bind(batch).eval()
    torch.testing.assert_close(d(batch)["KD"], plain(batch)["KD"])
    assert d.teacher._form.observer.model.linear.weight.dtype == torch.float64
    with torch.no_grad():
        teacher.linear.bias[0] += 1
    said = []
    for role in (d.teacher, Frozen(teacher)):
        again = Distillation(d.student, role, [KD()]).bind(batch).eval()  # binding chooses anew
        said.append(again(batch)["KD"])
    torch.testing.assert_close(*said)


def test_a_route_still_goes_its_way(trained):
    teacher, images = copy.deepcopy(trained[0]), trained[1]
    early = {k: v * 0.5 if v.is_floating_point() else v for k, v in teacher.state_dict().items()}
    d = Distillation(SmallCNN(width=4), RouteConstrained(teacher, [early]), [KD()]).bind(images[:20])
    begin = d(images[:20])["KD"]
    d.progress = 0.9
    assert d(images[:20])["KD"] != begin


def test_a_resumed_run_takes_the_stored_choice(trained, tmp_path, monkeypatch):
    teacher, images = trained
    batches = [(images[i : i + 20], torch.arange(20) % 10) for i in range(0, 100, 20)]
    clock(monkeypatch, lambda names: 0.5 if "bf16" in names else 1.0)

    def train(out, cut=None, resume=False, speed="auto"):
        class Cut(torch.optim.SGD):
            count = 0

            def step(self, closure=None):
                if self.count == cut:
                    raise OSError("power cut")
                self.count += 1
                return super().step(closure)

        torch.manual_seed(0)
        d = Distillation(SmallCNN(width=4), Frozen(teacher, speed=speed), [KD(), FitNets("stage2")])
        training = Training(epochs=3, optimizer=lambda p: Cut(p, lr=0.05), checkpoint_every=2, progress=False, cpu=True)
        return d, fit(d, batches, training=training, out=out, resume=resume)

    whole, expected = train(tmp_path / "whole")
    assert whole.teacher.own_state()["chosen"] == ["bf16"]
    with pytest.raises(OSError, match="power cut"):
        train(tmp_path / "cut", cut=8)
    clock(monkeypatch, lambda names: 2.0 if "bf16" in names else 1.0)  # today the machine is busy
    monkeypatch.setattr("tutelage.teachers.choose", lambda *_: pytest.fail("measured again"))
    resumed, run = train(tmp_path / "cut", resume=True)
    assert same(run.last, expected.last)
    assert [line.losses for line in run.history] == [line.losses for line in expected.history]
    assert resumed.teacher.own_state() == whole.teacher.own_state()
    with pytest.raises(ValueError, match=r"speed='plain': the run was begun with 'auto'; expected the same to resume"):
        train(tmp_path / "cut", resume=True, speed="plain")


def test_several_processes_have_the_first_ones_choice(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(
        "import sys, torch, torch.distributed as dist, tutelage.speedup as speedup\n"
        "from torch import nn\n"
        "from tutelage import KD, Distillation, Frozen\n"
        "rank = int(sys.argv[1])\n"
        "dist.init_process_group('gloo', init_method='file://' + sys.argv[2], rank=rank, world_size=2)\n"
        "def time(form): return (0.5 if rank == 0 else 2.0) if getattr(form, 'names', ()) else 1.0\n"
        "speedup.time_ratio = lambda one, two, inputs: time(one) / time(two)\n"
        "torch.manual_seed(0)\n"
        "d = Distillation(nn.Linear(4, 3), Frozen(nn.Linear(4, 3), speed='auto'), [KD()]).bind(torch.ones(2, 4))\n"
        "d(torch.ones(2, 4) * (rank + 1))\n"
        "open(sys.argv[2] + str(rank), 'w').write(str(d.teacher.own_state()['chosen']))\n"
        "dist.destroy_process_group()\n"
    )
    command = [sys.executable, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen([*command, str(r), str(tmp_path / "at")], env=environment) for r in range(2)]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    assert [(tmp_path / f"at{r}").read_text() for r in range(2)] == ["['bf16']"] * 2


# those of other packages


def test_int8_answers_and_is_the_same_after_a_resume(trained, capsys):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    teacher, images = trained
    batch = read_batch(images)
    role = Frozen(teacher, speed=["int8"], max_divergence=0.1, max_error=0.2)
    role.bind(SmallCNN(width=4), ["@logits"], ["@logits"])
    first, fast = (role.lessons(batch, Record())[0].teacher.logits for _ in range(2))
    assert torch.equal(first, teacher(images))
    found = Deviation.between(Record(first), Record(fast), ["@logits"])
    assert 0 < found.divergence < 0.1
    assert (first.argmax(1) == fast.argmax(1)).float().mean() > 0.9
    later = Frozen(teacher, speed=["int8"], max_divergence=0.1, max_error=0.2)
    later.bind(SmallCNN(width=4), ["@logits"], ["@logits"])
    later.lessons(batch, Record())
    later.load_own_state(role.own_state())
    some = read_batch(images[:7])
    answers = [r.lessons(some, Record())[0].teacher.logits for r in (role, later)]
    assert torch.equal(*answers)
    assert "SmallCNN: int8, " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "reason"),
    [("int8", "only where nothing but @logits is read"), ("compile", "only where nothing inside the network is read")],
)
def test_what_cannot_be_tapped_is_left_out(trained, name, reason, capsys):
    teacher, images = trained
    plain, inputs, _ = observed(teacher, images, "stage1", "@logits")
    with torch.no_grad():
        assert choose(plain, inputs, (name,), 0.01, 0.05) is None
    assert f"left out: {name} ({reason})" in capsys.readouterr().err


@pytest.mark.slow
def test_a_compiled_teacher_says_the_same(trained):
    teacher, images = trained
    plain, inputs, said = observed(teacher, images, "@logits")
    with torch.no_grad():
        form = choose(plain, inputs, ("bf16", "compile"), 0.01, 0.05)
        fewer = form(Inputs((images[:9],))).logits  # the last batch of an epoch
    if form.names != ("bf16", "compile"):
        pytest.skip("torch.compile finds no compiler here")
    assert F.kl_div(fewer.log_softmax(1), said.logits[:9].softmax(1), reduction="batchmean") < 0.01


# what is refused


@pytest.mark.parametrize(
    ("speed", "message"),
    [
        ("atuo", r"speed='atuo': expected 'plain', 'auto' or a list of bf16, .*int8; nearest: 'auto'"),
        ("bf16", r"speed='bf16': expected 'plain', 'auto' or a list of bf16"),
        (["fold", "bfloat16"], r"speed='bfloat16': expected one of bf16, .*; nearest: 'bf16'"),
        (["int8", "bf16"], r"speed=\['int8', 'bf16'\]: int8 is a file of its own; expected it alone"),
    ],
)
def test_unknown_speeds_are_refused(speed, message):
    with pytest.raises(ValueError, match=message):
        Frozen(nn.Linear(2, 2), speed=speed)


@pytest.mark.parametrize("field", ["max_divergence", "max_error"])
def test_negative_bounds_are_refused(field):
    for value in (-0.1, float("nan")):
        with pytest.raises(ValueError, match=rf"{field}={value}: expected 0 or more"):
            Frozen(nn.Linear(2, 2), **{field: value})


def test_a_recipe_can_ask_for_it():
    recipe = {
        "student": {"class_path": "SmallCNN", "init_args": {"width": 4}},
        "data": {"class_path": "fashion_loaders", "init_args": {"limit": 100}},
        "training": {"epochs": 1},
    }

    def teacher(speed):
        inner = {"class_path": "SmallCNN", "init_args": {"width": 8}}
        given = {"class_path": "Frozen", "init_args": {"module": inner, "speed": speed}}
        return load({**recipe, "teacher": given}).keywords["teacher"]

    assert teacher("auto").speed == "auto"
    assert teacher(["fold", "bf16"]).speed == known_speed(["bf16", "fold"]) == ("bf16", "fold")
    with pytest.raises(RecipeError, match=r"speed.*atuo.*auto"):
        teacher("atuo")
