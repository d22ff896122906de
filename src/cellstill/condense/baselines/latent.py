"""Baselines in the supervised latent space that ours starts from, each without one of its parts.

They share the trained space of ours, and decode what they find as ours does, so that a difference is due to the method
alone. Medoids are real cells instead, and ``feat_distill`` decodes nothing: its classifiers see the latent space.
"""

from __future__ import annotations

import numpy as np
import torch

from cellstill.condense.baselines.base import baseline, kmeans, medoids
from cellstill.condense.baselines.selection import random
from cellstill.condense.cells import Features, LabelledCells
from cellstill.condense.counts import Rendering
from cellstill.condense.objectives import distribution_distance
from cellstill.condense.pool import draw_probe
from cellstill.condense.problem import CondensationProblem
from cellstill.condense.shared import shared_space
from cellstill.condense.space import Space
from cellstill.train.fit import seeded

N_STEPS = 200
"""Steps of the free features."""

_LR = 0.05
_N_REAL = 256
_PROBE = "mlp_256"
_LLOYD = "Lloyd (1982), 10.1109/TIT.1982.1056489"


@baseline(
    "kmeans_latent",
    reference=_LLOYD,
    limits="The decoder smooths: cells without the zeros of real ones, from which forests learn little.",
)
def kmeans_latent(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    """Centroids of k-means in the supervised latent space, within each class, decoded as expected counts."""
    space = shared_space(problem, seed)
    z = space.encode(problem.train).cpu().numpy()
    centres, codes = [], []
    for code, n in enumerate(problem.budget(samples_per_class)):
        found = kmeans(z[problem.train.of_class(code)], int(n), seed)[1]
        centres.append(found)
        codes.append(np.full(len(found), code))
    points = torch.from_numpy(np.concatenate(centres).astype(np.float32)).to(space.device)
    return space.render(Rendering("expected"), points, np.concatenate(codes), seed)


@baseline("kmeans_latent_medoids", reference=_LLOYD, limits="Single cells, with the noise of a single cell.")
def kmeans_latent_medoids(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    """Real cells, of each cluster of :func:`kmeans_latent` the one closest to the centroid."""
    z = shared_space(problem, seed).encode(problem.train).cpu().numpy()
    return medoids(problem, samples_per_class, z, seed)


@baseline(
    "generator",
    reference="One-step conditional diffusion without matching; diffusion: Ho et al. (2020), arXiv:2006.11239",
    limits="As noisy as random cells: made to look like real ones, not to teach.",
)
def generator(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    """Cells that the one-step generator makes of noise, with counts drawn from the decoder's negative binomial."""
    space = shared_space(problem, seed)
    budget = problem.budget(samples_per_class)
    codes = np.repeat(np.arange(len(budget)), budget)
    noise = torch.randn(
        len(codes), space.autoencoder.config.n_latent, generator=torch.Generator().manual_seed(seed)
    ).to(space.device)
    z = space.sample(noise, torch.from_numpy(codes).to(space.device))
    return space.render(Rendering("sampled"), z, codes, seed)


@baseline(
    "text_distill",
    reference="Feature-level matching, then decoding: after Zhao and Bilen (2023), arXiv:2110.04181, in a latent space",
    limits="Free points of the latent space may leave what the decoder knows; moments, not boundaries, are matched.",
)
def text_distill(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> LabelledCells:
    """Features of :func:`match_features`, decoded as expected counts."""
    space = shared_space(problem, seed)
    z, codes = match_features(problem, space, samples_per_class, seed)
    return space.render(Rendering("expected"), z, codes, seed)


@baseline(
    "feat_distill",
    reference="Feature-level matching: after Zhao and Bilen (2023), arXiv:2110.04181, in a latent space",
    limits="No cells: only classifiers of features learn from them, with the encoder, which was trained on all cells.",
)
def feat_distill(problem: CondensationProblem, samples_per_class: int, seed: int = 0) -> Features:
    """Features of :func:`match_features` as they are, and the encoder: classifiers see z of the test cells."""
    space = shared_space(problem, seed)
    z, codes = match_features(problem, space, samples_per_class, seed)
    return space.features(z, codes)


def match_features(
    problem: CondensationProblem, space: Space, samples_per_class: int, seed: int
) -> tuple[torch.Tensor, np.ndarray]:
    """Match means and variances of free latent features to those of real cells under random networks.

    Features start at those of random real cells of the class, and take :data:`N_STEPS` steps of Adam; no generator
    constrains them.

    Returns
    -------
    Features ``(n, n_latent)``, on the device of the space, and their classes ``(n,)``.
    """
    start = random(problem, samples_per_class, seed)
    known, label = space.encode(problem.train), torch.from_numpy(start.codes)
    rows = [torch.from_numpy(problem.train.of_class(code)) for code in range(problem.n_classes)]
    known_label = torch.from_numpy(problem.train.codes)
    # A copy outside inference mode, which can be learned.
    z = space.encode(start).clone().requires_grad_(True)
    optimiser = torch.optim.Adam([z], lr=_LR)
    with seeded(seed):
        for _ in range(N_STEPS):
            probe = draw_probe(_PROBE, z.shape[1], problem.n_classes, z.device)
            drawn = torch.cat([own[torch.randint(len(own), (_N_REAL,))] for own in rows])
            loss = distribution_distance(
                probe, known[drawn].to(z.device), known_label[drawn].to(z.device), z, label.to(z.device)
            )
            z.grad = torch.autograd.grad(loss, z)[0]
            optimiser.step()
    return z.detach(), start.codes
