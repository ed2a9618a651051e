"""The form of an entry of `protections`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Protection:
    """A piece of code, what stands there when it is taken out, and the tests that must then fail."""

    numbers: tuple[int, ...]
    file: str
    text: str
    without: str
    tests: tuple[str, ...]
