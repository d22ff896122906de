"""Dataset condensation: a few synthetic cells per class that train a classifier almost as well as all cells do."""

from cellstill.condense.baselines import BASELINES, Baseline, baseline
from cellstill.condense.cells import Features, LabelledCells
from cellstill.condense.counts import Rendering
from cellstill.condense.evaluate import evaluate
from cellstill.condense.evaluated import Evaluation, FullData
from cellstill.condense.evaluators import EVALUATORS, get_evaluators
from cellstill.condense.generator import GeneratorConfig
from cellstill.condense.latent import LatentConfig
from cellstill.condense.matching import MatchingConfig
from cellstill.condense.method import TRAINED_WITH, Variant, scdd, scdd_features
from cellstill.condense.model import SCDD
from cellstill.condense.problem import CondensationProblem
from cellstill.condense.solver import condense
from cellstill.condense.space import Space, fit_space

__all__ = [
    "BASELINES",
    "EVALUATORS",
    "SCDD",
    "TRAINED_WITH",
    "Baseline",
    "CondensationProblem",
    "Evaluation",
    "Features",
    "FullData",
    "GeneratorConfig",
    "LabelledCells",
    "LatentConfig",
    "MatchingConfig",
    "Rendering",
    "Space",
    "Variant",
    "baseline",
    "condense",
    "evaluate",
    "fit_space",
    "get_evaluators",
    "scdd",
    "scdd_features",
]
