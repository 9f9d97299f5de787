"""Pictures, result files, progress and the final table."""

from __future__ import annotations

import errno
import io
import json
import logging
import math

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from PIL import Image
from torch import Tensor, nn

from fl_wb.app.config import compose
from fl_wb.app.results import Results
from fl_wb.messages import records
from fl_wb.reporting import progress as progress_module
from fl_wb.reporting import tracker as tracker_module
from fl_wb.reporting.pictures import sample_grid
from fl_wb.reporting.progress import progress
from fl_wb.reporting.tables import summary_table
from fl_wb.reporting.tracker import Tracker


def picture(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


@pytest.fixture
def lines(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    caplog.set_level(logging.INFO, logger="flwr")
    return caplog


def events_of(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return events


def test_grid_shows_small_samples_large():
    samples = torch.full((5, 1, 8, 8), -1.0)
    samples[4] = 1
    pixels = picture(sample_grid(samples, columns=3))
    assert pixels.shape == (2 + 2 * 34, 2 + 3 * 34, 3)
    assert (pixels[2:34, 2:34] == 0).all()  # the first
    assert (pixels[36:68, 36:68] == 255).all()  # the fifth


def test_grid_keeps_pixels_and_colours():
    sample = torch.linspace(-1, 1, 3 * 40 * 36).reshape(1, 3, 40, 36)
    pixels = picture(sample_grid(sample))
    expected = ((sample[0] + 1) * 127.5).round().permute(1, 2, 0).numpy()
    assert np.array_equal(pixels[2:42, 2:38], expected)


def test_titled_rows_have_a_margin_with_text():
    one = torch.ones(20, 1, 8, 8)
    pixels = picture(sample_grid({"source 0": one, "barycenter \N{GREEK SMALL LETTER NU}": one}, 4))
    assert pixels.shape[0] == 2 + 2 * 34
    margin = pixels.shape[1] - 4 * 34
    assert margin > 30
    assert pixels[:, :margin].min() < 128


@pytest.mark.parametrize("channels", [2, 5])
def test_any_number_of_channels_and_broken_values_are_drawn(channels):
    sample_grid(torch.full((2, channels, 4, 4), math.nan))


@pytest.mark.parametrize(
    "samples",
    [torch.zeros(3, 2), torch.zeros(0, 1, 8, 8), {}, {"a": torch.zeros(0, 1, 8, 8)}],
)
def test_what_is_no_image_is_refused(samples):
    with pytest.raises(ValueError, match="only images"):
        sample_grid(samples)


def test_tracker_leaves_events_pictures_and_json(tmp_path):
    tracker = Tracker(tmp_path / "run")
    tracker.scalar("loss", 0.5, 1)
    tracker.scalar("loss", 0.25, 2)
    tracker.images("sources", torch.zeros(4, 1, 8, 8), columns=2)
    values = {"w1": 1.5, "memorization": math.nan, "list": [torch.tensor(math.inf), np.float32(2)]}
    tracker.write_json("metrics.json", {"bary": values, 3: tmp_path})
    tracker.close()
    events = events_of(tmp_path / "run")
    assert [(point.step, point.value) for point in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
    assert events.Tags()["images"] == ["sources"]
    assert (tmp_path / "run" / "sources.png").is_file()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text()) == {
        "bary": {"w1": 1.5, "memorization": None, "list": [None, 2.0]},
        "3": str(tmp_path),
    }


def test_full_disk_costs_the_artefact_not_the_run(tmp_path, monkeypatch, lines):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    tracker = Tracker(tmp_path)
    monkeypatch.setattr(tracker_module, "write_atomic", full)
    monkeypatch.setattr(tracker._events, "add_scalar", full)
    for step in range(3):
        tracker.scalar("loss", 0.5, step)
    tracker.images("sources", torch.zeros(4, 1, 8, 8))
    with pytest.raises(OSError, match=r"metrics\.json cannot be written: .*No space left"):
        tracker.write_json("metrics.json", {})
    tracker.close()
    assert not list(tmp_path.glob("*.png")) + list(tmp_path.glob("*.json"))
    warnings = [record.getMessage() for record in lines.records]
    assert len(warnings) == 2  # the events' once
    assert all("No space left" in warning for warning in warnings)


def test_samples_that_are_no_images_cost_only_the_picture(tmp_path, lines):
    tracker = Tracker(tmp_path)
    tracker.images("sources", torch.zeros(4, 2))
    tracker.close()
    assert "sources.png" in lines.text


def test_progress_logs_every_few_seconds_and_at_the_end(monkeypatch, lines):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    show = progress("adapting")
    for _ in range(2):  # one callback serves one training after the other
        for done in range(1, 21):
            show(done, 20, {"critic": -0.5})
            now[0] += 1
    found = [record.getMessage() for record in lines.records]
    assert len(found) == 8
    assert found[3] == "adapting: 20/20, 19 s, critic -0.500"
    assert found[7] == found[3]
    assert not any("\r" in line for line in found)


def test_progress_counts_the_seconds_of_a_training_that_was_resumed(monkeypatch, lines):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    show = progress("merging")
    now[0] = 60.0  # until it has something to show
    for done in (17, 18, 20):
        show(done, 20, {})
        now[0] += 1
    found = [record.getMessage() for record in lines.records]
    assert found == ["merging: 17/20, 0 s", "merging: 20/20, 2 s"]


def test_progress_draws_a_bar_on_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(progress_module.sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    show = progress("merging")
    for _ in range(2):
        for done in range(1, 4):
            show(done, 3, {"critic": 1.0})
    assert "merging" in terminal.getvalue()
    assert "100%" in terminal.getvalue()
    assert not show.progress.live.is_started


def test_table_is_aligned_and_says_which_way_is_better():
    table = summary_table(
        {
            "barycenter": {"w1": 3.14159, "frechet": 1234.5, "kid": 0.00012, "coverage": 0.8},
            "adapted, target 0": {"w1": 3, "coverage": math.nan, "seconds": 4.2},
        }
    )
    assert table.splitlines() == [
        "                      w1  frechet    kid  coverage  seconds",
        "-----------------------------------------------------------",
        "barycenter         3.142     1234  1e-04     0.800        -",
        "adapted, target 0  3.000        -      -         -    4.200",
        "lower is better: w1, frechet, kid",
        "higher is better: coverage",
    ]


def test_table_of_nothing():
    assert "\n" in summary_table({})


class Halves(nn.Module):
    """Black images of one half of its latents, and white ones of the other."""

    latent_dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, z: Tensor) -> Tensor:
        return self.one * z[:, :1].sign().view(-1, 1, 1, 1).expand(-1, 1, 8, 8)


def test_each_sources_cell_has_a_row_under_the_sources_own_name(tmp_path):
    # Prepare: node 7 is source 2, and has the second cell
    results = Results(Tracker(tmp_path), compose(), Halves)
    results._name("source", 7, RecordDict({"info": ConfigRecord({"partition": 2})}))

    # Execute
    results.cells(records.to_arrays(Halves()), [0.5, 0.5], {7: 1, 4: 0})
    results.tracker.close()

    # Assert
    assert list(results._album.samples["cell"]) == ["2", "4"]
    pixels = picture((tmp_path / "cells.png").read_bytes())[:, -12 * 34 :]
    assert (pixels[2:34, 0:32] == 255).all() and (pixels[36:68, 0:32] == 0).all()


def test_of_very_many_sources_the_first_are_drawn_and_all_are_counted(tmp_path, monkeypatch):
    # Prepare: fifty nodes, of which node 100 - k is source k
    loaded = []
    load = records.load
    monkeypatch.setattr(records, "load", lambda *given: loaded.append(given) or load(*given))
    uploads = {
        100 - k: RecordDict(
            {
                "model": records.to_arrays(Halves()),
                "info": ConfigRecord({"partition": k}),
                "metrics": MetricRecord({"num-examples": k + 1}),
            }
        )
        for k in range(50)
    }
    results = Results(Tracker(tmp_path), compose(), Halves)

    # Execute
    results.train(1, uploads)
    results.cells(records.to_arrays(Halves()), [1.0] * 50, {100 - k: k for k in range(50)})
    results.tracker.close()

    # Assert
    first = [str(k) for k in range(32)]
    assert list(results._album.samples["source"]) == first
    assert list(results._album.samples["cell"]) == first
    assert len(loaded) == 32 + 1
    assert {*results.sources} == {str(k) for k in range(50)}


def test_no_code_no_picture_of_cells(tmp_path):
    results = Results(Tracker(tmp_path), compose(), Halves)
    results.cells(records.to_arrays(Halves()), [], {})
    results.tracker.close()
    assert not (tmp_path / "cells.png").exists()


def test_each_target_has_the_bytes_of_its_own_ternary_generator(tmp_path):
    results = Results(Tracker(tmp_path), compose(), Halves)
    results.targets = {"0": {"ternary/w1": 1.0}, "1": {"ternary/w1": 2.0}}
    results._ternary = {"0": 4000, "1": 5000}
    rows = results._rows_of({"ternary": {"w1": 1.5}}, 9000)
    results.tracker.close()
    assert rows == {
        "ternary, target 0": {"w1": 1.0, "kB": 4.0},
        "ternary, target 1": {"w1": 2.0, "kB": 5.0},
    }
