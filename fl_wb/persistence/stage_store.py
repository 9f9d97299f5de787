"""The store of a barycenter's stages: finished generators, and checkpoints inside a stage.

An entry is named by what went into it, so that a restart, a later round or another run with the
same inputs finds it, and a changed input never meets an old result.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from torch import Tensor

from fl_wb.persistence.tensor_files import StorageError, load_tensors, save_tensors

log = logging.getLogger(__name__)

SECONDS_BETWEEN_CHECKPOINTS = 10.0


class StageStore:
    """Named sets of tensors, in a folder (atomic safetensors files) or in memory.

    Parameters
    ----------
    folder : str or Path, optional
        Made when needed; the entries are in ``stages/`` in it, whoever else writes there. None
        keeps everything in memory, for as long as the store lives.
    seconds : float, optional
        Between two checkpoints; `SECONDS_BETWEEN_CHECKPOINTS` if None.
    """

    def __init__(self, folder: str | Path | None = None, *, seconds: float | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.seconds = seconds
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._used: set[str] = set()  # keys that it wrote, found or claimed: only those are its own

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return an entry, or None; a damaged file is set aside, never trusted."""
        if self.folder is None:
            return self._memory.get(key)
        try:
            found = load_tensors(self._path(key))[0]
        except FileNotFoundError:
            return None
        except StorageError as error:
            self.set_aside(key, str(error))
            return None
        self._used.add(key)
        return found

    def put(
        self, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> bool:
        """Save an entry. A disk that refuses costs the entry, with a warning, not the run.

        Returns whether it was saved.
        """
        self._used.add(key)
        if self.folder is None:
            self._memory[key] = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
            return True
        try:
            save_tensors(self._path(key), tensors, metadata)
        except OSError as error:
            log.warning("%s could not be saved in %s: %s", key[:12], self.folder, error)
            return False
        return True

    def drop(self, key: str) -> None:
        """Forget an entry."""
        self._memory.pop(key, None)
        self._used.discard(key)
        if self.folder is not None:
            # a folder that cannot be written to also holds nothing that matters
            with suppress(OSError):
                self._path(key).unlink(missing_ok=True)

    def set_aside(self, key: str, reason: str) -> None:
        """Keep an entry that cannot be used out of the way, for whoever wants to look."""
        self._memory.pop(key, None)
        if self.folder is not None:
            aside = self._path(key).with_suffix(".damaged")
            with suppress(OSError):  # what cannot be moved is overwritten, or stays unused
                self._path(key).replace(aside)
            log.warning("%s; it was set aside as %s and is made anew", reason, aside.name)

    @property
    def own(self) -> list[str]:
        """Keys of the entries that are its own."""
        return sorted(self._used)

    def claim(self, keys: Iterable[str]) -> None:
        """Take for its own what another store wrote of which it is the successor."""
        self._used |= set(keys)

    def keep_only(self, keys: Collection[str]) -> None:
        """Forget every entry of its own but these: the store does not grow with the rounds.

        What others wrote into the folder stays, stages of another barycenter included.
        """
        for key in self._used - set(keys):
            self.drop(key)

    def checkpoint(self, key: str) -> StageCheckpoint:
        """Return the checkpoint for work in progress under this key."""
        return StageCheckpoint(self, f"{key}-unfinished")

    def _path(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / "stages" / f"{key}.safetensors"


class StageCheckpoint:
    """A `fl_wb.training.checkpoints.Checkpoint` in a store."""

    def __init__(self, store: StageStore, key: str) -> None:
        self._store, self.key = store, key
        self._saved = time.monotonic()

    def load(self) -> dict[str, Tensor] | None:
        """Return the last saved state, or None."""
        return self._store.get(self.key)

    def discard(self, reason: str) -> None:
        """Set aside a saved state that does not fit."""
        self._store.set_aside(self.key, f"Checkpoint {self.key[:12]} cannot be used: {reason}")

    def due(self) -> bool:
        """Whether the store's time between two checkpoints has passed."""
        seconds = self._store.seconds
        seconds = SECONDS_BETWEEN_CHECKPOINTS if seconds is None else seconds
        return time.monotonic() - self._saved >= seconds

    def save(self, state: dict[str, Tensor]) -> None:
        """Save the state in place of the last one."""
        self._store.put(self.key, state)
        self._saved = time.monotonic()

    def clear(self) -> None:
        """Forget the state: the work is finished."""
        self._store.drop(self.key)
