from cellstill.metrics.integration import ari, clisi, ilisi, ilisi_ceiling, integration_table, lisi, nmi
from cellstill.metrics.neighbourhood import (
    Neighbours,
    cross_batch_knn_accuracy,
    knn_accuracy,
    labels_of_one_batch,
    nearest_neighbours,
)

__all__ = [
    "Neighbours",
    "ari",
    "clisi",
    "cross_batch_knn_accuracy",
    "ilisi",
    "ilisi_ceiling",
    "integration_table",
    "knn_accuracy",
    "labels_of_one_batch",
    "lisi",
    "nearest_neighbours",
    "nmi",
]
