"""The presets over HTTP."""

from typing import Final, Literal, get_args

from fastapi import APIRouter
from pydantic import JsonValue

from api.auth import Caller
from api.pagination import Resource
from api.problems import COMMON_PROBLEMS
from pocl.spec import KDMethod, PresetName, describe_preset

router = APIRouter(prefix="/presets", tags=["presets"], responses=COMMON_PROBLEMS)


class PresetView(Resource):
    """A preset: the defaults of the fields that a specification leaves out."""

    name: PresetName
    """The name of the preset, which `spec.preset` may be."""
    description: str
    """What the preset is for, in one sentence."""
    spec: dict[str, JsonValue]
    """The default of every field, with the method `forward_kl`. Models and data sets have none."""
    methods: dict[KDMethod, dict[str, JsonValue]]
    """The default parameters of each method."""


class PresetList(Resource):
    """All presets."""

    object: Literal["list"] = "list"
    """The kind of the resource."""
    data: list[PresetView]
    """The presets; a specification that names none has the first."""


_NAMES: Final[tuple[PresetName, ...]] = get_args(PresetName)
_ALL: Final = PresetList.model_validate(
    {"data": [{"name": name, **vars(describe_preset(name))} for name in _NAMES]},
)


@router.get("", summary="List the presets")
async def list_presets(_caller: Caller) -> PresetList:
    """Each preset with the defaults that it gives to a specification."""
    return _ALL
