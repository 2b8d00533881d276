"""Every loss as a pure function of tensors: only the mathematics.

The student's tensor comes first, the teacher's second; no gradient flows to the teacher's.
"""

from tutelage.algorithms.adversarial.logit_critic import critic_term, fooling_term
from tutelage.algorithms.multi_teacher.averaged_ensemble import average_logits
from tutelage.knowledge.feature.attention_transfer import attention_map, attention_transfer
from tutelage.knowledge.feature.fitnets import hint_loss
from tutelage.knowledge.relation.crd import contrastive_nce
from tutelage.knowledge.relation.rkd import rkd_angle, rkd_distance
from tutelage.knowledge.relation.similarity_preserving import similarity_preserving
from tutelage.knowledge.response.kd import kd_divergence
from tutelage.knowledge.response.logit_regression import logit_regression
from tutelage.knowledge.response.task import task_cross_entropy
from tutelage.schemes.self_distillation.be_your_own_teacher import hint_distance

__all__ = [
    "attention_map",
    "attention_transfer",
    "average_logits",
    "contrastive_nce",
    "critic_term",
    "fooling_term",
    "hint_distance",
    "hint_loss",
    "kd_divergence",
    "logit_regression",
    "rkd_angle",
    "rkd_distance",
    "similarity_preserving",
    "task_cross_entropy",
]
