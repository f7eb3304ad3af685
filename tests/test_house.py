"""The rules of the house, which no formatter knows. Each failure names the place and the rule."""

import ast
import builtins
import io
import tokenize
from functools import lru_cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from torch import nn

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "sc_bce"
FILES = sorted(SOURCE.rglob("*.py"))
MOST_CODE, MOST_LINES, MOST_IN_FUNCTION = 3_705, 400, 50  # the first one should fall

# From below: what stands in one line imports only from the lines above it.
FLOORS = (
    {"_errors", "_torch"},
    {"_arrays", "_inputs", "_state"},
    {"kernels"},
    {"functional", "measure"},
    {"losses", "repair", "data"},
    {"plot", "integrations", "files"},
    {"__main__"},
    {"__init__"},
)
OUTSIDE = {"__main__", "files", "integrations"}
APART = {"losses": {"measure"}, "repair": {"functional"}}

EXCEPTIONS = {
    name
    for name, value in vars(builtins).items()
    if isinstance(value, type)
    and issubclass(value, BaseException)
    and not issubclass(value, Warning)
}
USERS_ERRORS = {"ValueError", "TypeError", "IndexError"}


@lru_cache
def tree(path):
    return ast.parse(path.read_text("utf-8"))


def place(path, node):
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def told(found, rule):
    """What an assertion says."""
    return "\n".join([rule, *found])


# ---------------------------------------------------------------- imports


def parts(path):
    """``losses/fixed.py`` as ("losses", "fixed"), a folder's ``__init__`` as the folder."""
    names = path.relative_to(SOURCE).with_suffix("").parts
    return names[:-1] if names[-1] == "__init__" else names


MODULES = {parts(path): path for path in FILES}


