"""Imports point one way: scripts, tests -> rollout -> {routing, weights} -> torch; Ray and Triton stand only where
they may."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("rollout", "routing", "weights")
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

MAY_IMPORT = {
    "rollout": {"rollout", "routing", "weights"},
    "routing": {"routing"},
    "weights": {"weights"},
}
MEETING_POINTS = {"rollout/host.py"}
RAY_MODULES = {"rollout/actor.py", "rollout/fleet.py", "rollout/metrics.py"}
FORBIDDEN_WORDS = {"manager", "utils", "helper", "helpers", "handler", "common", "misc", "base"}


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name"
            found.add(node.module or "")
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_kernel_file(path: Path) -> bool:
    return path.name.startswith("kernel") or "kernels" in path.parts


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    roots = {name.split(".")[0] for name in imports(path)}
    assert roots & set(PACKAGES) <= MAY_IMPORT[package]
    assert not roots & {"scripts", "tests", "transformers", "matplotlib"}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_ray_and_triton_stand_only_where_they_may(path: Path) -> None:
    roots = {name.split(".")[0] for name in imports(path)}
    assert "ray" not in roots or relative(path) in RAY_MODULES
    assert "triton" not in roots or is_kernel_file(path)


def test_neither_config_nor_a_module_that_it_needs_imports_torch_or_ray() -> None:
    """The file and, through any number of steps, those of ours that it names; that importing it runs the package's
    __init__, which re-exports more, is not counted."""
    needed = reachable(ROOT / "rollout/config.py")
    assert {"rollout/config.py", "rollout/schema.py", "rollout/errors.py"} <= {relative(path) for path in needed}
    offenders = {
        relative(path): found
        for path in needed
        if (found := {name.split(".")[0] for name in imports(path)} & {"torch", "ray", "numpy", "triton"})
    }
    assert offenders == {}


def reachable(path: Path) -> set[Path]:
    """A file and all first-party files that it imports, transitively.

    `from a.b import c` counts a/b.py or a/b/__init__.py, and a/b/c.py if there is one.
    """
    found: set[Path] = set()
    waiting = [path]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found.add(path)
            waiting += [
                module for name in imports(path) | imported_names(path) if (module := file_of(name)) is not None
            ]
    return found


def imported_names(path: Path) -> set[str]:
    """module.name for every `from module import name`: it may be a module itself."""
    tree = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {f"{node.module}.{alias.name}" for node in tree if isinstance(node, ast.ImportFrom) for alias in node.names}


def file_of(name: str) -> Path | None:
    """The file of a first-party module."""
    place = ROOT.joinpath(*name.split("."))
    files = (place.with_suffix(".py"), place / "__init__.py")
    return next((file for file in files if file in MODULES), None)


def test_routing_and_weights_meet_only_where_the_two_walks_cross() -> None:
    """A token walks through routing, a tensor through weights. Only the host may name both; no other file does."""
    both = {
        relative(path) for path in MODULES if {"routing", "weights"} <= {name.split(".")[0] for name in imports(path)}
    }
    assert both <= MEETING_POINTS


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_nothing_is_unpickled(path: Path) -> None:
    assert not imports(path) & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    calls = {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    }
    assert "torch.load" not in calls


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_names_say_what_a_thing_is(path: Path) -> None:
    words = set(path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "_").split("_"))
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            words |= _camel_words(node.name)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            words |= set(node.name.lower().split("_"))
    assert not words & FORBIDDEN_WORDS


def _camel_words(name: str) -> set[str]:
    spaced = "".join(f" {c}" if c.isupper() else c for c in name)
    return {word.lower() for word in spaced.split()}


def test_modules_form_no_cycle() -> None:
    """Between files; a package's __init__ re-exports its files and is not counted as one of their imports."""
    names = {relative(path)[:-3].replace("/", "."): path for path in MODULES if path.name != "__init__.py"}
    graph = {name: {found for found in imports(path) if found in names} for name, path in names.items()}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"import cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for found in sorted(graph[name]):
                visit(found, (*trail, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())
