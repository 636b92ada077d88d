"""Two revisions are compared by calls that both can make, or the comparison fails."""

import ast
import inspect

import pytest
import torch

import lora_kernels as lk
from bench.compare import revisions, watched_calls


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


def test_watched_calls_need_nothing_that_another_revision_may_lack():
    tree = ast.parse(inspect.getsource(watched_calls))
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    plain = [node for node in ast.walk(tree) if isinstance(node, ast.Import)]
    modules += [alias.name for node in plain for alias in node.names]
    own = [name for name in modules if name.partition(".")[0] in ("", "bench", "lora_kernels")]
    assert own == ["lora_kernels"]
    taken = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    names = {t.attr for t in taken if isinstance(t.value, ast.Name) and t.value.id == "lk"}
    assert names <= set(lk.__all__)


def test_a_wrong_call_is_not_timed(monkeypatch):
    watched_calls.call_of("tiny", "eager")()
    plain = lk.patch_peft

    def wrong(model, **given):
        torch.nn.init.zeros_(model.base_model.model[0].lora_B["default"].weight)
        return plain(model, **given)

    monkeypatch.setattr(lk, "patch_peft", wrong)
    with pytest.raises(RuntimeError, match="away from PEFT's"):
        watched_calls.call_of("tiny", "eager")
