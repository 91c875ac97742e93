"""A fake of `python -m pocl.chat` that has no model: it answers with the words of the question, one part each.

    fake_chat_engine.py DIRECTORY [options that the worker gives]

What the last message says may direct it: `hold` says a word and waits for a cancel; `die` ends the process; `crash`
ends it after a word; `fail` cannot answer; `pid` answers with its process number and the names of its environment.
It writes the lines of `pocl.chat.protocol` without importing it, which would take most of a test's time.
"""

import json
import os
import signal
import sys
from typing import Any


def write(question: dict[str, Any], kind: str, **fields: Any) -> None:
    sys.stdout.write(json.dumps({"kind": kind, "id": question["id"], **fields}) + "\n")
    sys.stdout.flush()


def say(question: dict[str, Any], words: list[str]) -> None:
    for number, word in enumerate(words, start=1):
        write(question, "part", text=word, tokens=number)
    counts = {"prompt_tokens": 5, "completion_tokens": len(words)}
    write(question, "finished", text="".join(words), finish_reason="stop", **counts)


def main() -> None:
    for line in sys.stdin:
        question = json.loads(line)
        if question["kind"] != "question":
            continue
        text = question["messages"][-1]["content"]
        match text:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "crash" | "hold":
                write(question, "part", text="Well", tokens=1)
                if text == "crash":
                    sys.exit("out of words")
                # The cancel of this question.
                sys.stdin.readline()
                write(question, "cancelled")
            case "fail":
                write(question, "failed", code="model_unsupported", message="No such model.", fault="user")
            case "pid":
                say(question, [json.dumps({"pid": os.getpid(), "environment": sorted(os.environ)})])
            case "model":
                say(question, [json.dumps(question["model"])])
            case _:
                say(question, [f"{word} " for word in text.split()])


main()