def imported(path):
    """(node, module of ours, name or None if the module itself is meant) of each import."""
    package = parts(path) if path.name == "__init__.py" else parts(path)[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                if first == "sc_bce":
                    yield node, tuple(rest), None
        elif isinstance(node, ast.ImportFrom):
            names = tuple(node.module.split(".")) if node.module else ()
            if node.level:
                module = package[: len(package) - node.level + 1] + names
            elif names[0] == "sc_bce":
                module = names[1:]
            else:
                continue
            for alias in node.names:
                whole = (*module, alias.name)
                yield (node, whole, None) if whole in MODULES else (node, module, alias.name)


def room(module):
    return module[0] if module else "__init__"


def floor(name):
    return next((i for i, names in enumerate(FLOORS) if name in names), None)


def test_every_room_has_its_floor():
    lost = {room(module) for module in MODULES if floor(room(module)) is None}
    assert not lost, f"Write into FLOORS what {sorted(lost)} may import"


def test_imports_go_downward():
    found = []
    for path in FILES:
        ours = room(parts(path))
        for node, module, _ in imported(path):
            theirs = room(module)
            if theirs == ours or None in (floor(ours), floor(theirs)):
                continue
            if floor(theirs) >= floor(ours) or theirs in APART.get(ours, ()):
                found.append(f"{place(path, node)}: {ours} imports {theirs}")
    assert not found, told(found, "A room imports only from the rooms below it (FLOORS, APART):")


def test_imports_have_no_circle():
    graph = {parts(path): {m for _, m, _ in imported(path) if m != parts(path)} for path in FILES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        circle = " <- ".join(".".join(("sc_bce", *module)) for module in error.args[1])
        pytest.fail(f"These modules import each other: {circle}")


def test_a_folder_says_only_what_it_has():
    found = []
    for path in FILES:
        if path.name != "__init__.py" or path.parent == SOURCE:
            continue
        for node in tree(path).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            public = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            if not (docstring or public or isinstance(node, ast.ImportFrom)):
                found.append(f"{place(path, node)}: {ast.unparse(node).splitlines()[0]}")
    assert not found, told(found, "A folder's __init__ re-exports its public names, nothing else:")


# ---------------------------------------------------------------- private names

TORCHS = set(dir(nn.Module()))  # private to torch, for the modules that extend its own


def private(name):
    return name.startswith("_") and not name.startswith("__") and name != "_"


@lru_cache
def defined(path):
    """The private names that a file gives to functions, classes, variables and attributes."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if private(name)} - TORCHS


def uses(path, others):
    """Places where a file names one of these private names, which it does not define itself."""
    others = others - defined(path)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute) and node.attr in others:
            yield f"{place(path, node)}: {ast.unparse(node)}"
        elif isinstance(node, ast.Constant) and node.value in others:  # getattr, mock.patch.object
            yield f'{place(path, node)}: "{node.value}"'


def test_private_names_stay_in_their_module():
    found = []
    for path in FILES:
        others = set().union(*(defined(other) for other in FILES if other != path))
        found += uses(path, others)
        for node, module, name in imported(path):
            if name is not None and private(name):
                found.append(f"{place(path, node)}: {name} of {'.'.join(module)}")
    assert not found, told(found, "No name with a leading underscore is used in another module:")


def test_tests_and_benchmarks_use_public_names_only():
    """A private module may be imported by the file that tests it: ``_state`` by ``test_state``."""
    ours = set().union(*(defined(path) for path in FILES))
    found = []
    for path in sorted([*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]):
        if path == Path(__file__):
            continue
        found += uses(path, ours)
        for node, name in imported_from_outside(path):
            hidden = [one for one in name.split(".") if private(one)]
            if hidden and path.stem != f"test{hidden[0]}":
                found.append(f"{place(path, node)}: {name}")
    assert not found, told(found, "Tests and benchmarks use public names of sc_bce only:")


def imported_from_outside(path):
    """(node, full name) of whatever a file of another folder imports from the package."""
    for node in ast.walk(tree(path)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from ((node, name) for name in names if name.split(".")[0] == "sc_bce")


# ---------------------------------------------------------------- sizes


def docstring_lines(*nodes):
    """The lines of the strings that are statements: docstrings, those of attributes too."""
    lines = set()
    for node in nodes:
        constant = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if constant and isinstance(node.value.value, str):
            lines |= set(range(node.lineno, node.end_lineno + 1))
    return lines


def code_lines(path):
    """The lines that hold a token which is neither comment nor docstring."""
    silent = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
        tokenize.ENCODING,
    }
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(path.read_text("utf-8")).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstring_lines(*ast.walk(tree(path))))


def test_the_package_stays_small():
    """What measures, repairs and trains; the command line and the integrations stand outside."""
    core = [path for path in FILES if room(parts(path)) not in OUTSIDE]
    counts = {str(path.relative_to(SOURCE)): code_lines(path) for path in core}
    total = sum(counts.values())
    largest = sorted(counts.items(), key=lambda item: -item[1])
    found = [f"{count:5} {name}" for name, count in largest]
    assert total <= MOST_CODE, told(found, f"{total} code lines of at most {MOST_CODE}:")


def test_a_file_is_read_in_one_sitting():
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in FILES}
    found = [f"{path.relative_to(ROOT)}: {n}" for path, n in lengths.items() if n > MOST_LINES]
    assert not found, told(found, f"A file has at most {MOST_LINES} lines, docstrings included:")


def test_a_function_fits_on_a_screen():
    """Its docstring is not counted."""
    found = []
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1 - len(docstring_lines(node.body[0]))
                if lines > MOST_IN_FUNCTION:
                    found.append(f"{place(path, node)}: {node.name} has {lines}")
    assert not found, told(found, f"A function has at most {MOST_IN_FUNCTION} lines:")


# ---------------------------------------------------------------- errors


def named_errors(node):
    """Exceptions that a node raises, makes, or passes on to be raised."""
    if isinstance(node, ast.Raise):
        yield node.exc
    elif isinstance(node, ast.Call):
        yield node.func
        if ast.unparse(node.func) not in ("isinstance", "issubclass", "suppress"):
            yield from node.args
            yield from (keyword.value for keyword in node.keywords)


def errors(path):
    """(node, name of the exception, innermost function around it)."""

    def walk(node, around):
        for child in ast.iter_child_nodes(node):
            for found in named_errors(child):
                if isinstance(found, ast.Name) and found.id in EXCEPTIONS:
                    yield child, found.id, around
            inner = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            yield from walk(child, child if inner else around)

    return walk(tree(path), None)


def may_lack(around):
    """Whether a function answers for an attribute: ``__getattr__``, or a property's setter."""
    setter = any(ast.unparse(one).endswith(".setter") for one in around.decorator_list)
    return setter or around.name == "__getattr__"


def test_errors_are_those_of_python_for_wrong_arguments():
    found = []
    for path in FILES:
        for node, name, around in errors(path):
            missing = name == "AttributeError" and around is not None and may_lack(around)
            extra = name == "ImportError" and room(parts(path)) in ("integrations", "plot")
            if not (name in USERS_ERRORS or missing or extra):
                found.append(f"{place(path, node)}: {name}")
    rule = (
        "Errors are ValueError, TypeError and IndexError; AttributeError in __getattr__ and in a "
        "property's setter, ImportError in integrations and plot:"
    )
    assert not found, told(found, rule)
