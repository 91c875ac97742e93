"""The tree of refusals."""

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from domain import errors
from domain.errors import ApiError


def tree(kind: type[ApiError]) -> list[type[ApiError]]:
    return [
        kind,
        *(each for below in kind.__subclasses__() if below.__module__ == errors.__name__ for each in tree(below)),
    ]


def test_every_refusal_has_a_code_of_its_own_and_a_sentence() -> None:
    kinds = tree(ApiError)
    assert max(Counter(kind.code for kind in kinds).values()) == 1
    for kind in kinds:
        assert re.fullmatch(r"[a-z_]+", kind.code)
        assert kind.__doc__ is not None
        assert "\n" not in kind.__doc__
        assert kind.__doc__.endswith(".")


def test_a_refusal_is_a_client_error_unless_the_service_is_at_fault() -> None:
    assert {kind.status // 100 for kind in tree(ApiError) if not kind.retryable} - {4} == {5}
    assert [kind.code for kind in tree(ApiError) if kind.status >= 500] == ["internal_error", "unavailable"]


def test_only_the_standard_library_is_imported() -> None:
    program = "import sys, domain.errors; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.check_output([sys.executable, "-S", "-c", program], text=True, cwd=Path(__file__).parents[2])
    assert set(loaded.split()) <= {*sys.stdlib_module_names, "domain", "pocl", "__main__"}
