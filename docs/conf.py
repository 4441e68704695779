"""The documentation as a site: `uv run --group docs sphinx-build -W docs site`."""

import re

import pdiff_ray

project = "pdiff_ray"
release = pdiff_ray.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = "pdiff_ray"
myst_heading_anchors = 3
default_role = "code"  # docstrings have one backtick, as Markdown does
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True


def setup(app):
    """Lets docstrings hold `*` and `|` as they are: in formulas they mean no emphasis."""

    def escape(app, what, name, obj, options, lines):
        lines[:] = [re.sub(r"(?<!\\)[*|]", r"\\\g<0>", line) for line in lines]

    app.connect("autodoc-process-docstring", escape, priority=900)  # after napoleon
