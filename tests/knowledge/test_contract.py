"""What holds for every loss of two tensors, whatever its formula."""

from __future__ import annotations

import pytest
import torch

from tutelage.architecture.res_kd import residual_energy
from tutelage.architecture.residual_kd import residual_error
from tutelage.knowledge.feature.activation_boundary import activation_boundary
from tutelage.knowledge.feature.attention_transfer import attention_transfer
from tutelage.knowledge.feature.cat_kd import class_attention
from tutelage.knowledge.feature.channel_wise import channel_wise
from tutelage.knowledge.feature.exclusivity_consistency import feature_consistency
from tutelage.knowledge.feature.factor_transfer import factor_transfer
from tutelage.knowledge.feature.feature_aggregation import aggregated_hint
from tutelage.knowledge.feature.feature_norm import feature_normalized_kd
from tutelage.knowledge.feature.fitnets import hint_loss
from tutelage.knowledge.feature.information_flow import information_flow
from tutelage.knowledge.feature.internal_representation import attention_divergence, first_token_distance
from tutelage.knowledge.feature.jacobian import jacobian_matching
from tutelage.knowledge.feature.mgd import generation_distance
from tutelage.knowledge.feature.neuron_selectivity import neuron_selectivity
from tutelage.knowledge.feature.overhaul import partial_l2
from tutelage.knowledge.feature.pkt import pkt
from tutelage.knowledge.feature.review_kd import hierarchical_context
from tutelage.knowledge.feature.sem_ckd import calibrated_hint
from tutelage.knowledge.feature.sim_kd import feature_alignment
from tutelage.knowledge.feature.srrl import softmax_regression
from tutelage.knowledge.feature.task_oriented import task_feature_distance
from tutelage.knowledge.feature.vid import variational_information
from tutelage.knowledge.relation.correlation_congruence import correlation_congruence
from tutelage.knowledge.relation.darkrank import darkrank
from tutelage.knowledge.relation.feature_embedding import locality_preserving
from tutelage.knowledge.relation.fsp import fsp
from tutelage.knowledge.relation.ickd import inter_channel_correlation
from tutelage.knowledge.relation.instance_graph import graph_edges, graph_transformation, graph_vertices
from tutelage.knowledge.relation.logit_graph import logit_graph, representation_graph
from tutelage.knowledge.relation.metric_learning import absolute_teacher, relative_teacher
from tutelage.knowledge.relation.mhgd import attention_graph_divergence
from tutelage.knowledge.relation.rkd import rkd_angle, rkd_distance
from tutelage.knowledge.relation.similarity_preserving import similarity_preserving
from tutelage.knowledge.relation.sskd import similarity_divergence
from tutelage.knowledge.relation.svd_transfer import singular_value
from tutelage.knowledge.response.conditional_kd import conditional_kd
from tutelage.knowledge.response.cwtm import confidence_weighted
from tutelage.knowledge.response.detection_response import bounded_box_regression, detection_classes
from tutelage.knowledge.response.dist import dist
from tutelage.knowledge.response.dkd import decoupled_kd
from tutelage.knowledge.response.dkpp import permuted_kd
from tutelage.knowledge.response.generalized_jsd import generalized_jsd
from tutelage.knowledge.response.heatmap_response import heatmap_response
from tutelage.knowledge.response.kd import kd_divergence
from tutelage.knowledge.response.logit_regression import logit_regression
from tutelage.knowledge.response.logit_std import logit_standardization
from tutelage.knowledge.response.nkd import normalized_kd
from tutelage.knowledge.response.skew_kl import skew_kl
from tutelage.knowledge.response.top_k_kd import top_k_kd
from tutelage.knowledge.response.total_variation import total_variation
from tutelage.knowledge.response.wsld import weighted_soft_labels
from tutelage.record import in_float32
from tutelage.schemes.self_distillation.data_distortion import mean_embedding_distance
from tutelage.schemes.self_distillation.ema import consistency
from tutelage.schemes.self_distillation.self_attention import attention_mimicry
from tutelage.schemes.self_distillation.snapshot import asymmetric_kd

