"""Typed dependencies of routes on what the application holds for its lifetime: settings, database, artifact store.

The watcher and the caches of one feature have their dependencies beside their types.
"""

from typing import Annotated

from fastapi import Depends
from starlette.requests import HTTPConnection

from domain.artifacts import ArtifactStore
from domain.db import Database
from domain.encoding_checks import EncodingChecker
from domain.settings import Settings


def settings_of(connection: HTTPConnection) -> Settings:
    """The settings that the application was created with."""
    settings: Settings = connection.app.state.settings
    return settings


def database_of(connection: HTTPConnection) -> Database:
    """The database of the application."""
    database: Database = connection.app.state.database
    return database


# Coroutines, since FastAPI would run plain functions in a thread.
async def _get_settings(connection: HTTPConnection) -> Settings:
    return settings_of(connection)


async def _get_database(connection: HTTPConnection) -> Database:
    return database_of(connection)


async def _get_store(connection: HTTPConnection) -> ArtifactStore:
    store: ArtifactStore = connection.app.state.store
    return store


async def _get_encoding_checker(connection: HTTPConnection) -> EncodingChecker:
    checker: EncodingChecker = connection.app.state.encoding_checker
    return checker


SettingsDep = Annotated[Settings, Depends(_get_settings)]
DatabaseDep = Annotated[Database, Depends(_get_database)]
StoreDep = Annotated[ArtifactStore, Depends(_get_store)]
EncodingCheckerDep = Annotated[EncodingChecker, Depends(_get_encoding_checker)]
