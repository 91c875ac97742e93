"""What `method` of a specification may be."""

import inspect
from typing import Literal

from fastapi import APIRouter
from pydantic import JsonValue

from api.auth import Caller
from api.pagination import Resource
from api.problems import COMMON_PROBLEMS
from pocl.spec import METHODS, KDMethod

router = APIRouter(prefix="/methods", tags=["methods"], responses=COMMON_PROBLEMS)


class MethodView(Resource):
    """A knowledge-distillation method."""

    name: KDMethod
    description: str
    parameters: dict[str, JsonValue]
    """JSON Schema of the object that `spec.method` may be; every parameter has a default."""


class MethodList(Resource):
    """All methods."""

    object: Literal["list"] = "list"
    data: list[MethodView]


_ALL = MethodList(
    data=[
        MethodView(name=name, description=inspect.cleandoc(method.__doc__ or ""), parameters=method.model_json_schema())
        for name, method in METHODS.items()
    ]
)


@router.get("", summary="List the methods")
async def list_methods(_caller: Caller) -> MethodList:
    """Each method with the JSON Schema of its parameters: what a form can be built from."""
    return _ALL
