"""Whole runs of the engine on random models: what is left on disk, and that interruptions change nothing."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import IO, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from bench.faults.crash_injection import Attempt, ForkedEngine
from pocl.__main__ import read_spec
from pocl.errors import DatasetInvalid, RunStopped, SpecInvalid, WorkdirMismatch
from pocl.events import (
    CheckpointSaved,
    Evaluated,
    Event,
    PhaseChanged,
    Progressed,
    RunEnded,
    RunFinished,
    StageFinished,
    StepLogged,
    Warned,
    from_line,
)
from pocl.export.model_directory import save_model
from pocl.layout import ABOUT_FILE, ANSWERS_FILE, COMPARED_DIR, RESULT_FILE, ExitCode
from pocl.models.random import byte_level_tokenizer, random_model
from pocl.report import plots
from pocl.report.result import Result
from pocl.run import run
from pocl.spec import CONTROL_KINDS, ENGINE_CHOICES, KDMethod, RandomModel
from pocl.storage import manifest
from pocl.storage.shared_cache import SharedCache
from tests.pocl.test_lazy_loading import is_of_a_layer, overwrite, settle

pytestmark = pytest.mark.system

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "tiny.yaml"
QUICK_CONTROLS = {"no_curriculum", "all_samples"}
RANKED_CONTROLS = {"reversed_order", "constant_temperature", "constant_weight"}
FEW = ("curriculum.epochs_per_stage=1", "checkpoints.every_steps=3")


@pytest.fixture(autouse=True)
def _work_in_the_project_root(monkeypatch: pytest.MonkeyPatch) -> None:
    # Paths in example specifications are relative to the root of the project.
    monkeypatch.chdir(ROOT)


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    # To draw them takes as long as to train. The run that all others are compared with is older, and has them.
    monkeypatch.setattr(plots, "_svg", lambda _figure: "<svg></svg>")


def run_tiny(workdir: Path, *settings: str) -> tuple[Result, list[Event]]:
    events: list[Event] = []
    return run(read_spec(TINY, (*FEW, *settings)), workdir, events.append), events


def stop_tiny_run_at(step: int, workdir: Path, *settings: str) -> None:
    """Run until `step` is logged, and stop there."""
    seen: set[int] = set()

    def sink(event: Event) -> None:
        if isinstance(event, StepLogged):
            seen.add(event.step)

    with pytest.raises(RunStopped):
        run(read_spec(TINY, (*FEW, *settings)), workdir, sink, lambda: step in seen)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        run_tiny(workdir)
    return workdir


def final_weights_digest(workdir: Path) -> str:
    return manifest.sha256_of(workdir / "final" / "model.safetensors")


def approached_teacher(result: Result) -> bool:
    """Whether the student's divergence from the teacher fell. (A random teacher does not lower the cross-entropy.)"""
    initial, final = result.evaluations[1], result.evaluations[-1]
    return final.divergence is not None and initial.divergence is not None and final.divergence < initial.divergence


def logged_steps(workdir: Path) -> dict[int, tuple[float, float]]:
    """Loss and gradient norm of each step, as last logged."""
    events = [from_line(line).event for line in (workdir / "events.jsonl").read_bytes().splitlines()]
    return {event.step: (event.loss, event.grad_norm) for event in events if isinstance(event, StepLogged)}


def test_run_leaves_every_file_of_its_layout(undisturbed: Path) -> None:
    names = {path.name for path in undisturbed.iterdir()}
    assert names >= {
        "spec.json",
        "events.jsonl",
        "ranking.jsonl",
        "checkpoints",
        "best",
        "final",
        "result.json",
        "report.html",
    }
    for directory in ("best", "final"):
        manifest.verify(undisturbed / directory)
    assert not list(undisturbed.rglob(".tmp-*"))


