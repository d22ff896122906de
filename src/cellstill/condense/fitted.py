"""All that a trained model of condensation is, apart from the cells it is attached to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cellstill.condense.problem import CondensationProblem, Task
from cellstill.condense.space import Space
from cellstill.condense.stored import restore_space, space_config, space_tensors
from cellstill.errors import InvalidArgumentError
from cellstill.io.store import array_to_names, names_to_array

if TYPE_CHECKING:
    from anndata import AnnData


@dataclass(frozen=True, eq=False)
class Fitted:
    """A trained space, and the names and cells that it was trained on.

    Attributes
    ----------
    space
        Latent space and generator.
    classes, tasks, genes, rows
        Those of the problem.
    fingerprint
        Of the problem, by which its cells are known again.
    """

    space: Space
    classes: tuple[str, ...]
    tasks: tuple[Task, ...]
    genes: np.ndarray
    rows: dict[str, np.ndarray]
    fingerprint: str

    @classmethod
    def on(cls, problem: CondensationProblem, space: Space) -> Fitted:
        """Join a space and the problem that it was trained on."""
        return cls(space, problem.classes, problem.tasks, problem.genes, problem.rows, problem.fingerprint())

    def attach(self, adata: AnnData, *, layer: str | None, donor_key: str | None) -> CondensationProblem:
        """Split the cells of training as they were.

        Raises
        ------
        InvalidArgumentError
            ``adata`` has other cells or labels.
        """
        keys = [task.key for task in self.tasks]
        problem = CondensationProblem.from_rows(adata, keys, self.rows, self.genes, layer=layer, donor_key=donor_key)
        if problem.classes != self.classes:
            raise InvalidArgumentError(
                f"adata has the classes {list(problem.classes)}; the model was trained on {list(self.classes)}. "
                "Attach the cells of training, or load without data and generate."
            )
        if problem.fingerprint() != self.fingerprint:
            raise InvalidArgumentError(
                "adata has other cells, labels or counts than those of training, or has them in another order. "
                "Attach the cells of training as they were, or load without data and generate."
            )
        return problem

    def check_number(self, n_obs: int) -> None:
        """Refuse more or fewer cells than those of training."""
        n_cells = sum(map(len, self.rows.values()))
        if n_obs == n_cells:
            return
        told = f"adata has {n_obs} cells; the model was trained on {n_cells}. "
        if n_obs > n_cells:
            told += (
                "Leave out those that were set aside. `cellstill condense --evaluate` names them in test_cells.csv "
                'beside the model, by their row in the file: held_out = pd.read_csv("test_cells.csv")["row"]; '
                "adata = adata[~np.isin(np.arange(adata.n_obs), held_out)].copy(). "
            )
        raise InvalidArgumentError(f"{told}Attach the cells of training, or load without data and generate.")

    def tensors(self) -> dict[str, np.ndarray]:
        """All arrays, by name."""
        rows = {f"rows.{name}": part for name, part in self.rows.items()}
        return {**space_tensors(self.space), **rows, "genes": names_to_array(self.genes.tolist())}

    def config(self) -> dict[str, Any]:
        """All else, in a form that JSON can hold."""
        return {
            "cells": self.fingerprint,
            "classes": list(self.classes),
            "tasks": [asdict(task) | {"of_class": task.of_class.tolist()} for task in self.tasks],
            "space": space_config(self.space),
        }

    @classmethod
    def restore(cls, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Fitted:
        """Build from :meth:`tensors` and :meth:`config`."""
        tasks = tuple(
            # Models saved by earlier versions do not know the types of labels; theirs are text without order.
            Task(**{"dtype": "str"} | t | {"names": tuple(t["names"]), "of_class": np.asarray(t["of_class"], np.int64)})
            for t in config["tasks"]
        )
        return cls(
            restore_space(tensors, config["space"]),
            tuple(config["classes"]),
            tasks,
            np.asarray(array_to_names(tensors["genes"])),
            {name: tensors[f"rows.{name}"] for name in ("train", "validation", "test")},
            config["cells"],
        )
