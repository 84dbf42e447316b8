"""Running the command line inside the test process, which is many times faster than starting it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from cutp.cli.main import main

TALES = Path(__file__).resolve().parents[2] / "cutp" / "bundled" / "tales"


@dataclass(frozen=True)
class Finished:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> list:
        """The JSON lines of stdout."""
        return [json.loads(line) for line in self.out.splitlines()]

    def assert_error(self, code: int, *parts: object) -> None:
        """Nothing on stdout, and one line on stderr that holds `parts`."""
        assert (self.code, self.out) == (code, ""), self
        assert self.err.startswith("cutp: error: ") and self.err.count("\n") == 1 and self.err.endswith("\n"), self.err
        for part in parts:
            assert str(part) in self.err, self.err


@pytest.fixture
def cli(capsys):
    """cli("generate", "-p", ...): runs `cutp generate -p ...`."""

    def run(*argv) -> Finished:
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main([str(arg) for arg in argv])
        out, err = capsys.readouterr()
        return Finished(exit_.value.code or 0, out, err)

    return run


@pytest.fixture
def tales_copy(tmp_path):
    """A copy of the bundled model that may be changed."""
    return Path(shutil.copytree(TALES, tmp_path / "tales"))
