"""The public interface is what it was: `public_api.txt` describes that of revision e546fea.

What is added or changed on purpose since then stands in `public_api_since.txt`, and nowhere else.
"""

from pathlib import Path

import pytest

from lora_kernels import testing
from tests.support.public_api import PUBLIC, described


def _read(name):
    """Return the lines of each paragraph by the name that it begins with."""
    text = Path(__file__).with_name(name).read_text().strip()
    paragraphs = [lines.splitlines() for lines in text.split("\n\n")]
    return {lines[0].split("(")[0].split(":")[0]: lines for lines in paragraphs}


BEFORE, SINCE = _read("public_api.txt"), _read("public_api_since.txt")
# Of `lora_kernels.testing`, which users' own checks may import.
TESTING = (
    "Case", "FEW_ELEMENTS", "FEW_SUMS", "GRADIENTS", "Inputs", "MANY_DRAWS", "MORE_DRAWS", "Sizes",
    "USUAL", "assert_parity", "assert_results", "assert_within_budget", "beyond_float16_cases",
    "eager_errors", "eager_results", "float16_range_cases", "make_inputs", "reference_results",
    "run", "to_tf32",
)  # fmt: skip


@pytest.mark.parametrize("name", BEFORE | SINCE)
def test_signature_and_docstring_sections_are_as_before(name):
    if name.split(".")[0] == "TrainerCallback" and "TrainerCallback" not in PUBLIC:
        pytest.skip("needs transformers")
    assert described().get(name) == (BEFORE | SINCE)[name]


def test_nothing_is_public_that_is_not_listed():
    assert described().keys() <= BEFORE.keys() | SINCE.keys()


@pytest.mark.parametrize("name", TESTING)
def test_names_of_the_testing_module_are_importable(name):
    assert hasattr(testing, name)
