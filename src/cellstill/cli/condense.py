"""``cellstill condense``."""

from __future__ import annotations

import shutil
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cellstill.cli._terminal import Terminal, terminal
from cellstill.cli.integrate import Accelerator, print_cost, refuse_own_input

if TYPE_CHECKING:
    from cellstill.cli._condensation import Condensation

_CELLS, _METHOD, _JUDGING, _RESULTS = "Which cells", "How", "What it is worth", "Results"


class CountsChoice(StrEnum):
    """Values of ``--counts``."""

    auto = "auto"
    rounded = "rounded"
    mixed = "mixed"
    expected = "expected"
    sampled = "sampled"


class StartChoice(StrEnum):
    """Values of ``--start``."""

    auto = "auto"
    centroids = "centroids"
    random = "random"


def condense(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Labelled counts: an .h5ad file or a .zarr folder.")],
    label_key: Annotated[
        list[str],
        typer.Option(
            help="Column with the labels to be predicted; several may be given: a class is a combination of them.",
            metavar="KEY",
            rich_help_panel=_CELLS,
        ),
    ],
    donor_key: Annotated[
        str | None,
        typer.Option(
            help="Column with donors. Cells that choose or judge then come from other donors than those learned from.",
            metavar="KEY",
            rich_help_panel=_CELLS,
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(help="Layer with raw counts; X by default.", metavar="NAME", rich_help_panel=_CELLS),
    ] = None,
    spc: Annotated[
        int,
        typer.Option(
            min=1,
            help="Synthetic cells of each class; no more than real ones.",
            metavar="N",
            rich_help_panel=_METHOD,
        ),
    ] = 10,
    counts: Annotated[
        CountsChoice,
        typer.Option(help="Form of the counts; auto takes what does best on cells set aside.", rich_help_panel=_METHOD),
    ] = CountsChoice.auto,
    start: Annotated[
        StartChoice,
        typer.Option(help="Where codes start; auto takes what does best.", rich_help_panel=_METHOD),
    ] = StartChoice.auto,
    n_top_genes: Annotated[
        int,
        typer.Option(
            min=0,
            help="Most variable genes kept; 0 keeps all with counts.",
            metavar="N",
            rich_help_panel=_METHOD,
        ),
    ] = 2000,
    obsm_key: Annotated[
        str | None,
        typer.Option(help="Embedding in obsm that teaches the latent space.", metavar="KEY", rich_help_panel=_METHOD),
    ] = None,
    n_latent: Annotated[
        int, typer.Option(min=1, help="Dimensions of the latent space.", metavar="N", rich_help_panel=_METHOD)
    ] = 128,
    n_hidden: Annotated[
        int, typer.Option(min=1, help="Width of the networks.", metavar="N", rich_help_panel=_METHOD)
    ] = 256,
    max_epochs: Annotated[
        int,
        typer.Option(min=1, help="Most epochs of the latent space's training.", metavar="N", rich_help_panel=_METHOD),
    ] = 150,
    generator_steps: Annotated[
        int,
        typer.Option(
            min=1,
            help="Steps of the generator's training; a fifth of them follows, of tuning it to one step.",
            metavar="N",
            rich_help_panel=_METHOD,
        ),
    ] = 3000,
    matching_steps: Annotated[
        int,
        typer.Option(
            min=0, help="Steps of the matching; 0 leaves codes as they start.", metavar="N", rich_help_panel=_METHOD
        ),
    ] = 200,
    seed: Annotated[
        int,
        typer.Option(min=0, help="The same seed gives the same file.", metavar="N", rich_help_panel=_METHOD),
    ] = 0,
    accelerator: Annotated[
        Accelerator,
        typer.Option(help="Where to train; auto takes a CUDA device if there is one.", rich_help_panel=_METHOD),
    ] = Accelerator.auto,
    evaluate: Annotated[
        bool,
        typer.Option(
            "--evaluate",
            help="Set test cells aside first, and score classifiers trained on the synthetic cells, beside baselines.",
            rich_help_panel=_JUDGING,
        ),
    ] = False,
    baseline: Annotated[
        list[str] | None,
        typer.Option(
            help="Method to compare with, instead of random, herding, kmeans_centroids and half_centroids; several may "
            "be given. Needs --evaluate.",
            metavar="NAME",
            rich_help_panel=_JUDGING,
        ),
    ] = None,
    evaluator: Annotated[
        list[str] | None,
        typer.Option(
            help="Classifier that judges; all six by default. Needs --evaluate.",
            metavar="NAME",
            rich_help_panel=_JUDGING,
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Repetitions of every method, 3 by default. Needs --evaluate.",
            metavar="N",
            rich_help_panel=_JUDGING,
        ),
    ] = None,
    test_size: Annotated[
        float | None,
        typer.Option(
            help="Share of the cells, or of the donors, set aside; 0.2 by default. Needs --evaluate.",
            metavar="SHARE",
            rich_help_panel=_JUDGING,
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write; FILE's name + _cellstill_condensed by default.",
            metavar="DIR",
            rich_help_panel=_RESULTS,
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace the folder if it exists, and an interrupted run.", rich_help_panel=_RESULTS
        ),
    ] = False,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with a run that was interrupted, from what it had done.", rich_help_panel=_RESULTS
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Show what libraries say, and the trace of errors.", rich_help_panel=_RESULTS
        ),
    ] = False,
) -> None:
    """Make a few synthetic cells of each class, from which a classifier learns almost as much as from all cells.

    Writes a folder, complete or not at all: `condensed.h5ad` (synthetic counts and their labels), `model/`, which
    generates more, `figures/` and `summary.json`; with `--evaluate` also `evaluation.csv` and `test_cells.csv`, the
    names of the cells that were set aside. The input is not changed.

    Example: `cellstill condense atlas.h5ad --label-key cell_type --donor-key donor --spc 10 --evaluate`
    """
    needing = {"--baseline": baseline, "--evaluator": evaluator, "--seeds": seeds, "--test-size": test_size}
    if not evaluate and (idle := [option for option, value in needing.items() if value]):
        raise typer.BadParameter("it says how to judge: give --evaluate too.", param_hint=idle[0])
    if test_size is not None and not 0 < test_size < 1:
        raise typer.BadParameter(f"{test_size} has to be above 0 and below 1.", param_hint="--test-size")
    with terminal(verbose=verbose) as term:
        from cellstill.cli._condensation import RESULTS, condense_file
        from cellstill.cli._condensed_model import DEFAULT_BASELINES, CondensationSettings
        from cellstill.errors import OtherRunError
        from cellstill.io.partial import no_empty_parents
        from cellstill.io.store import atomic_directory

        settings = CondensationSettings(
            path=path,
            label_keys=tuple(label_key),
            samples_per_class=spc,
            donor_key=donor_key,
            layer=layer,
            counts=counts.value,
            start=start.value,
            n_top_genes=n_top_genes or None,
            obsm_key=obsm_key,
            n_latent=n_latent,
            n_hidden=n_hidden,
            max_epochs=max_epochs,
            generator_steps=generator_steps,
            matching_steps=matching_steps,
            seed=seed,
            accelerator=accelerator.value,
            evaluate=evaluate,
            baselines=tuple(baseline or DEFAULT_BASELINES),
            evaluators=tuple(evaluator or ()),
            n_seeds=seeds or 3,
            test_size=test_size or 0.2,
        )
        folder = out or Path(f"{path.stem}_cellstill_condensed")
        refuse_own_input(path, folder)
        checkpoint = folder.parent / f".{folder.name}.checkpoint"
        _check_interrupted(checkpoint, resume=resume, overwrite=overwrite)
        with no_empty_parents(folder.absolute()):
            try:
                with atomic_directory(folder, overwrite=overwrite, ours=RESULTS) as partial:
                    result = condense_file(settings, partial, checkpoint, term)
            except OtherRunError:
                raise
            except BaseException:
                if _holds_a_run(checkpoint):
                    words = f"what is done is kept in {checkpoint}; the same command with --resume goes on from there."
                    term.line("note", words, "bold")
                else:
                    shutil.rmtree(checkpoint, ignore_errors=True)
                raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        print_result(result, folder, term)


