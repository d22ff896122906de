from cellstill.metrics.condensation import (
    BootstrapInterval,
    ClassificationScores,
    classification_scores,
    cross_architecture_gap,
    label_robust_score,
    paired_bootstrap,
    rarest_classes,
    retention,
)
from cellstill.metrics.integration import ari, clisi, ilisi, ilisi_ceiling, integration_table, lisi, nmi
from cellstill.metrics.membership import membership_inference, paired_membership_inference
from cellstill.metrics.neighbourhood import (
    Neighbours,
    cross_batch_knn_accuracy,
    knn_accuracy,
    labels_of_one_batch,
    nearest_neighbours,
)
from cellstill.metrics.privacy import ClosestRecord, distance_to_closest_record
from cellstill.metrics.realism import forest_auroc, match_classes, realism_table

__all__ = [
    "BootstrapInterval",
    "ClassificationScores",
    "ClosestRecord",
    "Neighbours",
    "ari",
    "classification_scores",
    "clisi",
    "cross_architecture_gap",
    "cross_batch_knn_accuracy",
    "distance_to_closest_record",
    "forest_auroc",
    "ilisi",
    "ilisi_ceiling",
    "integration_table",
    "knn_accuracy",
    "label_robust_score",
    "labels_of_one_batch",
    "lisi",
    "match_classes",
    "membership_inference",
    "nearest_neighbours",
    "nmi",
    "paired_bootstrap",
    "paired_membership_inference",
    "rarest_classes",
    "realism_table",
    "retention",
]
