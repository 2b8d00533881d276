from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tutelage import (
    KD,
    Altered,
    Cached,
    Distillation,
    FitNets,
    Frozen,
    Jacobian,
    LogitRegression,
    TaskLoss,
    TopKKD,
    cache_files,
    cache_folder,
)
from tutelage.cache_files import DamagedCache, Rows
from tutelage.cache_folder import Cache, Held
from tutelage.data import ArrayLoader, CropFlip, Indexed, replayed
from tutelage.distilling import distill
from tutelage.fingerprint import fingerprint
from tutelage.run import Interrupted
from tutelage.views import read_batch

SCRIPT = Path(__file__).with_name("cache_cases.py")
spec = importlib.util.spec_from_file_location("cache_cases", SCRIPT)
cases = importlib.util.module_from_spec(spec)
sys.modules["cache_cases"] = cases
spec.loader.exec_module(cases)


def launch(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *map(str, command)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def equal(first, second):
    weights, losses = first
    assert weights.keys() == second[0].keys()
    for name in weights:
        assert torch.equal(weights[name], second[0][name]), name
    assert losses == second[1]


class Counted(nn.Module):
    """A network that says how many samples it was asked about."""

    def __init__(self, network):
        super().__init__()
        self.network, self.asked = network, 0

    def forward(self, x):
        self.asked += len(x)
        return self.network(x)


def everything(folder):
    """The logits of every row of both views."""
    held = Cache(folder)
    records, there = held.read(["@logits"], np.arange(96))
    assert there.all()
    return held.decode("@logits", records["@logits"])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    cases.filled(folder)
    return folder


# the same training


@pytest.mark.parametrize("loader", [cases.arrays, cases.items], ids=["arrays", "items"])
@pytest.mark.parametrize("changes", [{}, {"accumulate": 3}], ids=["plain", "accumulated"])
def test_a_lossless_cache_is_the_teacher_itself(loader, changes, tmp_path):
    teacher = Counted(cases.exact())
    live = cases.train(Frozen(teacher), loader(), **changes)
    asked, teacher.asked = teacher.asked, 0
    equal(cases.train(Cached(teacher, str(tmp_path), "float32"), loader(), **changes), live)
    # once for each view of a sample; the live one in each epoch, twice on its first batch for the gradient's shares,
    # and in the dry run
    assert asked == 4 * (48 + 8) + 8
    assert teacher.asked == 2 * 48
    teacher.asked = 0
    equal(cases.train(Cached(teacher, str(tmp_path), "float32"), loader(size=8), **changes), live)
    assert teacher.asked == 0


def test_workers_read_what_was_kept_without_them(tmp_path):
    live = cases.train(Cached(cases.exact(), str(tmp_path), "float32"), cases.items())
    equal(cases.train(Cached(cases.exact(), str(tmp_path), "float32"), cases.items(workers=2)), live)


@pytest.mark.parametrize("at", [4, 9, 20])
def test_a_run_stopped_inside_an_epoch_goes_on_exactly(at, tmp_path):
    class Cut(torch.optim.SGD):
        count = 0

        def step(self, closure=None):
            if self.count == at:
                raise OSError("power cut")
            self.count += 1
            return super().step(closure)

    sgd = {"momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "lr": 0.002}
    whole = cases.train(cases.exact(), cases.arrays(), optimizer=lambda p: torch.optim.SGD(p, **sgd))
    role = Cached(cases.exact(), str(tmp_path / "cache"), "float32")
    with pytest.raises(OSError, match="power cut"):
        cases.train(role, cases.arrays(), tmp_path / "run", optimizer=lambda p: Cut(p, **sgd), checkpoint_every=1)
    again = Cached(cases.exact(), str(tmp_path / "cache"), "float32")
    options = {"optimizer": lambda p: torch.optim.SGD(p, **sgd), "checkpoint_every": 1, "resume": True}
    equal(cases.train(again, cases.arrays(), tmp_path / "run", **options), whole)


def test_two_processes_fill_and_read_one_cache(tmp_path):
    launch("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, SCRIPT, "shared", tmp_path)
    for rank in (0, 1):
        for name, (live, first, second) in torch.load(tmp_path / f"rank{rank}.pt", weights_only=False).items():
            equal(first, live)
            equal(second, live)
            assert Cache(tmp_path / name).held()[0].rows == 96


def test_runs_with_other_losses_and_seeds_share_a_cache(tmp_path):
    teacher = Counted(cases.exact())
    cases.train(Cached(teacher, str(tmp_path)), cases.arrays())
    teacher.asked = 0
    cases.train(Cached(teacher, str(tmp_path)), cases.arrays(size=12), seed=7, losses=[KD(temperature=4.0)])
    assert teacher.asked == 0
    hint = [KD(), FitNets(("3", "network.2"), weight=1e-4)]
    cases.train(Cached(teacher, str(tmp_path)), cases.arrays(), losses=hint)
    assert teacher.asked == 96  # a tensor that was not kept before
    found = {line.address: line.rows for line in Cache(tmp_path).held()}
    assert found == {"@logits": 96, "network.2": 96}


def test_features_are_kept_in_half_precision(tmp_path):
    losses = [TaskLoss(), FitNets(("3", "2"))]  # nobody reads the logits
    batch = next(iter(cases.arrays()))
    role = Cached(cases.exact(), str(tmp_path))
    Distillation(cases.student(), role, losses).bind(batch)
    (lesson,) = role.lessons(batch, None)
    true = cases.exact()[:3](batch.teacher.args[0])
    assert lesson.teacher.output is None
    assert torch.equal(lesson.teacher["2"], true.half().float())


def test_distill_evaluates_and_reports_the_network_itself(tmp_path):
    data, validation = cases.arrays(), [(torch.from_numpy(cases.IMAGES).permute(0, 3, 1, 2).float(), cases.LABELS)]
    validation = [(x, torch.from_numpy(y)) for x, y in validation]
    teacher = cases.exact()
    role = Cached(teacher, str(tmp_path), "int8")
    result = distill(cases.student(), role, data, validation, epochs=1, progress=False, cpu=True)
    assert result.teacher is teacher
    assert result.metrics.agreement is not None
    assert result.teacher_metrics.samples == 48


def test_bfloat16_trainings_keep_what_the_network_says_in_float32(tmp_path):
    cases.train(Cached(cases.exact(), str(tmp_path), "float32"), cases.arrays(), precision="bf16", epochs=2)
    inputs = next(iter(cases.arrays(48)))
    order = inputs.ids.argsort()
    assert torch.equal(everything(tmp_path)[0::2], cases.exact()(inputs.student.args[0]).detach()[order])


# what is kept


def test_the_manifest_says_what_it_is(whole):
    fields = json.loads((whole / "manifest.json").read_text())
    assert fields["teacher"] == {"class": "Sequential", "sha256": fingerprint(cases.exact())}
    assert (fields["seed"], fields["views"], fields["codec"]) == (5, 2, {"name": "float32"})
    assert fields["tensors"]["@logits"]["shape"] == [3]
    assert fields["measured"][0] == {
        "address": "@logits",
        "rows": 96,
        "row_bytes": 24,
        "float32_bytes": 12,
        "nats": 0.0,
        "most_nats": 0.0,
        "mass": None,
    }
    assert Cache(whole).held() == [Held("@logits", 96, 24, 12, 0.0, 0.0)]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"teacher": 2}, r"of teacher Sequential [0-9a-f]{12}, and this is teacher Sequential [0-9a-f]{12}: take"),
        ({"seed": 6}, "of seed 5, and this is seed 6"),
        ({"views": 3}, "of views 2, and this is views 3"),
        ({"codec": "int8"}, "of codec float32, and this is codec int8"),
        ({"codec": "top_k", "k": 2}, r"of codec float32, and this is codec top_k, k=2, temperature=1.0"),
    ],
    ids=["teacher", "seed", "views", "codec", "k"],
)
def test_a_cache_of_something_else_is_refused(change, match, whole):
    before = sorted((f.name, f.read_bytes()) for f in whole.iterdir())
    loader = cases.arrays(**{k: v for k, v in change.items() if k in ("seed", "views")})
    options = {k: v for k, v in change.items() if k in ("codec", "k")}
    role = Cached(cases.exact(change.get("teacher", 1)), str(whole), **{"codec": "float32", **options})
    with pytest.raises(ValueError, match=match):
        Distillation(cases.student(), role, [KD(temperature=1.0)]).bind(next(iter(loader)))
    assert sorted((f.name, f.read_bytes()) for f in whole.iterdir()) == before


