"""Specifications as their rows have them."""

from typing import Any, Final

from pocl.spec import DistillationSpec

ADDED_IN_THIS_GENERATION: Final = (("export", "gguf"), ("export", "hub"))
"""The fields of parts of a specification that workers of the generation before do not know.

The list is emptied where `GENERATION` of :mod:`domain.generations` is counted up.
"""


def stored_spec(spec: DistillationSpec) -> dict[str, Any]:
    """A specification as its row has it.

    A field that came within this generation is left out where it has its default: workers of the version before refuse
    what they do not know, and may claim the job. To read such a row gives the same specification.
    """
    stored = spec.model_dump(mode="json")
    for part_name, name in ADDED_IN_THIS_GENERATION:
        part = getattr(spec, part_name)
        if getattr(part, name) == type(part).model_fields[name].get_default(call_default_factory=True):
            del stored[part_name][name]
    return stored
