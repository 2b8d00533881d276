from __future__ import annotations

import copy
import importlib.util
import os
import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from tutelage import KD, Distillation, GeneralizedJSD, Hidden, InChunks, SkewKL, TaskLoss
from tutelage.functional import generalized_jsd
from tutelage.knowledge.response import liger


def stand_in(wrong: float = 1.0, beside: float = 0.0):
    """What ``liger_fused_linear_jsd`` gives, its value times ``wrong`` and ``beside`` added to the head's gradient."""

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, s, w, t, u, beta, temperature):
            with torch.enable_grad():
                leaves = [x.detach().requires_grad_() for x in (s, w)]
                value = generalized_jsd(leaves[0] @ leaves[1].T, t @ u.T, beta=beta, temperature=temperature)
            ctx.gradients = list(torch.autograd.grad(value, leaves))
            ctx.gradients[1] += beside
            return value.detach() * wrong

        @staticmethod
        def backward(ctx, outer):
            for gradient in ctx.gradients:
                gradient.mul_(outer)  # in place, as Liger's does
            return *ctx.gradients, None, None, None, None

    def kernel(s, w, t, u, shift_labels=None, jsd_beta=0.5, ignore_index=-100, temperature=1.0, accum_dtype=None):
        assert shift_labels is None
        assert accum_dtype == torch.float32
        kernel.calls += 1
        return Kernel.apply(s, w, t, u, jsd_beta, temperature)

    kernel.calls = 0
    return kernel


@pytest.fixture
def install(monkeypatch):
    """Let a kernel be Liger's, and this processor be a CUDA device."""

    def put(kernel):
        module = types.ModuleType("liger_kernel.transformers.functional")
        module.liger_fused_linear_jsd = kernel
        for name in ("liger_kernel", "liger_kernel.transformers"):
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        monkeypatch.setitem(sys.modules, module.__name__, module)
        monkeypatch.setattr(liger, "_DEVICES", ("cpu",))
        return kernel

    return put


def models(bias: bool = False):
    torch.manual_seed(0)
    return [nn.Sequential(nn.Embedding(11, width), nn.Linear(width, 11, bias=bias)) for width in (4, 6)]


IDS = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0))
BATCH = {"input": IDS, "labels": torch.where(IDS > 7, -100, IDS)}
LOSSES = [
    lambda: KD(temperature=2.0),
    lambda: GeneralizedJSD(beta=0.3),
    lambda: GeneralizedJSD(beta=1, temperature=3.0),
]


@pytest.mark.parametrize("make", LOSSES)
def test_a_right_kernel_is_used_and_gives_what_the_chunks_give(install, make):
    kernel = install(stand_in())
    student, teacher = models()
    parts, fused = (
        Distillation(student, teacher, losses=[InChunks(make(), backend=b)]).bind(BATCH) for b in (None, "liger")
    )
    before, expected, found = kernel.calls, parts(BATCH).total, fused(BATCH).total
    assert kernel.calls == before + 1
    torch.testing.assert_close(found, expected)
    parameters = list(student.parameters())
    wanted = torch.autograd.grad(expected, parameters)
    for _ in range(2):  # a second backward pass multiplies nothing twice
        got = torch.autograd.grad(found, parameters, retain_graph=True)
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("kernel", [stand_in(wrong=1.01), stand_in(beside=0.1), stand_in(beside=float("nan"))])
def test_a_kernel_with_another_value_or_gradient_is_named_and_not_used(install, kernel, capsys):
    install(kernel)
    student, teacher = models()
    d = Distillation(student, teacher, losses=[InChunks(KD(), backend="liger")]).bind(BATCH)
    assert "KD: Liger's kernel deviates by " in capsys.readouterr().err
    before = kernel.calls
    expected = Distillation(student, teacher, losses=[InChunks(KD())])(BATCH)
    torch.testing.assert_close(d(BATCH).total, expected.total)
    assert kernel.calls == before


def test_a_student_that_equals_its_teacher_can_still_be_compared(install, capsys):
    install(stand_in())
    student, _ = models()
    Distillation(student, copy.deepcopy(student), losses=[InChunks(KD(), backend="liger")]).bind(BATCH)
    assert "deviates" not in capsys.readouterr().err


def test_scale_frozen_heads_and_batches_without_a_label(install):
    install(stand_in())
    torch.manual_seed(0)
    states, weight = torch.randn(5, 4, requires_grad=True), torch.randn(11, 4)
    teacher = Hidden(torch.randn(5, 6), torch.randn(11, 6), scale=2.0)
    student = Hidden(states, weight, scale=0.5)
    fused = liger.Fused.of(GeneralizedJSD())
    found, direct = fused(student, teacher), generalized_jsd(student.logits(), teacher.logits())
    torch.testing.assert_close(found, direct)
    torch.testing.assert_close(*(torch.autograd.grad(v, states)[0] for v in (found, direct)))
    nothing = fused(student, teacher, torch.zeros(5, dtype=torch.bool))
    assert nothing == 0
    assert torch.autograd.grad(nothing, states)[0].abs().max() == 0
    with torch.no_grad():
        assert fused(student, teacher) == found


def test_what_the_kernel_cannot_do_is_refused_by_name(install, monkeypatch):
    for loss in (SkewKL(), TaskLoss()):
        with pytest.raises(
            TypeError, match=f"backend='liger': expected KD or GeneralizedJSD, not {type(loss).__name__}"
        ):
            InChunks(loss, backend="liger")
    with pytest.raises(ValueError, match="backend='triton': expected 'liger'"):
        InChunks(KD(), backend="triton")

    def bind(bias=False):
        return Distillation(*models(bias), losses=[InChunks(KD(), backend="liger")]).bind(BATCH)

    with pytest.raises(
        ValueError, match="KD: backend='liger': the student is on cpu; Liger's kernels run on CUDA only"
    ):
        bind()
    install(stand_in())
    with pytest.raises(ValueError, match="the student's head has a bias, which Liger's kernel has not"):
        bind(bias=True)
    head = Hidden(torch.ones(1, 2), torch.ones(3, 2), softcap=30.0)
    with pytest.raises(ValueError, match="the student's head has a soft cap"):
        liger.check_usable("KD", head, head)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", None)
    with pytest.raises(ImportError, match=r"pip install 'tutelage\[liger\]'"):
        bind()


INTERPRETED = """
from functools import partial

import torch

from tutelage import KD, GeneralizedJSD, Hidden
from tutelage.functional import generalized_jsd, kd_divergence
from tutelage.knowledge.response import liger

torch.manual_seed(0)
student, teacher = (Hidden(torch.randn(12, width), torch.randn(11, width), scale=0.5) for width in (4, 6))
losses = {KD(temperature=2.0): partial(kd_divergence, temperature=2.0)}
for beta, temperature in ((0.0, 1.0), (0.5, 1.0), (0.2, 3.0), (1.0, 1.0)):
    loss = GeneralizedJSD(beta=beta, temperature=temperature)
    losses[loss] = partial(generalized_jsd, beta=beta, temperature=temperature)
for loss, formula in losses.items():
    found, bound = liger.deviation(liger.Fused.of(loss), formula, student, teacher)
    assert found < 1e-5 < bound, (loss, found)
"""


def test_ligers_own_kernel_agrees_in_tritons_interpreter():
    """The kernel itself, without a GPU."""
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger-kernel is not installed (extra liger)")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr
