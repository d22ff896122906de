"""Teachers: batch-correction methods that a :class:`~cellstill.Distiller` learns from."""

from cellstill.teachers.base import TEACHERS, Teacher, TeacherInfo, TeacherInput, TeacherOutput, get_teacher
from cellstill.teachers.combat import CombatTeacher
from cellstill.teachers.harmony import HarmonyTeacher
from cellstill.teachers.latent import IdentityTeacher, LatentTeacher

__all__ = [
    "TEACHERS",
    "CombatTeacher",
    "HarmonyTeacher",
    "IdentityTeacher",
    "LatentTeacher",
    "Teacher",
    "TeacherInfo",
    "TeacherInput",
    "TeacherOutput",
    "get_teacher",
]
