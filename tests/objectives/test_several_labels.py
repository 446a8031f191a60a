"""Several labels an example, each a yes or no of its own."""

import json
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
import torch_heads
from common import CACHE, ROOT

from fmjax import data, objectives
from fmjax.checkpoints import pretrained
from fmjax.config import load as configs
from fmjax.errors import ConfigError, DataError
from fmjax.evaluation import measurement
from fmjax.objectives import classify, losses
from fmjax.params import sharding
from fmjax.tasks import export, predict, train
from fmjax.training import initialize

NAMES = ("toxic", "insult", "threat")


@pytest.fixture(scope="module", autouse=True)
def cache():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMJAX_CACHE", str(CACHE))
        yield


def test_the_loss_is_the_mean_of_that_of_each_label():
    """Logits of 0 cost ln 2 each; log(1 + e^-x) those that are x towards their side."""
    logits = jnp.array([[0.0, 0.0], [2.0, -1.0], [5.0, 5.0]])
    batch = {
        "labels": jnp.array([[1, 0], [1, 0], [0, 0]]),
        "units": jnp.array([2, 1, 0]),
    }
    found = losses.each_label(logits, batch)
    expected = np.log(2) + (np.log1p(np.exp(-2)) + np.log1p(np.exp(-1))) / 2
    np.testing.assert_allclose(found["loss"], (expected, 2), rtol=1e-6)
    assert found["accuracy"] == (1, 2)  # the second; the first says no to a yes


def test_scores_of_labels():
    found = {
        "probabilities": np.array([[0.9, 0.2], [0.6, 0.4], [0.1, 0.7]]),
        "chosen": np.array([[1, 0], [1, 0], [0, 1]]),
    }
    labels = np.array([[1, 0], [0, 0], [0, 1]])
    scores = classify.score(found, labels)
    # Of the first label one of two guesses is right and nothing missed, 2/3; of the second all.
    assert scores["f1"] == pytest.approx((2 / 3 + 1) / 2)
    errors = np.array([0.1, 0.2, 0.6, 0.4, 0.1, 0.3])
    assert scores["brier"] == pytest.approx(2 * np.square(errors).mean())
    assert classify.each(found, labels)["accuracy"].tolist() == [True, False, True]
    told = classify.describe(found, names=NAMES[:2])
    assert told[1] == {"labels": ["toxic"], "probabilities": {"toxic": 0.6, "insult": 0.4}}


def test_loss_and_gradient_are_those_of_transformers(tmp_path):
    reference = torch_heads.make(
        "BertForSequenceClassification", "classifier", "classify", tmp_path
    )
    (reference.goal,) = objectives.build({"classify": {}}, dict(target="labels"))
    reference.torch.config.problem_type = "multi_label_classification"
    labels = np.array([[1, 0, 1], [0, 0, 0]])
    ours, theirs = torch_heads.batch((12, 7), labels)
    torch_heads.losses_agree(reference, ours, theirs, {"labels": labels.astype(np.float32)})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A BERT of transformers for several labels, its texts, and the right probabilities."""
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    home = tmp_path_factory.mktemp("several")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"the dog cat is bad good I like".split()]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(token, words.index(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ends
    )
    named = dict(pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        **torch_heads.SIZES, vocab_size=len(words), max_position_embeddings=128,
        initializer_range=0.5, problem_type="multi_label_classification",
        id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)},
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config).eval()
    model.save_pretrained(home / "bert")
    tokenizer.save_pretrained(home / "bert")
    texts = ["the dog is bad", "I like the cat", "the cat is good"]
    rows = [{"text": texts[i % 3], "label": list(NAMES[: i % 3])} for i in range(9)]
    write(home / "rows.jsonl", rows)
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in texts]
    return SimpleNamespace(path=home, right=np.stack([x.sigmoid().numpy() for x in logits] * 3))


def load(name, *words):
    return configs.load(str(ROOT / f"configs/{name}"), words)


def test_each_label_has_a_probability_of_its_own(folder, tmp_path):
    """As transformers' pipeline says them, though the format be that of one class."""
    words = [f"--config.folder={folder.path}/bert", "--config.data.format=classes"]
    words += [f"--config.data.train={folder.path}/rows.jsonl", "--config.data.long=truncate"]
    predict.run(load("predict.py", *words, "--config.objectives={'classify': {}}"), tmp_path)
    found = [json.loads(x) for x in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    probabilities = np.array([list(row["probabilities"].values()) for row in found])
    np.testing.assert_allclose(probabilities, folder.right, atol=1e-5)
    expected = [[n for n, p in zip(NAMES, row, strict=True) if p > 0.5] for row in folder.right]
    assert [row["labels"] for row in found] == expected


@pytest.mark.slow
def test_such_a_head_goes_on_and_is_exported_as_one(folder, tmp_path):
    rows = [f"--config.data.train={folder.path}/rows.jsonl", "--config.data.validation_fraction=0"]
    words = [*rows, f"--config.init={folder.path}/bert", "--config.data.seq_len=16"]
    words += ["--config.total=2", "--config.batch_size=8", "--config.best="]
    words += ["--config.objectives.classify.pool=first", "--config.tensorboard=False"]
    with pytest.raises(ConfigError, match="format='classes'. Set it to 'labels' to go on"):
        one = load("finetune.py", *words)
        initialize.check_head(initialize.resolved(one), NAMES)
    words += ["--config.data.format=labels", f"--config.data.classes={NAMES}"]
    train.run(load("finetune.py", *words), tmp_path / "run")
    out = [f"--config.folder={tmp_path}/run", f"--config.output={tmp_path}/out"]
    export.run(load("export.py", *out), tmp_path)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["problem_type"] == "multi_label_classification"
    assert list(config["label2id"]) == list(NAMES)
    measured = {}
    for name in ("run", "out"):
        words = [f"--config.folder={tmp_path}/{name}", *rows, "--config.data.format=labels"]
        words += ["--config.objectives={'classify': {'pool': 'first'}}", "--config.split=train"]
        words += ["--config.data.long=truncate", "--config.data.seq_len=16"]
        opened = pretrained.open_folder(f"{tmp_path}/{name}", sharding.make_mesh())
        config = load("evaluate.py", *words)
        measure = measurement.Measure(config, opened, sharding.make_mesh())
        measured[name] = measure(opened.model, opened.params, sharding.make_mesh())
    assert measured["out"] == pytest.approx(measured["run"], rel=1e-5, nan_ok=True)


def test_labels_that_are_no_set_are_refused(tmp_path):
    settings = dict(name="text", train=f"{tmp_path}/bad.jsonl", format="labels", long="truncate")
    settings |= dict(validation_fraction=0)
    tokenizer = dict(vocab_size=100)
    write(tmp_path / "bad.jsonl", [{"text": "a", "label": ["x", "x"]}] * 3)
    with pytest.raises(DataError, match="a label twice"):
        data.prepare(settings, tokenizer)
    write(tmp_path / "bad.jsonl", [{"text": "a", "label": []}] * 3)
    with pytest.raises(DataError, match="No example has a label"):
        data.prepare(settings, tokenizer)
