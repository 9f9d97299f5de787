"""Speed: the stage against the reference loop, time to quality, the floor, the ternary generator.

    python -m benchmarks.speed loop|quality|floor|ternary [data=mnist data.root=FOLDER ...]

`loop`: seconds a generator iteration of each geodesic, and of the reference loop
(`benchmarks.reference_loop`: two critics, five steps each) on the same networks and batch, in turns
in one process. `quality`: seconds until the coverage and energy distance that the reference recipe
ends with (fresh critics, start at one source, then plain fine-tuning on the few samples) are
reached. `floor`: floating-point operations of an iteration over the machine's rate for large
matrices. `ternary`: ternarizing, packing, loading, and generating 1,000 samples. On the CPU with
one thread, in core seconds (`time.process_time`); with ``device=cuda``, wall-clock seconds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.quality import OVERLAPPING, Bench
from benchmarks.reference_loop import reference_loop
from fl_wb.barycenter import GEODESICS, Stage, recursive_barycenter
from fl_wb.generators.sampling import generate
from fl_wb.ternary import pack, ternarize, unpack
from fl_wb.training.wgan import Sampler, Training, resample, train_wgan

CRITIC_STEPS = 5
REPEATS = 3


def push_forward(generator: Callable[[Tensor], Tensor], latent_dim: int, batch: int) -> Sampler:
    """Sampler of a generator's samples; it is called with at most `batch` latents at a time."""

    @torch.no_grad()
    def draw(n: int, rng: torch.Generator) -> Tensor:
        z = torch.randn(n, latent_dim, generator=rng, device=rng.device)
        return torch.cat([generator(part) for part in z.split(batch)])

    return draw


class Clock:
    """Seconds of work on one device."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")

    def __call__(self, work: Callable[[], object]) -> float:
        """Return the seconds that `work` takes."""
        now = time.perf_counter if self.cuda else time.process_time
        self._wait()
        began = now()
        work()
        self._wait()
        return now() - began

    def median(self, work: Callable[[], object], times: int = 21) -> float:
        """Return the median over repetitions, after one that does not count."""
        work()
        return statistics.median(self(work) for _ in range(times))

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


class Speed:
    """The networks of one configuration, on its device."""

    def __init__(self, overrides: str) -> None:
        self.bench = Bench(f"{OVERLAPPING} {overrides}", 0)
        config = self.bench.config
        self.device, self.stage = config.device, config.strategy.stage
        self.dim, self.batch = config.network.latent_dim, self.stage.training.batch_size
        self.clock = Clock(self.device)

    def generators(self) -> list[nn.Module]:
        """Make two untrained generators: what they generate does not change what it costs."""
        return [self.bench.make_generator().to(self.device).eval() for _ in range(2)]

    def critics(self) -> list[nn.Module]:
        """Make two fresh critics."""
        return [self.bench.make_critic().to(self.device) for _ in range(2)]

    def training(self, iterations: int) -> Training:
        """Return the stage's training, with the steps of the reference loop."""
        return replace(
            self.stage.training, iterations=iterations, critic_steps=CRITIC_STEPS, warmup=0
        )

    def stage_seconds(self, stage: Stage, sources: list[nn.Module]) -> float:
        """Return the seconds of one stage."""
        critic = lambda: self.bench.make_critic().to(self.device)  # noqa: E731
        return self.clock(
            lambda: recursive_barycenter(sources, critic=critic, stage=stage, device=self.device)
        )

    def reference(self, sources: list[nn.Module], iterations: int) -> nn.Module:
        """Merge two sources by the reference loop."""
        return reference_loop(
            sources[0],
            self.critics(),
            [push_forward(source, self.dim, self.batch) for source in sources],
            iterations=iterations,
            batch_size=self.batch,
            critic_steps=CRITIC_STEPS,
            latent_dim=self.dim,
        )


def loop(speed: Speed, iterations: int = 100) -> None:
    """Print the ratio of seconds, reference loop to each of our stages, in turns."""
    sources, shipped = speed.generators(), speed.stage
    updates = shipped.distillation.iterations + shipped.training.iterations
    stages = {
        f"{geodesic}, WGAN alone": (
            Stage(geodesic, "previous", shipped.fidelity, training=speed.training(iterations)),
            iterations,
        )
        for geodesic in GEODESICS
    }
    stages["the shipped stage, a generator update"] = (shipped, updates)
    speed.reference(sources, 5)  # what a first call sets up does not count
    milliseconds: dict[str, list[float]] = {name: [] for name in ["the reference loop", *stages]}
    ratios: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(REPEATS):
        reference = speed.clock(lambda: speed.reference(sources, iterations)) / iterations
        milliseconds["the reference loop"].append(1000 * reference)
        for name, (stage, count) in stages.items():
            seconds = speed.stage_seconds(stage, sources) / count
            milliseconds[name].append(1000 * seconds)
            ratios[name].append(reference / seconds)
    for name, values in milliseconds.items():
        ratio = f"; {_spread(ratios[name])} times as fast" if name in ratios else ""
        print(f"- {name}: {_spread(values)} ms{ratio}", flush=True)


