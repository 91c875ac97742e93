"""Typed dependencies of routes on what the application holds for its lifetime: settings, database, artifact store.

The watcher and the caches of one feature have their dependencies beside their types.
"""

from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import Depends, Request
from starlette.requests import HTTPConnection

from api.client_shares import ClientShares, client_of
from domain.artifacts import ArtifactStore
from domain.db import Database
from domain.encoding_checks import EncodingChecker
from domain.jobs.group_commit import GroupCommit
from domain.settings import Settings


def settings_of(connection: HTTPConnection) -> Settings:
    """The settings that the application was created with."""
    settings: Settings = connection.app.state.settings
    return settings


def database_of(connection: HTTPConnection) -> Database:
    """The database of the application."""
    database: Database = connection.app.state.database
    return database


def transfers_of(connection: HTTPConnection) -> ClientShares:
    """The slots of the application for uploads and downloads."""
    transfers: ClientShares = connection.app.state.transfers
    return transfers


# Coroutines, since FastAPI would run plain functions in a thread.
async def _get_settings(connection: HTTPConnection) -> Settings:
    return settings_of(connection)


async def _get_database(connection: HTTPConnection) -> Database:
    return database_of(connection)


async def _get_store(connection: HTTPConnection) -> ArtifactStore:
    store: ArtifactStore = connection.app.state.store
    return store


async def _get_group_commit(connection: HTTPConnection) -> GroupCommit:
    group_commit: GroupCommit = connection.app.state.group_commit
    return group_commit


async def _get_encoding_checker(connection: HTTPConnection) -> EncodingChecker:
    checker: EncodingChecker = connection.app.state.encoding_checker
    return checker


async def _take_transfer_slot(request: Request) -> AsyncIterator[None]:
    with transfers_of(request).hold(client_of(request.scope)):
        yield


SettingsDep = Annotated[Settings, Depends(_get_settings)]
DatabaseDep = Annotated[Database, Depends(_get_database)]
StoreDep = Annotated[ArtifactStore, Depends(_get_store)]
GroupCommitDep = Annotated[GroupCommit, Depends(_get_group_commit)]
EncodingCheckerDep = Annotated[EncodingChecker, Depends(_get_encoding_checker)]
TransferSlot = Annotated[None, Depends(_take_transfer_slot, scope="function")]
"""For a route that receives a file: one upload on the share of its client."""
