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
from tutelage.knowledge.feature.activation_boundary import ActivationBoundary
from tutelage.knowledge.feature.attention_transfer import AttentionTransfer
from tutelage.knowledge.feature.cat_kd import CATKD
from tutelage.knowledge.feature.channel_wise import ChannelWise
from tutelage.knowledge.feature.exclusivity_consistency import ExclusivityConsistency
from tutelage.knowledge.feature.factor_transfer import FactorTransfer
from tutelage.knowledge.feature.feature_aggregation import FeatureAggregation
from tutelage.knowledge.feature.feature_norm import FeatureNorm
from tutelage.knowledge.feature.fitnets import FitNets
from tutelage.knowledge.feature.information_flow import CriticalPeriod, InformationFlow
from tutelage.knowledge.feature.internal_representation import InternalRepresentation
from tutelage.knowledge.feature.jacobian import Jacobian
from tutelage.knowledge.feature.mgd import MGD
from tutelage.knowledge.feature.neuron_selectivity import NeuronSelectivity
from tutelage.knowledge.feature.overhaul import Overhaul
from tutelage.knowledge.feature.parameter_sharing import ParameterSharing, Rocket
from tutelage.knowledge.feature.pkt import PKT
from tutelage.knowledge.feature.review_kd import ReviewKD
from tutelage.knowledge.feature.route_constrained import RouteConstrained
from tutelage.knowledge.feature.sem_ckd import SemCKD
from tutelage.knowledge.feature.sim_kd import ReusedClassifier, SimKD, reuse_classifier
from tutelage.knowledge.feature.srrl import SRRL
from tutelage.knowledge.feature.task_oriented import TaskOriented
from tutelage.knowledge.feature.vid import VID
from tutelage.knowledge.relation.correlation_congruence import CorrelationCongruence
from tutelage.knowledge.relation.crd import CRD
from tutelage.knowledge.relation.darkrank import DarkRank
from tutelage.knowledge.relation.feature_embedding import FeatureEmbedding
from tutelage.knowledge.relation.fsp import FSP
from tutelage.knowledge.relation.holistic_kd import HolisticKD
from tutelage.knowledge.relation.ickd import ICKD
from tutelage.knowledge.relation.instance_graph import InstanceGraph
from tutelage.knowledge.relation.logit_graph import LogitGraph
from tutelage.knowledge.relation.metric_learning import MetricLearning
from tutelage.knowledge.relation.mhgd import MHGD
from tutelage.knowledge.relation.rkd import RKD
from tutelage.knowledge.relation.similarity_preserving import SimilarityPreserving
from tutelage.knowledge.relation.sskd import SSKD, CopiedBatch, Rotations
from tutelage.knowledge.relation.svd_transfer import SVDTransfer
from tutelage.knowledge.response.conditional_kd import ConditionalKD
from tutelage.knowledge.response.detection_loss import DetectionLoss
from tutelage.knowledge.response.detection_response import DetectionResponse
from tutelage.knowledge.response.dist import DIST
from tutelage.knowledge.response.dkd import DKD
from tutelage.knowledge.response.generalized_jsd import GeneralizedJSD
from tutelage.knowledge.response.heatmap_response import HeatmapResponse
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.label_smoothing import LabelSmoothing
from tutelage.knowledge.response.logit_regression import LogitRegression
from tutelage.knowledge.response.logit_std import LogitStd
from tutelage.knowledge.response.nkd import NKD
from tutelage.knowledge.response.noisy_teacher import NoisyTeacher
from tutelage.knowledge.response.task import TaskLoss
from tutelage.knowledge.response.teacher_free_reg import TeacherFreeReg
from tutelage.knowledge.response.wsld import WSLD
from tutelage.record import Record
from tutelage.schedule import Constant, Cosine, Ramp, Stage, StopAt, WarmUp
from tutelage.schemes.online.cohort import Cohort, best_peer, evaluate_peers
from tutelage.schemes.online.deep_mutual_learning import DeepMutualLearning
from tutelage.schemes.self_distillation.be_your_own_teacher import BeYourOwnTeacher, ExitHint, Exits
from tutelage.teachers import Frozen, Lesson, NoTeacher, Teacher
from tutelage.training import Training
from tutelage.views import Altered, Batch, Paired, SameView

__version__ = "0.1.0"
__all__ = [
    "CATKD",
    "CRD",
    "DAFL",
    "DIST",
    "DKD",
    "FSP",
    "ICKD",
    "KD",
    "MGD",
    "MHGD",
    "NKD",
    "PKT",
    "RKD",
    "SRRL",
    "SSKD",
    "VID",
    "WSLD",
    "ZSKT",
    "ActivationBoundary",
    "Altered",
    "AttentionTransfer",
    "AveragedEnsemble",
    "Batch",
    "BeYourOwnTeacher",
    "ChannelWise",
    "CleanToNoisy",
    "Cohort",
    "ConditionalKD",
    "Constant",
    "CopiedBatch",
    "CorrelationCongruence",
    "Cosine",
    "CriticalPeriod",
    "DarkRank",
    "DeepMutualLearning",
    "DetectionLoss",
    "DetectionResponse",
    "Distillation",
    "ExclusivityConsistency",
    "ExitHint",
    "Exits",
    "FactorTransfer",
    "FeatureAggregation",
    "FeatureEmbedding",
    "FeatureNorm",
    "FitNets",
    "Frozen",
    "GeneralizedJSD",
    "Generator",
    "HeatmapResponse",
    "HolisticKD",
    "InformationFlow",
    "InstanceGraph",
    "InternalRepresentation",
    "Jacobian",
    "LabelSmoothing",
    "Lesson",
    "LogitCritic",
    "LogitGraph",
    "LogitRegression",
    "LogitStd",
    "Loss",
    "Losses",
    "MetricLearning",
    "Metrics",
    "NeuronSelectivity",
    "NoTeacher",
    "NoisyTeacher",
    "Overhaul",
    "Paired",
    "ParameterSharing",
    "RGBToGrey",
    "Ramp",
    "Record",
    "ResponseLoss",
    "Result",
    "ReusedClassifier",
    "ReviewKD",
    "Rocket",
    "Rotations",
    "RouteConstrained",
    "SVDTransfer",
    "SameView",
    "SemCKD",
    "SideLearner",
    "SimKD",
    "SimilarityPreserving",
    "Stage",
    "StopAt",
    "TaskLoss",
    "TaskOriented",
    "Teacher",
    "TeacherFreeReg",
    "Training",
    "WarmUp",
    "best_peer",
    "distill",
    "evaluate",
    "evaluate_peers",
    "fake_quantize",
    "freeze_quantized",
    "functional",
    "method",
    "methods",
    "quantized_distillation",
    "reuse_classifier",
    "teacher_assistant",
]
