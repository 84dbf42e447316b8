"""A file that appears whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import BinaryIO

from cutp.errors import RequestError


class WholeFile:
    """A file that takes its name once it is complete; before it is `NAME.part`, which an error removes.

    What is there and no regular file, such as /dev/stdout, is written to and never replaced. Enter it on rank 0 only;
    all errors are RequestError.
    """

    def __init__(self, name: str):
        self._name = name
        self._final = os.path.realpath(name)
        self._temporary = name if self.is_device else f"{self._final}.part"
        self._file: BinaryIO | None = None

    @property
    def is_device(self) -> bool:
        return os.path.exists(self._name) and not os.path.isfile(self._name)

    def check(self) -> None:
        """RequestError now, before minutes of work, when the output could not be written."""
        directory = os.path.dirname(self._final)
        place = self._name if self.is_device else directory
        if os.path.isdir(self._name) or not os.path.isdir(directory) or not os.access(place, os.W_OK):
            raise RequestError(f"the output {self._name} cannot be written", hint="name a file in a writable directory")

    def write(self, data: bytes, *, at: int | None = None) -> None:
        """Appends `data`, or writes it over what is at an offset."""
        with self._guarded():
            if self._file is None:
                self._file = open(self._temporary, "wb")  # noqa: SIM115
            if at is not None:
                self._file.seek(at)
            self._file.write(data)

    def finish(self) -> None:
        """All is written: the file takes its name."""
        with self._guarded():
            self._file.close()
            if self._temporary != self._name:
                os.replace(self._temporary, self._final)
        self._file = None

    def close(self) -> None:
        """Drops what is not finished."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            if self._temporary != self._name:
                with contextlib.suppress(OSError):
                    os.remove(self._temporary)
            self._file = None

    @contextlib.contextmanager
    def _guarded(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise RequestError(f"the output {self._name} cannot be written: {error.strerror}") from None
