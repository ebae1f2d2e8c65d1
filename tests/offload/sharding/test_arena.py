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
from offload.sharding.mapping import map_private, tensor_on
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


def is_mapped(tensor: Tensor, arena: Arena) -> bool:
    """Return whether the tensor's memory is a file of the arena."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, _, end = line.split()[0].partition("-")
        if int(first, 16) <= tensor.data_ptr() < int(end, 16):
            return str(arena._folder) in line
    return False


def test_what_is_published_is_adopted_and_a_mapping_is_its_own(arena: Arena) -> None:
    flat, digest = some_bytes()
    assert arena.adopt(digest, NUM_BYTES) is None
    published = arena.publish(digest, flat)
    assert published is not None
    adopted = arena.adopt(digest, NUM_BYTES)
    assert adopted is not None
    for mapping in (*published[:2], *adopted):
        assert torch.equal(tensor_on(mapping), flat)
        tensor_on(mapping).fill_(3)
    again = arena.adopt(digest, NUM_BYTES)
    assert again is not None
    assert torch.equal(tensor_on(again[0]), flat)
    assert arena.adopt(digest, NUM_BYTES - 1) is None


def test_no_file_stays_open(arena: Arena) -> None:
    num_open = len(list(Path("/proc/self/fd").iterdir()))
    kept = [arena.publish(digest, flat) for flat, digest in (some_bytes() for _ in range(5))]
    assert None not in kept
    assert len(list(Path("/proc/self/fd").iterdir())) == num_open


def test_a_file_is_written_anew_once_nobody_maps_it(arena: Arena) -> None:
    first, digest = some_bytes()
    kept, spare, published = arena.publish(digest, first) or pytest.fail("not published")
    handed_out = tensor_on(spare)
    before = inodes(arena)
    del kept, spare, published
    # Autograd still has what was handed out.
    second, other = some_bytes()
    held = arena.publish(other, second)
    assert len(inodes(arena)) == 2
    assert torch.equal(handed_out, first)
    del handed_out, held
    third, last = some_bytes()
    found = arena.publish(last, third)
    assert found is not None
    assert torch.equal(tensor_on(found[0]), third)
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
        *mappings, published = arena.publish(digest, flat) or pytest.fail("not published")
        lease = _FileLease(tuple(mappings), digest, arena=arena, published=published)
        del arena, published, mappings
        assert len(list(other.path.iterdir())) == 2
        del lease
        assert [path.name for path in other.path.iterdir()] == ["lock"]
        other.leave()


def test_each_read_is_the_readers_own_also_once_the_file_has_no_name(arena: Arena) -> None:
    flat, digest = some_bytes()
    *mappings, published = arena.publish(digest, flat) or pytest.fail("not published")
    lease = _FileLease(tuple(mappings), digest, arena=arena, published=published)
    read = []
    for is_named in (True, False):
        if not is_named:
            arena._named(digest).unlink()
        for _ in range(3):
            read.append(lease.read_own())
            assert torch.equal(read[-1], flat)
            assert is_mapped(read[-1], arena) == is_named  # and not copied
        assert len({each.data_ptr() for each in read}) == len(read)
        for number, each in enumerate(read):
            each.fill_(number)
        assert torch.equal(lease.read(), flat)


def test_a_mapping_goes_from_reader_to_reader_until_one_writes_to_it(arena: Arena) -> None:
    flat, digest = some_bytes()
    *mappings, published = arena.publish(digest, flat) or pytest.fail("not published")
    lease = _FileLease(tuple(mappings), digest, arena=arena, published=published)
    own = lease.read_own()
    first = own.data_ptr()
    view = own[5:].view(-1)
    del own
    second = lease.read_own()
    assert second.data_ptr() != first  # there is a view of the first
    del view, second
    third = lease.read_own()
    place = third.data_ptr()
    del third
    fourth = lease.read_own()
    assert fourth.data_ptr() == place
    fourth[7] += 1
    del fourth
    assert torch.equal(lease.read_own(), flat)


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
