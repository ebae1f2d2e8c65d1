"""The limits of the house that no linter knows: sizes, words, signatures, records, state, pickle."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("offload", "edkm", "integrations")
OURS = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
ALL = [*OURS, *(path for folder in ("tests", "bench") for path in sorted((ROOT / folder).rglob("*.py")))]
MAX_FILE_LINES = 300
MAX_BODY_LINES = 40
VAGUE_WORDS = {
    *("manager", "helper", "helpers", "util", "utils", "processor", "engine", "tracker", "data", "info"),
}
GIVEN_NAMES = {("recipe", "data")}  # the option of `edkm finetune` is called so
PICKLES = {"pickle", "marshal", "shelve", "dill"}
# A table at module level is annotated with one of these, so that mypy refuses a write to it.
READ_ONLY = re.compile(r"^(Final\[)?(Mapping|Sequence|Collection|Set|Iterable)\b")
MUTABLE_DISPLAYS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
MUTABLE_CALLS = {
    *("list", "dict", "set", "bytearray", "defaultdict", "deque", "OrderedDict", "Counter", "count"),
    *("WeakKeyDictionary", "WeakValueDictionary", "WeakSet", "local", "Lock", "RLock"),
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[tuple[str, Function]]:
    """Yield where and what for each function of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, Function):
            yield f"{name_of(path)}:{node.lineno} {node.name}", node


def last_name(node: ast.expr) -> str:
    """Return `c` of `a.b.c`, of `c`, or of a call or subscript of either."""
    while isinstance(node, ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def num_body_lines(function: Function) -> int:
    """Return the lines of a function below its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


def words(name: str) -> set[str]:
    return set(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower().split("_"))


@pytest.mark.parametrize("path", ALL, ids=name_of)
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES
    long = [where for where, function in functions(path) if num_body_lines(function) > MAX_BODY_LINES]
    assert not long, f"more than {MAX_BODY_LINES} lines of body: {long}"


def is_ours_to_sign(function: Function) -> bool:
    """Return whether others call it by a signature that we chose.

    Private functions have their callers in sight; an autograd function's halves are not ours.
    """
    private = function.name.startswith("_") and function.name != "__init__"
    first = next(iter(function.args.posonlyargs + function.args.args), None)
    return not private and (first is None or first.arg != "ctx")


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_signatures_take_two_by_position_and_no_rest(path: Path) -> None:
    breaches = []
    for where, function in functions(path):
        positional = [argument.arg for argument in function.args.posonlyargs + function.args.args]
        if is_ours_to_sign(function) and len([a for a in positional if a not in ("self", "cls")]) > 2:
            breaches.append(f"{where}: {len(positional)} by position")
        if function.args.kwarg and not function.name.startswith("_"):
            breaches.append(f"{where}: **{function.args.kwarg.arg}")
    assert not breaches, breaches


def defined_names(path: Path) -> Iterator[tuple[int, str]]:
    """Yield every name the file defines: itself, classes, functions, arguments, variables."""
    yield 1, path.stem
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_names_say_something(path: Path) -> None:
    vague = [
        f"{name_of(path)}:{line} {name}"
        for line, name in defined_names(path)
        if words(name) & VAGUE_WORDS and (path.stem, name) not in GIVEN_NAMES
    ]
    assert not vague, vague


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_no_mutable_state_at_module_level(path: Path) -> None:
    tree = ast.parse(path.read_text())
    breaches = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)]
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(ast.unparse(target) == "__all__" for target in targets):
            continue
        annotation = ast.unparse(node.annotation) if isinstance(node, ast.AnnAssign) else ""
        made = isinstance(node.value, ast.Call) and last_name(node.value) in MUTABLE_CALLS
        if made or (isinstance(node.value, MUTABLE_DISPLAYS) and not READ_ONLY.match(annotation)):
            breaches.append(node.lineno)
    assert not breaches, f"{name_of(path)}: lines {breaches}"


def classes() -> Iterator[tuple[str, ast.ClassDef]]:
    for path in OURS:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                yield f"{name_of(path)}:{node.lineno} {node.name}", node


def is_abstract(node: ast.ClassDef) -> bool:
    return bool({last_name(base) for base in node.bases} & {"ABC", "Protocol"}) or any(
        last_name(decorator) == "abstractmethod"
        for method in node.body
        if isinstance(method, Function)
        for decorator in method.decorator_list
    )


def test_a_class_is_abstract_or_final() -> None:
    concrete = {
        node.name for _, node in classes() if not is_abstract(node) and not node.name.endswith("Error")
    }
    breaches = [where for where, node in classes() if {last_name(base) for base in node.bases} & concrete]
    assert not breaches, f"wrap, never override: {breaches}"


def test_records_are_frozen() -> None:
    breaches = [
        where
        for where, node in classes()
        for decorator in node.decorator_list
        if last_name(decorator) == "dataclass" and "frozen=True" not in ast.unparse(decorator)
    ]
    assert not breaches, breaches


def unpickling(node: ast.AST) -> bool:
    """Return whether this reads bytes that could run code; naming pickle's errors does not."""
    if isinstance(node, ast.ImportFrom):
        return node.module in PICKLES and any(not alias.name.endswith("Error") for alias in node.names)
    if isinstance(node, ast.Attribute):
        return ast.unparse(node.value) in PICKLES and not node.attr.endswith("Error")
    is_load = isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load"
    return is_load and "weights_only=True" not in ast.unparse(node)


@pytest.mark.parametrize("path", OURS, ids=name_of)
def test_no_bytes_are_unpickled(path: Path) -> None:
    breaches = [node.lineno for node in ast.walk(ast.parse(path.read_text())) if unpickling(node)]
    assert not breaches, f"{name_of(path)}: lines {breaches}"


@pytest.mark.parametrize(
    "source",
    ["pickle.loads(b)", "from pickle import load", "torch.load(p)", "torch.load(p, weights_only=False)"],
)
def test_unpickling_is_seen(source: str) -> None:
    assert any(unpickling(node) for node in ast.walk(ast.parse(source)))
