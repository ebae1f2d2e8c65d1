"""Files of an arena: written anew once nobody maps them, and not before."""

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from offload.digest import digest_of_bytes
from offload.sharding.arena import Arena
from offload.sharding.folder import Folder
from offload.sharding.mapping import map_private
from offload.sharding.shared_memory import _FileLease

pytestmark = pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory at /dev/shm")

NUM_BYTES = 70_001


@pytest.fixture
def arena() -> Iterator[Arena]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        yield Arena(Folder(Path(memory), "0" * 24))


def some_bytes(num_bytes: int = NUM_BYTES) -> tuple[Tensor, bytes]:
    flat = torch.randint(256, (num_bytes,), dtype=torch.uint8)
    return flat, digest_of_bytes(flat)


def inodes(arena: Arena) -> set[int]:
    return {path.stat().st_ino for path in arena._folder.iterdir() if path.name != "lock"}


def test_what_is_published_is_adopted_and_a_mapping_is_its_own(arena: Arena) -> None:
    flat, digest = some_bytes()
    assert arena.adopt(digest, NUM_BYTES) is None
    published = arena.publish(digest, flat)
    assert published is not None
    adopted = arena.adopt(digest, NUM_BYTES)
    assert adopted is not None
    for mapping in (*published[:2], *adopted):
        assert torch.equal(mapping, flat)
        mapping.fill_(3)
    again = arena.adopt(digest, NUM_BYTES)
    assert again is not None
    assert torch.equal(again[0], flat)
    assert arena.adopt(digest, NUM_BYTES - 1) is None


def test_no_file_stays_open(arena: Arena) -> None:
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    kept = [arena.publish(digest, flat) for flat, digest in (some_bytes() for _ in range(5))]
    assert None not in kept
    assert len(list(Path("/proc/self/fd").iterdir())) == num_open


def test_a_file_is_written_anew_once_nobody_maps_it(arena: Arena) -> None:
    first, digest = some_bytes()
    kept, spare, published = arena.publish(digest, first) or pytest.fail("not published")
    before = inodes(arena)
    del kept, published
    # Autograd still has what was handed out.
    second, other = some_bytes()
    held = arena.publish(other, second)
    assert len(inodes(arena)) == 2
    assert torch.equal(spare, first)
    del spare, held
    third, last = some_bytes()
    found = arena.publish(last, third)
    assert found is not None
    assert torch.equal(found[0], third)
    assert len(inodes(arena)) == 2
    assert before < inodes(arena)
    assert arena.adopt(digest, NUM_BYTES) is None or arena.adopt(other, NUM_BYTES) is None


def test_what_a_step_did_not_use_goes_with_the_next(arena: Arena) -> None:
    flat, digest = some_bytes()
    arena.publish(digest, flat)
    gc.collect()
    arena.begin_step()
    assert len(inodes(arena)) == 1
    arena.publish(*reversed(some_bytes(NUM_BYTES + 1)))
    arena.begin_step()
    assert {path.stat().st_size for path in arena._folder.iterdir()} == {0, NUM_BYTES + 1}
    arena.begin_step()
    assert inodes(arena) == set()


def test_the_end_of_an_arena_leaves_nothing() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        arena = Arena(Folder(Path(memory), "0" * 24))
        kept = [arena.publish(digest, flat) for flat, digest in (some_bytes() for _ in range(3))]
        del kept[:2], arena
        assert len(list(Path(memory).rglob("*"))) == 5  # all of it serves whoever holds the last
        kept.clear()
        assert len(list(Path(memory).rglob("*"))) == 0


def test_a_lease_that_outlives_its_store_leaves_nothing_while_others_share_on() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        other = Folder(Path(memory), "0" * 24)
        arena = Arena(Folder(Path(memory), "0" * 24))
        flat, digest = some_bytes()
        kept, spare, published = arena.publish(digest, flat) or pytest.fail("not published")
        lease = _FileLease((kept, spare), digest, arena=arena, published=published)
        del arena, published
        assert len(list(other.path.iterdir())) == 2
        del lease
        assert [path.name for path in other.path.iterdir()] == ["lock"]
        other.leave()


def test_no_room_is_no_file_and_no_trace(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no room")

    flat, digest = some_bytes()
    monkeypatch.setattr(os, "posix_fallocate", full)
    assert arena.publish(digest, flat) is None
    assert inodes(arena) == set()


def test_a_mapping_that_fails_says_why(tmp_path: Path) -> None:
    with (tmp_path / "file").open("w+b") as file, pytest.raises(OSError, match=r"memory|argument"):
        map_private(file.fileno(), 1 << 62)
