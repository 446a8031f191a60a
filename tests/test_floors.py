"""The packages are floors: imports point down. A task is imported by nobody, since it is started by
its name."""

import ast
from functools import cache

import pytest
from common import ROOT

# From the ground up; those of one row may not import each other, and none one above it.
FLOORS = (
    ("errors",),
    ("config", "params"),
    ("io",),
    ("distributed",),
    ("models",),
    ("data", "objectives"),
    ("convert", "reports"),
    ("adapters",),
    ("build",),
    ("checkpoints",),
    ("generation",),
    ("evaluation",),
    ("training",),
    ("dispatch",),
    ("experiments",),
    ("tasks", "startup"),
    ("configs",),
    ("__main__", "api"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@cache
def modules():
    """{dotted name: syntax tree} of the whole package."""
    files = (ROOT / "fmjax").rglob("*.py")
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    parse = lambda file: ast.parse(file.read_text(encoding="utf-8"))
    return {name.removesuffix(".__init__"): parse(file) for name, file in names.items()}


def imports(name):
    """Modules of the package that a module imports, wherever in its file, in their order."""
    found = []
    for node in ast.walk(modules()[name]):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "fmjax":
            inside = (f"{node.module}.{alias.name}" for alias in node.names)
            found += [one if one in modules() else node.module for one in inside]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in modules()]
    return [one for one in found if one not in ("fmjax", name)]


def room(name):
    return name.split(".")[1]


@pytest.mark.parametrize("name", sorted(modules().keys() - {"fmjax"}))
def test_imports_point_down(name):
    assert room(name) in FLOOR, "a new room needs a floor"
    for other in imports(name):
        if room(other) != room(name):
            assert FLOOR[room(other)] < FLOOR[room(name)], f"{name} imports {other}"


def test_modules_import_each_other_in_no_circle():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name in done:
            return
        path.append(name)
        for other in imports(name):
            # A package whose files import it is read first, and they are read behind it.
            if not other.startswith(f"{name}.") and not name.startswith(f"{other}."):
                visit(other)
        path.pop()
        done.add(name)

    for name in modules():
        visit(name)


def test_a_task_is_imported_by_nobody():
    for name in modules().keys() - {"fmjax.api"}:  # which trains as a user does
        assert not [other for other in imports(name) if other.startswith("fmjax.tasks.")], name


def test_each_file_of_tasks_is_one():
    for name, tree in modules().items():
        if name.startswith("fmjax.tasks."):
            run = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "run"]
            assert run and run[0].args.args[0].arg == "config", name
