"""Configs and the command line: what is accepted, and what is said about the rest."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from fmjax.config import load as configs
from fmjax.config import rules, values
from fmjax.data.settings import DataSettings
from fmjax.errors import ConfigError

ROOT = Path(__file__).parents[2]
FILE = """
from ml_collections import ConfigDict, config_dict

def get_config(arg=None):
    return ConfigDict(dict(
        seed=0, total="100 steps", batch_size=64, accumulate=1, precision="float32", log_every=50,
        optim=dict(
            name="adamw", args=dict(b1=0.9), lr=1e-3, schedule="linear", warmup="10%",
            cooldown="0%", clip=1.0, weight_decay=0.0, skip_spikes=0.0,
        ),
        data=dict(
            name="pydocs", train="", streaming=False, seq_len=128, workers=0, shares=(0.5, 0.5),
            sizes=[1, 2], skip=(),
        ),
        model=dict(dropout=0.1, classes={}), tokenizer=dict(vocab_size=512), best="",
        objectives=dict(mlm=dict(weight=1.0, rate=0.15)),
        groups=((".*", "train"),), group_optim={}, untyped=None,
        window=config_dict.placeholder(int), hub_token="",
    ))
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text(FILE)
    return path


def load(file, *words):
    return configs.load(str(file), words)


def refusal(file, *words) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file, *words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- values --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "word, value",
    [
        ("--config.batch_size=1e3", 1000),
        ("--config.batch_size=1_024", 1024),
        ("--config.seed=0", 0),
        ("--config.optim.lr=1", 1.0),
        ("--config.optim.lr=3e-4", 3e-4),
        ("--config.data.streaming=True", True),
        ("--config.data.streaming=0", False),
        ("--config.data.train=(1, 'a b').txt", "(1, 'a b').txt"),
        ("--config.data.train=a=b", "a=b"),
        ("--config.data.train=", ""),
        ("--config.data.train=None", "None"),
        ("--config.data.shares=(1,)", (1,)),
        ("--config.data.shares=[0.2, 0.3, 0.5]", (0.2, 0.3, 0.5)),
        ("--config.data.sizes=[3]", (3,)),
        ("--config.untyped=3", 3),
        ("--config.untyped='text'", "text"),
        ("--config.untyped=(1, None)", (1, None)),
        ("--config.window=1e2", 100),
        ("--config.window=None", None),
        ("--config.total=1e3", 1000),
        ("--config.total=3 epochs", "3 epochs"),
        ("--config.log_every=10%", "10%"),
        ("--config.log_every=5", 5),
        ("--config.optim.warmup=1_000", 1000),
    ],
)
def test_an_override_is_read_as_the_type_of_its_default(file, word, value):
    key = word.partition("=")[0].removeprefix("--config.")
    found = configs.flatten(load(file, word))[key]
    assert found == value and type(found) is type(value)


def test_a_value_may_be_a_word_of_its_own(file):
    config = load(file, "--config.optim.lr", "0.5", "--config.seed", "7", "--config.seed=8")
    assert (config.optim.lr, config.seed) == (0.5, 8)


def test_open_dicts_are_replaced_whole(file, monkeypatch):
    word = "--config.group_optim={'head': {'lr': 0.1}}"
    config = load(file, word, "--config.groups=(('head/.*', 'head'), ('.*', 'freeze'))")
    assert config.group_optim.to_dict() == {"head": {"lr": 0.1}}
    assert "group_optim.head.lr: got -1" in refusal(file, word.replace("0.1", "-1"))


@pytest.mark.parametrize(
    "settings, said",
    [
        ("3", "head: got 3, expected a dict"),
        ("{'lrr': 1}", "head.lrr: no setting that a group can have of its own. Did you mean 'lr'"),
        ("{'clip': 1.0}", "head.clip: no setting"),
        ("{'ema': 0.9}", "head.ema: no setting"),
        ("{'layer_decay': 0.9}", "head.layer_decay: no setting"),
        ("{'lr': None}", "head.lr: got None"),
        ("{'name': 3}", "head.name: got 3, expected the name of an optimizer"),
        ("{'schedule': 'lineal'}", "Did you mean 'linear'"),
        ("{'schedule': 'wsd'}", "head.cooldown='0%' does not go with"),
        ("{'cooldown': '10%'}", "head.schedule='linear': wsd needs"),
        ("{'args': 3}", "head.args: got 3, expected a dict"),
        ("{'args': {'b1': 1}}", "head.args.b1: got 1, expected"),
        ("{'args': {'weight_decay': 0.1}}", "set --config.group_optim.head.weight_decay instead"),
    ],
)
def test_a_group_obeys_the_rules_of_optim(file, settings, said):
    groups = "--config.groups=(('head/.*', 'head'), ('.*', 'freeze'))"
    assert said in refusal(file, groups, f"--config.group_optim={{'head': {settings}}}")


