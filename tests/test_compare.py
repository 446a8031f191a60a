"""Methods side by side: what a method's JSON says is what its run folders say."""

import json

import numpy as np
import pytest
from common import ROOT
from test_finetune import encoder, files, home  # noqa: F401

from fmjax import compare, evaluate, pretrained, sharding, trees
from fmjax import config as configs
from fmjax.errors import ConfigError, NumericsError

SHARED = ("total=4", "batch_size=16", "log_every=1", "eval_every=0", "keep_best=0")


def config_of(home, encoder, methods, *words):  # noqa: F811
    given = [*files(home), f"--config.init={encoder}", "--config.data.seq_len=24"]
    given += [f"--config.shared={SHARED}", "--config.seeds=(0, 1)", "--config.pretraining.limit=2"]
    path = f"{ROOT}/configs/compare.py:classify,only={methods}"
    return configs.load(path, [*given, *words])


@pytest.fixture(scope="module")
def compared(home, encoder, tmp_path_factory):  # noqa: F811
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        folder = tmp_path_factory.mktemp("compare")
        compare.run(config_of(home, encoder, "full+head+lora"), folder)
    return folder


def record(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def test_a_record_is_what_its_arms_came_to(compared):
    told = record(compared, "lora")
    for arm in (0, 1):
        summary = json.loads((compared / f"lora/arms/{arm}/summary.json").read_text())
        for name, values in told["metrics"].items():
            assert values[arm] == summary["metrics"][name]
        assert told["trainable_parameters"] == summary["trainable_parameters"]
    assert told["seeds"] == [0, 1] and told["steps"] == 4
    assert {"validation/classify/ece", "validation/classify/brier"} <= told["metrics"].keys()
    opened = pretrained.open_folder(str(compared / "lora/arms/1"), sharding.make_mesh())
    moving = {
        name: x
        for name, x in trees.unstack(opened.params).items()
        if name.startswith("head/") or "lora_" in name
    }
    assert told["trainable_parameters"] == sum(x.size for x in moving.values())
    assert told["kept_bytes"] == 4 * told["trainable_parameters"]
    assert told["parameters"] == trees.size(opened.params)


def test_costs_are_in_the_order_that_they_have_to_be(compared):
    full, head, lora = (record(compared, name) for name in ("full", "head", "lora"))
    of = lambda told: told["flops"][0]
    assert of(head) < of(lora)
    # A forward pass, and two products a backward one: of the head next to nothing moves.
    assert 2.7 < of(full) / of(head) < 3.0
    assert head["peak_bytes"] < full["peak_bytes"]
    assert all(told["seconds"][0] > 0 for told in (full, head, lora))


def test_forgetting_is_the_change_of_the_loss_of_pretraining(compared, home, encoder):  # noqa: F811
    head, full, lora = (record(compared, name)["pretraining"] for name in ("head", "full", "lora"))
    assert head["after"] == pytest.approx([head["before"]] * 2, abs=1e-6)
    assert full["before"] == lora["before"] == head["before"]
    assert all(abs(after - full["before"]) > 1e-3 for after in full["after"])
    words = [f"--config.folder={encoder}", "--config.limit=2", "--config.data.format=padded"]
    evaluate.run(configs.load(f"{ROOT}/configs/evaluate.py", words), compared)
    line = (encoder / "evaluation.jsonl").read_text().splitlines()[-1]
    assert json.loads(line)["metrics"]["loss"] == pytest.approx(head["before"], abs=1e-6)
    assert len(set(lora["after"])) == 2


def test_what_is_done_is_not_done_again(compared, home, encoder, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(compare.train, "run", lambda *_: pytest.fail("trained again"))
    before = (compared / "head.json").read_bytes()
    compare.run(config_of(home, encoder, "full+head+lora"), compared)
    assert (compared / "head.json").read_bytes() == before
    table = capsys.readouterr().out
    mean = np.mean(record(compared, "lora")["metrics"]["validation/classify/accuracy"])
    row = next(line for line in table.splitlines() if line.startswith("lora "))
    assert f"{mean:.4f} ± " in row
    assert "forgets" in table and "brier" in table


def test_what_was_found_with_another_config_is_not_shown(compared, home, encoder, monkeypatch):  # noqa: F811
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match="lora.json is of another config"):
        compare.run(config_of(home, encoder, "lora", "--config.seeds=(0, 2)"), compared)


def test_a_method_that_diverges_does_not_end_the_others(
    home,  # noqa: F811
    encoder,  # noqa: F811
    tmp_path,
    monkeypatch,
    capsys,
):
    monkeypatch.chdir(ROOT)
    file = "configs/finetune_head.py:classify"
    wild = ("optim.lr=1e38", "optim.clip=0.0", "max_skipped=1", "optim.warmup=0")
    methods = (("wild", "configs/finetune.py", wild), ("head", file, ()))
    config = config_of(home, encoder, "head", f"--config.methods={methods}")
    for _ in range(2):
        with pytest.raises(NumericsError, match="wild: .*not finite"):
            compare.run(config, tmp_path)
        table = capsys.readouterr().out.splitlines()
        assert next(line for line in table if line.startswith("wild ")).split()[1] == "failed"
        assert any(line.startswith("head ") and "±" in line for line in table)


def test_methods_have_the_same_base_seeds_and_data(home, encoder):  # noqa: F811
    for word in ("seed=3", "init=x", "data.seq_len=8", "cache_prefix=True"):
        config = config_of(home, encoder, "head", f"--config.shared=('total=4', {word!r})")
        with pytest.raises(ConfigError, match=f"{word.partition('=')[0]} is the same for all"):
            compare.method(config, "head")


def test_one_seed_is_a_run_of_its_own(home, encoder, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(ROOT)
    compare.run(config_of(home, encoder, "head", "--config.seeds=(3,)"), tmp_path)
    assert record(tmp_path, "head")["seeds"] == [3]
    assert configs.load(str(tmp_path / "head/config.json")).seed == 3
    assert "±" not in capsys.readouterr().out


def test_a_dry_run_shows_the_methods(home, encoder, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(ROOT)
    compare.run(config_of(home, encoder, "full+lora"), home / "none", dry_run=True)
    assert "adapter.name='lora'" in capsys.readouterr().out
    assert not (home / "none").exists()


def test_what_cannot_be_run_is_found_before_anything_is(home, encoder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match="20 of config.adapter.length before it, is longer"):
        compare.run(config_of(home, encoder, "head+prompt"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_methods_that_do_not_exist_are_refused(home, encoder):  # noqa: F811
    with pytest.raises(ConfigError, match="unknown method 'loar'.*lora"):
        config_of(home, encoder, "loar")
    with pytest.raises(ConfigError, match="each name once"):
        twice = "(('a', 'x.py', ()), ('a', 'x.py', ()))"
        config_of(home, encoder, "lora", f"--config.methods={twice}")
    with pytest.raises(ConfigError, match="different whole numbers"):
        config_of(home, encoder, "lora", "--config.seeds=(1, 1)")
