"""Where the merges of one level of a barycenter's tree run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fl_wb.barycenter.merge import Merge
from fl_wb.barycenter.teachers import Measure, UselessMeasures
from fl_wb.training.wgan import Progress

EXECUTORS = (None, "ray")


def check_executor(executor: str | None) -> str | None:
    """Return the name of an executor; ValueError if there is none of that name."""
    if executor not in EXECUTORS:
        raise ValueError(f"executor={executor!r} is not one of {', '.join(map(str, EXECUTORS))}")
    return executor


Merged = tuple[nn.Module, str]
"""A merged generator, and its key in the store."""


def run_level(
    merge: Merge,
    groups: Sequence[Sequence[Measure]],
    initial: nn.Module | None,
    executor: str | None,
    callbacks: Sequence[Progress | None],
    names: Sequence[str],
) -> list[Merged]:
    """Merge each group, one after another or on Ray; results in the order of the groups.

    Raises
    ------
    UselessMeasures
        Of all groups: where there is one, the others are looked for before anything is merged.
    """
    try:
        if executor is None or len(groups) == 1:
            return [
                merge.run(group, initial, callback, name)
                for group, callback, name in zip(groups, callbacks, names, strict=True)
            ]
        merge.announce(f"{names[0]}, and {len(groups) - 1} more on Ray, each", groups[0], initial)
        return _on_ray(merge, groups, initial)
    except UselessMeasures as found:
        useless = dict(found.why)
        for group in groups:
            useless |= merge.useless(group, initial)
        raise UselessMeasures(useless) from found


def _on_ray(
    merge: Merge, groups: Sequence[Sequence[Measure]], initial: nn.Module | None
) -> list[Merged]:
    """Merge the groups as Ray's tasks, a core each, with as many threads as here."""
    import ray  # comes with flwr[simulation]; the mathematics does without

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    threads = torch.get_num_threads()

    @ray.remote(num_cpus=1)
    def task(sent: list[tuple[nn.Module, float, str, tuple[float, ...]]]) -> Merged:
        torch.set_num_threads(threads)
        measures = [Measure.of(*each) for each in sent]
        return merge.run(measures, initial, None)

    waiting = [
        task.remote([(m.generator(), m.weight, m.digest, m.labels) for m in group])
        for group in groups
    ]
    merged: list[Merged] = []
    for reference in waiting:
        generator, key = ray.get(reference)
        if merge.store.get(key) is None:  # in memory, or on another machine's disk
            merge.store.put(key, generator.state_dict())
        merged.append((generator, key))
    return merged
