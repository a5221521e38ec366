"""The arrows between folders, what the package may not call, and how long a file and a function may be."""

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ARROWS = {  # folder -> what it may import of ours; root files may import every folder
    "ir": set[str](), "frontends": {"ir"}, "passes": {"ir"}, "lowering": {"ir"}, "runtime": {"ir", "lowering"},
}  # fmt: skip
OUTSIDE = ("tests", "examples", "benchmarks")  # nothing imports them
PACKAGE = sorted(p for folder in ARROWS for p in (ROOT / folder).rglob("*.py")) + sorted(ROOT.glob("*.py"))
EVERYTHING = [*PACKAGE, *sorted(p for folder in OUTSIDE for p in (ROOT / folder).rglob("*.py"))]
MODULES = {
    "pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "importlib", "runpy", "code", "imp", "yaml",
}  # fmt: skip
CALLS = {
    "eval", "exec", "__import__", "torch.load", "torch.save", "np.load", "numpy.load", "torch.hub.load",
    "os.system", "os.popen",
}  # fmt: skip
ALLOWED = {  # (file, what it calls): each with the reason that no file can choose what runs
    ("lowering/gpu/sources.py", "importlib"),  # runs the text that the generator has in hand, whatever the kept file holds
    ("cli_trace.py", "importlib"),  # the person at the command line names a module of their own, as with `python -m`
}
LINES, FUNCTION = 400, 40


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def nodes(text: str) -> tuple[ast.AST, ...]:
    """All that a file says; it is read once for all that is asked of it."""
    return tuple(ast.walk(ast.parse(text)))


def named(node: ast.AST) -> str:
    """`torch.hub.load` of an attribute chain; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    inner = named(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{inner}.{node.attr}" if inner and isinstance(node, ast.Attribute) else ""


def imports(of: Iterable[ast.AST], package: tuple[str, ...]) -> Iterator[tuple[str, int]]:
    """Absolute names of all that is imported, in functions and under TYPE_CHECKING too, each with its line."""
    for node in of:
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", node.lineno) for alias in node.names)


def home(path: Path) -> tuple[str, ...]:
    """The package that a file's relative imports start from."""
    return ("plait", *path.relative_to(ROOT).parts[:-1])


def wrong_arrows(text: str, package: tuple[str, ...]) -> list[str]:
    """Imports that no arrow allows; a root file has all arrows, and no file reaches outside the package."""
    folder, found = package[1] if len(package) > 1 else "", list[str]()
    for target, line in imports(nodes(text), package):
        parts = target.split(".")
        ours = parts[1] if parts[0] == "plait" and len(parts) > 1 else ""
        outward = parts[0] in OUTSIDE or ours in OUTSIDE
        sideways = folder in ARROWS and parts[0] == "plait" and ours not in {folder, *ARROWS[folder]}
        if outward or sideways:
            found.append(f"line {line}: {target}")
    return found


def wrong_styles(text: str, package: tuple[str, ...]) -> list[str]:
    """Imports of ours that are absolute inside a folder, or relative outside of all of them."""
    inside = len(package) > 1 and package[1] in ARROWS
    every = [n for n in nodes(text) if isinstance(n, ast.Import | ast.ImportFrom)]
    relative = [n for n in every if isinstance(n, ast.ImportFrom) and n.level]
    absolute = [n for n in every if n not in relative and any(t.split(".")[0] == "plait" for t, _ in imports([n], package))]
    return [f"line {n.lineno}" for n in (absolute if inside else relative)]


def ways_to_run_text(text: str, package: tuple[str, ...]) -> set[str]:
    """What a file imports or calls that runs code which a file may have brought."""
    imported = {t for t, _ in imports(nodes(text), package)}
    brought = {t.split(".")[0] for t in imported} & MODULES
    spelled = {named(n) for n in nodes(text) if isinstance(n, ast.Name | ast.Attribute)} & CALLS
    froms = imported & CALLS
    keywords = {k.arg for n in nodes(text) if isinstance(n, ast.Call) for k in n.keywords}
    open_ended = {f"{k}=True" for k in ("allow_pickle", "trust_remote_code", "shell") if k in keywords}
    return brought | spelled | froms | open_ended


