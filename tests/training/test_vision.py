"""Whole runs on images: train, stop, go on, evaluate; layouts, adapters and groups; refusals."""

import functools
import json
from types import SimpleNamespace

import inject
import jax
import numpy as np
import pytest
import tiny
from common import CACHE, ROOT

from fmjax import build, data
from fmjax.checkpoints import checkpointer
from fmjax.config import load as configs
from fmjax.config import rules
from fmjax.errors import ConfigError
from fmjax.io import metrics_log
from fmjax.models import vit
from fmjax.params import paths, sharding
from fmjax.tasks import evaluate, export, generate, predict, train
from fmjax.training import flops, setup, state, vmapped_runs
from fmjax.training.step import make_train_step

RUN = """
batch_size=40 total=6 log_every=2 eval_every=3 save_every=3 tensorboard=False data.shift=1.0
model.depth=2 model.width=16 model.heads=2 model.mlp=24 optim.args.eps=1e-3
""".split()
VIT = f"{ROOT}/configs/vision/vit.py"


def load(*words, spec=VIT):
    return configs.load(spec, [f"--config.{word}" for word in (*RUN, *words)])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMJAX_CACHE", str(CACHE))
        folder = tmp_path_factory.mktemp("vision") / "run"
        train.run(load("model.dropout=0.1"), folder)
    return folder


def test_a_run_learns_and_says_so_in_images(straight):
    rows, _ = metrics_log.read(straight)
    summary = json.loads((straight / "summary.json").read_text())
    assert summary["metrics"]["images"] == 240 and "perf/images_per_sec" in summary["metrics"]
    assert not any("token" in name for row in rows for name in row)
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert losses[0] == pytest.approx(np.log(10), abs=0.4)
    page = (straight / "report.html").read_text(encoding="utf-8")
    assert "digits; train 1,423 images; validation 374 images" in page
    assert "240 images in 6 steps" in page and "Images per second" in page
    assert "token" not in page.partition("Configuration")[0].replace("class_token", "")
    samples = json.loads((straight / "predictions.json").read_text())
    assert samples[1]["text"] == "image 93"  # of 374, of which five are shown
    assert (straight / "image_processor" / "preprocessor_config.json").is_file()


@pytest.mark.slow  # test_outside.py stops a run of images with two models
def test_a_run_that_was_interrupted_ends_bit_identical(straight, tmp_path, capsys, monkeypatch):
    config = load("model.dropout=0.1")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="injected"):
        inject.install("raise@5:data", patch.setattr)
        train.run(config, tmp_path / "run")
    train.run(config, tmp_path / "run")
    assert "resuming at step 3 of 6" in capsys.readouterr().out
    ours, theirs = (checkpointer.load_params(path)[0] for path in (tmp_path / "run", straight))
    ours, theirs = paths.unstack(ours), paths.unstack(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name], value, err_msg=name)


def test_evaluation_of_the_folder_finds_the_same(straight, tmp_path, capsys):
    config = configs.load(str(ROOT / "configs/evaluate.py"), [f"--config.folder={straight}"])
    evaluate.run(config, tmp_path)
    assert "374 rows of 8 x 8 pixels" in capsys.readouterr().out
    last = json.loads((straight / "evaluation.jsonl").read_text().splitlines()[-1])["metrics"]
    rows, _ = metrics_log.read(straight)
    for name, value in last.items():
        assert value == pytest.approx(rows[-1][f"validation/{name}"], abs=1e-6), name


def test_images_of_another_size_are_refused_by_evaluation(straight, tmp_path):
    from data.test_images import idx  # the bytes of such a file

    train_file = tmp_path / "train-images-idx3-ubyte"
    train_file.write_bytes(idx(np.zeros((3, 4, 8))))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx([0, 1, 9]))
    words = f"folder={straight} data.name=idx data.train={train_file} split=train"
    words += " data.validation_fraction=0"
    config = configs.load(
        str(ROOT / "configs/evaluate.py"), [f"--config.{word}" for word in words.split()]
    )
    with pytest.raises(ConfigError, match=r"image_shape=\(4, 8, 1\).* made for \(8, 8, 1\)"):
        evaluate.run(config, tmp_path)


@pytest.mark.parametrize("task", [predict, export, generate])
def test_tasks_of_texts_refuse_the_run(task, straight, tmp_path):
    name = task.__name__.rpartition(".")[2]
    config = configs.load(str(ROOT / f"configs/{name}.py"), [f"--config.folder={straight}"])
    with pytest.raises(ConfigError, match="a model of images, not of texts.*evaluate.py") as error:
        task.run(config, tmp_path)
    assert "\n" not in str(error.value)


# ---- single steps ----


def made(*words, mesh=None):
    """The parts of a run and its step, nothing trained."""
    config, mesh = load(*words), mesh or sharding.make_mesh()
    run = setup.setup(config, mesh)
    step = make_train_step(
        build.apply(run.model), run.objectives, run.optimizer.tx, run.split, config.accumulate
    )
    fresh = lambda: state.create(run.abstract, run.model, run.optimizer.tx, run.split, 0)
    return SimpleNamespace(run=run, step=jax.jit(step), state=fresh, mesh=mesh)


