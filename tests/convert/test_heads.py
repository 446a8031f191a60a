"""Heads of tasks, both ways: the classes of BERT in transformers, and what their config says."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from fmjax import convert
from fmjax.checkpoints import pretrained
from fmjax.errors import ConfigError
from fmjax.models import bert, param_init
from fmjax.params import paths, sharding

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
import transformers  # noqa: E402

SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
TABLES = dict(vocab_size=61, max_position_embeddings=20)
NAMES = {"id2label": {0: "b", 1: "c", 2: "a"}, "label2id": {"b": 0, "c": 1, "a": 2}}
REGRESSION = dict(num_labels=1, problem_type="regression")
# {head: (class of transformers, its options, outputs)}
HEADS = {
    "classify": ("BertForSequenceClassification", NAMES, 3),
    "regress": ("BertForSequenceClassification", REGRESSION, 1),
    "tag": ("BertForTokenClassification", NAMES, 3),
    "span": ("BertForQuestionAnswering", {}, 2),
    "choose": ("BertForMultipleChoice", {}, 1),
}


@pytest.fixture(scope="module", autouse=True)
def quiet():
    transformers.utils.logging.disable_progress_bar()


def saved(head, folder):
    name, options, _ = HEADS[head]
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**SIZES, **TABLES, **options)).eval()
    model.save_pretrained(folder)
    return model


def opened(folder, **kwargs):
    """(model, parameters, report) of a folder, with the heads that it has."""
    _, options = convert.describe(folder)
    model = bert.Model(**options | dict(lm_head=False) | kwargs, attention="xla")
    model = model.clone(stacks=paths.runs(model.kinds))
    initial = lambda: model.init(jax.random.key(0), *model.example())["params"]
    like = jax.eval_shape(initial)
    return model, *convert.load(folder, like, may_miss="head/.*", initial=initial)


@pytest.mark.parametrize("head", HEADS)
def test_a_head_comes_and_goes_bit_by_bit(head, tmp_path):
    name, options, outputs = HEADS[head]
    theirs = saved(head, tmp_path / "in")
    model, params, report = opened(tmp_path / "in")
    assert report == ((), ())
    assert dict(model.cfg.classes) == {head: outputs}
    labels = convert.labels(tmp_path / "in")
    assert labels == (("b", "c", "a") if head in ("classify", "tag") else ())

    assert convert.export(tmp_path / "out", model, params, labels=labels) == ()
    before, after = (load_file(tmp_path / f / "model.safetensors") for f in ("in", "out"))
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key], strict=True)
    model_class = getattr(transformers, name)
    again, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert again.config.id2label == theirs.config.id2label
    assert again.config.num_labels == theirs.config.num_labels
    if head in ("classify", "tag", "regress"):
        assert again.config.label2id == theirs.config.label2id
    assert again.config.problem_type == {
        "classify": "single_label_classification",
        "regress": "regression",
    }.get(head)


@pytest.mark.parametrize("head", ["classify", "regress"])
def test_outputs_are_those_of_transformers(head, tmp_path):
    """The other heads are compared in tests/objectives."""
    theirs = saved(head, tmp_path)
    model, params, _ = opened(tmp_path)
    ids = np.random.default_rng(0).integers(4, 61, (3, 8))
    one = jnp.ones_like(ids)

    @jax.jit
    def found(params):
        place = jnp.tile(jnp.arange(8), (3, 1))
        hidden = model.apply(
            {"params": params}, jnp.asarray(ids), one, place, 0 * one, method="encode"
        )
        return model.apply({"params": params}, hidden, one, head, method="classify")

    expected = theirs(input_ids=torch.tensor(ids)).logits.detach().numpy()
    np.testing.assert_allclose(found(params), expected, atol=1e-5)


def test_the_head_of_another_task_starts_fresh(tmp_path):
    """All are called `classifier` in the files, some with the same shape."""
    saved("tag", tmp_path)
    _, _, report = opened(tmp_path, classes={"classify": 3})
    new = {f"head/{name}" for name in ("classify/kernel", "classify/bias", "pooler/kernel")}
    assert set(report.kept) == new | {"head/pooler/bias"}
    assert set(report.unused) == {"classifier.weight", "classifier.bias"}


def test_names_that_nobody_gave_are_none(tmp_path):
    saved("classify", tmp_path)
    model, params, _ = opened(tmp_path)
    convert.export(tmp_path / "out", model, params)
    options = json.loads((tmp_path / "out" / "config.json").read_text())
    assert options["id2label"] == {"0": "LABEL_0", "1": "LABEL_1", "2": "LABEL_2"}
    assert convert.labels(tmp_path / "out") == ()


@pytest.mark.parametrize(
    "change, said",
    [
        ({"id2label": None, "num_labels": 10**12}, "num_labels=1000000000000, not a number"),
        ({"id2label": None, "num_labels": "x"}, "num_labels='x', not a number"),
        ({"id2label": {"a": "b", "c": "d"}}, "config.json has no id2label of names"),
        ({"id2label": {"1": "b", "2": "c"}}, "the numbers of the outputs from 0 on"),
        ({"id2label": {"0": "b", "1": "b"}}, "each with a name of its own"),
        ({"id2label": 7}, "not one of a model|no id2label"),
        ({"architectures": [["a"]]}, "not one of a model|no id2label"),
    ],
)
def test_a_broken_config_is_refused(tmp_path, change, said):
    saved("classify", tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ConfigError, match=said):
        convert.labels(tmp_path)
        convert.describe(tmp_path)


def test_the_layer_of_a_modernbert_head_starts_as_that_of_its_vocabulary_head():
    """As from_pretrained of transformers has it; what it started from was used."""
    sizes = dict(width=8, depth=1, heads=2, mlp=8, vocab_size=20, max_len=16)
    build = lambda **own: bert.Model("modernbert_tiny", **sizes, **own)
    pretrained_model, model = build(lm_head=True), build(lm_head=False, classes={"classify": 3})
    init = lambda model, seed: param_init.init_params(model, jax.random.key(seed))
    found, fresh = init(pretrained_model, 0), init(model, 1)
    abstract = param_init.abstract_params(model, sharding.make_mesh())
    params, report = pretrained._laid_out(found, model, abstract, "a run", lambda: fresh)
    for name in ("dense", "norm"):
        jax.tree.map(
            np.testing.assert_array_equal,
            params["head"]["pooler"][name],
            found["head"]["mlm"][name],
        )
    assert report.kept == ("head/classify/bias", "head/classify/kernel")
    assert report.unused == ("head/mlm/bias",)
