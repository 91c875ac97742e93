"""The end of a stage by convergence: the weights of its best epoch go on, after an interruption too."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from pocl.errors import RunStopped
from pocl.evaluation.scores import Scores
from pocl.events import Event, StageFinished
from pocl.export.student import StudentExport
from pocl.models.loading import load_weights
from pocl.models.precision import Precision
from pocl.models.random import byte_level_tokenizer
from pocl.plan import stage_table
from pocl.spec import DistillationSpec, Training, resolve
from pocl.teacher.distillation_loss import training_loss
from pocl.train import checkpoint
from pocl.train.checkpoint import Student
from pocl.train.evaluations import StudentScoring
from pocl.train.loop import Trainer
from pocl.train.optimizer import decay_groups, make_optimizer
from pocl.train.state import TrainState
from tests.pocl.one_step import samples_of_lengths
from tests.pocl.tiny_models import CONFIGS, tiny

SAMPLES = samples_of_lengths(9, 4, 12, 7)
# The second of four epochs is best; patience ends the stage after the fourth.
EPOCH_SCORES = [1.0, 5.0, 4.0, 3.0, 9.0]
STEPS_PER_EPOCH = 2
CONTROL = {"kind": "no_curriculum", "stage_steps": [9]}


def specification(optimizer: str = "restart", control: object = None) -> DistillationSpec:
    return resolve(
        {
            "method": "sft",
            "student": {"random": {}},
            "data": {"train": {"path": "rows"}, "validation": {"path": "rows"}},
            "training": {"batch_size": 2, "learning_rate": 0.01, "warmup_steps": 100},
            "curriculum": {
                "stages": 1,
                "optimizer_at_stage": optimizer,
                "advance": {"by": "convergence", "patience": 2},
                "control": control,
            },
        }
    )


def trainer_in(
    directory: Path, spec: DistillationSpec, sink: Callable[[Event], None], *, stop_at: int | None = None
) -> Trainer:
    """A trainer that continues what `directory` holds, and whose student scores as `EPOCH_SCORES` has it."""
    point, _ = checkpoint.find_resume_point(directory / "checkpoints")
    model = tiny("llama")
    optimizer = make_optimizer(model, spec.training)
    state = TrainState(micro_batch_size=2)
    if point is not None:
        load_weights(model, point.directory)
        checkpoint.restore_optimizer(point.directory, model, optimizer)
        state = point.state

    def score(split: str, *, sampled: bool) -> Scores:
        assert split == "validation"
        rouge_l = EPOCH_SCORES[min(state.epoch, 4)] if not sampled else 0.0
        return Scores(rows=1, rouge_l=rouge_l, exact_match=0.0, cross_entropy=1.0, divergence=None)

    return Trainer(
        spec=spec,
        table=stage_table(spec, len(SAMPLES)),
        samples=SAMPLES,
        student=Student(model, StudentExport(byte_level_tokenizer(64)), optimizer),
        training_loss=training_loss(
            model, None, spec.method, shared_vocabulary=None, precision=Precision("fp32", torch.device("cpu"))
        ),
        packed=False,
        workdir=directory,
        sink=sink,
        should_stop=lambda: state.step == stop_at,
        scoring=StudentScoring(score),
        state=state,
        best_epoch_weights=None if point is None else checkpoint.read_best_epoch_weights(point.directory),
    )


def trained(directory: Path, spec: DistillationSpec, *stops: int) -> tuple[dict[str, torch.Tensor], StageFinished]:
    """The weights of a run that is stopped at these steps and continued, and how its stage ended."""
    events: list[Event] = []
    for stop in stops:
        with pytest.raises(RunStopped):
            trainer_in(directory, spec, events.append, stop_at=stop).run()
    trainer = trainer_in(directory, spec, events.append)
    trainer.run()
    (end,) = (event for event in events if isinstance(event, StageFinished))
    return checkpoint.copy_weights(trainer.student.model), end


def weights_after(directory: Path, spec: DistillationSpec, steps: int) -> dict[str, torch.Tensor]:
    trainer = trainer_in(directory, spec, lambda _event: None, stop_at=steps)
    with suppress(RunStopped):
        trainer.run()
    return checkpoint.copy_weights(trainer.student.model)


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("optimizer", ["restart", "carry"])
def test_stage_that_converged_ends_with_the_weights_of_its_best_epoch(tmp_path: Path, optimizer: str) -> None:
    spec = specification(optimizer)
    weights, end = trained(tmp_path / "whole", spec)
    assert (end.epochs, end.kept_epoch, end.step) == (4, 2, 4 * STEPS_PER_EPOCH)
    assert equal(weights, weights_after(tmp_path / "best", spec, 2 * STEPS_PER_EPOCH))
    saved = tiny("llama", seed=1)
    load_weights(saved, tmp_path / "whole" / "checkpoints" / "step-00000008")
    assert equal(weights, checkpoint.copy_weights(saved))


@pytest.mark.parametrize("stops", [(1, 5), (7,)])
def test_interruption_does_not_lose_the_best_epoch(tmp_path: Path, stops: tuple[int, ...]) -> None:
    spec = specification()
    assert equal(trained(tmp_path / "cut", spec, *stops)[0], trained(tmp_path / "whole", spec)[0])


def test_control_spends_its_budget_and_keeps_its_best_epoch(tmp_path: Path) -> None:
    spec = specification(control=CONTROL)
    weights, end = trained(tmp_path / "control", spec)
    # The fifth epoch is a part of one, and the best.
    assert (end.epochs, end.kept_epoch, end.step) == (5, 5, 9)
    assert equal(weights, weights_after(tmp_path / "other", spec, 9))


def test_learning_rate_reaches_its_peak_within_a_stage_shorter_than_the_warm_up(tmp_path: Path) -> None:
    rates: list[float] = []

    def sink(event: Event) -> None:
        if event.type == "step":
            rates.append(event.learning_rate)

    spec = specification(control=CONTROL)
    trainer_in(tmp_path, spec, sink).run()
    assert rates[-1] == spec.training.learning_rate


def parameters_by_group(name: str, decayed_parameters: str) -> Iterator[set[str]]:
    model = tiny(name)
    names = {parameter: name for name, parameter in model.named_parameters()}
    training = Training.model_validate({"decayed_parameters": decayed_parameters})
    return ({names[parameter] for parameter in group} for group in decay_groups(model, training))


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_biases_and_norms_are_not_decayed(name: str) -> None:
    decayed, spared = parameters_by_group(name, "matrices")
    assert not decayed & spared
    everything = dict(tiny(name).named_parameters())
    assert decayed | spared == everything.keys()
    # By their names in the families at hand, which the engine does not look at.
    assert spared == {each for each in everything if each.endswith("bias") or "norm" in each or "ln_" in each}
    assert all(everything[each].ndim >= 2 for each in decayed)
    assert list(parameters_by_group(name, "all")) == [everything.keys(), set()]


def test_decay_moves_matrices_alone() -> None:
    model = tiny("gpt2")
    before = checkpoint.copy_weights(model)
    optimizer = make_optimizer(model, Training(learning_rate=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    decayed, _ = parameters_by_group("gpt2", "matrices")
    for name, weight in checkpoint.copy_weights(model).items():
        expected = before[name] * 0.95 if name in decayed else before[name]
        torch.testing.assert_close(weight, expected)
