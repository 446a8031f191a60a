"""Fine-tunes in transformers: the same probabilities, one text at a time and several at once."""

import json
import os

import jax
import pytest
from common import ROOT
from test_finetune import decoder, files, home, load  # noqa: F401

from fmjax import convert
from fmjax.checkpoints import pretrained
from fmjax.config import load as configs
from fmjax.errors import ConfigError
from fmjax.models import bert, gpt2, t5
from fmjax.params import paths, sharding
from fmjax.tasks import export, predict, train
from fmjax.training import initialize

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
TEXTS = ("good value", "bad name list object of the", "odd")


@pytest.fixture(scope="module")
def modern(home):  # noqa: F811
    """A ModernBERT, configs/mlm.py's model, trained for four steps."""
    own = ["--config.model.width=32", "--config.model.mlp=64", "--config.model.max_len=32"]
    words = [f"--config.data.train={home}/*.jsonl", "--config.tokenizer.vocab_size=200"]
    train.run(load("mlm.py", *own, *words), home / "modern")
    return home / "modern"


@pytest.fixture(scope="module")
def gpt(home):  # noqa: F811
    """A GPT-2, trained for four steps."""
    own = ["--config.model.width=32", "--config.model.mlp=64", "--config.model.max_len=32"]
    words = [f"--config.data.train={home}/*.jsonl", "--config.tokenizer.vocab_size=300"]
    train.run(load("clm.py:tiny", *own, *words), home / "gpt")
    return home / "gpt"


def ask(folder, home, *words):  # noqa: F811
    """{text: {class: probability}}, as configs/predict.py writes them."""
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (home / "new.jsonl").write_text(rows)
    words = [f"--config.folder={folder}", f"--config.data.train={home}/new.jsonl", *words]
    predict.run(configs.load(str(ROOT / "configs/predict.py"), words), home / "asked")
    lines = (home / "asked" / "predictions.jsonl").read_text().splitlines()
    return {row["text"]: row["probabilities"] for row in map(json.loads, lines)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "base, config, pool, name",
    [
        ("modern", "finetune.py", "mean", "ModernBertForSequenceClassification"),
        ("modern", "finetune_lora.py", "mean", "ModernBertForSequenceClassification"),
        ("modern", "finetune.py", "first", "ModernBertForSequenceClassification"),
        ("decoder", "finetune.py", "last", "LlamaForSequenceClassification"),
        ("gpt", "finetune.py", "last", "GPT2ForSequenceClassification"),
    ],
)
def test_the_pipeline_of_an_exported_run(base, config, pool, name, home, request, tmp_path):  # noqa: F811
    """The decoders' tokenizer has one token for begin, end and padding, and no frame of its own."""
    pytest.importorskip("torch", reason="torch, the reference, is not installed")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    source = request.getfixturevalue(base)
    words = [*files(home), f"--config.init={source}", "--config.total=20"]
    words += [f"--config.objectives.classify.pool={pool}", "--config.eval_every=20"]
    train.run(load(config, *words), tmp_path / "run")
    words = [f"--config.folder={tmp_path}/run", f"--config.output={tmp_path}/out"]
    export.run(configs.load(str(ROOT / "configs/export.py"), words), tmp_path)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [name]
    expected = ask(tmp_path / "run", home)
    pipe = transformers.pipeline("text-classification", str(tmp_path / "out"), top_k=None)
    for batch in ([[text] for text in TEXTS], [list(TEXTS)]):
        for texts in batch:
            for text, found in zip(texts, pipe(texts, batch_size=len(texts)), strict=True):
                probabilities = {row["label"]: row["score"] for row in found}
                assert probabilities == pytest.approx(expected[text], abs=1e-5)
    again = ["--config.data.format=classes", "--config.data.long=truncate"]
    again += ["--config.objectives={'classify': {}}", "--config.data.seq_len=16"]
    for text, found in ask(tmp_path / "out", home, *again).items():
        assert found == pytest.approx(expected[text], abs=1e-5)


