"""What a measured capacity gap suggests: the rules, all in one place."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

FITS = 0.85
"""From which agreement on training data a student counts as able to repeat what its teacher says."""
SURE = 0.95
"""From which mean largest probability on training data a teacher counts as nearly certain."""
LARGER = 4.0
"""From how many times the student's parameters on a teacher counts as far larger."""


@dataclass(frozen=True)
class Reached:
    """What a short training reached on the held-out data; of the teacher itself, its own.

    Args:
        name: ``"teacher"``, ``"labels alone"`` or ``"answers alone, T=4"``.
        accuracy: for the labels.
        agreement: with the teacher's first choice.
        kl: KL(teacher ‖ student) at temperature 1, in nats.
        temperature: at which the teacher's answers were learned.
    """

    name: str
    accuracy: float
    agreement: float | None = None
    kl: float | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class Probe:
    """What linear models read from the features at one address, as held-out accuracies.

    Args:
        network: ``"teacher"`` or ``"student"``, the latter after it learned from the teacher's answers.
        address: where.
        features: how many, after the mean over positions.
        labels: accuracy for the labels.
        choices: accuracy for the teacher's first choice.
    """

    network: str
    address: str
    features: int
    labels: float
    choices: float


@dataclass(frozen=True)
class Size:
    """Parameters, and multiply-accumulate operations for one sample."""

    parameters: int
    macs: int


@dataclass(frozen=True)
class Gap:
    """What :func:`capacity_gap` found, and what :func:`recommend` makes of it.

    Args:
        samples: held-out ones that the shares are of.
        teacher: the teacher's own accuracy.
        alone: the student after the same training on labels alone.
        taught: the student after trainings on the teacher's answers alone, one for each temperature.
        fit: agreement of the best taught student with the teacher on training data.
        confidence: the teacher's mean largest probability on training data.
        majority: the share of the most frequent class in the held-out data.
        probes: of each stage and the embedding, of both networks.
        embedding_r2: how much of the variance of the teacher's embedding a ridge regression from the student's
            predicts, on held-out data.
        teacher_size, student_size: what they cost.
        rule: which rule of :func:`recommend` decides.
        recommendation: what it says.
        reasons: the figures that it rests on, in words.
    """

    samples: int
    teacher: Reached
    alone: Reached
    taught: list[Reached]
    fit: float
    confidence: float
    majority: float
    probes: list[Probe]
    embedding_r2: float
    teacher_size: Size
    student_size: Size
    rule: str = ""
    recommendation: str = ""
    reasons: list[str] = field(default_factory=list)

    @property
    def best(self) -> Reached:
        """The taught student that agrees most with the teacher; of equals, the first."""
        return max(self.taught, key=lambda reached: reached.agreement or 0.0)

    @property
    def margin(self) -> float:
        """The difference of two shares that counts: two standard errors of the teacher's accuracy, a point at least."""
        p = self.teacher.accuracy
        return max(0.01, 2 * math.sqrt(p * (1 - p) / self.samples))


def recommend(gap: Gap) -> Gap:
    """The gap with a recommendation and its reasons, by the first rule that fits.

    The rules are heuristics. Each follows a finding of the paper that is named with it; the thresholds (:data:`FITS`,
    :data:`SURE`, :data:`LARGER`, :attr:`Gap.margin`) are this library's and no paper's. Below, *missing* is the
    teacher's accuracy less that of the best taught student, and a difference counts if it is above the margin.

    - ``weights``: the teacher's accuracy does not exceed the share of the most frequent class. → Give it its weights.
    - ``plain KD``: missing does not count. → Plain KD at the best temperature (Hinton 2015).
    - ``larger student``: on training data too, agreement is below FITS. → A larger student or a longer training, since
      small students cannot mimic large teachers (Cho & Hariharan 2019); or residual students (Li 2021).
    - ``labels``: labels alone reach more than the teacher's answers, and it counts. → An early-stopped teacher, or
      distillation that stops early (both Cho & Hariharan 2019).
    - ``temperature``: a higher temperature than the lowest reaches more agreement, and it counts. → That one: it
      shows what a sure teacher thinks of the other classes (Hinton 2015).
    - ``assistant``: the teacher has LARGER times the student's parameters. → An assistant of middle size (Mirzadeh
      2020); or the teacher's route (Jin 2019), or an early-stopped teacher (Cho & Hariharan 2019).
    - ``softer teacher``: the teacher's confidence is SURE or more. → The route, an early-stopped teacher or a higher
      temperature (as above).
    - ``more``: none of these. → A longer training, or features as well.

    Mirzadeh et al. 2020, "Improved Knowledge Distillation via Teacher Assistant", https://arxiv.org/abs/1902.03393;
    Cho, Hariharan 2019, "On the Efficacy of Knowledge Distillation", https://arxiv.org/abs/1910.01348;
    Jin et al. 2019, "Knowledge Distillation via Route Constrained Optimization", https://arxiv.org/abs/1904.09149;
    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", https://arxiv.org/abs/1503.02531;
    Li et al. 2021, "ResKD: Residual-Guided Knowledge Distillation", https://arxiv.org/abs/2006.04719

    >>> from dataclasses import replace
    >>> same, small = Reached("answers alone, T=1", 0.9, 0.98, 0.01, 1.0), Size(100, 1000)
    >>> gap = Gap(1000, Reached("teacher", 0.9), same, [same], 0.99, 0.8, 0.1, [], 1.0, small, small)
    >>> recommend(gap).rule, recommend(replace(gap, taught=[replace(same, accuracy=0.5)], fit=0.5)).rule
    ('plain KD', 'larger student')
    """
    rule, said = next((rule, said) for rule, fits, said in _RULES if fits(gap))
    return replace(gap, rule=rule, recommendation=said.format(**_words(gap)), reasons=_reasons(gap))


