"""The direction of the arrows: harvest -> shared <- train; no LLM library in train, no torch in shared."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("harvest", "train", "shared")
LLM_LIBRARIES = {"transformer_lens", "transformers", "datasets"}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
DURABLE = Path("shared/files/durable.py")


LAYERS = {
    "shared": (
        ("errors", "bounds", "keyed", "resources"), ("files", "check_settings"), "config",
        ("console", "splice_record", "hub"), "store", "command_line", "program",
    ),
    "harvest": (
        ("embedded", "settings", "hub", "digests"), "text", "llm", "writer", "run", "imports", "commands", "splice",
        "cli",
    ),
    "train": (
        ("data", "live"), ("read_settings", "run_folder"), "model", "parallel", "evaluation", ("duplicates", "samples"),
        "redundancy", ("run", "wandb_sync"), "locked_run", "probe", ("compare", "interchange"), "explain", "report",
        ("commands", "tables"), "sweeps", ("cli_formats", "cli_runs", "cli_settings"), "cli",
    ),
}  # fmt: skip
"""Each package's folders and modules from the bottom up: what stands in a line imports only from lines before it."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> set[str]:
    """Every module that `path` imports, also inside functions and by a literal name."""
    package = module_of(path).split(".") if path.name == "__init__.py" else module_of(path).split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            found |= {arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)}
    return found


def roots(path: Path) -> set[str]:
    return {module.split(".")[0] for module in imports(path)}


def files_of(package: str) -> list[Path]:
    return [path for path in FILES if path.relative_to(ROOT).parts[0] == package]


def offenders(package: str, forbidden: set[str]) -> list[str]:
    return [
        f"{path.relative_to(ROOT)} imports {name}" for path in files_of(package) for name in roots(path) & forbidden
    ]


def test_there_is_something_to_look_at():
    assert all(files_of(package) for package in PACKAGES)
    assert "shared" in roots(ROOT / "shared" / "store" / "store.py")


MAY_IMPORT_TRAIN = {"harvest/splice/replacements.py"}
"""What needs the LLM and a transcoder at once (docs/decisions/013-splice.md)."""


def test_the_stages_never_import_each_other():
    """But for one module of stage 1, which reads transcoders."""
    assert {one.split(" ")[0] for one in offenders("harvest", {"train"})} == MAY_IMPORT_TRAIN
    assert offenders("train", {"harvest"}) == []


def test_shared_imports_neither_stage_nor_torch():
    assert offenders("shared", {"harvest", "train", "torch", *LLM_LIBRARIES}) == []


@pytest.mark.parametrize("package", LAYERS)
def test_folders_import_only_from_layers_below(package: str) -> None:
    floors = {name: floor for floor, names in enumerate(LAYERS[package])
              for name in ([names] if isinstance(names, str) else names)}  # fmt: skip
    upward = []
    for path in files_of(package):
        if (here := layer_of(module_of(path), package)) is None:
            continue
        assert here in floors, f"{here} of {package} is in no layer"
        for target in imports(path):
            there = layer_of(target, package)
            if there is not None and there in floors and there != here and floors[there] >= floors[here]:
                upward.append(f"{module_of(path)} imports {target}")
    assert upward == []


def layer_of(module: str, package: str) -> str | None:
    """The folder or module directly below a package; none for what is elsewhere, or starts a program."""
    parts = module.split(".")
    return parts[1] if parts[0] == package and len(parts) > 1 and parts[1] != "__main__" else None


def test_nothing_under_train_names_an_llm_library():
    assert offenders("train", LLM_LIBRARIES) == []


def test_tests_are_not_imported_by_what_they_test():
    assert [offenders(package, {"tests"}) for package in PACKAGES] == [[], [], []]


def test_modules_import_each_other_without_cycles():
    """Counting only imports at the top of a module: one inside a function is the way out of a cycle."""
    modules = {module_of(path): path for path in FILES}
    edges: dict[str, set[str]] = {}
    for name, path in modules.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        top = {ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)}
        edges[name] = {target for target in imports(path) & modules.keys() if any(target in line for line in top)}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for target in sorted(edges[name] - {name}):
                visit(target, (*trail, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr


BLOCK = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"blocked: {{name}}")

sys.meta_path.insert(0, Blocked())
for name in {modules}:
    importlib.import_module(name)
"""


@pytest.mark.slow
def test_every_module_of_train_can_be_imported_without_an_llm_library():
    """Also by a road the source does not show: the process refuses these libraries, and the other stage."""
    modules = [module_of(path) for path in files_of("train") if path.name not in ("__main__.py", "triton.py")]
    run(BLOCK.format(blocked=sorted(LLM_LIBRARIES | {"harvest"}), modules=modules))


def test_shared_can_be_imported_without_torch():
    modules = [module_of(path) for path in files_of("shared")]
    run(BLOCK.format(blocked=sorted(LLM_LIBRARIES | {"torch", "harvest", "train"}), modules=modules))


ONLY_DURABLE = {
    *(f"os.{name}" for name in ("rename", "renames", "replace", "fsync", "fdatasync", "link", "statvfs")),
    *(f"os.{name}" for name in ("truncate", "ftruncate", "posix_fallocate")),
    *(f"shutil.{name}" for name in ("move", "disk_usage")),
    *(f"tempfile.{name}" for name in ("NamedTemporaryFile", "mkstemp")),
    "fcntl.flock",
    "fcntl.lockf",
    "fcntl",
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: os.fspath(path.relative_to(ROOT)))
def test_only_durable_renames_syncs_locks_or_measures_free_space(path):
    if path.relative_to(ROOT) == DURABLE:
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | imports(path)
    assert used & ONLY_DURABLE == set()
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    moved = [call for call in calls if isinstance(call, ast.Attribute) and call.attr == "rename"]
    assert not moved, f"line {moved[0].lineno}: {ast.unparse(moved[0])}"


def test_the_list_above_finds_durable_itself():
    tree = ast.parse((ROOT / DURABLE).read_text(encoding="utf-8"))
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)} | imports(ROOT / DURABLE)
    assert {"os.rename", "os.replace", "os.fsync", "shutil.disk_usage", "fcntl"} <= used & ONLY_DURABLE
