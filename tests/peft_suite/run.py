"""Run PEFT's own LoRA tests on patched models, and unpatched as the baseline; compare each.

    make peft-suite ARGS="--report report.md"
    python tests/peft_suite/run.py peft-0.21.0 test_lora_variants.py   # files of an unpacked sdist

Half an hour on one core. Exits with 1 where a test passes unpatched and does not patched, and where
less ran than baseline.json says: see `faults`. --write-baseline writes that file.
"""

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

# The files with tests of LoRA on the CPU; the others are of other methods or need a GPU.
FILES = [
    "test_lora_variants", "test_low_level_api", "test_tuners_utils", "test_other", "test_mixed",
    "test_initialization", "test_encoder_decoder_models", "test_feature_extraction_models",
    "test_trainable_tokens", "test_token_classification_qa", "test_seq_classifier", "test_auto",
    "test_helpers", "test_integrations", "test_lora_conversion", "test_lora_intruders",
    "test_lorafa", "test_loraplus", "test_lora_ga", "test_stablediffusion", "test_config",
    "test_custom_models", "test_decoder_models", "test_target_parameters",
]  # fmt: skip
HERE = Path(__file__).resolve().parent
BASELINE = HERE / "baseline.json"
ENDED = {0: "", 1: ""}  # pytest's status where it ran tests: all passed, some failed
ENDED |= {2: "a file can't be collected", 4: "no such file", 5: "no test of LoRA in it"}


class Run(NamedTuple):
    """One file's run.

    found: {test: (outcome, reason)}; layers, calls: how many were patched and fused; fault: why
    pytest ran no tests, or "".
    """

    found: dict[str, tuple[str, str]]
    layers: int
    calls: int
    fault: str

    @property
    def passed(self):
        """The tests that passed."""
        return {test for test, (outcome, _) in self.found.items() if outcome == "passed"}


def run_file(suite, name, patch, folder):
    """Run one file of the suite by a pytest of its own."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "LORA_KERNELS_PATCH": str(int(patch)),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
    }
    results = Path(folder, f"{name}-{patch}.xml")
    command = [sys.executable, "-m", "pytest", f"tests/{name}.py", "-p", "hubless", "-q"]
    command += ["-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["--tb=line", f"--junitxml={results}"]
    done = subprocess.run(command, cwd=suite, env=environment, capture_output=True, text=True)
    fault = ENDED.get(done.returncode, f"pytest ended with {done.returncode}")
    if fault:
        last = (done.stdout + done.stderr).strip().splitlines()[-8:]
        return Run({}, 0, 0, "\n    ".join([fault, *last]))
    counted = re.findall(r"(\d+) layers patched, (\d+) calls fused", done.stdout)
    return Run(outcomes(results), *map(int, counted[-1]), "")


def outcomes(results):
    """Read a junit file: {test: (outcome, reason)}."""
    found = {}
    for case in ElementTree.parse(results).iter("testcase"):
        outcome, reason = "passed", ""
        for child in case:
            if child.tag in ("failure", "error", "skipped"):
                outcome = "failed" if child.tag in ("failure", "error") else "skipped"
                reason = (child.get("message") or child.text or "").strip()
        found[f"{case.get('classname')}::{case.get('name')}"] = (outcome, reason)
    return found


def counts(plain, patched, excused):
    """Return what the baseline holds of a file, each a least number."""
    return {
        "tests": min(len(plain.found), len(patched.found)),
        "passed unpatched": len(plain.passed - set(excused)),
        "layers patched": patched.layers,
        "calls fused": min(patched.calls, 1),
    }


def faults(name, plain, patched, baseline):
    """Say where less of a file ran than the baseline's numbers."""
    for label, run in (("unpatched", plain), ("patched", patched)):
        if run.fault:
            return [f"{name}, {label}: {run.fault}"]
    if name not in baseline["files"]:
        return [f"{name}: not in {BASELINE.name}"]
    got = counts(plain, patched, baseline["excused"])
    return [
        f"{name}: {what}: expected at least {least}, got {got[what]}"
        for what, least in baseline["files"][name].items()
        if got[what] < least
    ]


