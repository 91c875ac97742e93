"""The devices that a worker reports: what the driver and torch both see, with both listings made up here."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from domain.jobs.states import JobStatus
from domain.workers.models import Device
from domain.workers.repository import list_workers
from tests.support.harness import ServiceHarness
from worker.devices import NoUsableGpu, detect_devices, visible_devices
from worker.settings import DEFAULT_ENGINE, WorkerSettings

H100, L4, A100 = (
    "GPU-11111111-aaaa-bbbb-cccc-000000000001",
    "GPU-22222222-aaaa-bbbb-cccc-000000000002",
    "GPU-33333333-aaaa-bbbb-cccc-000000000003",
)
MIG_SMALL, MIG_LARGE = "MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f", "MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb"
LISTED = f"0, {L4}, NVIDIA L4, 23034\n1, {H100}, NVIDIA H100 80GB HBM3, 81559\n"
INSTANCES = f"""GPU 0: NVIDIA A100-SXM4-40GB (UUID: {A100})
  MIG 1g.5gb      Device  0: (UUID: {MIG_SMALL})
  MIG 3g.20gb     Device  1: (UUID: {MIG_LARGE})
"""


class Machine:
    """A driver that lists GPUs, and a torch that opens some of them in CUDA's order, the fastest first."""

    def __init__(self, tmp_path: Path, listed: str | None = LISTED, instances: str = "") -> None:
        self.driver = tmp_path / "driver"
        self.driver.touch()
        self.listed, self.instances = listed, instances
        self.torch: list[tuple[str, int]] | None = [(H100, 79 << 30), (L4, 22 << 30)]
        self.environments: list[Mapping[str, str]] = []

    def ask_driver(self, command: Sequence[str]) -> str | None:
        return self.instances if command[1] == "-L" else self.listed

    def ask_torch(self, environment: Mapping[str, str]) -> str | None:
        self.environments.append(environment)
        if self.torch is None:
            return None
        # Torch gives UUIDs without the driver's prefix.
        return json.dumps([{"uuid": uuid[4:], "name": "GPU", "memory_bytes": size} for uuid, size in self.torch])

    def detect(self, environ: Mapping[str, str] | None = None, **options: Any) -> tuple[Device, ...]:
        return detect_devices(
            WorkerSettings(**{"engine": DEFAULT_ENGINE, **options}),
            environ or {},
            driver_files=[self.driver.with_name("of-linux"), self.driver],
            ask_driver=self.ask_driver,
            ask_torch=self.ask_torch,
        )


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def gpus(devices: Sequence[Device]) -> list[tuple[str | None, int | None]]:
    return [(device.uuid, device.memory_bytes) for device in devices if device.kind == "cuda"]


def test_worker_computes_on_the_gpu_with_the_most_memory_and_takes_jobs_for_the_cpu_too(machine: Machine) -> None:
    devices = machine.detect()
    assert gpus(devices) == [(H100, 79 << 30)]
    assert devices[-1].kind == "cpu"
    assert (devices[-1].memory_bytes or 0) > 1 << 28
    # The worker's numbers are the driver's.
    assert machine.environments[0]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_engine_of_several_processes_gets_all_gpus_or_as_many_as_are_set(machine: Machine) -> None:
    ranks = ("torchrun", "--nproc-per-node=2", "-m", "pocl", "run")
    assert gpus(machine.detect(engine=ranks)) == [(H100, 79 << 30), (L4, 22 << 30)]
    assert gpus(machine.detect(engine=ranks, gpus_per_job=1)) == [(H100, 79 << 30)]


@pytest.mark.parametrize("owned", [(0,), (L4,), ("GPU-2222",)], ids=["number of the driver", "UUID", "start of a UUID"])
def test_worker_uses_only_its_own_gpus(machine: Machine, owned: tuple[int | str, ...]) -> None:
    assert gpus(machine.detect(gpus=owned, device="cuda")) == [(L4, 22 << 30)]


def test_gpu_that_torch_cannot_open_is_not_reported(machine: Machine) -> None:
    machine.torch = [(L4, 22 << 30)]
    assert gpus(machine.detect()) == [(L4, 22 << 30)]


def test_gpu_that_the_driver_does_not_list_is_not_reported(machine: Machine) -> None:
    machine.torch = [(A100, 40 << 30), (L4, 22 << 30)]
    assert gpus(machine.detect()) == [(L4, 22 << 30)]


@pytest.mark.parametrize("torch_names_the_gpu", [True, False])
def test_mig_instance_goes_by_its_own_uuid_and_memory(tmp_path: Path, *, torch_names_the_gpu: bool) -> None:
    machine = Machine(tmp_path, f"0, {A100}, NVIDIA A100-SXM4-40GB, 40960\n", INSTANCES)
    machine.torch = [(A100 if torch_names_the_gpu else MIG_LARGE, 19 << 30)]
    devices = machine.detect({"CUDA_VISIBLE_DEVICES": MIG_LARGE})
    assert gpus(devices) == [(MIG_LARGE, 19 << 30)]
    assert visible_devices(devices, "cuda") == MIG_LARGE


