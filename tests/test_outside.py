"""What a package outside of fmjax can add: data, objectives, sources, for models side by side."""

import json
import sys
from pathlib import Path

import inject
import numpy as np
import pytest
from common import ROOT

from fmjax.checkpoints import checkpointer
from fmjax.config import load as configs
from fmjax.config import plugins
from fmjax.errors import ConfigError, Preempted
from fmjax.io import metrics_log
from fmjax.models import composite
from fmjax.params import paths
from fmjax.tasks import evaluate, train

OUTSIDE = Path(__file__).parent / "outside"


@pytest.fixture(scope="module", autouse=True)
def importable():
    sys.path.insert(0, str(OUTSIDE.parent))
    yield
    sys.path.remove(str(OUTSIDE.parent))


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("outside")
    text = (OUTSIDE / "config.py").read_text().replace("{ROOT}", str(ROOT))
    (home / "config.py").write_text(text)
    return home


def start(home, name, *words, kind="Pairs"):
    config = configs.load(f"{home}/config.py:{kind}", [f"--config.{word}" for word in words])
    train.run(config, home / name)
    return home / name


def parameters(folder):
    return paths.unstack(checkpointer.load_params(str(folder))[0])


@pytest.fixture(scope="module")
def straight(home):
    return start(home, "straight")


def test_towers_of_another_package_are_trained_and_measured(straight):
    rows, _ = metrics_log.read(straight)
    last = {name: value for row in rows for name, value in row.items()}
    assert last["pairs"] == 6 * 8 and last["perf/pairs_per_sec"] > 0
    assert np.isfinite(last["train/match/loss"])
    assert 0 <= last["validation/match/nearest"] <= 1
    assert last["validation/match/accuracy"] <= 1
    found = parameters(straight)
    assert {name.split("/")[0] for name in found} == {"left", "right"}
    assert "left/embed/class_token/embedding" in found
    assert "right/embed/class_token/embedding" not in found
    page = (straight / "report.html").read_text()
    assert "48 pairs in 6 steps" in page and "Pairs per second" in page


@pytest.fixture(scope="module")
def generated(home):
    return start(home, "generated", kind="Generated")


@pytest.mark.parametrize("kind", [pytest.param("Pairs", marks=pytest.mark.slow), "Generated"])
def test_a_run_that_was_stopped_ends_with_the_same_bits(home, request, monkeypatch, kind):
    """Of a source that generates its batches, too, which has a state of its own."""
    undisturbed = request.getfixturevalue({"Pairs": "straight", "Generated": "generated"}[kind])
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="SIGTERM after step 4"):
        inject.install("term@4", patch.setattr)
        start(home, f"stopped-{kind}", kind=kind)
    stopped = start(home, f"stopped-{kind}", kind=kind)
    found, wanted = parameters(stopped), parameters(undisturbed)
    assert found.keys() == wanted.keys()
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


def test_generated_batches_depend_on_the_parameters(straight, generated):
    meta = checkpointer.load_meta(generated)
    assert meta["data"]["step"] == 6 and len(meta["data"]["seen"]) == 6
    name = "left/block_00/mlp/up/kernel"
    assert not np.array_equal(parameters(straight)[name], parameters(generated)[name])


@pytest.mark.slow  # tests/params/test_groups.py has the names of several trunks by hand
def test_a_group_is_of_one_tower(home):
    """`block_-1` is the last layer of each trunk, and what is frozen stays as it began."""
    groups = "(('left/block_-1/.*|right/head/.*', 'train'), ('.*', 'freeze'))"
    words = [f"groups={groups}", "optim.layer_decay=0.5", "total=2 steps"]
    moved = parameters(start(home, "groups", *words))
    begun = parameters(start(home, "begun", "optim.lr=0.0", "total=1 steps"))
    differ = {name for name in begun if not np.array_equal(begun[name], moved[name])}
    trained = {n for n in begun if n.startswith(("left/block_01/", "right/head/"))}
    # A bias of keys moves by rounding alone: softmax does not see it.
    assert trained - {"left/block_01/attn/key/bias"} <= differ <= trained


