from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from tutelage import KD, Distillation, TaskLoss
from tutelage.algorithms.cross_modal.views import CleanToNoisy, RGBToGrey, to_grey


def test_the_noise_is_the_students_alone_fresh_and_of_the_asked_size():
    torch.manual_seed(0)
    x, y = torch.randn(50, 1, 20, 20), torch.arange(50)
    views = CleanToNoisy(std=0.3)
    first, second = views((x, y)), views((x, y))
    assert torch.equal(first.teacher.args[0], x)
    assert torch.equal(first.labels, y)
    noise = first.student.args[0] - x
    assert noise.std().item() == pytest.approx(0.3, rel=0.02)
    assert abs(noise.mean().item()) < 0.01
    assert not torch.equal(noise, second.student.args[0] - x)


def test_integers_are_not_disturbed():
    batch = CleanToNoisy()({"image": torch.zeros(2, 3), "ids_of_words": torch.tensor([[1], [2]])})
    assert batch.student.kwargs["image"].any()
    assert torch.equal(batch.student.kwargs["ids_of_words"], torch.tensor([[1], [2]]))


def test_grey_is_the_luminance_and_keeps_grey_images():
    red = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(to_grey(red, keep_channels=False), torch.full((1, 1, 1, 1), 0.299))
    grey = torch.rand(2, 1, 4, 4).expand(2, 3, 4, 4)
    torch.testing.assert_close(to_grey(grey), grey)
    assert to_grey(grey.double()).dtype == torch.float64
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(to_grey(to_grey(images)), to_grey(images))
    batch = RGBToGrey()((images, torch.tensor([0, 1])))
    assert torch.equal(batch.teacher.args[0], images)
    assert batch.student.args[0].shape == images.shape


@pytest.mark.parametrize("views", [CleanToNoisy(0.1), RGBToGrey(False)])
def test_views_can_be_sent_to_loader_processes(views):
    again = pickle.loads(pickle.dumps(views))
    assert again((torch.rand(2, 3, 4, 4), torch.tensor([0, 1]))).student.args[0].shape[0] == 2


def test_a_grey_student_learns_from_a_colour_teacher():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, 4, 4, generator=g)
    y = (to_grey(x).mean((1, 2, 3)) > 0).long()
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
    with torch.no_grad():  # a teacher of colours that weighs them as luminance does: grey images can tell all it says
        of_pixels = torch.randn(2, 1, 16, generator=g) * torch.tensor([0.299, 0.587, 0.114]).reshape(1, 3, 1)
        teacher[1].weight.copy_(of_pixels.reshape(2, 48))
    student = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    d = Distillation(student, teacher, losses=[KD(temperature=1.0, weight=1.0)], views=RGBToGrey(keep_channels=False))
    d.bind((x, y))
    start = d((x, y)).total.item()
    optimizer = torch.optim.Adam(student.parameters(), lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        d((x, y)).total.backward()
        optimizer.step()
    assert d((x, y)).total.item() < 0.05 * start


def test_a_student_of_noisy_views_runs_end_to_end():
    torch.manual_seed(0)
    x, y = torch.randn(8, 5), torch.tensor([0, 1] * 4)
    model = nn.Linear(5, 2)
    teacher = nn.Linear(5, 2)
    teacher.load_state_dict(model.state_dict())
    clean = Distillation(model, teacher, losses=[KD()], views=CleanToNoisy(0.0))
    noisy = Distillation(model, teacher, losses=[KD(), TaskLoss()], views=CleanToNoisy(1.0))
    assert clean((x, y))["KD"] < 1e-6
    assert noisy((x, y))["KD"] > 1e-3


def test_wrong_use_is_refused_by_name():
    with pytest.raises(ValueError, match="std=-1"):
        CleanToNoisy(-1)
    with pytest.raises(ValueError, match=r"RGBToGrey.*\(2, 1, 4, 4\)"):
        RGBToGrey()((torch.ones(2, 1, 4, 4), torch.tensor([0, 1])))
