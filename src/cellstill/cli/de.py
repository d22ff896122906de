"""``cellstill de``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellstill.cli._terminal import Terminal, terminal
from cellstill.cli.integrate import print_cost, refuse_own_input

if TYPE_CHECKING:
    from rich.table import Table

    from cellstill.cli._differential import Differential

_CELLS, _METHOD, _RESULTS = "Which cells, and what differs between them", "How", "Results"
_N_TOP = 5


class MethodChoice(StrEnum):
    """Values of ``--method``."""

    ttest = "ttest"
    deseq2 = "deseq2"
    wilcoxon = "wilcoxon"


def de(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Raw counts: an .h5ad file or a .zarr folder.")],
    groupby: Annotated[
        str, typer.Option(help="Column of obs with the groups to compare.", metavar="KEY", rich_help_panel=_CELLS)
    ],
    group1: Annotated[str, typer.Option(help="Group whose changes are told.", metavar="GROUP", rich_help_panel=_CELLS)],
    sample_key: Annotated[
        str,
        typer.Option(
            help="Column with samples or donors: the replicates, of which each group needs at least two.",
            metavar="KEY",
            rich_help_panel=_CELLS,
        ),
    ],
    group2: Annotated[
        str | None,
        typer.Option(
            help="Group to compare with; all other cells by default.", metavar="GROUP", rich_help_panel=_CELLS
        ),
    ] = None,
    within: Annotated[
        str | None,
        typer.Option(
            help="Column, such as the cell type, inside each level of which to compare.",
            metavar="KEY",
            rich_help_panel=_CELLS,
        ),
    ] = None,
    batch_key: Annotated[
        str | None,
        typer.Option(
            help="Column with the batch, one of each sample: its effect is told from that of the groups.",
            metavar="KEY",
            rich_help_panel=_CELLS,
        ),
    ] = None,
    covariate_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Further column for the design, such as sex or age; may be given several times.",
            metavar="KEY",
            rich_help_panel=_CELLS,
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(
            help="Layer with raw counts; X by default, or the layer counts where X holds none.",
            metavar="NAME",
            rich_help_panel=_CELLS,
        ),
    ] = None,
    min_cells: Annotated[
        int,
        typer.Option(
            min=1, help="Samples with fewer cells in their group are left out.", metavar="N", rich_help_panel=_CELLS
        ),
    ] = 10,
    min_counts: Annotated[
        int,
        typer.Option(
            min=0, help="Samples with fewer counts in their group are left out.", metavar="N", rich_help_panel=_CELLS
        ),
    ] = 200,
    min_total_count: Annotated[
        int,
        typer.Option(
            min=1, help="Genes with fewer counts in all samples are not tested.", metavar="N", rich_help_panel=_CELLS
        ),
    ] = 10,
    method: Annotated[
        MethodChoice,
        typer.Option(
            help="Moderated t-test of log CPM; DESeq2 (needs pydeseq2, slower); or rank sums, for many samples.",
            rich_help_panel=_METHOD,
        ),
    ] = MethodChoice.ttest,
    borrow: Annotated[
        bool,
        typer.Option(
            "--borrow",
            help="Let each level learn which genes change from the others. Needs --within.",
            rich_help_panel=_METHOD,
        ),
    ] = False,
    shrink_lfc: Annotated[
        bool,
        typer.Option(
            "--shrink-lfc",
            help="Add fold changes shrunken towards 0 as far as they are uncertain, for ranking.",
            rich_help_panel=_METHOD,
        ),
    ] = False,
    fdr: Annotated[
        float,
        typer.Option(help="Share of the genes called that may be false.", metavar="SHARE", rich_help_panel=_METHOD),
    ] = 0.05,
    lfc_threshold: Annotated[
        float,
        typer.Option(
            min=0.0,
            help="Call changes that are larger than this, log2; the test itself is of that.",
            metavar="LOG2",
            rich_help_panel=_METHOD,
        ),
    ] = 0.0,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder to write; FILE's name + _cellstill_de by default.", metavar="DIR", rich_help_panel=_RESULTS
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder if it exists.", rich_help_panel=_RESULTS)
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Show what libraries say, and the trace of errors.", rich_help_panel=_RESULTS
        ),
    ] = False,
) -> None:
    """Find the genes that differ between two groups of samples, in raw counts summed per sample.

    Writes a folder, complete or not at all: `de.csv` (a row per gene), `samples.csv` and `left_out.csv` (what was
    compared, and what was not), `figures/` (volcano and MA) and `summary.json`. The input is not changed.

    Example: `cellstill de kang.h5ad --groupby condition --group1 stim --group2 ctrl --sample-key donor
    --within cell_type`
    """
    if borrow and within is None:
        raise typer.BadParameter("levels learn from each other: give --within KEY too.", param_hint="--borrow")
    if not 0 < fdr < 1:
        raise typer.BadParameter(f"{fdr} has to be above 0 and below 1.", param_hint="--fdr")
    with terminal(verbose=verbose) as term:
        from cellstill.cli._differential import RESULTS, DifferentialSettings, compare_file
        from cellstill.de import PseudobulkConfig
        from cellstill.io.store import atomic_directory

        settings = DifferentialSettings(
            path=path,
            groupby=groupby,
            group1=group1,
            group2=group2,
            sample_key=sample_key,
            within=within,
            batch_key=batch_key,
            layer=layer,
            config=PseudobulkConfig(
                method=method.value,
                borrow=borrow,
                shrink_lfc=shrink_lfc,
                min_cells_per_sample=min_cells,
                min_counts_per_sample=min_counts,
                min_total_count=min_total_count,
                fdr=fdr,
                lfc_threshold=lfc_threshold,
                covariate_keys=tuple(covariate_key or ()),
            ),
        )
        folder = out or Path(f"{path.stem}_cellstill_de")
        refuse_own_input(path, folder)
        with atomic_directory(folder, overwrite=overwrite, ours=RESULTS) as partial:
            found = compare_file(settings, partial, term)
        print_result(found, folder, term)


def print_result(found: Differential, folder: Path, term: Terminal) -> None:
    """Print what was compared and called, and what the method remarked; warnings have told what was left out."""
    comparisons, settings = found.summary["comparisons"], found.summary["settings"]
    first = comparisons[0]
    _, group1, group2 = first["contrast"].values()
    designs = list(dict.fromkeys(each["design"] for each in comparisons))
    title = f"{settings['groupby']}: {group1} over {group2}, {first['method']}, {' or '.join(designs)}"
    term.out.print(title, highlight=False, soft_wrap=True, markup=False)
    term.out.print(_table(comparisons, settings["within"], (group1, group2), settings["fdr"]))
    for note in _notes(found.summary):
        term.out.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)
    term.out.print("")
    print_cost(found.summary, folder, term)


def _table(comparisons: list[dict[str, Any]], within: str | None, groups: tuple[str, str], fdr: float) -> Table:
    """Sizes and calls, a row for each level."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    if within is not None:
        table.add_column(Text(within), no_wrap=True)
    for name in ("samples", "cells", "tested", f"up (FDR {fdr:g})", "down"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("most certain")
    for each in comparisons:
        sizes = [" vs ".join(f"{each[name][group]:,}" for group in groups) for name in ("n_samples", "n_cells")]
        calls = [f"{each[name]:,}" for name in ("n_tested", "n_up", "n_down")]
        level = [] if within is None else [Text(each["level"])]
        table.add_row(*level, *sizes, *calls, Text(", ".join(each["top_genes"][:_N_TOP])))
    return table


def _notes(summary: Mapping[str, Any]) -> list[str]:
    """Tell once what several levels remark in the same words, whatever the numbers."""
    from cellstill.cli._wording import in_options

    levels: dict[str, list[tuple[str | None, str]]] = {}
    for each in summary["comparisons"]:
        for note in each["notes"]:
            levels.setdefault(re.sub(r"\d+", "", note), []).append((each["level"], note))
    notes = list(summary["notes"])
    for (level, note), *others in levels.values():
        more = f" (alike in {len(others)} more)" if others else ""
        notes.append(f"{'' if level is None else f'{level}: '}{note}{more}")
    return [in_options(note) for note in notes]
