"""ResKD: further small students learn what the first one could not take over, and their logits are added."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tutelage.catalogue import method
from tutelage.console import say
from tutelage.distilling import Result
from tutelage.evaluation import evaluating
from tutelage.knowledge.base import Loss, classes_last
from tutelage.procedures import Leg, Setting, laid_out, refuse_bound, train_legs
from tutelage.record import in_float32, logits_of
from tutelage.run import Epoch
from tutelage.schedule import Stage
from tutelage.teachers import Frozen, Teacher, as_teacher
from tutelage.views import Batch, Inputs, SameView, move


def residual_energy(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ‖z_t − z_s‖² / Σ‖z_t‖² over samples, of logits whose mean over the classes is taken away.

    The part of what the teacher says that is still to be learned: 0 where both say the same, 1 for a student that says
    nothing. What is added to all of a sample's logits does not count, since no softmax sees it.

    Args:
        student: logits (B, C), (B, T, C) or (B, C, H, W).
        teacher: of the same shape; no gradient flows to it.

    Returns:
        A scalar ≥ 0. A teacher that says nothing at all (equal logits everywhere) counts as energy 1e-6 a sample.

    Raises:
        ValueError: the shapes differ.

    >>> residual_energy(torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0, 1.0]]))
    tensor(0.)
    >>> residual_energy(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]))
    tensor(1.)
    """
    left, whole, rows = _energies(student, teacher)
    return left / whole.clamp(min=1e-6 * rows)


def _energies(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor, int]:
    """The sums of the squares of what is left and of what the teacher says, and the number of rows."""
    if student.shape != teacher.shape:
        raise ValueError(f"logits differ in shape: student {tuple(student.shape)}, teacher {tuple(teacher.shape)}")
    s, t = (classes_last(in_float32(z)) for z in (student, teacher.detach()))
    s, t = s - s.mean(1, keepdim=True), t - t.mean(1, keepdim=True)
    return (t - s).square().sum(), t.square().sum(), len(t)


