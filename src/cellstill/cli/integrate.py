"""``cellstill integrate``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellstill.cli._terminal import Terminal, terminal

if TYPE_CHECKING:
    from cellstill.cli._pipeline import Integration

_CELLS, _METHOD, _RESULTS = "Which cells", "How", "Results"


class PCAChoice(StrEnum):
    """Values of ``--pca-method``."""

    standard = "standard"
    pearson_residuals = "pearson_residuals"
    scaled_residuals = "scaled_residuals"


class Accelerator(StrEnum):
    """Values of ``--accelerator``."""

    auto = "auto"
    cpu = "cpu"
    gpu = "gpu"


def integrate(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Counts: an .h5ad file or a .zarr folder.")],
    batch_key: Annotated[
        str, typer.Option(help="Column of obs with the batch to remove.", metavar="KEY", rich_help_panel=_CELLS)
    ],
    layer: Annotated[
        str | None,
        typer.Option(help="Layer with raw counts; X by default.", metavar="NAME", rich_help_panel=_CELLS),
    ] = None,
    label_key: Annotated[
        str | None,
        typer.Option(
            help="Column with cell types. Not used in training: it is scored, drawn, and transferred to new cells.",
            metavar="KEY",
            rich_help_panel=_CELLS,
        ),
    ] = None,
    covariate_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Column with biology that must survive, such as condition; may be given several times.",
            metavar="KEY",
            rich_help_panel=_CELLS,
        ),
    ] = None,
    allow_noninteger: Annotated[
        bool,
        typer.Option("--allow-noninteger", help="Accept counts with ambient RNA removed.", rich_help_panel=_CELLS),
    ] = False,
    teacher: Annotated[
        str,
        typer.Option(
            help="Method to learn from: harmony, combat, latent (an embedding in obsm) or identity (no correction).",
            metavar="NAME",
            rich_help_panel=_METHOD,
        ),
    ] = "harmony",
    teacher_setting: Annotated[
        list[str] | None,
        typer.Option(
            help="Setting of the teacher, such as max_iter=30 or theta=4; may be given several times.",
            metavar="NAME=VALUE",
            rich_help_panel=_METHOD,
        ),
    ] = None,
    obsm_key: Annotated[
        str | None,
        typer.Option(help="Embedding for --teacher latent.", metavar="KEY", rich_help_panel=_METHOD),
    ] = None,
    n_latent: Annotated[
        int,
        typer.Option(
            min=1, help="Dimensions. More keep finer structure, and more noise.", metavar="N", rich_help_panel=_METHOD
        ),
    ] = 50,
    pca_method: Annotated[
        PCAChoice,
        typer.Option(
            help="Take pearson_residuals where batches differ in depth, scaled_residuals (and --n-latent 10) "
            "where they differ gene by gene and hold the same kinds of cells.",
            rich_help_panel=_METHOD,
        ),
    ] = PCAChoice.standard,
    epochs_encoder: Annotated[
        int, typer.Option(min=0, help="Most epochs of the encoder.", metavar="N", rich_help_panel=_METHOD)
    ] = 100,
    epochs_decoder: Annotated[
        int, typer.Option(min=0, help="Most epochs of the decoder.", metavar="N", rich_help_panel=_METHOD)
    ] = 100,
    seed: Annotated[
        int,
        typer.Option(min=0, help="The same seed gives the same result.", metavar="N", rich_help_panel=_METHOD),
    ] = 0,
    accelerator: Annotated[
        Accelerator,
        typer.Option(help="Where to train; auto takes a CUDA device if there is one.", rich_help_panel=_METHOD),
    ] = Accelerator.auto,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write; FILE's name + _cellstill by default.", metavar="DIR", rich_help_panel=_RESULTS
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder if it exists.", rich_help_panel=_RESULTS)
    ] = False,
    corrected: Annotated[
        bool,
        typer.Option(
            "--corrected",
            help='Write layers["corrected"]: log2(CPM + 1), decoded without batch. Dense: 4 bytes per cell and gene.',
            rich_help_panel=_RESULTS,
        ),
    ] = False,
    target_batch: Annotated[
        list[str] | None,
        typer.Option(
            help="Decode as this batch; several are averaged, all of them by default. Needs --corrected.",
            metavar="BATCH",
            rich_help_panel=_RESULTS,
        ),
    ] = None,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Show what libraries say, and the trace of errors.", rich_help_panel=_RESULTS
        ),
    ] = False,
) -> None:
    """Remove the batch from counts: teach a student with a batch-correction method.

    Writes a folder, complete or not at all: `integrated.h5ad` (the input, with the embeddings `X_cellstill`,
    `X_teacher` and `X_pca_uncorrected`), `model/`, `figures/` and `summary.json`. The input is not changed.

    Example: `cellstill integrate pbmc.h5ad --batch-key donor --label-key cell_type --covariate-key condition`
    """
    if target_batch and not corrected:
        raise typer.BadParameter(
            "it says how to decode layers['corrected']: give --corrected too.", param_hint="--target-batch"
        )
    if (teacher == "latent") != (obsm_key is not None):
        raise typer.BadParameter("--teacher latent and --obsm-key KEY belong together.", param_hint="--obsm-key")
    teacher_settings = dict(map(_setting, teacher_setting or ()))
    if obsm_key is not None:
        teacher_settings["obsm_key"] = obsm_key
    with terminal(verbose=verbose) as term:
        from cellstill.cli._pipeline import RESULTS, Settings, integrate_file
        from cellstill.io.store import atomic_directory

        settings = Settings(
            path=path,
            batch_key=batch_key,
            layer=layer,
            label_key=label_key,
            covariate_keys=tuple(covariate_key or ()),
            teacher=teacher,
            teacher_settings=teacher_settings,
            n_latent=n_latent,
            pca_method=pca_method.value,
            n_epochs_encoder=epochs_encoder,
            n_epochs_decoder=epochs_decoder,
            corrected=corrected,
            target_batches=tuple(target_batch or ()),
            allow_noninteger=allow_noninteger,
            accelerator=accelerator.value,
            seed=seed,
        )
        folder = out or Path(f"{path.stem}_cellstill")
        refuse_own_input(path, folder)
        with atomic_directory(folder, overwrite=overwrite, ours=RESULTS) as partial:
            result = integrate_file(settings, partial, term)
        print_result(result, folder, term)


def refuse_own_input(path: Path, folder: Path) -> None:
    """Refuse a folder that holds the input: replacing it would delete the data."""
    from cellstill.errors import StoreError

    if path.resolve().is_relative_to(folder.resolve()):
        raise StoreError(f"{path} lies in the output folder {folder}, which is replaced. Choose another --out.")


def print_result(result: Integration, folder: Path, term: Terminal) -> None:
    """Print what there is to know about a run."""
    summary = result.summary
    agreement = summary["student_teacher_r2"]
    term.out.print(result.scores.to_table())
    if result.scores.n_cells < summary["input"]["n_obs"]:
        term.out.print(f"[dim](scored on a random sample of {result.scores.n_cells:,} cells)[/]", highlight=False)
    term.out.print("")
    if agreement is not None:
        term.out.print(
            f"student and teacher agree with R² = {agreement:.3f} on validation cells", highlight=False, soft_wrap=True
        )
    print_cost(summary, folder, term)


def print_cost(summary: Mapping[str, Any], folder: Path, term: Terminal) -> None:
    """Print what a run took, and where its results are."""
    memory, seconds = summary["memory_mb"], summary["seconds"]
    stages = ", ".join(f"{name} {value:.1f}" for name, value in seconds.items() if name != "total" and value >= 0.05)
    for line in (
        f"{seconds['total']:.1f} s ({stages})",
        f"peak memory {memory['peak']:,.0f} MB, {memory['increase']:,.0f} MB more than with the data loaded",
        f"results are in {folder}",
    ):
        term.out.print(line, highlight=False, soft_wrap=True)


def _setting(text: str) -> tuple[str, Any]:
    """Parse ``NAME=VALUE``; the value is a number, true, false, null, or else text."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r} is not of the form NAME=VALUE.", param_hint="--teacher-setting")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
