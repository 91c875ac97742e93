"""Keys as clients send and see them."""

from datetime import datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, StrictInt, StringConstraints

from api.pagination import Page, Resource
from domain.keys.models import Scope
from domain.projects.models import PROJECT_ID

_MAX_GRACE_SECONDS = 30 * 24 * 3600

KeyName = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f\x7f]{1,200}$")]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True, frozen=True)


class KeyCreate(_Body):
    """A key to make."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"name": "nightly distillation", "scopes": ["submit"], "expires_at": "2100-01-01T00:00:00Z"}]
        }
    )

    name: KeyName
    """What the key is for, in printable characters."""
    scopes: list[Scope] = Field(min_length=1, max_length=3)
    """What the key may do: `read` what there is, `submit`, which also changes what the project has, `admin`, which also
    administers its keys. Each includes those before it."""
    project: Annotated[str, StringConstraints(pattern=rf"^{PROJECT_ID}$")] | None = None
    """Whose key it is; null: the project of the sender. An admin key of the project `default` may name any."""
    expires_at: AwareDatetime | None = None
    """From when on the key is not accepted; null: never."""


class KeyUpdate(_Body):
    """What is to change of a key."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"name": "nightly distillation"}]})

    name: KeyName
    """What the key is for, in printable characters."""


class KeyRotation(_Body):
    """How a key is to be rotated."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"grace_seconds": 86400}]})

    grace_seconds: StrictInt = Field(3600, ge=0, le=_MAX_GRACE_SECONDS)
    """For how long the present secret is accepted beside the new one, in seconds. A secret from before the last
    rotation is accepted no more."""


class KeyView(Resource):
    """An API key, without its secret."""

    id: str
    """The id of the key, which is a part of its text: `pocl_<id>_<secret>` without `key_`."""
    object: Literal["key"] = "key"
    """The kind of the resource."""
    name: str
    """What the key is for, in the words of its maker."""
    project: str
    """The project whose key it is."""
    scopes: list[Scope]
    """What the key may do; each scope includes those before it: `read`, `submit`, `admin`."""
    expires_at: datetime | None
    """From when on the key is not accepted; null: never."""
    previous_expires_at: datetime | None
    """Until when the secret from before the last rotation is accepted; null before the first rotation."""
    revoked_at: datetime | None
    """When the key was revoked; null unless it was. It stays listed for thirty days."""
    last_used_at: datetime | None
    """When the key was last used, to the minute; null before the first use."""
    created_at: datetime
    """When the key was made."""


class KeyWithSecret(KeyView):
    """An API key with its text, which is shown this once."""

    key: str
    """The text to send as `Authorization: Bearer`. The service keeps its digest alone."""


class KeyPage(Page[KeyView, str]):
    """Keys, newest first."""
