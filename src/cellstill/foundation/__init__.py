"""Encoders whose knowledge of cells a condensation may use."""

from cellstill.foundation.base import FoundationEncoder, embed

__all__ = ["FoundationEncoder", "embed"]
