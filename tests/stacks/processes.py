"""Run the cases of a module in two processes of one gloo group, on this machine's loopback."""

import json
import os
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path

from tests.support.paths import ROOT

PROCESSES = 2


def run_cases(module, folder, seed, timeout=420):
    """Run the cases of tests.stacks.<module> up to a failing one; return {case: None or error}."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "MASTER_ADDR": "127.0.0.1",
        "WORLD_SIZE": str(PROCESSES),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    arguments = [sys.executable, "-m", "tests.stacks.processes", module, str(folder), str(seed)]
    workers = [
        subprocess.Popen(
            [*arguments, str(rank)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        outputs = [worker.communicate(timeout=timeout)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    results, errors = {}, {}
    for rank, (worker, output) in enumerate(zip(workers, outputs, strict=True)):
        file = Path(folder, f"{rank}.json")
        assert file.exists(), output[-4000:]
        for case, error in json.loads(file.read_text()).items():
            results.setdefault(case, []).append(error)
        errors[rank] = f"rank {rank} ended with {worker.returncode}: {output[-4000:]}"
    return {
        case: next(filter(None, found), None if len(found) == PROCESSES else str(errors))
        for case, found in results.items()
    }


def main(module, folder, seed, rank):
    """Run a module's cases as one rank; the group ends with the process."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=int(rank), world_size=PROCESSES)
    results = {}
    for name, case in import_module(f"tests.stacks.{module}").CASES.items():
        torch.manual_seed(int(seed))
        results[name] = None
        try:
            case()
        except Exception:
            results[name] = traceback.format_exc()
        Path(folder, f"{rank}.json").write_text(json.dumps(results))
        if results[name] is not None:
            os._exit(0)  # the other rank may be in the middle of a collective: nothing more to do
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
