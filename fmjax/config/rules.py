"""Legal values of config keys: one table over dotted keys, checked before jax is imported.

To constrain a new key, add a row to `RULES`; the first row whose expression matches the whole key
applies. Names of tasks, models and objectives are looked up in the folders, not imported.
"""

import ast
import math
import re
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from fmjax.config import plugins
from fmjax.errors import ConfigError, did_you_mean, quoted

PACKAGE = Path(__file__).parent.parent


class Check(NamedTuple):
    """A predicate over any value, and the words that say what it accepts."""

    accepts: Callable[[Any], bool]
    words: str


class Modules(NamedTuple):
    """The files of a folder of the package that define a function or class, given as a regular
    expression over the text after `def` or `class`."""

    folder: str
    defines: str
    also: tuple[str, ...] = ()  # names that mean something else

    def names(self) -> list[str]:
        found = re.compile(rf"^(def|class) {self.defines}\b", re.MULTILINE)
        files = sorted((PACKAGE / self.folder).glob("*.py"))
        files = [file for file in files if file.stem != "__init__"]
        named = [file.stem for file in files if found.search(file.read_text(encoding="utf-8"))]
        return [*named, *self.also]


def duration(value: Any) -> tuple[Fraction, str]:
    """(number, unit) of steps as an int or of "1500 steps", "3 epochs", "10M tokens", "50k images",
    "2T flops", "10%".

    The unit is "step", "epoch", "flop", "%", or one of `UNITS` without its s. Raises ValueError for
    anything else.
    """
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63:
        return Fraction(value), "step"
    match = DURATION_TEXT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"not a duration: {value!r}")
    scale = match["scale"].lower().replace("g", "b") or " "  # a billion, or giga
    number = Fraction(match["number"]) * 1000 ** " kmbt".index(scale)
    unit = match["unit"].rstrip("s")
    if (
        number >= (2**127 if unit == "flop" else 2**63)
        or unit == "step"
        and number.denominator != 1
    ):
        raise ValueError(f"not a whole number of steps: {value!r}")
    return number, unit


def is_duration(value: Any) -> bool:
    """True if `value` is text that reads as a duration; a bare int may be any count."""
    try:
        return isinstance(value, str) and bool(duration(value))
    except ValueError:
        return False


def rule_of(key: str) -> Check | Modules | tuple[str, ...] | None:
    """The first rule whose expression matches the whole `key`; a group obeys the rules of optim."""
    key = re.sub(r"^group_optim\.[^.]+\.", "optim.", key).removeprefix("pretraining.")
    key = re.sub(r"^model\.parts\.[^.]+\.", "model.", key)  # a model among several
    return next((rule for pattern, rule in RULES if re.fullmatch(pattern, key)), None)


def check(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for values outside `RULES` in the nested dict; `fmjax.config.constraints`
    checks which go together.

    Raises:
      ConfigError: names the first offending key and what is possible.
    """
    for key, value in _nodes(without_none(config)):
        _check_node(key, value)
    pretraining = config.get("pretraining") or {}
    sections = (config.get("objectives") or {}, pretraining.get("objectives") or {})
    for name, args in (item for section in sections for item in section.items()):
        if "module" not in (args or {}):
            check_choice(
                f"objectives.{name}", name, Modules("objectives", "(loss_fn|compare)").names()
            )


def task_flags(task: str) -> set[str]:
    """The argument names of `fmjax/<task>.py`'s `run`, read without importing it."""
    tree = ast.parse((PACKAGE / "tasks" / f"{task}.py").read_text(encoding="utf-8"))
    run = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "run")
    return {argument.arg for argument in run.args.args + run.args.kwonlyargs}


