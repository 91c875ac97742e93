"""The devices that this worker computes on: what torch and the driver both see, detected without loading torch here.

The driver lists the GPUs of the machine; a child process asks torch which of them CUDA can open, so that
`CUDA_VISIBLE_DEVICES` is read by CUDA itself, whether it has numbers, UUIDs, MIG instances or nothing. From then on a
device goes by its UUID: the numbers of CUDA and of the driver differ where `CUDA_DEVICE_ORDER` is unset.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import structlog

from domain.workers.models import Device, DeviceKind
from pocl.container_limits import available_memory_bytes
from worker.settings import DEFAULT_ENGINE, WorkerSettings

_log = structlog.get_logger(__name__)

DRIVER_FILES: Final = (Path("/proc/driver/nvidia/version"), Path("/dev/nvidiactl"), Path("/dev/dxg"))
"""One of them is there where the driver of NVIDIA is loaded; under WSL that is the driver of Windows, the last."""
_LIST_GPUS: Final = ("nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits")
_LIST_INSTANCES: Final = ("nvidia-smi", "-L")
_DRIVER_SECONDS: Final = 30
_TORCH_SECONDS: Final = 180
_ASK_TORCH: Final = """
import json, torch
each = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print("POCL " + json.dumps([{"uuid": str(p.uuid), "name": p.name, "memory_bytes": p.total_memory} for p in each]))
"""

QueryDriver = Callable[[Sequence[str]], str | None]
"""Runs a command of the driver: what it prints, nothing where it fails; None where there is no such command."""
QueryTorch = Callable[[Mapping[str, str]], str | None]
"""Asks torch in a process with this environment: a JSON list of its devices; None where it cannot be asked."""


class NoUsableGpu(Exception):
    """A worker that is to compute on a GPU has none; the message says why, and what to do."""


@dataclass(frozen=True)
class _Gpu:
    """A GPU as the driver lists it."""

    index: int
    uuid: str
    name: str
    memory_bytes: int | None
    instances: tuple[str, ...] = ()
    """The UUIDs of its MIG instances, in their order; of a GPU that has some, CUDA opens one of them."""


def query_driver(command: Sequence[str]) -> str | None:
    """As :data:`QueryDriver`, by the driver's own tool."""
    try:
        completed = subprocess.run(command, capture_output=True, text=True, timeout=_DRIVER_SECONDS, check=False)
    except FileNotFoundError:
        return None
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return completed.stdout if completed.returncode == 0 else ""


