"""Configuration: the same on both sides, and refused with a name where it is wrong."""

from __future__ import annotations

import shlex
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra

from fl_wb.app.config import compose, from_run_config, new_folder, to_run_config
from fl_wb.app.overrides import ConfigError
from fl_wb.app.schema import Config

CONF = Path(__file__).parents[1] / "conf"


def test_defaults_are_those_of_the_dataclasses() -> None:
    assert compose() == Config()


def test_one_string_and_a_list_mean_the_same() -> None:
    overrides = ["experiment=non_overlapping", "seed=3", "data.root='/a folder, oddly named'"]

    config = compose(overrides)

    assert compose(shlex.join(overrides)) == config
    assert config.seed == 3
    assert config.data.targets == [[8, 9]]
    assert config.data.root == "/a folder, oddly named"


def test_server_and_clients_compose_the_same_from_the_run_config(tmp_path: Path) -> None:
    run_config = {
        "overrides": "strategy=fedavg client.source.iterations=7",
        "output": str(tmp_path),
    }

    server, client = from_run_config(run_config), from_run_config(dict(run_config))

    assert server == client
    assert (server.strategy.name, server.client.source.iterations) == ("fedavg", 7)
    assert server.output == str(tmp_path)
    server.data.targets.clear()  # what one does with it is nothing to the others
    assert from_run_config(run_config) == client != server
    assert from_run_config({**run_config, "overrides": "seed=3"}).seed == 3


@pytest.mark.parametrize(
    "overrides",
    [
        "network=conv strategy=paper experiment=unequal client.source.critic_lr=1e-5",
        "strategy=full_data data.targets=[[3,1],[1]] output=/out",
        'data.name=images data.root="\'/a, b/日本 (1)/it\\\'s \\"so\\"\'"',
    ],
)
def test_a_run_config_carries_a_whole_configuration(overrides: str) -> None:
    config = compose(overrides)

    carried = to_run_config(config, ["in=the", "user's words"])

    assert from_run_config(carried) == config
    assert from_run_config({**carried, "output": "/else"}).output == "/else"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("seed: 1", "must be a configuration in JSON"),
        ('{"sed": 1}', "'sed'"),
        ('{"seed": "a"}', "seed must be an integer"),
        ('{"client": {"source": {"ema": 7}}}', "client.source.ema=7.0 must be at least 0 and less"),
    ],
)
def test_a_carried_configuration_is_checked(config: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_run_config({"config": config})


def test_no_two_runs_get_one_folder(tmp_path: Path) -> None:
    wanted = str(tmp_path / "2026-01-01" / "12-00-00")

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(new_folder, [wanted] * 16))

    assert len(set(made)) == 16
    assert wanted in made
    assert all(Path(folder).is_dir() for folder in made)


@pytest.mark.parametrize(
    "run_config",
    [{"output": "results"}, {"overrides": "output=results"}, {"overrides": "data.root=digits"}],
)
def test_folders_of_a_run_are_absolute(run_config: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="must be an absolute folder"):
        from_run_config(run_config)


def test_data_sets_choose_their_network_unless_told_otherwise() -> None:
    assert compose(["data=mnist", "data.root=/x"]).network.generator == "conv"
    assert compose(["data=mnist", "data.root=/x", "network=mlp"]).network.generator == "mlp"


def test_every_file_of_conf_composes() -> None:
    for file in CONF.glob("*/*.yaml"):
        compose([f"{file.parent.name}={file.stem}", "data.root=/x"])


