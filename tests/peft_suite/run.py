"""Run PEFT's own LoRA tests on patched models, and unpatched as the baseline; compare each.

    make peft-suite ARGS="--report report.md"
    python tests/peft_suite/run.py peft-0.21.0 test_lora_variants.py   # files of an unpacked sdist

Half an hour on one core. Exits with 1 where a test passes unpatched and does not patched.
"""

import argparse
import collections
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

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


def run_file(suite, name, patch, folder):
    """Run one file; return {test: (outcome, reason)} and pytest's last lines."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "LORA_KERNELS_PATCH": str(int(patch)),
        "PYTHONPATH": str(HERE),
    }
    results = Path(folder, f"{name}-{patch}.xml")
    command = [sys.executable, "-m", "pytest", f"tests/{name}.py", "-p", "hubless", "-q"]
    command += ["-c", os.devnull, "--rootdir", ".", "-p", "no:cacheprovider", "-W", "ignore"]
    command += ["--tb=line", f"--junitxml={results}"]
    done = subprocess.run(command, cwd=suite, env=environment, capture_output=True, text=True)
    if not results.exists():
        raise SystemExit(f"{name}: pytest wrote no results\n{done.stdout[-2000:]}{done.stderr}")
    counted = re.findall(r"\d+ layers patched, \d+ calls fused", done.stdout)
    return outcomes(results), counted[-1] if counted else ""


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


def short(reason):
    """Return what a reason says first, without names and numbers that differ from test to test."""
    line = next(iter(reason.splitlines()), "")
    return re.sub(r"'[^']*'|/\S+|\d+\.\d+\S*", "…", line)[:120]


def report_of(runs):
    """Return the report's lines, and the tests that pass unpatched and not patched."""
    lines = [
        "| file | passed | failed | skipped | baseline: passed, failed, skipped | patched, fused |"
    ]
    lines += ["|---|---|---|---|---|---|"]
    total, worse, reasons = collections.Counter(), [], collections.Counter()
    for name, (plain, patched, counted) in runs.items():
        row = []
        for label, found in (("patched", patched), ("plain", plain)):
            count = collections.Counter(outcome for outcome, _ in found.values())
            total.update({(label, outcome): n for outcome, n in count.items()})
            row.append([count[outcome] for outcome in ("passed", "failed", "skipped")])
        ours, theirs = row
        lines.append(
            f"| {name} | {' | '.join(map(str, ours))} | {', '.join(map(str, theirs))} | {counted} |"
        )
        for test, (outcome, reason) in patched.items():
            before = plain.get(test, ("absent", ""))[0]
            if outcome != "passed" and before == "passed":
                worse.append(f"{test}: {outcome}: {short(reason)}")
            elif outcome != "passed":
                reasons[f"{outcome}, unpatched too: {short(reason)}"] += 1
    for label in ("patched", "plain"):
        figures = [f"{total[label, o]} {o}" for o in ("passed", "failed", "skipped")]
        lines.append(f"\n{label}: {', '.join(figures)}")
    lines += [f"\nPassed unpatched and not patched: {len(worse)}", *worse, "\nOthers:"]
    return [*lines, *(f"{n} {reason}" for reason, n in reasons.most_common())], worse


def main():
    """Run the files named, or all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite", type=Path, help="unpacked source distribution of PEFT")
    parser.add_argument("files", nargs="*", default=FILES, help="test files, all by default")
    parser.add_argument("--report", type=Path, help="where to write the report besides printing it")
    arguments = parser.parse_args()
    runs = {}
    with tempfile.TemporaryDirectory(prefix="peft-suite-") as folder:
        for name in (file.removesuffix(".py") for file in arguments.files):
            plain, _ = run_file(arguments.suite, name, False, folder)
            patched, counted = run_file(arguments.suite, name, True, folder)
            runs[name] = plain, patched, counted
            lines, worse = report_of(runs)
            print(f"{name}: {len(patched)} tests, {len(worse)} worse so far", flush=True)
            if arguments.report:
                arguments.report.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
