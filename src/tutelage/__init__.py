"""tutelage: knowledge distillation for PyTorch, from the formula to the deployed student."""

from tutelage import functional
from tutelage.algorithms.adversarial.logit_critic import LogitCritic
from tutelage.algorithms.cross_modal.views import CleanToNoisy, RGBToGrey
from tutelage.algorithms.data_free.dafl import DAFL
from tutelage.algorithms.data_free.generator import Generator
from tutelage.algorithms.data_free.zskt import ZSKT
from tutelage.algorithms.multi_teacher.averaged_ensemble import AveragedEnsemble
from tutelage.algorithms.quantized.fake_quantized import fake_quantize, freeze_quantized, quantized_distillation
from tutelage.architecture.teacher_assistant import teacher_assistant
from tutelage.beside import SideLearner
from tutelage.catalogue import method, methods
from tutelage.distillation import Distillation, Losses
from tutelage.distilling import Result, distill
from tutelage.evaluation import Metrics, evaluate
from tutelage.knowledge.base import Loss, ResponseLoss
from tutelage.knowledge.feature.attention_transfer import AttentionTransfer
from tutelage.knowledge.feature.fitnets import FitNets
from tutelage.knowledge.relation.crd import CRD
from tutelage.knowledge.relation.rkd import RKD
from tutelage.knowledge.relation.similarity_preserving import SimilarityPreserving
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.logit_regression import LogitRegression
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import Record
from tutelage.schedule import Constant, Cosine, Ramp, Stage, StopAt, WarmUp
from tutelage.schemes.online.deep_mutual_learning import Cohort, DeepMutualLearning
from tutelage.schemes.self_distillation.be_your_own_teacher import BeYourOwnTeacher, ExitHint, Exits
from tutelage.teachers import Frozen, Lesson, NoTeacher, Teacher
from tutelage.training import Training
from tutelage.views import Altered, Batch, Paired, SameView

__version__ = "0.1.0"
__all__ = [
    "CRD",
    "DAFL",
    "KD",
    "RKD",
    "ZSKT",
    "Altered",
    "AttentionTransfer",
    "AveragedEnsemble",
    "Batch",
    "BeYourOwnTeacher",
    "CleanToNoisy",
    "Cohort",
    "Constant",
    "Cosine",
    "DeepMutualLearning",
    "Distillation",
    "ExitHint",
    "Exits",
    "FitNets",
    "Frozen",
    "Generator",
    "Lesson",
    "LogitCritic",
    "LogitRegression",
    "Loss",
    "Losses",
    "Metrics",
    "NoTeacher",
    "Paired",
    "RGBToGrey",
    "Ramp",
    "Record",
    "ResponseLoss",
    "Result",
    "SameView",
    "SideLearner",
    "SimilarityPreserving",
    "Stage",
    "StopAt",
    "TaskLoss",
    "Teacher",
    "Training",
    "WarmUp",
    "distill",
    "evaluate",
    "fake_quantize",
    "freeze_quantized",
    "functional",
    "method",
    "methods",
    "quantized_distillation",
    "teacher_assistant",
]