def _coolest(gap: Gap) -> Reached:
    return min(gap.taught, key=lambda reached: reached.temperature or 0.0)


def _ratio(gap: Gap) -> float:
    return gap.teacher_size.parameters / max(1, gap.student_size.parameters)


def _words(gap: Gap) -> dict[str, str]:
    middle = math.sqrt(gap.teacher_size.parameters * gap.student_size.parameters)
    return {"t": f"{gap.best.temperature:g}", "middle": f"{middle:,.0f}"}


_RULES: list[tuple[str, Callable[[Gap], bool], str]] = [
    (
        "weights",
        lambda gap: gap.teacher.accuracy <= gap.majority + gap.margin,
        "Give the teacher its weights: it knows no more than which class is the most frequent.",
    ),
    (
        "plain KD",
        lambda gap: gap.teacher.accuracy - gap.best.accuracy <= gap.margin,
        "Plain KD at temperature {t} will do: the gap is small.",
    ),
    (
        "larger student",
        lambda gap: gap.fit < FITS,
        "Take a larger student or a longer training: this one does not repeat the teacher's answers even on training "
        "data. If its size is fixed for each network but not for their sum, residual students (res_kd).",
    ),
    (
        "labels",
        lambda gap: gap.alone.accuracy - gap.best.accuracy > gap.margin,
        "Labels alone teach it more than this teacher's answers: an earlier checkpoint of the teacher "
        "(early_stopped_teacher), or KD beside the labels that stops early (KD(weight=StopAt(...))).",
    ),
    (
        "temperature",
        lambda gap: (gap.best.agreement or 0.0) - (_coolest(gap).agreement or 0.0) > gap.margin,
        "Distil at temperature {t}: more of the teacher is taken over than at the lowest one.",
    ),
    (
        "assistant",
        lambda gap: _ratio(gap) >= LARGER,
        "An assistant between the two (teacher_assistant), of {middle} parameters or so; or, without a third network, "
        "the teacher's route (RouteConstrained) or an earlier checkpoint of it (early_stopped_teacher).",
    ),
    (
        "softer teacher",
        lambda gap: gap.confidence >= SURE,
        "A softer teacher: its route (RouteConstrained), an earlier checkpoint (early_stopped_teacher), or a higher "
        "temperature.",
    ),
    (
        "more",
        lambda gap: True,
        "A longer training, or features beside the answers (such as ReviewKD): neither size nor confidence explains "
        "the gap.",
    ),
]


def _reasons(gap: Gap) -> list[str]:
    """What the rules looked at, in words."""
    best, missing = gap.best, gap.teacher.accuracy - gap.best.accuracy
    found = [
        f"Taught by answers alone (T={best.temperature:g}) the student reaches {best.accuracy:.1%} of the labels and "
        f"{best.agreement or 0.0:.1%} of the teacher's choices; the teacher reaches {gap.teacher.accuracy:.1%}. "
        f"{100 * missing:.1f} points are missing; {100 * gap.margin:.1f} or fewer may be chance.",
        f"Labels alone reach {gap.alone.accuracy:.1%} with the same budget.",
        f"On training data it agrees with the teacher in {gap.fit:.1%}.",
        f"The teacher has {_ratio(gap):.1f} times the parameters, and is {gap.confidence:.1%} sure on average.",
    ]
    last = [probe for probe in gap.probes if probe.network == "student"][-1:]
    found += [
        f"A linear probe of its embedding finds {probe.choices:.1%} of the teacher's choices, more than its own "
        "classifier: the features are there already."
        for probe in last
        if probe.choices - (best.agreement or 0.0) > gap.margin
    ]
    return found
