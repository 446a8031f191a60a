"""Soft prompts: vectors that train, in front of the embedded tokens of a frozen model.

    model = prompt.wrap(model, length=20)

Prompt tuning (Lester et al. 2021) trains the vectors themselves; P-tuning (Liu et al. 2021) what a
small network makes of them: an `mlp` of two layers, or an `lstm` in both directions under one. They
are seen like tokens, have the first positions, and are gone from the hidden states that the model
gives; an encoder–decoder's decoder sees them too.

| name, at the table of the tokens | shape | at first |
|---|---|---|
| `prompt_tokens` | (length, width) | rows of the table (`vocabulary`, `text`), as scattered as they are (`random`), or normal with deviation 0.02 (`normal`) |
| `prompt_<layer>_kernel`, `_bias` | of the network | uniform in ±1/√in, but for the last: zero, as is the bias |

A network's output is added to the vectors, so that it starts where prompt tuning does. (PEFT's
networks have a layer more, replace the vectors, and start from a normal of deviation 1, some 25
times the rows of BERT's table; what they give is written and read all the same.)

Letters: B batch, T time, D width, P length of the prompt.
"""  # noqa: E501  a row of a table is one line

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from fmjax.adapters.wrapper import Adapted, Adapter, Call, Leaves, Module, around
from fmjax.errors import ConfigError, did_you_mean
from fmjax.params import paths, precision

TABLE = "embed/token"  # path of the module that embeds tokens
INITS = ("vocabulary", "text", "random", "normal")


@dataclasses.dataclass(frozen=True)
class Prompt(Adapter):
    """Settings of `config.adapter`."""

    length: int
    init: str = "vocabulary"
    text: str = ""
    encoder: str = ""
    hidden: int = 128  # width of the network
    whole: str = "token"  # the hidden state in the first place: its own, or the prompt's first

    @property
    def positions(self) -> int:
        return self.length

    def sites(self, modules: Mapping[str, Module]) -> dict[str, Any]:
        """The model, and its table with the width of a vector."""
        if TABLE not in modules:
            raise ConfigError(f"config.adapter.name='prompt' needs a model with a table {TABLE}.")
        return {"": None, TABLE: modules[TABLE].leaves["embedding"][1]}

    def start(self, site: int, key: jax.Array, own: Leaves) -> Leaves:
        keys = iter(jax.random.split(key, 8))
        normal = 0.02 * jax.random.normal(next(keys), (self.length, site))
        new = {"prompt_tokens": normal}
        for name, (inputs, outputs, last) in self._shapes(site).items():
            bound = 0.0 if last else inputs**-0.5
            kernel = jax.random.uniform(next(keys), (inputs, outputs), jnp.float32, -bound, bound)
            new[f"prompt_{name}_kernel"] = kernel
            if not name.endswith("again"):
                new[f"prompt_{name}_bias"] = jnp.zeros(outputs)
        return own | new

    def call(self, site: Any, here: Call, *args: Any, **options: Any) -> Any:
        if site is not None:
            if options.get("bare"):
                return here.run(*args, **options)
            y, vectors = here.run(*args, **options), self.vectors(here.leaf)
            front = jnp.broadcast_to(vectors[None], (len(y), *vectors.shape)).astype(y.dtype)
            return jnp.concatenate([front, y[:, self.length :]], axis=1)
        # Whose decoder sees the prompt too, heads alone not; a scanned layer has the root's path.
        decodes = getattr(here.module, "decodes", False)
        changed = ("encode", "decode", "classify", "project") if decodes else ("encode",)
        if here.method not in changed:
            return here.run(*args, **options)
        given = here.arguments(*args, **options)
        if given.get("more"):  # the prompt was in front of the first tokens
            return here.run(**given | {"positions": given["positions"] + self.length})
        if here.method == "encode":
            hidden = here.run(**self._longer(given))
            return hidden if decodes else self._without(hidden)
        if here.method == "decode":
            return here.run(**given | self._front(given, source_segment_ids=0))
        return here.run(**given | {"hidden": self._without(given["hidden"])})

    def _without(self, hidden):
        """The states of the tokens alone."""
        if self.whole == "prompt":
            return jnp.concatenate([hidden[:, :1], hidden[:, self.length + 1 :]], axis=1)
        return hidden[:, self.length :]

    def vectors(self, leaf: Callable[[str], jax.Array]) -> Float[Array, "P D"]:
        """The prompt of the parameters that `leaf` gives by their last name."""
        tokens = leaf("prompt_tokens")
        if not self.encoder:
            return tokens

        def linear(x, name):
            return precision.affine(x, leaf(f"prompt_{name}_kernel"), leaf(f"prompt_{name}_bias"))

        h = tokens
        if self.encoder == "lstm":
            run = lambda x, name: _lstm(linear(x, name), leaf(f"prompt_{name}_again_kernel"))
            h = jnp.concatenate([run(h, "forth"), run(h[::-1], "back")[::-1]], axis=-1)
        return tokens + linear(jax.nn.relu(linear(h, "up")), "down")

    def from_base(
        self, params: paths.Tree, tokenize: Callable[[str], Sequence[int]], seed: int
    ) -> paths.Tree:
        """`params` of a base that was just loaded, with the vectors that `init` means."""
        flat = paths.flatten(params)
        table = flat[f"{TABLE}/embedding"]
        place = f"{TABLE}/prompt_tokens"
        rng = np.random.default_rng(seed)
        if self.init == "random":
            scattered = jnp.std(table) * rng.standard_normal(flat[place].shape, np.float32)
            found = jnp.mean(table, axis=0, keepdims=True) + scattered
        else:
            ids = rng.integers(0, table.shape[0], self.length)
            if self.init == "text":
                said = list(tokenize(self.text))
                if not said:
                    raise ConfigError(
                        "config.adapter.init='text' starts from the tokens of config.adapter.text, "
                        f"and {self.text!r} has none."
                    )
                ids = np.resize(said, self.length)  # cut, or repeated
            found = table[ids]
        return paths.unflatten(flat | {place: jax.device_put(found, flat[place].sharding)})

    def _longer(self, given: dict[str, Any]) -> dict[str, Any]:
        """The arguments of `encode` with room for the prompt in front."""
        longer = given | self._front(
            given,
            input_ids=0,
            segment_ids=0,
            token_types=0,
            positions=jnp.arange(self.length)[None],
        )
        longer["positions"] = longer["positions"].at[:, self.length :].add(self.length)
        return longer

    def _front(self, given: dict[str, Any], **values: Any) -> dict[str, jax.Array]:
        """The arrays with their values in front; a segment is that which the row begins with, so
        that an empty row has no prompt either."""

        def front(name, value):
            first = given[name][:, :1] if "segment" in name else jnp.zeros_like(given[name][:, :1])
            added = jnp.broadcast_to(first, (len(first), self.length)) + value
            return jnp.concatenate([added, given[name]], axis=1)

        return {name: front(name, value) for name, value in values.items()}

    def _shapes(self, width: int) -> dict[str, tuple[int, int, bool]]:
        """{layer of the network: (inputs, outputs, is it the last)}."""
        if not self.encoder:
            return {}
        shapes, inputs = {}, width
        if self.encoder == "lstm":
            for name in ("forth", "back"):
                shapes[name] = width, 4 * self.hidden, False
                shapes[f"{name}_again"] = self.hidden, 4 * self.hidden, False
            inputs = 2 * self.hidden
        return shapes | {
            "up": (inputs, self.hidden, False),
            "down": (self.hidden, width, True),
        }


