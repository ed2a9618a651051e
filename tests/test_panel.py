"""What panels show: the figures of a run at every width, and how numbers are written."""

import io
from pathlib import Path

import pytest
from rich.console import Console, RenderableType
from rich.text import Text

from shared.console.panel import Fitted, Kept, Pace, duration, pairs, panel, per_second, short, size, sparkline
from shared.console.terminal import Verbosity, with_verbosity
from train.live.status import Status
from train.live.training_panel import RunPanel

PACE = Pace(done=4200, total=7000, unit="steps", seconds=318.0, rate=13.2)


def drawn(renderable: RenderableType, width: int, encoding: str = "utf-8") -> list[str]:
    """The lines of a drawing in so many columns."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(width=width, record=True, file=file, color_system=None)
    console.print(renderable)
    return console.export_text().splitlines()


def a_status(run: Path, *, held_out: bool = True) -> Status:
    status = Status(run, steps=7000, batch_rows=1024)
    for step, fvu in ((50, 1.9), (100, 0.4), (4200, 0.0951)):
        row = {
            "step": step, "rows": step * 1024, "fvu": fvu, "fvu_natural": 0.0877, "l0_training_rule": 32.07,
            "dead_share": 0.0283, "lr": 4e-3, "loss": 0.26, "grad_norm": 0.0433, "running_threshold": 0.41,
            "terms": {"auxk": 0.12, "mined": 0.013, "reconstruction": 0.127},
            "strata": {"000-001": {"rows": 200, "fvu": 15963.7, "l0_training_rule": 12.1}},
            "prefixes": {"256": {"fvu": 0.2325}, "4096": {"fvu": 0.0951}},
        }  # fmt: skip
        status.add(row | ({"held_out": {"fvu": 0.1234, "l0": 33.4}} if held_out and step == 100 else {}))
    components = {
        "samples": {"calls": 0, "effect": 0.0, "effect_counts": "latents with samples"},
        "mined": {"calls": 4200, "effect": 54.6, "effect_counts": "weighted loss, summed over steps"},
        "reconstruction": {"calls": 4200, "effect": 1139.2, "effect_counts": "weighted loss, summed over steps"},
    }
    timing = {"step": 4200, "from_step": 0, "seconds": 318.0, "data_wait_share": 0.0172}
    status.update(timing, {"step": 4200, "components": components})
    return status


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_run_is_shown_at_every_width(tmp_path: Path, width: int) -> None:
    run = tmp_path / "wide-001"
    run.mkdir()
    (run / "config.json").write_bytes(bytes(3 * 2**20))
    lines = drawn(RunPanel(a_status(run)).draw(PACE, "running"), width)
    text = "\n".join(lines)
    assert {len(line) for line in lines} == {width}
    assert "train wide-001" in lines[0] and "running" in lines[-1]
    assert "4,200/7,000 steps  60%" in lines[1]
    assert "13.2 steps/s  13,517 rows/s  3:32 left  5:18 elapsed" in lines[2]
    for figure in ("0.0951 █▄▁", "0.1234 at 100", "l0 33.4", "32.1", "2.8%", "0.004", "5.0% of loss", "1.7% of time"):
        assert figure in text
    assert "3 MiB taken" in text and "iB free" in text
    at = [text.index(name) for name in ("reconstruction", "mined", "samples")]
    assert at == sorted(at)
    [mined] = [line for line in lines if "mined" in line]
    assert mined.split("mined")[1].split()[:4] == ["0.013", "5.0%", "4,200", "54.6"]
    assert "0 not yet" in text
    assert ("weighted loss, summed over steps" in text) == (width == 120)
    assert "4,096" not in text


def test_at_the_last_row_what_comes_after_it_is_not_yet_there(tmp_path: Path) -> None:
    status = a_status(tmp_path)
    status.add(status.row | {"step": status.steps})
    parts = dict(status.components) | {"merge": {"calls": 2, "effect": 0.0, "effect_counts": "latents merged"}}
    status.update({}, {"step": status.steps, "components": parts})
    lines = drawn(RunPanel(status).draw(PACE), 60)
    shown = {name: next(line for line in lines if name in line).split(name)[1].split() for name in ("samples", "merge")}
    assert shown["samples"][:3] == ["0", "not", "yet"] and shown["merge"][:2] == ["2", "none"]


def test_a_run_that_was_not_evaluated_yet_and_one_without_figures(tmp_path: Path) -> None:
    text = "\n".join(drawn(RunPanel(a_status(tmp_path, held_out=False)).draw(PACE), 80))
    assert "held out   not yet" in text
    start = Pace(done=0, total=7000, unit="steps", seconds=4.0, rate=0.0)
    text = "\n".join(drawn(RunPanel(Status(tmp_path, 7000, 1024)).draw(start, "starting"), 80))
    assert "no figures yet" in text and "0/7,000 steps  0%" in text and "? left  0:04 elapsed" in text


def test_a_verbose_panel_adds_strata_and_prefixes(tmp_path: Path) -> None:
    with with_verbosity(Verbosity.VERBOSE):
        lines = drawn(RunPanel(a_status(tmp_path)).draw(PACE), 60)
    assert {len(line) for line in lines} == {60}
    [line] = [line for line in lines if "15,964" in line]
    assert line.split()[1:-1] == ["0", "200", "15,964", "12.1", "256", "0.2325"]
    assert any("fvu, natural  0.0877" in line for line in lines)


def test_a_verbose_panel_shows_outliers_among_the_strata(tmp_path: Path) -> None:
    status = a_status(tmp_path)
    parts = {"000-001": status.row["strata"]["000-001"], "outliers": {"rows": 7, "fvu": None, "l0_training_rule": 0.0}}
    status.add(status.row | {"step": 4250, "strata": parts})
    with with_verbosity(Verbosity.VERBOSE):
        [line] = [line for line in drawn(RunPanel(status).draw(PACE), 60) if "outliers" in line]
    assert line.split()[1:5] == ["outliers", "7", "-", "0.0"]


def test_where_blocks_cannot_be_shown_none_are(tmp_path: Path) -> None:
    text = "\n".join(drawn(RunPanel(a_status(tmp_path)).draw(PACE), 80, "ascii"))
    assert text.isascii() and "0.0951" in text and "4,200/7,000" in text


def test_a_panel_follows_its_status(tmp_path: Path) -> None:
    status = a_status(tmp_path)
    shown = RunPanel(status)
    assert "0.0951" in "\n".join(drawn(shown.draw(PACE), 80))
    status.add(status.row | {"step": 4250, "fvu": 0.0777})
    assert "0.0777" in "\n".join(drawn(shown.draw(PACE), 80))


def test_what_is_kept_is_laid_out_once_for_a_key_and_a_width() -> None:
    made, kept = [], Kept()

    def make() -> Text:
        made.append(1)
        return Text(f"layout {len(made)}")

    found = [drawn(kept.drawing(key, make), width) for key, width in (("a", 60), ("a", 60), ("a", 80), ("b", 80))]
    assert found == [["layout 1"], ["layout 1"], ["layout 2"], ["layout 3"]]


def test_a_panel_without_a_rate_and_one_without_work() -> None:
    text = "\n".join(drawn(panel("pack", Pace(done=0, total=0, unit="tokens", seconds=0, rate=0)), 60))
    assert "0/0 tokens  100%" in text and "0:00 elapsed" in text and "/s" not in text


def test_a_drawing_gets_its_columns_and_no_more_than_fit_a_line() -> None:
    assert drawn(Fitted(lambda width, blocks: f"{width} {blocks}"), 90) == ["90 True"]
    assert drawn(Fitted(lambda width, blocks: f"{width} {blocks}"), 300, "ascii") == ["120 False"]


def test_pairs_are_filled_from_top_to_bottom() -> None:
    rows = [(name, value) for name, value in zip("abc", "123", strict=True)]
    assert [line.split() for line in drawn(pairs(rows, 2), 60)] == [["a", "1", "c", "3"], ["b", "2"]]


def test_numbers_as_people_read_them() -> None:
    assert [size(n) for n in (0, 1023, 1536, 3 * 2**30)] == ["0 B", "1,023 B", "1.5 KiB", "3 GiB"]
    assert [duration(s) for s in (0.4, 61, 3723, 2 * 86_400 + 5)] == ["0:00", "1:01", "1:02:03", "2 d 00:00:05"]
    assert [per_second(r) for r in (0, 0.0234, 13.24, 11_794.2)] == ["0", "0.0234", "13.2", "11,794"]
    assert [short(v) for v in (0, 7.44e-5, 0.13369, 640.15, 261_184, 1e-3)] == [
        "0", "7.44e-05", "0.1337", "640.1", "261,184", "0.001",
    ]  # fmt: skip
    assert PACE.line() == "4,200/7,000 steps  13.2 steps/s  3:32 left"
    slow = Pace(done=1, total=2, unit="runs", seconds=213.0, rate=1 / 213)
    assert slow.line() == "1/2 runs  213 s each  3:33 left"


def test_a_sparkline_has_the_means_of_its_parts() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([8, 8, 0, 0], 2) == "█▁"
    assert sparkline([1, 1, 1], 8) == "▁▁▁"
    assert sparkline([1], 8) == sparkline([], 8) == ""
