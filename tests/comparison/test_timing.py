"""The time of a step: each beside the student alone, in turn."""

from __future__ import annotations

import contextlib

import pytest
import torch

from tutelage.comparison import read_comparison, timing
from tutelage.comparison.timing import STEPS, StepTime, time_steps

NET = {"class_path": "SmallCNN", "init_args": {"width": 2}}
RECIPE = {
    "student": NET,
    "teacher": {"class_path": "SmallCNN", "init_args": {"width": 3}},
    "data": {"class_path": "fashion_loaders", "init_args": {"batch_size": 8, "limit": 64, "validation": 50}},
    "training": {"epochs": 2, "clip": 1.0},
}


@pytest.fixture
def clock(monkeypatch):
    """Steps that take the time they are said to, in the order in which they were called."""
    called = []
    costs = {"alone": 2.0, "KD": 3.0, "RKD": 5.0}
    now = [0.0]

    def stepper(cell, folder, trust):
        def step():
            called.append(cell.method)
            # the machine slows down more and more: it must not change the ratio
            now[0] += costs[cell.method] * (1 + len(called) // 2)

        return timing._Stepper(step, 8)

    monkeypatch.setattr(timing, "_stepper", stepper)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return called


def cells_of(methods, **how):
    return read_comparison(RECIPE, methods=methods, seeds=1, **how).plan()[0]


def test_each_is_timed_in_turn_with_the_student_alone(clock, tmp_path):
    cells = cells_of(["KD", "RKD"])
    found = dict(time_steps(cells, tmp_path))
    assert [found[c.key].ratio for c in cells][:1] == [1.0]
    assert found[cells[1].key].ratio == pytest.approx(1.5, rel=0.05)
    assert found[cells[2].key].ratio == pytest.approx(2.5, rel=0.05)
    turns = STEPS + 3
    assert clock == ["alone", "alone"] * turns + ["alone", "KD"] * turns + ["alone", "RKD"] * turns
    assert all(t.batch_size == 8 for t in found.values())


def test_what_is_known_and_what_has_no_control_is_left_out(clock, tmp_path):
    cells = cells_of(["KD", "RKD"])
    known = {cells[1].key: StepTime(1.0, 1.0, 8)}
    assert list(dict(time_steps(cells, tmp_path, known=known))) == [cells[0].key, cells[2].key]
    assert list(time_steps(cells[1:], tmp_path)) == []


def test_threads_are_as_before_whatever_happens(clock, tmp_path, monkeypatch):
    before = torch.get_num_threads()
    cells = cells_of(["KD"])
    with contextlib.closing(time_steps(cells, tmp_path, threads=before + 1)) as times:
        next(times)
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    monkeypatch.setattr(timing, "_seconds", lambda step: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(time_steps(cells, tmp_path, threads=before + 1))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("KD", {}),
        ("fit_nets_two_stages", {}),
        ("FactorTransfer", {}),
        ("mutual", {"student": {"class_path": "Cohort", "init_args": {"peers": ["$student", "$student"]}},
                    "teacher": {"class_path": "DeepMutualLearning"},
                    "losses": [{"class_path": "TaskLoss"}, {"class_path": "KD"}]}),
        ("chain", {"procedure": {"class_path": "teacher_assistant", "init_args": {"assistants": [NET]}},
                   "losses": [{"class_path": "KD"}]}),
        ("densely_guided", {"procedure": {"class_path": "densely_guided", "init_args": {"assistants": [NET]}},
                            "losses": [{"class_path": "KD"}]}),
        ("born_again", {}),
        ("teacher_free_self", {}),
        ("no data", {"source": {"class_path": "DAFL", "init_args": {
                        "generator": {"class_path": "Generator", "init_args": {"image_shape": [1, 28, 28], "width": 4}},
                        "steps": 2, "batch_size": 4}},
                     "losses": [{"class_path": "KD"}]}),
    ],
)  # fmt: skip
def test_real_steps_of_every_kind(tmp_path, name, fields, monkeypatch, in_process):
    monkeypatch.setattr(timing, "STEPS", 2)
    recipe = {"recipe": RECIPE, "seeds": 1, "methods": {name: fields}}
    cells = read_comparison(recipe).plan()[0]
    found = dict(time_steps(cells, tmp_path))
    assert found[cells[0].key].ratio == 1.0
    own = found[cells[1].key]
    assert own.seconds > 0
    assert own.ratio > 0
    assert own.batch_size == (4 if name == "no data" else 8)


def test_a_step_is_a_step_of_that_training(tmp_path, in_process):
    # the student alone: forward, backward, clipping and the optimiser, on the recipe's batches
    cell = cells_of(["KD"])[1]
    made = timing._stepper(cell, tmp_path, ())
    (d,) = [c.cell_contents for c in made.step.__closure__ if isinstance(c.cell_contents, torch.nn.Module)]
    before = [p.clone() for p in d.student.parameters()]
    made.step()
    assert any(not torch.equal(p, q) for p, q in zip(before, d.student.parameters(), strict=True))
    assert all(p.grad is None for p in d.student.parameters())
    assert sorted(d.terms) == ["KD", "TaskLoss"]
    assert not any(p.requires_grad for p in d.teacher.module.parameters())
