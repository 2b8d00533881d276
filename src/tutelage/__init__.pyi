"""What the library exports. Each name is imported when it is first used, which keeps `import tutelage` cheap."""

from . import comparison, data, deploy, functional, models
from .algorithms.adversarial.logit_critic import LogitCritic
from .algorithms.cross_modal.views import CleanToNoisy, RGBToGrey
from .algorithms.data_free.dafl import DAFL
from .algorithms.data_free.generator import Generator
from .algorithms.data_free.zskt import ZSKT
from .algorithms.multi_teacher.averaged_ensemble import AveragedEnsemble
from .algorithms.quantized.fake_quantized import fake_quantize, freeze_quantized, quantized_distillation
from .architecture.assistant_path import AssistantPath, choose_assistants
from .architecture.branch_tree import BranchTree
from .architecture.branches import Branches
from .architecture.builders import StudentBuilder, load_built, save_structure
from .architecture.densely_guided import SeveralTeachers, densely_guided
from .architecture.early_stopped_teacher import early_stopped_teacher
from .architecture.fewer_layers import FewerLayers
from .architecture.gap import capacity_gap
from .architecture.low_rank import LowRank
from .architecture.prune import Prune
from .architecture.quantized import Quantized
from .architecture.remedies import Gap, recommend
from .architecture.res_kd import ResidualStudents, energy_left, res_kd
from .architecture.residual_kd import Assisted, ResidualKD, split_width
from .architecture.separable import Separable
from .architecture.teacher_assistant import teacher_assistant
from .beside import SideLearner
from .cache import Cached
from .catalogue import method, methods
from .distillation import Distillation, Losses
from .distilling import Result, distill
from .evaluation import Metrics, evaluate
from .knowledge.base import Loss, ResponseLoss
from .knowledge.feature.activation_boundary import ActivationBoundary
from .knowledge.feature.attention_transfer import AttentionTransfer
from .knowledge.feature.cat_kd import CATKD
from .knowledge.feature.channel_wise import ChannelWise
from .knowledge.feature.exclusivity_consistency import ExclusivityConsistency
from .knowledge.feature.factor_transfer import FactorTransfer
from .knowledge.feature.feature_aggregation import FeatureAggregation
from .knowledge.feature.feature_norm import FeatureNorm
from .knowledge.feature.fitnets import FitNets
from .knowledge.feature.information_flow import CriticalPeriod, InformationFlow
from .knowledge.feature.internal_representation import InternalRepresentation
from .knowledge.feature.jacobian import Jacobian
from .knowledge.feature.mgd import MGD
from .knowledge.feature.neuron_selectivity import NeuronSelectivity
from .knowledge.feature.overhaul import Overhaul
from .knowledge.feature.parameter_sharing import ParameterSharing, Rocket
from .knowledge.feature.pkt import PKT
from .knowledge.feature.review_kd import ReviewKD
from .knowledge.feature.route_constrained import RouteConstrained
from .knowledge.feature.sem_ckd import SemCKD
from .knowledge.feature.sim_kd import ReusedClassifier, SimKD, reuse_classifier
from .knowledge.feature.srrl import SRRL
from .knowledge.feature.task_oriented import TaskOriented
from .knowledge.feature.vid import VID
from .knowledge.relation.correlation_congruence import CorrelationCongruence
from .knowledge.relation.crd import CRD
from .knowledge.relation.darkrank import DarkRank
from .knowledge.relation.feature_embedding import FeatureEmbedding
from .knowledge.relation.fsp import FSP
from .knowledge.relation.holistic_kd import HolisticKD
from .knowledge.relation.ickd import ICKD
from .knowledge.relation.instance_graph import InstanceGraph
from .knowledge.relation.logit_graph import LogitGraph
from .knowledge.relation.metric_learning import MetricLearning
from .knowledge.relation.mhgd import MHGD
from .knowledge.relation.rkd import RKD
from .knowledge.relation.similarity_preserving import SimilarityPreserving
from .knowledge.relation.sskd import SSKD, CopiedBatch, Rotations
from .knowledge.relation.svd_transfer import SVDTransfer
from .knowledge.response.conditional_kd import ConditionalKD
from .knowledge.response.cwtm import CWTM
from .knowledge.response.detection_loss import DetectionLoss
from .knowledge.response.detection_response import DetectionResponse
from .knowledge.response.dist import DIST
from .knowledge.response.dkd import DKD
from .knowledge.response.dkpp import DKPP
from .knowledge.response.generalized_jsd import GeneralizedJSD
from .knowledge.response.heatmap_response import HeatmapResponse
from .knowledge.response.in_chunks import Hidden, InChunks
from .knowledge.response.kd import KD
from .knowledge.response.label_smoothing import LabelSmoothing
from .knowledge.response.logit_regression import LogitRegression
from .knowledge.response.logit_std import LogitStd
from .knowledge.response.nkd import NKD
from .knowledge.response.noisy_teacher import NoisyTeacher
from .knowledge.response.skew_kl import SkewKL
from .knowledge.response.task import TaskLoss
from .knowledge.response.teacher_free_reg import TeacherFreeReg
from .knowledge.response.top_k_kd import TopKKD
from .knowledge.response.total_variation import TotalVariation
from .knowledge.response.wsld import WSLD
from .record import Record
from .schedule import Constant, Cosine, Ramp, RampUp, Stage, StartAt, StopAt, WarmUp
from .schemes.online.adversarial_online import AdversarialOnline, FeatureCritic
from .schemes.online.clilr import CLILR
from .schemes.online.codistill import codistill
from .schemes.online.codistillation import Codistillation
from .schemes.online.cohort import Cohort, best_peer, evaluate_peers
from .schemes.online.deep_mutual_learning import DeepMutualLearning
from .schemes.online.dense_mutual import DenseMutual
from .schemes.online.feature_fusion import FeatureFusion, FusedFeatures
from .schemes.online.kdcl import KDCL
from .schemes.online.okddip import AttendedKD, DiversePeers, OKDDip
from .schemes.online.one import ONE, GatedBranches
from .schemes.online.peer_collaborative import JoinedPeers, PeerCollaborative
from .schemes.self_distillation.be_your_own_teacher import BeYourOwnTeacher, ExitHint, Exits
from .schemes.self_distillation.born_again import born_again
from .schemes.self_distillation.class_wise import ClassWise
from .schemes.self_distillation.data_distortion import (
    DataDistortion,
    DistortedBatch,
    Distortions,
    MeanEmbedding,
)
from .schemes.self_distillation.early_exits import (
    EarlyExit,
    UntilExit,
    early_exit_curve,
    evaluate_exits,
    exit_costs,
)
from .schemes.self_distillation.ema import EMA, Consistency
from .schemes.self_distillation.hahn_choi import HahnChoi
from .schemes.self_distillation.past_self import PastSelf
from .schemes.self_distillation.progressive_self import ProgressiveSelf
from .schemes.self_distillation.self_attention import SelfAttention
from .schemes.self_distillation.snapshot import AsymmetricKD, Snapshot
from .schemes.self_distillation.teacher_free_self import teacher_free_self
from .teachers import Frozen, Lesson, NoTeacher, Teacher
from .training import Training
from .views import Altered, Batch, Paired, SameView

__version__: str
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
    "comparison",
    "data",
    "densely_guided",
    "deploy",
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
    "models",
    "quantized_distillation",
    "recommend",
    "res_kd",
    "reuse_classifier",
    "save_structure",
    "split_width",
    "teacher_assistant",
    "teacher_free_self",
]