def without_none(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Without None, which leaves a value to the model's variant, or to the run that a task opens;
    what an open dict holds is left to nobody."""
    given = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and f"{prefix}{name}" not in OPEN:
            value = without_none(value, f"{prefix}{name}.")
        if value is not None:
            given[name] = value
    return given


def _nodes(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in the config, dicts before what they hold."""
    for name, value in config.items():
        yield f"{prefix}{name}", value
        if isinstance(value, Mapping):
            yield from _nodes(value, f"{prefix}{name}.")


def _check_node(key: str, value: Any) -> None:
    if re.fullmatch(DICTS, key):
        if not isinstance(value, Mapping):
            raise ConfigError(f"--config.{key}: got {quoted(value)}, expected a dict")
        return
    rule = rule_of(key)
    if isinstance(rule, Check):
        if not rule.accepts(value):
            raise ConfigError(f"--config.{key}: got {quoted(value)}, expected {rule.words}")
    elif rule is not None and not (key in PLUGINS and plugins.is_object(value)):
        check_choice(key, value, rule.names() if isinstance(rule, Modules) else rule)


def check_choice(key: str, value: Any, possible) -> None:
    if value not in possible:
        hint = did_you_mean(str(value), possible)
        raise ConfigError(f"--config.{key}: got {quoted(value)}, which does not exist.{hint}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_real(value: Any, low: float = 0.0, high: float = math.inf) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and low <= value <= high


def _is_pair(value: Any) -> bool:
    return isinstance(value, tuple | list) and len(value) == 2


def _is_shares(value: Any) -> bool:
    numbers = isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_real, value))
    return numbers and sum(value) <= 1


def _is_ranges(value: Any) -> bool:
    pairs = isinstance(value, tuple | list) and all(
        isinstance(pair, tuple | list) and len(pair) == 2 and all(map(_is_whole, pair))
        for pair in value
    )
    ends = [end for pair in value for end in pair] if pairs else [-1]
    return all(a < b for a, b in zip([-1, *ends], [*ends, 2**62], strict=True))


