"""Regularised VI: cleaned and integrated counts of one modality or many."""

from cellstill.vi.model import AmbientRegularizedSCVI
from cellstill.vi.multimodal import RegularizedMultimodalVI

__all__ = ["AmbientRegularizedSCVI", "RegularizedMultimodalVI"]
