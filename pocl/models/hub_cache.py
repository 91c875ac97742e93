"""A bound for the cache of the Hugging Face Hub, which the engines of a machine share.

The least recently used revisions are evicted, but for those of repositories that a live process uses. The files are the
Hub's own (`scan_cache_dir`); beside them

    CACHE/.pocl/lock              is locked while room is made
    CACHE/.pocl/models--A--B      is locked, shared, by each process that uses the repository, and was modified when one
                                  last began to
"""

import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from huggingface_hub import CachedRepoInfo, scan_cache_dir
from huggingface_hub.errors import CacheNotFound

_STATE_DIR: Final = ".pocl"
_LOCK: Final = "lock"
_INCOMPLETE: Final = "*.incomplete"

_held: dict[Path, int] = {}
"""Open files of the repositories that this process uses, by the file that is locked: they stay so until it ends."""


@dataclass(frozen=True)
class HubCache:
    """A cache of the Hub that holds at most `max_bytes`, or what live processes use of it where that is more."""

    root: Path
    max_bytes: int

    def hold(self, repo: str, repo_type: str) -> None:
        """Use a repository: until this process ends none of its revisions is evicted."""
        path = self._use_file(f"{repo_type}s--{repo.replace('/', '--')}")
        if path not in _held:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            # Waits while another process evicts revisions of it; they are then fetched again.
            fcntl.flock(handle, fcntl.LOCK_SH)
            _held[path] = handle
        os.utime(path)

    def make_room(self, needed: int) -> bool:
        """Evict revisions until `needed` bytes more fit within the bound; whether they do."""
        state = self.root / _STATE_DIR
        state.mkdir(parents=True, exist_ok=True)
        lock = os.open(state / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            excess = self._size() + needed - self.max_bytes
            for repo in self._repos() if excess > 0 else ():
                if excess <= 0:
                    break
                excess -= self._evict(repo, excess)
            return excess <= 0
        finally:
            os.close(lock)

    def _repos(self) -> list[CachedRepoInfo]:
        """The repositories, the least recently used first."""
        try:
            repos = scan_cache_dir(self.root).repos
        except CacheNotFound:
            return []
        return sorted(repos, key=self._last_used)

    def _last_used(self, repo: CachedRepoInfo) -> float:
        # The time of the last access is not kept by every file system.
        with suppress(FileNotFoundError):
            return self._use_file(repo.repo_path.name).stat().st_mtime
        return repo.last_modified

    def _evict(self, repo: CachedRepoInfo, excess: int) -> int:
        """Remove revisions of a repository that no process uses, the oldest first; the bytes that were freed."""
        use_file = self._use_file(repo.repo_path.name)
        handle = os.open(use_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        freed = 0
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for unfinished in (repo.repo_path / "blobs").glob(_INCOMPLETE):
                freed += unfinished.stat().st_size
                unfinished.unlink()
            for revision in sorted(repo.revisions, key=lambda each: each.last_modified):
                if freed >= excess:
                    break
                # Scanned anew: files that a revision shares with one that is gone are now its own.
                strategy = scan_cache_dir(self.root).delete_revisions(revision.commit_hash)
                freed += strategy.expected_freed_size
                strategy.execute()
        except BlockingIOError:
            # A live process uses it.
            return 0
        finally:
            os.close(handle)
        return freed

    def _size(self) -> int:
        """The bytes of all files, each counted once: snapshots are links to blobs."""
        total = 0
        for directory, _, names in os.walk(self.root):
            for name in names:
                with suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(directory, name)).st_size
        return total

    def _use_file(self, folder: str) -> Path:
        return self.root / _STATE_DIR / folder
