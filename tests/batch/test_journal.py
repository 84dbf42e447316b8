"""Files of lines: whatever is cut off or fails, whole lines stay and nothing else."""

import errno
import json
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cutp.batch import journal
from cutp.batch.journal import Journal, drop_torn_line, read_journal, to_line, write_atomically
from cutp.errors import OutputError

VALUES = [{"id": "a", "text": "ä\n\u2028 \"x\""}, {"id": 2, "text": "\ud800"}, {"id": "c", "n": [1.5, None]}]


def values(path):
    return [value for _, _, value in read_journal(path)]


def test_lines_come_back(tmp_path):
    file = Journal(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    for value in VALUES:
        file.append(value)
    file.sync()
    file.close()
    file.close()
    assert values(tmp_path / "a") == VALUES
    data = (tmp_path / "a").read_bytes()
    assert data.count(b"\n") == 3 and "ä".encode() in data
    assert [json.loads(data[start : start + length]) for start, length, _ in read_journal(tmp_path / "a")] == VALUES


def test_a_file_has_one_writer(tmp_path):
    (tmp_path / "a").write_text("theirs\n")
    with pytest.raises(OutputError, match="File exists"):
        Journal(tmp_path / "a").append({})
    assert (tmp_path / "a").read_text() == "theirs\n"


@given(st.lists(st.dictionaries(st.text(max_size=3), st.text(max_size=8), max_size=2), max_size=5), st.data())
def test_cut_at_any_byte(rows, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a"
        whole = b"".join(map(to_line, rows))
        cut = data.draw(st.integers(0, len(whole)))
        path.write_bytes(whole[:cut])
        left = rows[: whole[:cut].count(b"\n")]
        assert values(path) == left
        end = len(b"".join(map(to_line, left)))
        assert drop_torn_line(path) == cut - end and path.read_bytes() == whole[:end]
        assert drop_torn_line(path) == 0 and values(path) == left


def test_a_torn_line_longer_than_a_block(tmp_path):
    path = tmp_path / "a"
    for before in (b"", b"{}\n"):
        path.write_bytes(before + b"x" * 200_000)
        assert drop_torn_line(path) == 200_000 and path.read_bytes() == before


def test_lines_that_are_damaged(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b'{"id": 1}\n\0\0\0\n[1]\n{"id": 2\n' + b"[" * 100_000 + b'\n{"id": 3}\n')
    assert values(path) == [{"id": 1}, None, None, None, None, {"id": 3}]


class FullDisk:
    """`os` on a disk with room for so many bytes, which writes what fits, as the system does."""

    def __init__(self, room, truncates=True):
        self.room = room
        self.truncates = truncates

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, fd, data):
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = os.write(fd, data[: self.room])
        self.room -= count
        return count

    def ftruncate(self, fd, size):
        if not self.truncates:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.ftruncate(fd, size)


@pytest.mark.parametrize("truncates", [True, False])
@pytest.mark.parametrize("room", [0, 1, 16, 17, 18, 40, 51])
def test_full_disk(tmp_path, monkeypatch, room, truncates):
    monkeypatch.setattr(journal, "os", FullDisk(room, truncates))
    file = Journal(tmp_path / "a")
    line = {"id": 123456789}
    size = len(to_line(line))
    written = 0
    with pytest.raises(OutputError, match="No space left on device.*the finished records are kept"):
        for _ in range(10):
            file.append(line)
            written += 1
    file.close()
    assert written == room // size
    if truncates:
        assert (tmp_path / "a").read_bytes() == to_line(line) * written
    drop_torn_line(tmp_path / "a")
    assert values(tmp_path / "a") == [line] * written


def test_a_disk_that_is_found_full_when_synced(tmp_path, monkeypatch):
    def fsync(fd):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    file = Journal(tmp_path / "a")
    file.append({"id": 1})
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match="No space"):
        file.sync()
    with pytest.raises(OutputError, match="No space"):
        file.close()


def test_write_atomically(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_atomically(path, b"one")
    write_atomically(path, b"two")
    assert path.read_bytes() == b"two"

    def replace(*_):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OutputError, match="quota"):
        write_atomically(path, b"three")
    assert path.read_bytes() == b"two" and os.listdir(tmp_path) == ["a"]
