"""Sphinx: Markdown pages, built offline by `make docs`."""

project = "UMBIF"
copyright = "the UMBIF developers"
extensions = ["myst_parser"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "UMBIF"
exclude_patterns = ["_build"]
