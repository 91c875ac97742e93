"""One optimiser step passes modules in the order that `pocl.train.loop` lists, and turns back into none."""

import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from types import CodeType, FrameType

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import pocl
from pocl.export.student import StudentExport
from pocl.losses import tile
from pocl.models.precision import Precision
from pocl.models.random import byte_level_tokenizer
from pocl.plan import StagePlan
from pocl.spec import DistillationSpec, resolve
from pocl.storage.shared_cache import SharedCache
from pocl.teacher.cache import open_teacher
from pocl.teacher.distillation_loss import training_loss
from pocl.teacher.signal import TeacherSignal, TeacherSource
from pocl.train import loop
from pocl.train.accumulation import normaliser
from pocl.train.checkpoint import Student
from pocl.train.loop import Trainer
from pocl.train.optimizer import make_optimizer
from pocl.train.state import TrainState
from tests.pocl.one_step import samples_of_lengths
from tests.pocl.tiny_models import VOCABULARY, tiny

PACKAGE = Path(pocl.__file__).parent
FP32 = Precision("fp32", torch.device("cpu"))
SAMPLES = samples_of_lengths(9, 4, 12, 7)
ORDER = re.findall(r"^    (\w+/\w+)  +\S", loop.__doc__ or "", re.MULTILINE)
"""Modules below `pocl`, as the module docstring of the training loop lists them."""


@dataclass
class Trace:
    """Calls between modules of `pocl`, by their paths without suffix: `losses/tile`."""

    visits: list[str] = field(default_factory=list)
    """The module of each call, in the order of the calls."""
    edges: dict[tuple[str, str], str] = field(default_factory=dict)
    """From the calling module to the called one, with the functions of the first such call."""

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        if event != "call" or (module := module_of(frame.f_code)) is None:
            return
        self.visits.append(module)
        caller = frame.f_back
        while caller is not None and module_of(caller.f_code) is None:
            caller = caller.f_back
        if caller is not None and (calling := module_of(caller.f_code)) not in (None, module):
            assert calling is not None
            functions = f"{calling}.{caller.f_code.co_name} -> {module}.{frame.f_code.co_name}"
            self.edges.setdefault((calling, module), functions)

    def back_edges(self, order: list[str]) -> list[str]:
        """Calls to a module that `order` has before the calling one, or one of whose modules it lacks."""
        place = {module: index for index, module in enumerate(order)}
        return [
            functions
            for (calling, called), functions in self.edges.items()
            if not place.get(calling, len(order)) < place.get(called, -1)
        ]

    def stays(self, package: str) -> list[str]:
        """The modules of `package` in the order of the calls, each stay in a module once."""
        return [module for module, _ in groupby(each for each in self.visits if each.startswith(f"{package}/"))]


def module_of(code: CodeType) -> str | None:
    path = Path(code.co_filename)
    return path.relative_to(PACKAGE).with_suffix("").as_posix() if path.is_relative_to(PACKAGE) else None


def traced(call: Callable[[], object]) -> Trace:
    trace, before = Trace(), sys.getprofile()
    sys.setprofile(trace)
    try:
        call()
    finally:
        sys.setprofile(before)
    return trace


class OpaqueLinear(nn.Linear):
    """A linear layer that the engine cannot know to be one, so that full logits are computed."""


def with_opaque_head(model: PreTrainedModel) -> PreTrainedModel:
    model.set_output_embeddings(OpaqueLinear(32, VOCABULARY, bias=False))
    return model


