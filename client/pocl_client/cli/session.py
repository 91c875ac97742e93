"""The client of a command."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pocl_client import Client


def connect() -> "Client":
    """A client of the service that options and environment name.

    Raises:
        CredentialsInvalid: an address or a key that was found cannot be used.
    """
    from pocl_client import Client

    return Client()
