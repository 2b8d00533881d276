"""Every loss as a pure function of tensors: only the mathematics.

The student's tensor comes first, the teacher's second; no gradient flows to the teacher's.
"""

from tutelage.algorithms.adversarial.logit_critic import critic_term, fooling_term
from tutelage.algorithms.multi_teacher.averaged_ensemble import average_logits
from tutelage.architecture.res_kd import residual_energy
from tutelage.architecture.residual_kd import residual_error
from tutelage.knowledge.feature.activation_boundary import activation_boundary
from tutelage.knowledge.feature.attention_transfer import attention_map, attention_transfer
from tutelage.knowledge.feature.cat_kd import class_activation_maps, class_attention
from tutelage.knowledge.feature.channel_wise import channel_wise
from tutelage.knowledge.feature.exclusivity_consistency import feature_consistency, position_exclusivity
from tutelage.knowledge.feature.factor_transfer import factor_transfer
from tutelage.knowledge.feature.feature_aggregation import aggregate, aggregated_hint, bridge_loss
from tutelage.knowledge.feature.feature_norm import feature_normalized_kd
from tutelage.knowledge.feature.fitnets import hint_loss
from tutelage.knowledge.feature.information_flow import class_information, information_flow, match_layers
from tutelage.knowledge.feature.internal_representation import attention_divergence, first_token_distance
from tutelage.knowledge.feature.jacobian import input_gradients, jacobian_matching
from tutelage.knowledge.feature.mgd import generation_distance, random_mask
from tutelage.knowledge.feature.neuron_selectivity import neuron_selectivity
from tutelage.knowledge.feature.overhaul import batch_norm_margin, partial_l2
from tutelage.knowledge.feature.pkt import pkt
from tutelage.knowledge.feature.review_kd import hierarchical_context
from tutelage.knowledge.feature.sem_ckd import calibrated_hint
from tutelage.knowledge.feature.sim_kd import feature_alignment
from tutelage.knowledge.feature.srrl import softmax_regression
from tutelage.knowledge.feature.task_oriented import orthogonal_penalty, task_feature_distance
from tutelage.knowledge.feature.vid import variational_information
from tutelage.knowledge.relation.correlation_congruence import correlation_congruence
from tutelage.knowledge.relation.crd import contrastive_nce
from tutelage.knowledge.relation.darkrank import darkrank
from tutelage.knowledge.relation.feature_embedding import locality_preserving
from tutelage.knowledge.relation.fsp import fsp, fsp_matrix
from tutelage.knowledge.relation.holistic_kd import info_nce, neighbour_graph
from tutelage.knowledge.relation.ickd import inter_channel_correlation
from tutelage.knowledge.relation.instance_graph import graph_edges, graph_transformation, graph_vertices
from tutelage.knowledge.relation.logit_graph import logit_graph, representation_graph
from tutelage.knowledge.relation.metric_learning import absolute_teacher, relative_teacher
from tutelage.knowledge.relation.mhgd import attention_graph_divergence
from tutelage.knowledge.relation.rkd import rkd_angle, rkd_distance
from tutelage.knowledge.relation.similarity_preserving import similarity_preserving
from tutelage.knowledge.relation.sskd import copy_contrast, similarity_divergence
from tutelage.knowledge.relation.svd_transfer import singular_value
from tutelage.knowledge.response.conditional_kd import conditional_kd
from tutelage.knowledge.response.cwtm import confidence_weighted
from tutelage.knowledge.response.detection_loss import detection_loss
from tutelage.knowledge.response.detection_response import bounded_box_regression, detection_classes
from tutelage.knowledge.response.dist import dist
from tutelage.knowledge.response.dkd import decoupled_kd
from tutelage.knowledge.response.dkpp import permuted_kd, permuted_prediction
from tutelage.knowledge.response.generalized_jsd import generalized_jsd
from tutelage.knowledge.response.heatmap_response import heatmap_response
from tutelage.knowledge.response.in_chunks import chunked
from tutelage.knowledge.response.kd import kd_divergence
from tutelage.knowledge.response.label_smoothing import label_smoothing
from tutelage.knowledge.response.logit_regression import logit_regression
from tutelage.knowledge.response.logit_std import logit_standardization
from tutelage.knowledge.response.nkd import normalized_kd
from tutelage.knowledge.response.noisy_teacher import noisy_logits
from tutelage.knowledge.response.skew_kl import skew_kl
from tutelage.knowledge.response.task import task_cross_entropy
from tutelage.knowledge.response.teacher_free_reg import teacher_free, virtual_teacher
from tutelage.knowledge.response.top_k_kd import top_k_divergence, top_k_kd
from tutelage.knowledge.response.total_variation import total_variation
from tutelage.knowledge.response.wsld import weighted_soft_labels
from tutelage.schemes.online.adversarial_online import least_squares_critic, least_squares_fooling
from tutelage.schemes.online.kdcl import error_correlation, general_weights, linear_weights, min_logit, naive_weights
from tutelage.schemes.online.okddip import attended_divergence, peer_attention
from tutelage.schemes.online.one import gated_logits
from tutelage.schemes.self_distillation.be_your_own_teacher import hint_distance
from tutelage.schemes.self_distillation.data_distortion import mean_embedding_distance
from tutelage.schemes.self_distillation.ema import consistency
from tutelage.schemes.self_distillation.hahn_choi import hahn_choi, word_closeness
from tutelage.schemes.self_distillation.progressive_self import progressive_self
from tutelage.schemes.self_distillation.self_attention import attention_mimicry
from tutelage.schemes.self_distillation.snapshot import asymmetric_kd