def test_hydra_may_be_initialised_already() -> None:
    with hydra.initialize_config_module("fl_wb.conf", version_base="1.3"):
        before = GlobalHydra.instance().hydra
        compose("seed=1")
        assert GlobalHydra.instance().hydra is before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        # unknown keys and options
        ("sed=1", r"no key 'sed'; did you mean 'seed'\?"),
        ("client.source.iteratons=1", r"did you mean 'client.source.iterations'\?"),
        ("client.source.steps=1", "the keys of client.source are: batch_size, critic_lr, "),
        ("+seed=1", "keys cannot be added or removed"),
        ("~seed", "keys cannot be added or removed"),
        ("data=mnits", "data='mnits' must be one of: cifar10, .*, mnist; did you mean 'mnist'"),
        (
            "experiment=none",
            "must be one of: dirichlet, mixed, non_overlapping, overlapping, resembling, "
            "stream, three_sources, two_targets, unequal",
        ),
        ("client.source=3", "client.source is a group; its keys are: batch_size, "),
        ("hydra.run.dir=x", "no key 'hydra.run.dir'"),
        # ill-typed values
        ("seed=abc", "seed=abc must be an integer"),
        ("seed=1.5", "seed=1.5 must be an integer"),
        ("seed=null", "seed=null must be an integer"),
        ("client.source.critic_lr=fast", "client.source.critic_lr=fast must be a number"),
        ("network.width=wide", "network.width=wide must be an integer or null"),
        (
            "data.sources=[[0,one]]",
            r"=\[\[0,one\]\] must be a list of lists of integers",
        ),
        ("data.sources=3", "data.sources=3 must be a list of lists of integers"),
        # out of range
        ("seed=-1", "seed=-1 must be at least 0"),
        ("data.seed=-1", "data.seed=-1 must be at least 0"),
        ("client.adaptation.training.iterations=-1", "iterations=-1 must be at least 0"),
        ("client.source.critic_lr=0", "critic_lr=0.0 must be more than 0"),
        ("client.source.ema=1", "ema=1.0 must be at least 0 and less than 1"),
        ("data.held_out=1", "held_out=1.0 must be more than 0 and less than 1"),
        ("data.samples_per_class=0", "samples_per_class=0 must be at least 1"),
        ("data.targets=[]", r"data.targets=\[\] must be a list with the classes of each node"),
        ("data.targets=[[]]", "at least one node and one class each"),
        ("seed=-1 rounds=0", "seed=-1 must be at least 0; rounds=0 must be at least 1"),
        # unknown names
        ("strategy.stage.geodesic=line", "'line' must be one of: two_critics, mixture, displacem"),
        ("strategy.stage.start=cold", "start='cold' must be one of: distilled, previous"),
        ("client.adaptation.method=x", "method='x' must be one of: variation, transport, plain"),
        ("network.generator=unet", "generator='unet' must be one of: mlp, conv, dcgan"),
        ("device=gpu", "device='gpu' must be cpu, mps, cuda, or one CUDA device"),
        ("data=mnist", "data.root must be given"),
        # settings that contradict each other
        ("strategy.stage.geodesic=two_critics", "'two_critics' must have training.iterations of 1"),
        (
            "strategy=transfer strategy.source=2",
            "source=2 must be less than 2, the number of sources",
        ),
        ("strategy.critic=true", "strategy.critic=true is for strategy=transfer"),
        ("strategy.source=1", "strategy.source=1 is for strategy=transfer, not adaptive_coales"),
        ("strategy=fedavg strategy.screening=3", "screening=3.0 is for strategy=adaptive_coales"),
        ("data.source_samples_per_class=[9]", "one number for each of the 2 sources"),
        ("data.source_samples_per_class=[9,0]", "a list with one number, 1 or more, for each"),
        ("client.ternarize=often", "client.ternarize=often must be true or false"),
        # no overrides at all
        ("seed", "'seed' is no override; write key=value"),
        ("data.sources=[[0,1]", r"'data.sources=\[\[0,1\]' cannot be read"),
        ("seed=1,2", "is a sweep, which is for `fl-wb -m`"),
        ("seed='1", "No closing quotation"),
    ],
)
def test_wrong_settings_are_refused_by_name(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose(overrides)


ODD = ["archive (1)", "a=b", "it's", "a&b", "né w", "日本", "a#b", "[x]", "a,b", "{a}", "~x", "a;b"]


@pytest.mark.parametrize("name", [*ODD, "true", "2024_05"])
def test_a_text_of_other_meaning_is_refused_with_its_quotation(name: str) -> None:
    with pytest.raises(ConfigError, match=r"a text .*quoted: ") as error:
        compose([f"data.root={name}"])

    assert compose(str(error.value).rpartition("quoted: ")[2]).data.root == name
