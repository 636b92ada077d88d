"""The command line of the benchmarks."""

import bench.__main__ as program
from bench.options import parse
from bench.providers.registry import BY_NAME
from bench.shapes import cases


def test_unknown_names_are_refused(capsys):
    for asked, expected in (
        (["--shapes", "llama3-8b/kv"], "expected one of llama3-8b/q+o"),
        (["--shapes", "gpt"], "expected one of targets"),
        (["--suite", "layers"], "expected some of layer"),
        (["--providers", "peft,vllm"], "expected some of base"),
        (["--seconds", "0"], "expected a positive number"),
        (["--dropouts", "0;1"], "expected a list"),
        (["--dropouts", "1"], "expected probabilities in [0, 1), got '1'"),
        (["--threads", "0"], "expected a number of at least 1, got '0'"),
        (["--tokens", "8,x"], "expected a number of at least 1, got 'x'"),
    ):
        try:
            status = program.main([*asked, "--list"])
        except SystemExit as left:
            status = left.code
        assert status == 2
        assert expected in capsys.readouterr().err


def test_quick_runs_ask_for_little():
    quick, whole = parse(["--quick"]), parse([])
    assert quick.seconds < whole.seconds
    assert len(cases(quick.shapes, quick.grid)) < len(cases(whole.shapes, whole.grid))
    assert quick.providers == whole.providers == list(BY_NAME)