def test_a_group_that_nothing_trains_in_is_refused(file):
    said = refusal(file, "--config.group_optim={'trian': {'lr': 1.0}}")
    assert "no row of --config.groups trains 'trian'. Did you mean 'train'?" in said


def test_a_group_may_leave_the_schedule_whose_cooldown_it_inherits(file):
    config = load(
        file,
        "--config.optim.schedule=wsd",
        "--config.optim.cooldown=20%",
        "--config.group_optim={'train': {'schedule': 'constant'}}",
    )
    assert config.group_optim.train.schedule == "constant"


@pytest.mark.parametrize("best", ["", "validation/loss", "validation/mlm/mask_rate"])
def test_best_is_a_metric_of_the_run(file, best):
    assert load(file, f"--config.best={best}").best == best


def test_data_settings_have_the_rules_of_the_config():
    """What a config may hold, preparation takes, and the other way round."""
    assert DataSettings(validation_fraction=0.995).validation_fraction == 0.995
    rules.check({"data": dataclasses.asdict(DataSettings(validation_fraction=0.995))})
    for value in (1, -0.1, float("nan"), True):
        with pytest.raises(ConfigError, match="validation_fraction"):
            DataSettings(validation_fraction=value)


def test_the_config_is_locked(file):
    with pytest.raises(AttributeError):
        load(file).optim.lrr = 1.0


@pytest.mark.parametrize(
    "word, said",
    [
        ("--config.batch_size=1.5", "a whole number"),
        ("--config.batch_size=1e400", "a whole number"),
        ("--config.batch_size=1e19", "a whole number"),
        ("--config.batch_size=0", "at least 1"),
        ("--config.batch_size=True", "a whole number"),
        ("--config.optim.lr=nan", "a finite number"),
        ("--config.optim.lr=-inf", "a finite number"),
        ("--config.optim.lr=-1e-3", "at least 0"),
        ("--config.optim.lr=None", "a finite number"),
        ("--config.optim.args.b1=1", "below 1"),
        ("--config.data.streaming=yes", "true or false"),
        ("--config.data.shares=0.8", "(0.9, 0.99)"),
        ("--config.data.shares=(1, 1e999)", "finite"),
        ("--config.data.shares=(1, __import__('os'))", "tuple"),
        ("--config.untyped=1e999", "finite"),
        ("--config.untyped=text", "'text'"),
        ("--config.untyped=" + "-" * 5000 + "1", "a Python literal"),
        ("--config.group_optim={1: 2}", "not text"),
        ("--config.objectives.mlm.rate=1.01", "between 0 and 1"),
        ("--config.objectives={}", "nothing to train"),
        ("--config.total=0", "above 0"),
        ("--config.total=10%", "above 0"),
        ("--config.total=1e999 steps", "a duration"),
        ("--config.optim.warmup=1.5 steps", "a duration"),
        ("--config.optim.schedule=lineal", "Did you mean 'linear'"),
        ("--config.precision=fp8", "bfloat16"),
        ("--config.accumulate=3", "batch_size=64 is not a multiple of"),
        ("--config.groups=(('.*', 'trian'),)", "Did you mean 'train'"),
        ("--config.groups=(('(', 'train'),)", "regular expression"),
        ("--config.model.dropout=1", "below 1"),
        ("--config.data.seq_len=7", "from 8 to"),
        ("--config.data.workers=1025", "to 1024"),
        ("--config.data.skip=((80, 80),)", "in ascending order"),
        ("--config.data.skip=((80, 90), (90, 95))", "in ascending order"),
        ("--config.data.skip=(80, 90)", "(first, last + 1)"),
        ("--config.optim.skip_spikes=-1", "at least 0"),
        ("--config.tokenizer.vocab_size=31", "from 32"),
        ("--config.optim.args={'learning_rate': 1.0}", "set --config.optim.lr instead"),
        ("--config.optim.args={'mask': None}", "set --config.optim.decay instead"),
        ("--config.optim.cooldown=1", "schedule='linear': wsd needs"),
        ("--config.optim.schedule=wsd", "cooldown='0%' does not go with"),
        ("--config.objectives={'mlm': 3}", "objectives.mlm: got 3, expected a dict"),
        ("--config.objectives={'mlm': None}", "objectives.mlm: got None, expected a dict"),
        ("--config.objectives={'mlm': {'rate': None}}", "objectives.mlm.rate: got None"),
        ("--config.objectives={'mlm': {'replace': (0.8,)}}", "two numbers"),
        ("--config.objectives={'mlm': {'replace': (0.8, -0.1)}}", "two numbers"),
        ("--config.objectives={'mlm': {'replace': (0.8, 0.3)}}", "at most 1"),
        ("--config.objectives={'mlm': {'span_max': 0}}", "at least 1"),
        ("--config.best=validation/los", "'validation/mlm/…'"),
        ("--config.best=validation/nsp/accuracy", "'validation/mlm/…'"),
        ("--config.best=train/loss", "'validation/loss'"),
    ],
)
def test_row50_a_value_that_cannot_be_used_is_refused_with_what_can(file, word, said):
    message = refusal(file, word)
    assert said in message
    assert word.partition("=")[0].removeprefix("--config.").split(".")[0] in message


