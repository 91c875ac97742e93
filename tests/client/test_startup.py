"""The command answers fast: what it loads is counted, since times depend on the machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CLIENT = Path(__file__).parents[2] / "client"
HEAVY = {"anyio", "api", "domain", "httpx2", "pocl", "pydantic", "rich", "torch", "worker", "yaml"}


def loaded(*arguments: str) -> set[str]:
    """The modules that the command loads."""
    script = (
        "import sys; sys.argv = ['pocl', *sys.argv[1:]]\n"
        "from pocl_client.cli import main\n"
        "status = main()\n"
        "print(*sys.modules, file=sys.stderr); sys.exit(status)"
    )
    environment = {**os.environ, "PYTHONPATH": str(CLIENT)}
    ran = subprocess.run(
        [sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True, check=True
    )
    assert "Usage" in ran.stdout or ran.stdout.strip()
    return set(ran.stderr.split())


@pytest.mark.system
@pytest.mark.parametrize(
    ("words", "completions"),
    [("pocl jo", {"jobs"}), ("pocl jobs re", {"resume", "retry"}), ("pocl submit --id", {"--idempotency-key"})],
)
def test_a_shell_completes_commands_and_options(words: str, completions: set[str]) -> None:
    environment = {
        **os.environ, "PYTHONPATH": str(CLIENT), "_POCL_COMPLETE": "complete_bash", "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }  # fmt: skip
    ran = subprocess.run([sys.executable, "-m", "pocl_client"], env=environment, capture_output=True, text=True)
    assert set(ran.stdout.split()) == completions


@pytest.mark.system
@pytest.mark.parametrize("arguments", [("--help",), ("jobs", "--help"), ("submit", "--help"), ("--version",)])
def test_help_loads_little(arguments: tuple[str, ...]) -> None:
    modules = loaded(*arguments)
    assert HEAVY & {name.partition(".")[0] for name in modules} == set()
    assert len(modules) < 260
