"""A job as a file, and `--set` on top."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from pocl.__main__ import read_spec
from pocl.spec import resolve
from pocl_client.cli.spec_file import SpecUnreadable, apply_setting, read_request

NAMES = st.text("abcdefghijklmnopqrstuvwxyz_0123456789", min_size=1, max_size=6)
PATHS = st.lists(NAMES, min_size=1, max_size=4)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.text("abc xyz.", max_size=5)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=6,
)


def value_at(spec: dict[str, Any], path: list[str]) -> Any:
    value: Any = spec
    for name in path:
        value = value[name]
    return value


@given(PATHS, VALUES)
def test_any_field_gets_any_value(path: list[str], value: Any) -> None:
    spec: dict[str, Any] = {}
    apply_setting(spec, f"{'.'.join(path)}={json.dumps(value)}")
    assert value_at(spec, path) == value


@given(PATHS, st.text(max_size=20))
def test_a_setting_is_applied_or_refused_and_never_half(path: list[str], text: str) -> None:
    spec: dict[str, Any] = {"kept": 1}
    try:
        apply_setting(spec, f"{'.'.join(path)}={text}")
    except SpecUnreadable:
        is_applied = False
    else:
        is_applied = True
    assert not is_applied or value_at(spec, path) is not spec
    json.dumps(spec, allow_nan=False)
    assert path[0] == "kept" or spec["kept"] == 1


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("a.b=1", 1), ("a.b=5e-4", 5e-4), ("a.b=1E3", 1000.0), ("a.b=true", True), ("a.b=[0, 1]", [0, 1]),
        ("a.b=js", "js"), ("a.b=", None), ("a.b={start: 1}", {"start": 1}), ("a.b=x=y", "x=y"), ("a.b='1'", "1"),
        ("a.b=[1e-3, 5e-4]", [1e-3, 5e-4]), ('a.b={"c": 2e-5}', {"c": 2e-5}), ("a.b=NaN", "NaN"), ("a.b=2026", 2026),
    ],
)  # fmt: skip
def test_values_are_what_they_look_like(setting: str, value: object) -> None:
    spec: dict[str, Any] = {"a": {"c": 2}}
    apply_setting(spec, setting)
    assert spec == {"a": {"c": 2, "b": value}}


@pytest.mark.parametrize(
    "setting",
    [
        "",
        "a",
        "=1",
        "a.=1",
        ".a=1",
        "a..b=1",
        "a.b.c=1",
        "a.b=[",
        "a.b={",
        "a=.nan",
        "a=2026-01-01",
        "a=&x [*x]",
        "a=2026-99-99",
    ],
)
def test_what_is_no_setting_is_refused(setting: str) -> None:
    with pytest.raises(SpecUnreadable, match="--set"):
        apply_setting({"a": {"b": 1}}, setting)


@pytest.mark.parametrize(
    "content", ['{"seed": 1, "training": {"learning_rate": 5e-4}}', "seed: 1\ntraining: {learning_rate: 0.0005}"]
)
def test_a_specification_alone_is_a_request(tmp_path: Path, content: str) -> None:
    path = tmp_path / "spec"
    path.write_text(content)
    request = read_request(path, ["training.batch_size=2"])
    assert request == {"spec": {"seed": 1, "training": {"learning_rate": 5e-4, "batch_size": 2}}}


def test_a_whole_body_keeps_its_options(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump({"name": "first", "priority": 3, "spec": {"seed": 1}}))
    assert read_request(path, ["seed=2"]) == {"name": "first", "priority": 3, "spec": {"seed": 2}}


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"seed: [", b"\xff", b"text", b"seed: 1\n---\nseed: 2\n", b"at: 2026-01-01", b"1: 2", b"a: .nan"],
)
def test_what_is_no_specification_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "spec.yaml"
    path.write_bytes(content)
    with pytest.raises(SpecUnreadable, match=r"spec\.yaml"):
        read_request(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SpecUnreadable, match=r"none\.yaml: No such file"):
        read_request(tmp_path / "none.yaml")


@pytest.mark.parametrize("setting", ["method=js", "training.learning_rate=0.01", "curriculum.temperature.end=3"])
def test_a_setting_means_what_it_means_to_the_engine(setting: str) -> None:
    path = Path(__file__).parents[2] / "examples" / "tiny.yaml"
    engine = read_spec(path, [setting])
    assert resolve(read_request(path, [setting])["spec"]) == engine
