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
def store(tmp_path: Path) -> SharedCache:
    return SharedCache(tmp_path, ROOM)


def add(store: SharedCache, key: str, *, age: float = 0) -> None:
    with store.add("things", key) as scratch:
        (scratch / "content").write_bytes(bytes(SIZE))
    made_older(store.root / "things" / key, age)


def made_older(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def keys(store: SharedCache) -> set[str]:
    return {path.name for path in (store.root / "things").iterdir()}


def test_what_was_added_is_found_and_nothing_else(store: SharedCache) -> None:
    add(store, "a")
    found = store.find("things", "a")
    assert found is not None
    assert (found / "content").read_bytes() == bytes(SIZE)
    assert store.find("things", "b") is None
    assert store.find("others", "a") is None


def test_what_is_damaged_is_not_found_and_leaves(store: SharedCache) -> None:
    add(store, "a")
    (store.root / "things" / "a" / "content").write_bytes(b"\1" * SIZE)
    assert store.find("things", "a") is None
    assert keys(store) == set()


def test_what_was_used_longest_ago_goes_first(store: SharedCache) -> None:
    for place, key in enumerate("abc"):
        add(store, key, age=100 - place)
    assert store.find("things", "a") is not None
    add(store, "d")
    assert keys(store) == {"a", "c", "d"}


def test_what_is_held_is_spared(store: SharedCache) -> None:
    for place, key in enumerate("abc"):
        add(store, key, age=100 - place)
    with store.hold("things", "a"):
        made_older(store.root / "things" / "a", 1000)
        add(store, "d")
    assert keys(store) == {"a", "c", "d"}


def test_what_a_job_pinned_is_spared_until_it_is_unpinned(store: SharedCache) -> None:
    pinning = SharedCache(store.root, ROOM, pinning_job="job_1")
    for place, key in enumerate("abc"):
        add(store, key, age=100 - place)
    with pinning.hold("things", "a"):
        pass
    made_older(store.root / "things" / "a", 1000)
    add(store, "d", age=50)
    assert keys(store) == {"a", "c", "d"}
    pinning.unpin()
    pinning.unpin()
    add(store, "e")
    assert keys(store) == {"c", "d", "e"}


def test_a_pin_that_was_forgotten_counts_no_more(store: SharedCache) -> None:
    with SharedCache(store.root, ROOM, pinning_job="job_1").hold("things", "a"):
        pass
    made_older(store.root / "pins" / "job_1.json", PINNED_SECONDS + 1)
    made_older(store.root / "things" / "a", 1000)
    for key in "bcd":
        add(store, key)
    store.make_room(SIZE, besides="things/e")
    assert "a" not in keys(store)


@pytest.mark.parametrize("content", ["", "[1, 2", "{}", "[1, null]"])
def test_a_pin_that_cannot_be_read_pins_nothing(store: SharedCache, content: str) -> None:
    (store.root / "pins").mkdir()
    (store.root / "pins" / "job_1.json").write_text(content)
    add(store, "a")
    assert not store.make_room(ROOM + 1, besides="things/b")
    assert keys(store) == set()


def test_there_is_no_room_for_more_than_the_bound(store: SharedCache) -> None:
    add(store, "a")
    assert store.make_room(ROOM, besides="things/b")
    assert not store.make_room(ROOM + 1, besides="things/b")


def test_an_entry_that_is_evicted_while_one_waits_for_it_is_made_anew(store: SharedCache) -> None:
    entry = store.root / "things" / "a"
    entry.mkdir(parents=True)
    evictor = os.open(entry, os.O_RDONLY)
    fcntl.flock(evictor, fcntl.LOCK_EX)

    def hold() -> bool:
        with store.hold("things", "a") as path:
            return path.is_dir()

    with ThreadPoolExecutor(1) as pool:
        holding = pool.submit(hold)
        entry.rename(entry.with_name(".tmp-gone"))
        os.close(evictor)
        assert holding.result(30)


def test_what_a_killed_process_left_is_swept_once_it_is_old(store: SharedCache) -> None:
    old, young = (store.root / "things" / f".tmp-{name}-1" for name in ("old", "young"))
    for left in (old, young):
        left.mkdir(parents=True)
    made_older(old, ABANDONED_SECONDS + 1)
    store.sweep()
    assert [path.name for path in (store.root / "things").iterdir()] == [young.name]