def print_result(result: Condensation, folder: Path, term: Terminal) -> None:
    """Print what there is to know about a run."""
    summary = result.summary
    size, found, scores = summary["condensed"], summary["provenance"], summary["validation"]
    lines = [
        f"{size['n_real']:,} cells of {size['n_classes']} classes became {size['n_synthetic']:,} "
        f"({size['compression']:,.1f} times fewer), with {size['n_vars']:,} genes",
        f"chosen on {scores['n_cells']:,} cells set aside: start {found['start']}, {found['matching_steps']} matching "
        f"steps, {found['counts']} counts",
        f"classifiers trained on them reach a macro-F1 of {scores['condensed']:.3f} there, {scores['all_cells']:.3f} "
        "with all cells",
    ]
    if result.evaluation is None:
        lines.append("[dim](these cells chose: --evaluate sets others aside, and compares with baselines)[/]")
    for line in lines:
        term.out.print(line, highlight=False, soft_wrap=True)
    if result.evaluation is not None:
        from cellstill.cli._condensed_evaluation import evaluation_tables

        for title, table in evaluation_tables(result.evaluation, term.out.width):
            term.out.print("")
            term.out.print(title, highlight=False, soft_wrap=True)
            term.out.print(table)
    if "generated" in summary["realism"]:
        told = summary["realism"]["generated"]
        term.out.print("")
        term.out.print(
            f"generated cells: a forest tells them from real ones with AUROC {told['forest_auroc']['synthetic']:.2f} "
            f"(real from real {told['forest_auroc']['control']:.2f}); share of zeros off by "
            f"{told['zero_fraction_error']['synthetic']:.3f} ({told['zero_fraction_error']['control']:.3f})",
            highlight=False,
            soft_wrap=True,
        )
    term.out.print("")
    print_cost(summary, folder, term)


def _check_interrupted(checkpoint: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse to start afresh beside an interrupted run, unless it is to be replaced; what holds none is removed."""
    from cellstill.errors import StoreError

    if not _holds_a_run(checkpoint) or (overwrite and not resume):
        shutil.rmtree(checkpoint, ignore_errors=True)
    elif not resume:
        raise StoreError(
            f"{checkpoint} holds a run that was interrupted. Go on with --resume, or start afresh with --overwrite."
        )


def _holds_a_run(checkpoint: Path) -> bool:
    # Names of what is not whole yet start with a dot.
    return any(not file.name.startswith(".") for file in checkpoint.glob("*.ckpt"))
