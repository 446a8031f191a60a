"""Command-line words as changes to a config: `--config.a.b=value`, typed by the file's default."""

import ast
import math
import re
from collections.abc import Iterable

from ml_collections import ConfigDict
from ml_collections.config_dict import RequiredValueError

from fmjax.config import rules
from fmjax.config.values import flatten, plain
from fmjax.errors import ConfigError, did_you_mean, quoted

FLAGS = ("--config", "--workdir", "--fresh", "--dry_run", "--print_config", "--sweep", "--help")
# What reading a value raises; the literal reader's own words are about syntax trees.
UNREADABLE = (ValueError, KeyError, SyntaxError, TypeError, MemoryError, RecursionError)


def apply(config: ConfigDict, words: Iterable[str]) -> None:
    """Sets `--config.a.b=value` or `--config.a.b value` in place; refuses all other words.

    Raises:
      ConfigError: an unknown key, a value of another type, or a word that is no override.
    """
    for key, text in _overrides(config, list(words)):
        _assign(config, key, text)


def parse(shown: str, text: str, default, kind: type | None = None, rule=None):
    """`text` as a value of the type of `default`.

    Args:
      shown: how to name the key in an error.
      default: the value being replaced; None accepts any Python literal, or a `kind` and None.
      kind: the type where it is not the default's own (placeholders).
      rule: the key's row in `rules.RULES`; durations accept a number of steps and text alike.
    """
    kind = kind or type(default)
    lasting = rule in (rules.DURATION, rules.LENGTH) or rules.is_duration(default)
    if lasting and isinstance(default, int | str):
        kind = rules.duration
    read, words = PARSERS.get(kind, PARSERS[type(None)])
    if default is None and text == "None":
        return None
    try:
        return read(text)
    except UNREADABLE as error:
        default = default.to_dict() if isinstance(default, ConfigDict) else default
        message = f"{shown}: got {quoted(text)}, expected {words}; the default is {default!r}"
        raise ConfigError(message) from error


def _overrides(config: ConfigDict, words: list[str]) -> list[tuple[str, str]]:
    """(dotted key, text) of each override; anything else on the command line is refused."""
    pairs = []
    while words:
        word = words.pop(0)
        name, given, text = word.partition("=")
        if not re.fullmatch(r"--config(\.[\w-]+)+", name):
            hint = _spelling(config, word)
            raise ConfigError(f"argument {quoted(word)} is not understood.{hint}")
        if not given:
            if not words or words[0].startswith("--"):
                raise ConfigError(f"{word} needs a value: {word}=…")
            text = words.pop(0)
        pairs.append((name.removeprefix("--config."), text))
    return pairs


def _spelling(config: ConfigDict, word: str) -> str:
    """The probable meaning of an argument that is neither a flag nor `--config.key=value`."""
    name, given, text = word.lstrip("-").partition("=")
    name = name.removeprefix("config.")
    found = [key for key in flatten(config) if name and f".{key}".endswith(f".{name}")]
    if found and text.isprintable():
        return f" Did you mean --config.{found[0]}{given}{text}?"
    return did_you_mean(f"--{name}", FLAGS)


def _assign(config: ConfigDict, key: str, text: str) -> None:
    node, *parents = config, *key.split(".")
    leaf = parents.pop()
    for name in parents:
        node = node.get(name) if isinstance(node, ConfigDict) else None
    if not isinstance(node, ConfigDict) or leaf not in node:
        raise ConfigError(
            f"unknown key --config.{key}.{_near_keys(config, key)}{_addition(config, key, text)}"
        )
    try:
        default = node[leaf]
    except RequiredValueError:
        default = None
    if isinstance(default, ConfigDict) and default and key not in rules.OPEN:
        inside = ", ".join(f"--config.{key}.{name}" for name in default)
        raise ConfigError(f"--config.{key} holds several keys, set one of them: {inside}")
    value = parse(f"--config.{key}", text, default, node.get_type(leaf), rules.rule_of(key))
    with config.unlocked(), config.ignore_type():
        node[leaf] = plain(value, key)


def _near_keys(config: ConfigDict, key: str) -> str:
    """The keys that an unknown `key` may have meant, and all keys of the level it reached."""
    node, path = config, []
    *parents, leaf = key.split(".")
    for name in parents:
        if not isinstance(node.get(name), ConfigDict):
            leaf = name
            break
        node, path = node[name], [*path, name]
    level = ".".join(path)
    same_leaf = [known for known in flatten(config) if known.split(".")[-1] == key.split(".")[-1]]
    hint = f" Did you mean --config.{same_leaf[0]}?" if same_leaf else did_you_mean(leaf, node)
    if not node:
        hint = f" --config.{level} is empty."
    elif "Possible:" not in hint:
        hint += f" Possible{f' in {level}' if level else ''}: {', '.join(sorted(node))}."
    return hint


def _addition(config: ConfigDict, key: str, text: str) -> str:
    """The way to set an unknown `key` of an open dict to `text`: the dict with it, as a whole."""
    for opened in rules.OPEN:
        section, _, name = opened.rpartition(".")
        node = config.get(section) if section else config
        if key.startswith(f"{opened}.") and isinstance(node, ConfigDict) and name in node:
            entries = node[name].to_dict() if node[name] else {}
            whole = _with(entries, key.removeprefix(f"{opened}.").split("."), _value(text))
            return f' To add an entry, set --config.{opened}="{whole}" as a whole.'
    return ""


def _with(entries: dict, path: list[str], value) -> dict:
    """Nested `entries` in which `path` leads to `value`."""
    name, *rest = path
    if rest:
        inner = entries.get(name)
        value = _with(inner if isinstance(inner, dict) else {}, rest, value)
    return entries | {name: value}


def _value(text: str):
    """`text` as a Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except UNREADABLE:
        return text


def _int(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        number = _float(text)
        if not number.is_integer():
            raise
        value = int(number)
    if abs(value) >= 2**63:
        raise ValueError(text)
    return value


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _bool(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


def _duration(text: str) -> int | str:
    try:
        return _int(text)
    except ValueError:
        rules.duration(text)
        return text


def _literal(*kinds: type):
    def parse(text: str):
        value = ast.literal_eval(text)
        if kinds and not isinstance(value, kinds):
            raise TypeError(text)
        return value

    return parse


PARSERS = {
    bool: (_bool, "true or false"),
    int: (_int, "a whole number such as 1000, 1_000 or 1e3"),
    float: (_float, "a finite number"),
    str: (str, "text"),
    tuple: (_literal(tuple, list), "a Python tuple such as (0.9, 0.99) or (1,)"),
    list: (_literal(tuple, list), "a Python list such as [1, 2]"),
    ConfigDict: (_literal(dict), "a Python dict such as {'a': 1}"),
    type(None): (_literal(), "a Python literal such as 3, 'text' or None"),
    rules.duration: (_duration, rules.DURATION.words),
}
