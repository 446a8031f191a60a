"""Our models in lm-evaluation-harness: what its own backend for transformers finds."""

import json
import os
from types import SimpleNamespace

import jax
import pytest
import tiny_folders
from common import ROOT

from fmjax.checkpoints import pretrained
from fmjax.config import load as configs
from fmjax.data import chat
from fmjax.generation import text_generator
from fmjax.params import sharding
from fmjax.tasks import export, train

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install lm-eval")
from fmjax.tasks import harness  # noqa: E402

PAIRS = [
    ("The function", " returns a list"),
    ("The function ", "returns"),
    ("", "A list of all"),
    ("word " * 60, "is the end of it all"),
    ("a", " " + "long text and more " * 30),
]
YAML = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
"""
CHOICE = """
doc_to_text: "{{question}}"
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITE = """
doc_to_text: "{{question}}"
doc_to_target: answer
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT of configs/clm.py of a few steps, as transformers has it."""
    home = tmp_path_factory.mktemp("harness")
    words = ["--config.total=4", "--config.log_every=2", "--config.ledger=()"]
    train.run(configs.load(f"{ROOT}/configs/clm.py:tiny", words), home / "run")
    words = [f"--config.folder={home / 'run'}", f"--config.output={home / 'out'}"]
    export.run(configs.load(f"{ROOT}/configs/export.py", words), home / "work")
    return home / "out"


def opened(folder):
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        return pretrained.open_folder(str(folder), mesh)


def asked(*args):
    return [SimpleNamespace(args=one) for one in args]


@pytest.fixture(scope="module")
def both(folder):
    """(ours, that of the harness on torch)."""
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    theirs = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=2)
    ours = harness.Model(opened(folder), batch_size=3)
    theirs._max_length = ours.scorer.width = 48  # so that texts are longer
    return ours, theirs


def test_likelihoods_are_those_of_its_own_backend(both):
    ours, theirs = both
    found = ours.loglikelihood(asked(*PAIRS[:4]), disable_tqdm=True)
    expected = theirs.loglikelihood(asked(*PAIRS[:4]), disable_tqdm=True)
    for (one, greedy), (other, theirs_greedy) in zip(found, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-3) and greedy == theirs_greedy
    texts = asked(*[(said,) for _, said in PAIRS])
    rolling = ours.loglikelihood_rolling(texts, disable_tqdm=True)
    assert rolling == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=2e-3
    )