def short(reason):
    """Return what a reason says first, without names and numbers that differ from test to test."""
    line = next(iter(reason.splitlines()), "")
    return re.sub(r"'[^']*'|/\S+|\d+\.\d+\S*", "…", line)[:120]


def report_of(runs, excused):
    """Return the report's lines, and the tests that pass unpatched and not patched."""
    lines = [
        "| file | passed | failed | skipped | baseline: passed, failed, skipped | patched, fused |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    total, worse, reasons = collections.Counter(), [], collections.Counter()
    for name, (plain, patched) in runs.items():
        row = []
        for label, run in (("patched", patched), ("plain", plain)):
            count = collections.Counter(outcome for outcome, _ in run.found.values())
            total.update({(label, outcome): n for outcome, n in count.items()})
            row.append([count[outcome] for outcome in ("passed", "failed", "skipped")])
        ours, theirs = (", ".join(map(str, figures)) for figures in row)
        counted = f"{patched.layers}, {patched.calls}"
        lines.append(f"| {name} | {ours.replace(',', ' |')} | {theirs} | {counted} |")
        for test, (outcome, reason) in patched.found.items():
            if outcome == "passed":
                continue
            if test not in plain.passed:
                reasons[f"{outcome}, unpatched too: {short(reason)}"] += 1
            elif test in excused:
                reasons[f"{outcome}, excused: {test}: {excused[test]}"] += 1
            else:
                worse.append(f"{test}: {outcome}: {short(reason)}")
    for label in ("patched", "plain"):
        figures = [f"{total[label, o]} {o}" for o in ("passed", "failed", "skipped")]
        lines.append(f"\n{label}: {', '.join(figures)}")
    lines += [f"\nPassed unpatched and not patched: {len(worse)}", *worse, "\nOthers:"]
    return [*lines, *(f"{n} {reason}" for reason, n in reasons.most_common())], worse


def version_of(suite):
    """Return the version of PEFT that a suite belongs to."""
    text = (suite / "src" / "peft" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"', text, re.MULTILINE)[1]


def options(arguments):
    """Read the command line; what is no suite of the installed PEFT ends the run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path, help="unpacked source distribution of PEFT")
    parser.add_argument("files", nargs="*", default=FILES, help="test files, all by default")
    parser.add_argument("--report", type=Path, help="where to write the report besides printing it")
    parser.add_argument("--write-baseline", action="store_true", help=f"write {BASELINE.name}")
    given = parser.parse_args(arguments)
    try:
        version, installed = version_of(given.suite), metadata.version("peft")
    except OSError as error:
        parser.error(f"suite: expected a source distribution of PEFT, {error}")
    if version != installed:
        parser.error(f"suite: expected PEFT {installed}, which is installed, got {version}")
    return given, version


def main(arguments=None):
    """Run the files named, or all of them."""
    given, version = options(arguments)
    baseline = json.loads(BASELINE.read_text())
    if baseline["peft"] != version and not given.write_baseline:
        print(f"{BASELINE.name} is of PEFT {baseline['peft']}: --write-baseline", file=sys.stderr)
        return 2
    # The tests import each other as a package; the source distribution leaves its mark out.
    (given.suite / "tests" / "__init__.py").touch()
    runs, less, worse = {}, [], []
    with tempfile.TemporaryDirectory(prefix="peft-suite-") as folder:
        for name in (file.removesuffix(".py") for file in given.files):
            plain, patched = (run_file(given.suite, name, patch, folder) for patch in (False, True))
            runs[name] = plain, patched
            if given.write_baseline and not plain.fault + patched.fault:
                baseline["files"][name] = counts(plain, patched, baseline["excused"])
                BASELINE.write_text(json.dumps({**baseline, "peft": version}, indent=1) + "\n")
            less += faults(name, plain, patched, baseline)
            lines, worse = report_of(runs, baseline["excused"])
            lines += ["\nLess than the baseline:", *less] if less else []
            print(f"{name}: {len(patched.found)} tests, {len(worse)} worse so far", flush=True)
            if given.report:
                given.report.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 1 if worse or less else 0


if __name__ == "__main__":
    sys.exit(main())
