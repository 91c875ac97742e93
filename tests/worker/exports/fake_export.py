"""Stands for `python -m pocl export-gguf`: `fake_export.py MODE MODEL TARGET --format FORMAT --json`; without torch."""

import json
import os
import sys
import time
from pathlib import Path

from pocl.storage.manifest import write_manifest


def main() -> int:
    mode, source, target, _, export_format, _ = sys.argv[1:]
    if mode == "hang":
        time.sleep(600)
    if mode == "silent":
        return 3
    if mode in ("user", "capacity"):
        error = {"code": f"{mode}_error", "message": "It is so.", "fault": mode}
        sys.stdout.write(json.dumps({"error": error}))
        return 1
    directory = Path(target)
    directory.mkdir()
    weights = (Path(source) / "model.safetensors").read_bytes()
    if mode == "large":
        weights *= 1000
    (directory / f"model-{export_format}.gguf").write_bytes(weights)
    (directory / "Modelfile").write_text("FROM it\n")
    write_manifest(directory)
    if mode == "wrong":
        (directory / "Modelfile").write_text("FROM that\n")
    notes = [json.dumps(dict(os.environ))] if mode == "tell" else ["A note."]
    sys.stdout.write(json.dumps({"files": [f"model-{export_format}.gguf", "Modelfile"], "notes": notes}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
