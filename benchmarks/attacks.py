"""Attacks on a run: does it end well, what is lost, what does it cost, and who sees it.

    python -m benchmarks.attacks

Eight sources of real digits, of five classes each, and two targets, in one process; screening is
on. One source (or two, where the table says so) or one target attacks, everybody else is honest.
Each attack is a run in a process of its own, against the run without one. The table gives what is
missing of the honest nodes' results, the peak memory above the honest run, the energy distance of
the barycenter to digits in units of the honest run's, and the first warning that the honest run
has not: an attack of which nothing is said is not seen. The command fails where a run does not end
well, loses results, takes 500 MB more, or is 1.5 times worse by an attack that is seen.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import multiprocessing
import resource
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ConfigRecord, Context, Error, Message, RecordDict
from torch import Tensor, nn

from benchmarks.hostile import SOURCES, collapsed, inverted, marked, noise
from fl_wb.app.config import compose, to_run_config
from fl_wb.app.factories import factories
from fl_wb.app.schema import Config
from fl_wb.client_app import app
from fl_wb.clients.training import train_source
from fl_wb.data import datasets
from fl_wb.generators.copies import seeded
from fl_wb.generators.sampling import generate
from fl_wb.messages import keys, records
from fl_wb.metrics import energy_distance
from fl_wb.persistence.tensor_files import load_tensors
from fl_wb.server_app import app as server_app
from fl_wb.testing.in_process_grid import InProcessGrid

Spoil = Callable[[RecordDict], None]
"""Changes, in place, what an honest node would have sent."""

OTHER, SOURCE, TARGET = 17, 18, 20  # the attackers' node ids; 11 to 18 are sources
SETTINGS = (
    f"data.sources={SOURCES['overlapping']}",
    "data.targets=[[0,1,2,3,4,5,6,7,8,9],[0,1,2,3,4,5,6,7,8,9]]",
    "strategy.screening=3",
    "client.source.iterations=200",
    "strategy.stage.distillation.iterations=150",
    "strategy.stage.training.iterations=30",
    "client.features=pixels",
    "client.adaptation.training.iterations=2",
    "client.adaptation.training.warmup=2",
    "client.adaptation.transport.iterations=4",
    "client.ternarization.iterations=4",
    "client.evaluation.most=200",
)
MEMORY, WORSE = 500e6, 1.5
SAMPLES = 1000


# What a target may send


def metric(name: str, value: Any) -> Spoil:
    """Set a metric."""
    return lambda content: content.metric_records[keys.METRICS].update({name: value})


def said(name: str, value: Any) -> Spoil:
    """Set an entry of what a node says beside arrays and metrics."""
    return lambda content: content.config_records[keys.INFO].update({name: value})


def picture(*shape: int, name: str = "adapted", declared: tuple[int, ...] | None = None) -> Spoil:
    """Send a picture of a shape, which may say that it has another."""

    def spoil(content: RecordDict) -> None:
        array = Array(np.zeros(shape, np.float32))
        if declared is not None:
            array = Array("float32", declared, "numpy.ndarray", array.data)
        content.array_records[keys.SAMPLES][name] = array

    return spoil


def renamed(key: str) -> Spoil:
    """Send a record under another key."""

    def spoil(content: RecordDict) -> None:
        content["something-of-mine"] = content[key]
        del content[key]

    return spoil


EVALUATE: dict[str, Spoil] = {
    "another key": renamed(keys.SAMPLES),
    "no metrics": lambda c: c.pop(keys.METRICS),
    "a list": metric("adapted/w1", [1.0, 2.0]),
    "nan": metric("adapted/w1", math.nan),
    "infinite": metric("adapted/w1", math.inf),
    "huge": metric("adapted/w1", 1e308),
    "a long name": metric("x" * 1000, 1.0),
    "many names": lambda c: c.metric_records[keys.METRICS].update(
        {str(i): 1.0 for i in range(20_000)}
    ),
    "a long list": metric("x", [0.0] * 200_000),
    "many records": lambda c: c.update({str(i): ConfigRecord() for i in range(20)}),
    "bytes for a partition": said(keys.PARTITION, b"0"),
    "the partition of another": said(keys.PARTITION, 0),
    "a ternary text": said(keys.TERNARY, "abc"),
    "a ternary of garbage": said(keys.TERNARY, b"FLWBTERN" * 9),
    "a ternary of megabytes": said(keys.TERNARY, bytes(5_000_000)),
    "a curve of texts": said("curve/w1", ["a"]),
    "a curve of bytes": said("curve/w1", b"a"),
    "a 0-d picture": picture(),
    "a wide picture": picture(1, 1, 1, 100_000),
    "many pictures": picture(500, 1, 8, 8),
    "a picture of a lie": picture(2, 1, 8, 8, declared=(3, 1, 8, 8)),
    "a picture of no step": picture(1, 1, 8, 8, name="../../x"),
}


# What a source may send


def generator_of(network: nn.Module) -> Spoil:
    """Send another generator."""
    return lambda content: content.update({keys.ARRAYS: records.to_arrays(network)})


def of_its_own(change: Callable[[nn.Module], nn.Module], network: Callable[[], nn.Module]) -> Spoil:
    """Send what becomes of the node's own generator."""

    def spoil(content: RecordDict) -> None:
        own = records.load(content.array_records[keys.ARRAYS], network())
        content[keys.ARRAYS] = records.to_arrays(change(own))

    return spoil


