"""evaluate, fill_mask, export and config.init, on one tiny run and what is exported of it."""

import html
import json
import random
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from common import CACHE, ROOT
from safetensors import SafetensorError

from fmjax import convert, objectives
from fmjax.adapters import prompt
from fmjax.checkpoints import checkpointer, pretrained
from fmjax.config import load as configs
from fmjax.convert import writer
from fmjax.data.texts import TextDataset
from fmjax.data.tokenizer import load as load_tokenizer
from fmjax.errors import CheckpointError, ConfigError, DataError
from fmjax.evaluation import export_check, fill_in
from fmjax.models import bert, param_init
from fmjax.params import paths, sharding
from fmjax.reports import run_report
from fmjax.tasks import evaluate, export, fill_mask, train
from fmjax.training import initialize, setup

WORDS = "the a value name of is returned by function class list when given and not call".split()
# A head that transformers has no class for.
SIZES = dict(width=32, depth=3, heads=2, mlp=64, max_len=48, classes={"sop": 2})
LEFT_OUT = ("head/pooler/bias", "head/pooler/kernel", "head/sop/bias", "head/sop/kernel")


def load(name, *words, **values):
    overrides = [f"--config.{key}={value}" for key, value in values.items()]
    return configs.load(str(ROOT / "configs" / f"{name}.py"), [*overrides, *words])


def write_text(path, documents, seed):
    rng = random.Random(seed)
    text = "\n\n".join(" ".join(rng.choices(WORDS, k=20)) + "." for _ in range(documents))
    path.write_text(text + "\n")
    return path


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMJAX_CACHE", str(CACHE))
        yield tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def folder(tmp):
    """A run of four steps that keeps the second and averages its parameters."""
    config = load(
        "mlm",
        "--config.data.name=text",
        "--config.data.validation_fraction=0.2",
        "--config.data.seq_len=32",
        f"--config.data.train={write_text(tmp / 'train.txt', 200, 0)}",
        "--config.tokenizer.vocab_size=128",
        "--config.model.variant=tiny",
        "--config.optim.ema=0.5",
        total=4, batch_size=16, log_every=4, eval_every=4, save_every=2, tensorboard=False,
    )  # fmt: skip
    with config.unlocked():
        config.model.update(SIZES)
    train.run(config, tmp / "run")
    return tmp / "run"


@pytest.fixture(scope="module")
def exported(tmp, folder):
    export.run(load("export", folder=folder, output=tmp / "hf"), tmp)
    return tmp / "hf"


@pytest.fixture(scope="module")
def opened(folder):
    return pretrained.open_folder(str(folder), sharding.make_mesh())


def records(path):
    return [json.loads(line) for line in (path / "evaluation.jsonl").read_text().splitlines()]


def assert_same(one, other):
    one, other = paths.unstack(one), paths.unstack(other)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


# ---- open_folder ----


def test_a_run_folder_opens_with_its_newest_average(folder, opened):
    saved, _, averaged = checkpointer.load_params(folder)
    assert averaged
    assert_same(opened.params, saved)
    assert (opened.step, opened.config.total, opened.tokenizer) == (4, 4, folder / "tokenizer")
    assert opened.model.stacks == (3,)
    assert str(opened) == f"{folder} at step 4 (averaged parameters)"


def test_the_tasks_take_the_step_that_is_asked_for(folder, exported, tmp, capsys):
    evaluate.run(load("evaluate", folder=folder, step=2), tmp, dry_run=True)
    fill_mask.run(load("fill_mask", folder=folder, step=2, text="[MASK]"), tmp)
    export.run(load("export", folder=folder, step=2), tmp, dry_run=True)
    assert capsys.readouterr().out.count(f"{folder} at step 2 (averaged parameters)") == 3
    mesh = sharding.make_mesh()
    params = pretrained.open_folder(str(folder), mesh, step=2).params
    assert_same(params, checkpointer.load_params(folder, 2)[0])
    with pytest.raises(CheckpointError, match="no finished step 3. There are: 2, 4."):
        pretrained.open_folder(str(folder), mesh, step=3)
    with pytest.raises(ConfigError, match="config.step=4, but config.folder='.*' is not the fold"):
        pretrained.open_folder(str(exported), mesh, step=4)


