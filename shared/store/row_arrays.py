"""The types that a store keeps activations in, and the arrays that hold the rows of a stratum. Pure."""

from collections.abc import Mapping
from typing import Literal

from shared.store.arrays import ArraySpec
from shared.store.strata import Stratum

SIDES = ("source", "target")
FloatType = Literal["bfloat16", "float16", "float32"]
StorageType = Literal["bfloat16", "float16", "float32", "int8"]
"""`int8` has a scale for each row and one for each dimension (`shared.store.int8_rows`)."""
STORAGE_DTYPES: dict[StorageType, str] = {
    "bfloat16": "uint16",
    "float16": "float16",
    "float32": "float32",
    "int8": "int8",
}
"""The Zarr type that holds each storage type: zarr has no bfloat16, so its bits are kept as uint16."""
ROW_SCALE, BLOCK_UNITS = "row_scale", "block_units"
"""Arrays beside int8 rows, of both sides together: half as many files as one for each."""


def captured_as(storage: StorageType) -> FloatType:
    """Return the type that rows have in memory until their block is written; `int8` is made of bfloat16 then."""
    return "bfloat16" if storage == "int8" else storage


def row_arrays(
    storage: StorageType, hooks: Mapping[str, str], stratum: Stratum, d_in: int, d_out: int
) -> dict[str, ArraySpec]:
    """Return the arrays of a stratum, by name; `hooks` by side."""
    kind, found = STORAGE_DTYPES[storage], dict[str, ArraySpec]()
    for column, (side, width) in enumerate(zip(SIDES, (d_in, d_out), strict=True)):
        marks = {"torch_dtype": storage, "hook_name": hooks[side]}
        if storage == "int8":
            marks["value"] = _formula(column, side, stratum, d_in, d_out)
        found[side] = _spec(stratum, side, kind, width, stratum.rows, ("row", f"{side}_dimension"), **marks)
    for name, kind in (("position", "uint16"), ("sequence", "uint32"), ("offset", "uint16")):
        found[name] = _spec(stratum, name, kind, None, stratum.rows, ("row",))
    if storage == "int8":
        both = ("block_mean_and_unit", "source_and_target_dimension")
        found[ROW_SCALE] = _spec(stratum, ROW_SCALE, "float32", 2, stratum.rows, ("row", "side"))
        found[BLOCK_UNITS] = _spec(stratum, BLOCK_UNITS, "float32", d_in + d_out, 2, both)
    return found


def _spec(
    stratum: Stratum, name: str, dtype: str, width: int | None, rows: int, names: tuple[str, ...], **attributes: str
) -> ArraySpec:
    return ArraySpec(
        path=f"strata/{stratum.name}/{name}",
        dtype=dtype,
        width=width,
        rows_per_block=rows,
        dimension_names=names,
        attributes=tuple(attributes.items()),
    )


def _formula(column: int, side: str, stratum: Stratum, d_in: int, d_out: int) -> str:
    """Return the numbers that a side's int8 rows stand for, for whoever opens the array elsewhere."""
    dimensions = f"{d_in}:{d_in + d_out}" if column else f"0:{d_in}"
    return (
        f"{side}[row] * {ROW_SCALE}[row, {column}] * {BLOCK_UNITS}[2 * block + 1, {dimensions}] "
        f"+ {BLOCK_UNITS}[2 * block, {dimensions}], block = row // {stratum.rows}"
    )
