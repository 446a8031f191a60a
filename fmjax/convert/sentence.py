"""The vectors of a sentence-transformers folder: modules.json and the files that it names.

    modules.json                      Transformer, Pooling, then any of Dense and Normalize
    1_Pooling/config.json             what is taken of the tokens; several are put side by side
    2_Dense/config.json, …            a matrix, a bias and an activation after it
    sentence_bert_config.json         the longest text
    config_sentence_transformers.json the prompts that stand before a text

All of it is followed, or refused by its name. A folder without modules.json says nothing.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from fmjax.convert import files
from fmjax.convert.files import Place
from fmjax.errors import CheckpointError, ConfigError, quoted
from fmjax.io.snapshot import read_json
from fmjax.models import text_pooling
from fmjax.params import precision

# {mode of sentence-transformers: `pool` of `text_pooling.pooled`}
POOLS = {
    "cls": "first",
    "mean": "mean",
    "max": "max",
    "lasttoken": "last",
    "weightedmean": "weighted_mean",
    "mean_sqrt_len_tokens": "sum_over_sqrt",
}
# {key of older folders: mode}, in the order in which several are put side by side.
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "Identity": lambda x: x,
    "Tanh": jnp.tanh,
    "ReLU": jax.nn.relu,
    "GELU": lambda x: jax.nn.gelu(x, approximate=False),
    "SiLU": jax.nn.silu,
    "Sigmoid": jax.nn.sigmoid,
}
# Of the settings of the Transformer module, sentence_<kind>_config.json, the first that is there.
_KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
_SENTENCE = {"module_input_name": "sentence_embedding", "module_output_name": "sentence_embedding"}
# Keys of each file that change vectors and are not followed, with the values that do not, beside
# null, false and what is empty; all other keys of these files must be `_KNOWN`.
_FIXED = {"Transformer": {"transformer_task": "feature-extraction",
                          "module_output_name": "token_embeddings"},
          "Dense": _SENTENCE, "Normalize": _SENTENCE}  # fmt: skip
_KNOWN = {
    "Transformer": ("max_seq_length", "modality_config", "unpad_inputs"),
    "Pooling": ("embedding_dimension", "word_embedding_dimension", "pooling_mode", *_FLAGS,
                "include_prompt"),
    "Dense": ("in_features", "out_features", "bias", "activation_function"),
    "Normalize": (),
    "": ("prompts", "default_prompt_name", "__version__", "model_type", "similarity_fn_name"),
}  # fmt: skip


class Dense(NamedTuple):
    """y = activation(x kernel + bias)."""

    kernel: Float[Array, "I O"]
    bias: Float[Array, "O"] | None
    activation: str

    def __call__(self, x: Float[Array, "B I"]) -> Float[Array, "B O"]:
        y = precision.matmul(x, self.kernel)
        return _ACTIVATIONS[self.activation](
            y if self.bias is None else precision.add_bias(y, self.bias)
        )


class Normalize(NamedTuple):
    """To length one."""

    def __call__(self, x: Float[Array, "B D"]) -> Float[Array, "B D"]:
        return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


class Vectors(NamedTuple):
    """The map from hidden states to the vector of a text."""

    pools: tuple[str, ...] = ("mean",)  # of `text_pooling.pooled`, side by side
    layers: tuple[Dense | Normalize, ...] = ()
    seq_len: int | None = None  # of the longest text, in tokens; None: nothing is said
    prompts: Mapping[str, str] = {}
    prompt: str = ""  # which stands before each text where nothing else is asked for
    include_prompt: bool = True  # whether its tokens are pooled too

    def __call__(
        self, hidden: Float[Array, "B T D"], segment_ids: Int[Array, "B T"]
    ) -> Float[Array, "B E"]:
        x = jnp.concatenate(
            [text_pooling.pooled(hidden, segment_ids, pool) for pool in self.pools], -1
        )
        for layer in self.layers:
            x = layer(x)
        return x

    def width(self, hidden: int) -> int:
        """Width of a vector, for hidden states of this width. Raises ConfigError if a layer does
        not fit the one before it."""
        size = hidden * len(self.pools)
        for layer in self.layers:
            if isinstance(layer, Dense):
                if len(layer.kernel) != size:
                    raise ConfigError(
                        f"config.pool: {' and '.join(self.pools)} of hidden states of {hidden} "
                        f"give {size} numbers, but the folder's Dense layer takes "
                        f"{len(layer.kernel)}: leave config.pool empty to follow the folder."
                    )
                size = layer.kernel.shape[1]
        return size


def read(folder: Path) -> Vectors | None:
    """The vectors that a folder describes; None if it has no modules.json.

    Raises ConfigError for what is not supported, CheckpointError for damaged files.
    """
    if not (folder / "modules.json").is_file():
        return None
    modules = _modules(folder)
    kinds = [kind for kind, _ in modules]
    if kinds[:2] != ["Transformer", "Pooling"] or set(kinds[2:]) - {"Dense", "Normalize"}:
        raise ConfigError(
            f"{folder}/modules.json has {quoted(' > '.join(kinds))}; possible are Transformer > "
            "Pooling, and behind them Dense and Normalize."
        )
    if modules[0][1] != folder:
        raise ConfigError(
            f"{folder}/modules.json has its Transformer in {modules[0][1].name}; it must be in the "
            "folder itself, where newer versions of sentence-transformers save it."
        )
    names = (folder / f"sentence_{kind}_config.json" for kind in _KINDS)
    file = next(filter(Path.is_file, names), folder / "sentence_bert_config.json")
    text = _settings(file, "Transformer")
    general = _settings(folder / "config_sentence_transformers.json", "")
    pooling = _settings(modules[1][1] / "config.json", "Pooling")
    prompts = {name: text for name, text in (general.get("prompts") or {}).items() if text}
    default = general.get("default_prompt_name")
    return Vectors(
        pools=_pools(modules[1][1], pooling),
        layers=tuple(_layer(kind, path) for kind, path in modules[2:]),
        seq_len=_seq_len(folder, text),
        prompts=prompts,
        prompt=prompts.get(default, ""),
        include_prompt=pooling.get("include_prompt", True),
    )


def _modules(folder: Path) -> list[tuple[str, Path]]:
    """(kind, folder) of each module in order."""
    path, found = folder / "modules.json", []
    try:
        for module in sorted(read_json(path), key=lambda module: module["idx"]):
            kind, place = str(module["type"]), str(module["path"])
            if not (kind.startswith("sentence_transformers.") and re.fullmatch(r"[\w.-]*", place)):
                raise ConfigError(
                    f"{path} has a module of type {quoted(kind)} in {quoted(place)}: code of "
                    "others is never run."
                )
            found.append((kind.rpartition(".")[2], folder / place if place else folder))
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    except ConfigError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return found


def _settings(path: Path, kind: str) -> dict[str, Any]:
    """A file of settings, {} where there is none; refuses what would change vectors unsaid."""
    try:
        given = dict(read_json(path)) if path.is_file() else {}
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error
    fixed = _FIXED.get(kind, {})
    for key, value in given.items():
        unsaid = value in (None, False, "", [], {}) or value == fixed.get(key)
        if key not in _KNOWN[kind] and not unsaid:
            raise ConfigError(f"{path}: {quoted(key)[1:-1]}={quoted(value)} is not supported.")
    return given


def _pools(path: Path, config: Mapping[str, Any]) -> tuple[str, ...]:
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for key, mode in _FLAGS.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or any(mode not in POOLS for mode in modes):
        raise ConfigError(
            f"{path}/config.json: pooling_mode={quoted(modes)} is not supported; possible: "
            f"{', '.join(POOLS)}."
        )
    return tuple(POOLS[mode] for mode in modes)


def _layer(kind: str, path: Path) -> Dense | Normalize:
    config = _settings(path / "config.json", kind)
    if kind == "Normalize":
        return Normalize()
    name = str(config.get("activation_function", "torch.nn.Tanh"))
    known = re.fullmatch(r"torch\.nn\.(modules\.\w+\.)?(\w+)", name)
    if not known or known[2] not in _ACTIVATIONS:
        raise ConfigError(
            f"{path}/config.json: activation_function={quoted(name)} is not supported; possible: "
            f"{', '.join(_ACTIVATIONS)}."
        )
    with files.open_folder(path) as tensors:
        wanted = {"linear.weight", "linear.bias"} - ({"linear.bias"} - set(tensors.keys()))
        if set(tensors.keys()) != wanted:
            raise CheckpointError(f"{path} has the tensors {quoted(tensors.keys())}, no Dense's.")
        whole = {}
        for key in wanted:
            place = Place(key, transposed=key == "linear.weight")
            shape = tensors.shape(place)
            whole[key] = jnp.asarray(tensors.read(place, tuple(slice(0, n) for n in shape)))
    return Dense(whole["linear.weight"], whole.get("linear.bias"), known[2])


def _seq_len(folder: Path, config: Mapping[str, Any]) -> int | None:
    """The longest text: what sentence-transformers sets, else the tokenizer's."""
    length = config.get("max_seq_length")
    path = folder / "tokenizer_config.json"
    if length is None and path.is_file():
        try:
            length = read_json(path).get("model_max_length")
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{path} is damaged: {error!r}") from error
    return length if isinstance(length, int) and length > 0 else None
