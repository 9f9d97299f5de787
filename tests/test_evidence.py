"""The comparison's folder: results of two versions are never mixed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.evidence import check_version
from fl_wb.app.config import compose
from fl_wb.app.provenance import provenance


def test_a_result_of_another_version_is_refused(tmp_path: Path) -> None:
    config, result = compose("data=digits seed=3"), tmp_path / "metrics.json"
    made_by = provenance(config)
    assert made_by["seeds"] == {"run": 3, "data": config.data.seed}
    result.write_text(json.dumps({"made-by": made_by}))
    check_version(result, config)
    for other in ({}, {"made-by": {**made_by, "algorithm": 0}}):
        result.write_text(json.dumps(other))
        with pytest.raises(SystemExit, match="use another --output"):
            check_version(result, config)