class ResidualStudents(nn.Module):
    """A student and residual students as one module, whose logits are the sum of theirs: z_0 + r_1 + r_2 + ...

    It is exported as it is, with one output. In Python, :meth:`adaptive` asks the residual students only about samples
    that need them.

    Members none of whose parameters require gradients stay in eval mode while the others train, so they remain what
    they are.

    Args:
        students: the student, then the residual students in the order in which they learned. All give logits for the
            same classes.

    Raises:
        ValueError: nothing in it, or one module twice.
        TypeError: a member is no ``nn.Module``.

    >>> both = ResidualStudents([nn.Linear(4, 3), nn.Linear(4, 3)])
    >>> both(torch.ones(2, 4)).shape
    torch.Size([2, 3])
    """

    def __init__(self, students: Sequence[nn.Module]):
        super().__init__()
        members = list(students)
        for i, member in enumerate(members):
            if not isinstance(member, nn.Module):
                raise TypeError(f"students[{i}]: expected an nn.Module, got {type(member).__name__}")
        if not members or len({id(member) for member in members}) < len(members):
            raise ValueError("students: expected one network or more, each of them once; give copies (copy.deepcopy)")
        self.students = nn.ModuleList(members)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The sum of all members' logits."""
        inputs = Inputs(args, kwargs)
        return torch.stack([_logits(member, inputs) for member in self.students]).sum(0)

    @torch.no_grad()
    def adaptive(self, *args: Any, confidence: float = 0.9, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Sample-adaptive inference: a residual student is asked about a sample only while the sum so far is unsure.

        A sample is done when the largest probability of its sum is at least ``confidence``. 0 asks the student alone,
        more than 1 everybody. Call it in eval mode.

        Args:
            *args, **kwargs: the inputs; of tensors with a row for each sample, the rows of the unsure ones are passed
                on.
            confidence: chosen on validation data, for the accuracy and the cost that are wanted.

        Returns:
            (B, C) logits, and (B,) how many members each sample took.

        Raises:
            ValueError: the logits are not (B, C), or somebody is in train mode.

        >>> both = ResidualStudents([nn.Identity(), nn.Identity()]).eval()
        >>> both.adaptive(torch.tensor([[9.0, 0.0], [1.0, 0.0]]), confidence=0.9)
        (tensor([[9., 0.],
                [2., 0.]]), tensor([1, 2]))
        """
        if any(module.training for module in self.modules()):
            raise ValueError("adaptive: the students are in train mode; call eval() first")
        inputs = Inputs(args, kwargs)
        logits = _logits(self.students[0], inputs)
        if logits.ndim != 2:
            raise ValueError(f"adaptive: logits of shape {tuple(logits.shape)}: expected (B, C)")
        logits = logits.clone()  # the student may have returned its input
        used = torch.ones(len(logits), dtype=torch.long, device=logits.device)
        for member in self.students[1:]:
            unsure = (logits.softmax(1).amax(1) < confidence).nonzero()[:, 0]
            if not len(unsure):
                break
            logits[unsure] += _logits(member, _rows(inputs, unsure, len(logits)))
            used[unsure] += 1
        return logits, used

    def train(self, mode: bool = True) -> ResidualStudents:
        super().train(mode)
        for member in self.students:
            if not any(p.requires_grad for p in member.parameters()):
                member.eval()
        return self


def _logits(member: nn.Module, inputs: Inputs) -> Tensor:
    logits = logits_of(inputs.call(member))
    if logits is None:
        raise ValueError(f"students: {type(member).__name__} returns no logits")
    return in_float32(logits)


def _rows(inputs: Inputs, rows: Tensor, count: int) -> Inputs:
    def pick(value: Any) -> Any:
        return value[rows] if isinstance(value, Tensor) and value.ndim and len(value) == count else value

    return Inputs(tuple(map(pick, inputs.args)), {k: pick(v) for k, v in inputs.kwargs.items()})


def _legs(
    setting: Setting,
    residuals: Sequence[nn.Module],
    stop: float | None = None,
    residual_losses: Sequence[Loss] | None = None,
) -> list[Leg]:
    role = as_teacher(setting.teacher)
    members = [setting.student, *residuals]
    if len(members) < 2:
        raise ValueError("residuals: expected one network or more to learn what the student leaves")
    network = role.module if isinstance(role, Frozen) else None
    if len({id(m) for m in (*members, network)}) <= len(members):
        raise ValueError("residuals: the same network stands in two places; give copies (copy.deepcopy)")
    if stop is not None and network is None:
        raise ValueError(f"stop={stop}: the energy that is left can be measured only of a teacher that is a network")
    refuse_bound(*(residual_losses or ()))
    terms = setting.losses if residual_losses is None else residual_losses
    sums = [ResidualStudents(members[: n + 1]) for n in range(1, len(members))]
    rest = [Leg(f"residual-{n}", both, setting.teacher, terms) for n, both in enumerate(sums, start=1)]
    return [Leg("student", setting.student, setting.teacher, setting.losses, setting.stages), *rest]


@method(
    section="4",
    role="procedure",
    paper="Li, Li, Omar, Wu, Li: ResKD: Residual-Guided Knowledge Distillation",
    year=2021,
    link="https://arxiv.org/abs/2006.04719",
    needs=("extra stages", "other models"),
    use="A gap that remains after distillation, and room for more small networks: they learn what is missing.",
)
@laid_out(_legs)
def res_kd(
    student: nn.Module,
    teacher: nn.Module | Teacher,
    train: Iterable[Any],
    validation: Iterable[Any] | None = None,
    *,
    residuals: Sequence[nn.Module],
    stop: float | None = None,
    losses: Sequence[Loss] | None = None,
    stages: Sequence[Stage] | None = None,
    residual_losses: Sequence[Loss] | None = None,
    views: Callable[[Any], Batch] | None = None,
    out: str | Path | None = None,
    after_epoch: Callable[[Epoch], None] | None = None,
    **training: Any,
) -> list[Result]:
    """Distil a student, then residual students one after the other, each for what those before it leave.

    First the student S_0 learns from the teacher T. Then, for i = 1, 2, ..., residual student R_i learns the gap
    Δ = z_T − z_{S_{i−1}}: everybody before it is frozen and in eval mode, S_i = S_{i−1} + R_i adds the logits, and the
    losses compare S_i with the teacher. For squared differences of logits this is the same as comparing R_i with Δ.

    From the paper are the residual as guidance, the sum as the new student, its repetition and the sample-adaptive
    inference. Its text could not be had, and no code was found: the losses' weights, the measure
    by which it stops (here :func:`residual_energy`) and the one by which a sample is done (here the largest
    probability) are this library's. The paper searches the residual students' architectures; here they are given.

    Args:
        student: S_0.
        teacher: of all legs.
        train, validation: as in :func:`tutelage.distill`.
        residuals: R_1, R_2, ..., which may be much smaller than the student.
        stop: no further residual student learns once the :func:`residual_energy` on the validation data is not above
            this; all do by default.
        losses: not bound yet; each leg learns from a copy of its own. A loss without an address reads the student in
            the first leg and the newest residual student in the others.
        stages: instead of ``losses``, for the first leg.
        residual_losses: what the residual students learn by, if that is something else; addresses are those of
            :class:`ResidualStudents`, such as ``"students.1.layer2"``. After ``stages`` the default of
            :func:`tutelage.distill`.
        views: what student and teacher see.
        out: each leg's folder is in it: ``student``, ``residual-1``, ``residual-2``, ...
        after_epoch: called with each epoch's line of the last leg.
        **training: further arguments of :func:`tutelage.distill`. With ``resume=True`` finished legs are not trained
            again.

    Returns:
        One result a leg; the last one's student is the :class:`ResidualStudents` of all.

    Raises:
        ValueError: no residual student, one network in two places, losses that were bound already, or ``stop`` without
            validation data or a teacher's network.

    >>> data = [(torch.randn(16, 8), torch.arange(16) % 3)]
    >>> big, small, less = (nn.Sequential(nn.Linear(8, w), nn.ReLU(), nn.Linear(w, 3)) for w in (64, 8, 4))
    >>> results = res_kd(small, big, data, data, residuals=[less], epochs=1, progress=False)
    >>> [type(result.student).__name__ for result in results], results[1].student.students[1] is less
    (['Sequential', 'ResidualStudents'], True)
    """
    legs = _legs(Setting(student, teacher, losses, stages), residuals, stop, residual_losses)
    if stop is not None and validation is None:
        raise ValueError(f"stop={stop}: the energy that is left is measured on validation data, and there are none")
    results: list[Result] = []
    required = [(p, p.requires_grad) for member in (student, *residuals) for p in member.parameters()]
    try:
        for leg, member in zip(legs, (student, *residuals), strict=True):
            if results and stop is not None and validation is not None:
                network = results[-1].teacher
                assert network is not None, "the layout has checked it"
                energy = energy_left(results[-1].student, network, validation, views)
                say(f"res_kd: {energy:.1%} of the teacher's energy is left after {len(results)} of {len(legs)}")
                if energy <= stop:
                    break
            results += train_legs(
                [leg],
                train,
                validation,
                views=views,
                out=out,
                after_epoch=after_epoch if leg is legs[-1] else None,
                **training,
            )
            member.requires_grad_(False)
    finally:
        for parameter, before in required:
            parameter.requires_grad_(before)
    return results


def energy_left(
    student: nn.Module,
    teacher: nn.Module,
    loader: Iterable[Any],
    views: Callable[[Any], Batch] | None = None,
) -> float:
    """:func:`residual_energy` over all batches of a loader, both networks in eval mode and left as they were.

    Raises:
        ValueError: the loader is empty, or shapes differ.

    >>> energy_left(nn.Linear(4, 3), nn.Linear(4, 3), [(torch.ones(2, 4), torch.zeros(2))]) > 0
    True
    """
    views, device = views or SameView(), next(student.parameters()).device
    sums = torch.zeros(3, dtype=torch.float64)
    with evaluating(student, teacher):
        for raw in loader:
            batch = views(move(raw, device))
            said = _logits(student, batch.student), _logits(teacher, batch.teacher)
            sums += torch.tensor([float(x) for x in _energies(*said)], dtype=torch.float64)
    if not sums[2]:
        raise ValueError("energy_left: the loader is empty")
    return float(sums[0] / sums[1].clamp(min=1e-6 * float(sums[2])))
