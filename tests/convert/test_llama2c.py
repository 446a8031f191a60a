"""Models of llama2.c: logits and tokens as run.c computes them, and as transformers does."""

import functools
import math
import os
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fmjax import build
from fmjax.checkpoints import pretrained
from fmjax.config import load as configs
from fmjax.convert import llama2c as files
from fmjax.data import tokenizer as tokenizers
from fmjax.errors import CheckpointError, ConfigError
from fmjax.generation import text_generator
from fmjax.params import sharding
from fmjax.tasks import llama2c

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
DATA = ROOT.parent / "shared" / "data"
STORIES = DATA / "stories260k"
needs_data = pytest.mark.skipif(not STORIES.is_dir(), reason="needs ../shared/data/stories260k")
# width, mlp, layers, heads, heads of keys and values, vocabulary, positions
SIZES = (16, 24, 2, 4, 2, 300, 12)


def model_bytes(sizes=SIZES, extra=0):
    """A file of random numbers; a negative vocabulary has an output of its own."""
    width, mlp, depth, heads, kv_heads, signed, positions = sizes
    keys, vocabulary = width // heads * kv_heads, abs(signed)
    layer = 2 * width + 2 * width * width + 2 * width * keys + 3 * width * mlp
    count = vocabulary * width * (1 + (signed < 0)) + depth * layer + width
    count += positions * width // heads
    numbers = np.random.default_rng(0).normal(0, 0.2, count + extra).astype(np.float32)
    return struct.pack("<7i", *sizes) + numbers.tobytes()


def vocabulary_bytes(tokens, longest=7):
    rows = (struct.pack("<fi", score, len(token)) + token for token, score in tokens)
    return struct.pack("<i", longest) + b"".join(rows)


def tokens(size=300):
    """As llama2.c lays them out: three special ones, 256 bytes, then by rising length."""
    found = [(b"<unk>", 0.0), (b"\n<s>\n", 0.0), (b"\n</s>\n", 0.0)]
    found += [(b"<0x%02X>" % i, 0.0) for i in range(256)]
    letters = [" ", *"abcdefgé"]
    more = [*letters, *(a + b for a in letters for b in letters[1:]), "abc", " abc", "dea"]
    return found + [(t.encode(), -float(i)) for i, t in enumerate(more[: size - 259])]


def converted(folder, file, vocabulary):
    words = [f"--config.{k}={v}" for k, v in dict(file=file, vocabulary=vocabulary).items()]
    words += [f"--config.output={folder / 'out'}"]
    llama2c.run(configs.load(str(ROOT / "configs" / "llama2c.py"), words), folder)
    return folder / "out"