def test_another_k_and_temperature_are_refused_and_one_format_is_read(tmp_path):
    batch = next(iter(cases.arrays()))

    def bound(**options):
        role = Cached(cases.exact(), str(tmp_path), "top_k", **options)
        Distillation(cases.student(), role, [KD(temperature=options["temperature"])]).bind(batch)

    bound(k=2, temperature=2.0)
    with pytest.raises(ValueError, match=r"k=2, temperature=2.0, and this is codec top_k, k=1, temperature=2.0"):
        bound(k=1, temperature=2.0)
    with pytest.raises(ValueError, match=r"this is codec top_k, k=2, temperature=3.0"):
        bound(k=2, temperature=3.0)
    held = Cache(tmp_path)
    fields = {**json.loads(held.manifest.read_text()), "format": 2}
    fields.pop("checksum")
    held.manifest.write_text(json.dumps({**fields, "checksum": cache_folder._checksum(fields)}))
    with pytest.raises(ValueError, match="has format 2, and this version reads 1"):
        bound(k=2, temperature=2.0)
    with pytest.raises(FileNotFoundError, match="there is none"):
        Cache(tmp_path / "nowhere")


def test_other_inputs_than_those_that_were_kept_are_refused(whole, tmp_path):
    role = Cached(cases.exact(), str(whole), "float32")
    batch = next(iter(cases.arrays()))
    noisy = Altered(teacher=lambda x: x + 1)
    with pytest.raises(ValueError, match=r"made of other inputs than sample \d+, view 0 has now: .*replayed"):
        Distillation(cases.student(), role, [KD()], noisy).bind(batch)
    quiet = Altered(student=lambda x: x + torch.rand_like(x))  # what the student sees is its own affair
    Distillation(cases.student(), role, [KD()], quiet).bind(batch)
    # augmented by something that is not replayed: the first batch is kept, the second time it is another
    plain = ArrayLoader(cases.IMAGES, cases.LABELS, batch_size=48, augment=CropFlip(2))
    cached = Distillation(cases.student(), Cached(cases.exact(), str(tmp_path)), [KD()])
    cached.bind(next(iter(plain)))
    with pytest.raises(ValueError, match="sample 0 has now"):
        cached(next(iter(plain)))