ROWS, MAP = (6, 9), (6, 4, 5, 3)


def layers(formula, **options):
    """A formula of two layers of each network as one of a map: the second layer is a part of it."""
    return lambda s, t: formula((s, s[:, :3, ::2]), (t, t[:, :3, ::2]), **options)


def labelled(formula, **options):
    """A formula that needs labels: here all samples are of class 3."""
    return lambda s, t: formula(s, t, torch.full((len(s),), 3), **options)


def views(x):
    """Samples that each have four views, as originals and then their copies."""
    return x.transpose(0, 1).flatten(0, 1)


FORMULAS = [
    pytest.param(kd_divergence, ROWS, id="kd_divergence"),
    pytest.param(skew_kl, ROWS, id="skew_kl"),
    pytest.param(lambda s, t: skew_kl(s, t, reverse=True), ROWS, id="skew_kl, reverse"),
    pytest.param(total_variation, ROWS, id="total_variation"),
    pytest.param(lambda s, t: top_k_kd(s, t, 3), ROWS, id="top_k_kd"),
    pytest.param(asymmetric_kd, ROWS, id="asymmetric_kd"),
    pytest.param(consistency, ROWS, id="consistency"),
    pytest.param(logit_regression, ROWS, id="logit_regression"),
    pytest.param(lambda s, t: logit_regression(s, t, centre=True), ROWS, id="logit_regression, centred"),
    pytest.param(hint_loss, MAP, id="hint_loss"),
    pytest.param(attention_transfer, MAP, id="attention_transfer"),
    pytest.param(lambda s, t: attention_transfer(s, t, p=1), MAP, id="attention_transfer, p=1"),
    pytest.param(similarity_preserving, MAP, id="similarity_preserving"),
    pytest.param(attention_mimicry, MAP, id="attention_mimicry"),
    pytest.param(mean_embedding_distance, ROWS, id="mean_embedding_distance"),
    pytest.param(rkd_distance, ROWS, id="rkd_distance"),
    pytest.param(rkd_angle, ROWS, id="rkd_angle"),
    pytest.param(lambda s, t: rkd_angle(s, t, chunk=2), ROWS, id="rkd_angle, in chunks"),
    pytest.param(layers(fsp), MAP, id="fsp"),
    pytest.param(layers(fsp, pool="average"), MAP, id="fsp, average"),
    pytest.param(layers(singular_value), MAP, id="singular_value"),
    pytest.param(layers(singular_value, vectors=2), MAP, id="singular_value, two vectors"),
    pytest.param(inter_channel_correlation, MAP, id="inter_channel_correlation"),
    pytest.param(graph_vertices, ROWS, id="graph_vertices"),
    pytest.param(graph_edges, MAP, id="graph_edges"),
    pytest.param(layers(graph_transformation), MAP, id="graph_transformation"),
    pytest.param(correlation_congruence, ROWS, id="correlation_congruence"),
    pytest.param(pkt, ROWS, id="pkt"),
    pytest.param(darkrank, ROWS, id="darkrank"),
    pytest.param(lambda s, t: darkrank(s, t, hard=False), ROWS, id="darkrank, soft"),
    pytest.param(absolute_teacher, ROWS, id="absolute_teacher"),
    pytest.param(relative_teacher, ROWS, id="relative_teacher"),
    pytest.param(locality_preserving, ROWS, id="locality_preserving"),
    pytest.param(lambda s, t: logit_graph(s, [t]), ROWS, id="logit_graph"),
    pytest.param(lambda s, t: representation_graph(s, [t]), ROWS, id="representation_graph"),
    pytest.param(attention_graph_divergence, (6, 4, 4), id="attention_graph_divergence"),
    pytest.param(lambda s, t: similarity_divergence(views(s), views(t)), (6, 4, 3), id="similarity_divergence"),
    pytest.param(
        lambda s, t: attention_divergence(*(in_float32(x).softmax(-1) for x in (s, t))),
        (6, 2, 4, 4),
        id="attention_divergence",
    ),
    pytest.param(first_token_distance, (6, 4, 3), id="first_token_distance"),
    pytest.param(hierarchical_context, MAP, id="hierarchical_context"),
    pytest.param(factor_transfer, MAP, id="factor_transfer"),
    pytest.param(lambda s, t: factor_transfer(s, t, p=2), MAP, id="factor_transfer, p=2"),
    pytest.param(lambda s, t: neuron_selectivity(s, t, "linear"), MAP, id="neuron_selectivity, linear"),
    pytest.param(neuron_selectivity, MAP, id="neuron_selectivity, by channels"),
    pytest.param(neuron_selectivity, (6, 5, 2, 2), id="neuron_selectivity, by positions"),
    pytest.param(lambda s, t: neuron_selectivity(s, t, "gaussian", 0.5), MAP, id="neuron_selectivity, gaussian"),
    pytest.param(lambda s, t: variational_information(s, t, torch.ones(4).to(s)), MAP, id="variational_information"),
    pytest.param(channel_wise, MAP, id="channel_wise"),
    pytest.param(activation_boundary, MAP, id="activation_boundary"),
    pytest.param(feature_alignment, MAP, id="feature_alignment"),
    pytest.param(residual_energy, ROWS, id="residual_energy"),
    pytest.param(lambda s, t: residual_error(torch.zeros_like(s), s, t), MAP, id="residual_error"),
    pytest.param(lambda s, t: feature_normalized_kd(s, t, s, t), ROWS, id="feature_normalized_kd"),
    pytest.param(lambda s, t: softmax_regression(s, t, s.new_ones(5, 9).triu()), ROWS, id="softmax_regression"),
    pytest.param(lambda s, t: partial_l2(s, t, -torch.linspace(0.1, 1, 4)), MAP, id="partial_l2"),
    pytest.param(lambda s, t: calibrated_hint([[s]], [[t]], s.new_ones(len(s), 1, 1)), MAP, id="calibrated_hint"),
    pytest.param(class_attention, MAP, id="class_attention"),
    pytest.param(lambda s, t: class_attention(s, t, 3, normalise=False), MAP, id="class_attention, of size 3"),
    pytest.param(lambda s, t: feature_consistency(s, t, hardness=0), ROWS, id="feature_consistency, plain"),
    pytest.param(generation_distance, MAP, id="generation_distance"),
    pytest.param(task_feature_distance, ROWS, id="task_feature_distance"),
    pytest.param(information_flow, ROWS, id="information_flow"),
    pytest.param(lambda s, t: inter_channel_correlation(s, t, 3), MAP, id="inter_channel_correlation, grid of 3"),
    pytest.param(jacobian_matching, MAP, id="jacobian_matching"),
    pytest.param(lambda s, t: aggregated_hint(s, (t, 2 * t), s.new_tensor([1.0, 0.0])), MAP, id="aggregated_hint"),
    pytest.param(labelled(decoupled_kd), ROWS, id="decoupled_kd"),
    pytest.param(dist, ROWS, id="dist"),
    pytest.param(generalized_jsd, ROWS, id="generalized_jsd"),
    pytest.param(lambda s, t: generalized_jsd(s, t, beta=0.0), ROWS, id="generalized_jsd, forward"),
    pytest.param(lambda s, t: generalized_jsd(s, t, beta=1.0), ROWS, id="generalized_jsd, reverse"),
    pytest.param(logit_standardization, ROWS, id="logit_standardization"),
    pytest.param(labelled(normalized_kd), ROWS, id="normalized_kd"),
    pytest.param(labelled(conditional_kd), ROWS, id="conditional_kd"),
    pytest.param(labelled(confidence_weighted), ROWS, id="confidence_weighted"),
    pytest.param(permuted_kd, (6, 2), id="permuted_kd"),  # of two classes, where chance changes nothing
    pytest.param(labelled(weighted_soft_labels), ROWS, id="weighted_soft_labels"),
    pytest.param(detection_classes, ROWS, id="detection_classes"),
    pytest.param(
        lambda s, t: bounded_box_regression(s, t, torch.full_like(s, 0.125)), (6, 4), id="bounded_box_regression"
    ),
    pytest.param(
        lambda s, t: heatmap_response(s, t, torch.full_like(s, 0.25), alpha=1), MAP, id="heatmap_response, soft"
    ),
]
every = pytest.mark.parametrize(("formula", "shape"), FORMULAS)
# a likelihood is greatest, neighbours are nearest, and a margin is kept where the student is another than the teacher;
# cross-entropies keep the target's entropy, a student that is wrong is taught the label, and an unsoftened one that it
# shall be softer
NOT_ZERO = (
    "asymmetric_kd",
    "confidence_weighted",
    "activation_boundary",
    "conditional_kd",
    "darkrank",
    "detection_classes",
    "locality_preserving",
    "normalized_kd",
)
ZERO = [case for case in FORMULAS if case.id not in NOT_ZERO]
# the weights of soft labels are constants in the backward pass
SMOOTH = [case for case in FORMULAS if case.id != "weighted_soft_labels"]


