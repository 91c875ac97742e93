"""The distillation methods over HTTP."""

from typing import Literal

from fastapi import APIRouter
from pydantic import JsonValue

from api.auth import Caller
from api.pagination import Resource
from api.problems import COMMON_PROBLEMS
from pocl.spec import METHODS, KDMethod, describe_method

router = APIRouter(prefix="/methods", tags=["methods"], responses=COMMON_PROBLEMS)


class MethodView(Resource):
    """A knowledge-distillation method."""

    name: KDMethod
    """The name of the method, which `spec.method` may be for the default parameters."""
    description: str
    """What the method minimises, and how large its gradient is beside that of cross-entropy, where that was measured: a
    KD weight means another mixture with each method."""
    parameters: dict[str, JsonValue]
    """The JSON Schema of the object that `spec.method` may be; every parameter has a default."""


class MethodList(Resource):
    """All methods."""

    object: Literal["list"] = "list"
    """The kind of the resource."""
    data: list[MethodView]
    """The methods."""


_ALL = MethodList(
    data=[
        MethodView(name=name, description=describe_method(method), parameters=method.model_json_schema())
        for name, method in METHODS.items()
    ]
)


@router.get("", summary="List the methods")
async def list_methods(_caller: Caller) -> MethodList:
    """Each method with the JSON Schema of its parameters, from which a form can be built."""
    return _ALL
