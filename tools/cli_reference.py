"""`python -m tools.cli_reference`: write docs/cli.md, the reference of the command `pocl`, from its commands."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from typer.main import get_command

from pocl_client.cli.app import app

REFERENCE: Final = Path(__file__).resolve().parents[1] / "docs" / "cli.md"
_HEADER: Final = """\
# The command `pocl`

(Made by `make client` from the commands.)

`pip install 'pocl-client[cli]'` has all of it but `serve`, `worker` and `run`, which start the service or its engine
and need `pocl-service`. `pocl --install-completion` completes commands and options in bash, zsh, fish and PowerShell.

The address is `--url`, else `POCL_URL`, else that of the last `pocl login`, else `http://127.0.0.1:8000`. The key is
`POCL_API_KEY`, else the content of the file `POCL_API_KEY_FILE`, else that of `pocl login`, which is used for the
address that it was given for, and for no other. There is no option for a key: others could read it in the list of
processes.

Results go to standard output, progress and warnings to standard error. Bars and live lines are drawn on a terminal
alone. With `-o json` a command prints what the API answers, and with `-o id` the ids alone, a line each. Stages count
from 1, as in the log, in the report and on the dashboard; in JSON from 0, as in the API.

| exit status | |
|---|---|
| 0 | done; of `wait`, `watch` and `submit --watch`: the job succeeded |
| 1 | the job failed or was cancelled; of `doctor`: something is lacking |
| 2 | the command line is wrong, or the service refuses what it asks for |
| 3 | the service cannot be reached, or failed itself; the same command may succeed later |
| 124 | the time of `wait --timeout` is over; the job goes on |
| 130 | Ctrl-C; a job goes on |
"""


def write() -> str:
    """The page."""
    return "\n".join([_HEADER, *_commands(get_command(app), "pocl")])


def _commands(command: Any, name: str) -> Iterator[str]:
    """A section for each command that does something, in the order of the help."""
    inner = getattr(command, "commands", None)
    if inner is not None:
        for each in inner.values():
            yield from _commands(each, f"{name} {each.name}")
        return
    shown = [each for each in command.params if not getattr(each, "hidden", False) and each.name != "help"]
    arguments = [_argument(each) for each in shown if each.param_type_name == "argument"]
    options = [each for each in shown if each.param_type_name == "option"]
    yield f"## `{' '.join([name, *arguments])}`\n"
    yield f"{_text(command.help)}\n"
    named = [each for each in shown if each.param_type_name == "argument" and each.help]
    rows = [(f"`{_argument(each)}`", _text(each.help)) for each in named]
    rows += [(_option(each), _text(each.help)) for each in options]
    if rows:
        yield "| | |\n|---|---|"
        yield "\n".join(f"| {left} | {right} |" for left, right in rows) + "\n"


def _argument(parameter: Any) -> str:
    name = parameter.metavar or parameter.name.upper()
    return str(name) if parameter.required else f"[{name}]"


def _option(parameter: Any) -> str:
    names = ", ".join(f"`{name}`" for name in parameter.opts)
    if parameter.is_flag:
        return names
    choices = getattr(parameter.type, "choices", None)
    value = parameter.metavar or ("\\|".join(choices) if choices else parameter.type.name.upper())
    return f"{names} `{value}`"


def _text(help_: str | None) -> str:
    """The sentences of a help on one line, without what would break a table."""
    return re.sub(r"\s+", " ", help_ or "").replace("|", "\\|").strip()


def main() -> None:
    REFERENCE.write_text(write(), encoding="utf-8")


if __name__ == "__main__":
    main()
