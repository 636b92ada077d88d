"""How the compiled parts are built: by g++ or clang++, several files at a time.

A part is a library of torch's operators: it needs no Python header, no settings of setuptools.
"""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).parent
FLAGS = "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra"
# Whatever a compiler newer than ours warns of must not stop a user's installation.
DEVELOPERS = "-Werror" if os.environ.get("LORA_KERNELS_WERROR") == "1" else ""
LONGEST_REASON = 160


class BuildError(Exception):
    """A part can't be built; the message is one line."""


def compiler() -> list[str]:
    """Return the C++ compiler's command, which CXX may name with a launcher: "ccache g++"."""
    return shlex.split(os.environ.get("CXX", "")) or ["c++"]


def no_compiler_reason() -> str | None:
    """Return why nothing can be compiled here, or None."""
    if sys.platform not in ("linux", "darwin"):
        return f"not written for {sys.platform}"
    if shutil.which(compiler()[0]) is None:
        return f"no C++ compiler: {compiler()[0]} is not on PATH"
    return None


def run(command: Sequence[str]) -> None:
    """Run a compiler; what it says goes to stderr.

    Raises:
        BuildError: it failed, with the first error that it names.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise BuildError(f"{command[0]}: {error.strerror}") from error
    output = done.stdout + done.stderr
    sys.stderr.write(output)
    if done.returncode:
        raise BuildError(f"{shlex.join(command[:1])} failed: {reason_in(output)}")


def reason_in(output: str) -> str:
    """Return the line of a compiler's output that tells most."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing"]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines[-1:])[0][:LONGEST_REASON]


def compile_sources(folder: Path, sources: Iterable[Path], flags: Sequence[str]) -> list[str]:
    """Compile into a folder, as many at a time as there are processors; return the objects.

    What is newer than its source and than every header stays.

    Raises:
        BuildError: a source can't be compiled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    environment = [flag for name in ("CPPFLAGS", "CXXFLAGS") for flag in _words(name)]
    command = [*compiler(), *FLAGS.split(), *DEVELOPERS.split(), *flags, *environment]
    settings = folder / "command"
    if not settings.exists() or settings.read_text() != shlex.join(command):
        for stale in folder.glob("*.o"):
            stale.unlink()
        settings.write_text(shlex.join(command))
    headers = (path for kind in ("*.h", "*.inc", "*.cuh") for path in CSRC.rglob(kind))
    changed = max(path.stat().st_mtime for path in headers)
    todo, objects = [], []
    for source in sources:
        made = folder / f"{source.stem}.o"
        objects.append(str(made))
        if not made.exists() or made.stat().st_mtime < max(changed, source.stat().st_mtime):
            todo.append([*command, "-c", str(source), "-o", str(made)])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, todo))
    return objects


def link(objects: Sequence[str], target: Path, folder: Path, flags: Sequence[str] = ()) -> None:
    """Link a library that takes torch's functions from the torch of the process that loads it.

    Raises:
        BuildError: it can't be linked.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [*compiler(), *objects, "-o", str(target), *flags, *_words("LDFLAGS")]
    if sys.platform == "darwin":
        run([*command, "-bundle", "-undefined", "dynamic_lookup"])
        return
    # An empty library of that name stands for torch's: the loader finds the one in the process.
    stand_in = folder / "libtorch_cpu.so"
    run(
        [
            *compiler(),
            "-shared",
            "-x",
            "c++",
            os.devnull,
            "-Wl,-soname,libtorch_cpu.so",
            "-o",
            str(stand_in),
        ]
    )
    run([*command, "-shared", f"-L{folder}", "-Wl,--no-as-needed", "-ltorch_cpu"])


def _words(name: str) -> list[str]:
    return shlex.split(os.environ.get(name, ""))