def test_generator_that_is_not_installed_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    if find_spec("vllm") is not None:
        pytest.skip("vLLM is installed")
    events: list[Event] = []
    with pytest.raises(SpecInvalid) as caught:
        run(read_spec(TINY, (*FEW, "resources.generator=vllm")), tmp_path, events.append)
    assert [error.pointer for error in caught.value.field_errors] == ["/resources/generator"]
    assert [event.phase for event in events if isinstance(event, PhaseChanged)] == ["validating"]


def test_every_choice_of_the_engine_is_pinned(undisturbed: Path) -> None:
    pinned = json.loads((undisturbed / "spec.json").read_bytes())
    assert all(pinned[part][field] is not None for part, fields in ENGINE_CHOICES.items() for field in fields)


def test_result_has_an_evaluation_of_teacher_untrained_student_each_stage_and_final_student(undisturbed: Path) -> None:
    result = Result.model_validate_json((undisturbed / "result.json").read_bytes())
    subjects = [(each.subject, each.stage) for each in result.evaluations]
    assert subjects == [("teacher", None), ("initial", None), *(("stage", i) for i in range(4)), ("final", None)]
    assert approached_teacher(result)
    assert [stage.samples for stage in result.stages] == [16, 32, 48, 64]


def test_steps_are_logged_once_and_in_order(undisturbed: Path) -> None:
    result = Result.model_validate_json((undisturbed / "result.json").read_bytes())
    assert list(logged_steps(undisturbed)) == list(range(1, result.steps + 1))


def test_ranking_is_a_permutation_of_all_samples(undisturbed: Path) -> None:
    lines = [json.loads(line) for line in (undisturbed / "ranking.jsonl").read_text().splitlines()]
    assert sorted(line["row"] for line in lines) == list(range(64))


def test_report_is_one_file_without_scripts_or_external_resources(undisturbed: Path) -> None:
    html = (undisturbed / "report.html").read_text()
    # Lengths of samples; loss, temperature; ROUGE-L, cross-entropy by stage; difficulty as points and as bars.
    assert html.count("<figure") == 4
    assert html.count("<svg") == 7
    assert "<script" not in html
    assert "src=" not in html
    # Nobody has named the run, so that its report says nothing of the time either: equal runs write equal bytes.
    assert "<h1>POCL distillation report</h1>" in html
    assert re.search(r"Teacher: llama with random weights, [\d,]+ parameters. Student: .*, [\d,]+ parameters.", html)


def test_answers_stand_beside_what_was_asked_and_not_its_template(undisturbed: Path) -> None:
    rows = [json.loads(line) for line in (ROOT / "examples" / "tiny" / "validation.jsonl").read_text().splitlines()]
    asked = [each["prompt"] for each in json.loads((undisturbed / RESULT_FILE).read_text())["answers"]]
    assert asked == ["\n\n".join(filter(None, (row["instruction"], row.get("input")))) for row in rows[:5]]


