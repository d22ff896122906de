from cellstill.pl.attribution import attribution_figure
from cellstill.pl.condensation import (
    condensed_embedding_figure,
    gene_panels_figure,
    joint_umap,
    mean_variance_figure,
    zero_fraction_figure,
)
from cellstill.pl.differential import ma_figure, volcano_figure
from cellstill.pl.embedding import embedding_figure, umap_coordinates
from cellstill.pl.retention import retention_figure
from cellstill.pl.training import training_figure

__all__ = [
    "attribution_figure",
    "condensed_embedding_figure",
    "embedding_figure",
    "gene_panels_figure",
    "joint_umap",
    "ma_figure",
    "mean_variance_figure",
    "retention_figure",
    "training_figure",
    "umap_coordinates",
    "volcano_figure",
    "zero_fraction_figure",
]