def test_data_without_augmentation_need_ids_alone(tmp_path):
    data = torch.utils.data.TensorDataset(torch.from_numpy(cases.IMAGES).permute(0, 3, 1, 2).float(), torch.zeros(48))
    loader = torch.utils.data.DataLoader(Indexed(data), batch_size=16, shuffle=True)
    teacher = Counted(cases.exact())
    cases.train(Cached(teacher, str(tmp_path)), loader, losses=[KD()])
    assert teacher.asked == 48
    assert Cache(tmp_path).about["seed"] is None
    with pytest.raises(ValueError, match=r"needs sample ids.*Indexed"):
        Distillation(cases.student(), Cached(teacher, str(tmp_path)), [KD()]).bind((data.tensors[0], data.tensors[1]))


def test_what_a_cache_cannot_teach_is_refused(tmp_path):
    batch = next(iter(cases.arrays()))

    def bind(losses, at=batch, **options):
        Distillation(cases.student(), Cached(cases.exact(), str(tmp_path / "none"), **options), losses).bind(at)

    with pytest.raises(ValueError, match=r"Jacobian derives the teacher's outputs.*a cache does not hold"):
        bind([Jacobian()])
    with pytest.raises(ValueError, match=r"KD has temperature 4.0, and the cache keeps .* at temperature 1.0"):
        bind([KD(temperature=4.0)], codec="top_k")
    with pytest.raises(ValueError, match="LogitRegression has no temperature"):
        bind([LogitRegression()], codec="top_k")
    bind([TaskLoss(), TopKKD(k=2, temperature=2.0)], codec="top_k", k=2, temperature=2.0)
    twice = cases.Cached(cases.exact(), str(tmp_path / "twice"))
    views = Altered(teacher=lambda x: torch.cat([x, x]))
    with pytest.raises(ValueError, match=r"the teacher sees .* where the batch has 8 ids"):
        Distillation(cases.student(), twice, [KD()], views).bind(batch)
    with pytest.raises(ValueError, match="the id -1"):
        bind([KD()], (batch.student.args[0], batch.labels, batch.ids - batch.ids.min() - 1))
    with pytest.raises(ValueError, match="codec='zip': expected one of float32"):
        Cached(cases.exact(), "x", "zip")
    with pytest.raises(ValueError, match="k=0"):
        Cached(cases.exact(), "x", k=0)
    with pytest.raises(ValueError, match="temperature=0"):
        Cached(cases.exact(), "x", temperature=0)
    with pytest.raises(TypeError, match=r"expected an nn.Module"):
        Cached(3, "x")


