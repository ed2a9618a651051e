"""What very large stores cost to make, keep and train on, and what the bottleneck is: docs/scale.md, which this writes.

    python -m tests.bench.scale

writes docs/benchmarks.json and docs/benchmarks.md under "scale, MODEL", and docs/scale.md. Bytes are exact. Rates of
this project are those of docs/benchmarks.json; those of a GPU there are estimates from counts. What a cluster has and
costs is stated in `INPUTS`. Nothing here was run at this size: whatever is not bytes is an estimate, and is called one.
"""

import json
from dataclasses import dataclass

from tests.bench.record import ROOT, SMOKE, record, show, sized

DOCUMENT = ROOT / "docs" / "scale.md"
TOKENS = sized(10**9, 10**6)
BATCH, WIDE, COUNTED = 4096, 8, 2304
"""Rows of a step, latents of a transcoder per dimension, and the width that the step's estimate is of."""
MARKS = 8
"""Bytes of a row's position, sequence and offset."""
SCALES = 8
"""Bytes of the scales of a pair in int8; those of a block's dimensions are a ten thousandth of its rows."""
FLOPS = "bfloat16 throughput of a GPU in a forward pass"
SHARED, DRIVES = "throughput of shared storage, per node", "read rate of a node's own drives"
CORES, KEEPING = "cores of a node that gather or unpack rows", "object storage of one TB for a month"
INPUTS: dict[str, tuple[float, str]] = {
    "GPUs of a node": (8, "H200"),
    "a GPU's hour": (3.5, "$"),
    FLOPS: (400, "TFLOP/s"),
    SHARED: (12.5, "GB/s"),
    DRIVES: (25, "GB/s"),
    CORES: (96, "cores"),
    KEEPING: (23, "$"),
}
"""Assumed, and stated on the page; a change here changes every figure that follows from it."""
MEASURED = {
    "unpacking": ("packing: ", "byte shuffle, level 4: unpacking, one thread, median"),
    "packing ratio": ("packing: ", "byte shuffle, level 4: bytes before over after"),
    "reading": ("reading: d 2304", "warm: rows of a batch in runs of 64"),
    "step": ("gpu counts, kernels triton: B 4,096", "ESTIMATE of a step on H200"),
}
"""Bench and name of what is taken from docs/benchmarks.json."""
SHOWN = {"byte shuffle, level 4: bytes before over after": "byte shuffle, level 4: compression ratio"}
"""How the page names what has another name there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """As much of an LLM's shape as decides these figures."""

    name: str
    width: int
    layers: int
    parameters: float
    """Without embeddings: what a token is multiplied with."""

    @property
    def row_bytes(self) -> int:
        """A pair in bfloat16, with its marks."""
        return 4 * self.width + MARKS

    @property
    def int8_row_bytes(self) -> int:
        """A pair in int8, with its marks and scales."""
        return 2 * self.width + MARKS + SCALES


MODELS = (
    Model(name="Gemma 2 2B, all 26 layers", width=2304, layers=26, parameters=2.02e9),
    Model(name="Gemma 3 27B, all 62 layers", width=5376, layers=62, parameters=25.6e9),
    Model(name="Gemma 3 27B, one layer of 62", width=5376, layers=1, parameters=25.6e9 / 62 * 41),
)
"""The last is cut after layer 40, as a harvest cuts it."""
Figures = dict[str, tuple[float, str]]


def main() -> None:
    """Compute, record, and write the page."""
    known = measured()
    for model in MODELS:
        record(
            f"scale, {model.name}",
            "python -m tests.bench.scale",
            figures_of(model, {key: value for key, (value, _) in known.items()}),
            on="arithmetic",
        )
    if not SMOKE:
        DOCUMENT.write_text(page(known))


def measured() -> Figures:
    """Return what other benches measured, by its key in `MEASURED`."""
    figures = json.loads((ROOT / "docs" / "benchmarks.json").read_text())
    return {
        key: next((f["value"], f["unit"]) for f in figures if f["bench"].startswith(bench) and f["name"] == name)
        for key, (bench, name) in MEASURED.items()
    }


