"""Any value for any key, any word typed: a run that can be, or one line and exit code 2."""

import functools
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from common import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fmjax import convert, data
from fmjax.checkpoints import pretrained
from fmjax.config import load as configs
from fmjax.data import files, hub
from fmjax.data.settings import DataSettings, read
from fmjax.data.texts import TextDataset
from fmjax.errors import ConfigError, DataError
from fmjax.params import sharding
from fmjax.tasks import report
from fmjax.training import initialize, setup

SPECS = {path.stem: str(path) for path in sorted((ROOT / "configs").glob("*.py"))}
SECTIONS = ("data", "tokenizer", "model", "optim", "mesh", "distributed", "objectives.mlm")
# Found by longer searches, or likely to be handled by nobody.
NASTY = [
    "", " ", "nan", "-inf", "1e999", "-1", "0", "True", "None", "()", "[]", "{}", "((((", "\0", "é",
    "\ud800", "\n", "\u202e", "9" * 30, "9" * 5000, "[" * 300, "{'a': " * 90 + "1" + "}" * 90,
    "a" * 50_000, "__import__('os')", "lambda: 1", "b'x'", "1j", "...", "{1, 2}", "0x1f", "1_000",
    "%", "-10%", "1e99 tokens", "0 steps", "5 parsecs", "{'': 1}", "{'a.b': 1}", "{None: 2}",
    "{'__class__': 1}", "{'a\\nb': {}}", "{'mlm': {'weight': {'a': 1}}}", "{'mlm': {'mask': []}}",
    "{'__init__': {}}", "{'..mlm': {}}", "{'train': {'lr': {'a': 1}}}", "{'train': {'decay': '('}}",
    "{'train': []}", "{'decay': {}}", "(('.*', []),)", "(([], 'train'),)", "((),)", "'.*'", "[[a]",
    "a{99999999999999}", "(" * 5000, "(('.*', 'train', 1),)", "{'nsp': {'a': 1}}", "{'nsp': -2}",
]  # fmt: skip
LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text("ab.\n_1", max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)
TEXTS = st.sampled_from(NASTY) | st.text(max_size=20) | LITERALS.map(repr)


@functools.cache
def defaults(name: str) -> dict:
    return configs.flatten(configs.load(SPECS[name]))


def keys(name: str) -> list[str]:
    sections = [key for key in SECTIONS if any(k.startswith(f"{key}.") for k in defaults(name))]
    return [*defaults(name), *sections]


@st.composite
def near(draw, texts):
    """One of `texts` with a character taken away, doubled or replaced."""
    text = draw(st.sampled_from(texts)) or "x"
    place = draw(st.integers(0, len(text) - 1))
    new = draw(st.sampled_from(["", 2 * text[place], "'", ",", "9", "-", "\n"]))
    return text[:place] + new + text[place + 1 :]


def load(name: str, *words: str):
    """The config, or None if it was refused as it has to be: one line that names a key."""
    with warnings.catch_warnings():
        # Python's own remarks on an odd literal or regular expression.
        warnings.simplefilter("ignore")
        try:
            config = configs.load(SPECS.get(name, name), words)
        except ConfigError as error:
            said = str(error)
            assert error.exit_code == 2 and "\n" not in said and len(said) < 2000, said
            named = [word.partition("=")[0].rpartition(".")[2] for word in words]
            assert not named or any(key in said for key in named), said
            return None
    assert configs.from_json(configs.to_json(config)) == config
    configs.digest(config)
    return config


# ---- config.load ---------------------------------------------------------------------------


def refuses(name: str, key: str):
    for text in ("-1", "[[]]", "{'a': {'b': None}}"):
        load(name, f"--config.{key}={text}")


def test_every_key_refuses_what_it_cannot_hold():
    """Of files that have it with a default of one kind, in the first."""
    seen = set()
    for name in SPECS:
        for key in keys(name):
            kind = key, type(defaults(name).get(key))
            if kind not in seen:
                refuses(name, key)
            seen.add(kind)
    assert len(seen) > 200


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_every_key_of_every_file_refuses_what_it_cannot_hold(name):
    for key in keys(name):
        refuses(name, key)


