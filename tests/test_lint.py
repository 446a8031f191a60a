"""No file of the repository unpickles, evaluates text, trusts remote code or calls a shell.

Text can hide from any lint; this one keeps what is written in good faith from going wrong. Config
files are code that its user names, so `runpy` is allowed.
"""

import ast
import configparser
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from common import ROOT

# Modules, functions and builtins by their full names; what lies in a module is forbidden with it.
FORBIDDEN = {
    "pickle": "executes what it reads; use JSON or safetensors",
    "_pickle": "executes what it reads; use JSON or safetensors",
    "cPickle": "executes what it reads; use JSON or safetensors",
    "dill": "executes what it reads; use JSON or safetensors",
    "cloudpickle": "executes what it reads; use JSON or safetensors",
    "joblib": "executes what it reads; use JSON or safetensors",
    "jsonpickle": "executes what it reads; use JSON or safetensors",
    "shelve": "executes what it reads; use JSON or safetensors",
    "marshal": "executes what it reads; use JSON or safetensors",
    "pandas.read_pickle": "executes what it reads; use JSON or safetensors",
    "torch.load": "executes what it reads; use safetensors",
    "yaml": "its loaders can execute what they read; use JSON",
    "evaluate.load": "runs the script that it is given",
    "eval": "executes text; use ast.literal_eval",
    "exec": "executes text",
    "compile": "makes code of text",
    "__import__": "hides what is imported; use importlib.import_module",
    "os.system": "is read by a shell; use subprocess with a list",
    "os.popen": "is read by a shell; use subprocess with a list",
    "subprocess.getoutput": "is read by a shell; use subprocess with a list",
    "subprocess.getstatusoutput": "is read by a shell; use subprocess with a list",
}
# Keywords that may be given with this constant alone.
ONLY = {
    "allow_pickle": False,
    "trust_remote_code": False,
    "weights_only": True,
    "shell": False,
    "confirm_run_unsafe_code": False,
}
FILES = sorted(
    path.relative_to(ROOT)
    for place in ("benchmarks", "configs", "fmjax", "tests", "run.py")
    for path in ([ROOT / place] if place.endswith(".py") else (ROOT / place).rglob("*.py"))
)
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for place in (".", "docs", "benchmarks")
    for path in (ROOT / place).glob("*.md")
)
# Calls that write where an archive says, unless they are given filter="data".
UNPACK = ("extractall", "unpack_archive")


def problems(text: str) -> list[str]:
    """ "<line>: <what>" of everything in a Python file that is forbidden."""
    tree = ast.parse(text)
    names = dict(_imported(tree))
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            used = [full for _, full in _imported(node)]
        elif isinstance(node, ast.Name | ast.Attribute):
            used = [_full_name(node, names)]
        elif isinstance(node, ast.Call) and _full_name(node.func, names).endswith("import_module"):
            used = [a.value for a in node.args if isinstance(a, ast.Constant)]
        else:
            used = []
        for name in used:
            name = name.removeprefix("builtins.")
            if rule := next((key for key in FORBIDDEN if f"{name}.".startswith(f"{key}.")), None):
                found.append(f"{node.lineno}: {name} {FORBIDDEN[rule]}")
        keywords = {k.arg: getattr(k.value, "value", None) for k in getattr(node, "keywords", [])}
        for name in keywords.keys() & ONLY.keys():
            if keywords[name] is not ONLY[name]:
                found.append(f"{node.lineno}: {name} is not {ONLY[name]}")
        if isinstance(node, ast.Call) and keywords.get("filter") != "data":
            last = getattr(node.func, "attr", _full_name(node.func, names).rpartition(".")[2])
            if last in UNPACK:
                found.append(f"{node.lineno}: unpacks an archive without filter='data'")
    return found


def _imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(name in the file, full name) of what is imported anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.split(".")[0], alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _full_name(node: ast.AST, names: dict[str, str]) -> str:
    """ "os.system" for `os.system`, `o.system` and `system`, by the imports; "" for expressions."""
    if isinstance(node, ast.Attribute):
        owner = _full_name(node.value, names)
        return f"{owner}.{node.attr}" if owner else ""
    if isinstance(node, ast.Name):
        full = names.get(node.id, node.id)
        return full.split(".")[0] if full.startswith(f"{node.id}.") else full
    return ""