def test_final_student_loads_and_generates(undisturbed: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(undisturbed / "final")
    model: Any = AutoModelForCausalLM.from_pretrained(undisturbed / "final")
    prompt = tokenizer("Hello", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4).shape[1] > 4


def test_finished_run_finishes_again_without_a_step(undisturbed: Path) -> None:
    before = final_weights_digest(undisturbed)
    _, events = run_tiny(undisturbed)
    assert not any(isinstance(event, StepLogged) for event in events)
    assert isinstance(events[-1], RunFinished)
    assert final_weights_digest(undisturbed) == before


@pytest.mark.parametrize("stops", [(1,), (4, 9), (5, 6, 13)])
def test_stopped_run_ends_in_the_same_weights(undisturbed: Path, tmp_path: Path, stops: tuple[int, ...]) -> None:
    for stop in stops:
        stop_tiny_run_at(stop, tmp_path)
    run_tiny(tmp_path)
    assert final_weights_digest(tmp_path) == final_weights_digest(undisturbed)
    assert logged_steps(tmp_path) == logged_steps(undisturbed)
    assert (tmp_path / "ranking.jsonl").read_bytes() == (undisturbed / "ranking.jsonl").read_bytes()


@pytest.mark.parametrize(
    "moment",
    [
        "step 5",
        "stage 1 saved",
        "exporting",
        pytest.param("ranking", marks=pytest.mark.slow),
        pytest.param("stage 2 evaluated", marks=pytest.mark.slow),
    ],
)
def test_killed_run_ends_in_the_same_weights_and_metrics(undisturbed: Path, tmp_path: Path, moment: str) -> None:
    workdir = tmp_path / "run"
    attempt, lines = forked_engine(workdir)
    for line in lines:
        if is_moment(json.loads(line)["event"], moment):
            attempt.send(signal.SIGKILL)
            break
    lines.close()
    assert attempt.wait() == -signal.SIGKILL
    attempt, lines = forked_engine(workdir)
    lines.read()
    lines.close()
    assert attempt.wait() == ExitCode.DONE
    assert final_weights_digest(workdir) == final_weights_digest(undisturbed)
    assert logged_steps(workdir) == logged_steps(undisturbed)


def test_interrupted_ranking_continues_from_its_journal(undisturbed: Path, tmp_path: Path) -> None:
    partial = tmp_path / "ranking.partial.jsonl"

    def has_measured_a_batch() -> bool:
        # Its first line is what was taken from other runs.
        return partial.exists() and partial.read_bytes().count(b"\n") == 2

    # Four rows in flight make several batches of the samples.
    spec, events = read_spec(TINY, (*FEW, "evaluation.batch_size=4")), list[Event]()
    with pytest.raises(RunStopped):
        run(spec, tmp_path, lambda _: None, has_measured_a_batch)
    finished = json.loads(partial.read_bytes().splitlines()[1])["measured"]
    run(spec, tmp_path, events.append)
    ours, theirs = ranking_of(tmp_path), ranking_of(undisturbed)
    assert 0 < len(finished) < len(ours)
    first, *_ = (event for event in events if isinstance(event, Progressed) and event.phase == "ranking")
    assert first.done == len(finished)
    assert all(ours[each["row"]].items() >= each.items() for each in finished)
    assert {row: each["rank"] for row, each in ours.items()} == {row: each["rank"] for row, each in theirs.items()}
    assert final_weights_digest(tmp_path) == final_weights_digest(undisturbed)
    assert not partial.exists()


def ranking_of(workdir: Path) -> dict[int, dict[str, Any]]:
    lines = map(json.loads, (workdir / "ranking.jsonl").read_bytes().splitlines())
    return {line["row"]: line for line in lines}


def test_result_and_report_have_sampled_scores_beside_the_greedy_ones(tmp_path: Path) -> None:
    result, _ = run_tiny(
        tmp_path, "curriculum.stages=1", "evaluation.max_rows=4", "evaluation.sampling={seeds: [10, 20]}",
        "evaluation.best_by=exact_match",
    )  # fmt: skip
    assert all(each.sampled is not None and len(each.sampled.rouge_l.values) == 2 for each in result.evaluations)
    assert [each.subject for each in result.evaluations] == ["teacher", "initial", "stage", "final"]
    assert (result.best_stage, result.best_by) == (0, "exact_match")
    html = (tmp_path / "report.html").read_text()
    assert " ± " in html
    assert "over seeds 10, 20 at temperature 1.0" in " ".join(html.split())


def test_other_samples_are_scored_at_the_start_at_the_end_and_of_the_best_stage(tmp_path: Path) -> None:
    probes = tmp_path / "probes.jsonl"
    probes.write_text(
        '{"messages": [{"role": "user", "content": "Say so."}, {"role": "assistant", "content": "so"}]}\n'
    )
    few = (
        "curriculum.stages=2",
        "evaluation.max_rows=4",
        "evaluation.max_new_tokens=3",
        f"evaluation.sets={{probes: {{path: {probes}}}}}",
    )
    settings = (*few, "data.test.path=examples/tiny/validation.jsonl", "seed=4")
    result, events = run_tiny(tmp_path / "run", *settings)
    by_split: dict[str, list[Evaluated]] = {}
    for each in result.evaluations:
        by_split.setdefault(each.split, []).append(each)
    assert [*by_split] == ["validation", "test", "probes"]
    assert [each.subject for each in by_split["validation"]] == ["teacher", "initial", "stage", "stage", "final"]
    for split, rows in (("test", 16), ("probes", 1)):
        scored = {each.subject: each for each in by_split[split] if each.subject != "stage"}
        assert [*scored] == ["teacher", "initial", "best", "final"]
        assert {each.rows for each in by_split[split]} == {rows}
        assert scored["best"].stage == result.best_stage
    assert [event for event in events if isinstance(event, Evaluated)] == list(result.evaluations)
    differences = {(each.split, each.model, each.compared_with, each.metric): each for each in result.differences}
    initial, final = (next(each for each in by_split["test"] if each.subject == name) for name in ("initial", "final"))
    fell = differences["test", "final", "initial", "cross_entropy"]
    assert fell.difference == pytest.approx(final.cross_entropy - initial.cross_entropy, abs=1e-4)
    assert fell.low <= fell.difference <= fell.high
    html = (tmp_path / "run" / "report.html").read_text()
    assert all(f"Scores on {rows} {split} samples" in html for split, rows in (("test", 16), ("validation", 4)))
    answers = (tmp_path / "run" / "answers.jsonl").read_text()
    lines = [json.loads(line) for line in answers.splitlines()]
    tested = [line["rouge_l"] for line in lines if (line["split"], line["subject"]) == ("test", "initial")]
    assert fmean(tested) == pytest.approx(initial.rouge_l, abs=1e-4)
    assert {(line["split"], line["subject"], line["stage"]) for line in lines} == {
        (each.split, each.subject, each.stage)
        for each in result.evaluations
        if each.subject in ("teacher", "initial", "stage")
    }
    stop_tiny_run_at(7, tmp_path / "cut", *settings)
    assert run_tiny(tmp_path / "cut", *settings)[0] == result
    assert sorted((tmp_path / "cut" / "answers.jsonl").read_text().splitlines()) == sorted(answers.splitlines())


def test_sigterm_saves_and_exits_with_75(tmp_path: Path) -> None:
    attempt, lines = forked_engine(tmp_path / "run")
    for line in lines:
        if is_moment(json.loads(line)["event"], "step 5"):
            attempt.send(signal.SIGTERM)
            break
    rest = [from_line(line).event for line in lines]
    lines.close()
    assert attempt.wait() == ExitCode.STOPPED
    assert any(isinstance(event, CheckpointSaved) for event in rest)
    assert isinstance(rest[-1], RunEnded)
    assert rest[-1].code == "stopped"


def test_damaged_checkpoint_is_skipped_with_a_warning(undisturbed: Path, tmp_path: Path) -> None:
    stop_tiny_run_at(8, tmp_path)
    newest = max((tmp_path / "checkpoints").iterdir())
    (newest / "training" / "state.json").write_text("{}")
    _, events = run_tiny(tmp_path)
    assert any(getattr(event, "code", "") == "checkpoint_passed_over" for event in events)
    assert final_weights_digest(tmp_path) == final_weights_digest(undisturbed)


def test_another_specification_is_refused_in_the_same_directory(undisturbed: Path) -> None:
    with pytest.raises(WorkdirMismatch):
        run_tiny(undisturbed, "seed=11")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK_CONTROLS else pytest.param(kind, marks=pytest.mark.slow) for kind in CONTROL_KINDS]
)
def test_control_takes_as_many_steps_and_is_reported_as_one(undisturbed: Path, tmp_path: Path, kind: str) -> None:
    few = ("evaluation.max_rows=1", "evaluation.max_new_tokens=1")
    (tmp_path / ABOUT_FILE).write_text('{"name": "<mine>", "job": "job_1", "began_at": "2026-11-24T10:00:00Z"}')
    (tmp_path / COMPARED_DIR).mkdir()
    for name in (RESULT_FILE, ANSWERS_FILE):
        shutil.copyfile(undisturbed / name, tmp_path / COMPARED_DIR / name)
    result, events = run_tiny(tmp_path, f"curriculum.control={{kind: {kind}}}", *few)
    assert result.steps == max(logged_steps(undisturbed))
    assert result.control is not None
    skipped = any(isinstance(event, Warned) and event.code == "ranking_skipped" for event in events)
    assert (tmp_path / "ranking.jsonl").exists() == (kind in RANKED_CONTROLS)
    assert skipped == (kind not in RANKED_CONTROLS)
    report = (tmp_path / "report.html").read_text()
    assert f"Control experiment {kind}:" in report
    assert "<h1>&lt;mine&gt;</h1>" in report
    assert "job_1, 24 November 2026, 10:00 to " in report
    # The run that it is compared with stands beside it; an interval needs more than one sample.
    compared, uncontrolled = result.compared_with, json.loads((undisturbed / RESULT_FILE).read_text())
    assert compared is not None
    assert [each.rouge_l for each in compared.evaluations] == [
        each["rouge_l"] for each in uncontrolled["evaluations"] if each["subject"] == "final"
    ]
    assert compared.differences == ()
    assert "final student of the run without the control" in report


