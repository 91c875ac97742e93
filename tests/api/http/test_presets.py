"""The list of presets: what a specification resolves to where its fields are left out."""

from starlette.testclient import TestClient

from pocl.spec import METHODS, PRESETS, resolve


def test_a_preset_shows_what_a_specification_resolves_to(bare: TestClient) -> None:
    presets = bare.get("/v1/presets").json()["data"]
    assert [preset["name"] for preset in presets] == list(PRESETS)
    for preset in presets:
        for method in METHODS:
            posted = {
                "preset": preset["name"],
                "method": method,
                "teacher": {"path": "t"},
                "student": {"path": "s"},
                "data": {"train": {"path": "d"}},
            }
            resolved = resolve(posted).model_dump(mode="json")
            for name in ("teacher", "student"):
                del resolved[name]
            del resolved["data"]["train"]
            assert {**preset["spec"], "method": preset["methods"][method]} == resolved
