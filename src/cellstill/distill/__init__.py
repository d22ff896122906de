"""Teacher distillation."""

from cellstill.distill.getters import Latent
from cellstill.distill.mapping import QueryMapping
from cellstill.distill.model import Distiller

__all__ = ["Distiller", "Latent", "QueryMapping"]