def test_branch_reports_the_settings_of_its_inherited_stages(tmp_path: Path) -> None:
    parent, branch = tmp_path / "parent", tmp_path / "branch"
    with pytest.raises(RunStopped):
        run(read_spec(TINY, FEW), parent, lambda _: None, should_pause=lambda: True)
    stage_end = max((parent / "checkpoints").iterdir())
    shutil.copytree(stage_end, branch / "checkpoints" / stage_end.name)
    result, _ = run_tiny(branch, "method=js", "curriculum.temperature={start: 2, end: 5}")
    assert [(stage.method.name.value, stage.inherited) for stage in result.stages] == [
        ("forward_kl", True), ("js", False), ("js", False), ("js", False),
    ]  # fmt: skip
    assert [stage.temperature for stage in result.stages] == [1, 3, 4, 5]
    html = " ".join((branch / "report.html").read_text().split())
    assert "js in stages 2 to 4 of 4 stages; stage 1 inherited from the run that this one branched from" in html


def test_continued_run_inherits_no_stage(undisturbed: Path, tmp_path: Path) -> None:
    stop_tiny_run_at(9, tmp_path)
    result, _ = run_tiny(tmp_path)
    assert not any(stage.inherited for stage in result.stages)
    whole = Result.model_validate_json((undisturbed / "result.json").read_bytes())
    assert result.stages == whole.stages
    # What the first start has warned of is in the result, and is not told again.
    events = [from_line(line).event for line in (tmp_path / "events.jsonl").read_bytes().splitlines()]
    told = [event for event in events if isinstance(event, Warned)]
    assert told
    assert sorted(told, key=str) == sorted(result.warnings, key=str) == sorted(whole.warnings, key=str)


