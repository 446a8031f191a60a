"""From a pretrained run to a task: the head, the scores, the folder, and what is refused."""

import json
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import CACHE, ROOT
from sklearn import metrics

from fmjax import build, data, objectives
from fmjax.checkpoints import pretrained
from fmjax.config import load as configs
from fmjax.data.tokenizer import load as load_tokenizer
from fmjax.distributed import signals
from fmjax.errors import ConfigError, DataError
from fmjax.evaluation import eval_loop, readable
from fmjax.params import paths, sharding
from fmjax.tasks import embed, evaluate, export, predict, probe, train
from fmjax.training import initialize, setup

RUN = [
    "--config.batch_size=8", "--config.data.seq_len=16", "--config.tensorboard=False",
    "--config.log_every=2", "--config.eval_every=4", "--config.save_every=4", "--config.total=4",
]  # fmt: skip


def load(spec, *words):
    return configs.load(str(ROOT / "configs" / spec), [*RUN, *words])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Labelled files, in which the first word tells the class and the number of words the value."""
    home = tmp_path_factory.mktemp("finetune")
    rng = np.random.default_rng(0)
    words = "return value name list object of the a given by".split()
    for name, rows in (("train", 64), ("dev", 24)):
        with open(home / f"{name}.jsonl", "w") as file:
            for _ in range(rows):
                label = ("good", "bad", "odd")[rng.integers(3)]
                text = " ".join([label, *rng.choice(words, rng.integers(1, 9))])
                row = {"text": text, "label": label, "score": len(text.split())}
                file.write(json.dumps(row) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMJAX_CACHE", str(CACHE))
        yield home


@pytest.fixture(scope="module")
def encoder(home):
    """A masked language model, trained for four steps."""
    small = ["--config.model.variant=tiny", "--config.model.width=32", "--config.model.mlp=64"]
    words = [f"--config.data.train={home}/*.jsonl", "--config.tokenizer.vocab_size=200"]
    train.run(load("mlm.py", *small, *words, "--config.model.max_len=32"), home / "mlm")
    return home / "mlm"


@pytest.fixture(scope="module")
def decoder(home):
    """A causal one, whose output is not its table and whose queries share keys."""
    own = dict(name="llama", variant="tinyllama_1b", depth=2, width=32, heads=8, mlp=64, max_len=32)
    words = [f"--config.model.{key}={value}" for key, value in own.items()]
    words += [f"--config.data.train={home}/*.jsonl", "--config.tokenizer.vocab_size=300"]
    train.run(load("clm.py:tiny", *words), home / "clm")
    return home / "clm"


@pytest.fixture(scope="module")
def both_ways(home):
    """An encoder–decoder, of two layers and one."""
    own = dict(depth=3, encoder_depth=2, width=32, heads=4, mlp=64, max_len=32)
    words = [f"--config.model.{key}={value}" for key, value in own.items()]
    words += [f"--config.data.train={home}/*.jsonl", "--config.tokenizer.vocab_size=400"]
    train.run(load("span_corruption.py:variant=tiny", *words), home / "t5")
    return home / "t5"


def files(home):
    return [f"--config.data.train={home}/train.jsonl", f"--config.data.validation={home}/dev.jsonl"]


@pytest.fixture(scope="module")
def tuned(home, encoder):
    """The encoder fine-tuned to tell three classes."""
    words = [
        *files(home),
        f"--config.init={encoder}",
        "--config.total=120",
        "--config.optim.lr=3e-3",
        "--config.objectives.classify.pool=mean",
    ]
    train.run(
        load("finetune.py", *words, "--config.eval_every=60", "--config.save_every=60"),
        home / "tuned",
    )
    return home / "tuned"


def last(folder):
    return json.loads((folder / "summary.json").read_text())["metrics"]


def test_the_model_and_the_tokenizer_are_those_of_init(encoder, tuned):
    mesh = sharding.make_mesh()
    before, after = (pretrained.open_folder(str(folder), mesh) for folder in (encoder, tuned))
    assert after.labels == ("bad", "good", "odd")
    assert after.model.cfg.width == 32 and not after.model.cfg.lm_head
    assert dict(after.model.cfg.classes) == {"classify": 3}
    names = paths.unstack(after.params).keys()
    # BERT's pooler is of the first token alone, and the head here is on the mean.
    assert {name.split("/")[1] for name in names if name.startswith("head/")} == {"classify"}
    assert paths.unstack(before.params)["embed/token/embedding"].shape[0] == len(
        load_tokenizer(after.tokenizer)
    )


def test_the_first_word_is_learned_and_scored_over_the_whole_split(home, tuned):
    """Scores are those of scikit-learn on all 24 examples at once, in whatever batches."""
    words = [f"--config.folder={tuned}", "--config.batch_size=16"]
    evaluate.run(configs.load(str(ROOT / "configs/evaluate.py"), words), home)
    found = json.loads((tuned / "evaluation.jsonl").read_text().splitlines()[-1])["metrics"]
    mesh = sharding.make_mesh()
    opened = pretrained.open_folder(str(tuned), mesh)
    split = data.prepare(opened.config.data.to_dict(), {"name": str(opened.tokenizer)}).splits
    goals = objectives.build({"classify": {"pool": "mean"}}, dict(target="classes"))
    step = jax.jit(eval_loop.make_step(build.apply(opened.model), goals))
    (batch,) = data.eval_batches(split["validation"], batch_size=24)
    sums, told = step(opened.params, batch, jax.random.key(0))
    chosen = np.argmax(told["classify"]["probabilities"], axis=1)
    assert found["classify/accuracy"] == pytest.approx(np.mean(chosen == batch["labels"]))
    assert found["classify/accuracy"] > 0.9
    f1 = metrics.f1_score(batch["labels"], chosen, average="macro")
    assert found["classify/f1"] == pytest.approx(f1)
    matthews = metrics.matthews_corrcoef(batch["labels"], chosen)
    assert found["classify/matthews"] == pytest.approx(matthews)


def test_regression_is_scored_by_correlation(home, encoder):
    words = [*files(home), f"--config.init={encoder}", "--config.data.label=score"]
    words += ["--config.best=validation/regress/spearman"]
    train.run(load("finetune.py:regress", *words), home / "regress")
    found = last(home / "regress")
    assert -1 <= found["validation/regress/spearman"] <= 1
    assert found["validation/loss"] > 0


WORDS = "return value name list object".split()
CONLL = "".join(
    f"{word}\t{tag}\n" for word, tag in zip(WORDS, ["B-x", "I-x", "O", "O", "O"], strict=True)
)
# What each task needs, a score that it brings, and what is right in the report's first example.
SQUAD = {"context": " ".join(WORDS * 3), "qas": [{"question": "name", "answers": [{}]}] * 10}
SQUAD["qas"][0]["answers"] = [{"text": "value name", "answer_start": 7}]
CHOICE = {"text": "return value", "endings": ["name", "list of", "object"], "label": 1}
TASKS = {
    "tag": (
        "conll",
        (CONLL + "\n") * 16,
        "tag/f1",
        ("return value name list object", "B-x I-x O O O"),
    ),
    "span": (
        "json",
        json.dumps({"data": [{"paragraphs": [SQUAD]}]}),
        "span/f1",
        ("name | return value name list object", "value name"),
    ),
    "contrast": (
        "jsonl",
        '{"text": "return value", "other": "the value"}\n' * 10,
        "contrast/mrr",
        None,
    ),
    "choose": (
        "jsonl",
        (json.dumps(CHOICE) + "\n") * 10,
        "choose/accuracy",
        ("return value | name | list of | object", "1"),
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_goes_from_files_to_scores(home, encoder, task):
    ending, examples, metric, first = TASKS[task]
    for name in (f"{task}_train", f"{task}_dev"):
        (home / f"{name}.{ending}").write_text(examples)
    words = [f"--config.data.train={home}/{task}_train.{ending}", f"--config.init={encoder}"]
    words += [f"--config.data.validation={home}/{task}_dev.{ending}", "--config.data.stride=4"]
    words += ["--config.data.columns=text,other"] if task == "contrast" else []
    train.run(load(f"finetune.py:{task}", *words), home / task)
    found = last(home / task)
    assert np.isfinite(found["validation/loss"]) and 0 <= found[f"validation/{metric}"] <= 1
    words = [f"--config.folder={home / task}", "--config.batch_size=16"]
    evaluate.run(configs.load(str(ROOT / "configs/evaluate.py"), words), home)
    again = json.loads((home / task / "evaluation.jsonl").read_text())["metrics"]
    assert again[metric] == pytest.approx(found[f"validation/{metric}"])
    if first is None:
        assert not (home / task / "predictions.json").exists()
        return
    shown = json.loads((home / task / "predictions.json").read_text())[0]
    assert shown["text"].startswith(first[0]) and shown["right"] == first[1] and shown["said"]


def test_the_report_shows_what_the_model_says_of_a_few_examples(home, tuned):
    rows = lambda name: map(json.loads, (home / name).read_text().splitlines())
    labels = {row["text"]: row["label"] for row in rows("dev.jsonl")}
    shown = json.loads((tuned / "predictions.json").read_text())
    assert len(shown) == 5 and len({one["right"] for one in shown}) > 1
    for one in shown:
        assert labels[one["text"]] == one["right"]
    words = [f"--config.folder={tuned}", f"--config.data.train={home}/dev.jsonl"]
    words += [f"--config.output={home}/few"]
    predict.run(configs.load(str(ROOT / "configs/predict.py"), words), home)
    told = {one["text"]: one["label"] for one in rows("few")}
    assert [one["said"].split()[0] for one in shown] == [told[one["text"]] for one in shown]
    assert shown[0]["said"] in (tuned / "report.html").read_text()


def test_only_the_head_moves(home, encoder):
    groups = "(('head/.*', 'train'), ('.*', 'freeze'))"
    words = [*files(home), f"--config.init={encoder}", f"--config.groups={groups}"]
    train.run(load("finetune.py", *words), home / "head")
    mesh = sharding.make_mesh()
    before, after = (
        paths.unstack(pretrained.open_folder(str(folder), mesh).params)
        for folder in (encoder, home / "head")
    )
    for name in after.keys() & before.keys():
        moved = not np.array_equal(before[name], after[name])
        assert moved == name.startswith("head/"), name


def test_predictions_are_lines_in_the_order_of_the_file(home, tuned, capsys):
    rows = [json.loads(line) for line in (home / "dev.jsonl").read_text().splitlines()]
    words = [f"--config.folder={tuned}", f"--config.data.train={home}/dev.jsonl"]
    words += [f"--config.output={home}/out.jsonl", "--config.batch_size=16"]
    predict.run(configs.load(str(ROOT / "configs/predict.py"), words), home)
    told = [json.loads(line) for line in (home / "out.jsonl").read_text().splitlines()]
    assert [line["text"] for line in told] == [row["text"] for row in rows]
    for line in told:
        assert sum(line["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert line["label"] == max(line["probabilities"], key=line["probabilities"].get)
    right = np.mean([a["label"] == b["label"] for a, b in zip(told, rows, strict=True)])
    assert right > 0.9
    shown = capsys.readouterr().out
    assert "24 predictions written to" in shown
    best = max(told[0]["probabilities"].values())
    said = f"label {told[0]['label']}, probabilities {told[0]['label']} {best:.3f}"
    assert f"  {told[0]['text']}\n    {said}" in shown


def test_what_a_terminal_shows_of_a_text_is_cut_and_can_be_printed():
    assert readable.cut("a\n b") == "a b"
    assert readable.cut("x" * 10**6) == "x" * 89 + "…"
    assert readable.cut(" " * 500 + "x").endswith("…")
    assert readable.cut("\x1b[2J") == "\N{REPLACEMENT CHARACTER}[2J"


def test_embeddings_are_the_mean_of_the_last_layer_whatever_the_batch(home, encoder):
    found = []
    for size in (8, 16):
        words = [f"--config.folder={encoder}", f"--config.data.train={home}/dev.jsonl"]
        words += ["--config.data.seq_len=16", f"--config.batch_size={size}"]
        embed.run(configs.load(str(ROOT / "configs/embed.py"), words), home / str(size))
        found.append(np.load(home / str(size) / "embeddings.npy"))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(found[0], axis=1), 1, atol=1e-5)
    opened = pretrained.open_folder(str(encoder), sharding.make_mesh())
    text = json.loads((home / "dev.jsonl").read_text().splitlines()[3])["text"]
    ids = np.array([load_tokenizer(opened.tokenizer)(text)["input_ids"]])
    row = (ids, np.ones_like(ids), np.arange(ids.shape[1])[None], np.zeros_like(ids))
    row = [jnp.asarray(x, jnp.int32) for x in row]
    hidden = build.apply(opened.model)(opened.params, *row, method="encode")
    mean = np.mean(hidden[0], axis=0)
    np.testing.assert_allclose(found[0][3], mean / np.linalg.norm(mean), atol=1e-5)


@pytest.mark.slow
def test_a_classifier_on_the_features_of_a_layer(home, tuned):
    words = [*files(home), f"--config.folder={tuned}", "--config.data.seq_len=16"]
    words += ["--config.batch_size=16", f"--config.data.cache={home}/cache"]
    for name, more in {
        "last": [],
        "first": ["--config.layer=1", "--config.classifier=mlp"],
    }.items():
        made = configs.load(str(ROOT / "configs/probe.py"), [*words, *more])
        probe.run(made, home / name)
        found = json.loads((home / name / "summary.json").read_text())["metrics"]
        assert found["validation/classify/accuracy"] > 0.7
        assert found["validation/classify/f1"] > 0.6
    # The trunk was trained for the task, so its last layer tells the classes apart, as scikit-learn
    # itself says of vectors made one at a time.
    opened = pretrained.open_folder(str(tuned), sharding.make_mesh())
    settings = opened.config.data.to_dict() | {"cache": f"{home}/cache"}
    splits = data.prepare(settings, {"name": str(opened.tokenizer)}).splits
    features, labels = {}, {}
    for name, split in splits.items():
        rows = split.rows(np.arange(len(split)))
        labels[name] = rows["labels"]
        row = [jnp.asarray(rows[k]) for k in ("input_ids", "segment_ids", "positions")]
        hidden = build.apply(opened.model)(
            opened.params, *row, jnp.asarray(rows["token_types"]), method="encode"
        )
        real = rows["segment_ids"][..., None] > 0
        features[name] = np.sum(hidden * real, axis=1) / real.sum(axis=1)
    model = probe.classifier("logistic", {}).fit(features["train"], labels["train"])
    right = np.mean(model.predict(features["validation"]) == labels["validation"])
    last = json.loads((home / "last" / "summary.json").read_text())["metrics"]
    assert last["validation/classify/accuracy"] == pytest.approx(right)


def test_a_run_keeps_what_each_example_adds_to_its_means(home, tuned):
    metrics = json.loads((tuned / "summary.json").read_text())["metrics"]
    opened = pretrained.open_folder(str(tuned), sharding.make_mesh())
    settings = opened.config.data.to_dict()
    split = data.prepare(settings, {"name": str(opened.tokenizer)}).splits["validation"]
    rows = split.rows(np.arange(len(split)))
    with np.load(tuned / "examples.npz") as found:
        right = found["classify/accuracy"]
        assert right.mean() == pytest.approx(metrics["validation/classify/accuracy"])
        assert 0 < right.mean() and len(right) == len(split)
        np.testing.assert_array_equal(found["label"], rows["labels"])
        np.testing.assert_array_equal(found["tokens"], rows["segment_ids"].sum(1))
        assert found["step"] == opened.step
    row = [jnp.asarray(rows[k]) for k in ("input_ids", "segment_ids", "positions", "token_types")]
    apply = build.apply(opened.model)
    hidden = apply(opened.params, *row, method="encode")
    pooled = (opened.params, hidden, row[1], "classify", "mean")
    logits = apply(*pooled, method="classify")
    np.testing.assert_array_equal(right, np.argmax(logits, -1) == rows["labels"])


def test_a_classifier_on_counted_words(home, tuned):
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = [*files(home), f"--config.folder={tuned}", "--config.data.seq_len=16"]
    words += ["--config.features=words", f"--config.data.cache={home}/cache"]
    probe.run(configs.load(str(ROOT / "configs/probe.py"), words), home / "words")
    found = json.loads((home / "words" / "summary.json").read_text())["metrics"]
    # As scikit-learn itself says of the tokens as words.
    opened = pretrained.open_folder(str(tuned), sharding.make_mesh())
    tokenizer = load_tokenizer(opened.tokenizer)
    texts, labels = {}, {}
    for name in ("train", "dev"):
        rows = [json.loads(line) for line in (home / f"{name}.jsonl").read_text().splitlines()]
        cut = [tokenizer(row["text"], truncation=True, max_length=16)["input_ids"] for row in rows]
        texts[name] = [" ".join(map(str, ids)) for ids in cut]
        labels[name] = [row["label"] for row in rows]
    counted = TfidfVectorizer(sublinear_tf=True, token_pattern=r"\d+").fit(texts["train"])
    model = LogisticRegression(max_iter=1000)
    model.fit(counted.transform(texts["train"]), labels["train"])
    right = np.mean(model.predict(counted.transform(texts["dev"])) == np.array(labels["dev"]))
    assert found["validation/classify/accuracy"] == pytest.approx(right)


@pytest.mark.parametrize(
    "word, said",
    [
        ("--config.layer=3", "config.layer=3: the model has layers 1 to 2"),
        ("--config.args={'CC': 1}", "unexpected keyword argument 'CC'"),
        ("--config.args={'C': -1.0}", "config.args={'C': -1.0}"),
        ("--config.data.validation_fraction=0", "no examples for"),
    ],
)
def test_a_probe_that_cannot_be_made_is_refused(home, tuned, word, said):
    words = [f"--config.folder={tuned}", f"--config.data.train={home}/train.jsonl", word]
    words += ["--config.data.seq_len=16", "--config.batch_size=16"]
    with pytest.raises((ConfigError, DataError), match=said):
        probe.run(configs.load(str(ROOT / "configs/probe.py"), words), home / "refused")


def test_what_an_example_adds_is_in_the_order_of_the_split():
    squares = lambda found, labels: {"loss": (found["x"] - labels) ** 2}
    made = objectives.Objective("regress", 1.0, None, None, each=squares)
    rows = lambda index, real, labels: (np.array(index), np.array(real), np.array(labels))
    batches = [
        {"rows": rows([2, 0], [True, True], [12, 10]), "regress": {"x": np.array([14.0, 11.0])}},
        {"rows": rows([1, 0], [True, False], [11, 0]), "regress": {"x": np.array([14.0, 9.0])}},
    ]
    found = eval_loop.by_example(batches, [made], split=None)
    np.testing.assert_array_equal(found["regress/loss"], [1, 9, 4])
    np.testing.assert_array_equal(found["label"], [10, 11, 12])
    # The loss of the run is the only objective's, unless that is weighted.
    np.testing.assert_array_equal(found["loss"], found["regress/loss"])
    assert "loss" not in eval_loop.by_example(batches, [made._replace(weight=0.5)], split=None)
    assert eval_loop.by_example(batches, [made._replace(each=None)], split=None) == {}
    assert eval_loop.keeps([made]) and not eval_loop.keeps([made._replace(each=None)])


def test_score_is_told_only_of_real_rows_in_the_order_of_the_split():
    rows = lambda index, real, labels: (np.array(index), np.array(real), np.array(labels))
    batches = [
        {"rows": rows([2, 0], [True, True], [12, 10]), "a": {"x": np.array([2.0, 0.0])}},
        {"rows": rows([1, 0], [True, False], [11, 0]), "a": {"x": np.array([1.0, 9.0])}},
    ]
    outputs, labels, rows = eval_loop.in_order(batches)
    np.testing.assert_array_equal(outputs["a"]["x"], [0.0, 1.0, 2.0])
    np.testing.assert_array_equal(labels, [10, 11, 12])
    np.testing.assert_array_equal(rows, [0, 1, 2])


def test_there_is_nothing_to_learn_without_labels(home, encoder):
    words = [*files(home), f"--config.init={encoder}", "--config.data.label="]
    with pytest.raises(ConfigError, match="config.data.label is empty.*config.data.format=classes"):
        train.run(load("finetune.py", *words), home / "none")


@pytest.fixture(scope="module")
def first_pooled(home, encoder):
    """A classifier as transformers has it: `run`, and what is exported of it."""
    words = [*files(home), f"--config.init={encoder}", "--config.objectives.classify.pool=first"]
    train.run(load("finetune.py", *words), home / "first" / "run")
    words = [f"--config.folder={home}/first/run", f"--config.output={home}/first/exported"]
    export.run(configs.load(str(ROOT / "configs/export.py"), words), home)
    return home / "first"


def test_the_folder_goes_to_transformers_with_its_classes(first_pooled):
    found = json.loads((first_pooled / "exported" / "config.json").read_text())
    assert found["architectures"] == ["BertForSequenceClassification"]
    assert found["id2label"] == {"0": "bad", "1": "good", "2": "odd"}
    again = pretrained.open_folder(f"{first_pooled}/exported", sharding.make_mesh())
    assert again.labels == ("bad", "good", "odd")
    again.require_head("classify")


def relabelled(home, names):
    """The examples with other names for the classes, in their order."""
    text = (home / "train.jsonl").read_text()
    for old, new in zip(("bad", "good", "odd"), names, strict=True):
        text = text.replace(f'"label": "{old}"', f'"label": "{new}"')
    path = home / f"{'-'.join(names)}.jsonl"
    path.write_text(text)
    return [f"--config.data.train={path}", "--config.total=1", "--config.best="]


@pytest.mark.parametrize("kind", ["run", "exported"])
def test_a_head_for_other_classes_is_not_gone_on_with(home, first_pooled, kind):
    """From a run as from Hugging Face's format: other names, and another number."""
    source = first_pooled / kind
    here = [f"--config.init={source}", "--config.objectives.classify.pool=first"]
    for names, said in ((("x", "y", "z"), "3 outputs (x, y, z)"), (("x", "y", "y"), "2 outputs")):
        config = load("finetune.py", *relabelled(home, names), *here)
        wanted = f"has a head 'classify' with 3 outputs (bad, good, odd), the data need {said}"
        with pytest.raises(ConfigError, match=re.escape(wanted)):
            train.run(config, home / f"refused-{kind}-{'-'.join(names)}")
        with pytest.raises(ConfigError, match=re.escape(wanted)):
            train.run(config, home / "dry", dry_run=True)