def pair(shape, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(shape, dtype=dtype).requires_grad_(), torch.randn(shape, dtype=dtype).requires_grad_()


@every
def test_is_a_float64_scalar_whose_gradient_reaches_the_student_alone(formula, shape):
    student, teacher = pair(shape)
    value = formula(student, teacher)
    value.backward()
    assert value.shape == ()
    assert value.dtype == torch.float64
    assert value > 0
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize(("formula", "shape"), SMOOTH)
def test_the_gradient_is_that_of_finite_differences(formula, shape):
    student, teacher = pair(shape)
    assert torch.autograd.gradcheck(lambda s: formula(s, teacher.detach()), student)


@pytest.mark.parametrize(("formula", "shape"), ZERO)
def test_a_student_equal_to_its_teacher_costs_nothing(formula, shape):
    student, _ = pair(shape)
    value = formula(student, student.detach().clone())
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-14)
    assert student.grad.abs().max().item() == pytest.approx(0, abs=1e-12)


@every
def test_the_order_of_the_batch_does_not_matter(formula, shape):
    student, teacher = pair(shape)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(formula(student[order], teacher[order]), formula(student, teacher))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_calculated_in_float32(formula, shape, dtype):
    student, teacher = (x.detach().to(dtype) for x in pair(shape))
    value = formula(student.requires_grad_(), teacher)
    value.backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, formula(student.float(), teacher.float()))
    assert student.grad.isfinite().all()