@pytest.mark.parametrize("micro_batch", [1, 3])
def test_the_micro_batch_does_not_change_the_gradient(undisturbed: Path, tmp_path: Path, micro_batch: int) -> None:
    stop_tiny_run_at(1, tmp_path, f"training.micro_batch_size={micro_batch}")
    ours, theirs = logged_steps(tmp_path)[1], logged_steps(undisturbed)[1]
    assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.parametrize("method", [name.value for name in KDMethod if name is not KDMethod.FORWARD_KL])
def test_every_method_trains(tmp_path: Path, method: str) -> None:
    result, events = run_tiny(tmp_path, f"method={method}", "curriculum.stages=2", "evaluation.max_rows=4")
    assert approached_teacher(result) or method == "sft"
    steps = [event for event in events if isinstance(event, StepLogged)]
    assert all((event.divergence is None) == (method == "sft") for event in steps)


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2"])
def test_every_family_trains(tmp_path: Path, family: str) -> None:
    # The references pull away from a random teacher, so they have no weight here.
    settings = (f"teacher.random.family={family}", "curriculum.kd_weight={start: 1, end: 1}", "curriculum.stages=1")
    _, events = run_tiny(tmp_path, *settings, "training.learning_rate=0.0003")
    divergences = [
        event.divergence for event in events if isinstance(event, StepLogged) and event.divergence is not None
    ]
    assert divergences[-1] < divergences[0]