@pytest.mark.parametrize("kind", ["run", "exported"])
def test_a_head_is_kept_unless_a_new_one_is_asked_for(home, first_pooled, kind):
    source, mesh = first_pooled / kind, sharding.make_mesh()
    here = [f"--config.init={source}", "--config.objectives.classify.pool=first"]
    before = paths.flatten(pretrained.open_folder(str(source), mesh).params)
    stated = "--config.data.classes=('x', 'y', 'z')"
    other = relabelled(home, ("x", "y", "z"))
    for words, kept in (
        (files(home), True),
        ([*files(home), "--config.new_head=True"], False),
        ([*other, stated], True),
        ([*other, "--config.new_head=True"], False),
    ):
        config = load("finetune.py", *words, *here)
        run = setup.setup(config, mesh)
        initialize.check_head(run.config, run.dataset.labels)
        begun = initialize.initial(run.config, run.model, run.abstract.params).params
        begun = paths.flatten(begun)
        same = lambda name: bool(np.array_equal(begun[name], before[name]))  # noqa: B023
        assert same("head/classify/kernel") == kept
        assert same("head/pooler/kernel")


def test_names_that_transformers_makes_up_are_not_compared(home, first_pooled, tmp_path):
    folder = shutil.copytree(first_pooled / "exported", tmp_path / "unnamed")
    described = json.loads((folder / "config.json").read_text())
    described["id2label"] = {str(i): f"LABEL_{i}" for i in range(3)}
    (folder / "config.json").write_text(json.dumps(described))
    config = load("finetune.py", *relabelled(home, ("x", "y", "z")), f"--config.init={folder}")
    initialize.check_head(config, ("x", "y", "z"))
    with pytest.raises(ConfigError, match="3 outputs, the data need 2 outputs"):
        initialize.check_head(config, ("x", "y"))


