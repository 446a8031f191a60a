"""What others made: weights, tokenizers, datasets and archives are data, bounded, and stay inside.

Beside these: code next to a tokenizer and next to a dataset is not run (data/test_tokenizer.py,
data/test_hub.py), misshapen weights are refused (convert/test_convert.py), a gzip bomb in one line
(data/test_files.py).
"""

import fnmatch
import gzip
import json
import os
import resource
import shutil
import struct
import tarfile
import tracemalloc
import zipfile

import huggingface_hub
import jax
import jinja2
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tiny
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fmjax import convert, data
from fmjax.checkpoints import pretrained
from fmjax.convert import files as weights
from fmjax.data import files, hub, lines, records, tokenizer
from fmjax.data.settings import DataSettings
from fmjax.errors import CheckpointError, ConfigError, DataError
from fmjax.io import snapshot
from fmjax.models import bert, param_init
from fmjax.params import sharding

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Weights in formats that can hold code: pickles, numpy's objects, Keras' lambdas.
CODE = "bin ckpt h5 joblib msgpack npy npz pickle pkl pt pth".split()
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder in Hugging Face format: tiny weights, and a tokenizer of five words."""
    folder = tmp_path_factory.mktemp("made") / "hf"
    vocab = {token: i for i, token in enumerate([*SPECIAL, *"abcde"])}
    words = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL}
    source = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(source)
    model = bert.Model("tiny", **tiny.SIZES)
    convert.export(folder, model, param_init.init_params(model, jax.random.key(0)), source)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(made, tmp_path / "hf")


@pytest.fixture
def marker(tmp_path):
    """A file that only executed code would make."""
    marker = tmp_path / "executed"
    yield marker
    assert not marker.exists()


def pickled(marker) -> bytes:
    """What `pickle.loads` would answer by making the file: protocol 0, written by hand."""
    return f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def opened(folder):
    return pretrained.open_folder(str(folder), sharding.make_mesh())


# ---- code ----------------------------------------------------------------------------------


def test_no_python_file_of_a_folder_is_executed(folder, marker, monkeypatch):
    """Not even where every custom-code mechanism of transformers points to it."""
    monkeypatch.chdir(folder)
    for name in ("config", "modeling_bert", "tokenization_bert", "__init__", "sitecustomize"):
        (folder / f"{name}.py").write_text(f"open({str(marker)!r}, 'w')\nclass X: pass\n")
    classes = {"AutoConfig": "config.X", "AutoModelForMaskedLM": "modeling_bert.X"}
    edit(folder / "config.json", auto_map=classes, _name_or_path="evil/evil")
    auto = {"AutoTokenizer": ["tokenization_bert.X", "tokenization_bert.X"]}
    edit(folder / "tokenizer_config.json", auto_map=auto)
    assert opened(folder).model.cfg.width == 32
    assert tokenizer.load(folder)("a b")["input_ids"] == [5, 6]


def test_a_chat_template_is_not_even_parsed_on_load(folder, monkeypatch):
    def parse(*args, **kwargs):
        raise AssertionError("a template was looked at")

    monkeypatch.setattr(jinja2.Environment, "compile", parse)
    endless = "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(endless)
    edit(folder / "tokenizer_config.json", chat_template=endless)
    assert tokenizer.load(folder).chat_template == endless


@pytest.mark.parametrize("name", ["../../evil", "{tmp}/evil", "a/../../../evil"])
def test_a_chat_template_is_not_saved_where_its_name_points(folder, tmp_path, name):
    """In older transformers the names of templates became names of files."""
    name = name.format(tmp=tmp_path)
    templates = [{"name": "default", "template": "x"}, {"name": name, "template": "evil"}]
    edit(folder / "tokenizer_config.json", chat_template=templates)
    with pytest.raises(ConfigError, match="config.tokenizer.name=.* cannot be saved"):
        data.prepare({"cache": str(tmp_path / "cache")}, {"name": str(folder)})
    assert list(tmp_path.rglob("*evil*")) == []


@pytest.mark.parametrize("kind", CODE)
def test_formats_that_can_hold_code_are_refused(folder, marker, kind):
    (folder / "model.safetensors").unlink()
    (folder / f"pytorch_model.{kind}").write_bytes(pickled(marker))
    with pytest.raises(CheckpointError, match=rf"pytorch_model\.{kind}.*save_pretrained"):
        opened(folder)


def test_a_pickle_under_another_name_is_no_pickle(folder, marker):
    (folder / "model.safetensors").write_bytes(pickled(marker))
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        opened(folder)


# ---- safetensors ---------------------------------------------------------------------------


def tensors(header, data=b"\0" * 64, size=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(shape=(16,), start=0, stop=64, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "content",
    {
        "empty": b"",
        "no header": b"\1\0\0\0",
        "2^63 bytes of header": tensors(b"{}", size=2**63),
        "2^64 - 1 bytes of header": tensors(b"{}", size=2**64 - 1),
        "200 MB of header": tensors(b"{}", size=200_000_000),
        "no JSON": tensors(b"\xff" * 10),
        "deep": tensors(b"[" * 100_000),
        "a list": tensors(b"[]"),
        "overlapping": tensors({"a": entry(), "b": entry((8,), 32, 64)}),
        "a gap": tensors({"a": entry((4,), 0, 16), "b": entry((8,), 32, 64)}),
        "negative": tensors({"a": entry(start=-64, stop=0)}),
        "backwards": tensors({"a": entry(start=64, stop=0)}),
        "beyond the end": tensors({"a": entry((2**40,), 0, 2**42)}),
        "overflow": tensors({"a": entry((2**62, 2**62), 0, 64)}),
        "negative shape": tensors({"a": entry((-16,))}),
        "unknown dtype": tensors({"a": entry(dtype="O")}),
        "shape and bytes differ": tensors({"a": entry((17,))}),
        "trailing bytes": tensors({"a": entry()}, b"\0" * 100),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_hostile_safetensors_header_is_refused_without_memory(folder, content):
    (folder / "model.safetensors").write_bytes(content[1])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read"):
        opened(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_weights_smaller_than_the_model_says_are_refused_without_memory(folder):
    """The config asks for 2 TB, in a file of kilobytes."""
    edit(folder / "config.json", hidden_size=2**24, num_hidden_layers=1000, vocab_size=2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError, match="does not fit the model"):
        opened(folder)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/x.safetensors", "..", "", "config.json",
     "pytorch_model.bin", "x.safetensors\n", "pipe.safetensors", "gone.safetensors", None, 5, []],
)  # fmt: skip
def test_an_index_names_files_of_its_folder_and_nothing_else(folder, name):
    save_file({"a": np.zeros(4, np.float32)}, folder.parent / "x.safetensors")
    (folder / "a").mkdir()
    save_file({"a": np.zeros(4, np.float32)}, folder / "a" / "x.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"x")
    os.mkfifo(folder / "pipe.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": name}}))
    with pytest.raises(CheckpointError, match="index.json"), weights.open_folder(folder):
        pass


@pytest.mark.parametrize("content", ["[" * 10**5, "{", "[]", '{"weight_map": 3}', "\xff"])
def test_a_damaged_index(folder, content):
    (folder / "model.safetensors.index.json").write_bytes(content.encode("latin1"))
    with pytest.raises(CheckpointError, match="index.json is damaged"):
        opened(folder)


# ---- config.json ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["hidden_size", "num_hidden_layers", "hidden_act", "layer_norm_eps"]
)
def test_options_of_a_model_that_cannot_be(folder, key):
    whole = ["x", -1, None, [], {}, True, float("nan"), float("inf"), "\ud800", -(10**30)]
    for value in whole if key == "layer_norm_eps" else [*whole, 0.5, 2**40, 10**30, "gelu_x"]:
        edit(folder / "config.json", **{key: value})
        with pytest.raises(ConfigError, match="hf"):
            convert.describe(folder)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "3", "null", "[" * 10**5, '{"model_type": []}', '{"model_type": {"bert": 1}}',
     '{"model_type": "..bert"}', '{"model_type": "os"}', '{"model_type": "__init__"}', "\xff\xfe"],
)  # fmt: skip
def test_a_config_that_names_no_model(folder, content):
    (folder / "config.json").write_bytes(content.encode("latin1"))
    with pytest.raises(ConfigError, match="model_type"):
        opened(folder)


def test_a_text_that_is_too_large_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(snapshot, "MAX_JSON_BYTES", 100)
    with pytest.raises(ConfigError, match="the limit is 100"):
        opened(folder)


# ---- links ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "extra", "sub/x"])
@pytest.mark.parametrize("door", [opened, tokenizer.load, snapshot.find])
def test_a_link_that_leads_out_is_refused(folder, tmp_path, name, door):
    """Else an export would publish what it leads to."""
    private = tmp_path / "private"
    private.write_text("secret")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(os.path.relpath(private, (folder / name).parent))
    with pytest.raises(CheckpointError, match="is a link to .*private, outside of its folder"):
        door(folder)


def test_links_to_folders_loops_and_pipes_are_refused(folder, tmp_path):
    (folder / "inside.txt").symlink_to("config.json")
    assert snapshot.find(folder) == folder
    for link, target in {"loop": "loop", "up": "..", "root": "/"}.items():
        (folder / link).symlink_to(target)
        if link != "loop":  # leads nowhere, hence not out
            with pytest.raises(CheckpointError, match="outside of its folder"):
                snapshot.find(folder)
        (folder / link).unlink()
    os.mkfifo(folder / "pipe.json")  # reading it would wait for ever
    with pytest.raises(CheckpointError, match="pipe.json is no plain file"):
        tokenizer.load(folder)


def test_the_links_of_the_hubs_own_cache_are_as_they_should_be(folder, tmp_path):
    place = tmp_path / "models--org--name" / "snapshots" / COMMIT
    blobs = tmp_path / "models--org--name" / "blobs"
    for path in (place, blobs):
        path.mkdir(parents=True)
    for number, path in enumerate(sorted(folder.iterdir())):
        shutil.copy(path, blobs / str(number))
        (place / path.name).symlink_to(f"../../blobs/{number}")
    assert opened(place).model.cfg.width == 32


# ---- tokenizers ----------------------------------------------------------------------------


def test_a_vocabulary_is_never_read_from_elsewhere(folder, tmp_path):
    """transformers opens the file that `vocab` names: its lines would be saved as tokens."""
    (tmp_path / "private").write_text("\n".join([*SPECIAL, "hunter2"]))
    (folder / "tokenizer.json").unlink()
    settings = {"tokenizer_class": "BertTokenizer", "vocab": str(tmp_path / "private")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"names files of its own as \['vocab'\]"):
        tokenizer.load(folder)


def test_ids_beyond_all_vocabularies_are_refused_before_tables_are_made(folder, tmp_path):
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["zzz"] = 2**32 - 1
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="4,294,967,296 ids, the limit is 16,777,216"):
        data.prepare({"cache": str(tmp_path / "cache")}, {"name": str(folder)})


@pytest.mark.parametrize(
    "name, content",
    [
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[" * 10**5),
        ("tokenizer.json", '{"model": {"type": "WordLevel", "vocab": {}, "unk_token": "x"}}'),
        ("tokenizer_config.json", "[" * 10**5),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"model_max_length": "x"}'),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
    ],
)
def test_a_damaged_tokenizer_is_an_error_that_names_it(folder, name, content):
    (folder / name).write_text(content)
    with pytest.raises(ConfigError, match="tokenizer of .*hf cannot be loaded"):
        tokenizer.load(folder)


def test_only_named_kinds_of_files_are_exported_with_a_tokenizer(folder, tmp_path, marker):
    (folder / "tokenizer.py").write_text(f"open({str(marker)!r}, 'w')")
    found = opened(folder)
    convert.export(tmp_path / "out", found.model, found.params, folder)
    assert not list((tmp_path / "out").glob("*.py"))


# ---- the hub -------------------------------------------------------------------------------


@pytest.fixture
def downloads(folder, monkeypatch):
    """The calls that would have gone to the hub: (id, revision, patterns)."""
    calls = []

    def download(name, revision, allow_patterns):
        calls.append((name, revision, allow_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return calls


def test_only_weights_and_texts_are_fetched(downloads):
    snapshot.find("org/name", COMMIT)
    tokenizer.load("org/name", COMMIT)
    (name, revision, of_model), (_, _, of_tokenizer) = downloads
    assert (name, revision) == ("org/name", COMMIT)
    got = lambda file, patterns: any(fnmatch.fnmatch(file, pattern) for pattern in patterns)
    wanted = ["config.json", "tokenizer.json", "vocab.txt", "merges.txt", "spiece.model"]
    for file in wanted:
        assert got(file, of_model) and got(file, of_tokenizer), file
    assert got("model.safetensors", of_model) and not got("model.safetensors", of_tokenizer)
    code = ["modeling_x.py", "tokenizer.py", "config.py", "x.so", "x.sh", "x.ipynb", "x.zip"]
    for file in [*code, *(f"pytorch_model.{kind}" for kind in CODE)]:
        assert not got(file, of_model) and not got(file, of_tokenizer), file


@pytest.mark.parametrize("revision", ["", "main", "v1.0", COMMIT[:7], COMMIT.upper(), COMMIT + "0"])
def test_what_can_change_is_said(downloads, revision):
    for door in (snapshot.find, tokenizer.load):
        with pytest.warns(UserWarning, match="'org/name' is not pinned"):
            door("org/name", revision)


@pytest.mark.filterwarnings("error")
def test_a_commit_is_not_warned_of(downloads):
    for door in (snapshot.find, tokenizer.load):
        door("org/name", COMMIT)
        door(f"org/name@{COMMIT}")
    assert {revision for _, revision, _ in downloads} == {COMMIT}


@pytest.mark.parametrize(
    "name", ["a/../b", "https://x.y/z", "a b", "a\nb", "-x", "a/b/c", "org/name@../../x"]
)
def test_what_is_no_id_never_reaches_the_hub(downloads, name):
    with pytest.raises(ConfigError, match="neither a folder nor an id"):
        snapshot.find(name)
    assert downloads == []


def test_a_dataset_in_a_format_that_is_not_text_is_refused(tmp_path, marker, monkeypatch):
    """The reader of tar files decodes what lies in them, .pth among it."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    (tmp_path / "a.pth").write_bytes(pickled(marker))
    with tarfile.open(corpus / "train.tar", "w") as tar:
        tar.add(tmp_path / "a.pth", "a.pth")
    settings = DataSettings(name="hub", path=str(corpus))
    with pytest.raises(ConfigError, match="format 'webdataset', which is not one of arrow, csv"):
        list(hub.records(settings, "train"))


