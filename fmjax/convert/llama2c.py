"""Models and vocabularies of llama2.c (Karpathy 2023), as its `run.c` reads them.

A model file ("version 0") is seven int32 and then float32 in the order of `_layout`: width, width
of the MLP, layers, heads, heads of keys and values, vocabulary (negative where the output is not
tied to the embedding), positions. Kernels are (out, in). Rotary positions turn neighbouring
features (0, 1), (2, 3), …, where ours and Hugging Face's turn the two halves of a head.

A vocabulary file is the length of the longest token, then for each token its score, its length and
its bytes. Text is a space and the text itself, of whose characters the best-scored pair that is a
token becomes one, again and again; a character that is no token is its bytes, tokens 3 to 258.
"""

import itertools
import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmjax.errors import CheckpointError
from fmjax.models import llama

_HEADER = struct.Struct("<7i")
_TOKEN = struct.Struct("<fi")
_MAGIC = 0x616B3432  # of later versions: "ak42"
_LATER = "It is of a later version; write one with `export.py --version 0` of llama2.c."
BEGIN = 1  # begins each text, and so ends the one before: where run.c stops
_SPECIAL = ("<unk>", "<s>", "</s>")
_BYTES = [f"<0x{i:02X}>" for i in range(256)]


class Read(NamedTuple):
    """A model file."""

    model: llama.Decoder
    params: dict[str, np.ndarray]  # {parameter name: array}


def read_model(path: str | Path) -> Read:
    """The model in a file of llama2.c.

    Raises CheckpointError for anything else, and for a file of another size than it says.
    """
    content = Path(path).read_bytes()
    if len(content) < _HEADER.size:
        raise CheckpointError(
            f"{path} has {len(content)} bytes, fewer than the {_HEADER.size} that a model of "
            "llama2.c begins with."
        )
    width, mlp, depth, heads, kv_heads, signed, max_len = sizes = _HEADER.unpack_from(content)
    names = "width, mlp, layers, heads, kv_heads, vocabulary, positions"
    told = f"{path} begins with {names} = {', '.join(map(str, sizes))}"
    if width == _MAGIC:
        raise CheckpointError(f"{path} is no model file of llama2.c, version 0. {_LATER}")
    possible = min(*sizes[:5], abs(signed), max_len) > 0
    if not possible or width % heads or heads % kv_heads or width // heads % 2:
        raise CheckpointError(f"{told}: no model has these sizes.")
    vocabulary, tied = abs(signed), signed > 0
    layout = _layout(width, mlp, depth, heads, kv_heads, vocabulary, max_len, tied)
    needed = _HEADER.size + 4 * sum(math.prod(shape) for shape in layout.values())
    if len(content) != needed:
        raise CheckpointError(
            f"{told}, which are {needed:,} bytes with an output "
            f"{'tied to the embedding' if tied else 'of its own'}, but it has {len(content):,}."
        )
    model = llama.Model(
        vocab_size=vocabulary,
        width=width,
        depth=depth,
        heads=heads,
        kv_heads=kv_heads,
        mlp=mlp,
        max_len=max_len,
        tied=tied,
    )
    arrays, offset = {}, _HEADER.size
    for name, shape in layout.items():
        arrays[name] = np.frombuffer(content, "<f4", math.prod(shape), offset).reshape(shape)
        offset += arrays[name].nbytes
    return Read(model, _named(arrays, depth, heads, kv_heads))