def quality(speed: Speed) -> None:
    """Print the reference recipe's end, and the seconds in which we get there."""
    bench, sources = speed.bench, speed.bench.sources()
    made: list[nn.Module] = []

    def recipe() -> None:
        start = speed.reference(sources, 800)
        few, critics = [resample(bench.few)], speed.critics()[:1]
        made.append(
            reference_loop(
                start, critics, few, iterations=800, batch_size=speed.batch, latent_dim=speed.dim
            )
        )

    seconds = speed.clock(recipe)
    goal = bench.of(made[0].eval())
    print(f"- the reference recipe: {_quality(goal)} in {seconds:.1f} s", flush=True)
    for iterations in (15, 30, 60, 125, 250, 500, 1000, 2000):
        distillation = replace(speed.stage.distillation, iterations=iterations)
        stage = replace(
            speed.stage,
            start="distilled",
            distillation=distillation,
            training=replace(speed.stage.training, iterations=0, warmup=0),
        )
        took = speed.clock(
            lambda stage=stage: made.append(  # type: ignore[misc]
                recursive_barycenter(sources, critic=bench.make_critic, stage=stage)
            )
        )
        ours = bench.of(made[-1])
        print(
            f"- a distilled start of {iterations} iterations: {_quality(ours)} in {took:.1f} s, "
            f"{seconds / took:.1f} times as fast",
            flush=True,
        )
        if ours["coverage"] >= goal["coverage"] and ours["energy"] <= goal["energy"]:
            return


def floor(speed: Speed) -> None:
    """Print operations, rate, floor and seconds of an iteration, and of each of its parts."""
    size = 2048
    matrix = torch.randn(size, size, device=speed.device)
    rate = 2 * size**3 / speed.clock.median(lambda: matrix @ matrix)
    print(f"- the machine: {rate / 1e9:.0f} GFLOP/s for matrices of {size}")
    (source, generator), critics = speed.generators(), speed.critics()
    real = push_forward(source, speed.dim, speed.batch)(8192, torch.Generator(speed.device))
    few = speed.training(20)

    def work() -> None:
        train_wgan(generator, critics[:1], [resample(real)], few, latent_dim=speed.dim)

    with FlopCounterMode(display=False) as counter:
        work()
    operations = counter.get_total_flops() / few.iterations
    seconds = speed.clock.median(work, 5) / few.iterations
    print(
        f"- an iteration with one critic: {operations / 1e6:.0f} MFLOP, floor "
        f"{1000 * operations / rate:.1f} ms, measured {1000 * seconds:.1f} ms "
        f"({seconds * rate / operations:.1f} times the floor)"
    )
    if speed.clock.cuda:
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        work()
    parts = sorted(profile.key_averages(), key=lambda part: -part.self_cpu_time_total)
    total = sum(part.self_cpu_time_total for part in parts)
    shares = (f"{part.key} {part.self_cpu_time_total / total:.0%}" for part in parts[:8])
    print(f"- where the time goes: {', '.join(shares)}")


def ternary(speed: Speed) -> None:
    """Print the costs of a ternary generator."""
    generator = speed.bench.make_generator().to(speed.device).eval()
    settings = speed.bench.config.client.ternarization
    made: list[nn.Module] = []
    seconds = speed.clock(lambda: made.append(ternarize(generator, settings=settings)))
    packed = pack(made[0])
    fresh = speed.bench.make_generator()
    whole = sum(t.numel() * t.element_size() for t in generator.state_dict().values())
    print(f"- ternarizing: {seconds:.1f} s; {whole} bytes become {len(packed)}")
    for name, work in (
        ("packing", lambda: pack(made[0])),
        ("loading", lambda: unpack(packed, fresh)),
        ("1,000 samples, full precision", lambda: generate(generator, 1000)),
        ("1,000 samples, ternary", lambda: generate(made[0], 1000)),
    ):
        print(f"- {name}: {1000 * speed.clock.median(work):.1f} ms")


def _quality(row: dict[str, float]) -> str:
    return f"coverage {row['coverage']:.3f}, energy distance {row['energy']:.4f}"


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Run one benchmark and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    work = {"loop": loop, "quality": quality, "floor": floor, "ternary": ternary}
    parser.add_argument("what", choices=work)
    parser.add_argument("overrides", nargs="*", help="as for fl-wb, e.g. data=mnist data.root=DIR")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work[arguments.what](Speed(" ".join(arguments.overrides)))


if __name__ == "__main__":
    main()
