"""`python -m bench`: measure, show each row as it comes, keep it, and write the report."""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from bench.measure.environment import describe_run, machine_name
from bench.measure.results_file import FILE, Results, load
from bench.measure.session import Session, start
from bench.options import Options, parse
from bench.providers.registry import BY_NAME, chosen
from bench.report import page, summary
from bench.shapes import QLORA, cases
from bench.suites import layer, memory, overhead, step

INTERRUPTED = 130  # the status of a program that Ctrl-C ended


class Point(NamedTuple):
    """Something to measure, whose rows make one table."""

    suite: str
    title: str
    header: str
    measure: Callable[[Session], Iterable[Any]]


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return an exit status."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    providers, absent = chosen(options.providers, options.device)
    try:
        planned = list(points(options))
    except ValueError as error:
        return _refused(f"--{error}")
    if absent and options.providers != list(BY_NAME):  # all stand for those that are there
        return _refused("; ".join(f"--providers: {name}: {why}" for name, why in absent.items()))
    if not planned:
        return _refused("nothing to measure")
    run = describe_run(options.device)
    print(machine_name(run), run["revision"], run["date"], sep=", ")
    for name, reason in absent.items():
        print(f"left out: {name}: {reason}")
    if options.list_only:
        for point in planned:
            print(f"{point.suite}: {point.title}")
        return 0
    dtypes = sorted({row.dtype for row in cases(options.shapes, options.grid)})
    session = start(options.device, providers, options.seconds, options.graphs, dtypes)
    print(f"ceilings: {session.ceilings}")
    asked = {"seconds": options.seconds, "quick": options.quick, "suites": options.suites}
    about = {"run": run, "absent": absent, "options": asked, "ceilings": asdict(session.ceilings)}
    return measure(planned, session, Results(options.out / FILE, about))


def measure(planned: list[Point], session: Session, results: Results) -> int:
    """Measure points until they end or Ctrl-C comes, write the report, return an exit status."""
    status = 0
    try:
        with tqdm(planned, unit="point", dynamic_ncols=True) as bar:
            for point in bar:
                bar.set_description(point.suite)
                bar.write(f"\n{point.suite}: {point.title}\n{point.header}")
                measured: list[Any] = []
                try:
                    for row in point.measure(session):
                        bar.write(str(row))
                        measured.append(row)
                finally:
                    results.add(point.suite, measured)
    except KeyboardInterrupt:
        results.interrupt()
        status = INTERRUPTED
        print(f"\ninterrupted; {len(results)} rows kept", file=sys.stderr)
    finally:
        session.probe.close()
    if not status and (complaint := summary.complaint(load(results.path)["rows"])):
        status = _refused(complaint, 1)
    print(f"\nresults: {results.path}\nreport:  {page.write(results.path, results.path.parent)}")
    return status


def _refused(reason: str, status: int = 2) -> int:
    print(f"python -m bench: error: {reason}", file=sys.stderr)
    return status


def points(options: Options) -> Iterator[Point]:
    """Yield what the options ask for.

    Raises:
        ValueError: a shape that the list doesn't have.
    """
    listed = {
        "layer": _layer_points,
        "step": _step_points,
        "overhead": _overhead_points,
        "memory": _memory_points,
        "kernels": _kernel_points,
    }
    for suite in options.suites:
        yield from listed[suite](options)


def _layer_points(options: Options) -> Iterator[Point]:
    for case in cases(options.shapes, options.grid):
        yield Point("layer", str(case), layer.Row.HEADER, partial(layer.measure, case))


def _step_points(options: Options) -> Iterator[Point]:
    sizes = step.QUICK if options.quick else step.SIZES[options.device]
    grid = options.grid
    planned: list[step.StepCase] = []
    # Shapes are a layer's; of them "qlora" says how a step's weights are kept, too.
    if options.shapes != [QLORA]:
        planned += step.step_cases(sizes, grid.dtypes, grid.dropouts)
    if QLORA in options.shapes:
        planned += step.qlora_cases(sizes, grid.dtypes, grid.dropouts)
    for case in planned:
        yield Point("step", str(case), step.StepRow.HEADER, partial(step.measure, case))


def _overhead_points(options: Options) -> Iterator[Point]:
    yield Point("overhead", "a tiny call", overhead.OverheadRow.HEADER, overhead.measure)
    masks = partial(overhead.measure_masks, options.threads)
    yield Point("mask", "the keep mask on the CPU", overhead.MaskRow.HEADER, masks)


def _memory_points(options: Options) -> Iterator[Point]:
    for group in memory.groups(options.shapes, options.grid):
        header = memory.MemoryRow.HEADER
        yield Point("memory", str(group.case), header, partial(memory.measure, group))


def _kernel_points(options: Options) -> Iterator[Point]:
    if find_spec("triton") is None:
        print("left out: the kernels suite: triton is not installed")
        return
    from bench.suites import kernels

    for arch in options.archs:
        for wanted in kernels.layers(options.quick):
            count = partial(_counted, partial(kernels.measure, wanted, arch, options.quick))
            yield Point("kernels", kernels.title(wanted, arch), kernels.KernelRow.HEADER, count)


def _counted(count: Callable[[], Iterable[Any]], session: Session) -> Iterable[Any]:
    return count()


if __name__ == "__main__":
    sys.exit(main())