def test_process_0_alone_prints(exported, opened, tmp, capsys, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    fill_mask.run(load("fill_mask", folder=exported, text="[MASK]"), tmp)
    target(exported)
    monkeypatch.setattr(pretrained, "open_folder", lambda *args, **kwargs: opened)
    export.run(load("export", folder=opened.source), tmp, dry_run=True)
    assert capsys.readouterr().out == ""


def test_an_exported_folder_opens_with_the_same_parameters(exported, opened):
    again = pretrained.open_folder(str(exported), sharding.make_mesh(fsdp=2), "bfloat16")
    kept = {n: x for n, x in paths.unstack(opened.params).items() if n not in LEFT_OUT}
    assert_same(again.params, paths.unflatten(kept))
    assert (again.missing, again.config, again.step) == ((), None, None)
    assert again.model.cfg.dtype == "bfloat16"


@pytest.mark.parametrize(
    "source, error, said",
    [
        ("", ConfigError, "config.folder is empty"),
        ("nowhere/at/all", ConfigError, "neither a folder nor an id"),
        ("{tmp}/no_config", CheckpointError, "config.json cannot be read"),
        ("{tmp}/code", CheckpointError, "config.json cannot be read"),
        ("{tmp}/empty", ConfigError, "has no tokenizer"),
    ],
)
def test_what_is_no_folder_of_a_model_is_refused(tmp, source, error, said):
    for name in ("no_config", "code"):
        (tmp / name / "checkpoints").mkdir(parents=True, exist_ok=True)
    # A config of ours is read as data: one that is code is not looked at.
    (tmp / "code" / "config.py").write_text("raise SystemExit('executed')")
    (tmp / "empty").mkdir(exist_ok=True)
    with pytest.raises(error, match=said):
        pretrained.open_folder(source.format(tmp=tmp), sharding.make_mesh())


# ---- evaluate ----


def test_evaluation_gives_the_number_of_training(folder, tmp, capsys):
    evaluate.run(load("evaluate", folder=folder), tmp / "unused")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = next(line for line in lines if "validation/loss" in line)
    found = records(folder)[-1]
    assert found["step"] == 4 and found["split"] == "validation" and found["precision"] == "float32"
    for name, value in found["metrics"].items():
        assert value == pytest.approx(trained[f"validation/{name}"], rel=1e-6), name
    assert "mlm/perplexity" in found["metrics"]
    assert not (tmp / "unused").exists()
    out = capsys.readouterr().out
    assert f"{folder} at step 4 (averaged parameters): validation of " in out
    assert found["averaged"] is True and "  mlm/accuracy " in out


def test_an_exported_folder_evaluates_to_the_same_number(folder, exported, tmp):
    """Its data, tokenizer and objectives come from the command line and the folder."""
    given = folder.parent / "train.txt"
    words = [f"--config.data.train={given}", "--config.data.validation_fraction=0.2"]
    words += ["--config.data.seq_len=32", "--config.batch_size=16"]
    evaluate.run(load("evaluate", folder=folder), tmp / "unused")
    evaluate.run(load("evaluate", *words, folder=exported), tmp / "evaluation")
    assert not (exported / "evaluation.jsonl").exists()
    found, run = records(tmp / "evaluation")[-1], records(folder)[-1]
    assert found["step"] is None
    assert found["metrics"] == pytest.approx(run["metrics"], rel=1e-6)


def test_other_data_replace_those_of_the_run(folder, tmp):
    other = write_text(tmp / "other.txt", 30, 1)
    words = [f"--config.data.train={other}", "--config.data.validation_fraction=0"]
    words += ["--config.split=train", "--config.limit=1"]
    config = load("evaluate", *words, folder=folder)
    evaluate.run(config, tmp)
    found = records(folder)[-1]
    assert found["rows"] == 16 and found["data"]["train"] == str(other)
    assert found["data"]["name"] == "pydocs" and found["data"]["seq_len"] == 32
    with pytest.raises(DataError, match="no rows for config.split='validation'"):
        evaluate.run(load("evaluate", *words[:2], folder=folder), tmp)
    with pytest.raises(ConfigError, match="seq_len=64 is longer than the 48 positions"):
        evaluate.run(load("evaluate", "--config.data.seq_len=64", folder=folder), tmp)


def test_a_dry_run_measures_nothing(folder, tmp, capsys):
    written = folder / "evaluation.jsonl"
    before = written.read_text() if written.exists() else None
    evaluate.run(load("evaluate", folder=folder), tmp, dry_run=True)
    assert (written.read_text() if written.exists() else None) == before
    assert "rows of 32 tokens, float32" in capsys.readouterr().out


@pytest.fixture(scope="module")
def released(tmp, folder):
    """A BertForPreTraining's folder."""
    model = bert.Model("tiny", **{**SIZES, "vocab_size": 92, "classes": {"nsp": 2}})
    params = param_init.init_params(model, jax.random.key(0))
    convert.export(tmp / "released", model, params, folder / "tokenizer")
    return tmp / "released"


def test_next_sentence_prediction_of_a_folder_that_has_it(folder, released, tmp):
    words = [f"--config.data.train={folder.parent / 'train.txt'}", "--config.data.seq_len=32"]
    words += ["--config.data.format=pairs", "--config.limit=2", "--config.batch_size=16"]
    words += ["--config.objectives={'nsp': {}, 'mlm': {}}"]
    evaluate.run(load("evaluate", *words, folder=released), tmp)
    found = records(tmp)[-1]["metrics"]
    assert found["nsp/loss"] == pytest.approx(np.log(2), abs=0.1)
    assert 0 <= found["nsp/accuracy"] <= 1
    fill_mask.run(load("fill_mask", folder=released, text="the [MASK]"), tmp)
    head = target(released, classes={"nsp": 2})["head/nsp/kernel"]
    opened = pretrained.open_folder(str(released), sharding.make_mesh())
    np.testing.assert_array_equal(head, opened.params["head"]["nsp"]["kernel"])
    with pytest.raises(ConfigError, match="objectives.nsp cannot use .* made for 'sop'"):
        evaluate.run(load("evaluate", *words, "--config.data.pair=sop", folder=released), tmp)


@pytest.mark.parametrize(
    "name, target",
    [("nsp", "sop"), ("sop", "nsp"), ("nsp", ""), ("nsp", "classes"), ("classify", "values")],
)
def test_labels_of_another_kind_are_refused(name, target):
    pairs = name in ("nsp", "sop")
    said = "pairs and config.data.pair=" + name if pairs else "classes"
    with pytest.raises(
        ConfigError, match=f"objectives.{name} cannot use .* config.data.format={said}"
    ):
        objectives.build({name: {}}, dict(target=target))


# ---- fill_mask ----


def test_fill_mask_prints_a_table_for_each_sentence(folder, tmp, capsys):
    text = "the [MASK] of a function\n\nis [MASK] by a [MASK]"
    fill_mask.run(load("fill_mask", folder=folder, text=text, top_k=3), tmp)
    out = capsys.readouterr().out.splitlines()
    first, second = out.index("the [MASK] of a function"), out.index("is [MASK] by a [MASK]")
    rows, more = out[first + 1 : first + 4], out[second + 1 : second + 7]
    assert rows[0].startswith("  [MASK]  ") and rows[1].startswith("          ")
    assert more[0].startswith("  [MASK] 1  ") and more[3].startswith("  [MASK] 2  ")
    for block in (rows, more):
        assert len({len(line) for line in block}) == 1 and all(x.endswith("%") for x in block)
    chances = [float(line.split()[-1].rstrip("%")) for line in rows]
    assert chances == sorted(chances, reverse=True) and 0 < chances[0] < 100


@pytest.mark.parametrize(
    "text, said",
    [
        ("", r"config.text is empty.*The \[MASK\] of"),
        ("the value <mask>", r"has no mask: write \[MASK\]"),
        ("[MASK]\nthe value", "'the value' has no mask"),
        ("[MASK] " + "value " * 50, "a sentence of 53 tokens, the model takes 48"),
    ],
)
def test_fill_mask_refuses(folder, tmp, text, said):
    with pytest.raises(ConfigError, match=said):
        fill_mask.run(load("fill_mask", folder=folder, text=text), tmp)


def test_guesses_are_those_of_torch(exported):
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    from transformers import BertForMaskedLM

    opened = pretrained.open_folder(str(exported), sharding.make_mesh())
    tokenizer = load_tokenizer(exported)
    sentences = ["the [MASK] of a function", "is [MASK] by a [MASK] when given"]
    rows = fill_in.encode(sentences, tokenizer, 48)
    found = fill_in.guesses(opened, tokenizer, rows, 5)
    reference = BertForMaskedLM.from_pretrained(exported).eval()
    for sentence, masks in zip(sentences, found, strict=True):
        inputs = tokenizer(sentence, return_tensors="pt")
        with torch.no_grad():
            logits = reference(**inputs).logits[0]
        best = logits[inputs["input_ids"][0] == tokenizer.mask_token_id].softmax(-1).topk(5)
        assert [[guess.id for guess in mask] for mask in masks] == best.indices.tolist()
        ours = [[guess.probability for guess in mask] for mask in masks]
        np.testing.assert_allclose(ours, best.values, rtol=1e-5)


def test_guesses_behind_a_prompt_of_words_are_those_of_the_words_in_front(exported):
    opened = pretrained.open_folder(str(exported), sharding.make_mesh())
    tokenizer = load_tokenizer(exported)
    (row,) = fill_in.encode(["is [MASK] by a function"], tokenizer, 40)
    words = [7, 8, 9]
    model = prompt.wrap(opened.model, length=len(words))
    flat = paths.flatten(model.add(opened.params, jax.random.key(0)))
    table = flat[f"{prompt.TABLE}/embedding"]
    params = paths.unflatten(flat | {f"{prompt.TABLE}/prompt_tokens": table[np.array(words)]})
    ((found,),) = fill_in.guesses(opened._replace(model=model, params=params), tokenizer, [row], 5)
    longer = {"input_ids": words + row["input_ids"], "token_types": [0, 0, 0, *row["token_types"]]}
    ((wanted,),) = fill_in.guesses(opened, tokenizer, [longer], 5)
    assert [guess.id for guess in found] == [guess.id for guess in wanted]
    near = [guess.probability for guess in wanted]
    np.testing.assert_allclose([guess.probability for guess in found], near, rtol=1e-4)


def test_a_folder_without_the_head_is_refused(tmp, exported, opened):
    bare = shutil.copytree(exported, tmp / "bare")
    from safetensors.numpy import load_file, save_file

    tensors = load_file(bare / "model.safetensors")
    trunk = {key: value for key, value in tensors.items() if not key.startswith("cls.")}
    save_file(trunk, bare / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="no trained head 'mlm': its predictions would be random"):
        fill_mask.run(load("fill_mask", folder=bare, text="[MASK]"), tmp)


def test_readable_tokens():
    pieces = {0: "##ing", 1: " the", 2: "\n", 3: ""}
    tokenizer = SimpleNamespace(
        decode=lambda ids: pieces[ids[0]],
        convert_ids_to_tokens=lambda i: {2: "Ċ", 3: None}[i],
    )
    found = [fill_in._readable(tokenizer, i) for i in pieces]
    assert found == ["##ing", "the", r"'\u010a'", "None"]


# ---- export ----


def test_export_says_what_it_wrote(folder, tmp, capsys):
    export.run(load("export", folder=folder), tmp, dry_run=True)
    assert not (folder / "export").exists()
    export.run(load("export", folder=folder), tmp)
    out = capsys.readouterr().out
    names = {path.name for path in (folder / "export").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert (
        "equal to the run's parameters bit by bit" in out
        and "beside the rest: head/pooler, head/sop" in out
    )
    with pytest.raises(ConfigError, match="is not empty"):
        export.run(load("export", folder=folder), tmp)
    with pytest.raises(ConfigError, match="in Hugging Face format already"):
        export.run(load("export", folder=folder / "export"), tmp)


def test_an_export_that_fails_midway_leaves_no_folder(folder, tmp, monkeypatch):
    output = tmp / "midway" / "out"

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(writer, "save_file", full)
        with pytest.raises(CheckpointError, match="midway/out cannot .*No space.* config.output"):
            export.run(load("export", folder=folder, output=output), tmp)
    assert not output.exists()
    with monkeypatch.context() as patch:
        patch.setattr(export_check, "_same_bits", lambda one, other: False)
        with pytest.raises(CheckpointError, match="reads back differently"):
            export.run(load("export", folder=folder, output=output), tmp)
    assert not output.exists()


def test_export_notices_one_flipped_bit(exported, opened, tmp):
    damaged = shutil.copytree(exported, tmp / "damaged")
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    abstract = param_init.abstract_params(opened.model, sharding.make_mesh())
    export_check.check(exported, opened, LEFT_OUT, abstract)
    with pytest.raises(CheckpointError, match="reads back differently"):
        export_check.check(damaged, opened, LEFT_OUT, abstract)


# ---- config.init ----


def target(init, groups=((".*", "train"),), **changes):
    """(initial parameters, model) as `train.setup` and `begin.states` make them."""
    model = bert.Model("tiny", **{**SIZES, "vocab_size": 92, "dropout": 0.0, **changes})
    model, _ = setup.grouped(model, groups, {"decay": ".*"}, {})
    config = SimpleNamespace(init=str(init), new_head=False, seed=0)
    abstract = param_init.abstract_params(model, sharding.make_mesh(fsdp=2))
    params = initialize.initial(config, model, abstract).params
    for leaf, like in zip(jax.tree.leaves(params), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (like.shape, like.dtype, like.sharding)
    return paths.unstack(params)


def test_starting_from_a_run_gives_its_parameters_in_any_stacks(folder, opened, capsys):
    freeze = ((r"block_00/.*|embed/.*", "freeze"), (".*", "train"))
    for found in (target(folder), target(folder, freeze), target(folder, scan=False)):
        assert_same(paths.unflatten(found), opened.params)
    said = f"starting from step 4 of {folder} (averaged parameters): every parameter loaded"
    assert said in capsys.readouterr().out


def test_starting_with_a_head_that_the_run_lacks(folder, opened, capsys):
    found = target(folder, classes={"nsp": 2, "sop": 2})
    assert "newly initialised: head/nsp/bias, head/nsp/kernel" in capsys.readouterr().out
    assert np.std(found.pop("head/nsp/kernel")) == pytest.approx(0.02, rel=0.5)
    assert not np.any(found.pop("head/nsp/bias"))
    assert_same(paths.unflatten(found), opened.params)


def test_starting_from_an_exported_folder(exported, opened):
    found, same = target(exported), paths.unstack(opened.params)
    assert found.keys() == same.keys()
    for name in found.keys() - set(LEFT_OUT):
        np.testing.assert_array_equal(found[name], same[name], err_msg=name)


def test_starting_with_another_tokenizer_is_refused(folder, exported, tmp):
    """Of the same size it would otherwise go unnoticed."""
    made_by = lambda tokenizer: TextDataset({}, "", "", {}, tokenizer_dir=tokenizer)
    other = shutil.copytree(folder / "tokenizer", tmp / "tokenizer")
    text = (other / "tokenizer.json").read_text().replace('"value"', '"eulav"')
    (other / "tokenizer.json").write_text(text)
    for init, right in ((folder, folder / "tokenizer"), (exported, exported)):
        config = SimpleNamespace(init=str(init))
        initialize.check_processors(config, made_by(folder / "tokenizer"))
        with pytest.raises(ConfigError, match=f"--config.tokenizer.name={right}$"):
            initialize.check_processors(config, made_by(other))
    initialize.check_processors(SimpleNamespace(init=""), made_by(other))


def test_starting_from_a_run_of_another_shape_is_refused(folder):
    said = r"float32\[32, 128\] in the model, float32\[32, 64\]"
    with pytest.raises(CheckpointError, match=said):
        target(folder, mlp=128)
    with pytest.raises(CheckpointError, match=r"block_03/.*nothing in the checkpoint"):
        target(folder, depth=4)


# ---- commands ----


def test_a_run_whose_tokenizer_has_changed_is_refused(folder, tmp):
    """Ids of another tokenizer stand for other words: whoever reads the run is told."""
    run = tmp / "changed"
    shutil.copytree(folder, run)
    pretrained.open_folder(str(run), sharding.make_mesh())
    options = run / "tokenizer" / "tokenizer_config.json"
    before = options.read_text()
    options.write_text(before.replace("[MASK]", "[SEP]"))
    refused = pytest.raises(CheckpointError, match="tokenizer_config.json is not what it was")
    with refused:
        pretrained.open_folder(str(run), sharding.make_mesh())
    with refused:
        initialize.resolved(load("mlm", "--config.tokenizer.name=init", init=run))
    with refused:
        train.run(configs.load(str(run / "config.json")), run)
    options.write_text(before)
    (run / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")  # one file more
    with pytest.raises(CheckpointError, match="chat_template.jinja is not what it was"):
        pretrained.open_folder(str(run), sharding.make_mesh())


def test_the_commands_of_the_report_are_understood(folder):
    """Each loads its config; what they then do is tested above."""
    page = html.unescape(run_report.write(folder).read_text(encoding="utf-8"))
    for name in ("evaluate", "fill_mask", "export"):
        command = re.search(rf"run\.py --config=configs/{name}\.py (--[^<]*)", page)
        assert load(name, *shlex.split(command[1])).folder == str(folder)


def test_run_py_runs_a_task(folder):
    words = ["--config=configs/fill_mask.py", f"--config.folder={folder}", "--config.text=a value"]
    done = subprocess.run(
        [sys.executable, "run.py", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[-1].startswith("error: config.text='a value' has no mask")
