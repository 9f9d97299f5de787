"""Adapting a message's generator to a node's samples: functions, and a mod of any Flower app."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import KW_ONLY, dataclass
from time import perf_counter
from typing import Any

import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor, nn

from fl_wb import ternary
from fl_wb.adaptation import WEIGHTS, Adaptation, adapt, folded, own_start
from fl_wb.clients.received import own_samples, received, received_code
from fl_wb.generators.code import Code
from fl_wb.generators.latents import Draw, frequencies, law_of
from fl_wb.generators.reweighted import Reweighted
from fl_wb.generators.sampling import check_factory, driven, undriven
from fl_wb.messages import generator_part, keys, records
from fl_wb.persistence.tensor_files import digest
from fl_wb.ternary import Ternarization, ternarize
from fl_wb.training.checkpoints import Checkpoint
from fl_wb.training.conditional import check_labels, label_counts

_MADE, _FROM = "fl_wb.target.generator", "fl_wb.target.made-from"  # in context.state


@dataclass(frozen=True)
class Made:
    """What a node makes of a generator, and the seconds of each step.

    Its own barycenter, where there is a code, which is the start of what is adapted, and perhaps
    ternary.
    """

    start: nn.Module
    adapted: nn.Module
    ternary: nn.Module | None
    weigh_seconds: float
    adapt_seconds: float
    ternarize_seconds: float


def make_own(
    start: nn.Module,
    few: Tensor,
    *,
    code: Code | None = None,
    weights: str = "fitted",
    without: Collection[int] = (),
    plain: bool = False,
    critic: Callable[[], nn.Module] | None = None,
    adaptation: Adaptation | None = None,
    ternarization: Ternarization | None = None,
    latent_dim: int | None = None,
    labels: int | None = None,
    latents: str | Draw = "normal",
    few_labels: Tensor | None = None,
    seed: int = 0,
    device: str = "cpu",
    checkpoint: Checkpoint | None = None,
) -> Made:
    """Adapt a generator to a node's few samples, and ternarize it if `ternarization` says how.

    Where its code is known, it gets the node's own `weights` and gate first, `without` some cells,
    unless it is conditional. `plain` keeps the architecture that it has: the weights are folded
    into it (see `fl_wb.adaptation.folded`), and the gate guides its adaptation. The other arguments
    are those of `fl_wb.adaptation.adapt` and `fl_wb.ternary.ternarize`.

    Raises
    ------
    ValueError
        If the samples are none of this generator's, or (before anything is trained) it cannot be
        ternarized.
    """
    if ternarization is not None:
        list(ternary.ternarizable(start))
    began, guide = perf_counter(), None
    if code is not None and labels is None:
        own = own_start(
            driven(start, latent_dim, None, latents),
            code,
            few,
            method=weights,
            without=without,
            seed=seed,
            latent_dim=latent_dim,
        )
        if plain and isinstance(own, Reweighted):
            guide, own = own, folded(own, seed=seed)
        start = undriven(own, start)
    weighed = perf_counter()
    adapted = adapt(
        start,
        few,
        critic=critic,
        settings=adaptation,
        seed=seed,
        latent_dim=latent_dim,
        labels=labels,
        latents=latents,
        few_labels=few_labels,
        device=device,
        checkpoint=checkpoint,
        guide=guide,
    )
    between = perf_counter()
    made = None
    if ternarization is not None:
        made = ternarize(
            adapted,
            settings=ternarization,
            seed=seed,
            latent_dim=latent_dim,
            labels=labels if few_labels is None else label_counts(few_labels, labels or 0),
            latents=latents,
            device=device,
        )
    return Made(start, adapted, made, weighed - began, between - weighed, perf_counter() - between)


@dataclass
class FastAdaptation:
    """Flower mod: weighs, adapts and ternarizes the generator in an EVALUATE message.

    The app's own ``@app.evaluate()`` then sees, under the same key and with the same names,
    shapes and dtypes, a generator made for this node. Messages of other types pass untouched.

    ``ClientApp(mods=[FastAdaptation(make_generator, my_samples)])``

    The node keeps what it made in ``context.state``: while the server's model and the node's
    samples stay as they are, later rounds cost nothing.

    Parameters
    ----------
    generator : callable
        Factory of the generator whose state dict the message carries.
    samples : callable
        Given the Context, returns the node's few samples, a Tensor (n, ...) with n >= 1; with
        `labels`, a pair of these and their labels (n,), integers.
    critic : callable, optional
        Factory of a critic; a multilayer perceptron by default.
    weights : {"fitted", "radius", "uniform", "shares"}
        Of the sources in this node's own barycenter, from which it adapts, where the server says
        what cells its model has (`fl_wb.strategies.AdaptiveCoalescence` does); see
        `fl_wb.adaptation.fit_weights`. "shares" leaves the server's own.
    adaptation : Adaptation, optional
        Settings of `fl_wb.adaptation.adapt`.
    ternarize : bool
        False leaves the adapted generator in full precision.
    ternarization : Ternarization, optional
        Settings of `fl_wb.ternary.ternarize`.
    arrayrecord_key : str
        Key of the ArrayRecord in the message; the strategy's, which is Flower's default.
    generator_keys : sequence of str, optional
        Prefixes of the generator's arrays where the message carries a larger model, as in
        `fl_wb.strategies.AdaptiveCoalescence`. The others pass as they are.
    reply_key : str, optional
        Key of a ConfigRecord that is put into the reply, with the packed generator as bytes under
        "ternary" (see `fl_wb.ternary.unpack`). By default none is sent.
    latent_dim : int, optional
        Needed if the generator has no attribute ``latent_dim``.
    labels, latents : optional
        As in `fl_wb.strategies.AdaptiveCoalescence`, and the same there.
    seed : int
        Same message, samples and seed: same generator.
    device : str
        Where to train, e.g. "cuda".
    """

    generator: Callable[[], nn.Module]
    samples: Callable[[Context], Tensor | tuple[Tensor, Tensor]]
    _: KW_ONLY
    critic: Callable[[], nn.Module] | None = None
    weights: str = "fitted"
    adaptation: Adaptation | None = None
    ternarize: bool = True
    ternarization: Ternarization | None = None
    arrayrecord_key: str = keys.ARRAYS
    generator_keys: Sequence[str] | None = None
    reply_key: str | None = None
    latent_dim: int | None = None
    labels: int | None = None
    latents: str | Draw = "normal"
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other, before a message comes."""
        check_factory("generator", self.generator)
        if self.critic is not None:
            check_factory("critic", self.critic)
        if self.weights not in WEIGHTS:
            raise ValueError(f"weights={self.weights!r} is not one of {', '.join(WEIGHTS)}")
        law_of(self.latents)
        frequencies(self.labels)
        self._prefixes = generator_part.check_prefixes(self.generator_keys)
        if self.reply_key is not None and not self.ternarize:
            raise ValueError("reply_key sends the ternary generator, and ternarize is False")

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Handle a message as a Flower mod.

        Raises
        ------
        ValueError
            If the message has no such ArrayRecord, its arrays do not fit the generator (naming
            the first that does not), its code is none, or the node has no samples; or if the
            app's own reply has a record under `reply_key`.
        """
        if message.metadata.message_type.split(".")[0] != MessageType.EVALUATE:
            return call_next(message, context)
        start, head = received(
            message, context, self.generator, key=self.arrayrecord_key, prefixes=self._prefixes
        )
        code, without = received_code(message, context)
        few, few_labels = self.few(context, start)
        made = self._made(start, few, few_labels, code, without, context)
        content = dict(message.content)
        whole = message.content.array_records[self.arrayrecord_key]
        own = {head + name: value for name, value in made.state_dict().items()}
        content[self.arrayrecord_key] = records.like({**whole.to_torch_state_dict(), **own}, whole)
        message.content = RecordDict(content)
        reply = call_next(message, context)
        if self.reply_key is not None and not reply.has_error():
            if self.reply_key in reply.content:
                raise ValueError(
                    f"the reply has a record {self.reply_key!r} already: set reply_key"
                )
            packed = ternary.pack(made, labels=self.labels, latents=self.latents)
            reply.content[self.reply_key] = ConfigRecord({keys.TERNARY: packed})
        return reply

    def few(self, context: Context, start: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Return the node's few samples, seen to fit the generator, and their labels if it has any.

        Raises
        ------
        TypeError, ValueError
            Saying what `samples` returned instead.
        """
        given: Any = self.samples(context)
        one = driven(start, self.latent_dim, self.labels, self.latents)
        if self.labels is None:
            return own_samples(given, context, one, self.latent_dim), None
        if not isinstance(given, tuple) or len(given) != 2:
            raise TypeError(
                f"with labels={self.labels}, samples must return a pair of Tensors, samples and "
                f"labels, not a {type(given).__name__}"
            )
        few = own_samples(given[0], context, one, self.latent_dim)
        check_labels(given[1], len(few), self.labels)
        return few, given[1]

    def _made(
        self,
        start: nn.Module,
        few: Tensor,
        few_labels: Tensor | None,
        code: Code | None,
        without: list[int],
        context: Context,
    ) -> nn.Module:
        """Return the generator for this node, from ``context.state`` if it is there."""
        shares = torch.tensor([] if code is None else code.shares, dtype=torch.float64)
        shares[without] = 0
        told = {} if few_labels is None else {"labels": few_labels}
        key = digest({**start.state_dict(), "few": few, "shares": shares, **told})
        state: RecordDict = context.state
        if _MADE in state and state.config_records[_FROM]["digest"] == key:
            return records.load(state.array_records[_MADE], self.generator()).eval()
        found = make_own(
            start.to(self.device),
            few.to(self.device),
            code=code,
            weights=self.weights,
            without=without,
            plain=True,
            critic=self.critic,
            adaptation=self.adaptation,
            ternarization=(self.ternarization or Ternarization()) if self.ternarize else None,
            latent_dim=self.latent_dim,
            labels=self.labels,
            latents=self.latents,
            few_labels=few_labels,
            seed=self.seed,
            device=self.device,
        )
        made = (found.adapted if found.ternary is None else found.ternary).cpu()
        state[_MADE], state[_FROM] = records.to_arrays(made), ConfigRecord({"digest": key})
        return made
