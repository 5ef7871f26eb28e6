"""How Sphinx builds the handbook; ``./setup handbook`` does it."""

from vtpm_cuse import __version__

project = "vtpm-cuse"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "docs/handbook/index"
suppress_warnings = ["myst.header"]  # the tables of the benchmarks skip a level
myst_heading_anchors = 3
autodoc_typehints = "description"
html_title = "vtpm-cuse"
html_show_copyright = False
html_theme_options = {"description": "A virtual TPM for Linux"}