def test_what_is_written_is_what_its_own_backend_writes(both):
    ours, theirs = both
    how = {"until": ["zzz"], "max_gen_toks": 6, "do_sample": False}
    other = how | {"max_gen_toks": 3}
    requests = asked(*[(text or "A", how) for text, _ in PAIRS[:4]], ("The", other))
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(ours, that of the harness on torch) of a decoder whose tokenizer puts <s> before a text."""
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("begun")
    words = tiny_folders.tokenizer(home / "words", begins=True, chat_template=tiny_folders.CHATML)
    made = tiny_folders.decoder(home / "model", words)
    tiny_folders.settings(made / "generation_config.json", eos_token_id=[2, 4])
    theirs = HFLM(pretrained=str(made), device="cpu", dtype="float32", batch_size=2)
    return harness.Model(opened(made), batch_size=2), theirs


BEGUN = [*PAIRS[:3], ("<s>already", " begun"), ("a <s> inside", " of it")]


def test_a_text_begins_as_in_its_own_backend_and_not_twice(begun):
    ours, theirs = begun
    for context, said in BEGUN:
        assert ours.tok_encode(context + said) == theirs.tok_encode(context + said)
    assert ours.tok_encode("<s>a")[:2] == [1, ours.tok_encode("a")[1]]
    for name, requests in (
        ("loglikelihood", asked(*BEGUN)),
        ("loglikelihood_rolling", asked(*[(said,) for _, said in BEGUN])),
    ):
        found, expected = (getattr(x, name)(requests, disable_tqdm=True) for x in begun)
        firsts = lambda rows: [row[0] if isinstance(row, tuple) else row for row in rows]
        assert firsts(found) == pytest.approx(firsts(expected), rel=1e-4, abs=1e-3)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """(ours, that of the harness on torch) of a decoder of A, C, G and T, whose tokenizer drops
    each other letter and puts <s> before a text."""
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("bases")
    words = tiny_folders.bases(home / "words")
    made = tiny_folders.decoder(home / "model", words)
    theirs = HFLM(pretrained=str(made), device="cpu", dtype="float32", batch_size=2)
    return harness.Model(opened(made), batch_size=2), theirs


def test_a_tokenizer_without_the_letter_a_begins_its_texts_too(bases):
    ours, theirs = bases
    # Ids of <pad>, <s>, </s>, A, C, G, T are 0 to 6.
    for text, ids in {"GAT": [1, 5, 3, 6], "aG": [1, 5], "": [1], "<s>GA": [1, 5, 3]}.items():
        assert ours.tok_encode(text) == theirs.tok_encode(text) == ids
    pairs = [("ACGT", "TT"), ("", "GATTACA"), ("<s>CC", "GG"), ("aC", "Ga")]
    for name, requests in (
        ("loglikelihood", asked(*pairs)),
        ("loglikelihood_rolling", asked(*[(said,) for _, said in pairs])),
    ):
        found, expected = (getattr(x, name)(requests, disable_tqdm=True) for x in bases)
        firsts = lambda rows: [row[0] if isinstance(row, tuple) else row for row in rows]
        assert firsts(found) == pytest.approx(firsts(expected), rel=1e-4, abs=1e-3)
    how = {"until": ["zzz"], "max_gen_toks": 6, "do_sample": False}
    requests = asked(*[(context or "A", how) for context, _ in pairs])
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


def test_what_is_written_ends_as_in_its_own_backend(begun):
    ours, theirs = begun
    how = {"until": ["zzz"], "max_gen_toks": 12, "do_sample": False}
    requests = asked(*[(context or "A", how) for context, _ in BEGUN[:3]])
    assert ours.generate_until(requests) == theirs.generate_until(requests, disable_tqdm=True)


def test_a_conversation_is_rendered_as_in_its_own_backend(begun):
    ours, theirs = begun
    said = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for turns, prompt in ((said[:1], True), (said, False)):
        found = ours.apply_chat_template(turns, add_generation_prompt=prompt)
        assert found == theirs.apply_chat_template(turns, add_generation_prompt=prompt)


def test_a_batch_of_any_size_says_the_same(folder, both):
    alone = harness.Model(opened(folder), batch_size=1)
    alone.scorer.width = 48
    found = both[0].loglikelihood(asked(*PAIRS[:4]), disable_tqdm=True)
    for (one, _), (other, _) in zip(
        alone.loglikelihood(asked(*PAIRS[:4]), disable_tqdm=True), found, strict=True
    ):
        assert one == pytest.approx(other, abs=1e-4)


def tasks(home):
    """A folder with two tasks: choices, and answers that are written."""
    rows = [
        dict(question=f"{i} and", choices=[" one", " two"], label=i % 2, answer="x")
        for i in range(4)
    ]
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, kind, rest in (
        ("chooses", "multiple_choice", CHOICE),
        ("writes", "generate_until", WRITE),
    ):
        text = YAML.format(name=name, kind=kind, file=home / "rows.jsonl") + rest
        (home / f"{name}.yaml").write_text(text)
    return home


@pytest.mark.parametrize(
    "name", ["clm", "mlm", pytest.param("span_corruption", marks=pytest.mark.slow)]
)
def test_tasks_of_a_folder_run_on_decoders_and_encoders(tmp_path, name):
    words = ["--config.total=2", "--config.log_every=2", "--config.ledger=()"]
    train.run(configs.load(f"{ROOT}/configs/{name}.py:variant=tiny", words), tmp_path / "run")
    asks = ("chooses", "writes") if name != "mlm" else ("chooses",)
    words = [f"--config.folder={tmp_path / 'run'}", f"--config.include={tasks(tmp_path)}"]
    words += [f"--config.tasks={asks}", "--config.batch_size=4"]
    harness.run(configs.load(f"{ROOT}/configs/harness.py", words), tmp_path)
    (line,) = (tmp_path / "run" / harness.FILE).read_text().splitlines()
    results = json.loads(line)["results"]
    assert results.keys() == set(asks)
    assert 0 <= results["chooses"]["acc,none"] <= 1


def test_an_unknown_task_is_named(tmp_path, folder):
    from fmjax.errors import ConfigError

    words = [f"--config.folder={folder}", f"--config.include={tasks(tmp_path)}"]
    config = configs.load(f"{ROOT}/configs/harness.py", [*words, "--config.tasks=('choses',)"])
    with pytest.raises(ConfigError, match="no 'choses'.*chooses, writes"):
        harness.run(config, tmp_path)


@pytest.mark.slow
def test_conversations_are_put_into_the_template_of_the_run(tmp_path, monkeypatch):
    words = ["--config.total=2", "--config.log_every=2", "--config.ledger=()"]
    train.run(configs.load(f"{ROOT}/configs/clm.py:tiny", words), tmp_path / "clm")
    words += [f"--config.init={tmp_path / 'clm'}", "--config.data.max_documents=200"]
    train.run(configs.load(f"{ROOT}/configs/instruct.py", words), tmp_path / "run")
    model = harness.Model(opened(tmp_path / "run"))
    said = [{"role": "user", "content": "What is it?"}]
    reader = chat.fitting(model.opened.tokenizer, model.tokenizer, "plain", "")[2]
    assert model.tok_encode(model.apply_chat_template(said)) == reader.opening(said)
    words = [f"--config.folder={tmp_path / 'run'}", f"--config.include={tasks(tmp_path)}"]
    words += ["--config.tasks=('writes',)", "--config.chat=True", "--config.batch_size=4"]
    read, each = [], text_generator.TextGenerator.each
    monkeypatch.setattr(
        text_generator.TextGenerator,
        "each",
        lambda self, ids, *how: read.extend(ids) or each(self, ids, *how),
    )
    harness.run(configs.load(f"{ROOT}/configs/harness.py", words), tmp_path)
    (line,) = (tmp_path / "run" / harness.FILE).read_text().splitlines()
    assert json.loads(line)["results"]["writes"]["exact_match,none"] == 0
    asked = [[{"role": "user", "content": f"{i} and"}] for i in range(4)]
    assert sorted(read) == sorted(reader.opening(messages) for messages in asked)
