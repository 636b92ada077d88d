"""Write docs/models.md: `python -m tests.census`, or rows of some models: `... Llama GPT-2`."""

import sys

from tests.census.measure import measured
from tests.census.models import SUBJECTS
from tests.census.page import PAGE, row, written


def main() -> None:
    names = sys.argv[1:] or list(SUBJECTS)
    unknown = [name for name in names if name not in SUBJECTS]
    if unknown:
        raise SystemExit(f"models: expected some of {', '.join(SUBJECTS)}, got {unknown}")
    found = []
    for name in names:
        for recipe in SUBJECTS[name].recipes:
            found.append(measured(name, recipe))
            print(row(found[-1]), flush=True)
    if not sys.argv[1:]:
        PAGE.write_text(written(found))


if __name__ == "__main__":
    main()