def named(model, pool=""):
    """The class of transformers that a model would be exported as."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *model.example())["params"]
    convert.check_pool(model, {"classify": {"pool": pool}})
    return convert.architecture(model, paths.unstack(shapes))[0]


SMALL = dict(vocab_size=20, width=16, depth=2, heads=2, mlp=24, lm_head=False)


@pytest.mark.parametrize(
    "model, pool, said",
    [
        (lambda: bert.Model("modernbert_tiny", **SMALL, classes={"classify": 2}, pooler=False), "",
         "heads .'classify'. without the layer that it has before them: set config.init"),
        (lambda: bert.Model("tiny", **SMALL, classes={"classify": 2}), "mean",
         "for bert take 'first': outputs would differ. Train with .*classify.pool=first"),
        (lambda: gpt2.Model("tiny", **SMALL, classes={"classify": 2}), "mean", "take 'last'"),
        (lambda: gpt2.Model("tiny", **SMALL, classes={"choose": 1}), "",
         "gpt2 has the heads .'choose'.; fmjax writes gpt2 with classify or lm or regress or span"),
        (lambda: t5.Model("small", **SMALL, encoder_depth=1, head_size=8, classes={"tag": 2}), "",
         "t5 has the heads .'tag'.; fmjax writes t5 with lm alone"),
    ],
)  # fmt: skip
def test_what_no_class_has_is_said(model, pool, said):
    with pytest.raises(ConfigError, match=said):
        named(model(), pool)


@pytest.mark.parametrize("pool", ["mean", "first"])
def test_the_default_encoder_has_a_class(pool):
    model = bert.Model("modernbert_tiny", **SMALL, classes={"classify": 2}, pool=pool)
    assert named(model, pool) == "ModernBertForSequenceClassification"


def folder_of(tmp_path, kind, **changes):
    config = {"model_type": "bert", "architectures": [kind]} | changes
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


@pytest.mark.parametrize(
    "kind, changes, said",
    [
        ("BertForMyTask", {}, "is of a 'BertForMyTask', whose head fmjax does not read; of bert "),
        ("T5ForSequenceClassification", {"model_type": "t5"}, "whose head fmjax does not read"),
        ("GPT2DoubleHeadsModel", {"model_type": "gpt2"}, "whose head fmjax does not read"),
        ("LlamaForReward", {"model_type": "llama"}, "whose head fmjax does not read"),
        ("Gemma3ForSequenceClassification", {"model_type": "gemma3_text"},
         "it reads Gemma3TextForSequenceClassification, Gemma3ForCausalLM"),
        (7, {}, "has no names in architectures"),
    ],
)  # fmt: skip
def test_a_folder_of_an_unknown_class_is_refused_at_opening(kind, changes, said, tmp_path):
    """And as config.init, unless the heads are new."""
    folder = folder_of(tmp_path, kind, **changes)
    with pytest.raises(ConfigError, match=said):
        pretrained.open_folder(str(folder), sharding.make_mesh())
    config = load("finetune.py", f"--config.init={folder}")
    with pytest.raises(ConfigError, match=said):
        initialize.resolved(config)
    if isinstance(kind, str) and not changes:
        config.new_head = True
        assert initialize.resolved(config).model.name == "bert"


@pytest.mark.parametrize(
    "kind", ["BertModel", "BertForPreTraining", "BertLMHeadModel", "BertForMaskedLM"]
)
def test_a_trunk_is_no_unknown_class(kind, tmp_path):
    convert.check_class(folder_of(tmp_path, kind))


@pytest.mark.parametrize(
    "problem, said",
    [
        ("ranking", "problem_type='ranking', which fmjax does not have"),
        ("regression", "'regression' with 2 labels; fmjax's regress has one number an example"),
    ],
)
def test_a_problem_that_is_not_offered_is_refused(problem, said, tmp_path):
    folder = folder_of(tmp_path, "BertForSequenceClassification", problem_type=problem)
    with pytest.raises(ConfigError, match=said):
        convert.describe(folder)