@functools.cache
def batches():
    split = data.prepare(load().data.to_dict(), log=lambda line: None).splits["train"]
    source = data.batches(split, batch_size=40, seeds=(0,))
    found = [next(source) for _ in range(2)]
    source.close()
    return found


def after_two_steps(parts):
    """(loss of each step, parameters) with dropout and random changes of the images."""
    with jax.set_mesh(parts.mesh):
        current, losses = parts.state(), []
        for batch in batches():
            current, found = parts.step(current, sharding.put(batch, parts.run.batch_sharding))
            losses.append(float(found["loss"]))
    return losses, paths.unstack(jax.device_get(current.params))


@pytest.fixture(scope="module")
def single():
    """After two steps on one device."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMJAX_CACHE", str(CACHE))
        return after_two_steps(made("model.dropout=0.1", mesh=tiny.mesh()))


@pytest.mark.parametrize("words", [(), ("accumulate=2",)], ids=["devices", "accumulated"])
def test_eight_devices_and_two_microbatches_are_one_batch_on_one(words, single):
    mesh = tiny.mesh() if words else None
    losses, params = after_two_steps(made("model.dropout=0.1", *words, mesh=mesh))
    np.testing.assert_allclose(losses, single[0], rtol=1e-6)
    for name, value in single[1].items():
        np.testing.assert_allclose(params[name], value, atol=2e-6, rtol=0, err_msg=name)


LORA = dict(
    name="lora", targets=((r"block_.*/(attn|mlp)/.*", None),), rank=2, alpha=4.0,
    scaling="alpha/rank", dropout=0.0, dora=False, init="uniform",
)  # fmt: skip


@pytest.mark.parametrize(
    "adapter, groups, moves",
    [
        (LORA, ((r".*/lora_.|head/.*", "train"), (".*", "freeze")), ("lora_", "head/")),
        (None, (("block_01/.*|head/.*", "train"), (".*", "freeze")), ("block_01/", "head/")),
    ],
    ids=["lora", "last-layer"],
)
def test_adapters_and_groups_work_as_on_texts(adapter, groups, moves, monkeypatch):
    config = load()
    with config.unlocked():
        config.groups = groups
        if adapter:
            config.adapter = adapter
    monkeypatch.setitem(globals(), "load", lambda *words: config)
    parts = made()
    before = paths.unstack(jax.device_get(parts.state().params))
    _, after = after_two_steps(parts)
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert moved == {name for name in before if any(part in name for part in moves)}
    if adapter:  # on each matrix of both layers
        assert sum(name.endswith("lora_a") for name in moved) == 2 * 6


def test_a_step_of_arms_with_seeds_of_their_own_costs_each_what_it_costs_alone():
    mesh = sharding.make_mesh()
    vmapped = vmapped_runs.prepare(load("arms=(('seed',(0,1)),)"), mesh, lambda: None)
    with jax.set_mesh(mesh):
        spec = vmapped.batch_spec()
        assert spec["images"].shape == (2, 40, 8, 8, 1)
        traced = jax.jit(vmapped.train_step()).trace(vmapped.abstract, spec)
        alone = made().run
        expected = flops.of_step(alone, setup.batch_spec(alone))
        assert vmapped.flops(spec, traced) == [expected, expected]


# ---- what is said and refused ----


def test_a_run_may_be_as_long_as_its_images():
    assert made("total=1k images").run.total == 25
    with pytest.raises(ConfigError, match="1k tokens.*images"):
        made("total=1k tokens")


def test_objectives_of_tokens_are_refused_by_name():
    config = load()
    with config.unlocked():
        config.objectives = {"mlm": {"rate": 0.15}}
    with pytest.raises(ConfigError, match="config.objectives.mlm"):
        setup.setup(config, sharding.make_mesh())


def test_a_patch_that_does_not_divide_is_refused_before_images_are_read(monkeypatch):
    monkeypatch.setattr(data, "prepare", lambda *args, **kwargs: pytest.fail("data were read"))
    with pytest.raises(ConfigError, match="patch=3 does not divide images of 8 x 8 pixels"):
        made("model.patch=3")


def test_texts_for_a_model_of_images_are_refused_by_name():
    words = ["--config.model.name=vit", "--config.model.variant=tiny"]
    config = configs.load(str(ROOT / "configs/mlm.py"), words)
    with pytest.raises(ConfigError, match="model.name='vit' needs image_shape of the data"):
        build.model(config, {"vocab_size": 8, "labels": ()})


def test_a_dry_run_shows_the_image(tmp_path, capsys):
    train.run(load(), tmp_path / "run", dry_run=True)
    out = capsys.readouterr().out
    assert "1,423 rows of 8 x 8 pixels; 1,423 images an epoch" in out
    assert " per image\n" in out and "token" not in out.replace("class_token", "")
    assert "\nlabel " in out.partition("first row of the first batch")[2]


def test_variants_and_keys():
    assert load(spec=f"{VIT}:runlocal=True").total == 6
    with pytest.raises(ConfigError, match="unknown variant 'minst'.*mnist"):
        configs.load(f"{VIT}:minst")
    mnist = configs.load(f"{VIT}:mnist", ["--config.data.train=x-images"])
    assert mnist.data.name == "idx" and 28 % mnist.model.patch == 0
    assert set(mnist.model) - {"name", "variant"} <= set(vit.Config.__dataclass_fields__)
    assert "images" in rules.UNITS
