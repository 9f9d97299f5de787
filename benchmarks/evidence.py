"""Every table of a page, made anew by the command above it, all from one commit.

    python -m benchmarks.evidence all|WORD ... [--page docs/results.md] [--folder evidence]
        [--set MNIST=FOLDER ...] [--workers 2]

A piece of the page is a shell block of one command, ``.venv/bin/python -m benchmarks...``, and the
table that follows it: the last one that the command prints. With WORDs, pieces whose command has
one of them. Commands run two at a time, one thread each. What they print is kept in the folder, by
the code that printed it, so that a call that was stopped can be given again, sources that several
train are trained once, and figures of two versions never meet; code that is not committed is
refused. Once all pieces of the page are there, its line "Of the commit ..." says which.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.quality import KEPT_SOURCES
from fl_wb.persistence.tensor_files import write_atomic

ROOT = Path(__file__).parents[1]
CODE = ("fl_wb", "strategies", "clients", "conf", "benchmarks", "examples", "constraints.txt")
PIECE = re.compile(
    r"^```sh\n\.venv/bin/python (?P<command>-m benchmarks\.(?:[^\n]|\\\n)*)\n```\n\n"
    r"(?P<table>(?:\|[^\n]*\n)+)",
    re.MULTILINE,
)
TABLE = re.compile(r"(?:^\|.*\n)+", re.MULTILINE)
COMMIT = re.compile(r"(?<=Of the commit `)[0-9a-f]+(?=`)")


@dataclass(frozen=True)
class Piece:
    """A command of the page, and where what it prints is kept."""

    command: str
    kept: Path

    def printed(self) -> str | None:
        """Return what the command printed, or None."""
        return self.kept.read_text("utf-8") if self.kept.exists() else None

    def run(self, names: dict[str, str]) -> None:
        """Run the command, unless it has been."""
        if self.kept.exists():
            return
        began = time.perf_counter()
        words = [names.get(w, w) for w in shlex.split(self.command.replace("\\\n", " "))]
        words = [re.sub(r"(?<==)\w+$", lambda m: names.get(m[0], m[0]), word) for word in words]
        words = [re.sub(r"^evidence(?=/)", str(self.kept.parent), word) for word in words]
        own = {"OMP_NUM_THREADS": "1", KEPT_SOURCES: str(self.kept.parent / "sources")}
        done = subprocess.run(
            [sys.executable, *words],
            cwd=ROOT,
            env=os.environ | own,
            stdout=subprocess.PIPE,
            text=True,
            check=False,
        )
        if done.returncode or not TABLE.search(done.stdout):
            print(f"# failed ({done.returncode}): {self.command}", flush=True)
            return
        write_atomic(self.kept, done.stdout.encode())
        print(f"# {time.perf_counter() - began:.0f} s: {self.command}", flush=True)


def pieces_of(page: str, folder: Path) -> list[Piece]:
    """Return the pieces of a page."""
    found = []
    for match in PIECE.finditer(page):
        command = match["command"]
        name = re.sub(r"\W+", "-", command.removeprefix("-m benchmarks.")).strip("-")
        own = hashlib.sha256(command.encode()).hexdigest()[:8]
        found.append(Piece(command, folder / f"{name[:80]}-{own}.txt"))
    return found


def filled(page: str, printed: dict[str, str]) -> str:
    """Return a page with the tables of these commands replaced by the last ones they printed."""

    def replaced(match: re.Match[str]) -> str:
        if (text := printed.get(match["command"])) is None:
            return match[0]
        table = "".join(map(_condensed, TABLE.findall(text)[-1].splitlines()))
        return match[0].removesuffix(match["table"]) + table

    return PIECE.sub(replaced, page)


def _condensed(line: str) -> str:
    cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
    if all(set(cell) <= set("-:") and cell for cell in cells):
        return "|---" * len(cells) + "|\n"
    return f"| {' | '.join(cells)} |\n"


def code_here() -> tuple[str, str]:
    """Return the commit, and a name of its code; SystemExit if the code is not all committed."""
    changed = _git("status", "--porcelain", "--", *CODE)
    if changed:
        raise SystemExit(f"not committed, so that nobody could make the figures again:\n{changed}")
    trees = _git("ls-tree", "HEAD", "--", *CODE)
    name = _git("hash-object", "--stdin", given=trees)
    return _git("rev-parse", "--short=7", "HEAD"), name


def _git(*words: str, given: str = "") -> str:
    done = subprocess.run(
        ["git", *words], cwd=ROOT, input=given, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is not there yet, and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("which", nargs="+", help="all, or words of commands")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    parser.add_argument("--folder", type=Path, default=Path("evidence"))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(arguments)
    commit, code = code_here()
    names = dict(word.split("=", 1) for word in given.set)
    folder = given.folder.resolve() / code[:12]
    folder.mkdir(parents=True, exist_ok=True)
    everything = pieces_of(given.page.read_text("utf-8"), folder)
    words = [] if "all" in given.which else given.which
    chosen = [p for p in everything if not words or any(word in p.command for word in words)]
    if not chosen:
        parser.error(f"no command of {given.page} has one of: {', '.join(given.which)}")
    with ThreadPoolExecutor(given.workers) as pool:
        list(pool.map(lambda piece: piece.run(names), chosen))
    printed = {p.command: text for p in everything if (text := p.printed()) is not None}
    page = filled(given.page.read_text("utf-8"), printed)
    if len(printed) == len(everything):
        page = COMMIT.sub(commit, page)
    write_atomic(given.page, page.encode())
    print(f"# {len(printed)} of {len(everything)} pieces of {given.page}")
    if any(piece.printed() is None for piece in chosen):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
