"""What runs gain and lose beside their metrics, of methods side by side in configs/compare.py."""

import json

import numpy as np
import pytest
from common import ROOT
from test_finetune import encoder, files, home  # noqa: F401

from fmjax.checkpoints import pretrained
from fmjax.config import load as configs
from fmjax.errors import ConfigError, NumericsError
from fmjax.experiments import trials
from fmjax.params import paths, sharding
from fmjax.tasks import evaluate, train
from fmjax.training import side_effects

SPEC = f"{ROOT}/configs/compare.py:steps=4,seeds=2"


def words(home, encoder, *more):  # noqa: F811
    given = ["data.seq_len=24", "pretraining={'limit': 2}", "log_every=1", *more]
    return [*files(home), f"--config.init={encoder}", *(f"--config.{word}" for word in given)]


@pytest.fixture(scope="module")
def compared(home, encoder, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("compare")
    trials.start(f"{SPEC},only=full+head+lora", words(home, encoder), "all", folder)
    return folder


def records(folder, given):
    found = trials.walk(f"{SPEC},only=full+head+lora", given, folder)
    return {t.settings["arg"].partition(",")[0]: trials.read(folder, t) for t in found}


@pytest.fixture
def told(compared, home, encoder):  # noqa: F811
    return records(compared, words(home, encoder))


@pytest.mark.slow
def test_what_a_run_keeps_is_what_trains(compared, told):
    of = lambda name: told[name]["results"]
    lora = trials_folder(compared, "lora", told) / "arms/1"
    opened = pretrained.open_folder(str(lora), sharding.make_mesh())
    moving = {
        name: x
        for name, x in paths.unstack(opened.params).items()
        if name.startswith("head/") or "lora_" in name
    }
    for result in of("lora"):
        assert result["trainable_parameters"] == sum(x.size for x in moving.values())
        assert result["kept_bytes"] == 4 * result["trainable_parameters"]
        assert result["parameters"] == paths.size(opened.params)


def trials_folder(folder, name, told):
    return folder / told[name]["command"].rpartition("/")[2]


@pytest.mark.slow
def test_costs_are_in_the_order_that_they_have_to_be(told):
    of = lambda name, read: [read(result) for result in told[name]["results"]]
    flops = {name: of(name, lambda one: one["metrics"]["flops"])[0] for name in told}
    assert flops["head"] < flops["lora"]
    # A forward pass, and two products a backward one: of the head next to nothing moves.
    assert 2.7 < flops["full"] / flops["head"] < 3.0
    peak = {name: of(name, lambda one: one["ledger"]["memory"]["peak_bytes"])[0] for name in told}
    assert peak["head"] < peak["full"]
    assert all(result["step_seconds"] > 0 for one in told.values() for result in one["results"])


@pytest.mark.slow
def test_forgetting_is_the_change_of_the_loss_of_pretraining(told, encoder, tmp_path):  # noqa: F811
    found = {k: [r["ledger"]["forgetting"] for r in v["results"]] for k, v in told.items()}
    before = found["head"][0]["before"]
    assert {one["before"] for each in found.values() for one in each} == {before}
    assert [one["after"] for one in found["head"]] == pytest.approx([before] * 2, abs=1e-6)
    assert all(abs(one["after"] - before) > 1e-3 for one in found["full"])
    assert found["lora"][0]["after"] != found["lora"][1]["after"]
    given = [f"--config.folder={encoder}", "--config.limit=2", "--config.data.format=padded"]
    evaluate.run(configs.load(f"{ROOT}/configs/evaluate.py", given), tmp_path)
    line = (encoder / "evaluation.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["metrics"]["loss"] == pytest.approx(before, abs=1e-6)


@pytest.mark.slow
def test_slices_add_up_to_the_mean(told):
    for record in told.values():
        for result in record["results"]:
            slices, mean = result["ledger"]["slices"], result["metrics"]
            for parts in slices.values():
                weights = [part["examples"] for part in parts]
                values = [part["classify/accuracy"] for part in parts]
                whole = np.average(values, weights=weights)
                assert whole == pytest.approx(mean["validation/classify/accuracy"], abs=1e-6)
            assert len(slices["classes"]) > 1


def test_slices_by_hand():
    examples = dict(
        label=np.array([0, 1, 1, 0, 1, 1, 1, 1]),
        tokens=np.array([3, 3, 3, 4, 5, 6, 7, 9]),
        step=np.array(4),
        accuracy=np.array([1, 0, 1, 1, 0, 0, 1, 1]),
    )
    found = side_effects.slices(examples, ("a", "b", "c"))
    assert found["classes"] == [
        {"name": "a", "examples": 2, "accuracy": 1.0},
        {"name": "b", "examples": 6, "accuracy": 0.5},
    ]
    # Quartiles at 3, 5 and 7: equal lengths stay together.
    assert found["lengths"] == [
        {"name": "3 … 4 tokens", "examples": 4, "accuracy": 0.75},
        {"name": "5 … 6 tokens", "examples": 2, "accuracy": 0.0},
        {"name": "7 … 9 tokens", "examples": 2, "accuracy": 1.0},
    ]
    numbers = dict(label=np.array([0.5, 2.0]), loss=np.array([1.0, 3.0]))
    assert side_effects.slices(numbers, ()) == {}


@pytest.mark.slow
def test_what_is_done_is_not_done_again(compared, home, encoder, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(train, "run", lambda *_, **__: pytest.fail("trained again"))
    given = words(home, encoder)
    trials.start(f"{SPEC},only=full+head+lora", given, "all", compared)
    table = capsys.readouterr().out
    results = records(compared, given)["lora"]["results"]
    mean = np.mean([one["metrics"]["validation/classify/accuracy"] for one in results])
    rows = [line for line in table.splitlines() if line.startswith("lora ")]
    assert any(f"{mean:.4f}" in row for row in rows)
    assert "forgets" in table and "brier" in table and "peak" in table


@pytest.mark.slow
def test_a_ledger_may_be_asked_for_later(home, encoder, tmp_path, monkeypatch):  # noqa: F811
    config = lambda *more: configs.load(
        f"{ROOT}/configs/compare.py:head,steps=2,seeds=1", words(home, encoder, *more)
    )
    train.run(config("ledger=()"), tmp_path / "run")
    file = tmp_path / "run/ledger.json"
    assert not file.exists()
    train.run(config("ledger=('slices',)"), tmp_path / "run")
    assert "slices" in json.loads(file.read_text())
    train.run(config(), tmp_path / "run")
    found = json.loads(file.read_text())
    assert {"slices", "forgetting", "memory"} <= found.keys()
    monkeypatch.setattr(side_effects.run_report, "write", lambda *_: pytest.fail("written again"))
    train.run(config(), tmp_path / "run")
    assert "kept" not in found and json.loads(file.read_text()) == found


@pytest.mark.slow
def test_one_that_diverges_does_not_end_the_others(home, encoder, tmp_path, capsys):  # noqa: F811
    file = tmp_path / "wild.py"
    file.write_text(
        "import runpy\nfrom fmjax.experiments import sweep\n"
        f"own = runpy.run_path('{ROOT}/configs/compare.py')\n"
        "get_config = lambda arg=None: own['get_config']('head,steps=4,seeds=2')\n"
        "def get_sweep(): return sweep.grid('optim.lr', (1e38, 1e-2))\n"
    )
    given = words(home, encoder, "optim.clip=0.0", "max_skipped=1", "optim.warmup=0")
    for _ in range(2):
        with pytest.raises(NumericsError, match="not finite"):
            trials.start(str(file), given, "all", tmp_path / "runs")
        table = capsys.readouterr().out.splitlines()
        assert any(line.startswith("0.01 ") and "±" in line for line in table)


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        ("prompt", (), "20 of config.adapter.length before it, is longer"),
        ("head", ("pretraining={'limits': 2}",), r"config\.pretraining\.limits is not known"),
        ("head", ("pretraining={'objectives': {'nsp': {}}}",), "for config.pretraining: "),
    ],
)
def test_what_cannot_be_measured_is_found_before_training(
    method,
    given,
    said,
    home,  # noqa: F811
    encoder,  # noqa: F811
    tmp_path,
):
    given = words(home, encoder, *given)
    spec = f"{ROOT}/configs/compare.py:{method},steps=2,seeds=1"
    with pytest.raises(ConfigError, match=said):
        train.run(configs.load(spec, given), tmp_path / "run")
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.parametrize(
    ("arg", "given", "said"),
    [
        ("head", ("init=",), "begins from nothing has nothing to forget"),
        ("loar", (), "unknown method 'loar'.*lora"),
        ("head", ("ledger=('memory', 'memory')",), "ledger: got .*expected a tuple"),
        ("head", ("ledger=('memmory',)",), "ledger: got .*expected a tuple"),
        ("head", ("pretraining={'limit': -2}",), "pretraining.limit: got -2"),
    ],
)
def test_what_does_not_exist_is_refused(arg, given, said, home, encoder):  # noqa: F811
    with pytest.raises(ConfigError, match=said):
        configs.load(f"{ROOT}/configs/compare.py:{arg}", words(home, encoder, *given))
