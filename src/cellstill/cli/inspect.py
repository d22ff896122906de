"""``cellstill inspect``."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellstill.cli._terminal import terminal

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console

    from cellstill.cli._facts import MatrixFacts
    from cellstill.cli._keys import Column
    from cellstill.io.anndata import StoredAnnData

# Measured: libraries, figures and metrics take what they take; counts are held once, and partly twice, in training.
_BASE_MB = 950.0
_PER_COUNT_BYTE = 2.5
_N_EMBEDDINGS, _N_LATENT = 10, 50
_DEPTH_RATIO = 2.0


@dataclass(frozen=True)
class Report:
    """What a file holds.

    Attributes
    ----------
    path, shape
        The file, and its number of cells and genes.
    matrices
        ``X`` and the layers.
    columns
        Columns of ``obs``.
    obsm
        Shapes of the embeddings.
    problems
        What stands in the way of an integration, or should be known before it.
    counts
        Matrix to take as counts, or ``None``.
    memory_mb
        What ``cellstill integrate`` will need, about; ``None`` without counts.
    command
        Call of ``cellstill integrate`` to begin with.
    comparison
        Call of ``cellstill de``, if a column has the name of a condition, and samples stand for its levels; else empty.
    """

    path: Path
    shape: tuple[int, int]
    matrices: list[MatrixFacts]
    columns: list[Column]
    obsm: dict[str, tuple[int, ...]]
    problems: list[str]
    counts: MatrixFacts | None
    memory_mb: float | None
    command: str
    comparison: str

    def to_dict(self) -> dict[str, Any]:
        """Return a form that JSON can hold."""
        return {
            "path": str(self.path),
            "n_obs": self.shape[0],
            "n_vars": self.shape[1],
            "matrices": [matrix.to_dict() for matrix in self.matrices],
            "obs": [column.to_dict() for column in self.columns],
            "obsm": {name: list(shape) for name, shape in self.obsm.items()},
            "problems": self.problems,
            "counts": None if self.counts is None else self.counts.where,
            "memory_mb": self.memory_mb,
            "command": self.command,
            "comparison": self.comparison or None,
        }


def inspect(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="An .h5ad file or a .zarr folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what libraries say, and the trace of errors.")
    ] = False,
) -> None:
    """Say what a file holds, and how to integrate and compare it.

    Prints matrices and whether they hold counts, columns of obs and what they may be (batch, label, condition,
    sample), what stands in the way, the memory that an integration will need, and commands to begin with. Matrices
    are read in blocks, never whole.
    """
    with terminal(verbose=verbose) as term:
        import json

        from cellstill.io.anndata import open_anndata

        with open_anndata(path) as stored, term.stage("read", f"Reading {path.name}"):
            report = make_report(stored)
        if as_json:
            typer.echo(json.dumps(report.to_dict(), indent=2))
        else:
            print_report(report, term.out)


def make_report(stored: StoredAnnData) -> Report:
    """Look through an open file."""
    from cellstill.cli._comparison import suggest_comparison
    from cellstill.cli._facts import matrix_facts
    from cellstill.cli._keys import describe_columns, suggest

    matrices = [matrix_facts(m) for layer in (None, *stored.layers) if (m := stored.matrix(layer)) is not None]
    columns = describe_columns(stored.obs)
    keys = suggest(stored.obs, columns)
    counts = _choose_counts(matrices)
    problems = _problems(stored, matrices, columns, counts)
    command = ["cellstill", "integrate", str(stored.path)]
    command += ["--batch-key", keys["batch"][0] if keys["batch"] else "KEY"]
    for option, found in (("--label-key", keys["label"]), ("--covariate-key", keys["covariate"])):
        command += [word for key in found for word in (option, key)]
    options = suggest_comparison(stored.obs, columns)
    comparison = ["cellstill", "de", str(stored.path), *options] if options else []
    memory = None
    if counts is not None:
        if counts.where != "X":
            for words in filter(None, (command, comparison)):
                words += ["--layer", counts.where.removeprefix("layers/")]
        if keys["batch"] and (ratio := _depth_ratio(counts, stored.obs[keys["batch"][0]])) > _DEPTH_RATIO:
            problems.append(
                f"Median library sizes differ {ratio:.1f}-fold between the levels of {keys['batch'][0]!r}: take "
                "Pearson residuals, as suggested below."
            )
            command += ["--pca-method", "pearson_residuals"]
        memory = integration_memory_mb(counts, stored.shape)
    if not keys["batch"]:
        problems.append("No column of obs looks like a batch: choose the one that tells batches apart.")
    elif keys["batch"][0] not in [column.name for column in columns if column.role == "batch"]:
        problems.append(
            f"No column has a batch's name; {keys['batch'][0]!r} names samples, which can serve as batches."
        )
    return Report(
        path=stored.path,
        shape=stored.shape,
        matrices=matrices,
        columns=columns,
        obsm=stored.obsm,
        problems=problems,
        counts=counts,
        memory_mb=memory,
        command=shlex.join(command),
        comparison=shlex.join(comparison),
    )


def integration_memory_mb(counts: MatrixFacts, shape: tuple[int, int]) -> float:
    """Estimate the peak memory of ``cellstill integrate``, which holds the counts as CSR."""
    n_obs, n_vars = shape
    csr = counts.density * n_obs * n_vars * 8 + n_obs * 8
    return _BASE_MB + (_PER_COUNT_BYTE * csr + _N_EMBEDDINGS * n_obs * _N_LATENT * 4) / 2**20


def print_report(report: Report, out: Console) -> None:
    """Print a report for people."""
    from rich.table import Table
    from rich.text import Text

    def table(*headers: str) -> Table:
        made = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for header in headers:
            made.add_column(header, no_wrap=header in ("matrix", "column of obs", "may be"))
        return made

    out.print(f"[bold]{report.path.name}[/]: {report.shape[0]:,} cells x {report.shape[1]:,} genes", highlight=False)
    matrices = table("matrix", "counts?", "not 0", "range", "total per cell", "format")
    for facts in report.matrices:
        low, middle, high = (f"{value:,.0f}" for value in facts.quartiles)
        matrices.add_row(
            Text(facts.where),
            "[green]yes[/]" if facts.is_counts else f"no: {facts.problem}",
            f"{facts.density:.1%}",
            " .. ".join(
                f"{value:,.0f}" if value == round(value) else f"{value:,.2f}" for value in (facts.low, facts.high)
            ),
            f"{middle} ({low} .. {high})",
            f"{facts.format} {facts.dtype}",
        )
    out.print()
    out.print(matrices)
    columns = table("column of obs", "may be", "why")
    for column in sorted(report.columns, key=lambda column: (not column.role, column.kind != "levels")):
        columns.add_row(Text(column.name), column.role or "[dim]-[/]", Text(column.why))
    out.print()
    out.print(columns)
    if report.obsm:
        shown = ", ".join(f"{name} ({' x '.join(map(str, shape[1:]))})" for name, shape in report.obsm.items())
        out.print(f"\nembeddings: {shown}", highlight=False)
    if report.problems:
        out.print()
    for problem in report.problems:
        out.print(Text.assemble(("! ", "bold yellow"), problem))
    if report.memory_mb is not None:
        out.print(f"\nmemory for an integration: about {report.memory_mb / 1024:.1f} GB", highlight=False)
    out.print("to begin with:" if report.memory_mb is not None else "\nwith counts, to begin with:")
    out.print(Text(f"  {report.command}"), soft_wrap=True)
    if report.comparison:
        out.print("to find the genes that differ:")
        out.print(Text(f"  {report.comparison}"), soft_wrap=True)


def _choose_counts(matrices: list[MatrixFacts]) -> MatrixFacts | None:
    """``X`` if it holds counts, else a layer of that name, else any layer that does."""
    found = {facts.where: facts for facts in matrices if facts.is_counts}
    preferred = [found[where] for where in ("X", "layers/counts") if where in found]
    return next(iter([*preferred, *found.values()]), None)


def _depth_ratio(counts: MatrixFacts, batch: pd.Series) -> float:
    import pandas as pd

    medians = pd.Series(counts.totals).groupby(batch.astype(str).to_numpy()).median()
    return float(medians.max() / max(medians.min(), 1e-12))


def _problems(
    stored: StoredAnnData, matrices: list[MatrixFacts], columns: list[Column], counts: MatrixFacts | None
) -> list[str]:
    problems = []
    if counts is None:
        where = "X or any layer" if matrices else "the file"
        problems.append(
            f"No counts in {where}: bring raw counts."
            + (" raw.X may hold them: adata.raw.to_adata().write_h5ad(...)." if stored.raw_shape else "")
        )
    elif counts.n_empty_cells:
        problems.append(
            f"{counts.n_empty_cells:,} cells without a count: sc.pp.filter_cells(adata, min_counts=1), then write "
            "again."
        )
    twice = stored.var_names[stored.var_names.duplicated()].unique()
    if len(twice):
        shown = ", ".join(map(str, twice[:3])) + (", ..." if len(twice) > 3 else "")
        problems.append(
            f"{len(twice):,} gene names occur twice ({shown}): adata.var_names_make_unique(), then write again."
        )
    if not stored.obs.index.is_unique:
        problems.append("Names of cells occur twice: adata.obs_names_make_unique(), then write again.")
    problems += [
        f"obs[{column.name!r}] is missing for {column.n_missing:,} cells: label them or remove them to use it as a key."
        for column in columns
        if column.role and column.n_missing
    ]
    return problems
