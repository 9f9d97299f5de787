"""The mod that adapts and ternarizes the generator in an EVALUATE message, in any Flower app."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    RecordDict,
)
from flwr.clientapp.typing import ClientAppCallable
from torch import Tensor, nn

from fl_wb import ternary
from fl_wb.adaptation import Adaptation, adapt
from fl_wb.generators.sampling import check_factory, generate
from fl_wb.messages import generator_part, keys, records
from fl_wb.persistence.tensor_files import digest
from fl_wb.ternary import Ternarization, ternarize
from fl_wb.training.checkpoints import Checkpoint

_MADE, _FROM = "fl_wb.target.generator", "fl_wb.target.made-from"  # in context.state


@dataclass
class FastAdaptation:
    """Flower mod: adapts and ternarizes the generator in an EVALUATE message.

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
        Given the Context, returns the node's few samples, a Tensor (n, ...) with n >= 1.
    critic : callable, optional
        Factory of a critic; a multilayer perceptron by default.
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
    seed : int
        Same message, samples and seed: same generator.
    device : str
        Where to train, e.g. "cuda".
    """

    generator: Callable[[], nn.Module]
    samples: Callable[[Context], Tensor]
    _: KW_ONLY
    critic: Callable[[], nn.Module] | None = None
    adaptation: Adaptation | None = None
    ternarize: bool = True
    ternarization: Ternarization | None = None
    arrayrecord_key: str = keys.ARRAYS
    generator_keys: Sequence[str] | None = None
    reply_key: str | None = None
    latent_dim: int | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other, before a message comes."""
        check_factory("generator", self.generator)
        if self.critic is not None:
            check_factory("critic", self.critic)
        self._prefixes = generator_part.check_prefixes(self.generator_keys)
        if self.reply_key is not None and not self.ternarize:
            raise ValueError("reply_key sends the ternary generator, and ternarize is False")

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Handle a message as a Flower mod.

        Raises
        ------
        ValueError
            If the message has no such ArrayRecord, its arrays do not fit the generator (naming
            the first that does not), or the node has no samples; or if the app's own reply has
            a record under `reply_key`.
        """
        if message.metadata.message_type.split(".")[0] != MessageType.EVALUATE:
            return call_next(message, context)
        start = self.start(message, context)
        made = self._made(start, self.few(context, start), context)
        content = dict(message.content)
        whole = message.content.array_records[self.arrayrecord_key]
        head = self._arrays(message, context, made)[1]
        own = {head + name: value for name, value in made.state_dict().items()}
        state = {**whole.to_torch_state_dict(), **own}
        content[self.arrayrecord_key] = records.like(state, whole)
        message.content = RecordDict(content)
        reply = call_next(message, context)
        if self.reply_key is not None and not reply.has_error():
            if self.reply_key in reply.content:
                raise ValueError(
                    f"the reply has a record {self.reply_key!r} already: set reply_key"
                )
            reply.content[self.reply_key] = ConfigRecord({keys.TERNARY: ternary.pack(made)})
        return reply

    def start(self, message: Message, context: Context) -> nn.Module:
        """Return the generator that a message carries."""
        network = self.generator()
        if self.ternarize:  # what cannot be is said before anything is trained
            list(ternary.ternarizable(network))
        arrays, _ = self._arrays(message, context, network)
        try:
            return records.load(arrays, network).to(self.device)
        except records.InvalidUpload as error:
            raise ValueError(
                f"the server's generator does not fit that of node {context.node_id}: {error}"
            ) from error

    def _arrays(
        self, message: Message, context: Context, network: nn.Module
    ) -> tuple[ArrayRecord, str]:
        """Return the generator's arrays, and what their names in the message begin with."""
        found = message.content.array_records
        if self.arrayrecord_key not in found:
            raise ValueError(
                f"the message to node {context.node_id} has no ArrayRecord "
                f"{self.arrayrecord_key!r}, only {sorted(found)}: set arrayrecord_key"
            )
        arrays, _ = generator_part.split(found[self.arrayrecord_key], self._prefixes)
        return generator_part.own(arrays, network.state_dict())

    def _made(self, start: nn.Module, few: Tensor, context: Context) -> nn.Module:
        """Return the generator for this node, from ``context.state`` if it is there."""
        key = digest({**start.state_dict(), "few": few})
        state, network = context.state, self.generator()
        if _MADE in state and state.config_records[_FROM]["digest"] == key:
            return records.load(state.array_records[_MADE], network).eval()
        adapted = self.adapt(start, few)
        made = (self.ternarized(adapted) if self.ternarize else adapted).cpu()
        state[_MADE], state[_FROM] = records.to_arrays(made), ConfigRecord({"digest": key})
        return made

    def few(self, context: Context, start: nn.Module) -> Tensor:
        """Return the node's few samples, checked against what the generator makes."""
        few = self.samples(context)
        shape = tuple(generate(start, 1, latent_dim=self.latent_dim).shape[1:])
        node = f"node {context.node_id} {dict(context.node_config)}"
        if not isinstance(few, Tensor):
            raise TypeError(f"{node}: samples must return a Tensor, not {type(few).__name__}")
        if len(few) == 0:
            raise ValueError(f"{node} has no samples to adapt to: its data is {tuple(few.shape)}")
        if tuple(few.shape[1:]) != shape:
            raise ValueError(
                f"{node} has samples of shape {tuple(few.shape[1:])}, but its generator makes "
                f"samples of shape {shape}"
            )
        return few.to(self.device)

    def adapt(
        self,
        start: nn.Module,
        few: Tensor,
        checkpoint: Checkpoint | None = None,
        critic: nn.Module | None = None,
    ) -> nn.Module:
        """Return the generator adapted to the node's samples, from a trained critic if given."""
        return adapt(
            start,
            few,
            critic=self.critic if critic is None else lambda: critic,
            settings=self.adaptation,
            seed=self.seed,
            latent_dim=self.latent_dim,
            device=self.device,
            checkpoint=checkpoint,
        )

    def ternarized(self, adapted: nn.Module) -> nn.Module:
        """Return its ternary form."""
        return ternarize(
            adapted,
            settings=self.ternarization,
            seed=self.seed,
            latent_dim=self.latent_dim,
            device=self.device,
        )
