"""What a Triton kernel moves through the device's memory at least: what it reads, once, and what it writes, once.

Of most kernels that is all they are given. Those below touch a part of it, or write what they read. How many pairs lie
above the guess of a threshold is not known beforehand: as many as are selected are counted.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

Given = dict[str, Any]
"""Arguments by name; tensors as they lie on the CPU"""

_few: dict[int, int] = {}
"""How many different latents pairs name at most, by the address of their latents or rows, where that is known"""


def moved(kernel: str, given: Given) -> int:
    """Return the bytes that a launch moves."""
    if kernel == "_row_topk":
        return _row_topk(given)
    count = _PARTLY.get(kernel, lambda one: _sum(one, *(name for name in one if isinstance(one[name], Tensor))))
    return count(given)


def _sum(given: Given, *names: str) -> int:
    return sum(given[name].nbytes for name in names)


def _rows(table: Tensor, count: int) -> int:
    """Bytes of `count` rows of a table, each different, at most all."""
    return min(table.nbytes, count * table.shape[-1] * table.element_size())


def _latents(given: Given, name: str) -> int:
    pairs = given[name]
    return min(len(pairs), _few.get(pairs.data_ptr(), len(pairs)))


def _every(given: Given, name: str, step: str = "step") -> int:
    """Bytes of a table whose every so many-th row is read, or all of it."""
    size: int = given[name].nbytes
    return size // given[step] if given["EVERY"] else size


def _row_topk(given: Given) -> int:
    """Where no latent is `among`, only that is read, and the first k are named by every row."""
    found, searched = ("rows", "latents", "values", "starts"), True
    if given["AMONG"]:
        searched = bool(given["among"].any())
    for name in ("rows", "latents"):
        _few.pop(given[name].data_ptr(), None)
        if not searched:
            _few[given[name].data_ptr()] = given["k"]
    return _sum(given, "among", *found) + (_every(given, "pre_acts", "every") if searched else 0)


def _kept(given: Given) -> int:
    return 8 * int(given["n"])


def _sums(given: Given) -> int:
    both = _sums_of(given, "", given["PARTNERS"]) + (_sums_of(given, "other_", False) if given["SIDES"] == 2 else 0)
    return _sum(given, "order", "starts", "rows", *(["extra_slopes", "extra_rows"] if given["EXTRA"] else [])) + both


def _sums_of(given: Given, start: str, partners: bool) -> int:
    table, out, norms = given[f"{start}table"], given[f"{start}out"], given[f"{start.upper()}NORMS"]
    add = given[f"{start.upper()}ADD"]
    latents = _latents(given, "rows") if add else len(out)
    others = _rows(given["matrix"], latents) if norms > 1 else 0
    if partners:
        others += _sum(given, "partner_order", "partner_starts", "slopes", "partners")
        others += _rows(given["matrix"], len(given["slopes"])) if norms < 2 else 0  # else they are read above
    return (
        _sum(given, f"{start}weights")
        + _rows(table, len(given["order"]))
        + (1 + add) * _rows(out, latents)
        + others
        + (norms * _rows(given[f"{start}squares"].t(), latents) if norms else 0)
    )


def _shares(given: Given) -> int:
    """Parts of sums; the pairs are none of those that were summed before, and the table's rows were not summed so."""
    sides = ("", "other_")[: given["SIDES"]]
    summed = _rows(given["table"], given["height"]) if given["ROWS"] else 0
    return sum(_sum(given, f"{side}shares", f"{side}sums") for side in sides) + summed


def _added(given: Given) -> int:
    """Parts, and the rows that are made of them and what these are added to."""
    sides, slots = ("", "other_")[: given["SIDES"]], given["slots"]
    total = given["every_row"].nbytes if given["ROWS"] else 0
    parts = sum(_sum(given, f"{side}shares", f"{side}sums") for side in sides)
    return parts + total + sum(2 * _rows(given[f"{side}out"], slots) for side in sides)


def _adam(given: Given) -> int:
    sides = ("", "other_", "bias_", "last_") if given["ALL"] else ("",)
    size = sum(3 * 2 * given[f"{side}first"].nbytes + given[f"{side}grad"].nbytes for side in sides)
    return size + (_sum(given, "other_shadow", "bias_shadow") if given["SHADOW"] else 0)


def _prepare(given: Given) -> int:
    """Of the tables the rows that are asked for."""
    found = _sum(given, "places") if given["FOUND"] else 0
    sides = ("", "other_")
    return found + sum(
        _rows(given[f"{side}table"], len(given["out"])) + _sum(given, f"{side}mean", f"{side}longest", f"{side}out")
        for side in sides
    )


_PARTLY: dict[str, Callable[[Given], int]] = {
    "_keep": lambda one: _sum(one, "pre_acts", "places", "counts") + 2 * one["room"],
    "_histogram": lambda one: _kept(one) // 2 + one["counts"].nbytes,
    "_count": lambda one: _kept(one) // 2 + _sum(one, "more", "equal"),
    "_compact": lambda one: _kept(one) + _sum(one, "more", "equal", "rows", "latents", "kept_values", "starts"),
    "_products": lambda one: (
        _sum(one, "rows", "latents", "out", "left") + _rows(one["right"], _latents(one, "latents"))
    ),
    "_prefix_loss": lambda one: (
        _sum(one, "values", "latents", "starts", "base", "meet", "errors", "left", "grad")
        + _every(one, "y")
        + _rows(one["W_dec"], _latents(one, "latents"))
        + (_every(one, "x") + _rows(one["right"], _latents(one, "latents")) if one["ENCODE"] else 0)
    ),
    "_sums_by_latent": _sums,
    "_long_sums": _shares,
    "_add_long_sums": _added,
    "_row_squares": lambda one: _sum(one, "grad", "squares", *(["rows"] if one["UNIT"] else [])),
    "_noted_squares": lambda one: _sum(
        one,
        *("parts", "squares", "other_parts", "other_squares"),
        *(["along"] if one["FIRST"] else []),
        *(["other_along"] if one["SECOND"] else []),
    ),
    "_weigh": lambda one: _sum(one, "figures", "weights", "out", *(["dead"] if one["AUXK"] else [])),
    "_adam": _adam,
    "_prepare": _prepare,
    "_count_fired": lambda one: _sum(one, "order", "starts", "values", "since", "since", "dead"),
    "_add_batch": lambda one: _sum(one, "sums", "sums", "target", "figures"),
    "_meet": lambda one: (
        _sum(one, "values", "rows", "latents", "starts", "slopes", "slopes", "terms")
        + _sum(one, "order", "pair_starts", "partners", "strength")
    ),
    "_quiet": lambda one: _sum(one, "rows", "W_enc", "b_enc", "slopes", "terms"),
    "_excess": lambda one: _sum(one, "latents", "terms", "slopes") + _rows(one["rows"], len(one["latents"])),
}
