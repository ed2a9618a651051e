"""What a power cut could leave of a folder, from the log of operations below it.

A file that was not forced to disk since it was last written has lost that: it is as it was before, empty, or as long as
it should be and full of zeros there. A name of a folder that was not forced to disk is as it was before, or as now.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Literal, get_args

from tests.faults.inject import Operation

Lost = Literal["cut", "zeros"]
Tree = dict[str, bytes | None]
"""Files and their content by path below the folder; None for a folder."""


@dataclass(eq=False)
class File:
    data: bytearray = field(default_factory=bytearray)
    forced: bytes = b""
    """What is surely on disk."""
    inode: int = 0

    def left(self, lost: Lost) -> bytes:
        return self.forced + bytes(len(self.data) - len(self.forced) if lost == "zeros" else 0)


@dataclass(eq=False)
class Folder:
    names: "dict[str, File | Folder]" = field(default_factory=dict)
    forced: "dict[str, File | Folder]" = field(default_factory=dict)


class Disk:
    """A folder that is empty at first, after some operations."""

    def __init__(self, root: Path) -> None:
        self._root, self._top = root.resolve(), Folder()
        self.published: dict[str, set[bytes]] = {}
        """By path, what files held when they got that name: other than what was written to them there."""

    def apply(self, operation: Operation) -> None:
        """Do to this folder what was done to the real one."""
        if operation.failed:
            return
        folder, name = self._find(operation.path)
        if folder is None:  # the folder itself
            if operation.kind == "f":
                self._top.forced = dict(self._top.names)
            return
        there = folder.names.get(name)
        if there is None and operation.kind in "fu":
            there = _renamed_unseen(folder, name, operation.inode)
        if operation.kind == "o":
            if there is None:
                folder.names[name] = File(inode=operation.inode)
            elif operation.place and isinstance(there, File):
                there.data.clear()
        elif operation.kind == "m":
            folder.names[name] = Folder()
        elif operation.kind == "u":
            del folder.names[name]
        elif operation.kind in "rl":
            target, new = self._find(operation.other)
            assert target is not None and there is not None
            target.names[new] = there
            if operation.kind == "r":
                del folder.names[name]
            self._note(operation.other, there)
        elif isinstance(there, Folder):
            assert operation.kind == "f"
            there.forced = dict(there.names)
        else:
            assert there is not None, operation
            _change(there, operation)

    def left(self) -> Iterator[Tree]:
        """The states that a power cut may leave, none twice: of folders, none, all, one, or all but one as now."""
        folders = [self._top, *(node for _, node in _all(self._top, "") if isinstance(node, Folder))]
        changed = [folder for folder in folders if folder.names != folder.forced]
        chosen = [set(), set(changed), *({one} for one in changed), *(set(changed) - {one} for one in changed)]
        seen = set()
        for kept, lost in product(chosen, get_args(Lost)):
            found = dict(_walk(self._top, "", kept, lost))
            if (key := hash(tuple(found.items()))) not in seen:
                seen.add(key)
                yield found

    def now(self) -> Tree:
        """What processes see."""
        return {path: bytes(node.data) if isinstance(node, File) else None for path, node in _all(self._top, "")}

    def _find(self, path: str) -> tuple[Folder | None, str]:
        parts = Path(path).relative_to(self._root).parts
        if not parts:
            return None, ""
        folder = self._top
        for part in parts[:-1]:
            inner = folder.names[part]
            assert isinstance(inner, Folder), path
            folder = inner
        return folder, parts[-1]

    def _note(self, path: str, node: File | Folder) -> None:
        name = str(Path(path).relative_to(self._root))
        found = [("", node)] if isinstance(node, File) else list(_all(node, ""))
        for inner, file in found:
            if isinstance(file, File):
                self.published.setdefault(f"{name}/{inner}" if inner else name, set()).add(bytes(file.data))


def replay(root: Path, operations: Iterable[Operation]) -> Disk:
    """A folder after all of some operations."""
    disk = Disk(root)
    for operation in operations:
        disk.apply(operation)
    return disk


def write(tree: Tree, folder: Path) -> None:
    """Make `folder`, which is empty or missing, hold a tree."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in tree.items():
        path = folder / name
        if data is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def read(folder: Path) -> Tree:
    """What lies in `folder`."""
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in found}


def _renamed_unseen(folder: Folder, name: str, inode: int) -> File | Folder:
    """The file that safetensors wrote under another name, and renamed by a bare system call."""
    (old,) = [other for other, node in folder.names.items() if isinstance(node, File) and node.inode == inode]
    folder.names[name] = folder.names.pop(old)
    return folder.names[name]


def _change(file: File, operation: Operation) -> None:
    if operation.kind == "w":
        file.data.extend(bytes(max(0, operation.place - len(file.data))))
        file.data[operation.place : operation.place + len(operation.data)] = operation.data
    elif operation.kind == "t":
        del file.data[operation.place :]
        file.data.extend(bytes(operation.place - len(file.data)))
    elif operation.kind == "a":
        file.data.extend(bytes(max(0, operation.place - len(file.data))))
    else:
        assert operation.kind == "f", operation
        file.forced = bytes(file.data)


def _walk(folder: Folder, prefix: str, kept: set[Folder], lost: Lost) -> Iterator[tuple[str, bytes | None]]:
    """`kept`: folders whose names are as now."""
    for name, node in sorted((folder.names if folder in kept else folder.forced).items()):
        if isinstance(node, File):
            yield prefix + name, node.left(lost)
        else:
            yield prefix + name, None
            yield from _walk(node, f"{prefix}{name}/", kept, lost)


def _all(folder: Folder, prefix: str) -> Iterator[tuple[str, File | Folder]]:
    for name, node in sorted(folder.names.items()):
        yield prefix + name, node
        if isinstance(node, Folder):
            yield from _all(node, f"{prefix}{name}/")
