"""What runs share stays within its bound, whoever dies, and what someone needs is spared."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pocl.errors import DiskFull
from pocl.storage.shared_cache import ABANDONED_SECONDS, PINNED_SECONDS, SharedCache

REPOSITORY = Path(__file__).resolve().parents[3]
SIZE = 1000
ROOM = 3 * SIZE + 2000
"""For three entries with their manifests, and not for four with what is reserved for a manifest."""


@pytest.fixture
def cache(tmp_path: Path) -> SharedCache:
    return SharedCache(tmp_path, ROOM)


def add(cache: SharedCache, key: str, *, age: float = 0) -> None:
    with cache.add("things", key, SIZE) as scratch:
        (scratch / "content").write_bytes(bytes(SIZE))
    make_older(cache.root / "things" / key, age)


def make_older(path: Path, seconds: float) -> None:
    then = path.stat().st_mtime - seconds
    os.utime(path, (then, then))


def keys(cache: SharedCache) -> set[str]:
    return {path.name for path in (cache.root / "things").iterdir()}


def test_added_entry_is_found_and_no_other(cache: SharedCache) -> None:
    add(cache, "a")
    with cache.find("things", "a") as entry:
        assert entry is not None
        assert (entry / "content").read_bytes() == bytes(SIZE)
    for kind, key in (("things", "b"), ("others", "a")):
        with cache.find(kind, key) as entry:
            assert entry is None


def test_damaged_entry_is_a_miss_and_is_removed(cache: SharedCache) -> None:
    add(cache, "a")
    (cache.root / "things" / "a" / "content").write_bytes(b"\1" * SIZE)
    with cache.find("things", "a") as entry:
        assert entry is None
    assert keys(cache) == set()


def test_least_recently_used_entry_is_evicted_first(cache: SharedCache) -> None:
    for index, key in enumerate("abc"):
        add(cache, key, age=100 - index)
    with cache.find("things", "a"):
        pass
    add(cache, "d")
    assert keys(cache) == {"a", "c", "d"}


def test_held_entry_is_not_evicted(cache: SharedCache) -> None:
    for index, key in enumerate("abc"):
        add(cache, key, age=100 - index)
    with cache.holder() as holder:
        assert holder.hold("things", ["a", "missing"]) == {"a"}
        make_older(cache.root / "things" / "a", 1000)
        add(cache, "d")
    assert keys(cache) == {"a", "c", "d"}


def test_pinned_entry_is_not_evicted_until_it_is_unpinned(cache: SharedCache) -> None:
    pinning = SharedCache(cache.root, ROOM, pinning_job="job_1")
    for index, key in enumerate("abc"):
        add(cache, key, age=100 - index)
    with pinning.find("things", "a"):
        pass
    make_older(cache.root / "things" / "a", 1000)
    add(cache, "d", age=50)
    assert keys(cache) == {"a", "c", "d"}
    pinning.unpin()
    pinning.unpin()
    add(cache, "e")
    assert keys(cache) == {"c", "d", "e"}


def test_expired_pin_does_not_protect_an_entry(cache: SharedCache) -> None:
    add(SharedCache(cache.root, ROOM, pinning_job="job_1"), "a", age=1000)
    make_older(cache.root / "pins" / "job_1.txt", PINNED_SECONDS + 1)
    for key in "bcd":
        add(cache, key)
    assert keys(cache) == {"b", "c", "d"}
    cache.sweep()
    assert cache.pinning_jobs() == set()


@pytest.mark.parametrize("content", [b"", b"things", b"\xff\xfe", b"[1, 2"])
def test_unreadable_pin_protects_nothing(cache: SharedCache, content: bytes) -> None:
    (cache.root / "pins").mkdir()
    (cache.root / "pins" / "job_1.txt").write_bytes(content)
    for key in "abcd":
        add(cache, key)
    assert "a" not in keys(cache)


def test_what_cannot_fit_evicts_nothing(cache: SharedCache) -> None:
    add(cache, "a")
    with cache.holder() as holder:
        assert not holder.reserve(ROOM + 1)
        assert keys(cache) == {"a"}
        assert holder.reserve(ROOM)
        assert keys(cache) == set()


def test_entry_that_does_not_fit_is_not_added(cache: SharedCache) -> None:
    with pytest.raises(DiskFull), cache.add("things", "a", ROOM):
        pytest.fail("there is no room")
    with pytest.raises(DiskFull), cache.add("things", "a", 0) as scratch:
        (scratch / "content").write_bytes(bytes(ROOM + 1))
    assert not (cache.root / "things").exists() or keys(cache) == set()


def test_reserved_bytes_are_room_for_nobody_else_until_they_are_released(cache: SharedCache) -> None:
    with cache.holder() as one, cache.holder() as other:
        assert one.reserve(ROOM - SIZE)
        assert not other.reserve(SIZE + 1)
        one.release_reservation()
        assert other.reserve(SIZE + 1)
    with cache.holder() as third:
        assert third.reserve(ROOM)


def test_entry_uses_up_its_part_of_a_reservation(cache: SharedCache) -> None:
    with cache.holder() as one, cache.holder() as other:
        assert one.reserve(2 * SIZE)
        with one.add("things", "a") as scratch:
            (scratch / "content").write_bytes(bytes(SIZE))
        used = sum(path.stat().st_size for path in (cache.root / "things" / "a").iterdir())
        assert other.reserve(ROOM - max(used, 2 * SIZE))
        assert not other.reserve(1)


def test_entry_that_another_has_added_meanwhile_stays(cache: SharedCache) -> None:
    with cache.add("things", "a", SIZE) as scratch:
        (scratch / "content").write_bytes(b"late")
        add(cache, "a")
    assert (cache.root / "things" / "a" / "content").read_bytes() == bytes(SIZE)


def test_work_is_claimed_by_one_holder_until_it_drops_it(cache: SharedCache) -> None:
    with cache.holder() as one, cache.holder() as other:
        assert one.claim(["a", "b"]) == {"a", "b"}
        assert other.claim(["b", "c"]) == {"c"}
        assert one.claim(["a", "c"]) == {"a"}
        one.drop_claims()
        assert other.claim(["a", "b"]) == {"a", "b"}


def test_an_abandoned_block_leaves_nothing(cache: SharedCache) -> None:
    with pytest.raises(FileNotFoundError), cache.add("things", "a", SIZE) as scratch:
        (scratch / "content").write_bytes((scratch / "missing").read_bytes())
    assert not [path for path in cache.root.rglob("*") if path.is_file() and path.name != "lock"]


@contextmanager
def other_process(cache: SharedCache, work: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has done `work` with `cache` and a `holder`, and waits to be killed."""
    program = f"""
import signal, sys
from pathlib import Path
from pocl.storage.shared_cache import SharedCache
cache = SharedCache(Path(sys.argv[1]), {cache.max_bytes})
with cache.holder() as holder:
    {work}
    print("done", flush=True)
    signal.pause()
"""
    command = [sys.executable, "-c", program, str(cache.root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "done\n"
            yield process
        finally:
            process.kill()


@pytest.mark.system
def test_what_a_killed_process_held_reserved_claimed_and_was_writing_is_free(cache: SharedCache) -> None:
    add(cache, "a", age=1000)
    work = (
        "holder.hold('things', ['a']); holder.reserve(1000); holder.claim(['work']); "
        "writing = holder.add('things', 'b'); (writing.__enter__() / 'content').write_bytes(bytes(1000))"
    )
    with other_process(cache, work) as process, cache.holder() as holder:
        assert not holder.reserve(ROOM)
        assert holder.claim(["work"]) == set()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert holder.reserve(ROOM)
        assert holder.claim(["work"]) == {"work"}
    assert not [path for path in cache.root.rglob("*") if path.is_file() and path.name != "lock"]


FILLER = """
import os, random, sys
from contextlib import suppress
from pathlib import Path
from pocl.errors import DiskFull
from pocl.storage.shared_cache import SharedCache
root, bound, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
draw, cache = random.Random(seed), SharedCache(root, bound)
for _ in range(60):
    key, size = str(draw.randrange(12)), draw.randrange(1, 3000)
    with suppress(DiskFull), cache.add("things", f"{key}-{size}", size) as scratch:
        (scratch / "content").write_bytes(bytes(size))
    for key in cache.keys("things"):
        with cache.find("things", key) as entry:
            assert entry is None or len((entry / "content").read_bytes()) == int(key.partition("-")[2])
    # Scratch of the moment counts too: it is written within a reservation.
    with cache.locked():
        total = 0
        for folder, _, names in os.walk(root):
            for name in {"content", "manifest.json"} & set(names):
                with suppress(FileNotFoundError):
                    total += os.stat(os.path.join(folder, name)).st_size
        assert total <= bound
"""


@pytest.mark.system
def test_processes_that_add_evict_and_read_at_once_never_pass_the_bound(tmp_path: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", FILLER, str(tmp_path), "10000", str(seed)], cwd=REPOSITORY)
        for seed in range(3)
    ]
    assert [process.wait(120) for process in processes] == [0, 0, 0]


def test_scratch_of_a_killed_process_is_swept_once_it_is_old(cache: SharedCache) -> None:
    old, young = (cache.root / "things" / f".tmp-{name}-1" for name in ("old", "young"))
    for scratch in (old, young):
        scratch.mkdir(parents=True)
    make_older(old, ABANDONED_SECONDS + 1)
    cache.sweep()
    assert [path.name for path in (cache.root / "things").iterdir()] == [young.name]


def test_empty_kind_is_swept_and_others_stay(cache: SharedCache) -> None:
    add(cache, "a")
    (cache.root / "empty").mkdir()
    cache.sweep()
    assert not (cache.root / "empty").exists()
    assert keys(cache) == {"a"}


def test_entries_that_nobody_has_used_for_long_are_removed_but_for_held_and_pinned_ones(cache: SharedCache) -> None:
    roomy = SharedCache(cache.root, 9 * ROOM)
    for key, age in (("old", 100), ("new", 10), ("held", 0), ("pinned", 0)):
        add(roomy, key, age=age)
    with SharedCache(cache.root, 9 * ROOM, "job_a").find("things", "pinned"), roomy.holder() as holder:
        holder.hold("things", ["held"])
        for key in ("held", "pinned"):
            make_older(cache.root / "things" / key, 100)
        assert [roomy.remove_unused(50) for _ in range(2)] == [1, 0]
    assert keys(roomy) == {"new", "held", "pinned"}
    assert roomy.remove_unused(50) == 1
    assert keys(roomy) == {"new", "pinned"}
