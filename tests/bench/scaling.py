"""How held-out fvu falls with steps, width, k and rows on a store, and a power law fitted to it.

    python -m tests.bench.scaling NAME STORE [--preset base] [--set a.b=value ...] [--work DIR]

writes docs/benchmarks.json and docs/benchmarks.md under "scaling, NAME". One thing is changed at a time.
The law is `fvu = c * steps^a * d_sae^b * k^d * rows^e`, by least squares on logarithms; what is recorded is the factor
by which fvu changes when a thing is doubled, and by how much the law misses the runs that it was fitted to. It holds
inside the range of the runs, and says nothing of a floor.
"""

import argparse
from pathlib import Path

import numpy as np

from shared.store.store import Store
from tests.bench.recipe import run_and_judge
from tests.bench.record import record, sized

CENTRE = sized(
    {"steps": 1500, "transcoder.d_sae": 4096, "activation.k": 32},
    {"steps": 20, "transcoder.d_sae": 64, "activation.k": 6},
)
GRID: dict[str, tuple[int, ...]] = sized(
    {
        "steps": (375, 750, 3000),
        "transcoder.d_sae": (1024, 2048, 8192),
        "activation.k": (8, 16, 64),
        "rows.blocks": (1, 2, 5),
    },
    {"steps": (10,), "transcoder.d_sae": (32,), "activation.k": (3,), "rows.blocks": (1,)},
)


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, fit, and record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name")
    parser.add_argument("store", type=Path)
    parser.add_argument("--preset", default="base")
    parser.add_argument("--set", nargs="+", default=[], metavar="a.b=value")
    parser.add_argument("--work", type=Path, default=Path(".recipe"))
    options = parser.parse_args(arguments)
    store = Store.open(options.store)
    centre = CENTRE | {"rows.blocks": len(store.record.training_blocks)}
    given = dict(assignment.split("=") for assignment in [*options.set, *sized([], ["rows.batch_rows=48"])])
    points = [centre, *(centre | {name: value} for name, values in GRID.items() for value in values)]
    points = [point for point in points if point["rows.blocks"] <= centre["rows.blocks"]]
    measured, figures = [], dict[str, tuple[float, str]]()
    for point in points:
        sets = [f"{name}={value}" for name, value in (point | given).items()]
        found = run_and_judge(store, options.preset, [*sets, "seed=0"], options.work)
        told = ", ".join(f"{name.split('.')[-1]} {value}" for name, value in (point | given).items())
        figures[f"{told}: fvu"] = (found["fvu, reported"], "")
        figures[f"{told}: dead"] = (found["dead"], "")
        measured.append(found["fvu, reported"])
        print(f"{told}: fvu {found['fvu, reported']:.4f}, dead {found['dead']:.3f}", flush=True)
    powers, miss = fit([list(point.values()) for point in points], measured)
    for name, power in zip(centre, powers, strict=True):
        figures[f"twice the {name.split('.')[-1]}: fvu over what it was"] = (2.0**power, "times")
    figures["the law's largest miss"] = (miss, "share")
    record(f"scaling, {options.name}", f"python -m tests.bench.scaling {options.name} STORE", figures)


def fit(points: list[list[float]], fvu: list[float]) -> tuple[list[float], float]:
    """Return the powers of a product of powers, fitted on logarithms, and its largest relative miss."""
    x = np.column_stack([np.log(np.array(points, float)), np.ones(len(points))])
    y = np.log(np.array(fvu))
    found = np.linalg.lstsq(x, y, rcond=None)[0]
    return found[:-1].tolist(), float(np.abs(np.expm1(x @ found - y)).max())


if __name__ == "__main__":
    main()