def test_stage_ends_early_on_convergence_and_resumes_to_the_same_weights(tmp_path: Path) -> None:
    settings = (
        "curriculum.epochs_per_stage=4",
        "evaluation.teacher=false",
        "curriculum.advance={by: convergence, min_delta: 100}",
        "curriculum.stages=2",
    )
    _, events = run_tiny(tmp_path / "whole", *settings)
    # No later score can rise by 100 points over the first one that is not 0.
    epochs = [event for event in events if isinstance(event, Evaluated) and event.subject == "epoch"]
    for stage in (event for event in events if isinstance(event, StageFinished)):
        scores = [each.rouge_l for each in epochs if each.stage == stage.stage]
        assert len(scores) == stage.epochs == min(4, next((at for at, score in enumerate(scores) if score), 4) + 2)
        assert stage.kept_epoch == max(range(len(scores)), key=lambda epoch: (scores[epoch], epoch)) + 1
    stop_tiny_run_at(7, tmp_path / "cut", *settings)
    run_tiny(tmp_path / "cut", *settings)
    assert final_weights_digest(tmp_path / "cut") == final_weights_digest(tmp_path / "whole")


def test_carried_optimiser_resumes_to_the_same_weights(tmp_path: Path) -> None:
    settings = ("curriculum.optimizer_at_stage=carry", "curriculum.stages=2")
    run_tiny(tmp_path / "whole", *settings)
    stop_tiny_run_at(5, tmp_path / "cut", *settings)
    run_tiny(tmp_path / "cut", *settings)
    assert final_weights_digest(tmp_path / "cut") == final_weights_digest(tmp_path / "whole")


def test_invalid_rows_end_the_run_with_their_code(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": ""}\n')
    events: list[Event] = []
    with pytest.raises(DatasetInvalid):
        run(read_spec(TINY, (f"data.train.path={tmp_path}/rows.jsonl",)), tmp_path / "run", events.append)
    assert isinstance(events[-1], RunEnded)
    assert (events[-1].code, events[-1].fault) == ("dataset_invalid", "user")


def test_more_stages_than_samples_are_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"instruction": "Say hi.", "output": "hi"}\n')
    with pytest.raises(SpecInvalid, match="4 stages need at least 4 training samples"):
        run_tiny(tmp_path / "run", f"data.train.path={tmp_path}/rows.jsonl")


def test_run_continues_when_its_event_reader_is_gone(tmp_path: Path) -> None:
    with engine(tmp_path, "curriculum.stages=1") as process:
        assert process.stdout is not None
        process.stdout.close()
    assert process.returncode == 0
    assert isinstance(from_line((tmp_path / "events.jsonl").read_bytes().splitlines()[-1]).event, RunFinished)


