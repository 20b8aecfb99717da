"""Imports run down the list of rooms, and never in a circle; every room is in the list and has its tests."""

import ast
from pathlib import Path

import pytest

import lora_flow
from lora_flow import figures

PACKAGE = Path(__file__).parents[1] / "lora_flow"
ROOMS = (  # the highest first: a room imports those below it and beside it, no module another in a circle
    ("__main__",),
    ("cli",),
    ("claims",),
    ("experiments",),
    ("pages",),
    ("figures",),
    ("design",),
    ("sensitivities",),
    ("advice",),
    ("growth",),
    ("bridge",),
    ("sizes",),
    ("settings",),
    ("flags",),
    ("results",),
    ("recipes",),
    ("sweeps",),
    ("dynamics",),
    ("theory",),
    ("initialization",),
    ("coordinates", "problems"),
    ("solvers",),
    ("oracles",),
    ("algebra",),
    ("storage",),
    ("runtime",),
    ("adapter",),
    ("arrays",),
    ("fields",),
    ("checks", "version"),
)
LEVELS = {room: level for level, rooms in enumerate(reversed(ROOMS)) for room in rooms}


def module_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(source, modules):
    """The modules of the package that a source imports, and whether it does so when it is imported itself.

    Imports for types count, and so do those within functions, which come later.
    """
    found = []
    tree = ast.parse(source)
    later = {id(inner) for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "lora_flow":
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = {name if name in modules else node.module for name in names}
        elif isinstance(node, ast.Import):
            targets = {alias.name for alias in node.names if alias.name.split(".")[0] == "lora_flow"}
        else:
            continue
        found += [(target, id(node) not in later) for target in targets]
    return found


def room_of(module):
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def upward(module, source, modules):
    """The imports of a module that run up the list, as text."""
    own = room_of(module)
    wrong = []
    for target, _ in imports_of(source, modules):
        room = room_of(target)
        if own and room != own and LEVELS.get(room, len(LEVELS)) > LEVELS[own]:
            wrong.append(f"{module} imports {target}")
    return wrong


def circle(edges):
    """A circle of modules that import each other, or None."""
    done, path = set(), []

    def visit(module):
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return None
        path.append(module)
        for target in sorted(edges.get(module, ())):
            if found := visit(target):
                return found
        path.pop()
        done.add(module)
        return None

    return next((found for module in sorted(edges) if (found := visit(module))), None)


def test_every_module_is_in_a_room_of_the_list():
    assert {room_of(module) for module in MODULES} - {""} == set(LEVELS)


@pytest.mark.parametrize("module", MODULES)
def test_no_import_runs_up_the_list(module):
    assert upward(module, MODULES[module].read_text(), MODULES) == []


@pytest.mark.parametrize("package", [lora_flow, figures], ids=["lora_flow", "figures"])
def test_no_public_name_is_that_of_a_module_beside_it(package):
    """Whoever imports such a module finds it in place of the function, whatever lazy-loader does."""
    beside = {path.stem for path in Path(package.__file__).parent.iterdir() if not path.stem.startswith("_")}
    assert set(package.__all__) & beside <= {"oracles"}


def test_an_import_that_runs_up_is_seen():
    for line in (
        "from lora_flow.cli import main",
        "def f():\n    import lora_flow.sweeps.plan",
        "from lora_flow import solve",
    ):
        assert upward("lora_flow.problems.base", line, MODULES), line
    for module, line in (
        ("lora_flow.cli.plot", "from lora_flow.problems import base"),
        ("lora_flow.problems.base", "from lora_flow.coordinates.base import Coordinates"),  # beside it
        ("lora_flow.coordinates.canonical", "from lora_flow.problems.base import Problem"),
    ):
        assert not upward(module, line, MODULES), line


def test_no_modules_import_each_other_in_a_circle():
    edges = {
        module: {to for to, now in imports_of(path.read_text(), MODULES) if now} for module, path in MODULES.items()
    }
    assert circle(edges) is None
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


def test_every_room_has_its_tests():
    folders = {path.name for path in Path(__file__).parent.iterdir() if path.is_dir()}
    rooms = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    assert rooms - folders == set()
