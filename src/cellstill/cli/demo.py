"""``cellstill demo``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cellstill.cli._terminal import terminal
from cellstill.cli.integrate import print_result

if TYPE_CHECKING:
    from cellstill.data import SimulationConfig

DEMO_RESULTS = ("new_cells.h5ad", "simulated.h5ad", "truth.json")
N_NEW = 200
N_EPOCHS = 40


def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.", metavar="DIR")] = Path("cellstill_demo"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the simulation and of the run.", metavar="N")] = 0,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what libraries say, and the trace of errors.")
    ] = False,
) -> None:
    """Simulate data, integrate them, and check the result against the truth.

    Three batches of five cell types, two conditions and twelve donors are drawn and integrated just as
    `cellstill integrate` would. Batch shifts, expression of the cell types and effects of the condition are known, so
    every result is compared with its truth. Exits with 1 if a check fails.
    """
    with terminal(verbose=verbose) as term:
        from cellstill.cli._pipeline import RESULTS, Settings, integrate_file
        from cellstill.io.store import atomic_directory

        with atomic_directory(out, overwrite=overwrite, ours=(*RESULTS, *DEMO_RESULTS)) as folder:
            with term.stage("simulate", "Simulating counts"):
                from cellstill.cli._outputs import write_json
                from cellstill.cli._truth import check_truth, to_table
                from cellstill.data import simulate_counts

                cells = simulate_counts(demo_config(), seed=seed)
                cells, new_cells = cells[N_NEW:].copy(), cells[:N_NEW].copy()
                cells.write_h5ad(folder / "simulated.h5ad", compression="gzip")
                new_cells.write_h5ad(folder / "new_cells.h5ad", compression="gzip")
            settings = Settings(
                path=folder / "simulated.h5ad",
                batch_key="batch",
                label_key="cell_type",
                covariate_keys=("condition",),
                n_latent=20,
                n_epochs_encoder=N_EPOCHS,
                n_epochs_decoder=N_EPOCHS,
                seed=seed,
            )
            result = integrate_file(settings, folder, term)
            with term.stage("compare", "Comparing with the truth"):
                checks = check_truth(result, cells, new_cells, folder / "model")
            write_json(folder / "truth.json", {"checks": [check.to_dict() for check in checks]})
        print_result(result, out, term)
        term.out.print()
        term.out.print(to_table(checks))
        failed = [check.name for check in checks if not check.passed]
        if failed:
            term.line("error", f"{len(failed)} of {len(checks)} checks failed: {'; '.join(failed)}.", "bold red")
            raise typer.Exit(1)


def demo_config() -> SimulationConfig:
    """Return what is simulated: batches that separate raw data, and effects large enough to be found in seconds."""
    from cellstill.data import SimulationConfig

    return SimulationConfig(
        n_obs=2000 + N_NEW,
        n_vars=800,
        n_batches=3,
        n_cell_types=5,
        n_donors_per_group=2,
        marker_fraction=0.1,
        batch_sd=0.25,
    )