def _is_texts(value: Any) -> bool:
    texts = isinstance(value, tuple | list) and all(isinstance(x, str) for x in value)
    return texts and len(set(value)) == len(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or bool(value) and _is_texts(value)


def _is_targets(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and bool(value)
        and all(
            isinstance(row, tuple)
            and len(row) == 2
            and is_regex(row[0])
            and (row[1] in (None, "input", "output") or _is_whole(row[1]) and row[1] >= 0)
            for row in value
        )
    )


def _is_denoisers(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and bool(value)
        and all(
            isinstance(pair, tuple | list)
            and len(pair) == 2
            and _is_real(pair[0])
            and not 0 < pair[0] < 1
            and _is_real(pair[1], 0.0, 1.0)
            and 0 < pair[1] < 1
            for pair in value
        )
    )


def _is_arms(value: Any) -> bool:
    rows = isinstance(value, tuple) and all(
        isinstance(row, tuple)
        and len(row) == 2
        and isinstance(row[0], str)
        and re.fullmatch(ARM_KEYS, row[0])
        and isinstance(row[1], tuple)
        and None not in row[1]
        for row in value
    )
    each = {len(row[1]) for row in value} if rows else set()
    once = rows and len(dict(value)) == len(value)
    return value == () or bool(once) and len(each) == 1 and min(each) > 1


def is_regex(value: Any) -> bool:
    try:
        return isinstance(value, str) and bool(re.compile(value))
    except (re.error, OverflowError, RecursionError):
        return False


def _is_address(value: Any) -> bool:
    address = r"|([\w.-]+|\[[0-9a-fA-F:.]+\]):\d{1,5}"
    return isinstance(value, str) and bool(re.fullmatch(address, value))


def _is_span(value: Any) -> bool:
    return is_duration(value) or _is_whole(value) and value >= 0


def _is_length(value: Any) -> bool:
    return _is_span(value) and duration(value)[0] > 0 and duration(value)[1] != "%"


def _is_period(value: Any) -> bool:
    return _is_span(value) and duration(value)[1] != "flop"


def _whole(low: int, high: int) -> Check:
    accepts = lambda value: _is_whole(value) and low <= value <= high
    return Check(accepts, f"a number from {low} to {high} without decimals")


# Dicts whose keys are the user's choice: the command line replaces them whole.
OPEN = ("init", "objectives", "group_optim", "optim.args", "args", "pretraining")
PLUGINS = ("model.name", "data.format")  # may also name the user's own, "package.module:name"
DICTS = (
    r"data|benchmark|pretraining(\.data)?|tokenizer|model|adapter|quantise|mesh|distributed|optim|objectives(\.[^.]+(\.validation)?)?|group_optim(\.[^.]+)?"
    r"|((optim|group_optim\.[^.]+)\.)?args"
)
# In what the arms of one program may differ.
ARM_KEYS = r"seed|(optim|group_optim\.\w+)\.(lr|weight_decay)|adapter\.(rank|alpha|init|text)"
SCHEDULES = ("linear", "cosine", "wsd", "rsqrt", "constant")
MASKS = ("token", "word", "span")  # what masked language modelling chooses
POOLS = ("", "first", "last", "mean")  # what stands for a whole sequence; "": as models have it
# How documents become rows, or what kind of example a record is.
FORMATS = ("packed", "padded", "pairs", "chat", "chat_padded")
FORMATS += ("classes", "labels", "values", "tags", "spans", "choices", "texts", "seq2seq")
OTHER_FORMATS = ("images",)  # rows that are no texts
TEMPLATES = ("auto", "tokenizer", "plain", "alpaca")  # how conversations become one text

UNITS = ("tokens", "images", "pairs", "rows")  # what data count: `unit` of datasets
LENGTHS = ("step", "epoch", "flop")  # units of a duration that any data have
DURATION_TEXT = re.compile(
    r"\s*(?P<number>\d+(_\d+)*(\.\d+)?(e\d\d?)?)\s*(?P<scale>[KkMmBbGgTt]?)\s*"
    rf"(?P<unit>({'|'.join(unit.removesuffix('s') for unit in (*UNITS, *LENGTHS))})s?|%)\s*"
)
BOOLEAN = Check(lambda v: isinstance(v, bool), "a boolean")
DENOISERS = Check(
    _is_denoisers,
    "(mean length of a span, share of the tokens) pairs: lengths from 1, or 0 for the end of a "
    "document, shares above 0 and below 1",
)
POSITIVE = Check(lambda v: _is_whole(v) and v >= 1, "a whole number of at least 1")
COUNT = Check(lambda v: _is_whole(v) and v >= 0, "a whole number of at least 0")
AXIS = Check(lambda v: _is_whole(v) and (v >= 1 or v == -1), "at least 1, or -1: all that remain")
PROBABILITY = Check(lambda v: _is_real(v, 0.0, 1.0), "a number between 0 and 1")
FRACTION = Check(lambda v: _is_real(v, 0.0, 1.0) and v < 1, "a number from 0 to below 1")
NON_NEGATIVE = Check(_is_real, "a finite number of at least 0")
ABOVE_ZERO = Check(lambda v: _is_real(v) and v > 0, "a finite number above 0")
SHARES = Check(_is_shares, "two numbers of at least 0 that add up to at most 1")
RANGES = Check(_is_ranges, "(first, last + 1) pairs in ascending order: ((80, 96), (112, 120))")
COLUMNS = Check(_is_names, "names of columns: 'a', 'a,b' or ('a', 'b')")
CLASSES = Check(_is_texts, "a tuple of different texts")
ADDRESS = Check(_is_address, "<host>:<port>, or '' with one process")
MODULE = Check(plugins.is_module, "the name of a module of Python, such as 'package.module'")
NAME = Check(lambda v: isinstance(v, str) and v.isidentifier(), "the name of an optimizer of optax")
TARGETS = Check(
    _is_targets, "(regular expression, number) pairs, for ia3 (…, 'input'), (…, 'output'); or None"
)
ARMS = Check(
    _is_arms,
    "(key, values) pairs such as (('seed', (0, 1)), ('optim.lr', (1e-3, 1e-4))), each key once and "
    "with as many values as the others, two at least; keys are seed, lr and weight_decay of optim "
    "or group_optim, and rank, alpha, init and text of adapter",
)
LEDGER = Check(
    lambda v: _is_texts(v) and set(v) <= {"forgetting", "memory", "samples", "slices"},
    "a tuple with any of 'forgetting', 'memory', 'samples' and 'slices'",
)
EXAMS = Check(
    lambda v: isinstance(v, tuple) and all(isinstance(x, Mapping) for x in v),
    "questions, ({'name': 'blimp', 'path': 'blimp/'},)",
)
REGEX = Check(is_regex, "a regular expression")
DURATION = Check(_is_period, "a duration: 1500, '1500 steps', '3 epochs', '10M tokens' or '10%'")
DURATIONS = Check(
    lambda v: isinstance(v, tuple) and len(v) == 2 and all(map(_is_period, v)),
    f"two of {DURATION.words}",
)
RATES = Check(
    lambda v: all(_is_real(x, 0.0, 1.0) for x in (v if _is_pair(v) else [v])),
    "a number between 0 and 1, or two of them: the first and the last",
)
SHOTS = Check(
    lambda v: isinstance(v, tuple) and v and all(_is_whole(x) and x >= 0 for x in v),
    "numbers of examples, (0, 1, 4)",
)
SHARE = Check(lambda v: _is_real(v, 0.0, 1.0) and v > 0, "a number above 0 and at most 1")
STOPS = Check(lambda v: _is_texts(v) and "" not in v, "texts of at least a character")
LENGTH = Check(
    _is_length,
    "a duration above 0: 1500, '1500 steps', '3 epochs', '10M tokens' or '2T flops'",
)

# Questions by name: fmjax/evaluation/benchmarks.py, and of GLUE
# fmjax/evaluation/prompt_templates.py.
BENCHMARKS = ("blimp", "lambada", "hellaswag", "gsm8k", "choices")
BENCHMARKS += ("sst2", "cola", "mrpc", "rte", "qnli", "wnli")
# (expression over the whole dotted key, what its value must be).
RULES: tuple[tuple[str, Check | Modules | tuple[str, ...]], ...] = (
    ("total", LENGTH),
    (r"(log|eval|save)_every|.*\.(warmup|cooldown|delay)", DURATION),
    (r"objectives\.[^.]+\.(start|stop)", DURATION),
    (r"objectives\.mlm\.over", DURATIONS),
    (r"objectives\.mlm\.rate", RATES),
    (r"objectives\.[^.]+\.(validation\.)?prefix|data\.pack", BOOLEAN),
    (r"objectives\.span_corruption\.(validation\.)?denoisers", DENOISERS),
    (
        r"batch_size|accumulate|keep|top_k|max_skipped|objectives\.mlm\.(validation\.)?span_max",
        POSITIVE,
    ),
    (r"objectives\.span\.(n_best|max_answer)", POSITIVE),
    (r"model\.depth", _whole(1, 1000)),
    (r"model\.(buckets|far)", _whole(1, 2**24)),
    (r"model\.(width|heads|mlp|max_len)", _whole(1, 2**24)),
    (
        r"model\.(window|encoder_depth|(full|nope)_every|kv_heads|(head|embed)_size)",
        _whole(0, 2**24),
    ),
    (r"model\.(experts|expert_mlp|shared_mlp)", _whole(0, 2**24)),
    (r"model\.experts_per_token", POSITIVE),
    (r"model\.(capacity|router_(aux|z)_loss|clip_qkv)", NON_NEGATIVE),
    (r"distributed\.num_processes|beams", POSITIVE),
    ("length_penalty", NON_NEGATIVE),
    (r"distributed\.coordinator", ADDRESS),
    (r"distributed\.(timeout|heartbeat|grace)_sec", _whole(10, 86400)),
    (
        r"seed|limit|step|layer|keep_best|data\.(max_documents|examples)|distributed\.process_id",
        COUNT,
    ),
    (r"objectives\.contrast\.temperature", ABOVE_ZERO),
    (r"data\.seq_len", _whole(8, 2**20)),
    (r"data\.skip", RANGES),
    (r"data\.workers", _whole(0, 1024)),
    (r"tokenizer\.vocab_size", _whole(32, 2**24)),
    (r"model\.(vocab_size|types|position_shift|start_id)", _whole(0, 2**24)),
    (r"model\.theta_(full|local)", Check(lambda v: _is_real(v, 1.0), "a finite number from 1")),
    (r"mesh\..*", AXIS),
    (r".*\.(rate|spm|layer_decay|end|span_stop)", PROBABILITY),
    (r"data\.validation_fraction|.*\.(\w*dropout|ema|b1|b2)", FRACTION),
    (r".*\.(lr|weight_decay|clip|eps|weight|skip_spikes)", NON_NEGATIVE),
    (r"objectives\.mlm\.(validation\.)?replace", SHARES),
    (r".*\.decay", REGEX),
    (r"optim\.name", NAME),
    ("arms", ARMS),
    ("ledger", LEDGER),
    ("benchmarks", EXAMS),
    (r"(samples\.)?(count|length)", _whole(1, 2**20)),
    (r"samples\.top_k", POSITIVE),
    (r"(samples\.)?temperature", NON_NEGATIVE),
    ("shots", SHOTS),
    ("score", ("token", "word")),
    (r"benchmark\.name", (*BENCHMARKS, "classes")),
    ("norm", ("sum", "token", "byte", "gain")),
    (r"benchmark\.limit", COUNT),
    ("top_p", SHARE),
    ("min_p", PROBABILITY),
    ("repetition_penalty", ABOVE_ZERO),
    ("stop", STOPS),
    ("long", ("error", "cut")),
    ("weights|cache", ("", "int8")),
    ("ahead", _whole(1, 64)),
    ("groups", Check(lambda v: isinstance(v, tuple) and v, "(regular expression, group) pairs")),
    ("precision", ("float32", "bfloat16")),
    ("split", ("train", "validation")),
    ("classifier", ("logistic", "mlp")),
    ("features", ("states", "words")),
    (r"optim\.schedule", SCHEDULES),
    (r"adapter\.name", ("", "lora", "ia3", "bottleneck", "prompt", "prefix")),
    (r"quantise\.name", ("", "nf4", "int8", "fp8")),
    (r"quantise\.targets", REGEX),
    (r"adapter\.targets", TARGETS),
    (r"adapter\.(rank|width|length)", _whole(1, 2**24)),
    (r"adapter\.hidden", _whole(0, 2**24)),
    (
        r"adapter\.init",
        ("uniform", "pissa", "loftq", "vocabulary", "text", "random", "normal"),
    ),
    (r"adapter\.encoder", ("", "mlp", "lstm")),
    (r"adapter\.whole", ("token", "prompt")),
    (r"adapter\.(alpha|scale)|max_kl", ABOVE_ZERO),
    (r"adapter\.activation", ("gelu", "gelu_tanh", "relu", "silu")),
    (r"adapter\.scaling", ("alpha/rank", "rslora")),
    (r"data\.name", ("pydocs", "pycode", "text", "hub", "digits", "idx")),
    (r"data\.format", (*FORMATS, *OTHER_FORMATS)),
    (r"(data\.)?template", TEMPLATES),
    (r"data\.columns", COLUMNS),
    (r"data\.classes", CLASSES),
    (r"data\.(stride|room|target_len)", _whole(0, 2**20)),
    (r"data\.document", ("blank_line", "line", "file")),
    (r"data\.long", ("split", "truncate", "drop", "error")),
    (r"data\.on_bad_record", ("raise", "skip", "quarantine")),
    (r"data\.overlap", ("keep", "drop")),
    (r"data\.pair", ("nsp", "sop")),
    (r"tokenizer\.kind", ("wordpiece", "bpe", "unigram", "char")),
    (r"tokenizer\.special", ("bert", "gpt", "t5", "fim")),
    (r"data\.frame", ("piece", "document")),
    (r"objectives\.mlm\.(validation\.)?mask", MASKS),
    (r"((objectives\.[^.]+|model)\.)?pool", POOLS),
    (r"objectives\.[^.]+\.module", MODULE),
    (r"model\.name", Modules("models", "Model", also=("init",))),
    ("task", Modules("tasks", r"run\(\s*config")),  # trials.py has a `run` that is no task
)
