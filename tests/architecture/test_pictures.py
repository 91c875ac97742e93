"""The pictures of the docs are those that the code draws."""

import pytest

from domain.jobs.states import JobStatus
from tools.pictures import job_life
from tools.pictures.__main__ import DIRECTORY, pictures


@pytest.mark.parametrize(("name", "content"), pictures().items(), ids=pictures())
def test_a_picture_is_as_the_code_draws_it(name: str, content: str) -> None:
    committed = (DIRECTORY / name).read_text(encoding="utf-8")
    assert committed == content, "Draw it again with `make pictures`."


def test_a_state_without_a_place_cannot_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(job_life.PLACES, JobStatus.PAUSED)
    with pytest.raises(KeyError):
        job_life.draw()