@pytest.fixture(scope="module", params=["tied", "own", pytest.param("stories", marks=needs_data)])
def case(request, tmp_path_factory):
    """(content of the model's file, of the vocabulary's, folder that was made of them)."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "stories":
        file, vocabulary = STORIES / "stories260K.bin", STORIES / "tok512.bin"
    else:
        file, vocabulary = folder / "model.bin", folder / "tokens.bin"
        sizes = SIZES if request.param == "tied" else (*SIZES[:5], -SIZES[5], SIZES[6])
        file.write_bytes(model_bytes(sizes))
        vocabulary.write_bytes(vocabulary_bytes(tokens()))
    return file.read_bytes(), vocabulary.read_bytes(), converted(folder, file, vocabulary)


def reference(content, ids):
    """Logits [T, V] of one row as run.c has them, straight from its file, in float64."""
    width, mlp, depth, heads, kv_heads, signed, positions = struct.unpack_from("<7i", content)
    numbers, size = np.frombuffer(content, "<f4", offset=28).astype(np.float64), width // heads

    def take(*shape):
        nonlocal numbers
        first, numbers = numbers[: math.prod(shape)], numbers[math.prod(shape) :]
        return first.reshape(shape)

    keys = kv_heads * size
    table, attn_norm = take(abs(signed), width), take(depth, width)
    wq, wk, wv = take(depth, width, width), take(depth, keys, width), take(depth, keys, width)
    wo, mlp_norm = take(depth, width, width), take(depth, width)
    w1, w2, w3 = take(depth, mlp, width), take(depth, width, mlp), take(depth, mlp, width)
    norm, _ = take(width), take(positions, size)
    output = table if signed > 0 else take(abs(signed), width)
    assert not len(numbers)

    def rms(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * scale

    def turned(x):  # (T, N, H): features 2 i and 2 i + 1 by t / 10000^(2 i / H)
        angle = np.arange(len(x))[:, None] / 10000.0 ** (np.arange(0, size, 2) / size)
        z = (x[..., ::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)[:, None]
        return np.stack([z.real, z.imag], -1).reshape(x.shape)

    x, future = table[ids], np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
    for i in range(depth):
        h = rms(x, attn_norm[i])
        q, k, v = (h @ w[i].T for w in (wq, wk, wv))
        q, k = (turned(a.reshape(len(ids), -1, size)) for a in (q, k))
        k, v = (np.repeat(a.reshape(len(ids), -1, size), heads // kv_heads, 1) for a in (k, v))
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(size) + future
        p = np.exp(scores - scores.max(-1, keepdims=True))
        seen = np.einsum("nts,snh->tnh", p / p.sum(-1, keepdims=True), v)
        x = x + seen.reshape(len(ids), width) @ wo[i].T
        h = rms(x, mlp_norm[i])
        up = h @ w1[i].T
        x = x + (up / (1 + np.exp(-up)) * (h @ w3[i].T)) @ w2[i].T
    return rms(x, norm) @ output.T


def encoded(vocabulary, text):
    """The tokens of a text as run.c finds them: always the leftmost of the best pairs."""
    table, scores, offset = {}, [], 4
    while offset < len(vocabulary):
        score, length = struct.unpack_from("<fi", vocabulary, offset)
        table[vocabulary[offset + 8 : offset + 8 + length]] = len(scores)
        scores.append(score)
        offset += 8 + length
    names = {i: token for token, i in table.items()}
    ids = []
    for character in " " * bool(text) + text:
        whole = character.encode()
        ids += [table[whole]] if whole in table else [byte + 3 for byte in whole]
    while True:
        pairs = [table.get(names[a] + names[b]) for a, b in zip(ids, ids[1:], strict=False)]
        known = [i for i, pair in enumerate(pairs) if pair is not None]
        if not known:
            return ids
        best = max(known, key=lambda i: (scores[pairs[i]], -i))
        ids[best : best + 2] = [pairs[best]]


def row(vocabulary):
    """As many tokens of a text as all of the models have positions for."""
    return [files.BEGIN, *encoded(vocabulary, "a bed, a cab and a face")][: SIZES[-1]]


def ours(folder, ids):
    """Logits [T, V] of one row."""
    opened = pretrained.open_folder(str(folder), sharding.make_mesh())
    apply, rows = build.apply(opened.model), jnp.asarray(ids)[None]

    @jax.jit
    def logits(params, rows):
        ones, places = jnp.ones_like(rows), jnp.arange(rows.shape[1])[None]
        hidden = apply(params, rows, ones, places, jnp.zeros_like(rows), method="encode")
        return apply(params, hidden, method="logits")

    return np.asarray(logits(opened.params, rows)[0])


def check(logits, wanted):
    """Probabilities; logits too, unless they are so large (13 in the stories) that float32 itself
    has no 1e-5 to tell."""
    share = lambda x: np.exp(x) / np.exp(x).sum(-1, keepdims=True)
    np.testing.assert_allclose(share(logits), share(wanted), atol=1e-5, rtol=0)
    if np.abs(wanted).max() < 4:
        np.testing.assert_allclose(logits, wanted, atol=1e-5, rtol=0)


def test_logits_are_those_of_the_file(case):
    content, vocabulary, folder = case
    ids = row(vocabulary)
    check(ours(folder, ids), reference(content, ids))


def test_transformers_reads_the_same(case):
    torch = pytest.importorskip("torch", reason="torch, the reference, is not installed")
    transformers = pytest.importorskip("transformers")
    content, vocabulary, folder = case
    ids = row(vocabulary)
    model = transformers.LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        theirs = model(torch.tensor(ids)[None]).logits[0].numpy()
    check(theirs, reference(content, ids))
    assert model.generation_config.eos_token_id == model.config.bos_token_id == 1


# Not "\0", which ends a text in C.
ANY = st.characters(exclude_characters="\0", exclude_categories=("Cs",))
TEXTS = st.text("abcdefgé \n▁<s>/😀", max_size=30) | st.text(ANY, max_size=20)


@given(text=TEXTS)
@settings(max_examples=200, derandomize=True)
@example(text="")
@example(text="  a  abc\n")
@example(text="<s> <0x41>")
@example(text='Once upon a time, Lily\'s "dog" was naïve – 😀.')
def test_tokens_are_those_of_run_c(case, text):
    _, vocabulary, folder = case
    wanted, words = encoded(vocabulary, text), loaded(folder)
    assert words(text, add_special_tokens=False)["input_ids"] == wanted
    assert words(text)["input_ids"] == [files.BEGIN, *wanted]
    assert words.decode(wanted) == text
    assert tokenizers.encoder(folder).encode(text, add_special_tokens=False).ids == wanted


@functools.cache
def loaded(folder):
    """Opened once: each example of a property would read it again."""
    return tokenizers.load(folder)


@needs_data
@pytest.mark.parametrize("name, count, most", [("cased_sample.txt", 1, 4.5), ("valid.txt", 4, 20)])
def test_perplexity_of_stories_is_that_of_the_file(tmp_path, name, count, most):
    """It has learnt the first (3.66 on all of its validation), and not that all letters can be
    small; chance has 512."""
    file, vocabulary = STORIES / "stories260K.bin", STORIES / "tok512.bin"
    folder = converted(tmp_path, file, vocabulary)
    text = (DATA / "tinystories_slice" / name).read_text()
    stories = [story.strip() for story in text.split("<|endoftext|>")[:count]]
    rows = [loaded(folder)(story)["input_ids"][:256] for story in stories]

    def perplexity(logits_of):
        nats = []
        for row in rows:
            logits = logits_of(row).astype(np.float64)[:-1]
            target = logits[np.arange(len(logits)), row[1:]]
            nats += list(np.log(np.exp(logits).sum(-1)) - target)
        return math.exp(sum(nats) / len(nats))

    content = file.read_bytes()
    wanted = perplexity(functools.partial(reference, content))
    assert math.isclose(perplexity(functools.partial(ours, folder)), wanted, rel_tol=1e-4)
    assert 3 < wanted < most


@needs_data
@pytest.mark.slow
def test_the_story_is_the_published_one(tmp_path):
    """Token for token, as run.c wrote it: from nothing, the likeliest of each, 256 at most."""
    folder = converted(tmp_path, STORIES / "stories260K.bin", STORIES / "tok512.bin")
    _, _, rest = (STORIES / "stories260K.md").read_text().partition("-t 0.0\n")
    story = rest.partition("\n```")[0]
    mesh = sharding.make_mesh()
    with jax.set_mesh(mesh):
        author = text_generator.TextGenerator(pretrained.open_folder(str(folder), mesh))
        how = dict(prompt="", count=1, length=256, temperature=0)
        assert author.texts(how, 0)[0].strip() == story


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "has 0 bytes"),
        (model_bytes()[:27], "has 27 bytes"),
        (model_bytes()[:-4], "bytes with an output tied to the embedding, but it has"),
        (model_bytes(extra=1), "but it has"),
        (model_bytes((*SIZES[:5], -300, 12))[: len(model_bytes())], "with an output of its own"),
        (model_bytes()[:20] + struct.pack("<i", -300) + model_bytes()[24:], "of its own, but"),
        (struct.pack("<7i", 0, 24, 2, 4, 2, 300, 12), "no model has these sizes"),
        (struct.pack("<7i", 16, 24, 2, 3, 3, 300, 12), "no model has these sizes"),
        (struct.pack("<7i", 16, 24, 2, 4, 3, 300, 12), "no model has these sizes"),
        (struct.pack("<7i", 12, 24, 2, 4, 2, 300, 12), "no model has these sizes"),
        (struct.pack("<7i", 16, 24, 2, 4, 2, 300, -12), "no model has these sizes"),
        (struct.pack("<7i", *[2**31 - 1] * 7), "no model has these sizes|but it has"),
        (struct.pack("<7i", 0x616B3432, 1, 16, 24, 2, 4, 2), "export.py --version 0"),
    ],
)
def test_malformed_models_are_refused(tmp_path, content, message):
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        files.read_model(tmp_path / "model.bin")


GOOD = vocabulary_bytes(tokens())


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "has 0 tokens, the model 300"),
        (GOOD[:-1], "has token 299 of"),
        (GOOD + b"x", "ends within token 300"),
        (GOOD + vocabulary_bytes([(b"new", 0.0)])[4:], "has 301 tokens, the model 300"),
        (vocabulary_bytes([*tokens()[:-1], (b"\xff", 0.0)]), "token 299, no UTF-8"),
        (vocabulary_bytes([*tokens()[:-1], (b"a", 0.0)]), "has a token twice"),
        (vocabulary_bytes([*tokens()[1:], (b"x", 0.0)]), "tokens 3 to 258"),
        (vocabulary_bytes([*tokens()[:-1], (b"ab ", -9.0)]), "have one score"),
        (GOOD[:8] + struct.pack("<i", -5) + GOOD[12:], "token 0 of -5 bytes"),
    ],
)
def test_malformed_vocabularies_are_refused(tmp_path, content, message):
    (tmp_path / "tokens.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        files.write_tokenizer(tmp_path, files.read_vocabulary(tmp_path / "tokens.bin", 300), 12)


def test_what_is_missing_is_named(tmp_path):
    (tmp_path / "a.bin").write_bytes(model_bytes())
    for words, named in (
        ([], "config.file"),
        ([f"--config.file={tmp_path}/a.bin"], "config.vocabulary"),
        ([f"--config.{key}={tmp_path}/a.bin" for key in ("file", "vocabulary")], "config.output"),
    ):
        with pytest.raises(ConfigError, match=named):
            llama2c.run(configs.load(str(ROOT / "configs" / "llama2c.py"), words), tmp_path)
