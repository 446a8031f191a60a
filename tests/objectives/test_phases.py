"""Objectives that are learnt one after the other, and those that read in both directions."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from common import ROOT

from fmjax import build, objectives
from fmjax.checkpoints import checkpointer
from fmjax.config import load as configs
from fmjax.errors import ConfigError
from fmjax.models import gpt2
from fmjax.objectives import mlm
from fmjax.params import paths
from fmjax.tasks import replay, train
from fmjax.training.state import TrainState
from fmjax.training.step import make_gradient

FACTS = dict(target="", vocab=tiny.VOCAB)
STEPS = dict(facts=FACTS, steps=lambda duration: duration)


def named(phases):
    return [[objective.name for objective in learnt] for learnt in phases]


def test_phases_by_hand():
    goals = objectives.build(
        {"clm": {"stop": 4}, "mlm": {"start": 3, "prefix": True}, "prefix_lm": {"stop": 9}}, **STEPS
    )
    cuts, learnt = objectives.phases(goals)
    assert cuts == [3, 4, 9]
    assert named(learnt) == [
        ["clm", "prefix_lm"],
        ["clm", "mlm", "prefix_lm"],
        ["mlm", "prefix_lm"],
        ["mlm"],
    ]
    assert objectives.phases(objectives.build({"clm": {}}, **STEPS))[0] == []
    # Of a model that is only measured nobody counts the steps.
    measured = objectives.build({"clm": {"stop": "10%"}}, FACTS)
    assert objectives.phases(measured)[0] == []


def test_a_run_has_something_to_learn_in_each_step():
    goals = objectives.build({"clm": {"stop": 4}, "prefix_lm": {"start": 6}}, **STEPS)
    objectives.check_phases(goals, 4)
    with pytest.raises(ConfigError, match="none of clm, prefix_lm is learnt from step 4 to 5"):
        objectives.check_phases(goals, 5)
    never = objectives.build({"clm": {"start": 3, "stop": 3}, "prefix_lm": {}}, **STEPS)
    with pytest.raises(ConfigError, match="clm is never learnt: its stop, step 3, is not behind"):
        objectives.check_phases(never, 5)


def test_the_share_of_masked_tokens_goes_in_a_line():
    """Of 16 tokens 8 at first and 4 at last, between the steps 10 and 20."""
    batch = tiny.batch(4) | dict(segment_ids=jnp.ones((4, tiny.T), jnp.int32))
    seeds = jnp.arange(8, dtype=jnp.uint32).reshape(4, 2)
    how = dict(vocab=tiny.VOCAB, rate=(0.5, 0.25), over=(10, 20))

    def chosen(step):
        found = mlm.prepare(batch, seeds, step=step, **how)
        assert found["mlm_positions"].shape == (4, 8)
        return found["mlm_weights"].sum(1).tolist()

    eligible = 16 - (np.asarray(batch["input_ids"]) < 5).sum(1)
    for step, rate in ((0, 0.5), (10, 0.5), (15, 0.375), (20, 0.25), (99, 0.25), (None, 0.25)):
        step = None if step is None else jnp.int32(step)
        assert chosen(step) == np.round(rate * eligible).tolist()
    fixed = mlm.prepare(batch, seeds, vocab=tiny.VOCAB, rate=0.25)
    moving = mlm.prepare(batch, seeds, step=jnp.int32(20), **how)
    np.testing.assert_array_equal(moving["input_ids"], fixed["input_ids"])
    with pytest.raises(ConfigError, match="config.objectives.mlm.over="):
        mlm.prepare(batch, seeds, vocab=tiny.VOCAB, rate=(0.5, 0.25), step=jnp.int32(0))


@pytest.fixture(scope="module")
def decoder():
    model = gpt2.Model("tiny", **tiny.SIZES, prefix=True)
    model = model.clone(stacks=paths.runs(model.kinds))
    return model, jax.jit(model.init)(jax.random.key(0), *model.example())["params"]


def gradient_of(decoder, goals):
    model, _ = decoder
    return jax.jit(make_gradient(build.apply(model), goals, lambda params: (params, {})))


def at(decoder, step):
    return TrainState(jnp.int32(step), decoder[1], (), jax.random.key(1))


@pytest.mark.slow
def test_each_phase_is_what_its_objectives_are_alone(decoder):
    goals = {"clm": {"stop": 2}, "mlm": {"start": 2, "prefix": True}}
    both = gradient_of(decoder, objectives.build(goals, **STEPS))
    batch = tiny.batch(4)
    for step, name in ((0, "clm"), (1, "clm"), (2, "mlm"), (7, "mlm")):
        own = {"clm": {}} if name == "clm" else {"mlm": {"prefix": True}}
        alone = gradient_of(decoder, objectives.build(own, **STEPS))
        (loss, sums), grads = both(at(decoder, step), batch)
        (expected, own), wanted = alone(at(decoder, step), batch)
        np.testing.assert_allclose(loss, expected, atol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, wanted)
        other = "mlm" if name == "clm" else "clm"
        assert float(sums[f"{other}/loss"][1]) == 0 < float(own[f"{name}/loss"][1])
    assert both._cache_size() == 1  # one program for all steps


@pytest.mark.slow
def test_two_directions_at_once_have_a_pass_each(decoder):
    """Neither is told by the other: clm sees no mask and nothing behind, mlm both."""
    model, params = decoder
    run = lambda goals: objectives.metrics(
        objectives.build(goals, **STEPS),
        build.apply(model), params, tiny.batch(4), jax.random.key(0), True, jnp.int32(0),
    )  # fmt: skip
    together = run({"mlm": {"prefix": True}, "clm": {}})
    alone = run({"mlm": {"prefix": True}}) | run({"clm": {}})
    assert together.keys() == alone.keys()
    for name in together:
        np.testing.assert_array_equal(together[name], alone[name])
    causal = model.clone(cfg=model.cfg.__class__(**{**vars(model.cfg), "prefix": False}))
    blind = objectives.metrics(
        objectives.build({"mlm": {"prefix": True}}, **STEPS),
        build.apply(causal), params, tiny.batch(4), jax.random.key(0), True,
    )  # fmt: skip
    assert abs(float(blind["mlm/loss"][0] - together["mlm/loss"][0])) > 1e-4


def load(*words):
    return configs.load(f"{ROOT}/configs/clm.py:tiny", [f"--config.{word}" for word in words])


MLM = "{'start': '50%', 'prefix': True, 'rate': (0.5, 0.3), 'over': ('50%', '100%')}"
CLM_TO_MLM = ("tokenizer.special=bert", "ledger=()", "total=4", "save_every=2", "log_every=2")
CLM_TO_MLM += ("eval_every=2", f"objectives={{'clm': {{'stop': '50%'}}, 'mlm': {MLM}}}")


@pytest.mark.slow
def test_a_run_resumes_at_the_switch_with_the_same_bits(tmp_path):
    made = load(*CLM_TO_MLM)
    train.run(made, tmp_path / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    logged = [json.loads(line) for line in lines if '"train/loss"' in line]
    assert [sorted({"train/clm/loss", "train/mlm/loss"} & set(row)) for row in logged] == [
        ["train/clm/loss"],
        ["train/mlm/loss"],
    ]
    assert all(np.isfinite(row["train/loss"]) for row in logged)
    both = [json.loads(line) for line in lines if '"validation/loss"' in line][-1]
    assert both["validation/loss"] == pytest.approx(
        both["validation/clm/loss"] + both["validation/mlm/loss"], abs=1e-5
    )
    straight, _, _ = checkpointer.load_params(tmp_path / "run", 4)
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "4")
    for name in ("summary.json", "status.json"):
        (tmp_path / "again" / name).unlink()
    train.run(made, tmp_path / "again")
    resumed, _, _ = checkpointer.load_params(tmp_path / "again", 4)
    jax.tree.map(np.testing.assert_array_equal, straight, resumed)
    told = replay_of(tmp_path / "run", 3)
    assert all("mlm/loss" in one and "clm/loss" not in one for one in told["examples"])


def replay_of(folder, step):
    words = [f"--config.folder={folder}", f"--config.step={step}"]
    replay.run(configs.load(f"{ROOT}/configs/replay.py", words), folder)
    return json.loads((folder / "dumps" / f"replay_{step}.json").read_text())


def test_an_encoder_needs_no_prefix(tmp_path):
    with pytest.raises(ConfigError, match="mlm.prefix=True lets a decoder read in both"):
        build.model(
            configs.load(
                f"{ROOT}/configs/mlm.py:tiny", ["--config.objectives={'mlm': {'prefix': True}}"]
            ),
            FACTS | dict(vocab_size=64, labels=()),
        )
