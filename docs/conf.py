"""How Sphinx builds the documents: `make docs`."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import lora_kernels
from bench.figures import figures
from bench.results import load

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


def relink(_app, _path, _parent, content):
    """Make the links of included files, which start at the root, start at docs/."""
    text = re.sub(r"\]\((?!\w+:|#)", "](../", content[0])
    content[0] = text.replace("](../docs/", "](").replace(
        "](../CONTRIBUTING.md", "](contributing.md"
    )


def draw(_app):
    """Draw the figures of the results that README's tables are from."""
    [measured] = re.findall(r"<!-- measured: (\S+) -->", (ROOT / "README.md").read_text())
    data, folder = load(ROOT / measured), ROOT / "docs" / "figures"
    folder.mkdir(exist_ok=True)
    for name, figure in figures(data["rows"], data["ceilings"]).items():
        figure.savefig(folder / f"{name}.svg")


def setup(app):
    """Register both with Sphinx."""
    app.connect("include-read", relink)
    app.connect("builder-inited", draw)
