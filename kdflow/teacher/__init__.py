"""Teachers: engines that prefill and hand over hidden states."""

from kdflow.teacher.base import TEACHERS, Teacher

__all__ = ["TEACHERS", "Teacher"]
