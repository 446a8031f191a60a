"""The English documentation that every CPython carries: pydoc's topics and all docstrings.

As documents: one topic is one, and so are all docstrings of one file of the standard library.
As examples: one docstring, and the package of the standard library that it is in.
As conversations: what a function does, and the first paragraph of its docstring.
"""

import ast
import collections
import functools
import importlib
import os
import re
import sys
import sysconfig
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import xxhash

from fmjax.errors import DataError

# Tests are code, not prose; the codecs' docstrings are near-copies of each other, which a split by
# hash of the text would put on both sides.
SKIPPED_FOLDERS = frozenset(
    "site-packages dist-packages test tests idle_test encodings __pycache__ lib2to3".split()
)
C_MODULES = (
    "array builtins cmath errno fcntl gc itertools math mmap resource select sys time unicodedata "
    "zlib"
).split()


EXAMPLE_CHARACTERS = 30  # "Return a copy." says nothing of where it stands
EXAMPLES = 100  # docstrings that make a package a class


def digest() -> str:
    """Changes whenever the texts may. Of the files: extracting the texts takes seconds."""
    state = xxhash.xxh3_128(sys.version.encode())
    for path in library_files():
        state.update(path.read_bytes())
    return state.hexdigest()


@functools.cache
def texts() -> list[tuple[str, str]]:
    """(where, text) of every document, each once, in the same order in every process."""
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        topics = {}
    found = [(f"pydoc topic {name}", text) for name, text in topics.items()]
    root = sysconfig.get_path("stdlib")
    for path in library_files():
        texts = "\n\n".join(_docstrings(path))
        found.append((f"docstrings of {path.relative_to(root)}", texts))
    found += [(f"docstrings of {name}", _c_docstrings(name)) for name in C_MODULES]
    unique = {text.strip(): where for where, text in sorted(found) if text.strip()}
    if not unique:
        raise DataError(
            "This Python carries neither pydoc topics nor the sources of its standard library. "
            "Set config.data.name='text' and config.data.train to your own files."
        )
    return [(where, text) for text, where in unique.items()]


@functools.cache
def examples() -> list[tuple[str, str, str]]:
    """(where, docstring, package) of the packages with at least `EXAMPLES` docstrings of their own,
    a text that is in several left out of all; in the same order in every process."""
    root = sysconfig.get_path("stdlib")
    found = {}
    for path in library_files():
        parts = path.relative_to(root).parts
        for text in _docstrings(path):
            places = found.setdefault(text.strip(), [])
            places.append((parts[0].removesuffix(".py"), "/".join(parts)))
    rows = [
        (f"docstring in {places[0][1]}", text, places[0][0])
        for text, places in found.items()
        if len(text) >= EXAMPLE_CHARACTERS and len({package for package, _ in places}) == 1
    ]
    counts = collections.Counter(package for _, _, package in rows)
    return [row for row in rows if counts[row[2]] >= EXAMPLES]


@functools.cache
def conversations() -> list[tuple[str, str, str]]:
    """(where, question, answer) of each public function of the standard library; answers that stand
    in several left out of all; in the same order in every process."""
    root, found = sysconfig.get_path("stdlib"), {}
    for path in library_files():
        place = path.relative_to(root)
        if any(re.match("_(?!_init__)", part) for part in place.parts):
            continue
        module = ".".join(place.with_suffix("").parts).removesuffix(".__init__")
        for name, signature, text in _functions(_tree(path), module):
            answer = " ".join(text.partition("\n\n")[0].split())
            if len(answer) >= EXAMPLE_CHARACTERS:
                question = f"What does {name}({signature}) do?"
                found.setdefault(answer, []).append((f"{name} in {place}", question, answer))
    return [rows[0] for rows in found.values() if len(rows) == 1]


def library_files() -> list[Path]:
    """Those of the standard library, without tests, in order."""
    files = []
    for folder, inner, names in os.walk(sysconfig.get_path("stdlib")):
        inner[:] = [name for name in inner if name not in SKIPPED_FOLDERS]  # prunes the walk
        files += [Path(folder, name) for name in names if name.endswith(".py")]
    return sorted(files)


def _docstrings(path: Path) -> list[str]:
    return list(_of_tree(_tree(path)))


def _tree(path: Path) -> ast.Module:
    """The syntax tree of a file, empty where it has no docstrings or cannot be parsed."""
    source, nothing = path.read_bytes(), ast.Module([], [])
    if b'"""' not in source and b"'''" not in source:  # parsing is the slow part
        return nothing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):  # a template or a file for another Python
            return nothing


def _functions(node: ast.AST, name: str) -> Iterator[tuple[str, str, str]]:
    """(dotted name, arguments, docstring) of the public functions in a module or a class."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if child.name.startswith("_"):
            continue
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{name}.{child.name}")
        elif text := ast.get_docstring(child):
            yield f"{name}.{child.name}", ast.unparse(child.args), text


def _of_tree(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        text = ast.get_docstring(node)
        if text:
            yield text
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt):  # expressions hold no docstrings
            yield from _of_tree(child)


_DOCUMENTED = (
    type,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)


def _c_docstrings(name: str) -> str:
    try:
        module = importlib.import_module(name)
    except ImportError:  # not built on this platform
        return ""
    texts = [module.__doc__]
    for _, member in sorted(vars(module).items()):
        if isinstance(member, _DOCUMENTED):
            texts.append(member.__doc__)
            if isinstance(member, type):
                texts += [
                    m.__doc__ for _, m in sorted(vars(member).items()) if isinstance(m, _DOCUMENTED)
                ]
    texts = [text for text in texts if isinstance(text, str)]
    return "\n\n".join(dict.fromkeys(texts))  # inherited docstrings repeat