def _layout(width, mlp, depth, heads, kv_heads, vocabulary, max_len, tied) -> dict[str, tuple]:
    """{where it goes: shape} in the order of the file; "" is what is not needed."""
    keys = width // heads * kv_heads
    shapes = {
        "embed/token/embedding": (vocabulary, width),
        "attn_norm/scale": (depth, width),
        "attn/query/kernel": (depth, width, width),
        "attn/key/kernel": (depth, keys, width),
        "attn/value/kernel": (depth, keys, width),
        "attn/out/kernel": (depth, width, width),
        "mlp_norm/scale": (depth, width),
        "mlp/up/kernel": (depth, mlp, width),
        "mlp/down/kernel": (depth, width, mlp),
        "mlp/gate/kernel": (depth, mlp, width),
        "norm/scale": (width,),
        "": (2, max_len, width // heads // 2),  # cosines and sines of the positions
    }
    return shapes if tied else shapes | {"head/lm/kernel": (vocabulary, width)}


def _named(arrays, depth, heads, kv_heads) -> dict[str, np.ndarray]:
    found = {}
    for name, array in arrays.items():
        if name in ("attn/query/kernel", "attn/key/kernel"):
            array = _halves(array, heads if "query" in name else kv_heads)
        if name.endswith("kernel"):
            array = np.swapaxes(array, -1, -2)
        if name.startswith(("embed/", "norm/", "head/")):
            found[name] = array
        elif name:
            found |= {f"block_{i:02d}/{name}": array[i] for i in range(depth)}
    return found


def _halves(kernel: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the outputs of each head: the even ones, then the odd ones."""
    depth, out, width = kernel.shape
    pairs = kernel.reshape(depth, heads, out // heads // 2, 2, width)
    return pairs.swapaxes(2, 3).reshape(depth, out, width)


def read_vocabulary(path: str | Path, size: int) -> list[tuple[str, float]]:
    """(token, score) of the `size` tokens in a file of llama2.c.

    Raises CheckpointError for anything else.
    """
    content, found, offset = Path(path).read_bytes(), [], 4
    while offset < len(content):
        if offset + _TOKEN.size > len(content):
            raise CheckpointError(f"{path} ends within token {len(found)}.")
        score, length = _TOKEN.unpack_from(content, offset)
        offset += _TOKEN.size
        if not 0 <= length <= len(content) - offset:
            raise CheckpointError(f"{path} has token {len(found)} of {length} bytes: too many.")
        try:
            found.append((content[offset : offset + length].decode(), score))
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} has token {len(found)}, no UTF-8: {error}") from error
        offset += length
    if len(found) != size:
        raise CheckpointError(f"{path} has {len(found):,} tokens, the model {size:,}.")
    if [token for token, _ in found[3:259]] != _BYTES:
        raise CheckpointError(f"{path}: its tokens 3 to 258 are not {_BYTES[0]} to {_BYTES[-1]}.")
    tokens = [*_SPECIAL, *(token for token, _ in found[3:])]
    if len(set(tokens)) < size:
        raise CheckpointError(f"{path} has a token twice.")
    return list(zip(tokens, [score for _, score in found], strict=True))


def write_tokenizer(folder: str | Path, vocabulary: list[tuple[str, float]], max_len: int) -> None:
    """The tokenizer in transformers' format, with the tokens that llama2.c gives.

    In a text "<s>" is three characters, as it is there. One thing cannot be said in this format: of
    two overlapping pairs that would both become the same token (=, ==, = with a token ===) the left
    one is taken there, and here the one that is listed first.

    Raises CheckpointError where two tokens made of others have one score: their order is then that
    of the text, which is not in this format either.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

    ids = {token: i for i, (token, _) in enumerate(vocabulary)}
    joined = []
    for token, score in vocabulary[259:]:
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        joined.append((score, [pair for pair in splits if pair[0] in ids and pair[1] in ids]))
    joined = sorted((row for row in joined if row[1]), key=lambda row: -row[0])
    for (score, one), (next_score, other) in itertools.pairwise(joined):
        if score == next_score:
            raise CheckpointError(
                f"The tokens {''.join(one[0])!r} and {''.join(other[0])!r} have one score: a "
                "tokenizer in transformers' format cannot order them."
            )
    merges = [pair for _, pairs in joined for pair in pairs]
    tokenizer = Tokenizer(models.BPE(ids, merges, unk_token=_SPECIAL[0], byte_fallback=True))
    tokenizer.normalizer = normalizers.Prepend(" ")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    begin = _SPECIAL[BEGIN]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A",
        pair=f"{begin} $A {begin}:1 $B:1",
        special_tokens=[(begin, BEGIN)],
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in _SPECIAL])
    told: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": _SPECIAL[0],
        "bos_token": begin,
        "eos_token": begin,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_len,
    }
    Path(folder, "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    Path(folder, "tokenizer_config.json").write_text(json.dumps(told, indent=2) + "\n")
