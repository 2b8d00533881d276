"""tutelage: knowledge distillation for PyTorch, from the formula to the deployed student."""

from tutelage import functional
from tutelage.distillation import Distillation, Losses
from tutelage.distilling import Result, distill
from tutelage.evaluation import Metrics, evaluate
from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.task import TaskLoss
from tutelage.schedule import Constant, Cosine, Ramp, Stage, StopAt, WarmUp
from tutelage.teachers import Frozen, Lesson, NoTeacher, Teacher
from tutelage.training import Training

__version__ = "0.1.0"
__all__ = [
    "KD",
    "Constant",
    "Cosine",
    "Distillation",
    "Frozen",
    "Lesson",
    "Loss",
    "Losses",
    "Metrics",
    "NoTeacher",
    "Ramp",
    "Result",
    "Stage",
    "StopAt",
    "TaskLoss",
    "Teacher",
    "Training",
    "WarmUp",
    "distill",
    "evaluate",
    "functional",
]