def query_torch(interpreter: str) -> QueryTorch:
    """Asks the torch of an interpreter."""

    def query(environment: Mapping[str, str]) -> str | None:
        try:
            completed = subprocess.run(
                [interpreter, "-P", "-c", _ASK_TORCH],
                capture_output=True,
                text=True,
                timeout=_TORCH_SECONDS,
                check=False,
                env=dict(environment),
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        # Torch may print warnings before the answer.
        answers = [line for line in completed.stdout.splitlines() if line.startswith("POCL ")]
        return answers[-1].removeprefix("POCL ") if completed.returncode == 0 and answers else None

    return query


def detect_devices(
    options: WorkerSettings,
    environ: Mapping[str, str] = os.environ,
    *,
    driver_files: Sequence[Path] = DRIVER_FILES,
    ask_driver: QueryDriver = query_driver,
    ask_torch: QueryTorch | None = None,
) -> tuple[Device, ...]:
    """The devices that jobs may use here. A worker with GPUs takes jobs for the CPU too, unless it is set to `cuda`.

    Of its GPUs a worker uses as many as the engine of a job is given, those with the most memory. One without GPUs has
    its CPU where it is set to `cpu`, or to `auto` on a machine without a driver or with `CUDA_VISIBLE_DEVICES` set to
    nothing.

    Args:
        environ: the environment of the worker.
        driver_files: one of them is there where the driver is loaded.
        ask_driver: see :data:`QueryDriver`.
        ask_torch: see :data:`QueryTorch`; the torch of the engine's interpreter unless given.

    Raises:
        NoUsableGpu: the worker is to use GPUs, and torch and the driver have none in common.
    """
    cpu = Device("cpu", "CPU", options.memory_bytes or available_memory_bytes())
    if options.device == "cpu":
        return (cpu,)
    if options.device == "auto" and (not has_driver(driver_files) or _hides_all(environ)):
        return (cpu,)
    listed = _list_gpus(ask_driver)
    if options.device == "auto" and listed is None:
        # The driver's version shows in each container of its machine, the driver's tool in those that are given GPUs.
        return (cpu,)
    answer = (ask_torch or query_torch(_interpreter(options)))(cuda_environment(environ))
    usable = _select(_usable_gpus(listed, answer, environ), listed, options.gpus)
    if not usable:
        raise NoUsableGpu(_reason(listed, answer, environ, options))
    used = _largest(usable, options)
    if unused := [device for device in usable if device not in used]:
        names = ", ".join(device.uuid or device.name for device in unused)
        _log.warning("gpus_unused", gpus=names, hint="Start a worker for each, with POCL_WORKER_GPUS.")
    return used if options.device == "cuda" else (*used, cpu)


def has_driver(files: Sequence[Path] = DRIVER_FILES) -> bool:
    """Whether the driver of NVIDIA is loaded, by files of which one is there then."""
    return any(file.exists() for file in files)


def cuda_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """`environ`, in which CUDA counts devices as the driver does, in the order of the bus, unless it says otherwise."""
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", **environ}


def visible_devices(devices: Sequence[Device], kind: DeviceKind) -> str | None:
    """`CUDA_VISIBLE_DEVICES` for an engine on this kind: UUIDs, nothing for a CPU; None to leave it as it is."""
    if kind != "cuda":
        return ""
    uuids = [device.uuid for device in devices if device.kind == "cuda"]
    return ",".join(uuid for uuid in uuids if uuid) if uuids and all(uuids) else None


def _hides_all(environ: Mapping[str, str]) -> bool:
    """Whether the environment asks for no GPU: CUDA opens the devices before the first that is not one."""
    setting = environ.get("CUDA_VISIBLE_DEVICES")
    return setting is not None and not re.match(r"\s*(\d|GPU-|MIG-)", setting)


def _interpreter(options: WorkerSettings) -> str:
    """The Python that the engine runs on: a launcher such as torchrun lies beside its own."""
    first = Path(options.engine[0])
    if options.engine == DEFAULT_ENGINE or first.name.startswith("python"):
        return str(first)
    beside = first.with_name("python")
    return str(beside) if first.is_absolute() and beside.exists() else sys.executable


def _list_gpus(ask: QueryDriver) -> list[_Gpu] | None:
    """The GPUs of the driver in the order of the bus; None where its tool is not there."""
    answer = ask(_LIST_GPUS)
    if answer is None:
        return None
    instances = _list_instances(ask(_LIST_INSTANCES) or "")
    gpus = []
    for line in answer.splitlines():
        fields = [field.strip() for field in line.split(",")]
        if len(fields) < 4 or not fields[0].isdigit():
            continue
        mebibytes = fields[-1]
        memory = int(mebibytes) << 20 if mebibytes.isdigit() else None
        uuid = fields[1]
        gpus.append(_Gpu(int(fields[0]), uuid, ",".join(fields[2:-1]), memory, instances.get(uuid, ())))
    return gpus


def _list_instances(answer: str) -> dict[str, tuple[str, ...]]:
    """The MIG instances by the UUID of their GPU, out of `nvidia-smi -L`, which has them below it."""
    instances: dict[str, tuple[str, ...]] = {}
    parent = None
    for line in answer.splitlines():
        uuid = re.search(r"UUID:\s*((?:GPU|MIG)-[^)\s]+)", line)
        if uuid is None:
            continue
        if uuid[1].startswith("GPU-"):
            parent = uuid[1]
        elif parent is not None:
            instances[parent] = (*instances.get(parent, ()), uuid[1])
    return instances


def _usable_gpus(listed: Sequence[_Gpu] | None, answer: str | None, environ: Mapping[str, str]) -> list[Device]:
    """What torch and the driver both see, with the memory that torch sees, in torch's order."""
    try:
        entries: list[dict[str, Any]] = json.loads(answer or "[]")
    except ValueError:
        return []
    usable = []
    for entry in entries:
        device = Device("cuda", str(entry["name"]), int(entry["memory_bytes"]), f"GPU-{_bare(str(entry['uuid']))}")
        if listed is None:
            usable.append(device)
            continue
        for gpu in listed:
            uuid = _matching_uuid(gpu, str(entry["uuid"]), environ)
            if uuid is not None:
                usable.append(Device("cuda", device.name, device.memory_bytes, uuid))
    return usable


def _matching_uuid(gpu: _Gpu, uuid: str, environ: Mapping[str, str]) -> str | None:
    """The driver's UUID of what torch names by `uuid`, where that is this GPU or an instance of it."""
    for instance in gpu.instances:
        if _bare(instance) == _bare(uuid):
            return instance
    if _bare(gpu.uuid) != _bare(uuid):
        return None
    if not gpu.instances:
        return gpu.uuid
    # Releases of CUDA name an instance by its GPU. A process opens one instance: the first that it is given.
    asked = [part.strip() for part in environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return (
        next((each for each in gpu.instances if any(part and each.startswith(part) for part in asked)), None)
        or (gpu.instances[0])
    )


def _bare(uuid: str) -> str:
    return uuid.removeprefix("GPU-").removeprefix("MIG-").lower()


def _select(usable: list[Device], listed: Sequence[_Gpu] | None, owned: Sequence[int | str] | None) -> list[Device]:
    """Those of the devices that the setting names, by the driver's number or by the beginning of the UUID."""
    if owned is None:
        return usable
    order = {gpu.uuid: gpu.index for gpu in listed or ()} | {
        instance: gpu.index for gpu in listed or () for instance in gpu.instances
    }
    numbers = {number for number in owned if isinstance(number, int)}
    names = tuple(name for name in owned if isinstance(name, str))
    return [
        device
        for position, device in enumerate(usable)
        if order.get(device.uuid or "", position) in numbers or (names and (device.uuid or "").startswith(names))
    ]


def _largest(usable: list[Device], options: WorkerSettings) -> tuple[Device, ...]:
    """As many of the devices as the engine is given, those with the most memory, in their order."""
    count = options.gpus_per_job or (1 if options.engine == DEFAULT_ENGINE else len(usable))
    chosen = sorted(usable, key=lambda device: -(device.memory_bytes or 0))[:count]
    return tuple(device for device in usable if device in chosen)


def _reason(
    listed: Sequence[_Gpu] | None, answer: str | None, environ: Mapping[str, str], options: WorkerSettings
) -> str:
    if answer is None:
        return "torch could not be asked for its GPUs: check that the engine's Python has torch, built for CUDA."
    if listed is None:
        return "There is no nvidia-smi, and torch sees no GPU: check the driver of this machine."
    if not listed:
        return "The driver lists no GPU: see `nvidia-smi` and the kernel's log, or what the container is given."
    if _hides_all(environ):
        return "CUDA_VISIBLE_DEVICES names no GPU: correct or unset it, or set POCL_WORKER_DEVICE=cpu."
    if options.gpus is not None:
        return "No GPU that torch and the driver both see is one of POCL_WORKER_GPUS: correct it; see `nvidia-smi -L`."
    return (
        f"The driver lists {len(listed)} GPUs, and torch sees none of them: "
        "check CUDA_VISIBLE_DEVICES, and that torch is built for the CUDA of this driver."
    )
