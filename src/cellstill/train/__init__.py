"""Training: one call, a plan for Lightning and scvi-tools, checkpoints that a killed run goes on from."""

from cellstill.train.datamodule import CountsDataModule
from cellstill.train.fit import fit, seeded
from cellstill.train.plans import Loss, Plan, Trainable

__all__ = ["CountsDataModule", "Loss", "Plan", "Trainable", "fit", "seeded"]
