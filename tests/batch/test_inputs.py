"""Reading lines: formats, compression, patterns, and files that are damaged."""

import gzip
import hashlib
import os

import pytest

from cutp.batch import inputs
from cutp.batch.inputs import InputFile, find_files, read_lines
from cutp.errors import RequestError


def lines_of(path, is_text=True, digest=None):
    return [(line.number, line.data) for line in read_lines(InputFile(path, is_text), digest)]


def test_lines_are_numbered_with_the_blank_ones(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n\n  \t\r\ntwo\r\nthree")
    digest = hashlib.sha256()
    assert lines_of(path, digest=digest) == [(1, b"one\n"), (4, b"two\r\n"), (5, b"three")]
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo\n")
    assert lines_of(path) == [(1, b"one\n"), (2, b"\xef\xbb\xbftwo\n")]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl"])
def test_gzip_is_known_by_its_bytes(tmp_path, name):
    path = tmp_path / name
    data = b'{"id": 1}\n' * 1000
    path.write_bytes(gzip.compress(data[:3000]) + gzip.compress(data[3000:]))
    digest = hashlib.sha256()
    assert len(lines_of(path, False, digest)) == 1000 and digest.hexdigest() == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("cut", [lambda d: d[: len(d) // 2], lambda d: d[:-3], lambda d: d[:60] + b"\0\xff" + d[62:]])
def test_damaged_gzip(tmp_path, cut):
    path = tmp_path / "a.txt.gz"
    path.write_bytes(cut(gzip.compress(os.urandom(3000).hex().encode() + b"\n")))
    with pytest.raises(RequestError, match=r"a\.txt\.gz is damaged after line"):
        lines_of(path)


def test_a_line_too_long_is_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs, "MAX_LINE_BYTES", 10)
    path = tmp_path / "a.txt"
    path.write_bytes(b"123456789\n" + b"x" * 55 + b"\nshort\n" + b"y" * 11)
    digest = hashlib.sha256()
    assert lines_of(path, digest=digest) == [(1, b"123456789\n"), (2, None), (3, b"short\n"), (4, None)]
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(("name", "content", "text"), [
    ("a.txt", b'{"id": 1}\n', True), ("a.txt.gz", b'{"id": 1}\n', True), ("a.jsonl", b"one\n", False),
    ("a.NDJSON", b"one\n", False), ("a.json.gz", b"one\n", False), ("a", b'\n {"id": 1}\n', False),
    ("a.data", b"\none\n", True), ("a.empty", b"", False)])
def test_format_by_name_or_first_line(tmp_path, name, content, text):
    path = tmp_path / name
    path.write_bytes(content)
    [file] = find_files([str(path)])
    assert file.is_text is text
    assert find_files([str(path)], "text")[0].is_text is True and find_files([str(path)], "jsonl")[0].is_text is False


def test_patterns(tmp_path):
    for name in ("b.txt", "a.txt", "c.jsonl", "[1].txt"):
        (tmp_path / name).write_text("x\n")
    assert [file.name for file in find_files([f"{tmp_path}/c.jsonl", f"{tmp_path}/[ab].txt"])] == \
        ["c.jsonl", "a.txt", "b.txt"]
    assert [file.name for file in find_files([f"{tmp_path}/[1].txt"])] == ["[1].txt"]
    for names in ([f"{tmp_path}/none.txt"], [f"{tmp_path}/*.gz"]):
        with pytest.raises(RequestError, match="is not there"):
            find_files(names)
    (tmp_path / "link.txt").symlink_to(tmp_path / "a.txt")
    for other in ("a.txt", "*.txt", "link.txt", "./a.txt"):
        with pytest.raises(RequestError, match="given twice"):
            find_files([f"{tmp_path}/a.txt", f"{tmp_path}/{other}"])


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    for name in ("pipe.txt", ""):
        with pytest.raises(RequestError, match="not a regular file|cannot be read"):
            lines_of(tmp_path / name)
    with pytest.raises(RequestError, match="cannot be read: No such file"):
        lines_of(tmp_path / "none")