@pytest.mark.parametrize(
    "words, said",
    [
        (["--config.optim.lrr=3"], "Did you mean 'lr'?"),
        (["--config.lr=3"], "Did you mean --config.optim.lr?"),
        (["--config.optin.lr=3"], "Did you mean --config.optim.lr?"),
        (["--config.zzz=3"], "Possible: accumulate, batch_size"),
        (["--config.objectives.nsp.weight=1"], "Possible in objectives: mlm. To add"),
        (
            ["--config.objectives.mlm.mask=span"],
            """="{'mlm': {'rate': 0.15, 'weight': 1.0, 'mask': 'span'}}" as a whole""",
        ),
        (
            ["--config.group_optim.head.lr=1e-2"],
            """--config.group_optim="{'head': {'lr': 0.01}}" as a whole""",
        ),
        (["--config.optim.args.b2=0.9"], """--config.optim.args="{'b1': 0.9, 'b2': 0.9}" as"""),
        (["--config.seed.x=1"], "unknown key --config.seed.x"),
        (["--config.optim=1"], "--config.optim.lr"),
        (["config.optim.lr=3"], "Did you mean --config.optim.lr=3?"),
        (["optim.lr=3"], "Did you mean --config.optim.lr=3?"),
        (["lr=3"], "Did you mean --config.optim.lr=3?"),
        (["--lr=3"], "Did you mean --config.optim.lr=3?"),
        (["--workdr=x"], "Did you mean '--workdir'?"),
        (["--config.seed"], "needs a value"),
        (["--config.seed", "--config.optim.lr=1"], "--config.seed needs a value"),
    ],
)
def test_row50_a_misspelt_argument_is_answered_with_the_right_spelling(file, words, said):
    assert said in refusal(file, *words)


HOSTILE = st.one_of(
    st.text(max_size=30),
    st.integers().map(str),
    st.floats().map(str),
    st.recursive(st.none() | st.floats() | st.text(), st.lists).map(repr),
    st.sampled_from(
        [
            "((((",
            "{" * 500,
            "9" * 5000,
            "1e999999999",
            "0x1f",
            "0x" + "f" * 5000,
            "-0",
            "__import__('os')",
        ]
    ),
)


@given(
    key=st.sampled_from(["batch_size", "optim.lr", "data.streaming", "groups", "total", "window"]),
    text=HOSTILE,
)
@settings(max_examples=100)
def test_any_text_is_a_valid_value_or_an_error_that_names_the_key(tmp_path_factory, key, text):
    file = tmp_path_factory.getbasetemp() / "hostile.py"
    if not file.exists():
        file.write_text(FILE)
    try:
        config = load(file, f"--config.{key}={text}")
    except ConfigError as error:
        assert key.split(".")[-1] in str(error) and "\n" not in str(error)
    else:
        assert configs.from_json(configs.to_json(config)) == config


# ---- files ---------------------------------------------------------------------------------


def test_a_missing_file_is_answered_with_its_neighbours(file):
    assert "plain.py'?" in refusal(file.with_name("plane.py"))
    assert "plain.py'?" in refusal(file.with_suffix(""))


