"""The server's memory of its nodes on disk: a barycenter of yesterday is extended today.

An index names files of tensors, each by its content: they are written first, the index then, in one
step, and what it no longer names is deleted last. A server that is killed at any moment finds the
whole of one round's end or of the one before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from torch import Tensor

from fl_wb.federation.uploads import FOLDED, State, Upload, Uploads
from fl_wb.persistence.tensor_files import (
    StorageError,
    digest,
    load_tensors,
    save_tensors,
    write_atomic,
)

log = logging.getLogger("flwr")

VERSION = 1
INDEX = "index.json"
NAME = re.compile(r"[\w-]*")  # of a file in its folder, and nowhere else


class Memory:
    """Uploads and the barycenter made of them, in a folder.

    Parameters
    ----------
    folder : Path
        Made when needed.
    model : mapping of str to Tensor
        An upload's arrays: what is kept of a model of other names, shapes or types is no use.
    settings : mapping
        Of the merge, as JSON has them: a barycenter of others is made anew of the same uploads.
    """

    def __init__(
        self, folder: Path, model: Mapping[str, Tensor], settings: Mapping[str, object]
    ) -> None:
        self.folder = folder
        said = json.dumps(settings, sort_keys=True, default=str)
        self._settings = hashlib.sha256(said.encode()).hexdigest()
        self._model = {
            name: [str(value.dtype), list(value.shape)] for name, value in sorted(model.items())
        }
        self.shares: list[float] = []  # of the barycenter that `load` found
        self.stages: list[str] = []  # keys of the stages that were made for it, among others
        self._files: dict[Upload, str] = {}  # that are on disk
        self._named = set[str]()  # by the index, which is to say ours

    def save(
        self,
        uploads: Uploads,
        merged: State | None,
        server_round: int,
        shares: Sequence[float] = (),
        stages: Sequence[str] = (),
    ) -> None:
        """Keep a round's end. A disk that refuses costs the memory, with a warning, not the run."""
        try:
            kept = {key: self._file_of(uploads, upload) for key, upload in uploads.all().items()}
            index = {
                "version": VERSION,
                "model": self._model,
                "settings": self._settings,
                "round": server_round,
                "changed": uploads.changed,
                "uploads": {
                    key: asdict(upload) | {"file": kept[key]}
                    for key, upload in uploads.all().items()
                },
                "merged": None if merged is None else self._write(merged),
                "shares": list(shares),
                "stages": list(stages),
                "traces": sorted(uploads.traces),
            }
            write_atomic(self.folder / INDEX, (json.dumps(index, indent=1) + "\n").encode())
            self._files = {upload: kept[key] for key, upload in uploads.all().items()}
            means = (upload.mean for upload in uploads.all().values())
            named = {*kept.values(), *means, str(index["merged"] or "")} - {""}
            for name in self._named - named:
                (self.folder / f"{name}.safetensors").unlink(missing_ok=True)
            self._named = named
        except OSError as error:
            log.warning("the server's memory of its nodes could not be saved: %s", error)

    def load(self) -> tuple[Uploads, State | None]:
        """Return what the last round left; nothing where there is nothing that fits.

        Rounds are counted back from 0, the last one.
        """
        uploads = Uploads()
        try:
            index = json.loads((self.folder / INDEX).read_bytes())
            if (index["version"], index["model"]) != (VERSION, self._model):
                raise ValueError("it is of another model or version")
            shares = [float(share) for share in index.get("shares", [])]
            stages = [str(key) for key in index.get("stages", [])]
            traces = {int(node) for node in index.get("traces", [])}
            barycenter = str(index["merged"] or "")
            named, found = {barycenter}, {}
            for key, entry in index["uploads"].items():
                file = str(entry.pop("file"))
                named |= {file, str(entry.get("mean", ""))}
                upload = Upload(**entry | {"labels": tuple(entry.get("labels", ()))})
                found[key] = replace(upload, round=upload.round - index["round"]), file
            for name in (*named, *stages):  # they are deleted one day
                if not NAME.fullmatch(name):
                    raise ValueError(f"{name[:100]!r} is no name of its files")
        except FileNotFoundError:
            return uploads, None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            with suppress(OSError):
                (self.folder / INDEX).replace(self.folder / "index.damaged")
            log.warning("the server's memory in %s is set aside: %s", self.folder, error)
            return uploads, None
        self.shares, self.stages = shares if len(shares) == len(found) else [], stages
        self._named = named - {""}
        merged = self._barycenter(barycenter, index.get("settings"))
        lost = merged is None and bool(barycenter)
        uploads.traces = traces
        for key, (upload, file) in found.items():
            try:
                state = self._read(file)
                mean = self._read(upload.mean) if upload.mean else None
            except (OSError, ValueError) as error:
                log.warning("the upload of node %s is left out: %s", key, error)
                lost = True
                if key != FOLDED and upload.in_model:
                    uploads.traces.add(int(key))
            else:
                uploads.restore(None if key == FOLDED else int(key), upload, state, mean)
                self._files[upload] = file
        uploads.changed = lost or bool(index["changed"])
        return uploads, merged

    def _barycenter(self, name: str, settings: object) -> State | None:
        """Return the barycenter of this name, if it can be read and has our settings."""
        if not name:
            return None
        try:
            if settings != self._settings:
                raise ValueError("it is of other settings")
            return self._read(name)
        except (OSError, ValueError) as error:
            log.warning("the barycenter in %s is made anew: %s", self.folder, error)
            return None

    def _file_of(self, uploads: Uploads, upload: Upload) -> str:
        """Return the file of what a node sent; what is merged in its place has the mean's name."""
        if upload in self._files:
            return self._files[upload]
        if (mean := uploads.mean(upload)) is not None:
            self._write(mean)
        return self._write(uploads.state(upload))

    def _write(self, state: State) -> str:
        name = digest(state)
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            save_tensors(path, state)
        return name

    def _read(self, name: str) -> State:
        path = self.folder / f"{name}.safetensors"
        try:
            found, _ = load_tensors(path)
            if digest(found) != name:
                raise StorageError(f"{name[:12]} in {self.folder} holds other arrays")
        except StorageError:
            with suppress(OSError):  # out of the way of `_write`, which writes what is missing
                path.replace(path.with_suffix(".damaged"))
            raise
        return found