# ---- archives and bombs --------------------------------------------------------------------


def read(path, **settings):
    settings = DataSettings(name="text", train=str(path), on_bad_record="skip", **settings)
    return list(files.records(files.expand(str(path), "data.train"), settings, "data.train"))


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tgz", "x.7z", "x.jsonl.zst"])
def test_archives_are_not_unpacked(tmp_path, name):
    (tmp_path / "evil.txt").write_text("x")
    if name.endswith("zip"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.write(tmp_path / "evil.txt", "../outside.txt")
    else:
        with tarfile.open(tmp_path / name, "w:gz" if "gz" in name else "w") as archive:
            archive.add(tmp_path / "evil.txt", "../outside.txt")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="unknown ending"):
        read(tmp_path / name)
    assert sorted(tmp_path.rglob("*")) == before and not (tmp_path.parent / "outside.txt").exists()


@pytest.mark.parametrize("line", [b"x" * 4095 + b"\n", b"x"], ids=["lines", "one line"])
@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "a.csv.gz"])
def test_a_gzip_bomb_is_read_in_pieces_and_stopped(tmp_path, name, line):
    """200 kB that would unpack to 200 MB."""
    path = tmp_path / name
    # Many members, each of which is whole, read as one file: quicker to make than one large one.
    member = gzip.compress(line * (4_000_000 // len(line)))
    path.write_bytes(gzip.compress(b"text\n") + 50 * member)
    assert path.stat().st_size < 400_000
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="decompression bomb"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 8 * records.MAX_RECORD_BYTES
    finally:
        tracemalloc.stop()


@pytest.fixture
def memory(monkeypatch):
    """What pyarrow takes while it reads."""
    usual = pyarrow.default_memory_pool()
    pool = pyarrow.proxy_memory_pool(usual)
    opened = pyarrow.parquet.ParquetFile

    def measured(path):
        pyarrow.set_memory_pool(pool)
        return opened(path)

    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", measured)
    yield pool
    pyarrow.set_memory_pool(usual)


def test_a_parquet_page_that_unpacks_to_far_more_is_not_read(tmp_path, memory):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 10**8]}), path, compression="zstd")
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError, match="decompression bomb"):
        read(path)
    assert memory.max_memory() < 10**6


def test_a_text_that_parquet_stores_once_for_all_rows_is_stopped(tmp_path, memory, monkeypatch):
    monkeypatch.setattr(lines, "MAX_RECORD_BYTES", 10**6)
    text, rows = "x" * 500_000, pyarrow.array([0] * 2000, pyarrow.int32())
    column = pyarrow.DictionaryArray.from_arrays(rows, pyarrow.array([text]))
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"text": column}), path, compression="zstd", store_schema=False
    )
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError, match="decompression bomb"):
        read(path)
    assert memory.max_memory() < 100 * 10**6  # of 1 GB unpacked