def wrap(
    model: Any,
    *,
    length: int,
    init: str = "vocabulary",
    text: str = "",
    encoder: str = "",
    hidden: int = 128,
    whole: str = "token",
) -> Adapted:
    """`model`, with an `encode` as `fmjax.models.bert` has it, after a prompt of `length` vectors.

    `whole="prompt"` puts the hidden state of the first vector in the place of the first token's,
    for heads on the whole: so does PEFT.

    Raises ConfigError for a prompt that leaves no room.
    """
    if bool(text) != (init == "text"):
        raise ConfigError(
            f"config.adapter.text={text!r} with config.adapter.init={init!r}: a text is what "
            "init='text' starts from, and nothing else."
        )
    if encoder and not hidden:
        raise ConfigError(f"config.adapter.encoder={encoder!r} needs config.adapter.hidden.")
    if init not in INITS:
        raise ConfigError(f"config.adapter.init={init!r} is not known.{did_you_mean(init, INITS)}")
    return around(model, Prompt(length, init, text, encoder, hidden, whole))


def _lstm(inputs: Float[Array, "P G"], kernel: Float[Array, "H G"]) -> Float[Array, "P H"]:
    """Hidden states of a long short-term memory (gates i, f, g, o) given W x + b."""

    def step(carry, gates):
        h, c = carry
        i, f, g, o = jnp.split(gates + (h[None] @ kernel)[0], 4)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    zero = jnp.zeros(kernel.shape[0])
    return jax.lax.scan(step, (zero, zero), inputs)[1]