@dataclass(frozen=True)
class Case:
    """A way to train of its own: each runs modules that others do not."""

    method: str
    packed: bool
    cached: bool = False
    """Whether the teacher's hidden states come out of the cache."""
    fused: bool = True

    def trainer(self, directory: Path, resources: ExitStack) -> Trainer:
        spec = specification(self.method)
        model = tiny("llama") if self.fused else with_opaque_head(tiny("llama"))
        source = TeacherSource.loaded(tiny("llama", seed=1), "digest", FP32)
        teacher: TeacherSignal = source.live()
        if self.cached:
            cache = SharedCache(directory / "cache", 1 << 30)
            opened = open_teacher(source, SAMPLES, shared_cache=cache, sink=lambda _event: None)
            teacher = resources.enter_context(opened)
        loss = training_loss(model, teacher, spec.method, shared_vocabulary=VOCABULARY, precision=FP32)
        assert loss.is_fused == self.fused
        return Trainer(
            spec=spec,
            table=(STAGE,),
            samples=SAMPLES,
            student=Student(model, StudentExport(byte_level_tokenizer(64)), make_optimizer(model, spec.training)),
            training_loss=loss,
            packed=self.packed,
            workdir=directory,
            sink=lambda _event: None,
            should_stop=lambda: False,
            state=TrainState(micro_batch_size=len(SAMPLES)),
        )


STAGE = StagePlan(
    index=0,
    samples=len(SAMPLES),
    temperature=1.5,
    kd_weight=0.7,
    epochs=1,
    steps=3,
    first_step=0,
    steps_per_epoch=1,
)
CASES = {
    "fused with a cached teacher": Case("forward_kl", packed=True, cached=True),
    "fused with a live teacher": Case("adaptive_kl", packed=False),
    "packed with a live teacher": Case("js", packed=True),
    "fused without a teacher": Case("sft", packed=True),
    "full logits": Case("alpha_beta", packed=False, fused=False),
    "full logits without a teacher": Case("sft", packed=False, fused=False),
}


def specification(method: str) -> DistillationSpec:
    return resolve(
        {
            "teacher": {"random": {}},
            "student": {"random": {}},
            "data": {"train": {"path": "not-read.jsonl"}},
            "method": method,
        }
    )


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trace]:
    found = {}
    for name, case in CASES.items():
        with ExitStack() as resources:
            trainer = case.trainer(tmp_path_factory.mktemp("step"), resources)
            found[name] = traced(partial(trainer.step, STAGE, SAMPLES))
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_step_calls_only_modules_further_down_the_list(traces: dict[str, Trace], name: str) -> None:
    assert traces[name].visits[0] == ORDER[0]
    assert traces[name].back_edges(ORDER) == []


@pytest.mark.parametrize("name", CASES)
def test_a_micro_batch_stays_in_each_module_of_the_losses_once(traces: dict[str, Trace], name: str) -> None:
    stays = traces[name].stays("losses")
    assert stays
    assert [module for index, module in enumerate(stays) if module in stays[:index]] == []


def test_the_list_names_every_module_of_a_step_and_no_other(traces: dict[str, Trace]) -> None:
    passed = {module for trace in traces.values() for module in trace.visits}
    assert sorted(ORDER) == sorted(passed)


def test_a_call_back_up_the_list_is_named() -> None:
    namespace: dict[str, Callable[[], object]] = {"normaliser": partial(normaliser, 8)}
    # A function in the file of a deep module that calls a shallow one.
    exec(compile("def planted(): return normaliser()", tile.__file__, "exec"), namespace)  # As planted.
    trace = traced(namespace["planted"])
    assert trace.back_edges(ORDER) == ["losses/tile.planted -> train/accumulation.normaliser"]
    assert trace.stays("losses") == ["losses/tile"]


def test_a_module_that_the_list_lacks_is_named() -> None:
    trace = Trace(edges={("losses/tile", "losses/new"): "losses/tile.f -> losses/new.g"})
    assert trace.back_edges(ORDER) == ["losses/tile.f -> losses/new.g"]


def test_a_return_to_a_module_is_a_stay_of_its_own() -> None:
    trace = Trace(visits=["losses/fused", "losses/tile", "train/loop", "losses/tile", "losses/fused"])
    assert trace.stays("losses") == ["losses/fused", "losses/tile", "losses/fused"]
