"""What ends a Flower home: its processes, then its folder, whatever became of who made it.

As a program, ``python watchdog.py HOME``, it does so when its standard input is closed: the kernel
sees to that when the process that holds the other end is no more, after SIGKILL too.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

SHUTDOWN_SECONDS = 10.0


@contextmanager
def watched(home: Path) -> Iterator[None]:
    """Have a Flower home ended after this context, also if this process does not come that far."""
    dog = subprocess.Popen(
        [sys.executable, "-P", __file__, str(home)],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is not for it
    )
    try:
        yield
    finally:
        dog.communicate()


def end(home: Path) -> None:
    """End a Flower home's processes (a SuperLink's own shutdown leaves a running run behind)."""
    told: set[psutil.Process] = set()
    patient_until = time.monotonic() + SHUTDOWN_SECONDS
    while family := _family(home):
        for member in family:
            with suppress(psutil.NoSuchProcess):
                if time.monotonic() > patient_until:
                    member.kill()
                elif member not in told:  # Flower takes a second SIGTERM for impatience
                    member.terminate()
        told.update(family)
        psutil.wait_procs(family, timeout=0.5)


def _family(home: Path) -> list[psutil.Process]:
    """Return the processes of a Flower home.

    Not the SuperLink's children: Ray starts workers while it is told to end, and an orphan of
    those is nobody's child.
    """
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # ended meanwhile, or another user's
            if process.environ().get("FLWR_HOME") == str(home):
                found.append(process)
    return found


def main() -> None:
    """Wait for the end of standard input; end the home that the command line names."""
    sys.stdin.buffer.read()
    home = Path(sys.argv[1])
    end(home)
    shutil.rmtree(home, ignore_errors=True)


if __name__ == "__main__":
    main()