__all__ = [
    "absolute_teacher",
    "activation_boundary",
    "aggregate",
    "aggregated_hint",
    "asymmetric_kd",
    "attended_divergence",
    "attention_divergence",
    "attention_graph_divergence",
    "attention_map",
    "attention_mimicry",
    "attention_transfer",
    "average_logits",
    "batch_norm_margin",
    "bounded_box_regression",
    "bridge_loss",
    "calibrated_hint",
    "channel_wise",
    "chunked",
    "class_activation_maps",
    "class_attention",
    "class_information",
    "conditional_kd",
    "confidence_weighted",
    "consistency",
    "contrastive_nce",
    "copy_contrast",
    "correlation_congruence",
    "critic_term",
    "darkrank",
    "decoupled_kd",
    "detection_classes",
    "detection_loss",
    "dist",
    "error_correlation",
    "factor_transfer",
    "feature_alignment",
    "feature_consistency",
    "feature_normalized_kd",
    "first_token_distance",
    "fooling_term",
    "fsp",
    "fsp_matrix",
    "gated_logits",
    "general_weights",
    "generalized_jsd",
    "generation_distance",
    "graph_edges",
    "graph_transformation",
    "graph_vertices",
    "hahn_choi",
    "heatmap_response",
    "hierarchical_context",
    "hint_distance",
    "hint_loss",
    "info_nce",
    "information_flow",
    "input_gradients",
    "inter_channel_correlation",
    "jacobian_matching",
    "kd_divergence",
    "label_smoothing",
    "least_squares_critic",
    "least_squares_fooling",
    "linear_weights",
    "locality_preserving",
    "logit_graph",
    "logit_regression",
    "logit_standardization",
    "match_layers",
    "mean_embedding_distance",
    "min_logit",
    "naive_weights",
    "neighbour_graph",
    "neuron_selectivity",
    "noisy_logits",
    "normalized_kd",
    "orthogonal_penalty",
    "partial_l2",
    "peer_attention",
    "permuted_kd",
    "permuted_prediction",
    "pkt",
    "position_exclusivity",
    "progressive_self",
    "random_mask",
    "relative_teacher",
    "representation_graph",
    "residual_energy",
    "residual_error",
    "rkd_angle",
    "rkd_distance",
    "similarity_divergence",
    "similarity_preserving",
    "singular_value",
    "skew_kl",
    "softmax_regression",
    "task_cross_entropy",
    "task_feature_distance",
    "teacher_free",
    "top_k_divergence",
    "top_k_kd",
    "total_variation",
    "variational_information",
    "virtual_teacher",
    "weighted_soft_labels",
    "word_closeness",
]
