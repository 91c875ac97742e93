"""The specification: every default is named, nothing unknown passes, every refusal points at its field."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, get_args, get_origin

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from pocl.errors import SpecInvalid
from pocl.spec import (
    CONTROL_KINDS,
    ENGINE_CHOICES,
    JS,
    METHODS,
    PRESETS,
    RANKER_KINDS,
    ConstantTemperature,
    ConstantWeight,
    Control,
    DistillationSpec,
    KDMethod,
    NoCurriculum,
    Ranking,
    StudentRanker,
    resolve,
)

MINIMAL = {"teacher": {"random": {}}, "student": {"random": {}}, "data": {"train": {"path": "rows.jsonl"}}}
WITH_VALIDATION = {"data": {"train": {"path": "rows.jsonl"}, "validation": {"path": "held_out.jsonl"}}}


def refused(**over: object) -> set[tuple[str, str]]:
    with pytest.raises(SpecInvalid) as caught:
        resolve(MINIMAL | over)
    return {(problem.pointer, problem.code) for problem in caught.value.field_errors}


def test_default_preset_has_the_settings_of_the_paper() -> None:
    spec = resolve(MINIMAL)
    assert (spec.curriculum.stages, spec.curriculum.epochs_per_stage) == (4, 8)
    assert (spec.training.batch_size, spec.training.learning_rate, spec.training.weight_decay) == (64, 1e-4, 0.01)
    assert (spec.data.max_length, spec.data.max_prompt_length) == (512, 256)


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_resolve_is_idempotent(preset: str) -> None:
    spec = resolve(MINIMAL | {"preset": preset})
    assert resolve(spec.model_dump(mode="json")) == spec
    assert DistillationSpec.model_validate_json(spec.model_dump_json()) == spec


def test_sampling_is_off_by_default_and_has_the_settings_of_the_paper() -> None:
    assert resolve(MINIMAL).evaluation.sampling is None
    sampling = resolve(MINIMAL | {"evaluation": {"sampling": {}}}).evaluation.sampling
    assert sampling is not None
    assert (sampling.temperature, sampling.top_p, sampling.seeds) == (1.0, 1.0, (10, 20, 30, 40, 50))


def test_official_preset_answers_as_the_published_measurer_does() -> None:
    ranking = resolve(MINIMAL | {"preset": "pocl_official"}).curriculum.ranking
    assert (ranking.temperature, ranking.no_repeat_ngram, ranking.rrf_k) == (0.01, 6, 60)
    assert resolve(MINIMAL).curriculum.ranking == Ranking(ranker=StudentRanker())


def test_every_ranker_may_be_named_and_the_teacher_must_be_there_to_rank() -> None:
    fields: dict[str, dict[str, object]] = {"model": {"model": {"random": {}}}}
    for kind in RANKER_KINDS:
        ranking = {"ranker": {"kind": kind, **fields.get(kind, {})}}
        assert resolve(MINIMAL | {"curriculum": {"ranking": ranking}}).curriculum.ranking.ranker.kind == kind
    by_teacher = {"ranking": {"ranker": {"kind": "teacher"}}}
    assert refused(teacher=None, method="sft", curriculum=by_teacher) == {("", "value_error")}


def test_evaluation_sets_are_named_freely_and_few() -> None:
    sets = {"maths": {"path": "maths.jsonl"}, "chat-de": {"path": "chat.jsonl"}}
    data = WITH_VALIDATION["data"] | {"test": {"path": "test.jsonl"}}
    spec = resolve(MINIMAL | {"data": data, "evaluation": {"sets": sets}})
    assert [*spec.data_refs] == [
        "/data/train", "/data/validation", "/data/test", "/evaluation/sets/maths", "/evaluation/sets/chat-de",
    ]  # fmt: skip
    moved = {pointer: ref.model_copy(update={"path": f"/x/{ref.path}"}) for pointer, ref in spec.data_refs.items()}
    assert spec.with_data_refs(moved).data_refs == moved
    assert DistillationSpec.model_validate_json(spec.model_dump_json()) == spec


@pytest.mark.parametrize(
    "sets", [{"test": {"path": "x"}}, {"A b": {"path": "x"}}, {f"s{i}": {"path": "x"} for i in range(9)}]
)
def test_evaluation_sets_of_other_names_or_too_many_are_refused(sets: dict[str, object]) -> None:
    ((pointer, _),) = refused(evaluation={"sets": sets})
    assert pointer.startswith("/evaluation")


def test_client_fields_override_the_preset_one_by_one() -> None:
    spec = resolve(MINIMAL | {"preset": "quick", "training": {"batch_size": 3}})
    assert spec.training.batch_size == 3
    assert spec.training.learning_rate == PRESETS["quick"]["training"]["learning_rate"]


def test_every_method_may_be_given_by_name_alone() -> None:
    assert {resolve(MINIMAL | {"method": name.value}).method.name for name in KDMethod} == set(METHODS) == set(KDMethod)


def test_official_preset_scales_three_losses_by_tau_squared_and_weighs_js_by_a_tenth() -> None:
    methods = {name: resolve(MINIMAL | {"preset": "pocl_official", "method": name}).method for name in KDMethod}
    scaled = {name for name, method in methods.items() if getattr(method, "scale_by_tau_squared", False)}
    unpublished = {"adaptive_kl", "alpha_beta"}
    assert scaled - unpublished == {"forward_kl", "js", "skew_reverse_kl"}
    assert methods[KDMethod.JS] == JS(beta=0.1)


def test_resolve_fills_in_the_constants_of_a_control() -> None:
    no_curriculum = resolve(MINIMAL | {"curriculum": {"control": {"kind": "no_curriculum"}}}).curriculum.control
    constant = resolve(MINIMAL | {"curriculum": {"control": {"kind": "constant_temperature"}}}).curriculum.control
    weight = resolve(MINIMAL | {"curriculum": {"control": {"kind": "constant_weight"}}}).curriculum.control
    # The mean over 1, 2, 3 and 4 quarters of the samples at 0.7, 0.8, 0.9 and 1.
    assert no_curriculum == NoCurriculum(kind="no_curriculum", temperature=1.0, kd_weight=0.9)
    assert weight == ConstantWeight(kind="constant_weight", kd_weight=0.9)
    assert constant == ConstantTemperature(kind="constant_temperature", temperature=1.0)


@pytest.mark.parametrize(
    ("over", "pointer", "code"),
    [
        ({"stages": 4}, "/stages", "extra_forbidden"),
        ({"curriculum": {"temperatur": {}}}, "/curriculum/temperatur", "extra_forbidden"),
        ({"curriculum": {"temperature": {"start": 3}}}, "/curriculum/temperature", "value_error"),
        ({"curriculum": {"kd_weight": {"start": 1, "end": 0.5}}}, "/curriculum/kd_weight", "value_error"),
        ({"curriculum": {"stages": 0}}, "/curriculum/stages", "greater_than_equal"),
        ({"curriculum": {"control": {"kind": "none"}}}, "/curriculum/control", "union_tag_invalid"),
        ({"curriculum": {"ranking": {"ranker": {"kind": "warm_student", "steps": 0}}}},
         "/curriculum/ranking/ranker/steps", "greater_than_equal"),
        ({"curriculum": {"ranking": {"no_repeat_ngram": 6}}, "resources": {"generator": "vllm"}}, "", "value_error"),
        ({"curriculum": {"advance": {"by": "convergence", "metric": "cross_entropy"}}},
         "/curriculum/advance/metric", "literal_error"),
        ({"method": "kld"}, "/method", "union_tag_invalid"),
        ({"method": {"name": "js", "beta": 1}}, "/method/beta", "less_than"),
        ({"method": {"name": "forward_kl", "beta": 0.5}}, "/method/beta", "extra_forbidden"),
        ({"evaluation": {"sampling": {"seeds": []}}}, "/evaluation/sampling/seeds", "too_short"),
        ({"evaluation": {"sampling": {"seeds": list(range(21))}}}, "/evaluation/sampling/seeds", "too_long"),
        ({"evaluation": {"sampling": {"seeds": [1, 1]}}}, "/evaluation/sampling", "value_error"),
        ({"evaluation": {"sampling": {"top_p": 0}}}, "/evaluation/sampling/top_p", "greater_than"),
        ({"evaluation": {"best_by": "cross_entropy"}}, "/evaluation/best_by", "literal_error"),
        ({"teacher": {}}, "/teacher", "value_error"),
        ({"teacher": {"random": {}, "path": "x"}}, "/teacher", "value_error"),
        ({"student": {"from_teacher": {"layers": [2, 1]}}}, "/student/from_teacher", "value_error"),
        ({"teacher": {"hub": {"repo": "../etc"}}}, "/teacher/hub/repo", "string_pattern_mismatch"),
        ({"training": {"learning_rate": float("nan")}}, "/training/learning_rate", "finite_number"),
        ({"data": {"train": {"path": "x"}, "max_length": 8, "max_prompt_length": 8}}, "/data", "value_error"),
        ({"preset": "papr"}, "/preset", "literal_error"),
        ({"seed": "ten"}, "/seed", "int_parsing"),
    ],
)  # fmt: skip
def test_invalid_field_is_refused_with_its_pointer(over: dict[str, object], pointer: str, code: str) -> None:
    assert (pointer, code) in refused(**over)


def set_choices(value: int) -> dict[str, dict[str, int]]:
    return {part: dict.fromkeys(fields, value) for part, fields in ENGINE_CHOICES.items()}


def test_engine_chooses_what_the_client_left_open_and_nothing_else() -> None:
    posted = resolve(MINIMAL | {"evaluation": {"batch_size": 3}})
    pinned = posted.with_choices(set_choices(7))
    assert pinned.evaluation.batch_size == 3
    assert pinned.training.micro_batch_tokens == pinned.evaluation.scoring_tokens == pinned.resources.threads == 7
    assert pinned.without_choices(posted) == posted
    assert pinned.without_choices(resolve(MINIMAL)) == resolve(MINIMAL)


def test_choices_of_the_engine_have_no_part_in_the_recipe() -> None:
    posted = resolve(MINIMAL)
    assert posted.with_choices(set_choices(7)).recipe_digest == posted.recipe_digest
    assert resolve(MINIMAL | {"training": {"batch_size": 3}}).recipe_digest != posted.recipe_digest


def test_what_was_never_tried_on_a_gpu_is_off_by_default() -> None:
    resources = resolve(MINIMAL).resources
    assert not any((resources.compile, resources.graphs, resources.prefetch, resources.deterministic))
    assert resources.generator == "engine"


def test_every_method_but_sft_requires_a_teacher() -> None:
    assert resolve(MINIMAL | {"teacher": None, "method": "sft"}).teacher is None
    assert refused(teacher=None) == {("", "value_error")}


def test_every_kind_of_control_has_a_name() -> None:
    union, _ = get_args(Control)
    assert {get_args(control.model_fields["kind"].annotation)[0] for control in get_args(union)} == set(CONTROL_KINDS)


@pytest.mark.parametrize("kind", CONTROL_KINDS)
def test_control_of_stages_that_end_by_convergence_names_its_budget(kind: str) -> None:
    by_convergence = {"advance": {"by": "convergence"}, "stages": 2}
    control: dict[str, object] = {"kind": kind}
    assert refused(**WITH_VALIDATION, curriculum=by_convergence | {"control": control}) == {
        ("/curriculum", "value_error")
    }
    for budget in ({"stage_steps": [3, 5]}, {"budget_of": "job_00000000"}):
        resolve(MINIMAL | WITH_VALIDATION | {"curriculum": by_convergence | {"control": control | budget}})
    wrong = by_convergence | {"control": control | {"stage_steps": [3]}}
    assert refused(**WITH_VALIDATION, curriculum=wrong) == {("/curriculum", "value_error")}


def test_ranking_is_used_where_the_order_of_samples_matters() -> None:
    def uses(**curriculum: object) -> bool:
        return resolve(MINIMAL | {"curriculum": curriculum}).curriculum.uses_ranking

    unranked = {"no_curriculum", "all_samples", "shuffled_stages"}
    assert uses()
    assert not uses(stages=1)
    assert {kind for kind in CONTROL_KINDS if not uses(control={"kind": kind})} == unranked


def test_convergence_requires_validation_data() -> None:
    convergence = {"curriculum": {"advance": {"by": "convergence"}}}
    assert refused(**convergence) == {("", "value_error")}
    assert resolve(MINIMAL | WITH_VALIDATION | convergence).curriculum.advance.by == "convergence"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@given(st.sampled_from(sorted(DistillationSpec.model_fields)), json_values)
def test_arbitrary_values_are_accepted_or_spec_invalid(field: str, value: object) -> None:
    # Anything but SpecInvalid fails the test.
    with suppress(SpecInvalid):
        assert isinstance(resolve(MINIMAL | {field: value}), DistillationSpec)


HOSTILE_REVISIONS = (
    *("../main", "a/../../b", "..", ".", "./a", "/etc", "a//b", "a/", "a\\b", "a\nb", "a\0", "", "a b", "~", "C:x"),
    *("a..b", "a.lock", ".hidden", "a/.b", "main\n"),
)
HOSTILE_REPOSITORIES = (
    "../a",
    "a/..",
    "a/b/c",
    "/a/b",
    "a/b/",
    "a\\b/c",
    "a--b/c",
    "a/b..c",
    "a/b-",
    "a/b.git",
    "a/b\n",
)
HOSTILE_FILES = ("/etc/passwd", "../x", "a/../../x", "a\\..\\x", "C:/x", "a//b", "./a", "a\0b", "a\nb", "a/")


def test_names_on_the_hub_lead_out_of_no_directory() -> None:
    for field, hub in (("teacher", "/teacher/hub"), ("data", "/data/train/hub")):

        def at_hub(field: str = field, **names: object) -> set[tuple[str, str]]:
            reference = {"hub": {"repo": "a/b", **names}}
            return refused(**{field: reference if field == "teacher" else {"train": reference}})

        for revision in HOSTILE_REVISIONS:
            assert {pointer for pointer, _ in at_hub(revision=revision)} == {f"{hub}/revision"}, revision
        for repo in HOSTILE_REPOSITORIES:
            assert {pointer for pointer, _ in at_hub(repo=repo)} == {f"{hub}/repo"}, repo
    for file in HOSTILE_FILES:
        problems = refused(data={"train": {"hub": {"repo": "a/b", "files": ["data/*.parquet", file]}}})
        assert {pointer for pointer, _ in problems} == {"/data/train/hub/files/1"}, file


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/12", "feature/a-b_c", "0" * 40, "refs/convert/parquet"])
def test_usual_names_on_the_hub_pass(revision: str) -> None:
    hub = {"repo": "HuggingFaceTB/SmolLM2-135M.v1", "revision": revision}
    spec = resolve(MINIMAL | {"teacher": {"hub": hub}, "data": {"train": {"hub": {**hub, "files": ["data/train-*"]}}}})
    assert spec.teacher is not None
    assert spec.teacher.hub is not None
    assert spec.teacher.hub.revision == revision


def fields_of(model: type[BaseModel], pointer: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every object of a specification that has one form alone, with the pointer to it."""
    yield pointer, model
    for name, field in model.model_fields.items():
        inner = [each for each in (field.annotation, *get_args(field.annotation)) if isinstance(each, type)]
        parts = [each for each in inner if issubclass(each, BaseModel)]
        if len(parts) == 1 and get_origin(field.annotation) not in (dict, Mapping):
            yield from fields_of(parts[0], f"{pointer}/{name}")