def test_a_new_head_needs_something_to_differ_from(home, first_pooled):
    with pytest.raises(ConfigError, match="config.new_head=True needs --config.init"):
        load("finetune.py", "--config.init=", "--config.new_head=True")
    words = [*files(home), f"--config.init={first_pooled}/run", "--config.data.label="]
    config = load("finetune.py:contrast", *words, "--config.new_head=True")
    run = setup.setup(config, sharding.make_mesh())
    with pytest.raises(ConfigError, match=r"the objectives \['contrast'\] have no head"):
        initialize.initial(run.config, run.model, run.abstract.params)


def test_a_dry_run_tells_what_a_run_would_be_and_ends_at_once(home, encoder, capsys, monkeypatch):
    config = load("finetune.py", *files(home), f"--config.init={encoder}")
    handlers, show = [], train.plan.show

    def showing(*arguments):
        handlers.extend(signal.getsignal(number) for number in signals.SIGNALS)
        show(*arguments)

    monkeypatch.setattr(train.plan, "show", showing)
    train.run(config, home / "dry", dry_run=True)
    assert len(handlers) == 4 and set(handlers) == {signals._end}
    assert signal.getsignal(signal.SIGTERM) is not signals._end
    shown = capsys.readouterr().out
    assert "head/classify/kernel" in shown and "first row of the first batch\n[CLS] " in shown
    assert not (home / "dry").exists()


