"""One run at a time in a folder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

NAME = ".lock"


class InUseError(RuntimeError):
    """Another run is at work in a folder."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder; the operating system lets go of it when the process ends, however it does.

    Raises
    ------
    InUseError
        If another run holds it.
    OSError
        If it cannot be written.
    """
    lock = FileLock(folder / NAME, mode=0o666)  # less the umask
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise InUseError(f"{folder} is in use by another run: give this one its own") from error
    except OSError as error:
        raise OSError(f"the folder {folder} cannot be written: {error}") from error
    try:
        yield
    finally:
        lock.release()