def figures_of(model: Model, known: dict[str, float]) -> Figures:
    """Return bytes, rates, hours and dollars of a model's stores of `TOKENS`, and of training on them."""
    given = {name: value for name, (value, _) in INPUTS.items()}
    gpus, dollars = given["GPUs of a node"], given["GPUs of a node"] * given["a GPU's hour"]
    shared, drives, cores = given[SHARED] * 1e9, given[DRIVES] * 1e9, given[CORES]
    pairs = TOKENS * model.layers
    stored = pairs * model.row_bytes
    packed = stored / known["packing ratio"]
    computing = TOKENS * 2 * model.parameters / (gpus * given[FLOPS] * 1e12)
    moving = stored / shared
    step = known["step"] / 1e3 * (model.width / COUNTED) ** 2  # the weights' bytes, and the products, grow so
    training = pairs / BATCH * step / gpus
    wanted = BATCH * model.row_bytes / step
    return {
        "a pair of one layer": (model.row_bytes, "bytes"),
        "all pairs": (stored / 1e12, "TB"),
        "the pairs of one layer": (stored / model.layers / 1e12, "TB"),
        "all pairs, packed, ESTIMATE": (packed / 1e12, "TB"),
        "all pairs as int8": (pairs * model.int8_row_bytes / 1e12, "TB"),
        "storing them packed for a month, ESTIMATE": (packed * 1e-12 * given[KEEPING], "$"),
        "harvest on one node, computing, ESTIMATE": (computing / 3600, "h"),
        "harvest on one node, writing, ESTIMATE": (moving / 3600, "h"),
        "cost of the harvest, from the longer of the two times, ESTIMATE": (
            max(computing, moving) / 3600 * dollars, "$",
        ),
        "GPUs that saturate shared storage, harvesting, ESTIMATE": (computing * gpus / moving, "GPUs"),
        "a step on one GPU, ESTIMATE": (step * 1e3, "ms"),
        "training on one node, computing, ESTIMATE": (training / 3600, "h"),
        "training on one node, reading, ESTIMATE": (moving / 3600, "h"),
        "cost of training, from the longer of the two times, ESTIMATE": (max(training, moving) / 3600 * dollars, "$"),
        "read rate of one GPU, training, ESTIMATE": (wanted / 1e9, "GB/s"),
        "GPUs that saturate shared storage, training, ESTIMATE": (shared / wanted, "GPUs"),
        "GPUs that saturate a node's drives, training, ESTIMATE": (drives / wanted, "GPUs"),
        "GPUs that saturate a node's cores, gathering rows, ESTIMATE": (
            known["reading"] * (4 * COUNTED) * cores / wanted, "GPUs",
        ),
        "GPUs that saturate a node's cores, unpacking rows, ESTIMATE": (
            known["unpacking"] * 1e6 * cores / wanted, "GPUs",
        ),
    }  # fmt: skip


def page(known: Figures) -> str:
    """Return docs/scale.md."""
    tables = {model.name: figures_of(model, {key: value for key, (value, _) in known.items()}) for model in MODELS}
    names = list(tables[MODELS[0].name])
    rows = [f"| figure | {' | '.join(tables)} | |", "|---|" + "---:|" * len(tables) + "---|"]
    for name in names:
        values = " | ".join(rounded(tables[model.name][name][0]) for model in MODELS)
        rows.append(f"| {name} | {values} | {tables[MODELS[0].name][name][1]} |")
    inputs = [f"| {name} | {show(value)} | {unit} |" for name, (value, unit) in INPUTS.items()]
    taken = [
        f"| {bench.rstrip(': ')}: {SHOWN.get(name, name)} | {show(known[key][0])} | {known[key][1]} |"
        for key, (bench, name) in MEASURED.items()
    ]
    return TEXT.format(
        table="\n".join(rows),
        inputs="\n".join(["| assumed | | |", "|---|---:|---|", *inputs]),
        taken="\n".join(["| taken from [benchmarks.md](benchmarks.md) | | |", "|---|---:|---|", *taken]),
        tokens=f"{TOKENS:,}", batch=f"{BATCH:,}", wide=WIDE,
        small=f"{MODELS[0].width:,}", large=f"{MODELS[1].width:,}",
    )  # fmt: skip


def rounded(value: float) -> str:
    """Three digits that count; an integer in full."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


TEXT = """\
# Large stores

What a billion tokens of a large model take: bytes, hours, dollars, and which resource runs out first.

Written by `python -m tests.bench.scale`: do not edit it. The table is for {tokens} tokens, with a pair for every
token of each layer in bfloat16, and a transcoder with {wide} latents per dimension for each layer, trained once
over all rows in batches of {batch}. Gemma 2 2B is {small} wide, and Gemma 3 27B {large}. Nothing was run at this
size. Bytes are exact; figures marked ESTIMATE follow from the inputs below.

{table}

## What the bottleneck is

- **A harvest of all layers waits for storage**, not for the GPUs: compare its two lines of hours. One or two GPUs
  already saturate the storage of a node, so more of them change nothing. A faster file system helps, and so does
  writing less: half as many bytes (`store.storage=int8`), fewer layers (`--layer`), fewer rows of some positions
  (`store.keep`, `store.cap`), or fewer tokens at first (`--tokens`; a store can be extended later). A harvest of
  one layer waits for the forward passes, and there more GPUs help (`torchrun`).
- **Training waits for rows**, unless few GPUs share the storage. Rows of int8 have half the bytes. A node's own
  drives can feed more GPUs: copy one layer's store there and train from it. Let several runs read their rows once
  (`train sweep`), keep rows on the device if they fit (`resident_rows`), or take more latents (`transcoder.d_sae`),
  which makes a step longer for the same rows. Smaller batches (`rows.batch_rows`) need fewer rows per second, but
  use the GPU less well.
- **The cores** have time to spare for gathering rows. Unpacking a packed store takes more of them, and comes closer
  to the rate of the drives: unpack a store that several runs will use.
- **Memory** of a harvest of many layers is two blocks. `store.max_block_bytes` bounds them, and `harvest plan` says
  what they take.

Most of the cost is storage and writing. So harvest only the layers that you will train on, use int8, and drop rows
before you drop layers: [storing.md](storing.md) has the settings.

## Where the figures come from

{inputs}

{taken}

The step is that of 18,432 latents at width 2,304, scaled by the number of weights for other widths. The error of
int8 is under "storage types" in [benchmarks.md](benchmarks.md). Prices differ by a factor of a few between
providers.
"""


if __name__ == "__main__":
    main()
