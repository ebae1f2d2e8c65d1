"""offload knows nothing of edkm, edkm only offload's public names; only the door knows integrations."""

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
THIRD_PARTY = {
    "offload": {"torch", "numpy", "psutil", "xxhash", "msgpack"},
    "edkm": {"torch", "numpy", "safetensors"},
    "integrations": {"torch", "numpy", "psutil", "safetensors", "transformers", "tokenizers", "tqdm"},
}
OURS = {"offload": (), "edkm": ("offload",), "integrations": ("offload", "edkm")}
DOOR = Path("edkm/__main__.py")
FILES = [path.relative_to(ROOT) for package in OURS for path in sorted((ROOT / package).rglob("*.py"))]


def imports(source: str) -> Iterator[tuple[int, str, tuple[str, ...]]]:
    """Yield line, module and names of every absolute import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name, ()) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or "", tuple(alias.name for alias in node.names)


def breach(package: str, module: str, names: tuple[str, ...]) -> str | None:
    """Return why `package` may not import this, or None."""
    top = module.partition(".")[0]
    if top == package or top in sys.stdlib_module_names:
        return None
    if top not in OURS:
        return None if top in THIRD_PARTY[package] else f"{top} is not one of {package}'s dependencies"
    if top not in OURS[package]:
        return f"{package} stands below {top}"
    if module != top or not names:
        return f"only `from {top} import name` goes through {top}'s public surface"
    private = sorted(set(names) - set(importlib.import_module(top).__all__))
    return f"not in {top}.__all__: {', '.join(private)}" if private else None


def called_name(call: ast.Call) -> str:
    """Return the last name of what is called."""
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_keep_to_the_layers(path: Path) -> None:
    breaches = []
    for line, module, names in imports((ROOT / path).read_text()):
        if path == DOOR and module.partition(".")[0] == "integrations":
            continue
        if why := breach(path.parts[0], module, names):
            breaches.append(f"{path}:{line}: {module}: {why}")
    assert not breaches, "\n".join(breaches)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_are_statements(path: Path) -> None:
    """An import by string would be invisible to the test above."""
    hidden = [
        f"{path}:{node.lineno}"
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.Call) and called_name(node) in {"__import__", "import_module"}
    ]
    assert not hidden, hidden


@pytest.mark.parametrize(
    ("package", "statement"),
    [
        ("offload", "import edkm"),
        ("offload", "from integrations import commands"),
        ("offload", "import transformers"),
        ("edkm", "import integrations.commands"),
        ("edkm", "import offload"),
        ("edkm", "from offload.store import SavedTensorStore"),
        ("edkm", "from offload import store"),
        ("edkm", "def later():\n    import transformers"),
        ("integrations", "from edkm.palette import Palette"),
    ],
)
def test_a_breach_is_seen(package: str, statement: str) -> None:
    [(_, module, names)] = imports(statement)
    assert breach(package, module, names)


def test_no_relative_import_leaves_its_package() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level < len(path.parts), f"{path}:{node.lineno}"


def test_the_packages_were_found() -> None:
    assert {path.parts[0] for path in FILES} == set(OURS)
