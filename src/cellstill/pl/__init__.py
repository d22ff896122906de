from cellstill.pl.attribution import attribution_figure
from cellstill.pl.embedding import embedding_figure, umap_coordinates
from cellstill.pl.training import training_figure

__all__ = ["attribution_figure", "embedding_figure", "training_figure", "umap_coordinates"]
