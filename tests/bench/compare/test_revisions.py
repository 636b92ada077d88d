"""Two revisions are compared by calls that both can make, or the comparison fails."""

import pytest

from bench.compare import revisions


class _Side:
    def __init__(self, answer):
        self.answer = answer

    def ms(self, what):
        return self.answer

    def close(self):
        pass


@pytest.mark.parametrize(
    ("new", "old", "message"),
    [(float("nan"), 1.0, "can't make this call any more"), (1.0, float("nan"), "no call that")],
)
def test_a_comparison_of_no_call_fails(new, old, message, monkeypatch, capsys, tmp_path):
    sides = iter([_Side(new), _Side(old)])
    monkeypatch.setattr(revisions, "Side", lambda package, folder: next(sides))
    monkeypatch.setattr(revisions, "checked_out", lambda revision, scratch: tmp_path)
    assert revisions.main(["HEAD", "--rounds", "2"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("built", [True, False])
def test_another_revision_has_the_part_of_this_one(built, monkeypatch, tmp_path):
    """Otherwise it would be compared by eager calls alone."""
    monkeypatch.setattr(revisions, "BUILT", {"cpu": built})
    revisions._run(["sh", "-c", "echo $LORA_KERNELS_CPU > asked"], tmp_path)
    assert (tmp_path / "asked").read_text() == f"{int(built)}\n"
