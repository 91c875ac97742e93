"""What may import what."""

import subprocess
import sys
from pathlib import Path

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "transformers", "numpy", "tokenizers", "safetensors"}


def test_the_import_contracts_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    # The configuration is looked for, and the packages are found, in the working directory.
    monkeypatch.chdir(ROOT)
    assert lint_imports(no_cache=True) == 0


@pytest.mark.parametrize("module", ["api.app", "api.__main__", "pocl", "pocl.spec", "pocl.plan", "pocl.inspect"])
def test_the_service_loads_no_part_of_the_engine(module: str) -> None:
    script = f"import sys, {module}; print(*({HEAVY!r} & sys.modules.keys()))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ran.stdout.split() == []
