"""`python -m bench COMMAND`: a benchmark, as a table and on request as JSON."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

from bench.protocol import pin_threads
from bench.report import Reported, to_json

COMMANDS = {
    "loss": "head and loss, forward and backward",
    "step": "one optimiser step",
    "curriculum": "a whole distillation: ranking, teacher, stages, evaluation",
    "flops": "floating-point operations of each visit of a sample, counted",
    "rouge": "ROUGE-L of 500 answers",
    "generate": "greedy answers to many prompts",
    "gpu": "every figure with a target on a GPU, and which are met; smaller on a CPU",
    "api": "polls, lists, submissions, streams and downloads of one API process",
    "chaos": "the whole service while faults are injected",
    "scale": "a million jobs and two thousand workers on PostgreSQL, simulated",
    "resume": "runs killed at random moments, and what that cost",
}
PACKAGES = {
    "chaos": "bench.faults.chaos",
    "resume": "bench.faults.resume",
    "gpu": "bench.gpu.command",
    "scale": "bench.scale.command",
}
"""The modules of commands that have a package; all others are modules of `bench` itself."""


class Command(Protocol):
    """The module of a command."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, args: argparse.Namespace) -> Reported: ...


def main(arguments: Sequence[str]) -> None:
    chooser = argparse.ArgumentParser(
        prog="python -m bench",
        description="\n".join(f"{name:12}{subject}" for name, subject in COMMANDS.items()),
        epilog="`python -m bench COMMAND --help` lists what a command takes.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chooser.add_argument("command", choices=COMMANDS)
    name: str = chooser.parse_args(arguments[:1]).command
    # Only the module of this command is imported: some need packages that others do not.
    command = cast(Command, importlib.import_module(PACKAGES.get(name, f"bench.{name}")))
    parser = argparse.ArgumentParser(prog=f"python -m bench {name}", description=COMMANDS[name])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to this file")
    parser.add_argument("--threads", type=int, help="number of threads (default: as many as there are cores)")
    command.add_arguments(parser)
    args = parser.parse_args(arguments[1:], argparse.Namespace(command=name))
    args.threads = pin_threads(args.threads)
    report = command.run(args)
    print(report.text())
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(to_json(report))
    if report.failure is not None:
        sys.exit(report.failure)


if __name__ == "__main__":
    main(sys.argv[1:])