def test_a_best_metric_that_is_no_number_is_told_once(home, encoder, capsys):
    words = "the dog runs . a cat sleeps".split()
    tags = "DET NOUN VERB PUNCT DET NOUN VERB".split()
    lines = [f"{word}\t{tag}" for word, tag in zip(words, tags, strict=True)]
    (home / "pos.conll").write_text("\n".join([*lines, ""] * 24))
    data = [f"--config.data.{key}={home}/pos.conll" for key in ("train", "validation")]
    config = load("finetune.py:tag", *data, f"--config.init={encoder}", "--config.eval_every=2")
    train.run(config, home / "pos")
    assert capsys.readouterr().out.count("validation/tag/f1 is nan, so that no such") == 1


def test_a_head_on_the_mean_is_not_exported(home, encoder):
    words = [*files(home), f"--config.init={encoder}", "--config.total=1"]
    words += ["--config.objectives={'classify': {'pool': 'mean'}}", "--config.best="]
    train.run(load("finetune.py", *words), home / "mean")
    words = [f"--config.folder={home}/mean", f"--config.output={home}/mean-exported"]
    with pytest.raises(
        ConfigError, match="pool='mean', but the classes of transformers for bert take 'first'"
    ):
        export.run(configs.load(str(ROOT / "configs/export.py"), words), home)


def test_init_has_to_be_given(home):
    with pytest.raises(ConfigError, match="config.model.name='init' means the model of config.ini"):
        train.run(load("finetune.py", *files(home), "--config.init="), home / "without")


def test_labels_that_do_not_fit_the_head_are_refused(home, tuned):
    (home / "more.jsonl").write_text('{"text": "a", "label": "new"}\n')
    words = [f"--config.folder={tuned}", f"--config.data.train={home}/more.jsonl"]
    words += ["--config.split=train", "--config.data.validation_fraction=0"]
    with pytest.raises(Exception, match="label 'new' of the train split is none of those"):
        evaluate.run(configs.load(str(ROOT / "configs/evaluate.py"), words), home)
