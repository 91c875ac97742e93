"""A specification as JSON: what is posted is laid over a preset, what is stored is shown as it is."""

from typing import Annotated, Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, JsonValue
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from pocl.spec import DistillationSpec


class _AsSpecification:
    """JSON that the OpenAPI document shows as a specification.

    A posted one is laid over its preset before it is validated, so fields may be missing and `method` may be a
    name; a stored one is shown as it is, also where a later version of the service has other fields.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler(source)

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(DistillationSpec.__pydantic_core_schema__)


Specification = Annotated[dict[str, JsonValue], _AsSpecification]
