"""``cellstill vi``."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cellstill.cli._terminal import Terminal, terminal
from cellstill.cli.integrate import Accelerator, print_cost, refuse_own_input

if TYPE_CHECKING:
    from cellstill.cli._regularised import Regularised

_CELLS, _MANY, _METHOD, _RESULTS = "Which cells, and what differs between them", "Several modalities", "How", "Results"


def vi(
    path: Annotated[
        Path, typer.Argument(metavar="FILE", help="Counts: an .h5ad or .h5mu file, or a .zarr folder of an AnnData.")
    ],
    batch_key: Annotated[
        str | None,
        typer.Option(
            help="Column of obs with the batch: ambient background, dispersion and library size of each.",
            metavar="KEY",
            rich_help_panel=_CELLS,
        ),
    ] = None,
    conditioning_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Column whose effect of any kind is left out of the latents; may be given several times.",
            metavar="KEY",
            rich_help_panel=_CELLS,
        ),
    ] = None,
    feature_scaling_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Column with a factor per gene, such as the technology; may be given several times.",
            metavar="KEY",
            rich_help_panel=_CELLS,
        ),
    ] = None,
    ambient_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Column with an ambient background each, instead of --batch-key; may be given several times.",
            metavar="KEY",
            rich_help_panel=_CELLS,
        ),
    ] = None,
    dispersion_key: Annotated[
        str | None,
        typer.Option(
            help="Column with groups of dispersions, instead of --batch-key.", metavar="KEY", rich_help_panel=_CELLS
        ),
    ] = None,
    library_size_key: Annotated[
        str | None,
        typer.Option(
            help="Column with groups of library sizes, instead of --batch-key.", metavar="KEY", rich_help_panel=_CELLS
        ),
    ] = None,
    encoder_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Column that encoders are told, on which the latents may then depend; may be given several times.",
            metavar="KEY",
            rich_help_panel=_CELLS,
        ),
    ] = None,
    continuous_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Column with numbers that decoders are told; may be given several times.",
            metavar="KEY",
            rich_help_panel=_CELLS,
        ),
    ] = None,
    label_key: Annotated[
        str | None,
        typer.Option(
            help="Column with cell types. Not used in training: it is scored and drawn.",
            metavar="KEY",
            rich_help_panel=_CELLS,
        ),
    ] = None,
    layer: Annotated[
        str | None,
        typer.Option(help="Layer of an AnnData with raw counts; X by default.", metavar="NAME", rich_help_panel=_CELLS),
    ] = None,
    allow_noninteger: Annotated[
        bool,
        typer.Option("--allow-noninteger", help="Accept counts that are no integers.", rich_help_panel=_CELLS),
    ] = False,
    modality: Annotated[
        list[str] | None,
        typer.Option(
            help="Modality of an .h5mu to model, all by default, and its layer with counts, X by default.",
            metavar="NAME[=LAYER]",
            rich_help_panel=_MANY,
        ),
    ] = None,
    role: Annotated[
        list[str] | None,
        typer.Option(
            help="What a modality measures (rna, atac, protein), where its name does not say so.",
            metavar="NAME=ROLE",
            rich_help_panel=_MANY,
        ),
    ] = None,
    n_hidden: Annotated[
        int, typer.Option(min=1, help="Width of the networks.", metavar="N", rich_help_panel=_METHOD)
    ] = 512,
    n_latent: Annotated[
        int,
        typer.Option(
            min=1,
            help="Dimensions, of each modality. Those not needed stay empty.",
            metavar="N",
            rich_help_panel=_METHOD,
        ),
    ] = 128,
    max_epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most epochs; by default 400, fewer for many cells.", metavar="N", rich_help_panel=_METHOD
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Cells per step.", metavar="N", rich_help_panel=_METHOD)] = 128,
    ambient_rate: Annotated[
        list[str] | None,
        typer.Option(
            help="Share of ambient counts, if it is known: of all cells, or of a batch, or of a category of each of "
            "several --ambient-key, as in a,x=0.1. Of one modality of an .h5mu: rna=0.1, rna:BATCH=0.1. May be given "
            "several times.",
            metavar="[[NAME:]BATCH=]RATE",
            rich_help_panel=_METHOD,
        ),
    ] = None,
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
            help="Folder to write; FILE's name + _cellstill_vi by default.", metavar="DIR", rich_help_panel=_RESULTS
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder if it exists.", rich_help_panel=_RESULTS)
    ] = False,
    denoised: Annotated[
        bool,
        typer.Option(
            "--denoised",
            help='Write layers["denoised"]: counts without ambient background, sparse, never above the observed.',
            rich_help_panel=_RESULTS,
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", help="Show what libraries say, and the trace of errors.", rich_help_panel=_RESULTS
        ),
    ] = False,
) -> None:
    """Learn latents free of batch and ambient RNA from counts, of one modality or many.

    Writes a folder, complete or not at all: `cells.h5ad` or `cells.h5mu` (the input, with the latents `X_vi` and each
    cell's ambient share), `ambient_profile/`, `model/`, `figures/` and `summary.json`. The input is not changed.

    Example, which integrates samples: `cellstill vi pbmc.h5ad --batch-key sample --conditioning-key sample
    --feature-scaling-key sample`
    """
    roles = dict(_assignment(text, "--role") for text in role or ())
    rate = _rate(ambient_rate or [], several_keys=len(ambient_key or ()) > 1)
    with terminal(verbose=verbose) as term:
        from cellstill.cli._regularised import RESULTS, RegularisedSettings, regularise_file
        from cellstill.io.store import atomic_directory

        settings = RegularisedSettings(
            path=path,
            batch_key=batch_key,
            conditioning_keys=tuple(conditioning_key or ()),
            feature_scaling_keys=tuple(feature_scaling_key or ()),
            ambient_keys=tuple(ambient_key or ()),
            dispersion_key=dispersion_key,
            library_size_key=library_size_key,
            encoder_keys=tuple(encoder_key or ()),
            continuous_keys=tuple(continuous_key or ()),
            label_key=label_key,
            layer=layer,
            allow_noninteger=allow_noninteger,
            modalities=dict(_modality(text) for text in modality or ()),
            roles=roles,
            n_hidden=n_hidden,
            n_latent=n_latent,
            max_epochs=max_epochs,
            batch_size=batch_size,
            ambient_rate=rate,
            seed=seed,
            accelerator=accelerator.value,
            denoised=denoised,
        )
        folder = out or Path(f"{path.stem}_cellstill_vi")
        refuse_own_input(path, folder)
        with atomic_directory(folder, overwrite=overwrite, ours=RESULTS) as partial:
            result = regularise_file(settings, partial, term)
        print_result(result, folder, term)


def print_result(result: Regularised, folder: Path, term: Terminal) -> None:
    """Print what there is to know about a run."""
    if result.scores is not None:
        term.out.print(result.scores.to_table())
        if result.scores.n_cells < result.summary["input"]["n_obs"]:
            term.out.print(f"[dim](scored on a random sample of {result.scores.n_cells:,} cells)[/]", highlight=False)
        term.out.print("")
    for name, ambient in result.summary["ambient"].items():
        each = ", ".join(
            f"{category} {share:.1%}" for category, share in list(ambient["share_by_category"].items())[:6]
        )
        more = ", ..." if len(ambient["share_by_category"]) > 6 else ""
        term.out.print(
            f"ambient share of {name}: {ambient['share']:.1%}" + (f" ({each}{more})" if each else ""),
            highlight=False,
            soft_wrap=True,
        )
    print_cost(result.summary, folder, term)


def _modality(text: str) -> tuple[str, str | None]:
    name, equals, layer = text.partition("=")
    if not name or (equals and not layer):
        raise typer.BadParameter(f"{text!r} is not of the form NAME or NAME=LAYER.", param_hint="--modality")
    return name, layer or None


def _rate(texts: list[str], *, several_keys: bool) -> float | dict[Any, float] | None:
    """One rate, or rates by what is named; by combination where several categories of several ambient keys are."""
    try:
        if len(texts) == 1 and "=" not in texts[0]:
            return float(texts[0])
        rates = [text.rpartition("=") for text in texts]
        if not all(name for name, _, _ in rates):
            raise ValueError
        # A category with a comma in its name can be quoted.
        names = [next(csv.reader([name])) if several_keys else [name] for name, _, _ in rates]
        keys = [tuple(each) if len(each) > 1 else each[0] for each in names]
        return {key: float(value) for key, (_, _, value) in zip(keys, rates, strict=True)} or None
    except ValueError:
        raise typer.BadParameter(
            f"{' '.join(texts)!r} is neither one RATE nor one NAME=RATE for each batch or modality.",
            param_hint="--ambient-rate",
        ) from None


def _assignment(text: str, option: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise typer.BadParameter(f"{text!r} is not of the form NAME=VALUE.", param_hint=option)
    return name, value