def test_rows_of_another_size_and_numbers_that_cannot_be_kept_are_refused(tmp_path):
    held = Cache(tmp_path, {"teacher": {}, "seed": 0, "views": 1, "codec": {"name": "float16"}})
    keys, marks = np.arange(2), np.zeros(2, np.uint32)
    held.write("@logits", keys, torch.zeros(2, 3), marks)
    with pytest.raises(ValueError, match=r"'@logits' is \(4,\) of a sample, .* are for \(3,\)"):
        held.write("@logits", keys + 2, torch.zeros(2, 4), marks)
    with pytest.raises(ValueError, match="'pooled' is \\(1, 3\\) for 2 samples"):
        held.write("pooled", keys, torch.zeros(1, 3), marks)
    with pytest.raises(ValueError, match=r"'words' is torch.int64"):
        held.write("words", keys, torch.zeros(2, 3, dtype=torch.long), marks)
    for bad, match in ((float("nan"), "NaN or infinite"), (7e4, "reach 7e\\+04, more than float16 holds")):
        with pytest.raises(ValueError, match=match):
            held.write("layer", keys, torch.full((2, 3), bad), marks)
        with pytest.raises(ValueError, match=match):
            held.write("@logits", keys + 2, torch.full((2, 3), bad), marks)
    assert {line.address: line.rows for line in held.held()} == {"@logits": 2, "words": 0, "layer": 0}


# crashes, damage, full disks


def test_a_killed_writer_leaves_nothing_torn(tmp_path, whole):
    launch(SCRIPT, "killed", tmp_path)
    statuses = (tmp_path / "statuses").read_text().split()
    assert statuses.count("-9") > 7
    folder = tmp_path / "killed"
    rows = Cache(folder).held()[0].rows  # every checksum is right
    role = cases.filled(folder)
    assert role.cache.held()[0].rows == 96
    assert 0 < rows <= 96
    assert torch.equal(everything(folder), everything(whole))
    for path in whole.glob("*.rows"):
        assert (folder / path.name).read_bytes() == path.read_bytes()


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path):
    folder = tmp_path / "cache"
    cases.filled(folder, codec="top_k")
    true = everything(folder)
    random = np.random.default_rng(0)
    found: Counter[str] = Counter()
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        used = 96 * Cache(folder).rows["@logits"].dtype.itemsize if path.suffix == ".rows" else len(content)
        places = {*range(min(used, 40)), *random.integers(0, max(used, 1), 120)} if content else set()
        places |= {used, used + 50, len(content) - 1} if path.suffix == ".rows" else set()
        for place in sorted(places):
            with path.open("r+b") as file:
                file.seek(place)
                file.write(bytes([content[place] ^ int(random.integers(1, 256))]))
            try:
                Cache(folder).held()
                role = cases.filled(folder, codec="top_k")  # what is missing is made again
                assert torch.equal(everything(folder), true)
                role.cache.held()
                found["harmless"] += 1
            except DamagedCache as error:
                found["damaged" if str(path) in str(error) else f"unnamed at {place} of {path}"] += 1
            path.write_bytes(content)
    assert found.keys() == {"damaged", "harmless"}
    assert found["damaged"] > 200
    assert torch.equal(everything(folder), true)


def test_a_shard_of_another_cache_or_length_is_noticed(tmp_path, whole):
    other = shutil.copytree(whole, tmp_path / "other")
    role = Cached(cases.exact(2), str(tmp_path / "third"), "float32")
    batch = next(iter(cases.arrays()))
    Distillation(cases.student(), role, [KD()]).bind(batch)
    (shard,) = other.glob("*.rows")
    shutil.copy(next((tmp_path / "third").glob("*.rows")), shard)
    with pytest.raises(DamagedCache, match=f"{shard} is damaged: row"):
        Cache(other).held()
    with shard.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(DamagedCache, match=f"{shard} is damaged: 1000 bytes and not"):
        Cache(other).held()
    shard.unlink()  # as the message says
    cases.filled(other)
    assert torch.equal(everything(other), everything(whole))


