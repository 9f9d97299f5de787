"""A stage for image-sized samples: how long it says that it takes, takes, and how good it becomes.

``python -m benchmarks.image_stages [--stages 1000x32 ...]``, iterations x batch. Two VAEs' decoders
of 12,611 weights, convolutional, as Flower's VAE example has it, of scikit-learn's digits scaled to
3x32x32, one of five digits each. Energy distance and coverage are to 1,000 samples of both; the
first row is of other samples of both. `said` is the log's estimate, `took` the stage's own time, in
seconds of the clock; `core seconds` are those of the whole merge.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from time import perf_counter, process_time

import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_wb.barycenter import Stage, recursive_barycenter
from fl_wb.data.datasets import DataConfig, load
from fl_wb.generators.sampling import generate
from fl_wb.metrics import coverage, energy_distance, train_features
from fl_wb.reporting import tables

STAGES = ("600x200", "600x64", "1000x32", "2500x32")
LATENT, STEPS, BATCH = 16, 700, 64


class Decoder(nn.Module):
    """Latents (n, 16) to images (n, 3, 32, 32) in [0, 1]."""

    latent_dim = LATENT

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(LATENT, 32 * 3 * 3),
            nn.Unflatten(1, (32, 3, 3)),
            nn.ConvTranspose2d(32, 16, 3, stride=2),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 16, 3, stride=2),
            nn.ReLU(),
            nn.ConvTranspose2d(16, 3, 4, stride=2),
            nn.Sigmoid(),
        )

    def forward(self, z: Tensor) -> Tensor:
        """Decode latents."""
        images: Tensor = self.layers(z)
        return images


def decoder_of(images: Tensor, seed: int) -> Decoder:
    """Return the decoder of a VAE of images (n, 3, 32, 32)."""
    torch.manual_seed(seed)
    decoder = Decoder()
    encoder = nn.Sequential(
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 2 * LATENT)
    )
    adam = torch.optim.Adam([*decoder.parameters(), *encoder.parameters()], 2e-3)
    for _ in range(STEPS):
        x = images[torch.randint(len(images), (BATCH,))]
        mean, log_variance = encoder(x).chunk(2, 1)
        made = decoder(mean + torch.randn_like(mean) * (log_variance / 2).exp())
        error = (made - x).square().flatten(1).sum(1).mean() / 8
        loss = error + (log_variance.exp() + mean**2 - 1 - log_variance).sum(1).mean() / 2
        adam.zero_grad()
        loss.backward()
        adam.step()
    return decoder.eval()


class Said(logging.Handler):
    """Keeps the seconds that the log says a stage will take, and when it says it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep them."""
        if "about" in record.msg:
            self.seconds, self.at = float(record.args[1]), perf_counter()  # type: ignore[index,arg-type]


def main() -> None:
    """Run the benchmark and print its table as Markdown after each stage."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stages", nargs="+", default=STAGES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    said, log = Said(), logging.getLogger("flwr")
    log.setLevel(logging.INFO)
    log.addHandler(said)
    digits, _ = load(DataConfig())
    images = functional.interpolate(digits.images, (32, 32), mode="bilinear")
    images = ((images + 1) / 2).repeat(1, 3, 1, 1)
    features = train_features(images, digits.labels)
    sources = [decoder_of(images[digits.labels // 5 == k], k) for k in (0, 1)]

    def pool(seed: int) -> Tensor:
        return torch.cat([generate(s, 500, seed=seed + k) for k, s in enumerate(sources)])

    other = pool(0)

    def row(name: str, samples: Tensor, *more: str) -> list[str]:
        covered = coverage(features(samples), features(other))
        return [name, f"{energy_distance(samples, other):.4f}", f"{covered:.3f}", *more]

    cells = [["", "energy", "coverage", "said", "took", "core seconds"], row("the pool", pool(9))]
    cells[1] += [""] * 3
    for name in given.stages:
        iterations, batch = map(int, name.split("x"))
        stage = Stage()
        distillation = replace(stage.distillation, iterations=iterations, batch_size=batch)
        began = process_time()
        merged = recursive_barycenter(sources, stage=replace(stage, distillation=distillation))
        took, core = perf_counter() - said.at, process_time() - began
        times = f"{said.seconds:.0f}", f"{took:.0f}", f"{core:.0f}"
        cells.append(row(name, generate(merged, 1000, seed=99), *times))
        print(f"{tables.markdown(cells)}\n", flush=True)


if __name__ == "__main__":
    main()
