"""A swap is a swap: an app written without FL-WB runs with our strategy, and with our mod."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.serverapp.strategy import Result

from fl_wb.testing.in_process_grid import InProcessGrid

SOURCE = Path(__file__).with_name("plain_flower_app.py").read_text(encoding="utf-8")

STRATEGY = "FedAvg(fraction_train=1.0, min_available_nodes=2)"
SWAPPED = """AdaptiveCoalescence(
        fraction_train=1.0, min_available_nodes=2,
        generator=Generator, critic=Critic, latent_dim=LATENT, stage=STAGE)"""
MOD = """ClientApp(mods=[FastAdaptation(
    Generator, lambda context: load_points(context)[:5], latent_dim=LATENT,
    adaptation=ADAPTATION, ternarization=TERNARIZATION)])"""


def run(*edits: tuple[str, str], imports: str = "") -> Result:
    """Run the app with its text edited, on two nodes."""
    text = SOURCE
    for old, new in edits:
        assert text.count(old) == 1
        text = text.replace(old, new)
    module = ModuleType("edited_app")
    exec(compile(imports + text, "edited_app", "exec"), module.__dict__)
    torch.manual_seed(0)
    grid = InProcessGrid(module.client_app, nodes=2)
    module.server_app(grid, Context(7, 1, {}, RecordDict(), {}))
    result = module.final["result"]
    assert isinstance(result, Result)
    return result


def test_the_app_knows_nothing_of_fl_wb() -> None:
    assert "fl_wb" not in SOURCE
    metrics = run().evaluate_metrics_clientapp[2]
    assert metrics["distinct-weights"] == 48


def test_the_strategy_is_replaced_and_nothing_else() -> None:
    result = run(
        (STRATEGY, SWAPPED),
        imports="from fl_wb.strategies import AdaptiveCoalescence\nfrom tests.toys import STAGE\n",
    )
    for server_round in (1, 2):
        trained = result.train_metrics_clientapp[server_round]
        assert trained["uploads-merged"] == 2
        assert trained["uploads-dropped"] == 0
        assert "train_loss" in trained
        assert "distance" in result.evaluate_metrics_clientapp[server_round]


@pytest.mark.parametrize("swapped", [False, True])
def test_the_mod_makes_the_apps_own_evaluate_see_a_ternary_generator(swapped: bool) -> None:
    edits = [("ClientApp()", MOD)] + ([(STRATEGY, SWAPPED)] if swapped else [])
    result = run(
        *edits,
        imports="from fl_wb.clients import FastAdaptation\n"
        "from fl_wb.strategies import AdaptiveCoalescence\n"
        "from tests.toys import ADAPTATION, STAGE, TERNARIZATION\n",
    )
    metrics = result.evaluate_metrics_clientapp[2]
    assert metrics["distinct-weights"] <= 3**2  # of two ternary planes at most
    # Training saw the messages as they were:
    assert "train_loss" in result.train_metrics_clientapp[2]
