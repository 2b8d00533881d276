"""tutelage: knowledge distillation for PyTorch, from the formula to the deployed student."""

from tutelage import functional
from tutelage.algorithms.adversarial.logit_critic import LogitCritic
from tutelage.algorithms.cross_modal.views import CleanToNoisy, RGBToGrey
from tutelage.algorithms.data_free.dafl import DAFL
from tutelage.algorithms.data_free.generator import Generator
from tutelage.algorithms.data_free.zskt import ZSKT
from tutelage.algorithms.multi_teacher.averaged_ensemble import AveragedEnsemble
from tutelage.algorithms.quantized.fake_quantized import fake_quantize, freeze_quantized, quantized_distillation
from tutelage.architecture.assistant_path import AssistantPath, choose_assistants
from tutelage.architecture.branch_tree import BranchTree
from tutelage.architecture.branches import Branches
from tutelage.architecture.builders import StudentBuilder, load_built, save_structure
from tutelage.architecture.densely_guided import SeveralTeachers, densely_guided
from tutelage.architecture.early_stopped_teacher import early_stopped_teacher
from tutelage.architecture.fewer_layers import FewerLayers
from tutelage.architecture.gap import capacity_gap
from tutelage.architecture.low_rank import LowRank
from tutelage.architecture.prune import Prune
from tutelage.architecture.quantized import Quantized
from tutelage.architecture.remedies import Gap, recommend
from tutelage.architecture.res_kd import ResidualStudents, energy_left, res_kd
from tutelage.architecture.residual_kd import Assisted, ResidualKD, split_width
from tutelage.architecture.separable import Separable
from tutelage.architecture.teacher_assistant import teacher_assistant
from tutelage.beside import SideLearner
from tutelage.cache import Cached
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
from tutelage.knowledge.response.cwtm import CWTM
from tutelage.knowledge.response.detection_loss import DetectionLoss
from tutelage.knowledge.response.detection_response import DetectionResponse
from tutelage.knowledge.response.dist import DIST
from tutelage.knowledge.response.dkd import DKD
from tutelage.knowledge.response.dkpp import DKPP
from tutelage.knowledge.response.generalized_jsd import GeneralizedJSD
from tutelage.knowledge.response.heatmap_response import HeatmapResponse
from tutelage.knowledge.response.in_chunks import Hidden, InChunks
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.label_smoothing import LabelSmoothing
from tutelage.knowledge.response.logit_regression import LogitRegression
from tutelage.knowledge.response.logit_std import LogitStd
from tutelage.knowledge.response.nkd import NKD
from tutelage.knowledge.response.noisy_teacher import NoisyTeacher
from tutelage.knowledge.response.skew_kl import SkewKL
from tutelage.knowledge.response.task import TaskLoss
from tutelage.knowledge.response.teacher_free_reg import TeacherFreeReg
from tutelage.knowledge.response.top_k_kd import TopKKD
from tutelage.knowledge.response.total_variation import TotalVariation
from tutelage.knowledge.response.wsld import WSLD
from tutelage.record import Record
from tutelage.schedule import Constant, Cosine, Ramp, RampUp, Stage, StartAt, StopAt, WarmUp
from tutelage.schemes.online.adversarial_online import AdversarialOnline, FeatureCritic
from tutelage.schemes.online.clilr import CLILR
from tutelage.schemes.online.codistill import codistill
from tutelage.schemes.online.codistillation import Codistillation
from tutelage.schemes.online.cohort import Cohort, best_peer, evaluate_peers
from tutelage.schemes.online.deep_mutual_learning import DeepMutualLearning
from tutelage.schemes.online.dense_mutual import DenseMutual
from tutelage.schemes.online.feature_fusion import FeatureFusion, FusedFeatures
from tutelage.schemes.online.kdcl import KDCL
from tutelage.schemes.online.okddip import AttendedKD, DiversePeers, OKDDip
from tutelage.schemes.online.one import ONE, GatedBranches
from tutelage.schemes.online.peer_collaborative import JoinedPeers, PeerCollaborative
from tutelage.schemes.self_distillation.be_your_own_teacher import BeYourOwnTeacher, ExitHint, Exits
from tutelage.schemes.self_distillation.born_again import born_again
from tutelage.schemes.self_distillation.class_wise import ClassWise
from tutelage.schemes.self_distillation.data_distortion import (
    DataDistortion,
    DistortedBatch,
    Distortions,
    MeanEmbedding,
)
from tutelage.schemes.self_distillation.early_exits import (
    EarlyExit,
    UntilExit,
    early_exit_curve,
    evaluate_exits,
    exit_costs,
)
from tutelage.schemes.self_distillation.ema import EMA, Consistency
from tutelage.schemes.self_distillation.hahn_choi import HahnChoi
from tutelage.schemes.self_distillation.past_self import PastSelf
from tutelage.schemes.self_distillation.progressive_self import ProgressiveSelf
from tutelage.schemes.self_distillation.self_attention import SelfAttention
from tutelage.schemes.self_distillation.snapshot import AsymmetricKD, Snapshot
from tutelage.schemes.self_distillation.teacher_free_self import teacher_free_self
from tutelage.teachers import Frozen, Lesson, NoTeacher, Teacher
from tutelage.training import Training
from tutelage.views import Altered, Batch, Paired, SameView

