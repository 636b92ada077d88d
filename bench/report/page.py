"""The report of a run: one self-contained HTML page, and its figures as PNG files.

python -m bench.report.page bench_results/.../results.json [--out FOLDER]
"""

import argparse
import base64
import io
import sys
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from bench.measure.environment import machine_name
from bench.measure.results_file import load
from bench.report import summary, tables
from bench.report.figures import figures

TEMPLATE = "page.html.j2"
PAGE, DPI = "report.html", 110


def write(results: Path, folder: Path) -> Path:
    """Write report.html and a PNG of each figure into a folder, and return the page's path.

    Raises:
        ValueError: the file is not one of results.
    """
    data = load(results)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {name: png(figure) for name, figure in figures(data["rows"], data["ceilings"]).items()}
    for name, image in drawn.items():
        (folder / f"{name}.png").write_bytes(image)
    page = folder / PAGE
    page.write_text(render(data, drawn))
    return page


def png(figure: Figure) -> bytes:
    """Return a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def render(data: dict[str, Any], images: dict[str, bytes]) -> str:
    """Return the page; images are inside it."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    rows = data["rows"]
    inline = {name: base64.b64encode(image).decode() for name, image in images.items()}
    return environment.get_template(TEMPLATE).render(
        machine=machine_name(data["run"]),
        images=inline,
        short=summary.in_short(rows),
        growth=summary.growth(rows),
        faults=summary.faults(rows),
        exceeded=summary.exceeded(rows),
        sections=tables.sections(rows),
        left=tables.WORDS,
        **data,
    )


def main(arguments: list[str] | None = None) -> int:
    """Write the report of a results file, beside it unless told otherwise."""
    parser = argparse.ArgumentParser(prog="python -m bench.report.page", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    try:
        print(write(given.results, given.out or given.results.parent))
    except (OSError, ValueError) as error:
        print(f"python -m bench.report.page: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