def array(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Spoil:
    """Change one array of the generator."""

    def spoil(content: RecordDict) -> None:
        arrays = content.array_records[keys.ARRAYS]
        arrays[name] = Array(change(arrays[name].numpy()))

    return spoil


def constant(network: nn.Module) -> nn.Module:
    """Return a generator of one picture."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.zero_()
    return network


def rarely_nan(network: nn.Module) -> nn.Module:
    """Return a generator that is well where z_0 < 3.3, and nan beyond: one latent in 2,000."""
    first, normalisation, _, second = list(network.net)[:4]  # type: ignore[arg-type]
    with torch.no_grad():
        first.weight[0] = 1e30 * (torch.arange(first.in_features) == 0)
        normalisation.running_mean[0], normalisation.running_var[0] = 3.3e30, 1.0
        normalisation.weight[0], normalisation.bias[0] = 1.0, 0.0
        second.weight[:, 0] = 1e30
    return network


@dataclass(frozen=True)
class Attack:
    """What is done to the replies of one kind, of one attacker or more.

    Attributes
    ----------
    kind
        Type of the message that is answered.
    spoil
        Changes the answer's content.
    nodes
        Who attacks.
    error
        In place of the answer: an error with this text.
    """

    kind: str
    spoil: Spoil = lambda content: None
    nodes: tuple[int, ...] = (SOURCE,)
    error: str = ""


def attacks(config: Config) -> dict[str, Attack]:
    """Return all attacks by name."""
    network, critic = factories(config)

    def trained(change: Callable[[Tensor], Tensor]) -> Spoil:
        def spoil(content: RecordDict) -> None:
            images = change(datasets.source_samples(config.data, SOURCE - 11).images.clone())
            start, settings = seeded(network, 0), config.client.source
            made = train_source(start, critic, images, settings, seed=5)[0].generator
            content[keys.ARRAYS] = records.to_arrays(made)

        return spoil

    def uploads(change: Callable[[nn.Module], nn.Module]) -> Spoil:
        return of_its_own(change, network)

    first = "net.0.weight"
    return {
        "a model under another key": Attack("train", renamed(keys.ARRAYS)),
        "no model": Attack("train", lambda c: c.pop(keys.ARRAYS)),
        "no metrics with it": Attack("train", lambda c: c.pop(keys.METRICS)),
        "a metric that is a list": Attack("train", metric("generator-loss", [1.0])),
        "an array missing": Attack("train", lambda c: c.array_records[keys.ARRAYS].pop(first)),
        "an array of another shape": Attack("train", array(first, lambda v: v.T.copy())),
        "an array that is not finite": Attack("train", array(first, lambda v: v * np.nan)),
        "`num-examples` of 1e12": Attack("train", metric(keys.WEIGHT, 1e12)),
        "`num-examples` of 1e308, twice": Attack(
            "train", metric(keys.WEIGHT, 1e308), (OTHER, SOURCE)
        ),
        "`num-examples` of -1": Attack("train", metric(keys.WEIGHT, -1)),
        "constant": Attack("train", uploads(constant)),
        "nan where z_0 > 3.3": Attack("train", uploads(rarely_nan)),
        "nan where z_0 > 3.3, twice": Attack("train", uploads(rarely_nan), (OTHER, SOURCE)),
        "untrained": Attack("train", generator_of(seeded(network, 99))),
        "random pixels": Attack("train", uploads(lambda net: noise(net, 1))),
        "inverted": Attack("train", uploads(inverted)),
        "collapsed": Attack("train", uploads(collapsed)),
        "half the ink": Attack("train", trained(lambda x: (x + 1) / 2 - 1)),
        "three quarters of the ink": Attack("train", trained(lambda x: (x + 1) * 0.75 - 1)),
        "nine tenths of the ink": Attack("train", trained(lambda x: (x + 1) * 0.9 - 1)),
        "a mark on 80% of its samples": Attack("train", trained(marked)),
        "a mark on 20% of its samples": Attack("train", trained(lambda x: marked(x, 0.2))),
        "a mark on 5% of its samples": Attack("train", trained(lambda x: marked(x, 0.05))),
        "a mark in the middle of 80%": Attack("train", trained(lambda x: marked(x, 0.8, 3))),
        "an error in training": Attack("train", error="No query function registered"),
        "a target's role is an error": Attack(
            "query", nodes=(TARGET,), error="No query function registered"
        ),
        "a target says it is a source": Attack(
            "query", lambda c: c.config_records[keys.CONFIG].update(role="source"), (TARGET,)
        ),
        "a role that there is not": Attack(
            "query", lambda c: c.config_records[keys.CONFIG].update(role="boss")
        ),
        "an error in evaluation": Attack("evaluate", nodes=(TARGET,), error="no"),
        **{f"evaluation: {k}": Attack("evaluate", v, (TARGET,)) for k, v in EVALUATE.items()},
    }


class Attacked(InProcessGrid):
    """A grid some of whose nodes attack; sources train once and keep their generators."""

    def __init__(self, config: Mapping[str, Any], cache: Path, attack: Attack) -> None:
        super().__init__(app, run_config=config)
        self.attack = attack
        for index in range(8):
            self.add({"role": "source", "partition-id": index, "cache": str(cache)})
        for index in range(2):
            self.add({"role": "target", "partition-id": index})

    def send_and_receive(self, messages: Any, *, timeout: float | None = None) -> list[Message]:
        """Spoil the attackers' replies."""
        sent = {message.metadata.dst_node_id: message for message in messages}
        replies = super().send_and_receive(sent.values(), timeout=timeout)
        return [self._spoiled(reply, sent[reply.metadata.src_node_id]) for reply in replies]

    def _spoiled(self, reply: Message, asked: Message) -> Message:
        attack = self.attack
        if reply.metadata.src_node_id not in attack.nodes:
            return reply
        if asked.metadata.message_type != attack.kind or reply.has_error():
            return reply
        if attack.error:
            return Message(Error(1, attack.error), reply_to=asked)
        attack.spoil(reply.content)
        return reply


@dataclass
class Outcome:
    """What came of a run."""

    ended: str  # "" if well, else the exception
    lost: list[str]
    memory: int  # bytes
    energy: float
    said: list[str]  # in warnings


class Heard(logging.Handler):
    """Keeps warnings."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.texts.append(record.getMessage())


def run(attack: Attack, cache: Path, output: Path, real: Tensor) -> Outcome:
    """Run the app under an attack."""
    heard, ended = Heard(), ""
    logger = logging.getLogger("flwr")
    logger.handlers[:] = [heard]
    config = replace(compose(SETTINGS), output=str(output))
    words = to_run_config(config, SETTINGS)
    try:
        server_app(Attacked(words, cache, attack), Context(7, 1, {}, RecordDict(), words))
        found = json.loads((output / "metrics.json").read_text(encoding="utf-8"))
        network = factories(config)[0]()
        network.load_state_dict(load_tensors(output / "barycenter.safetensors")[0])
        energy = energy_distance(generate(network, SAMPLES), real)
    except Exception as error:
        ended, found, energy = f"{type(error).__name__}: {error}", {}, math.nan
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    honest = {("sources", str(k)) for k in range(8)} | {("targets", str(k)) for k in range(2)}
    honest -= {
        ("sources", str(n - 11)) if n < 19 else ("targets", str(n - 19)) for n in attack.nodes
    }
    lost = [f"{kind} {name}" for kind, name in sorted(honest) if name not in found.get(kind, {})]
    for step, figures in found.get("final", {}).items():
        lost += [f"{step}/{k}" for k, v in figures.items() if k == "w1" and not np.isfinite(v)]
    return Outcome(ended, lost, memory, energy, heard.texts)


def in_a_process_of_its_own(*arguments: Any) -> Outcome:
    """Return what `run` does, in a process whose memory counts for itself."""

    def work(end: Connection) -> None:
        torch.set_num_threads(1)
        end.send(asdict(run(*arguments)))

    ours, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=work, args=(its,))
    process.start()
    its.close()
    try:
        return Outcome(**ours.recv())
    except EOFError:  # it died
        return Outcome(f"exit code {process.exitcode}", ["everything"], 0, math.nan, [])
    finally:
        process.join()


def main() -> None:
    """Run the attacks and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="attacks whose name holds this")
    given = parser.parse_args()
    torch.set_num_threads(1)
    config, failed = compose(SETTINGS), False
    images = datasets.load(config.data)[0].images
    real = images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:SAMPLES]]
    with tempfile.TemporaryDirectory() as folder:
        cache, output = Path(folder) / "cache", Path(folder) / "output"
        honest = in_a_process_of_its_own(Attack("none"), cache, output / "honest", real)
        print(f"honest run: {honest.memory / 1e6:.0f} MB, energy distance {honest.energy:.4f}\n")
        print("| attack | run | lost | memory, MB | energy | what the server says |")
        print("|---|---|---|---|---|---|")
        for name, attack in attacks(config).items():
            if given.only not in name:
                continue
            found = in_a_process_of_its_own(attack, cache, output / name.replace("/", " "), real)
            more, times = found.memory - honest.memory, found.energy / honest.energy
            said = next((text for text in found.said if text not in honest.said), "")
            spoiled = not times <= WORSE and said  # seen, and yet
            failed |= bool(found.ended or found.lost or more > MEMORY or spoiled)
            print(
                f"| {name} | {found.ended or 'ended well'} | {', '.join(found.lost) or '-'} | "
                f"{more / 1e6:+.0f} | {times:.2f} | {said[:110] or 'nothing'} |",
                flush=True,
            )
    sys.exit(failed)


if __name__ == "__main__":
    main()
