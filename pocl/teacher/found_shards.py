"""The shards of the cache that have states of a run's samples."""

from collections.abc import Mapping

from torch import Tensor

from pocl.data.batches import EncodedSample
from pocl.events import Sink, Warned
from pocl.storage.shared_cache import CacheHolder, SharedCache
from pocl.teacher.shards import ShardRows


class FoundShards:
    """Whole shards of one kind that are held for the samples of a run."""

    def __init__(
        self,
        shared_cache: SharedCache,
        holder: CacheHolder,
        kind: str,
        samples: Mapping[str, EncodedSample],
        sink: Sink,
    ) -> None:
        """`samples` are those that the teacher is needed for, by content digest."""
        self.kind = kind
        self.samples = samples
        self._shared_cache = shared_cache
        self._holder = holder
        self._sink = sink
        self._seen: set[str] = set()
        self._shards: dict[str, ShardRows] = {}
        self._shard_of: dict[str, str] = {}

    def missing(self) -> list[EncodedSample]:
        """The samples that no shard has, in the order of the run."""
        return [sample for content, sample in self.samples.items() if content not in self._shard_of]

    def found(self) -> list[EncodedSample]:
        """The samples that a shard has, in the order of the run."""
        return [sample for content, sample in self.samples.items() if content in self._shard_of]

    def heads(self) -> set[str]:
        """The digests of the heads that the shards were computed for."""
        return {shard.head for shard in self._shards.values()}

    def have_head(self, digest: str) -> bool:
        """Whether all shards were computed for this head."""
        return self.heads() <= {digest}

    def scan(self) -> None:
        """Look at shards that are new since the last look, and hold those with a missing sample."""
        candidates: dict[str, ShardRows | None] = {}
        promised = set(self._shard_of)
        for key in self._shared_cache.keys(self.kind):
            if key in self._seen:
                continue
            self._seen.add(key)
            shard = ShardRows.read(self._shared_cache.path(self.kind, key))
            new = set() if shard is None else self.samples.keys() & shard.rows.keys() - promised
            promised |= new
            if shard is None or new:
                candidates[key] = shard
        if candidates:
            for key in sorted(self._holder.hold(self.kind, candidates)):
                self._take(key, candidates[key])

    def add(self, key: str, shard: ShardRows) -> None:
        """Take a shard that the holder has just added."""
        self._seen.add(key)
        self._shards[key] = shard
        self._shard_of |= dict.fromkeys(self.samples.keys() & shard.rows.keys(), key)

    def discard_all(self) -> None:
        """Remove all shards from the cache."""
        for key in self._shards:
            self._holder.discard(self.kind, key)
        self._seen -= self._shards.keys()
        self._shards.clear()
        self._shard_of.clear()

    def map_states(self) -> dict[str, Tensor]:
        """The hidden states by content digest of the sample, `[tokens, width]`: views into memory-mapped files."""
        return {
            content: states
            for key, shard in self._shards.items()
            for content, states in shard.map_states(self._shared_cache.path(self.kind, key))
            if self._shard_of.get(content) == key
        }

    def _take(self, key: str, shard: ShardRows | None) -> None:
        damage = self._holder.verify(self.kind, key)
        if damage is None and shard is not None:
            self.add(key, shard)
            return
        if damage is None:
            damage = "its rows cannot be read"
            self._holder.discard(self.kind, key)
        self._seen.discard(key)
        self._sink(Warned(code="teacher_cache_damaged", message=f"a part is computed again: {damage}"))