def test_without_a_named_instance_cuda_opens_the_first(tmp_path: Path) -> None:
    machine = Machine(tmp_path, f"0, {A100}, NVIDIA A100-SXM4-40GB, 40960\n", INSTANCES)
    machine.torch = [(A100, 4 << 30)]
    assert gpus(machine.detect()) == [(MIG_SMALL, 4 << 30)]


@pytest.mark.parametrize("setting", ["", "-1", "NoDevFiles", "none", "void"])
def test_worker_that_is_given_no_gpu_has_its_cpu(machine: Machine, setting: str) -> None:
    machine.torch = []
    assert [device.kind for device in machine.detect({"CUDA_VISIBLE_DEVICES": setting})] == ["cpu"]
    with pytest.raises(NoUsableGpu, match="CUDA_VISIBLE_DEVICES names no GPU"):
        machine.detect({"CUDA_VISIBLE_DEVICES": setting}, device="cuda")


def test_machine_without_a_driver_has_its_cpu(machine: Machine) -> None:
    machine.driver.unlink()
    assert [device.kind for device in machine.detect()] == ["cpu"]
    assert machine.environments == []


def test_container_without_gpus_on_a_machine_with_some_has_its_cpu(tmp_path: Path) -> None:
    assert [device.kind for device in Machine(tmp_path, listed=None).detect()] == ["cpu"]


@pytest.mark.parametrize(
    ("listed", "torch", "options", "reason"),
    [
        pytest.param(LISTED, None, {}, "torch could not be asked", id="torch is missing"),
        pytest.param(LISTED, [], {}, "torch sees none of them", id="torch for the CPU"),
        pytest.param("", [], {}, "driver lists no GPU", id="GPU is lost"),
        pytest.param(None, [], {"device": "cuda"}, "no nvidia-smi", id="no driver"),
        pytest.param(LISTED, [(L4, 1)], {"gpus": (1,)}, "POCL_WORKER_GPUS", id="another worker's"),
    ],
)
def test_worker_for_gpus_without_one_is_sick_and_not_a_worker_for_the_cpu(
    tmp_path: Path, listed: str | None, torch: list[tuple[str, int]] | None, options: dict[str, Any], reason: str
) -> None:
    machine = Machine(tmp_path, listed)
    machine.torch = torch
    with pytest.raises(NoUsableGpu, match=reason):
        machine.detect(**options)


def test_engine_sees_the_devices_of_its_job_alone() -> None:
    devices = (Device("cuda", "a", 1, H100), Device("cuda", "b", 1, L4), Device("cpu", "CPU", 1))
    assert visible_devices(devices, "cuda") == f"{H100},{L4}"
    assert visible_devices(devices, "cpu") == ""
    assert visible_devices((Device("cuda", "of an older version", 1),), "cuda") is None


@pytest.mark.system
@pytest.mark.parametrize(
    ("devices", "asked", "expected"),
    [
        ((Device("cuda", "a", 1 << 40, H100), Device("cpu", "CPU", 1 << 40)), "auto", ("cuda", H100)),
        ((Device("cuda", "a", 1 << 40, H100), Device("cpu", "CPU", 1 << 40)), "cpu", ("cpu", "")),
        ((Device("cpu", "CPU", 1 << 40),), "auto", ("cpu", "")),
    ],
    ids=["auto on a GPU", "CPU beside a GPU", "auto without a GPU"],
)
def test_device_is_resolved_before_the_engine_starts(
    harness: ServiceHarness, devices: tuple[Device, ...], asked: str, expected: tuple[str, str]
) -> None:
    job = harness.submit(resources={"device": asked})
    harness.supervisor("--echo", "CUDA_VISIBLE_DEVICES", devices=devices).work_one()
    (directory,) = harness.settings.work_root.glob(f"{job}.1")
    device = json.loads((directory / "spec.json").read_text())["resources"]["device"]
    visible = (directory / "engine.log").read_text().partition("CUDA_VISIBLE_DEVICES=")[2].splitlines()[0]
    assert (device, visible) == expected


def test_worker_without_a_device_claims_nothing(harness: ServiceHarness) -> None:
    harness.submit(resources={"device": "auto"})
    assert harness.supervisor(devices=()).work_one() is None


def test_worker_for_gpus_without_one_is_quarantined_with_the_reason(harness: ServiceHarness) -> None:
    job = harness.submit(resources={"device": "auto"})
    sick = replace(harness.supervisor(devices=()), device_fault="The driver lists no GPU.")
    assert sick.work_one() is None
    with harness.database.transaction(write=False) as session:
        (worker,) = list_workers(session, limit=10).rows
    assert worker.quarantine_reason == "The driver lists no GPU."
    assert harness.job(job).status is JobStatus.QUEUED
