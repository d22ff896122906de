from cellstill.pl.embedding import embedding_figure, umap_coordinates
from cellstill.pl.training import training_figure

__all__ = ["embedding_figure", "training_figure", "umap_coordinates"]
