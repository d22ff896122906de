"""A trained module applied to cells, block by block: posteriors, expression, background, likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cellstill._compat.malloc import keeping_freed_memory
from cellstill.errors import whole_number
from cellstill.nn.compiled import compiled
from cellstill.nn.sparse import CSRRows
from cellstill.vi.cells import Cells
from cellstill.vi.modality import Batch
from cellstill.vi.module import Latent, RegularizedVAE

_BATCH_SIZE = 1024


@dataclass(frozen=True)
class Block:
    """Some neighbouring cells on the module's device.

    Attributes
    ----------
    rows
        Their positions among the cells asked for.
    batch
        Minibatch.
    counts
        Counts of each modality.
    latent
        Posterior of z.
    """

    rows: slice
    batch: Batch
    counts: dict[str, CSRRows]
    latent: Latent


def blocks(module: RegularizedVAE, cells: Cells, batch_size: int | None) -> Iterator[Block]:
    """Encode cells in order, by default 1,024 at a time.

    The module is in evaluation mode, and nothing records gradients.
    """
    batch_size = whole_number("batch_size", _BATCH_SIZE if batch_size is None else batch_size, least=1)
    device = next(module.parameters()).device
    loader = cells.loader(batch_size=batch_size)
    start, n_values = 0, float(sum(np.prod(matrix.shape) for matrix in cells.counts.values()))
    with torch.inference_mode(), keeping_freed_memory():
        for host in loader:
            batch = {name: values.to(device) for name, values in host.items()}
            counts = module.rows(batch)
            n = next(iter(counts.values())).n_rows
            # Not around the loop: what is asked for between two blocks is not of its concern.
            with compiled("auto", n_values=n_values):
                latent = module.encode(counts, batch)
            yield Block(slice(start, start + n), batch, counts, latent)
            start += n


def decoded_as(batch: Batch, codes: Mapping[str, int]) -> Batch:
    """Put all cells of a minibatch into one category of each of the columns named."""
    changed = dict(batch)
    for column, code in codes.items():
        changed[column] = torch.full_like(batch[column], code)
    return changed


def native_expression(
    module: RegularizedVAE, name: str, z: torch.Tensor, batch: Batch, targets: Sequence[Mapping[str, int]]
) -> torch.Tensor:
    """Native expression, averaged over the categories to decode as; as the cells' own without any."""
    modality = module.modality(name)
    if not targets:
        return modality.native(z, batch)
    total = modality.native(z, decoded_as(batch, targets[0]))
    for codes in targets[1:]:
        total += modality.native(z, decoded_as(batch, codes))
    return total.div_(len(targets))


def expected_means(
    module: RegularizedVAE,
    name: str,
    block: Block,
    z: torch.Tensor | None = None,
    log_library: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Expected native and background counts of a block, cells x features; ``None`` without background.

    Parameters
    ----------
    module, name, block
        Module, modality, cells.
    z, log_library
        Shapes ``(n, n_latent)`` and ``(n, 1)``; ``None`` takes the posterior means.
    """
    modality, counts = module.modality(name), block.counts[name]
    z = block.latent.mean if z is None else z
    log_library = module.library(name, counts, block.batch).mean if log_library is None else log_library
    scaling = modality.scaling_of(block.batch)
    size = log_library.exp() if scaling is None else log_library.exp() * scaling
    background = module.background_of(name, counts, block.batch, log_library)
    return modality.native(z, block.batch).mul_(size), None if background is None else background * size


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Copy to the host."""
    return tensor.cpu().numpy()
