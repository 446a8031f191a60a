"""Classifiers and taggers of transformers whose outputs nobody named, and labels of words."""

import json

import pytest
from common import ROOT

import fmjax
from fmjax.config import load as configs
from fmjax.errors import ConfigError
from fmjax.tasks import predict

torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
transformers = pytest.importorskip("transformers")

SIZES = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
TABLES = dict(vocab_size=64, max_position_embeddings=40, pad_token_id=0)
WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the quick brown fox ##es jump ##ed over".split()
TEXTS = ["the quick brown foxes", "foxes jumped over the fox", "quick"]


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Folders as transformers saves them: without id2label for two outputs, with LABEL_0, LABEL_1
    and LABEL_2 for three."""
    home = tmp_path_factory.mktemp("unnamed")
    transformers.utils.logging.disable_progress_bar()
    (home / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    words = transformers.BertTokenizer(vocab=str(home / "vocab.txt"), model_max_length=40)
    made = ("two", "Sequence", 2), ("three", "Sequence", 3), ("tags", "Token", 3)
    for folder, kind, outputs in made:
        torch.manual_seed(2)
        config = transformers.BertConfig(**SIZES, **TABLES, num_labels=outputs)
        model = getattr(transformers, f"BertFor{kind}Classification")(config).eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.normal_(float("Norm.weight" in key), 0.5)
            model.classifier.bias.zero_()
        model.save_pretrained(home / folder)
        words.save_pretrained(home / folder)
        assert ("id2label" in (home / folder / "config.json").read_text()) == (outputs == 3)
    return home


@pytest.mark.parametrize("folder, outputs", [("two", 2), ("three", 3)])
def test_classes_without_names_are_called_as_in_transformers(folder, outputs, home, tmp_path):
    pipe = transformers.pipeline("text-classification", str(home / folder), top_k=None)
    wanted = [{one["label"]: one["score"] for one in text} for text in pipe(TEXTS)]
    model = fmjax.load(home / folder)
    assert sorted(wanted[0]) == [f"LABEL_{i}" for i in range(outputs)] == list(model.labels)
    for ours, theirs in zip(model.classify(TEXTS), wanted, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)
    with pytest.raises(ConfigError, match="no head that labels words"):
        model.tag(TEXTS)

    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": x}) + "\n" for x in TEXTS))
    words = [f"--config.folder={home / folder}", f"--config.data.train={tmp_path / 'new.jsonl'}"]
    words += [f"--config.output={tmp_path / 'out.jsonl'}", "--config.data.seq_len=32"]
    predict.run(configs.load(f"{ROOT}/configs/predict.py", words), tmp_path)
    lines = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    for line, theirs in zip(lines, wanted, strict=True):
        assert line["label"] == max(theirs, key=theirs.get)
        assert line["probabilities"] == pytest.approx(theirs, abs=1e-5)


def test_words_are_labelled_as_by_the_pipeline_of_transformers(home, tmp_path):
    pipe = transformers.pipeline("token-classification", str(home / "tags"), ignore_labels=[])
    begins = lambda token: not token["word"].startswith("##")
    wanted = [[token["entity"] for token in pipe(x) if begins(token)] for x in TEXTS]
    assert len({label for labels in wanted for label in labels}) > 1
    model = fmjax.load(home / "tags")
    assert model.tag(TEXTS) == wanted == model.tag([text.split() for text in TEXTS])
    assert model.predict(TEXTS) == [{"tags": labels} for labels in wanted]
    with pytest.raises(ConfigError, match="labels words, not texts: call tag"):
        model.classify(TEXTS)
    assert model.tag(["fox " * 50])[0][-1] is None
