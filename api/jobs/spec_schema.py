"""A specification as JSON: a posted one is laid over a preset, a stored one is shown unchanged."""

from typing import Annotated, Any

from pydantic import BeforeValidator, GetCoreSchemaHandler, GetJsonSchemaHandler, JsonValue
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from pocl.spec import DistillationSpec


class _SpecSchema:
    """Gives JSON the schema of a specification in the OpenAPI document.

    A posted specification is laid over its preset before it is validated, so fields may be missing and `method` may be
    a name; a stored one is shown unchanged, also where a later version of the service has other fields.
    """

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler(source)

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return handler(DistillationSpec.__pydantic_core_schema__)


def _to_json(spec: Any) -> Any:
    return spec.model_dump(mode="json") if isinstance(spec, DistillationSpec) else spec


PostedSpec = Annotated[dict[str, JsonValue], _SpecSchema]
"""A specification as a client posts it."""
ResolvedSpec = Annotated[dict[str, JsonValue], BeforeValidator(_to_json), _SpecSchema]
"""A specification with every default named, from a row or from a plan."""
