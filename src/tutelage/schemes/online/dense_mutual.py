"""Dense cross-layer mutual distillation: every classifier along one network learns from every one along another."""

from __future__ import annotations

from torch import nn

from tutelage.catalogue import method
from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import Record, in_float32
from tutelage.schemes.online.cohort import PeerTeacher
from tutelage.schemes.self_distillation.be_your_own_teacher import Exits, ExitsOutput
from tutelage.taps import UnknownTap
from tutelage.teachers import Lesson
from tutelage.views import Batch


@method(
    section="3.2",
    role="teacher",
    paper="Yao, Sun: Knowledge Transfer via Dense Cross-Layer Mutual-Distillation",
    year=2020,
    link="https://arxiv.org/abs/2008.07816",
    needs=("labels", "several layers", "other models"),
    use="Mutual learning of deep networks: their hidden layers are taught too, by exits that are dropped afterwards.",
)
class DenseMutual(PeerTeacher):
    """Networks with classifiers along their way; each classifier learns from all classifiers of the other network.

    With two networks of n classifiers each (n − 1 exits and their own) the total is

        Σ_p Σ_a CE(z_pa, y) + Σ_{p≠q} Σ_{a, b} KL(softmax(z_qb) ‖ softmax(z_pa))

    over networks p, q and classifiers a, b: those of the same stage (a = b) and of different ones, in both directions,
    all with weight 1. Targets are detached; each network runs once. Between classifiers of one network nothing is
    transferred. Of more than two networks each classifier learns from the mean over the others.

    The student role must be a :class:`tutelage.Cohort` of :class:`tutelage.Exits`. Losses read ``"@logits"`` and
    ``"@feature"`` of each classifier, as beside :class:`tutelage.BeYourOwnTeacher`. The weights of a classifier's
    lessons sum to 1, so that labels count once; :meth:`losses` therefore gives ``KD`` the weight n. Afterwards
    ``cohort.peer(i).model`` is network i without its exits.

    Checked against the authors' code, which gives the same total (it adds 1e-8 to probabilities). Their exits repeat
    the network's own later stages with weights of their own; those of :class:`tutelage.Exits` are smaller.

    Memory: that of the networks and their exits; of losses that own something, once for each of the 2·n² pairs.

    Yao, Sun 2020, "Knowledge Transfer via Dense Cross-Layer Mutual-Distillation", https://arxiv.org/abs/2008.07816

    >>> import torch
    >>> from tutelage import Cohort, Distillation
    >>> from tutelage.models import MLP
    >>> cohort = Cohort([Exits(MLP(8, (16, 16), 3), at=["hidden.0"], example=(8,)) for _ in range(2)])
    >>> teacher = DenseMutual()
    >>> d = Distillation(cohort, teacher, losses=teacher.losses(classifiers=2))
    >>> sorted(d((torch.randn(4, 8), torch.zeros(4).long())).values)
    ['KD', 'TaskLoss']
    """

    def losses(self, classifiers: int = 3) -> list[Loss]:
        """The published ones: cross-entropy, and KL at temperature 1, both of weight 1.

        Args:
            classifiers: n, of each network: its exits and its own.
        """
        return [TaskLoss(), KD(temperature=1.0, weight=float(classifiers))]

    def names(self, student: nn.Module) -> tuple[nn.Module, nn.Module]:
        names = super().names(student)
        for i, peer in enumerate(student.peers):  # type: ignore[arg-type]
            if not isinstance(peer, Exits):
                raise TypeError(f"peers[{i}]: DenseMutual teaches tutelage Exits, got {type(peer).__name__}")
        return names

    def bind(self, student: nn.Module, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        for address in student_reads + teacher_reads:
            if address not in ("@logits", "@feature"):
                raise UnknownTap(f"{address!r}: an exit has '@logits' and '@feature', and nothing else to compare")
        return ["@logits"]  # any @ address asks for the whole output, which lessons() takes apart

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        networks = [_classifiers(output) for output in student.output.peers]
        lessons = []
        for p, learners in enumerate(networks):
            for q, others in enumerate(networks):
                for b, other in enumerate(others if q != p else ()):
                    target, weight = other.detach(), 1 / ((len(networks) - 1) * len(others))
                    lessons += [Lesson(z, target, weight, key=f"{p}_{a}_from_{q}_{b}") for a, z in enumerate(learners)]
        return lessons


def _classifiers(said: ExitsOutput) -> list[Record]:
    """The exits' records, first to last, and the network's own."""
    pairs = [*zip(said.exits, said.features, strict=True), (said.logits, said.feature)]
    return [Record(logits, {"@feature": in_float32(feature)}) for logits, feature in pairs]
