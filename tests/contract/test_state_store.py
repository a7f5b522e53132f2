"""What every state store does, and what the one on disk does besides."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agents.changelog import Bounds
from agents.disk_store import METADATA_KEY, DiskStore, MemoryStore, StateStore, StoreError

LOG = Bounds(10, 1000)
HOSTILE_KEYS = [b"\x00", b"\xff" * 300, "\u202eright-to-left \U0001f9d1".encode(), b" ", b"'; DROP", b"x" * 32_768]


def opened(folder: Path, changelog: str = "changelog", watch: str = "watch", bounds: Bounds = LOG) -> DiskStore:
    return DiskStore.open(folder, changelog, watch, bounds)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[DiskStore]:
    store = opened(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture(params=["memory", "disk"])
def store(request: pytest.FixtureRequest) -> StateStore:
    if request.param == "memory":
        return MemoryStore()
    made: DiskStore = request.getfixturevalue("disk")
    return made


class TestStateStore:
    """One code path of the worker serves both."""

    def test_a_new_one_holds_nothing(self, store: StateStore) -> None:
        assert store.offset is None
        assert store.highest_watch_offset == -1
        assert store.get(b"user") is None
        assert list(store.keys()) == []
        assert list(store.items()) == []

    def test_it_says_how_far_it_reaches(self, store: StateStore) -> None:
        store.write([b"a"], [b"1"], 20, 7)
        assert (store.offset, store.highest_watch_offset) == (20, 7)
        store.write([], [], 30, -1)
        assert (store.offset, store.highest_watch_offset) == (30, 7)
        store.write([b"a"], [None], 31, 5)
        assert (store.offset, store.highest_watch_offset) == (31, 7)

    def test_what_is_removed_is_gone(self, store: StateStore) -> None:
        store.write([b"a"], [b"1"], 20, 7)
        store.write([b"a", b"never"], [None, None], 21, 8)
        assert store.get(b"a") is None
        assert list(store.keys()) == []

    def test_closing_may_be_repeated(self, store: StateStore) -> None:
        store.close()
        store.close()

    def test_it_can_be_deleted(self, store: StateStore) -> None:
        store.write([b"a"], [b"1"], 20, 7)
        store.delete()


class TestDiskStore:
    def test_it_gives_back_what_was_written_last(self, disk: DiskStore) -> None:
        disk.write([b"a", b"b", b"a"], [b"1", b"2", b"3"], 20, 7)
        disk.write([b"c", b"b"], [b"", b"x" * 5_000_000], 22, 9)
        assert disk.get(b"a") == b"3"
        assert disk.get(b"b") == b"x" * 5_000_000
        assert disk.get(b"c") == b""
        assert list(disk.keys()) == [b"a", b"b", b"c"]
        assert dict(disk.items()).keys() == {b"a", b"b", b"c"}

    def test_hostile_keys(self, disk: DiskStore) -> None:
        disk.write(HOSTILE_KEYS, [key[:9] for key in HOSTILE_KEYS], 20, 7)
        assert dict(disk.items()) == {key: key[:9] for key in HOSTILE_KEYS}
        assert [disk.get(key) for key in HOSTILE_KEYS] == [key[:9] for key in HOSTILE_KEYS]

    def test_it_outlives_the_process(self, tmp_path: Path, disk: DiskStore) -> None:
        disk.write([b"a", b"b"], [b"1", b"2" * 3000], 20, 7)
        disk.close()
        again = opened(tmp_path / "store")
        assert (again.offset, again.highest_watch_offset) == (20, 7)
        assert dict(again.items()) == {b"a": b"1", b"b": b"2" * 3000}
        again.close()

    @pytest.mark.parametrize("bounds", [Bounds(10, 20), Bounds(20, 20), Bounds(0, 9000)])
    def test_it_is_kept_where_it_is_a_prefix_of_the_log(self, tmp_path: Path, disk: DiskStore, bounds: Bounds) -> None:
        disk.write([b"a"], [b"1"], 20, 7)
        disk.close()
        again = opened(tmp_path / "store", bounds=bounds)
        assert again.offset == 20
        again.close()

    @pytest.mark.parametrize("bounds", [Bounds(0, 0), Bounds(0, 19), Bounds(21, 1000)])
    def test_it_is_rebuilt_where_its_offset_is_outside_of_the_log(
        self, tmp_path: Path, disk: DiskStore, bounds: Bounds, caplog: pytest.LogCaptureFixture
    ) -> None:
        disk.write([b"a"], [b"1"], 20, 7)
        disk.close()
        again = opened(tmp_path / "store", bounds=bounds)
        assert (again.offset, again.highest_watch_offset, again.get(b"a")) == (None, -1, None)
        assert "reaches to changelog offset 20" in caplog.text
        again.write([b"b"], [b"2"], 1, 0)
        again.close()
        assert opened_offset(tmp_path / "store", Bounds(0, 5)) == 1

    def test_it_is_rebuilt_for_another_changelog_topic(
        self, tmp_path: Path, disk: DiskStore, caplog: pytest.LogCaptureFixture
    ) -> None:
        disk.write([b"a"], [b"1"], 20, 7)
        disk.close()
        again = opened(tmp_path / "store", changelog="anew")
        assert (again.offset, again.get(b"a")) == (None, None)
        assert "made anew" in caplog.text
        again.close()

    def test_offsets_of_another_watch_topic_do_not_count(self, tmp_path: Path, disk: DiskStore) -> None:
        disk.write([b"a"], [b"1"], 20, 7000)
        disk.close()
        again = opened(tmp_path / "store", watch="anew")
        assert (again.offset, again.highest_watch_offset, again.get(b"a")) == (20, -1, b"1")
        again.write([b"a"], [b"2"], 21, 3)
        again.close()
        third = opened(tmp_path / "store", watch="anew")
        assert third.highest_watch_offset == 3
        third.close()

    def test_a_deleted_folder_starts_empty(self, tmp_path: Path, disk: DiskStore) -> None:
        disk.write([b"a"], [b"1"], 20, 7)
        disk.delete()
        assert not (tmp_path / "store").exists()
        again = opened(tmp_path / "store")
        assert again.offset is None
        again.close()

    def test_damaged_files_are_rebuilt(self, tmp_path: Path, disk: DiskStore, caplog: pytest.LogCaptureFixture) -> None:
        disk.write([b"a"], [b"1"], 20, 7)
        disk.close()
        for manifest in (tmp_path / "store").glob("MANIFEST-*"):
            manifest.write_bytes(b"\x00" * 100)
        again = opened(tmp_path / "store")
        assert (again.offset, again.get(b"a")) == (None, None)
        assert "built anew" in caplog.text
        again.close()

    def test_metadata_of_another_version_is_rebuilt(self, tmp_path: Path, disk: DiskStore) -> None:
        disk._database[METADATA_KEY] = b'{"something": 1}'
        disk.close()
        assert opened_offset(tmp_path / "store", LOG) is None

    def test_a_second_process_is_refused(self, tmp_path: Path, disk: DiskStore) -> None:
        script = (
            "import sys; from pathlib import Path; from agents.changelog import Bounds\n"
            "from agents.disk_store import DiskStore\n"
            "DiskStore.open(Path(sys.argv[1]), 'changelog', 'watch', Bounds(0, 9))\n"
        )
        second = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "store")], capture_output=True, text=True, timeout=60
        )
        assert second.returncode == 1
        assert "StoreError" in second.stderr
        assert "in use by another process" in second.stderr
        assert "PERSONAS_STATE_FOLDER" in second.stderr
        disk.write([b"a"], [b"1"], 20, 7)

    def test_a_folder_that_cannot_be_written(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(StoreError, match="file"):
            opened(tmp_path / "file")
        with pytest.raises(StoreError, match="file"):
            opened(tmp_path / "file" / "store")

    @pytest.mark.parametrize("attempt", range(3))
    def test_killed_while_writing_it_is_a_whole_prefix(self, tmp_path: Path, attempt: int) -> None:
        """Every write sets all keys to its number, which is its offset too; SIGKILL comes in the middle."""
        script = (
            "import sys; from pathlib import Path; from itertools import count; from agents.changelog import Bounds\n"
            "from agents.disk_store import DiskStore\n"
            "store = DiskStore.open(Path(sys.argv[1]), 'changelog', 'watch', Bounds(0, 1 << 40))\n"
            "keys = [b'user-%d' % i for i in range(2000)]\n"
            "for number in count(1):\n"
            "    store.write(keys, [b'%d ' % number + bytes(2300)] * len(keys), number, number)\n"
            "    print(number, flush=True)\n"
        )
        writer = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "store")], stdout=subprocess.PIPE, text=True, env=os.environ
        )
        assert writer.stdout is not None
        assert writer.stdout.readline() == "1\n"
        time.sleep(0.4 + 0.217 * attempt)
        writer.send_signal(signal.SIGKILL)
        confirmed = int((writer.stdout.read().split() or ["1"])[-1])
        writer.wait()
        store = opened(tmp_path / "store", bounds=Bounds(0, 1 << 40))
        found = store.offset
        assert found is not None
        assert found - confirmed in (0, 1)
        assert store.highest_watch_offset == found
        values = [value.split()[0] for _, value in store.items()]
        assert values == [b"%d" % found] * 2000
        store.close()


def opened_offset(folder: Path, bounds: Bounds) -> int | None:
    store = opened(folder, bounds=bounds)
    store.close()
    return store.offset
