"""Models are read below the roots, and nowhere else."""

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from domain.errors import EngineRefusal, PathOutsideModelRoots
from domain.model_paths import locate_model


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "models" / "gpt2").mkdir(parents=True)
    (tmp_path / "models-too").mkdir()
    (tmp_path / "secret").mkdir()
    return tmp_path / "models"


def locate(root: Path, path: str) -> Path:
    return locate_model([root], path, pointer="/teacher/path")


def test_a_relative_and_an_absolute_path_find_the_same_model(root: Path) -> None:
    assert locate(root, "gpt2") == locate(root, str(root / "gpt2")) == root / "gpt2"


def test_the_first_root_with_the_model_is_used(root: Path) -> None:
    empty = root.parent / "models-too"
    assert locate_model([empty, root], "gpt2", pointer="") == root / "gpt2"


@pytest.mark.parametrize("path", ["../secret", "gpt2/../../secret", "/etc/passwd", "../models-too", "../absent"])
def test_a_path_that_leaves_the_root_is_refused_whether_or_not_something_is_there(root: Path, path: str) -> None:
    with pytest.raises(PathOutsideModelRoots) as raised:
        locate(root, path)
    assert [problem.pointer for problem in raised.value.field_errors] == ["/teacher/path"]


def test_a_link_that_leads_outside_is_refused(root: Path) -> None:
    (root / "link").symlink_to(root.parent / "secret")
    with pytest.raises(PathOutsideModelRoots):
        locate(root, "link")


def test_a_link_that_stays_inside_is_followed(root: Path) -> None:
    (root / "link").symlink_to(root / "gpt2")
    assert locate(root, "link") == root / "gpt2"


def test_a_root_may_itself_be_a_link(root: Path) -> None:
    (root.parent / "alias").symlink_to(root)
    assert locate(root.parent / "alias", "gpt2") == root / "gpt2"


@pytest.mark.parametrize("path", ["absent", "nul\0", "x" * 5000, "circle"])
def test_an_impossible_path_is_a_missing_model(root: Path, path: str) -> None:
    (root / "circle").symlink_to(root / "circle")
    with pytest.raises(EngineRefusal) as raised:
        locate(root, path)
    assert raised.value.code == "model_not_found"


def test_without_roots_no_model_is_read(root: Path) -> None:
    with pytest.raises(PathOutsideModelRoots):
        locate_model([], str(root / "gpt2"), pointer="")


@given(st.text(min_size=1, max_size=80) | st.lists(st.sampled_from(["..", ".", "gpt2", "", "~"])).map("/".join))
def test_no_path_leads_outside_the_roots(path: str) -> None:
    root = Path(__file__).parent.resolve()
    with suppress(PathOutsideModelRoots, EngineRefusal):
        assert locate(root, path).is_relative_to(root)
