"""The plan of the house: what may import what, read from the source of every file, deferred imports included."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "anygpt"
CORE = {"model", "sequence", "losses", "encoders", "decoders", "tokenizers", "generation"}
CORE |= {"composition", "outputs", "errors"}
ABOVE_CORE = {"data", "training", "serving", "toyworld", "chat", "commands", "evaluation", "cache", "processing"}


def read_imports():
    """`{module: modules of the package that it imports}`, by dotted name."""
    files = {name_of(path): path for path in ROOT.rglob("*.py")}
    imports = {}
    for module, path in files.items():
        found = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{path} imports by a relative path; write it out"
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in files else node.module for name in inside}
        imports[module] = {name for name in found if name in files and name != module}
    return imports


def name_of(path):
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module):
    """The folder right under the package, or the file's own name."""
    return [*module.split("."), ""][1]


def circles(graph):
    """The strongly connected parts of more than one node (Tarjan), sorted."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in graph.get(node, ()):
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            part = []
            while not part or part[-1] != node:
                part.append(stack.pop())
            if len(part) > 1:
                found.append(sorted(part))

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return sorted(found)


@pytest.fixture(scope="module")
def imports():
    return read_imports()


def test_circles_are_found(imports):
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert "anygpt.sequence.merging" in imports["anygpt.composition"]


def test_no_files_import_each_other(imports):
    assert not circles(imports)


def test_no_rooms_import_each_other(imports):
    rooms = {}
    for module, found in imports.items():
        if room_of(module):
            rooms.setdefault(room_of(module), set()).update({room_of(other) for other in found} - {room_of(module), ""})
    assert rooms and not circles(rooms)


def test_the_core_knows_nothing_above_it(imports):
    upwards = {
        (module, other)
        for module, found in imports.items()
        for other in found
        if room_of(module) in CORE and room_of(other) in ABOVE_CORE
    }
    assert not upwards


def test_nothing_imports_the_servers(imports):
    """But the commands that start them."""
    importers = {room_of(module) for module, found in imports.items() if any(room_of(x) == "serving" for x in found)}
    assert importers <= {"serving", "commands"}


def test_the_packages_face_is_for_the_outside(imports):
    importers = {room_of(module) for module, found in imports.items() if "anygpt" in found}
    assert importers <= {"commands", "__main__"}