@pytest.mark.parametrize("pointer", sorted(dict(fields_of(DistillationSpec))))
def test_a_misspelt_field_is_answered_with_the_nearest_name(pointer: str) -> None:
    names = [name for name in dict(fields_of(DistillationSpec))[pointer].model_fields if len(name) > 3]
    for name in names:
        for misspelt in (name[:-1], name[1:], name[:2] + "x" + name[2:], name.replace("_", "-") + "s"):
            if misspelt in names:
                continue
            raw: dict[str, Any] = {misspelt: 1}
            for part in reversed(pointer.split("/")[1:]):
                raw = {part: raw}
            with pytest.raises(SpecInvalid) as caught:
                resolve({**MINIMAL, **raw})
            (detail,) = (each.detail for each in caught.value.field_errors if each.pointer == f"{pointer}/{misspelt}")
            assert detail == f"There is no such field; did you mean `{name}`?"


@pytest.mark.parametrize(
    ("over", "pointer", "meant"),
    [
        ({"preset": "quik"}, "/preset", "quick"),
        ({"method": "foward_kl"}, "/method", "forward_kl"),
        ({"method": {"name": "reverse-kl"}}, "/method", "reverse_kl"),
        ({"method": {"name": "alpha_beta", "alhpa": 1}}, "/method/alhpa", "alpha"),
        ({"curriculum": {"control": {"kind": "no_curriculums"}}}, "/curriculum/control", "no_curriculum"),
        (
            {"curriculum": {"control": {"kind": "no_curriculum", "temprature": 1}}},
            "/curriculum/control/temprature",
            "temperature",
        ),
        (
            {"curriculum": {"ranking": {"ranker": {"kind": "model", "model": {"path": "m"}, "modle": 1}}}},
            "/curriculum/ranking/ranker/modle",
            "model",
        ),
        ({"evaluation": {"sets": {"mine": {"path": "a", "colums": {}}}}}, "/evaluation/sets/mine/colums", "columns"),
        ({"export": {"dtype": "bfp16"}}, "/export/dtype", "fp16"),
    ],
)
def test_the_value_or_field_that_was_probably_meant_is_named(over: dict[str, Any], pointer: str, meant: str) -> None:
    with pytest.raises(SpecInvalid) as caught:
        resolve(MINIMAL | over)
    details = {problem.pointer: problem.detail for problem in caught.value.field_errors}
    assert details[pointer].endswith(f"did you mean `{meant}`?")


def test_a_name_like_no_other_is_answered_with_those_that_there_are_and_is_not_repeated() -> None:
    with pytest.raises(SpecInvalid) as caught:
        resolve(MINIMAL | {"export": {"SECRET" * 10_000: 1}, "preset": "SECRET", "method": "SECRET"})
    details = " ".join(problem.detail for problem in caught.value.field_errors)
    assert "there are `dtype`" in details
    assert "'paper', 'pocl_official' or 'quick'" in details
    assert "SECRET" not in details
    assert "did you mean" not in details