def test_invalid_specification_is_reported_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("teacher: {}\n")
    out = subprocess.run(
        [sys.executable, "-m", "pocl", "run", tmp_path / "spec.yaml", "--workdir", tmp_path / "run"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert out.returncode == ExitCode.USAGE
    assert "/student: Field required" in out.stderr
    assert out.stdout == ""


def test_failed_command_exits_with_1_and_reports_the_code(tmp_path: Path) -> None:
    attempt, lines = forked_engine(tmp_path / "run", "data.train.path=nowhere.jsonl")
    last = [from_line(line).event for line in lines][-1]
    lines.close()
    assert attempt.wait() == ExitCode.FAILED
    assert isinstance(last, RunEnded)
    assert last.code == "dataset_invalid"


def forked_engine(workdir: Path, *settings: str) -> tuple[Attempt, IO[bytes]]:
    """The command's `main` in a process of its own, which imports nothing anew; and the lines of its events."""
    spec = workdir.with_suffix(".json")
    spec.write_text(read_spec(TINY, (*FEW, *settings)).model_dump_json())
    attempt = ForkedEngine().start(spec, workdir)
    return attempt, os.fdopen(os.dup(attempt.events), "rb")


@contextmanager
def engine(workdir: Path, *settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """The command, as a process that is waited for at the end."""
    sets = [part for setting in (*FEW, *settings) for part in ("--set", setting)]
    command = [sys.executable, "-m", "pocl", "run", str(TINY), "--workdir", str(workdir), *sets]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment()
    ) as process:
        yield process


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def is_moment(event: dict[str, Any], moment: str) -> bool:
    expected: dict[str, Any]
    match moment.split():
        case ["step", number]:
            expected = {"type": "step", "step": int(number)}
        case ["stage", number, "saved"]:
            expected = {"type": "checkpoint", "kind": "stage", "stage": int(number)}
        case ["stage", number, "evaluated"]:
            expected = {"type": "evaluated", "subject": "stage", "stage": int(number)}
        case [phase]:
            expected = {"type": "phase", "phase": phase}
        case _:
            raise AssertionError(moment)
    return event.items() >= expected.items()


@contextmanager
def record_teacher_forwards() -> Iterator[list[int]]:
    """Rows that go through the layers of tiny.yaml's teacher, which has four; the student has two.

    The text of two tokens with which each model is tried as it is loaded does not count.
    """
    seen: list[int] = []

    def count(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, LlamaDecoderLayer) and module.self_attn.layer_idx == 3 and args[0].shape[1] > 2:
            seen.append(args[0].shape[0])

    handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
    try:
        yield seen
    finally:
        handle.remove()


def test_second_job_with_another_method_does_not_run_the_teacher(tmp_path: Path) -> None:
    store = SharedCache(tmp_path / "cache", 1 << 30)
    few = (*FEW, "curriculum.stages=2")

    def teacher_samples(name: str, *settings: str) -> int:
        with record_teacher_forwards() as seen:
            run(read_spec(TINY, (*few, *settings)), tmp_path / name, lambda _: None, shared_cache=store)
        return sum(seen)

    assert teacher_samples("first") >= 64
    assert teacher_samples("second", "method=js", "seed=3", "curriculum.temperature.end=3") == 0
    assert not (tmp_path / "cache" / "pins").exists()


@pytest.mark.system
def test_second_job_with_a_full_cache_reads_no_layer_of_the_teacher(tmp_path: Path) -> None:
    store, teacher = SharedCache(tmp_path / "cache", 1 << 30), tmp_path / "teacher"
    size = {"family": "llama", "layers": 3, "hidden_size": 64, "heads": 4, "seed": 1}
    save_model(random_model(RandomModel.model_validate(size)), byte_level_tokenizer(1024), teacher)
    settle(teacher)
    models = (f"teacher={{path: {teacher}}}", "student={random: {layers: 1, hidden_size: 64, heads: 4, seed: 2}}")
    for name in ("first", "second"):
        spec = read_spec(TINY, (*FEW, *models, "curriculum.stages=1"))
        run(spec, tmp_path / name, lambda _: None, shared_cache=store)
        # Whatever reads a layer after the first job reads NaN.
        assert overwrite(teacher, is_of_a_layer)
    assert final_weights_digest(tmp_path / "first") == final_weights_digest(tmp_path / "second")


def test_run_continues_elsewhere_from_a_mid_stage_checkpoint_alone(tmp_path: Path, undisturbed: Path) -> None:
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    stop_tiny_run_at(9, here)
    state = here / "checkpoints" / "step-00000009"
    # No earlier checkpoint and no `best/` come along, as when a worker takes over from another machine.
    shutil.copytree(state, elsewhere / "checkpoints" / state.name)
    _, events = run_tiny(elsewhere)
    assert final_weights_digest(elsewhere) == final_weights_digest(undisturbed)
    best = [event for event in events if isinstance(event, CheckpointSaved) and event.kind == "best"]
    assert all(event.path == f"checkpoints/step-{event.step:08d}" for event in best)
