"""A source node: trains a generator on its own data once, and uploads it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor, nn

from fl_wb.clients.received import fitted
from fl_wb.clients.training import key_of, train_source
from fl_wb.generators.copies import seeded
from fl_wb.generators.sampling import driven, generate
from fl_wb.messages import keys
from fl_wb.metrics import memorization
from fl_wb.persistence.stage_store import StageStore
from fl_wb.persistence.tensor_files import below, digest
from fl_wb.training.conditional import label_counts
from fl_wb.training.privacy import Privacy
from fl_wb.training.wgan import Progress, Training

# In context.state.
_GENERATOR, _METRICS = "fl_wb.source.generator", "fl_wb.source.metrics"
_JUDGE, _REFUSED = "fl_wb.source.critic", "fl_wb.source.refused"
_FIGURE = "figure/"  # in a store, beside the generator's own names,
_CRITIC = "critic/"  # and the critic's

log = logging.getLogger("flwr")  # its handlers show our lines beside Flower's

FEW = 500
"""Samples below which a source warns: digits that a generator was trained on are told from others
by it with an AUC of .62 where there were 500 of them, of .99 where there were 50."""

MADE = 1000  # samples by which the memorization is measured
HELD_OUT = 5
"""One sample in so many is not trained on where the memorization is to be measured."""


def source_train(
    message: Message,
    context: Context,
    *,
    generator: Callable[[], nn.Module],
    critic: Callable[[], nn.Module],
    samples: Callable[[], Tensor | tuple[Tensor, Tensor]],
    settings: Training,
    privacy: Privacy | None = None,
    min_memorization: float | None = None,
    labels: int | None = None,
    again: bool = False,
    send_critic: bool = False,
    store: StageStore | None = None,
    seed: int = 0,
    device: str = "cpu",
    callback: Progress | None = None,
) -> RecordDict:
    """Answer a TRAIN message with a generator of this node's data.

    The first time it is trained from the arrays in the message, and kept in ``context.state``;
    later rounds get the same generator, at no cost, since a source's data does not change.

    Parameters
    ----------
    generator, critic : callable
        Factories of the networks.
    samples : callable
        Returns the node's data (n, ...); only called if there is something to train. With
        `labels`, a pair of these and their labels (n,).
    min_memorization : float, optional
        Upload nothing whose `fl_wb.metrics.memorization` is less: about 1 if nothing was
        memorised, 0 for copies. To measure it, one sample in `HELD_OUT` is not trained on.
    labels : int, optional
        Train a conditional generator of so many labels, and say how often each is there.
    again : bool
        Train in every round, from the arrays of that round (what FedAvg needs); not with privacy,
        which would spend epsilon in each.
    send_critic : bool
        Send the critic, too, as a second ArrayRecord (what fine-tuning both of them needs).
    store : StageStore, optional
        Keeps the generator, and checkpoints on the way to it, for later runs with the same
        settings and data: a node or a run that was killed is not trained twice.
    settings, privacy, seed, device, callback
        As in `train_source`; the device to train on.

    Returns
    -------
    RecordDict
        The generator, and metrics: ``num-examples``, what `train_source` reports, and
        ``memorization`` if it was measured and nothing promises to keep such figures private.

    Raises
    ------
    ValueError
        If the server's arrays do not fit this node's network, naming the first that does not; if
        the node has no data; or if its generator memorised too much of it.
    """
    state = context.state
    private = privacy is not None and privacy.epsilon is not None
    if private and again:
        raise ValueError(
            f"node {context.node_id} trains in every round, each of which would spend "
            "epsilon again: privacy.epsilon is for strategies whose sources train once"
        )
    if not again and _REFUSED in state:  # another training would spend epsilon again
        raise ValueError(str(state.config_records[_REFUSED]["why"]))
    if again or _GENERATOR not in state:
        network = generator()
        fitted(message.content.array_records[keys.ARRAYS], network, context)
        given = samples()
        data, own_labels = given if isinstance(given, tuple) else (given, None)
        if len(data) == 0:
            raise ValueError(f"node {context.node_id} has no samples to train on")
        _warn_of_few(len(data), private)
        seen, held_out = _split(data, min_memorization, seed, private=private)
        data, unseen = data[seen], data[held_out]
        own_labels = None if own_labels is None else own_labels[seen]
        # Named by where training starts, too, if it goes on: a round of FedAvg finds nothing of the
        # one before. Else the first training is the only one, whatever the server sends later.
        one = driven(network if again else seeded(generator, seed), labels=labels)
        judge = seeded(critic, seed)
        key = key_of(one, judge, data, own_labels, settings, privacy, seed, device)
        found = store.get(key) if store else None
        if found is None:
            trained, figures = train_source(
                network.to(device),
                critic,
                data.to(device),
                settings,
                privacy=privacy,
                own_labels=None if own_labels is None else own_labels.to(device),
                labels=labels,
                seed=seed,
                callback=callback,
                checkpoint=store.checkpoint(key) if store else None,
            )
            kept = {n: torch.tensor(v, dtype=torch.float64) for n, v in sorted(figures.items())}
            found = dict(trained.generator.state_dict())
            found |= {_CRITIC + n: v for n, v in trained.critics[0].state_dict().items()}
            found |= {_FIGURE + n: v for n, v in kept.items()}
            if store:
                store.put(key, found)
                store.keep_only([key])
        figures = {name: float(value) for name, value in below(found, _FIGURE).items()}
        often = None
        if own_labels is not None and labels is not None:
            often = label_counts(own_labels, labels)
        made = {name: found[name] for name in network.state_dict()}
        if min_memorization is not None:
            network.load_state_dict(made)
            made_of = generate(network.cpu(), MADE, labels=often)
            measured = memorization(made_of, data, unseen)
            if not measured >= min_memorization:
                log.warning("memorization=%.3g of this source's generator", measured)
                said = "" if private else f"={measured:.3g}"
                why = (
                    f"node {context.node_id} uploads nothing: memorization{said} of its "
                    f"generator must be at least min_memorization={min_memorization}"
                )
                state[_REFUSED] = ConfigRecord({"why": why})
                raise ValueError(why)
            figures |= {} if private else {"memorization": measured}
        state[_GENERATOR] = ArrayRecord(made)
        if send_critic:
            state[_JUDGE] = ArrayRecord(below(found, _CRITIC))
        metrics = MetricRecord({keys.WEIGHT: len(data), **figures})
        if often is not None:
            metrics[keys.LABELS] = often
        state[_METRICS] = metrics
    content = RecordDict({keys.ARRAYS: state[_GENERATOR], keys.METRICS: state[_METRICS]})
    if send_critic:
        content[keys.CRITIC] = state[_JUDGE]
    return content


def _warn_of_few(n: int, private: bool) -> None:
    if n < FEW and not private:
        log.warning(
            "This source has %d samples: of fewer than %d a generator keeps much: who has it can "
            "tell them from others, or make them again (docs/privacy.md)",
            n,
            FEW,
        )


def _split(
    data: Tensor, min_memorization: float | None, seed: int, *, private: bool
) -> tuple[Tensor, Tensor]:
    """Return which samples to train on, and which to measure the memorization with.

    Where one sample more or less must hardly be seen, each is chosen by itself alone: it may not
    move the others from one part to the other.
    """
    n = len(data)
    if min_memorization is None:
        return torch.arange(n), torch.arange(0)
    if n < 2 * HELD_OUT:
        raise ValueError(
            f"min_memorization={min_memorization} cannot be measured with {n} samples: "
            f"it takes {2 * HELD_OUT}"
        )
    if private:
        out = torch.tensor([int(digest({"x": x})[:8], 16) % HELD_OUT == 0 for x in data])
        if 0 < out.sum() < n:
            return (~out).nonzero().squeeze(1), out.nonzero().squeeze(1)
        raise ValueError(f"min_memorization={min_memorization} cannot be measured: too few samples")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    held_out = n // HELD_OUT
    return order[held_out:], order[:held_out]
