"""Documents say what the code does: commands and options exist, modules are listed, figures are those measured."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import harvest.cli
import train.cli
from tests.bench import record
from tests.test_imports import LAYERS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
GROUPS: dict[str, click.Group] = {"harvest": harvest.cli.group, "train": train.cli.main}
COMMAND = re.compile(r"(?:python -m|torchrun .*-m) (harvest|train) ([^`#\n]*(?:\n {20,}[^`#\n]*)*)")


def commands() -> Iterator[tuple[Path, str, str]]:
    for path in PAGES:
        for stage, rest in COMMAND.findall(path.read_text()):
            yield path, stage, rest


def test_commands_and_their_options_exist() -> None:
    seen = 0
    for path, stage, rest in commands():
        line = re.split(r"\s{4,}(?=\S)(?!\[)|[;|)]\s|\.\.\. ", rest)[0]
        words = [word.strip("[],.'\"") for word in re.split(r"[\s|]+", line)]
        name = words[0]
        if not name or name.isupper():
            continue
        group = GROUPS[stage]
        assert name in group.commands, f"{path.name}: python -m {stage} {line}"
        known = {option for one in group.commands[name].params for option in (*one.opts, *one.secondary_opts)}
        for option in (word.split("=")[0] for word in words if word.startswith("--") and word != "--"):
            assert option in known | {"--help"}, f"{path.name}: {stage} {name} has no {option}"
            seen += 1
    assert seen > 40


@pytest.mark.parametrize("stage", list(GROUPS))
def test_every_command_is_told(stage: str) -> None:
    text = "\n".join(path.read_text() for path in PAGES)
    for name in GROUPS[stage].commands:
        assert re.search(rf"python -m {stage} [\w|]*\b{name}\b", text) or re.search(rf"\b{name}\b.*\bpack\b", text), (
            name
        )


def test_links_lead_somewhere() -> None:
    for path in PAGES:
        text = path.read_text()
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) + re.findall(r"src(?:set)?=\"([^\"]+)\"", text):
            if not target.startswith("http"):
                assert (path.parent / target).exists(), f"{path.name}: {target}"


def entries(tree: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the folder and the names of every line of a listing."""
    folders = list[str]()
    for indent, entry in re.findall(r"^    ( *)((?:[\w./]+, )*[\w./]+)", tree, re.M):
        depth = len(indent) // 2
        if entry.endswith("/"):
            folders[depth:] = [entry]
            yield "".join(folders), []
        else:
            yield "".join(folders[:depth]), entry.split(", ")


def test_every_module_is_listed_in_its_folder_and_in_the_order_of_imports() -> None:
    text = (ROOT / "docs" / "code.md").read_text()
    tree = text[text.index("## Modules") : text.index("## Make targets")]
    listed = [folder + name for folder, names in entries(tree) for name in names]
    own = [path for package in ("shared", "harvest", "train") for path in (ROOT / package).rglob("*.py")]
    there = {path.relative_to(ROOT).as_posix() for path in own if not path.name.startswith("__")}
    assert {name for name in listed if name.endswith(".py")} == {
        name for name in there if not name.startswith("harvest/embedded/")
    }
    for package, layers in LAYERS.items():
        order = [re.match(rf"{package}/(\w+)", name)[1] for name in listed if name.startswith(f"{package}/")]  # type: ignore[index]
        floors = {name: floor for floor, names in enumerate(layers)
                  for name in ([names] if isinstance(names, str) else names)}  # fmt: skip
        assert [floors[name] for name in order] == sorted(floors[name] for name in order)


def test_the_readme_lists_the_folders_of_the_code_page() -> None:
    """All of the two top levels, in the same order."""
    readme, text = (ROOT / "README.md").read_text(), (ROOT / "docs" / "code.md").read_text()
    short = readme[readme.index("## Code layout") :]
    tree = text[text.index("## Modules") : text.index("## Make targets")]
    ours = ("shared/", "harvest/", "train/")
    expected = [name for name, rest in entries(tree) if not rest and name.startswith(ours) and name.count("/") < 3]
    assert [name for name, _ in entries(short)] == expected


def test_figures_are_those_that_were_measured() -> None:
    figures = json.loads(record.FIGURES.read_text())
    assert record.PAGE.read_text() == record.page(figures)
    readme = record.README.read_text()
    assert readme == record.readme(readme, figures)


def test_every_line_of_the_verdict_is_told() -> None:
    code = (ROOT / "train" / "report" / "verdict.py").read_text()
    names = set(re.findall(r'_check\(\s*"([\w ]+)"', code))
    table = re.findall(r"^\| ([\w ]+) \|", (ROOT / "docs" / "report.md").read_text(), re.M)
    assert names and names <= set(table), names - set(table)
