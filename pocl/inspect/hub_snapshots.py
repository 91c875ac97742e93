"""Models of the Hub that are in its cache on this machine, whole and at the commit that is asked for."""

import re
from pathlib import Path
from typing import Final

from pocl.errors import ModelUnsupported
from pocl.inspect.weights import shards_of
from pocl.spec import HubModel

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


def cached_snapshot(ref: HubModel, cache: Path | None = None) -> Path | None:
    """The directory with the files of a model; None where they are not all here.

    A branch or a tag may mean another commit by the time a run asks the Hub, so only a revision that is a commit is
    looked for. Weights are fetched after all other files: where they are whole, so is the model.

    Args:
        cache: the cache of the Hub; None for that of this machine, as `HF_HUB_CACHE` or `HF_HOME` say.
    """
    if not _COMMIT.fullmatch(ref.revision):
        return None
    if cache is None:
        # Imported here, for most processes never need it.
        from huggingface_hub import constants

        cache = Path(constants.HF_HUB_CACHE)
    directory = cache / f"models--{ref.repo.replace('/', '--')}" / "snapshots" / ref.revision
    try:
        shards = list(shards_of(directory)) if directory.is_dir() else []
        return directory if shards and all(shard.is_file() for shard in shards) else None
    except (ModelUnsupported, OSError):
        return None
