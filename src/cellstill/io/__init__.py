"""Safe save and load."""

from cellstill.io.store import SCHEMA_VERSION, atomic_directory, load_store, save_store

__all__ = ["SCHEMA_VERSION", "atomic_directory", "load_store", "save_store"]
