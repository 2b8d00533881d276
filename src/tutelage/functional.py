"""Every loss as a pure function of tensors: only the mathematics."""

from tutelage.knowledge.response.kd import kd_divergence
from tutelage.knowledge.response.task import task_cross_entropy

__all__ = ["kd_divergence", "task_cross_entropy"]