@pytest.mark.parametrize("name", SPECS)
@given(given=st.data())
@settings(max_examples=25, derandomize=True)
def test_any_text_for_any_key(name, given):
    key = given.draw(st.sampled_from(keys(name)))
    text = given.draw(TEXTS | near([str(defaults(name).get(key, ""))]))
    load(name, f"--config.{key}={text}")


@pytest.mark.parametrize(
    "key", ["optim.args", "optim.decay", "groups", "group_optim", "objectives", "total"]
)
def test_nasty_texts_for_the_keys_that_hold_most(key):
    for text in NASTY:
        load("mlm", f"--config.{key}={text}")


@given(word=st.text(max_size=20) | near([f"--config.{key}=1" for key in defaults("mlm")]))
@settings(max_examples=100, derandomize=True)
@example(word="--config.a\nb=1")
def test_any_word_on_the_command_line(word):
    try:
        configs.load(SPECS["mlm"], [word])
    except ConfigError as error:
        assert "\n" not in str(error)
        assert "config" in str(error) or "argument" in str(error)
    else:
        assert word.partition("=")[0].removeprefix("--config.") in defaults("mlm")


@pytest.mark.parametrize("key", defaults("mlm"))
def test_a_key_that_lacks_a_letter_is_answered_with_the_right_one(key):
    section, _, leaf = key.rpartition(".")
    wrong = f"{section}.{leaf[:-1]}".lstrip(".")
    with pytest.raises(ConfigError, match=rf"unknown key --config\.{wrong}\..*\b{leaf}\b"):
        configs.load(SPECS["mlm"], [f"--config.{wrong}=1"])


@given(arg=st.text(max_size=12) | near(["bert_base,runlocal", "variant=tiny,runlocal=true"]))
@settings(max_examples=60, derandomize=True)
def test_any_argument_of_a_config_file(arg):
    try:
        configs.load(f"{SPECS['mlm']}:{arg}")
    except ConfigError as error:
        assert error.exit_code == 2 and "\n" not in str(error)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(given=st.data(), value=JSON)
@settings(max_examples=100, derandomize=True)
def test_any_value_in_a_saved_config(tmp_path_factory, given, value):
    """Which anybody may have written: the types are not those of a file's defaults."""
    content = json.loads(configs.to_json(configs.load(SPECS["mlm"])))
    key = given.draw(st.sampled_from(keys("mlm")))
    *sections, leaf = key.split(".")
    functools.reduce(dict.get, sections, content)[leaf] = value
    path = tmp_path_factory.getbasetemp() / "saved.json"
    path.write_text(json.dumps(content))
    load(str(path))