@pytest.mark.parametrize(
    "text, said",
    [
        ("x = 1", "defines no get_config"),
        ("def get_config(): return 3", "returned a int"),
        ("\ndef get_config(arg):\n    return nothing", ":3: NameError: name 'nothing'"),
        ("def get_config(:", ":1: SyntaxError"),
        ("import does_not_exist", ":1: ModuleNotFoundError"),
        ("from ml_collections import ConfigDict as C\ndef get_config(): return C({'x': print})",
         "x is a builtin_function_or_method"),
        ("from ml_collections import ConfigDict as C\ndef get_config(): return C({'x': 1e999})",
         "x is inf"),
        ("from ml_collections import ConfigDict as C, config_dict as d\n"
         "def get_config(): return C({'x': d.required_placeholder(int)})", "--config.x=… must be"),
    ],
)  # fmt: skip
def test_a_broken_config_file_is_refused_with_its_line(tmp_path, text, said):
    path = tmp_path / "broken.py"
    path.write_text(text)
    assert said in refusal(path)


def test_a_config_without_argument_refuses_one(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text("from ml_collections import ConfigDict\ndef get_config(): return ConfigDict()")
    assert "takes no argument" in refusal(f"{path}:tiny")


def test_names_are_looked_up_without_importing(tmp_path, monkeypatch):
    """A task is a file that defines `run`; a file that could not be imported still counts."""
    (tmp_path / "models").mkdir()
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "task_a.py").write_text(
        "import nowhere\ndef run(config, workdir, *, fresh=0): 1"
    )
    (tmp_path / "tasks" / "helper.py").write_text("def running(): 1")
    (tmp_path / "models" / "m.py").write_text("class Model: pass")
    monkeypatch.setattr(rules, "PACKAGE", tmp_path)
    rules.check({"task": "task_a", "model": {"name": "m"}})
    with pytest.raises(ConfigError, match="Did you mean 'task_a'. Possible: task_a."):
        rules.check({"task": "task_b"})
    with pytest.raises(ConfigError, match="--config.model.name: got 'n'.*Possible: init, m."):
        rules.check({"model": {"name": "n"}})
    assert rules.task_flags("task_a") == {"config", "workdir", "fresh"}


def test_a_key_that_a_task_looks_for_in_vain(tmp_path):
    (tmp_path / "config.json").write_text('{"task": "train", "optim": {"lr": 1.0}}')
    config = configs.load(str(tmp_path / "config.json"))
    for read in (lambda: config.total, lambda: config.optim.name):
        with pytest.raises(ConfigError, match="config.json lacks a key .*'(total|name)'"):
            with configs.missing_keys("config.json"):
                read()
    with pytest.raises(AttributeError):
        with configs.missing_keys("config.json"):
            None.name  # noqa: B018


# ---- parse_arg, steps, JSON ----------------------------------------------------------------


@pytest.mark.parametrize(
    "arg, variant, res, runlocal",
    [
        (None, "mini", 224, False),
        ("", "mini", 224, False),
        ("tiny", "tiny", 224, False),
        ("tiny,runlocal", "tiny", 224, True),
        ("runlocal,res=1e3", "mini", 1000, True),
        ("variant=base,runlocal=false", "base", 224, False),
    ],
)
def test_parse_arg(arg, variant, res, runlocal):
    found = configs.parse_arg(arg, variant="mini", res=224, runlocal=False)
    assert found.to_dict() == {"variant": variant, "res": res, "runlocal": runlocal}


@pytest.mark.parametrize("arg", ["tiny,base", "tiny,runlokal", "re=3", "res=1.5", "runlocal=2"])
def test_parse_arg_refuses(arg):
    with pytest.raises(ConfigError):
        configs.parse_arg(arg, variant="mini", res=224, runlocal=False)


@pytest.mark.parametrize(
    "duration, expected",
    [
        (7, 7),
        (0, 0),
        ("1500 steps", 1500),
        ("1 step", 1),
        ("2k steps", 2000),
        ("3 epochs", 75),
        ("2.5epochs", 63),  # 62.5
        ("10M tokens", 4883),  # 10⁷ / 2048 = 4882.8
        ("2048 tokens", 1),
        ("2049 tokens", 2),
        ("2M flops", 8),  # 2·10⁶ / 250,000
        ("2.1e6 flops", 9),
        ("0.002 G flops", 8),
        ("10%", 100),
        ("0.01%", 1),  # 0.1
        ("0%", 0),
        ("100%", 1000),
    ],
)
def test_durations_in_steps(duration, expected):
    found = configs.steps(
        duration, total=1000, steps_per_epoch=25, units_per_step=2048, flops_per_step=250_000
    )
    assert found == expected and type(found) is int


