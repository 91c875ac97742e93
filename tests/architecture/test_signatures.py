"""No function of the losses takes more than eight parameters: what belongs together travels as one value."""

import ast
from pathlib import Path

LOSSES = Path(__file__).parents[2] / "pocl" / "losses"
MAX_PARAMETERS = 8


def crowded_functions(source: str) -> list[str]:
    """Functions with more than `MAX_PARAMETERS` parameters, keyword-only ones included, `self` and `cls` not."""
    crowded = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = node.args
            parameters = [
                *given.posonlyargs,
                *given.args,
                *given.kwonlyargs,
                *filter(None, (given.vararg, given.kwarg)),
            ]
            count = len([each for each in parameters if each.arg not in ("self", "cls")])
            if count > MAX_PARAMETERS:
                crowded.append(f"{node.name} ({count})")
    return crowded


def test_no_function_of_the_losses_takes_more_than_eight_parameters() -> None:
    modules = sorted(LOSSES.glob("*.py"))
    assert len(modules) > 5
    assert {module.name: crowded_functions(module.read_text()) for module in modules} == {
        module.name: [] for module in modules
    }


def test_a_function_of_nine_parameters_is_refused() -> None:
    eight = "def objective(a, b, /, c, d, *, e, f, g, h): ..."
    assert crowded_functions(eight) == []
    assert crowded_functions(eight.replace("h)", "h, i)")) == ["objective (9)"]
    assert crowded_functions(eight.replace("h)", "h, **options)")) == ["objective (9)"]
    assert crowded_functions(f"class Loss:\n    {eight.replace('(a', '(self, a')}") == []