@given(content=st.binary(max_size=30) | JSON.map(json.dumps).map(str.encode))
@settings(max_examples=60, derandomize=True)
def test_any_file_as_a_saved_config(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    load(str(path))


@pytest.mark.parametrize("name", ["\0.py", "a" * 300 + ".py", "~nobody/x.py", "\udcff.json", "/"])
def test_a_config_file_with_an_impossible_name(name):
    with pytest.raises(ConfigError, match="no .py or .json file"):
        configs.load(name)


# ---- what only the model, the optimizer and the mesh can judge -------------------------------


def assemble(*words: str):
    """All parts of a run on stand-ins for the data, as `setup.setup` begins; None if refused."""
    config = load("mlm", *TINY, *words)
    if config is None:
        return None
    vocab = data.Vocab(64, 0, 1, (2,), (3,), np.zeros(64, bool), np.zeros(64, bool))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # optax's own, on optimizers that it is about to change
        try:
            mesh = sharding.make_mesh(**config.mesh)
            sharding.check_batch(mesh, config.batch_size, config.accumulate)
            config = initialize.resolved(config)
            settings = read(DataSettings, config.data.to_dict(), "data")
            dataset = TextDataset(
                {}, "", "", {}, settings.target, ("a", "b"), vocab=vocab, settings=settings
            )
            size = dict(rows=1000, units=100_000, flops=10**9)
            return setup.assemble(config, mesh, dataset, **size)
        except ConfigError as error:
            named = [word.partition("=")[0].rpartition(".")[2] for word in (*TINY, *words)]
            assert any(key in str(error) for key in named), error
            return None


TINY = ["--config.data.seq_len=32", "--config.model.width=32", "--config.model.mlp=64"]
SIZES = ["0", "1", "2", "3", "7", "64", "1e4", str(2**24), str(2**31), str(2**62), "-1", "None"]
SHARES = ["0", "1", "5e-324", "1e308", "0.5", "0.9999999999999999", "-1", "None"]
LENGTHS = ["0", "1", "30", "10%", "100%", "500%", "1 epoch", "1e-5 tokens", "1e9 epochs", "9e18"]
OPTIMIZERS = [
    "adam", "sgd", "lion", "lbfgs", "muon", "adafactor", "rprop", "sm3", "dpsgd", "polyak_sgd",
    "momo", "chain", "contrib", "Params", "scale_by_adam", "multi_transform", "__name__",
]  # fmt: skip
MODEL = [f"model.{key}" for key in "width depth heads mlp max_len vocab_size".split()]
OPTIM = [f"optim.{key}" for key in "lr weight_decay clip end layer_decay ema".split()]
LATE = {
    **dict.fromkeys([*MODEL, "batch_size", "accumulate"], SIZES),
    **dict.fromkeys([f"mesh.{axis}" for axis in sharding.AXES], ["2", "8", "16", *SIZES]),
    **dict.fromkeys([*OPTIM, "model.dropout", "model.attention_dropout"], SHARES),
    **dict.fromkeys(["total", "optim.warmup", "optim.cooldown"], LENGTHS),
    "model.variant": ["tiny", "roberta_base", "distilbert", "modernbert_base", "", "x"],
    "model.attention": ["xla", "cudnn", "tpu", ""],
    "model.remat": ["block", "dots", "None", "x"],
    "model.scan": ["False", "None"],
    "model.name": ["init", "x", "bert"],
    "data.format": ["classes", "values", "tags", "texts", "pairs", "padded"],
    "data.classes": ["()", "('a',)", "('a', 'b', 'c')"],
    "optim.name": OPTIMIZERS,
    "optim.schedule": ["wsd", "rsqrt", "constant", "x"],
    "optim.decay": ["", "x", "(", ".*", "(?i).*KERNEL", "[[]"],
    "optim.args": [
        "{}", "{'mu_dtype': 'x'}", "{'mu_dtype': {'a': 1}}", "{'eps_root': 'a'}", "{'zzz': 1}",
        "{'eps_root': None}", "{'nesterov': 'x'}", "{'b1': 'x'}", "{'mask': 1}", "{'eps': ()}",
    ],
    "objectives": [
        "{'mlm': {'rate': 1e-300}}", "{'mlm': {'mask': 'span', 'span_max': 9223372036854775807}}",
        "{'mlm': {'vocab': 3}}", "{'mlm': {'batch': 3}}", "{'nsp': {'head': 3}}",
        "{'mlm': {'x': 1}}",
        "{'nsp': {'pair': 'nsp'}}", "{'mlm': {'weight': 1e308}}", "{'mlm': {}, 'sop': {}}",
    ],
    "groups": [
        "(('.*', 'freeze'),)", "(('x', 'train'),)", "(('', 'train'),)", "(('.*', 'train'), ('x', "
        "'freeze'))", "(('head/.*', 'train'), ('.*', 'freeze'))", "(('embed/.*', 'train'),)",
    ],
    "group_optim": [
        "{'train': {'name': 'sgd'}}", "{'train': {'name': 'sgd', 'args': {}, 'weight_decay': 0}}",
        "{'train': {'warmup': '2 epochs'}}", "{'train': {'args': {'mu_dtype': 'x'}}}",
        "{'train': {'lr': {'a': 1}}}", "{'train': {'layer_decay': 1}}",
    ],
}  # fmt: skip
CHANGES = st.sampled_from(sorted(LATE)).flatmap(
    lambda key: st.sampled_from(LATE[key]).map(lambda text: f"--config.{key}={text}")
)


@given(words=st.lists(CHANGES, min_size=1, max_size=3))
@settings(max_examples=25, derandomize=True)
@example(["--config.mesh.data=4611686018427387904", "--config.mesh.fsdp=4"])
@example(["--config.total=9e18"])
def test_parts_that_do_not_go_together_are_refused(words):
    run = assemble(*words)
    assert run is None or run.total > 0


@pytest.mark.parametrize(
    "key",
    [
        "model.name",
        "data.format",
        "mesh.data",
        "mesh.tensor",
        "total",
        "objectives",
        "groups",
        "group_optim",
    ]
    + ["optim.name", "optim.args", "optim.decay", "optim.cooldown"],
)
def test_what_passes_the_rules_and_means_nothing(key):
    for text in LATE[key]:
        assemble(f"--config.{key}={text}")


def test_stand_ins_are_valid_by_themselves():
    """Else everything above would be refused for a reason of its own."""
    assert assemble().model.cfg.width == 32
    labelled = ["--config.data.format=classes", "--config.data.long=truncate"]
    assert assemble(*labelled, "--config.objectives={'classify': {}}") is not None


@pytest.mark.parametrize("total", ["20 steps", "3 epochs", "1M tokens"])
@pytest.mark.parametrize("warmup", ["20 steps", "1 epoch", "1M tokens", "100%"])
def test_a_length_is_not_judged_by_data_not_yet_read(total, warmup, monkeypatch):
    """All of these fit a corpus of 20 rows of 50 000 tokens."""

    class Read(Exception):
        pass

    def prepare(*args, **kwargs):
        raise Read

    monkeypatch.setattr(setup.data, "prepare", prepare)
    words = [f"--config.total={total}", f"--config.optim.warmup={warmup}"]
    config = configs.load(SPECS["mlm"], [*TINY, *words])
    with pytest.raises(Read):
        setup.setup(config, sharding.make_mesh())


# ---- names of files ------------------------------------------------------------------------

NAMES = {
    "no user": "~no-such-user/x",
    "too long": "a" * 300,
    "too deep": "a/" * 3000,
    "NUL": "a\0b",
    "no UTF-8": "\udcff",
    "no plain file": "/dev/null",
    "blank": " ",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_name_that_no_file_can_have(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    written = configs.load(SPECS["report"], [f"--config.folder={name}"])
    doors = [
        lambda: files.expand(name, "data.train"),
        lambda: files.expand(f"{name}*", "data.train"),
        lambda: list(hub.records(DataSettings(name="hub", path=name), "train")),
        lambda: data.prepare({"cache": "cache"}, {"name": name}),
        lambda: data.prepare({"cache": f"/dev/null/{name}"}, {}),
        lambda: convert.find(name),
        lambda: pretrained.open_folder(name, sharding.make_mesh()),
        lambda: report.run(written, tmp_path),
    ]
    for door in doors:
        with pytest.raises((ConfigError, DataError)):
            door()


# ---- run.py --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, said",
    [
        ([b"--config.optim.lr=\xff"], "--config.optim.lr: got '\\udcff'"),
        ([b"--config.data.train=\xff.txt", b"--config.sed=1"], "unknown key --config.sed"),
        ([b"--config.mesh.data=3", b"--dry_run"], "config.mesh="),
    ],
)
def test_a_command_that_cannot_be(words, said, tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "run.py", f"--config={SPECS['mlm']}", *words],
        cwd=tmp_path,
        env=os.environ | {"XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: ") and said in done.stderr
    assert "Traceback" not in done.stderr and os.listdir(tmp_path) == []