__version__ = "0.1.0"
__all__ = [
    "CATKD",
    "CLILR",
    "CRD",
    "CWTM",
    "DAFL",
    "DIST",
    "DKD",
    "DKPP",
    "EMA",
    "FSP",
    "ICKD",
    "KD",
    "KDCL",
    "MGD",
    "MHGD",
    "NKD",
    "ONE",
    "PKT",
    "RKD",
    "SRRL",
    "SSKD",
    "VID",
    "WSLD",
    "ZSKT",
    "ActivationBoundary",
    "AdversarialOnline",
    "Altered",
    "AssistantPath",
    "Assisted",
    "AsymmetricKD",
    "AttendedKD",
    "AttentionTransfer",
    "AveragedEnsemble",
    "Batch",
    "BeYourOwnTeacher",
    "BranchTree",
    "Branches",
    "Cached",
    "ChannelWise",
    "ClassWise",
    "CleanToNoisy",
    "Codistillation",
    "Cohort",
    "ConditionalKD",
    "Consistency",
    "Constant",
    "CopiedBatch",
    "CorrelationCongruence",
    "Cosine",
    "CriticalPeriod",
    "DarkRank",
    "DataDistortion",
    "DeepMutualLearning",
    "DenseMutual",
    "DetectionLoss",
    "DetectionResponse",
    "Distillation",
    "DistortedBatch",
    "Distortions",
    "DiversePeers",
    "EarlyExit",
    "ExclusivityConsistency",
    "ExitHint",
    "Exits",
    "FactorTransfer",
    "FeatureAggregation",
    "FeatureCritic",
    "FeatureEmbedding",
    "FeatureFusion",
    "FeatureNorm",
    "FewerLayers",
    "FitNets",
    "Frozen",
    "FusedFeatures",
    "Gap",
    "GatedBranches",
    "GeneralizedJSD",
    "Generator",
    "HahnChoi",
    "HeatmapResponse",
    "Hidden",
    "HolisticKD",
    "InChunks",
    "InformationFlow",
    "InstanceGraph",
    "InternalRepresentation",
    "Jacobian",
    "JoinedPeers",
    "LabelSmoothing",
    "Lesson",
    "LogitCritic",
    "LogitGraph",
    "LogitRegression",
    "LogitStd",
    "Loss",
    "Losses",
    "LowRank",
    "MeanEmbedding",
    "MetricLearning",
    "Metrics",
    "NeuronSelectivity",
    "NoTeacher",
    "NoisyTeacher",
    "OKDDip",
    "Overhaul",
    "Paired",
    "ParameterSharing",
    "PastSelf",
    "PeerCollaborative",
    "ProgressiveSelf",
    "Prune",
    "Quantized",
    "RGBToGrey",
    "Ramp",
    "RampUp",
    "Record",
    "ResidualKD",
    "ResidualStudents",
    "ResponseLoss",
    "Result",
    "ReusedClassifier",
    "ReviewKD",
    "Rocket",
    "Rotations",
    "RouteConstrained",
    "SVDTransfer",
    "SameView",
    "SelfAttention",
    "SemCKD",
    "Separable",
    "SeveralTeachers",
    "SideLearner",
    "SimKD",
    "SimilarityPreserving",
    "SkewKL",
    "Snapshot",
    "Stage",
    "StartAt",
    "StopAt",
    "StudentBuilder",
    "TaskLoss",
    "TaskOriented",
    "Teacher",
    "TeacherFreeReg",
    "TopKKD",
    "TotalVariation",
    "Training",
    "UntilExit",
    "WarmUp",
    "best_peer",
    "born_again",
    "capacity_gap",
    "choose_assistants",
    "codistill",
    "densely_guided",
    "distill",
    "early_exit_curve",
    "early_stopped_teacher",
    "energy_left",
    "evaluate",
    "evaluate_exits",
    "evaluate_peers",
    "exit_costs",
    "fake_quantize",
    "freeze_quantized",
    "functional",
    "load_built",
    "method",
    "methods",
    "quantized_distillation",
    "recommend",
    "res_kd",
    "reuse_classifier",
    "save_structure",
    "split_width",
    "teacher_assistant",
    "teacher_free_self",
]
