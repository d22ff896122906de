"""Sphinx configuration."""

import cellstill

project = "cellstill"
author = "The cellstill developers"
release = cellstill.__version__
extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax"]
autosummary_generate = True
numpydoc_show_class_members = False
html_theme = "sphinx_book_theme"
exclude_patterns = ["_build"]
