"""Runs that one program computes are, each, the run that its config says alone."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from common import ROOT
from test_finetune import encoder, files, home, load  # noqa: F401

from fmjax.checkpoints import pretrained
from fmjax.config import load as configs
from fmjax.errors import CheckpointError, ConfigError, NumericsError
from fmjax.io import metrics_log, retention
from fmjax.params import paths, sharding
from fmjax.tasks import train
from fmjax.training import loop, vmapped_runs

SHORT = ["--config.data.seq_len=24", "--config.total=6", "--config.batch_size=16"]
OFTEN = ["--config.log_every=1", "--config.eval_every=3", "--config.save_every=3"]
TOLERANCE = 2e-5  # relative, of sums in another order, after six steps


def config_of(home, encoder, file, *words):  # noqa: F811
    return load(file, *files(home), f"--config.init={encoder}", *SHORT, *OFTEN, *words)


def given(key, *values):
    return key, values


def apart(config, folder):
    """The runs of `config.arms`, each started by itself."""
    for arm, own in enumerate(configs.arms(config)):
        train.run(own, folder / str(arm))


def same(one, other, tolerance=TOLERANCE):
    """Two run folders have equal logs, checkpoints with equal shapes, and close numbers."""
    for mine, its in zip(metrics_log.read(one)[0], metrics_log.read(other)[0], strict=True):
        assert mine.keys() - {"spent"} == its.keys() - {"spent"}  # which a fast step has not
        for name in mine:
            if name.startswith(("train/", "validation/", "optim/", "tokens", "flops")):
                assert mine[name] == pytest.approx(its[name], rel=tolerance, abs=1e-6), name
    mesh = sharding.make_mesh()
    opened = [pretrained.open_folder(str(folder), mesh) for folder in (one, other)]
    first, second = (paths.unstack(each.params) for each in opened)
    assert first.keys() == second.keys() and opened[0].step == opened[1].step
    for name in first:
        scale = np.abs(np.asarray(second[name], np.float32)).max() + 1e-3
        np.testing.assert_allclose(first[name], second[name], atol=20 * tolerance * scale)


RATES = "--config.model.dropout", "--config.model.attention_dropout"
DROPOUT = [f"{rate}=0.1" for rate in RATES]
RANK = [given("adapter.rank", 2, 5, 4), given("optim.lr", 1e-2, 3e-3, 1e-2)]
CASES = {
    # Orders, heads, dropout and widths of batches are those of each seed.
    "seeds": ("finetune_lora.py", DROPOUT, [given("seed", 0, 3, 4)]),
    "rates": (
        "finetune_lora.py:classify,plus=16",
        ["--config.adapter.dropout=0.1", "--config.optim.ema=0.9"],
        [given("optim.lr", 1e-2, 1e-3), given("group_optim.lora_b.lr", 1e-2, 1e-1)],
    ),
    "ranks": ("finetune_lora.py", ["--config.adapter.dora=True"], RANK),
    "ranks of a quantised base": ("finetune_qlora.py", ["--config.quantise.name=int8"], RANK),
    "alphas": (
        "finetune_lora.py",
        ["--config.adapter.scaling=rslora"],
        [given("adapter.alpha", 4.0, 16.0), given("adapter.rank", 4, 2)],
    ),
    "sgd": (
        "finetune_lora.py",
        ["--config.optim.name=sgd", "--config.optim.args={}", "--config.optim.weight_decay=0.0"],
        [given("optim.lr", 1e-1, 1.0), given("seed", 0, 1)],
    ),
    "pissa": ("finetune_lora.py", ["--config.adapter.init=pissa"], [given("seed", 0, 1)]),
    "texts": (
        "finetune_prompt.py",
        ["--config.adapter.init=text", "--config.adapter.text=a", "--config.adapter.length=4"],
        [given("adapter.text", "a red fox", "the blue one"), given("seed", 0, 1)],
    ),
    "everything": (
        "finetune.py",
        ["--config.accumulate=2", "--config.model.dropout=0.1"],
        [given("seed", 0, 1), given("optim.weight_decay", 0.0, 0.1)],
    ),
    "heads behind a cache": (
        "finetune_head.py",
        ["--config.cache_prefix=True", *(f"{rate}=0.0" for rate in RATES)],
        [given("seed", 0, 1), given("optim.lr", 1e-2, 1e-1)],
    ),
}


WAYS = {"one by one": ("cpu",), "at once": ()}
ALWAYS = (("seeds", "at once"),)


@pytest.mark.parametrize(
    ("case", "way"),
    [
        pytest.param(case, way, marks=[] if (case, way) in ALWAYS else pytest.mark.slow)
        for case in CASES
        for way in WAYS
    ],
)
@pytest.mark.slow
def test_each_arm_is_the_run_alone(case, way, home, encoder, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(vmapped_runs, "ONE_BY_ONE", WAYS[way])
    file, words, values = CASES[case]
    config = config_of(home, encoder, file, *words, f"--config.arms={tuple(values)}")
    train.run(config, tmp_path / "together")
    apart(config, tmp_path / "apart")
    losses = []
    for arm, own in enumerate(configs.arms(config)):
        mine = tmp_path / "together/arms" / str(arm)
        same(mine, tmp_path / "apart" / str(arm))
        saved = [configs.load(f"{x}/config.json") for x in (mine, tmp_path / "apart" / str(arm))]
        assert configs.digest(saved[0]) == configs.digest(saved[1]) == configs.digest(own)
        with np.load(mine / "examples.npz") as found:
            (accuracy,) = {name for name in found if "accuracy" in name}
            last = metrics_log.read(mine)[0][-1][f"validation/{accuracy}"]
            assert found[accuracy].mean() == pytest.approx(last)
        losses.append(metrics_log.read(mine)[0][-1]["validation/loss"])
    assert len(set(losses)) == len(losses)  # they do differ
    told = json.loads((tmp_path / "together/summary.json").read_text())
    assert [arm["metrics"]["validation/loss"] for arm in told["arms"]] == losses
    assert [arm[values[0][0]] for arm in told["arms"]] == list(values[0][1])


@pytest.mark.slow
def test_the_base_is_in_memory_and_on_disk_once(home, encoder, tmp_path):  # noqa: F811
    config = config_of(home, encoder, "finetune_lora.py", "--config.arms=(('seed', (0, 1, 2)),)")
    train.run(config, tmp_path / "run")
    folders = [tmp_path / "run/arms" / str(arm) / "checkpoints/frozen" for arm in range(3)]
    files_of = lambda folder: sorted(f for f in folder.rglob("*") if f.is_file())
    assert len(files_of(folders[0])) > 2
    for name in files_of(folders[0]):
        inodes = {(folder / name.relative_to(folders[0])).stat().st_ino for folder in folders}
        assert len(inodes) == 1
    vmapped = vmapped_runs.prepare(config, sharding.make_mesh(), lambda: None)
    whole = vmapped.abstract.params
    one, each = vmapped.padded_run.abstract.params, vmapped.padded_run.split(whole)
    alone = vmapped.padded_run.split(one)
    assert paths.nbytes(each[1]) == paths.nbytes(alone[1])
    assert paths.nbytes(each[0]) == 3 * paths.nbytes(alone[0])


@pytest.mark.slow
def test_arms_go_on_where_they_stopped(home, encoder, tmp_path):  # noqa: F811
    """Killed between the save of one arm and the next, with the newest step of only the first."""
    words = ["--config.keep=9", "--config.arms=(('seed', (0, 1)),)"]
    config = config_of(home, encoder, "finetune_lora.py", *DROPOUT, *words)
    train.run(config, tmp_path / "run")
    again = shutil.copytree(tmp_path / "run", tmp_path / "again")
    for folder, lost in ((again / "arms/0", 0), (again / "arms/1", 1), (again, 0)):
        status = json.loads((folder / "status.json").read_text()) | {"state": "running"}
        if lost:
            steps = retention.finished(folder / "checkpoints")
            shutil.rmtree(folder / "checkpoints" / str(steps[-1]))
            status |= {"checkpoint": steps[-2]}
        (folder / "status.json").write_text(json.dumps(status))
    train.run(config, again)
    for arm in "01":
        same(again / "arms" / arm, tmp_path / "run/arms" / arm, tolerance=0)


def forget(folder, *steps):
    """The run folder as if it had been killed before these steps were saved."""
    for step in steps:
        shutil.rmtree(folder / "checkpoints" / str(step))
    there = retention.finished(folder / "checkpoints")
    status = json.loads((folder / "status.json").read_text())
    status |= {"state": "running", "checkpoint": there[-1] if there else 0}
    (folder / "status.json").write_text(json.dumps(status))


@pytest.mark.slow
def test_an_arm_goes_on_alone_but_then_no_longer_beside_the_others(home, encoder, tmp_path, capsys):  # noqa: F811
    words = ["--config.arms=(('seed', (0, 1)),)", "--config.keep=1", "--config.keep_best=0"]
    config = config_of(home, encoder, "finetune_lora.py", *DROPOUT, *words, "--config.save_every=2")
    train.run(config, tmp_path / "run")
    again = shutil.copytree(tmp_path / "run", tmp_path / "again")
    # One step each is left; of the other arm, as after 3 and 4, only an older one.
    alone = config_of(
        home, encoder, "finetune_lora.py", *DROPOUT, "--config.keep=9", "--config.seed=1"
    )
    train.run(alone, tmp_path / "alone")
    checkpoints = again / "arms/1/checkpoints"
    shutil.rmtree(checkpoints / "frozen")  # as a step is bound to the files beside it
    for name in ("3", "frozen"):
        shutil.copytree(tmp_path / "alone/checkpoints" / name, checkpoints / name)
    for arm, left in ((0, 6), (1, 3)):
        there = retention.finished(again / f"arms/{arm}/checkpoints")
        forget(again / f"arms/{arm}", *(step for step in there if step != left))
    with pytest.raises(CheckpointError, match="no step that all arms have.*0: .6.; .*1: .3."):
        train.run(config, again)
    own = again / "arms/1"
    train.run(configs.load(f"{own}/config.json"), own)
    assert "resuming at step 3" in capsys.readouterr().out
    one, other = (params_of(folder) for folder in (own, tmp_path / "alone"))
    assert all(np.array_equal(one[name], other[name]) for name in one)
    again = tmp_path / "run"
    shutil.rmtree(again / "arms/1")  # Nor is the other one started from zero.
    with pytest.raises(CheckpointError, match="no step that all arms have.*1: none"):
        train.run(config, again)
    assert retention.finished(again / "arms/0/checkpoints")[-1] == 6


def params_of(folder):
    return paths.unstack(pretrained.open_folder(str(folder), sharding.make_mesh()).params)


def test_the_last_step_that_all_arms_have_stays(tmp_path):
    for arm, steps in ((0, (3, 6, 9)), (1, (3,))):
        for step in steps:
            (tmp_path / str(arm) / str(step)).mkdir(parents=True)
            (tmp_path / str(arm) / str(step) / "MANIFEST.json").write_text("{}")
    how = dict(keep=1, keep_best=0, best="", mode="min")
    retention.delete_old(tmp_path / "0", **how, beside=[tmp_path / "1"])
    assert retention.finished(tmp_path / "0") == [3, 9]
    retention.delete_old(tmp_path / "0", **how)
    assert retention.finished(tmp_path / "0") == [9]


@pytest.mark.slow
def test_an_arm_that_fails_leaves_the_others_alone(home, encoder, tmp_path, capsys):  # noqa: F811
    words = ["--config.optim.clip=0.0", "--config.max_skipped=2", "--config.optim.warmup=0"]
    rates = "--config.arms=(('optim.lr', (1e30, 1e-3)),)"
    config = config_of(home, encoder, "finetune_lora.py", *words, rates)
    with pytest.raises(NumericsError, match="1 of 2 arms failed, the others are done"):
        train.run(config, tmp_path / "run")
    status = [json.loads((tmp_path / f"run/arms/{i}/status.json").read_text()) for i in (0, 1)]
    assert [one["state"] for one in status] == ["failed", "done"]
    assert status[0]["exit_code"] == 3 and "were not finite" in status[0]["reason"]
    assert list((tmp_path / "run/arms/0/dumps").iterdir())
    alone = configs.arms(config)[1]
    train.run(alone, tmp_path / "alone")
    same(tmp_path / "run/arms/1", tmp_path / "alone")
    assert "failed" in capsys.readouterr().out
    with pytest.raises(NumericsError, match="1 of 2 arms failed"):  # and is not tried again
        train.run(config, tmp_path / "run")
    again = json.loads((tmp_path / "run/arms/0/status.json").read_text())
    assert again["state"] == "failed" and again["reason"] == status[0]["reason"]
    assert "were not finite" in (tmp_path / "run/arms/0/report.html").read_text()
    failed = configs.load(f"{tmp_path}/run/arms/0/config.json")
    with pytest.raises(NumericsError, match="were not finite"):  # nor alone
        train.run(failed, tmp_path / "run/arms/0")
    # Stopped when one had failed, it is not forgotten.
    for arm in (0, 1):
        forget(tmp_path / f"run/arms/{arm}", 6)
    with pytest.raises(NumericsError, match="1 of 2 arms failed"):
        train.run(config, tmp_path / "run")


@pytest.mark.slow
def test_all_that_fail_fail(home, encoder, tmp_path):  # noqa: F811
    words = ["--config.optim.clip=0.0", "--config.max_skipped=2", "--config.optim.warmup=0"]
    rates = "--config.arms=(('optim.lr', (1e30, 1e31)),)"
    with pytest.raises(NumericsError, match="updates in a row were not finite"):
        train.run(config_of(home, encoder, "finetune_lora.py", *words, rates), tmp_path / "run")
    for arm in (0, 1):
        status = json.loads((tmp_path / f"run/arms/{arm}/status.json").read_text())
        assert f"arms/{arm}/dumps" in status["reason"]


EVERY = dict(data=2, fsdp=2, tensor=2)


@pytest.mark.parametrize(
    ("axes", "way"),
    [
        pytest.param(dict(fsdp=2), "at once", marks=pytest.mark.slow),
        pytest.param(dict(data=2), "one by one", marks=pytest.mark.slow),
        *(pytest.param(EVERY, way, marks=pytest.mark.slow) for way in WAYS),
    ],
)
def test_devices_change_nothing(axes, way, home, encoder, monkeypatch):  # noqa: F811
    monkeypatch.setattr(vmapped_runs, "ONE_BY_ONE", WAYS[way])
    config = config_of(
        home,
        encoder,
        "finetune_lora.py",
        "--config.arms=(('seed', (0, 1)), ('adapter.rank', (4, 8)))",
    )
    found = []
    for sizes in ({}, axes):
        mesh = tiny.mesh(**sizes)
        with jax.set_mesh(mesh):
            vmapped = vmapped_runs.prepare(config, mesh, lambda: None)
            from fmjax.training import restore

            state = vmapped.stack(restore.created(vmapped.runs))
            step = jax.jit(vmapped.train_step())
            batches = loop.train_batches(vmapped)
            for _ in range(2):
                state, metrics = step(state, sharding.put(next(batches), vmapped.batch_sharding))
            batches.close()
            found.append(jax.device_get((metrics["loss"], metrics["grad_norm"])))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-5)
    assert found[0][0].shape == (2,)


BAD = {
    "(('seed', (0,)),)": "as many values as the others, two at least",
    "(('seed', (0, 1)), ('optim.lr', (1e-3,)))": "as many values as the others",
    "(('seed', (0, 1)), ('seed', (0, 1)))": "each key once",
    "(('batch_size', (8, 16)),)": "keys are seed, lr and weight_decay",
    "(('optim.lr', (1e-3, -1.0)),)": "optim.lr: got -1.0",
    "(('adapter.rank', (4, 0)),)": "adapter.rank: got 0",
    "(('adapter.rank', (4, 2.5)),)": "adapter.rank: got 2.5",
    "(('seed', (0, 0)),)": "two arms are the same run",
    "(('adapter.rank', (4, None)),)": "two at least",
    "(('group_optim.x.lr', (1e-3, 1e-4)),)": "no key 'group_optim.x.lr'",
}


@pytest.mark.parametrize("value", BAD)
def test_arms_that_make_no_runs_are_refused(value):
    with pytest.raises(ConfigError, match=BAD[value]):
        configs.load(str(ROOT / "configs/finetune_lora.py"), [f"--config.arms={value}"])


@pytest.mark.slow
def test_arms_that_do_not_share_are_refused(home, encoder, tmp_path):  # noqa: F811
    ranks = "--config.arms=(('adapter.rank', (2, 4)),)"
    for words, match in (
        (["--config.adapter.init=pissa", ranks], "take a part out of the base.*'rank'"),
        (["--config.adapter.init=pissa", "--config.arms=(('adapter.alpha', (2.0, 4.0)),)"],
         "take a part out of the base.*'alpha'"),
        (["--config.groups=(('head/.*|.*/lora_b', 'train'), ('.*', 'freeze'))", ranks],
         "belongs to an adapter and is frozen"),
        (["--config.adapter.targets=(('block_00/attn/.*', 4), ('block_.*/attn/.*', None))", ranks],
         "layers are stacked in another way"),
        (["--config.total=3G flops", "--config.arms=(('adapter.rank', (1, 32)),)"],
         "config.total='3G flops' the arms have .* steps"),
        (["--config.optim.name=lamb", ranks], "the optimizer 'lamb' looks at a matrix as a whole"),
        (["--config.init=", "--config.model.name=bert", "--config.model.variant=modernbert_tiny",
          "--config.tokenizer.name=train", "--config.arms=(('seed', (0, 1)),)"],
         "is frozen and drawn by the seed"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=match):
            train.run(config_of(home, encoder, "finetune_lora.py", *words), tmp_path / match)


def test_a_dry_run_of_arms(home, encoder, capsys):  # noqa: F811
    config = config_of(home, encoder, "finetune_lora.py", "--config.arms=(('seed', (0, 1)),)")
    train.run(config, home / "dry", dry_run=True)
    assert "2 in one program" in capsys.readouterr().out