# of the first batch's eight rows 20 bytes each are written first, and then their checksums, whose four bytes lie in one
# page, so that a disk takes them whole or not at all
@pytest.mark.parametrize("budget", [0, 5, 20, 21, 100, 160, 172, 188])
def test_a_full_disk_is_an_error_and_nothing_is_torn(budget, tmp_path, monkeypatch, whole):
    real, left = cache_files._put, [budget]

    class Full:
        def __init__(self, file):
            self.file = file

        def seek(self, place):
            self.file.seek(place)

        def write(self, rest):
            if not left[0]:
                raise OSError(errno.ENOSPC, "No space left on device")
            part = rest[: left[0]]
            left[0] -= len(part)
            return self.file.write(part)

    monkeypatch.setattr(cache_files, "_put", lambda file, *given: real(Full(file), *given))
    with pytest.raises(OSError, match=r"cannot write '@logits' to .*No space left") as caught:
        cases.filled(tmp_path)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    rows = Cache(tmp_path).held()[0].rows  # every checksum is right
    assert rows == max(0, budget - 160) // 4
    cases.filled(tmp_path)
    assert torch.equal(everything(tmp_path), everything(whole))


def test_a_whole_cache_is_read_where_nothing_may_be_written(whole, monkeypatch):
    def refused(*given, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    live = cases.train(cases.exact(), cases.arrays())
    for module in (cache_folder, cache_files):
        monkeypatch.setattr(module, "locked", refused)
        monkeypatch.setattr(module, "replacing", refused)
    equal(cases.train(Cached(cases.exact(), str(whole), "float32"), cases.arrays()), live)
    with pytest.raises(OSError, match=f"cannot write '2' to {whole} .*Permission denied"):
        cases.train(Cached(cases.exact(), str(whole), "float32"), cases.arrays(), losses=[FitNets(("3", "2"))])


def test_a_row_that_is_written_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    rows = Rows(tmp_path, "a", [("x", "<f4", (3,))], 0)
    record = rows.empty(1)
    record["x"] = 2
    rows.write(np.array([7]), record)
    real, looks = Rows._gathered, []

    def early(self, keys):
        found = real(self, keys)
        looks.append(len(looks))
        if len(looks) == 1:
            found["x"] = 0  # the checksum was seen, and not yet what it is of
        return found

    monkeypatch.setattr(Rows, "_gathered", early)
    found, there = rows.read(np.array([7]))
    assert there.all()
    assert (found["x"] == 2).all()
    assert len(looks) == 2


def test_a_row_is_written_once(tmp_path):
    rows = Rows(tmp_path, "a", [("x", "<f4", ())], 0, per_shard=4)
    record = rows.empty(3)
    record["x"] = [1, 2, 3]
    assert rows.write(np.array([9, 2, 9]), record) == 2  # the first of equal keys
    record["x"] = 5
    assert rows.write(np.array([9, 2, 3]), record) == 1
    found, there = rows.read(np.array([2, 3, 9, 8]))
    assert there.tolist() == [True, True, True, False]
    assert found["x"][:3].tolist() == [2, 5, 1]
    assert [path.name for path, _ in rows.check()] == ["a-00000.rows", "a-00002.rows"]
    assert not rows.read(np.array([4 * 10**9]))[1].any()


def test_a_stopped_run_says_so_and_leaves_the_cache_whole(tmp_path):
    class Stops(ArrayLoader):
        def __iter__(self):
            for n, batch in enumerate(super().__iter__()):
                if n == 3:
                    os.kill(os.getpid(), 15)
                yield batch

    plain = Stops(cases.IMAGES, cases.LABELS, batch_size=8, std=cases.STEP_OF_A_PIXEL)
    with pytest.raises(Interrupted):
        cases.train(Cached(cases.exact(), str(tmp_path)), plain, losses=[KD()])
    assert Cache(tmp_path).held()[0].rows >= 24


def test_replayed_batches_survive_what_views_make_of_them():
    batch = next(iter(cases.arrays()))
    again = Altered(student=lambda x: x)(batch)
    assert again.replay is batch.replay
    assert read_batch(batch).ids is batch.ids
    assert replayed(ArrayLoader(cases.IMAGES, batch_size=4), 1).views == 1