def test_nothing_is_forbidden_in_any_file():
    some = {"run.py", "fmjax/tasks/train.py", "configs/mlm.py", "tests/conftest.py"}
    assert some <= set(map(str, FILES))
    found = [
        f"{path}:{line}"
        for path in FILES
        for line in problems((ROOT / path).read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "snippet",
    [
        "import pickle",
        "import os, pickle as p",
        "from pickle import loads",
        "def f():\n    import pickle",
        "import dill",
        "import cloudpickle",
        "import joblib",
        "import marshal",
        "import shelve",
        "from pandas import read_pickle",
        "import pandas as pd\npd.read_pickle('x')",
        "import torch\ntorch.load('x')",
        "import torch as t\nread = t.load",
        "from torch import load\nload('x')",
        "import torch.nn\ntorch.load('x')",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "import numpy as np\nnp.load('x', allow_pickle=flag)",
        "eval('1')",
        "list(map(eval, texts))",
        "exec('x = 1')",
        "compile('x', 'y', 'exec')",
        "import builtins\nbuiltins.eval('1')",
        "__import__('pickle')",
        "import importlib\nimportlib.import_module('pickle')",
        "from importlib import import_module\nimport_module('dill')",
        "import yaml",
        "from yaml import unsafe_load",
        "import os\nos.system('x')",
        "from os import popen",
        "import subprocess\nsubprocess.run('x', shell=True)",
        "import subprocess\nsubprocess.getoutput('x')",
        "load(x, trust_remote_code=True)",
        "load(x, trust_remote_code=trust)",
        "load(x, weights_only=False)",
        "dict(trust_remote_code=True)",
        "import tarfile\ntarfile.open('x').extractall()",
        "with tarfile.open('x') as archive:\n    archive.extractall('y')",
        "archive.extractall('y', filter='fully_trusted')",
        "import shutil\nshutil.unpack_archive('x')",
        "import evaluate\nevaluate.load('x')",
    ],
)
def test_each_is_caught(snippet):
    assert problems(snippet)


@pytest.mark.parametrize(
    "snippet",
    [
        "import jax\njax.eval_shape(f)",
        "model.eval()",
        "text = 'import pickle'",
        "import json\njson.load(file)",
        "import numpy as np\nnp.load('x', allow_pickle=False)",
        "load(x, trust_remote_code=False)",
        "import subprocess\nsubprocess.run(['x'])",
        "archive.extractall('y', filter='data')",
        "import re\nre.compile('x')",
        "step.lower(state).compile()",
        "from fmjax.tasks import evaluate\nevaluate.evaluate(x)",
        "import runpy\nrunpy.run_path('x')",
        "import torch\ntorch.no_grad()",
    ],
)
def test_nothing_else_is(snippet):
    assert not problems(snippet)


@pytest.mark.parametrize("file", [*FILES, *DOCUMENTS], ids=str)
def test_no_text_sends_to_a_package_index_for_fmjax(file):
    """It is installed from its checkout; on an index the name could be anybody's."""
    text = (ROOT / file).read_text(encoding="utf-8")
    assert not re.search(r"pip install ['\"]?fmjax\b|\bfmjax\[\w", text)


def test_documents_say_how_each_extra_is_installed():
    """jax for GPUs and TPUs is one: without it a run trains on the CPU."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg", encoding="utf-8")
    named = {
        file: set(re.findall(r"'\.\[(\w+)\]'", (ROOT / file).read_text(encoding="utf-8")))
        for file in DOCUMENTS
    }
    assert set.union(*named.values()) == {*setup["options.extras_require"]}
    assert named[Path("README.md")] >= {"gpu", "tpu"}


@pytest.mark.parametrize("file", DOCUMENTS, ids=str)
def test_documents_name_files_that_exist(file):
    text = (ROOT / file).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", text)
    assert not [link for link in links if not (ROOT / file).parent.joinpath(link).exists()]
    named = re.findall(r"`(?:python run.py --config=)?((?:configs|fmjax|tests)/[\w/]+\.py)", text)
    assert not [name for name in named if not (ROOT / name).exists()]