def long_functions(text: str) -> list[str]:
    functions = [n for n in nodes(text) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [f"{n.name}: {length} lines" for n in functions if (length := (n.end_lineno or 0) - n.lineno + 1) > FUNCTION]


def faults(path: Path) -> list[str]:
    """All that is wrong with a file."""
    text, package = path.read_text(), home(path)
    long = [f"{len(text.splitlines())} lines"] if len(text.splitlines()) > LINES else []
    found = [*long, *long_functions(text), *wrong_styles(text, package)]
    if path not in PACKAGE:
        return found
    return found + wrong_arrows(text, package) + [x for x in ways_to_run_text(text, package) if (name(path), x) not in ALLOWED]


@pytest.mark.parametrize("path", EVERYTHING, ids=name)
def test_a_file_keeps_the_arrows_runs_no_text_and_fits_in_the_eye(path: Path) -> None:
    assert faults(path) == []


def test_every_folder_is_known() -> None:
    """A new folder of Python needs an arrow here, and a line in pyproject's packages."""
    folders = {p.relative_to(ROOT).parts[0] for p in ROOT.glob("*/*.py")}
    assert {f for f in folders if not f.startswith(".")} - set(OUTSIDE) - {"build", "dist"} == set(ARROWS)
    faces = [p for folder in ARROWS for p in (ROOT / folder).rglob("__init__.py")]
    inner = {".".join(home(p)) for p in faces}
    assert all(f'"{package}"' in (ROOT / "pyproject.toml").read_text() for package in inner)
    assert {what for _, what in ALLOWED} <= MODULES | CALLS and all((ROOT / file).exists() for file, _ in ALLOWED)


@pytest.mark.parametrize(("folder", "line"), [
    ("ir", "from plait.passes import x"), ("ir", "from ..runtime import x"), ("ir.ops", "from ...lowering import x"),
    ("ir", "import plait.frontends.load"),
    ("passes", "from ..lowering import x"), ("lowering", "from ..runtime import x"), ("frontends", "from .. import passes"),
    ("runtime", "from ..passes import x"),
    ("ir", "from plait import compile"), ("runtime", "from tests.conftest import x"), ("", "from benchmarks import cases"),
    ("passes", "from ..benchmarks import x"),
])  # fmt: skip
def test_a_wrong_arrow_is_seen(folder: str, line: str) -> None:
    package = ("plait", *filter(None, folder.split(".")))
    for text in (line, f"def f():\n    {line}\n", f"if TYPE_CHECKING:\n    {line}\n"):
        assert len(wrong_arrows(text, package)) == 1
    assert wrong_arrows("from .op import x\nimport torch\nfrom . import sizes\n", package) == []
    assert wrong_arrows("from ..ir import x\nfrom ..lowering.program import y\n", ("plait", "runtime")) == []


@pytest.mark.parametrize("text", [
    "import pickle", "from pickle import loads", "def f():\n    import importlib.util", "x = eval('1')", "run = exec",
    "torch.load(p)", "from torch import load",
    "np.load(p, allow_pickle=True)", "import yaml", "__import__(name)", "subprocess.run(x, shell=True)",
    "from os import system", "torch.hub.load(x)",
])  # fmt: skip
def test_a_way_to_run_text_is_seen(text: str) -> None:
    assert ways_to_run_text(text, ("plait", "runtime"))
    fine = "import ast, re\nmodel.eval()\nre.compile(x)\nast.literal_eval(x)\nsafetensors.torch.load_file(p)\njson.load(f)\n"
    assert not ways_to_run_text(fine, ("plait", "runtime"))


def test_a_long_function_is_seen() -> None:
    body = "    x = 1\n" * FUNCTION
    assert long_functions(f"def f():\n{body}") == [f"f: {FUNCTION + 1} lines"] and not long_functions(f"def f():\n{body[10:]}")