@pytest.mark.slow
def test_a_tower_starts_from_a_run_of_its_own(home):
    words = ["name=vit", "width=16", "depth=2", "heads=2", "mlp=32"]
    words = [f"--config.model.{word}" for word in words]
    words += ["--config.total=2 steps", "--config.batch_size=8", "--config.tensorboard=False"]
    config = configs.load(f"{ROOT}/configs/vision/vit.py", words)
    train.run(config, home / "vit")
    init = f"init={{'left': '{home / 'vit'}'}}"
    begun = parameters(start(home, "from", init, "optim.lr=0.0", "total=1 steps"))
    fresh = parameters(start(home, "fresh", "optim.lr=0.0", "total=1 steps"))
    for name, array in parameters(home / "vit").items():
        if not name.startswith("head/"):
            np.testing.assert_array_equal(begun[f"left/{name}"], array, err_msg=name)
    for name in fresh:
        if name.startswith(("right/", "left/head/")):
            np.testing.assert_array_equal(begun[name], fresh[name], err_msg=name)


def test_what_a_folder_names_is_not_imported_for_it(monkeypatch):
    monkeypatch.setattr(plugins, "_trusted", set())
    with pytest.raises(ConfigError, match="outside.views:Pairs'? is code that a folder names"):
        plugins.load("outside.views:Pairs", "data.format")
    plugins.trust([("data.name", "outside"), ("data.columns", "outside.views")])  # no names of code
    with pytest.raises(ConfigError, match="is code that a folder names"):
        plugins.load("outside.match", "objectives.match.module")
    plugins.trust([("data.format", "outside.views:Pairs")])
    assert plugins.load("outside.views:Pairs", "data.format").__name__ == "Pairs"
    assert plugins.load("outside.match", "objectives.match.module").__name__ == "outside.match"


def test_a_run_of_towers_is_measured_again(straight, tmp_path, monkeypatch):
    monkeypatch.setattr(plugins, "_trusted", set())
    words = [f"--config.folder={straight}", "--config.split=validation"]
    with pytest.raises(ConfigError, match="--config.data.format=outside.views:Pairs if you trust"):
        evaluate.run(configs.load(f"{ROOT}/configs/evaluate.py", words), tmp_path)
    words.append("--config.data.format=outside.views:Pairs")
    evaluate.run(configs.load(f"{ROOT}/configs/evaluate.py", words), tmp_path)
    found = json.loads((straight / "evaluation.jsonl").read_text())["metrics"]
    logged = {name: value for row in metrics_log.read(straight)[0] for name, value in row.items()}
    for name in ("loss", "match/nearest"):
        assert found[name] == pytest.approx(logged[f"validation/{name}"], rel=1e-5)


@pytest.mark.parametrize(
    "words, said",
    [
        (["adapter.name=lora"], "config.adapter is for a single model yet"),
        (["objectives={'mlm': {}}", "best="], "predicts tokens, and the data of .* have none"),
        (["objectives={'match': {'module': 'outside.mach'}}"], "No module named 'outside.mach'"),
        (["init={'lefd': 'runs/x'}"], "config.init names the model 'lefd'.*left"),
        (["total=1k tokens"], "counted in pairs"),
    ],
)
def test_what_does_not_fit_is_refused(home, words, said):
    with pytest.raises(ConfigError, match=said):
        start(home, "refused", "total=1", *words)


def test_one_model_is_no_composite():
    with pytest.raises(ConfigError, match="config.model.parts must have two models"):
        composite.Model({"alone": {"name": "vit"}})
    both = {name: {"name": "vit", "variant": "digits", "patch": 14} for name in ("left", "right")}
    with pytest.raises(ConfigError, match="objectives.classify needs a model with a head"):
        composite.Model(both, classes={"classify": 3})
    with pytest.raises(ConfigError, match="parts.left.name='composite' is no model that can be"):
        composite.Model({name: {"name": "composite"} for name in ("left", "right")})
    with pytest.raises(ConfigError, match="parts.left.name='os:system' is code that a folder"):
        composite.Model([("left", "os:system", {}), ("right", "vit", {})])
    with pytest.raises(ConfigError, match="parts.left has no 'name'"):
        composite.Model({"left": {}, "right": {}})
