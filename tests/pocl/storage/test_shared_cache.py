"""What runs share stays within its bound, and what someone needs is spared."""

import fcntl
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pocl.storage.shared_cache import ABANDONED_SECONDS, PINNED_SECONDS, SharedCache

SIZE = 1000
ROOM = 3 * SIZE + 1000
"""For three entries with their manifests, and not for four."""


@pytest.fixture
def cache(tmp_path: Path) -> SharedCache:
    return SharedCache(tmp_path, ROOM)


def add(cache: SharedCache, key: str, *, age: float = 0) -> None:
    with cache.add("things", key) as scratch:
        (scratch / "content").write_bytes(bytes(SIZE))
    make_older(cache.root / "things" / key, age)


def make_older(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def keys(cache: SharedCache) -> set[str]:
    return {path.name for path in (cache.root / "things").iterdir()}


def test_added_entry_is_found_and_no_other(cache: SharedCache) -> None:
    add(cache, "a")
    entry = cache.find("things", "a")
    assert entry is not None
    assert (entry / "content").read_bytes() == bytes(SIZE)
    assert cache.find("things", "b") is None
    assert cache.find("others", "a") is None


def test_damaged_entry_is_a_miss_and_is_removed(cache: SharedCache) -> None:
    add(cache, "a")
    (cache.root / "things" / "a" / "content").write_bytes(b"\1" * SIZE)
    assert cache.find("things", "a") is None
    assert keys(cache) == set()


def test_least_recently_used_entry_is_evicted_first(cache: SharedCache) -> None:
    for index, key in enumerate("abc"):
        add(cache, key, age=100 - index)
    assert cache.find("things", "a") is not None
    add(cache, "d")
    assert keys(cache) == {"a", "c", "d"}


def test_held_entry_is_not_evicted(cache: SharedCache) -> None:
    for index, key in enumerate("abc"):
        add(cache, key, age=100 - index)
    with cache.hold("things", "a"):
        make_older(cache.root / "things" / "a", 1000)
        add(cache, "d")
    assert keys(cache) == {"a", "c", "d"}


def test_pinned_entry_is_not_evicted_until_it_is_unpinned(cache: SharedCache) -> None:
    pinning = SharedCache(cache.root, ROOM, pinning_job="job_1")
    for index, key in enumerate("abc"):
        add(cache, key, age=100 - index)
    with pinning.hold("things", "a"):
        pass
    make_older(cache.root / "things" / "a", 1000)
    add(cache, "d", age=50)
    assert keys(cache) == {"a", "c", "d"}
    pinning.unpin()
    pinning.unpin()
    add(cache, "e")
    assert keys(cache) == {"c", "d", "e"}


def test_expired_pin_does_not_protect_an_entry(cache: SharedCache) -> None:
    with SharedCache(cache.root, ROOM, pinning_job="job_1").hold("things", "a"):
        pass
    make_older(cache.root / "pins" / "job_1.json", PINNED_SECONDS + 1)
    make_older(cache.root / "things" / "a", 1000)
    for key in "bcd":
        add(cache, key)
    cache.make_room(SIZE, besides="things/e")
    assert "a" not in keys(cache)


@pytest.mark.parametrize("content", ["", "[1, 2", "{}", "[1, null]"])
def test_unreadable_pin_protects_nothing(cache: SharedCache, content: str) -> None:
    (cache.root / "pins").mkdir()
    (cache.root / "pins" / "job_1.json").write_text(content)
    add(cache, "a")
    assert not cache.make_room(ROOM + 1, besides="things/b")
    assert keys(cache) == set()


def test_more_than_the_bound_does_not_fit(cache: SharedCache) -> None:
    add(cache, "a")
    assert cache.make_room(ROOM, besides="things/b")
    assert not cache.make_room(ROOM + 1, besides="things/b")


def test_entry_evicted_while_its_lock_is_awaited_is_made_anew(cache: SharedCache) -> None:
    entry = cache.root / "things" / "a"
    entry.mkdir(parents=True)
    evictor = os.open(entry, os.O_RDONLY)
    fcntl.flock(evictor, fcntl.LOCK_EX)

    def hold() -> bool:
        with cache.hold("things", "a") as path:
            return path.is_dir()

    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(hold)
        entry.rename(entry.with_name(".tmp-gone"))
        os.close(evictor)
        assert holding.result(30)


def test_scratch_of_a_killed_process_is_swept_once_it_is_old(cache: SharedCache) -> None:
    old, young = (cache.root / "things" / f".tmp-{name}-1" for name in ("old", "young"))
    for scratch in (old, young):
        scratch.mkdir(parents=True)
    make_older(old, ABANDONED_SECONDS + 1)
    cache.sweep()
    assert [path.name for path in (cache.root / "things").iterdir()] == [young.name]