@pytest.mark.parametrize("unit", rules.UNITS)
def test_a_duration_is_in_the_unit_of_its_data(unit):
    assert configs.steps(f"1k {unit}", units_per_step=64, unit=unit) == 16
    other = "images" if unit == "tokens" else "tokens"
    with pytest.raises(ConfigError, match=f"config.data are counted in {unit}. Use .*'50k {unit}'"):
        configs.steps(f"1k {other}", units_per_step=64, unit=unit)


@pytest.mark.parametrize("duration", ["1 epoch", "1M tokens", "1M flops", "10%"])
def test_a_duration_without_its_reference_is_refused(duration):
    with pytest.raises(ConfigError, match="'1000 steps'"):
        configs.steps(duration)


@pytest.mark.parametrize("duration", [-1, True, "5", "5 years", "-5%", "1e999999 steps"])
def test_what_is_no_duration_is_refused(duration):
    with pytest.raises(ConfigError, match="is not a duration"):
        configs.steps(duration, total=10, steps_per_epoch=10, units_per_step=10)
    assert not rules.DURATION.accepts(duration)


def test_only_a_length_is_counted_in_operations():
    assert rules.LENGTH.accepts("2e23 flops") and not rules.DURATION.accepts("2T flops")


def test_a_rule_is_of_the_whole_key():
    rules.check({"keeper": "x", "data": {"pairs": "x"}})


CHECKS = [rule for _, rule in rules.RULES if isinstance(rule, rules.Check)]


@pytest.mark.parametrize("value", [None, True, float("nan"), float("inf"), (), {}, "(", -2])
@pytest.mark.parametrize("rule", CHECKS, ids=lambda rule: rule.words)
def test_no_check_accepts_or_stumbles_over_nonsense(rule, value):
    empty = rules.RANGES, rules.CLASSES, rules.ARMS, rules.LEDGER, rules.STOPS, rules.EXAMS
    nothing = rule in empty and value == ()
    any_name = rule is rules.COLUMNS and value == "("
    either = rule is rules.BOOLEAN and isinstance(value, bool)
    assert bool(rule.accepts(value)) == (nothing or any_name or either)


@pytest.mark.parametrize("value", [3, (), [], "x"])
@pytest.mark.parametrize("key", ["precision", "task"])
def test_no_choice_accepts_or_stumbles_over_nonsense(key, value):
    with pytest.raises(ConfigError, match=key):
        rules.check({key: value})


JSON_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**63) + 1, 2**63 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(),
    ),
    lambda inner: (
        st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(
            st.text("abc_", min_size=1).filter(values.NAME.fullmatch), inner, max_size=3
        )
    ),
    max_leaves=10,
)


@given(st.dictionaries(st.text("abcd", min_size=1), JSON_VALUES, max_size=4))
@settings(max_examples=100)
def test_json_keeps_every_config(content):
    config = ConfigDict(content)
    text = configs.to_json(config)
    again = configs.from_json(text)
    assert again.to_dict() == content and again.is_locked
    assert configs.to_json(again) == text
    assert configs.diff(config, again) == []


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "3",
        '{"a": NaN}',
        '{"a": 9223372036854775808}',
        '{"a": Infinity}',
        "[" * 10**5,
        '{"a": ' + "[" * 700 + "]" * 700 + "}",
    ],
)
def test_what_is_no_json_config_is_refused(text):
    with pytest.raises(ConfigError):
        configs.from_json(text)


def test_a_saved_config_loads_as_data(file, tmp_path):
    saved = tmp_path / "config.json"
    saved.write_text(configs.to_json(load(file)))
    assert load(saved) == load(file)
    assert load(saved, "--config.optim.lr=5").optim.lr == 5.0


def test_diff_names_keys_with_both_values(file):
    words = ["--config.optim.lr=5", "--config.group_optim={'train': {'lr': 1.0}}"]
    assert configs.diff(load(file), load(file, *words)) == [
        ("group_optim", {}, configs.ABSENT),
        ("group_optim.train.lr", configs.ABSENT, 1.0),
        ("optim.lr", 1e-3, 5.0),
    ]


def test_the_digest_is_of_what_determines_the_numbers(file):
    first = configs.digest(load(file))
    assert re.fullmatch("[0-9a-f]{8}", first)
    same = load(file, "--config.log_every=7", "--config.hub_token=abc")
    assert configs.digest(same) == configs.digest(load(file, "--config.hub_token=xyz"))
    assert configs.digest(load(file, "--config.seed=1")) != first
    assert configs.digest(configs.from_json(configs.to_json(load(file)))) == first


