"""How Sphinx builds the documents: `make docs`."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import lora_kernels
from bench.measure.results_file import load
from bench.report.figures import figures

project = "lora_kernels"
author = copyright = "The lora_kernels authors"  # noqa: A001
version = release = lora_kernels.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser", "sphinx_copybutton"]
exclude_patterns = ["figures"]
# Names in docstrings become links where they are public, and code where they aren't.
default_role = "py:obj"
add_module_names = False
autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True
napoleon_use_ivar = True
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

html_theme = "furo"
html_title = f"lora_kernels {release}"


def draw(_app):
    """Draw the figures of the results that the tables of benchmarks.md are from."""
    [measured] = re.findall(
        r"<!-- measured: (\S+) -->", (ROOT / "docs" / "benchmarks.md").read_text()
    )
    data, folder = load(ROOT / measured), ROOT / "docs" / "figures"
    folder.mkdir(exist_ok=True)
    for name, figure in figures(data["rows"], data["ceilings"]).items():
        figure.savefig(folder / f"{name}.svg")


def setup(app):
    """Have figures drawn before pages are read."""
    app.connect("builder-inited", draw)
