"""Settings from environment variables, as people, Compose and Kubernetes write them; a sentence for each wrong one."""

import difflib
import json
import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from domain.secret_files import SecretFileInvalid, file_variable, read_secret_file
from domain.service_links import is_service_link

PREFIX: Final = "POCL_"
_SECONDS_OF_A_YEAR: Final = 366 * 24 * 3600
_QUOTES: Final = "'\""
_NO_SETTINGS: Final = frozenset(
    {"POCL_REDIS_SERVER", "POCL_VERSION", "POCL_ARTEFACT_ROOT", "POCL_URL", "POCL_CONFIG_DIR"}
)
"""Variables that others read: the embedded broker, Compose, the check that refuses a former name, and the client."""
_PORTABLE_COMPUTING_LANGUAGE: Final = re.compile(
    "POCL_(AFFINITY|BINARY|BUILDING|CACHE_DIR|CPU|CUDA|DEBUG|DEVICES?|DRIVER|EXTRA|IGNORE|KERNEL|LEAVE|LEVEL0|LLVM"
    "|MAX_(COMPUTE|PTHREAD|WORK)|MEMORY|OFFLINE|PATH|PRINT|REMOTE|SIGFPE|SIGUSR2|STARTUP|TBB|TRACING|USE|VECTORIZER"
    "|VULKAN|WORK_GROUP)"
)
"""Variables of PoCL, the Portable Computing Language, an implementation of OpenCL that has the same prefix."""

_ADDRESS: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""How an address begins once it was taken for a path, which leaves out one of two slashes."""

Settings = TypeVar("Settings", bound="EnvironmentSettings")


class SettingsInvalid(Exception):
    """Settings are wrong: one line for each, which begins with the name of its variable and repeats no value."""


def _make_absolute(path: Path) -> Path:
    if _ADDRESS.match(str(path)):
        # It would be a directory called `s3:`.
        raise ValueError("is an address, where a path is expected")
    try:
        absolute = path.expanduser().absolute()
        str(absolute).encode()
    except RuntimeError:
        raise ValueError("names a user (~) whose home directory is not known") from None
    except UnicodeEncodeError:
        # Neither a log nor an address of a database could name it.
        raise ValueError("is a path with bytes that are not UTF-8") from None
    return absolute


AbsolutePath = Annotated[Path, AfterValidator(_make_absolute)]
"""A path with `~` expanded, and made absolute when it is read: it does not follow a later change of directory."""
Seconds = Annotated[float, Field(gt=0, le=_SECONDS_OF_A_YEAR, allow_inf_nan=False)]
"""A time, in seconds, of at most a year."""


def make_absolute(path: str | Path) -> Path:
    """The path with `~` expanded, absolute.

    Raises:
        ValueError: it begins with the name of an unknown user, or is an address.
    """
    return _make_absolute(Path(path))


def split_list(value: Any) -> Any:
    """A list as JSON or between commas; anything but a text stays as it is."""
    if not isinstance(value, str):
        return value
    if value.startswith("["):
        return _load_json(value)
    return [part.strip() for part in value.split(",") if part.strip()]


def split_command(value: Any) -> Any:
    """A command as a JSON list or as a shell would split it; anything but a text stays as it is."""
    if not isinstance(value, str):
        return value
    return _load_json(value) if value.startswith("[") else shlex.split(value)


def _load_json(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError("is no well-formed JSON list") from None


class _CleanedEnvironment(EnvSettingsSource):
    """The environment, without what files, shells and Kubernetes add to values, and with the files of secrets read."""

    def __call__(self) -> dict[str, Any]:
        given = {
            name: self._clean(name, value)
            for name, value in super().__call__().items()
            if not is_service_link(variable_of(self.settings_cls, name), str(value))
        }
        return given | self._read_files(given)

    def _read_files(self, given: Mapping[str, Any]) -> dict[str, str]:
        read = {}
        for name in self.settings_cls.model_fields:
            variable = variable_of(self.settings_cls, name)
            file_name = file_variable(variable)
            path = self.env_vars.get(file_name.lower()) if file_name else None
            if not path:
                continue
            if name in given:
                raise SettingsInvalid(f"{variable}: is given twice, itself and by {file_name}; give one of them.")
            try:
                read[name] = self._clean(name, read_secret_file(_unquote(path.strip())))
            except SecretFileInvalid as error:
                raise SettingsInvalid(f"{file_name}: {error}.") from None
        return read

    def _clean(self, name: str, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        cleaned = _unquote(value.strip())
        if not cleaned:
            raise SettingsInvalid(f"{variable_of(self.settings_cls, name)}: is blank; give it a value, or unset it.")
        return cleaned


def _unquote(value: str) -> str:
    # Docker takes the quotes of an `--env-file` for a part of the value.
    quote = value[:1]
    is_quoted = len(value) >= 2 and quote in _QUOTES and value[-1] == quote and quote not in value[1:-1]
    return value[1:-1].strip() if is_quoted else value


class EnvironmentSettings(BaseSettings):
    """The base of settings: variables are stripped of white space and quotes; lists are read by validators alone."""

    model_config = SettingsConfigDict(
        env_ignore_empty=True,
        enable_decoding=False,
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        hide_input_in_errors=True,
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - pydantic passes these by their names
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - as above
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - as above
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, _CleanedEnvironment(settings_cls)


def variable_of(kind: type[BaseSettings], field: str) -> str:
    """The name of the variable of a field."""
    return f"{kind.model_config.get('env_prefix', '')}{field}".upper()


def read_settings(kind: type[Settings], **values: Any) -> Settings:
    """Settings out of the environment.

    Args:
        values: those that come from the command line, which count more.

    Raises:
        SettingsInvalid: one or more are wrong.
    """
    try:
        return kind(**values)
    except ValidationError as error:
        raise SettingsInvalid("\n".join(_sentences(kind, error))) from None


def _sentences(kind: type[BaseSettings], error: ValidationError) -> list[str]:
    sentences = []
    # Values may be secret, so they are left out.
    for detail in error.errors(include_input=False, include_url=False, include_context=False):
        message = detail["msg"].removeprefix("Value error, ")
        variable = variable_of(kind, str(detail["loc"][0])) if detail["loc"] else ""
        sentences.append(message if variable in message else f"{variable}: {message}")
    return sentences


def refuse_unknown_variables(
    *kinds: type[BaseSettings], other_prefixes: tuple[str, ...] = (), environ: Mapping[str, str] = os.environ
) -> None:
    """Refuse variables that no setting reads: one that is misspelt would be ignored, and a default take its place.

    Args:
        kinds: all settings that this process, or one that it starts, reads.
        other_prefixes: how variables begin that are left to other processes.

    Raises:
        SettingsInvalid: with the nearest name of each.
    """
    settings = {variable_of(kind, field) for kind in kinds for field in kind.model_fields}
    known = settings | {file_variable(name) or name for name in settings} | _NO_SETTINGS
    wrong = []
    for name, value in sorted((name.upper(), value) for name, value in environ.items()):
        is_ours = name.startswith(PREFIX) and not is_service_link(name, value)
        if not (value and is_ours) or name in known or name.startswith(other_prefixes):
            continue
        if _PORTABLE_COMPUTING_LANGUAGE.match(name):
            continue
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
        hint = f"did you mean {nearest[0]}?" if nearest else "unset it."
        wrong.append(f"{name}: there is no such setting; {hint}")
    if wrong:
        raise SettingsInvalid("\n".join(wrong))
