"""Reading and writing a config.json of transformers: the parts that all families share.

A family's table is {key of config.json: (field of our Config, what transformers assumes when the
key is absent)}, read in both directions.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fmjax.config import rules
from fmjax.errors import ConfigError, did_you_mean, quoted

Table = Mapping[str, tuple[str, Any]]
# (class of transformers, the heads that it has), the richest first.
Architectures = Sequence[tuple[str, frozenset[str]]]

# Keys of all families that we have in one setting only.
FIXED = {"quantization_config": None, "per_layer_config": None}
MAX_OUTPUTS = 2**24  # of a head, which a config.json may ask for
SINGLE_LABEL, MULTI_LABEL = "single_label_classification", "multi_label_classification"
REGRESSION = "regression"
_PROBLEMS = {SINGLE_LABEL: "classify", MULTI_LABEL: "classify", REGRESSION: "regress"}
_SIZES = {"span": 2, "choose": 1, "nsp": 2}  # of heads that have as many outputs in any model
_NAMED = {"classify", "regress", "tag"}  # heads whose outputs have names in config.json
# Classes without a linear head: trunks, and what predicts tokens.
_NO_HEAD = (
    r"(?!.*(For|DoubleHeads))\w+Model|\w+(LMHead|WithLMHead)Model"
    r"|\w+For(MaskedLM|CausalLM|PreTraining|ConditionalGeneration)"
)
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def renamed(hf: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """A config.json in which each key has the name that its family writes.

    Raises ConfigError for two names of one key with different values.
    """
    named = dict(hf)
    for other, key in aliases.items():
        if (value := named.pop(other, None)) is None:
            continue
        if named.setdefault(key, value) != value:
            raise ConfigError(
                f"config.json has {other}={quoted(value)} beside {key}={quoted(named[key])}, which "
                "are two names of one key."
            )
    return named


def read(hf: Mapping[str, Any], table: Table, fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Our options for a config.json; `fixed` are those that we have in one setting only.

    Raises ConfigError for another setting of these, and for two keys that differ in what is one
    option here.
    """
    for key, value in fixed.items():
        if (hf.get(key, value) or None) != (value or None):  # false, null and absent are one
            raise ConfigError(
                f"config.json has {key}={quoted(hf[key])}; fmjax's {hf['model_type']} has "
                f"{value!r} only."
            )
    found: dict[str, Any] = {}
    for key, (field, default) in table.items():
        value = hf.get(key, default)
        if field.endswith("activation"):
            value = _activation(key, value)
        if found.setdefault(field, value) != value:
            raise ConfigError(
                f"config.json has {key}={value!r} beside {found[field]!r} for what is one option "
                f"here, config.model.{field}."
            )
    rules.check({"model": found})  # before anything is made as long as the model is deep
    return found


def one_of(hf: Mapping[str, Any], key: str, possible: Mapping[str, Any], default: str) -> Any:
    """Our value for one of the `possible` values of a key of config.json."""
    value = hf.get(key, default)
    if value not in possible:
        raise ConfigError(
            f"config.json has {key}={quoted(value)}, which fmjax does not have."
            + did_you_mean(str(value), possible)
        )
    return possible[value]


def written(cfg: Any, table: Table) -> dict[str, Any]:
    """The keys of `table` for a Config of ours."""
    names = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
    values = {key: (field, getattr(cfg, field)) for key, (field, _) in table.items()}
    return {
        key: names[value] if field.endswith("activation") else value
        for key, (field, value) in values.items()
    }


def require(family: str, field: str, value: Any, needed: Any) -> None:
    """Raises ConfigError for an option that no class of transformers has."""
    if value != needed:
        raise ConfigError(
            f"config.model.{field}={value!r} cannot be exported: transformers' {family} needs "
            f"{needed!r} here."
        )


def labels(hf: Mapping[str, Any], classes: Mapping[str, int]) -> tuple[str, ...]:
    """The names of the classes that a config.json gives; () where it has none for a head."""
    named = hf.get("id2label")
    if not {"classify", "tag"} & classes.keys():
        return ()
    keys = sorted(named, key=int) if named else []
    names = tuple(str(named[key]) for key in keys)
    if [int(key) for key in keys] != list(range(len(keys))) or len({*names}) < len(names):
        raise ConfigError(
            f"config.json has id2label={quoted(named)}: the numbers of the outputs from 0 on, each "
            "with a name of its own, are needed."
        )
    # What transformers writes where nobody gave names says nothing of the data.
    return () if names == default_names(len(names)) else names


def default_names(outputs: int) -> tuple[str, ...]:
    """The names that transformers gives the outputs of a head that has none."""
    return tuple(f"LABEL_{i}" for i in range(outputs))


def classes(hf: Mapping[str, Any], architectures: Architectures) -> dict[str, int]:
    """{head: outputs} of the class of transformers that wrote a config.json."""
    kind = next((kind for kind in hf.get("architectures") or () if kind in dict(architectures)), "")
    heads = {head for name, has in architectures if name == kind for head in has}
    sizes: dict[str, int] = {name: size for name, size in _SIZES.items() if name in heads}
    if not heads & _NAMED:
        return sizes
    outputs = len(hf.get("id2label") or ()) or hf.get("num_labels", 2)
    if not (isinstance(outputs, int) and 0 < outputs <= MAX_OUTPUTS):
        raise ConfigError(f"config.json has num_labels={outputs!r}, not a number of classes.")
    if "tag" in heads:
        return {"tag": outputs}
    problem = hf.get("problem_type") or (REGRESSION if outputs == 1 else SINGLE_LABEL)
    if problem not in _PROBLEMS:
        raise ConfigError(
            f"config.json has problem_type={quoted(problem)}, which fmjax does not have."
            + did_you_mean(str(problem), _PROBLEMS)
        )
    if problem == REGRESSION and outputs > 1:
        raise ConfigError(
            f"config.json has problem_type='regression' with {outputs} labels; fmjax's regress has "
            "one number an example."
        )
    return {_PROBLEMS[problem]: outputs}


def check_architecture(hf: Mapping[str, Any], architectures: Architectures) -> None:
    """Raises ConfigError if a config.json is of a class with a head that `architectures` lacks."""
    kinds = hf.get("architectures") or ()
    readable = dict.fromkeys(name for name, _ in architectures)
    if not kinds or any(kind in readable or re.fullmatch(_NO_HEAD, kind) for kind in kinds):
        return
    raise ConfigError(
        f"config.json is of a {quoted(kinds[0])}, whose head fmjax does not read; of "
        f"{hf['model_type']} it reads {', '.join(readable)}."
    )


def named_outputs(
    outputs: Mapping[str, int], heads: Iterable[str], labels: Sequence[str]
) -> dict[str, Any]:
    """The classes of a head according to config.json."""
    head = next((name for name in ("classify", "tag", "regress") if name in heads), None)
    if head is None:
        return {}
    names = list(labels) if head != "regress" else []
    if len(names) != outputs[head]:
        names = default_names(outputs[head])
    kinds = {"classify": SINGLE_LABEL, "regress": REGRESSION}
    problem = {"problem_type": kinds[head]} if head in kinds else {}
    return problem | {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _activation(key: str, value: str) -> str:
    if value not in ACTIVATIONS:
        raise ConfigError(
            f"config.json has {key}={value!r}, which fmjax does not have."
            + did_you_mean(value, ACTIVATIONS)
        )
    return ACTIVATIONS[value]
