"""Baselines in the supervised latent space that ours starts from, each without one of its parts.

They decode what they find as ours does, and share its trained space, so that a difference is due to the method alone.
"""

from __future__ import annotations

import numpy as np
import torch

from cellstill.condense.baselines.base import baseline, kmeans
from cellstill.condense.baselines.selection import random
from cellstill.condense.cells import LabelledCells
from cellstill.condense.counts import Rendering
from cellstill.condense.objectives import distribution_distance
from cellstill.condense.pool import draw_probe
from cellstill.condense.problem import CondensationProblem
from cellstill.condense.shared import shared_space
from cellstill.train.fit import seeded

N_STEPS = 200
"""Steps of the free features."""

_LR = 0.05
_N_REAL = 256
_PROBE = "mlp_256"


@baseline(
    "kmeans_latent",
    reference="Lloyd (1982), 10.1109/TIT.1982.1056489",
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
    """Match means and variances of free latent features under random networks, then decode them as expected counts.

    Features start at those of random real cells of the class, and take :data:`N_STEPS` steps of Adam; no generator
    constrains them.
    """
    space = shared_space(problem, seed)
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
    return space.render(Rendering("expected"), z.detach(), start.codes, seed)
