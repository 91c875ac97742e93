"""Write requirements/*.lock, what the images install: versions of constraints.txt, with hashes of the wheels of PyPI.

`make locks` runs it, after a change of the dependencies. The locks are for CPython 3.11 on x86-64 Linux:

- `build.lock`: what makes the wheel of this project.
- `api.lock`: the dependencies of the API.
- `torch.lock`: torch with its CUDA libraries.
- `worker.lock`: all other dependencies of the engine and the service.
"""

import re
import subprocess
import sys
from pathlib import Path

from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
_HEADER = (
    "# Made by `make locks` from pyproject.toml and constraints.txt: CPython 3.11.14, x86-64 Linux, wheels of PyPI.\n"
)
_ENTRY = re.compile(r"^([A-Za-z0-9._-]+)==(\S+) \\\n(?:    --hash=sha256:[0-9a-f]{64}(?: \\\n|\n))+", re.MULTILINE)


def read_lock(name: str) -> dict[str, str]:
    """The version of each package of a lock."""
    text = (ROOT / "requirements" / f"{name}.lock").read_text(encoding="utf-8")
    return {str(canonicalize_name(match[1])): match[2] for match in _ENTRY.finditer(text)}


def read_constraints() -> dict[str, str]:
    """The version of each package of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {str(canonicalize_name(name)): version for name, version in pairs}


def _resolve(uv: str, *arguments: str, requirements: str = "") -> dict[str, str]:
    """The entries of a lock by the names of their packages."""
    command = [
        uv, "pip", "compile", "--quiet", "--constraints", "constraints.txt", "--generate-hashes",
        "--python-version", "3.11.14", "--python-platform", "x86_64-manylinux_2_28", "--only-binary", ":all:",
        "--no-annotate", "--no-header", "--no-emit-package", "pocl-client", *arguments,
    ]  # fmt: skip
    completed = subprocess.run(command, cwd=ROOT, input=requirements, capture_output=True, text=True, check=True)
    return {str(canonicalize_name(match[1])): match[0] for match in _ENTRY.finditer(completed.stdout)}


def _write(name: str, entries: dict[str, str]) -> None:
    text = _HEADER + "".join(entries[package] for package in sorted(entries))
    (ROOT / "requirements" / f"{name}.lock").write_text(text, encoding="utf-8")
    print(f"requirements/{name}.lock: {len(entries)} packages")


def main(uv: str) -> None:
    """Write the locks.

    Args:
        uv: the program that resolves.

    Raises:
        subprocess.CalledProcessError: the dependencies cannot be resolved, or PyPI is not reached.
    """
    constraints = read_constraints()
    torch = _resolve(uv, "-", requirements="torch\n")
    engine = _resolve(uv, "pyproject.toml", "--extra", "engine")
    # What constraints.txt does not name comes with torch alone: the libraries of CUDA.
    with_torch = {name for name in torch if name not in constraints} | {"torch"}
    _write("build", _resolve(uv, "-", requirements="setuptools\n"))
    _write("api", _resolve(uv, "pyproject.toml"))
    _write("torch", torch)
    _write("worker", {name: entry for name, entry in engine.items() if name not in with_torch})


if __name__ == "__main__":
    main(sys.argv[1])