def test_secrets_are_redacted_and_nothing_else():
    content = {
        "tokenizer": {"name": "train"},
        "mask": "token",
        "hub": {"hf_token": "abc", "api_key": "", "tokens": 5},
        "lists": ({"password": "p"},),
    }
    assert configs.redact(ConfigDict(content)).to_dict() == {
        "tokenizer": {"name": "train"},
        "mask": "token",
        "hub": {"hf_token": "***", "api_key": "", "tokens": 5},
        "lists": ({"password": "***"},),
    }


# ---- run.py --------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path):
    """run.py in a process whose `import jax` ends it with code 99."""
    (tmp_path / "trap" / "jax").mkdir(parents=True)
    (tmp_path / "trap" / "jax" / "__init__.py").write_text("import os; os._exit(99)")
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "trap")}

    def run(*words):
        command = [sys.executable, str(ROOT / "run.py"), *map(str, words)]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
        )

    return run


def test_the_trap_is_sprung_by_jax(run, tmp_path):
    """Else the tests below would prove nothing."""
    done = subprocess.run(
        [sys.executable, "-c", "import jax"],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "trap")},
    )
    assert done.returncode == 99


def test_help_needs_no_jax(run):
    done = run("--help")
    assert done.returncode == 0 and done.stderr == ""
    assert "python run.py --config=configs/mlm.py" in done.stdout
    assert len(done.stdout.splitlines()) < 30


@pytest.mark.parametrize(
    "words, said",
    [
        (["--config=plane.py"], "Did you mean 'plain.py'?"),
        (["--config=plain.py", "lr=3"], "Did you mean --config.optim.lr=3?"),
        (["--config=plain.py", "--config.optim.lr=nan"], "--config.optim.lr: got 'nan'"),
        (["--config", "plain.py", "--config.batch_size", "-1"], "--config.batch_size: got -1"),
        (["--config=plain.py", "--config.data.train=a b", "--frsh"], "Did you mean '--fresh'?"),
        (["--config=plain.py", "--fre"], "Did you mean '--fresh'?"),
    ],
)
def test_row50_typical_mistakes_get_one_line_and_code_2_before_jax(run, file, words, said):
    done = run(*words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and said in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_a_config_all_there_are_are_listed(run, file):
    done = run()
    assert done.returncode == 2 and done.stdout == ""
    first, *lines = done.stderr.splitlines()
    assert first.startswith("error: --config is missing.")
    assert all(line.startswith("  --config=configs/") for line in lines) and len(lines) > 30
    assert run("--list").stdout.splitlines() == lines


def test_print_config_is_json_and_the_difference(run, file):
    done = run(
        "--config=plain.py", "--print_config", "--config.optim.lr=5", "--config.hub_token=s3"
    )
    assert done.returncode == 0
    printed = configs.from_json(done.stdout)
    assert printed.optim.lr == 5.0 and printed.hub_token == "***"
    assert done.stderr == "changed: hub_token: '' -> '***'\nchanged: optim.lr: 0.001 -> 5.0\n"
    assert "s3" not in done.stdout + done.stderr


def test_a_saved_config_goes_on_in_its_folder(run, file):
    saved = file.parent / "old" / "config.json"
    saved.parent.mkdir()
    saved.write_text(configs.to_json(ConfigDict(load(file).to_dict() | {"task": "train"})))
    (saved.parent / "summary.json").write_text("{}")  # it has trained
    done = run("--config=old/config.json", "--config.seed=1")
    assert done.returncode == 2
    assert "old holds a run with another config (seed: 0 -> 1)" in done.stderr


def test_a_file_that_is_no_config_is_refused(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    done = run("--config=config.json")
    assert done.returncode == 2 and "not a config of fmjax" in done.stderr


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("{'rate': 1.5}", "validation.rate: got 1.5"),
        ("{'mask': 'words'}", "validation.mask: got 'words'"),
        ("{'replace': (0.9, 0.2)}", "validation.replace: got"),
        ("3", "validation: got 3, expected a dict"),
    ],
)
def test_what_an_objective_does_in_evaluation_obeys_the_same_rules(own, said):
    objectives = f"{{'mlm': {{'rate': 0.4, 'validation': {own}}}}}"
    with pytest.raises(ConfigError, match=re.escape(f"objectives.mlm.{said}")):
        configs.load(str(ROOT / "configs/mlm.py"), [f"--config.objectives={objectives}"])