def zero_row(x):
    x[1] = 0


def zero_all(x):
    x.zero_()


def duplicates(x):
    x[1:3] = x[0]


def all_equal(x):
    x[:] = x[0].clone()


def extreme(x):
    x.copy_(x.sign() * 500)


@every
@pytest.mark.parametrize("spoil", [zero_row, zero_all, duplicates, all_equal, extreme])
@pytest.mark.parametrize("whom", ["student", "teacher", "both"])
def test_degenerate_batches_have_finite_values_and_sane_gradients(formula, shape, spoil, whom):
    student, teacher = (x.detach() for x in pair(shape, torch.float32))
    for side, x in (("student", student), ("teacher", teacher)):
        if whom in (side, "both"):
            spoil(x)
    value = formula(student.requires_grad_(), teacher)
    value.backward()
    assert value.isfinite()
    # finite is not enough: a division by max(norm, 1e-12) gives a row of zeros a gradient of 1e12; what grows with a
    # power of the features, as FSP's matrices do, has a gradient of that size
    assert student.grad.abs().max() < 1e4 * value.detach().clamp(min=1)


@every
def test_a_batch_of_one_is_finite(formula, shape):
    student, teacher = (x[:1].detach() for x in pair(shape, torch.float32))
    value = formula(student.requires_grad_(), teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
