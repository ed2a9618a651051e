import pytest

from shared.strata import QUANTUM, kept_rows, make_strata

EDGES = (0, 1, 4, 16, 64, 256)


def test_values_for_a_window_of_128():
    strata = make_strata(EDGES, {0: 0.1, 16: 0.5}, context_size=128, block_sequences=256)
    assert [(s.name, s.start, s.stop, s.width, s.natural_rows, s.rows) for s in strata] == [
        ("000-001", 0, 1, 1, 256, 26),
        ("001-004", 1, 4, 3, 768, 768),
        ("004-016", 4, 16, 12, 3072, 3072),
        ("016-064", 16, 64, 48, 12288, 6144),
        ("064-128", 64, 128, 64, 16384, 16384),
    ]


@pytest.mark.parametrize("context", [1, 2, 3, 4, 5, 15, 16, 17, 64, 65, 255, 256, 257, 1000])
def test_every_position_lies_in_exactly_one_stratum(context):
    strata = make_strata(EDGES, {}, context, block_sequences=256)
    assert [p for s in strata for p in range(s.start, s.stop)] == list(range(context))
    assert sum(s.natural_rows for s in strata) == sum(s.rows for s in strata) == context * 256
    assert all(s.start in EDGES for s in strata)
    assert strata[-1].stop == context


def test_an_edge_at_the_context_makes_no_empty_stratum():
    assert [s.name for s in make_strata((0, 4, 16), {}, 16, 1)] == ["000-004", "004-016"]
    assert [s.name for s in make_strata((0, 4, 16), {}, 4, 1)] == ["000-004"]


def test_a_share_for_a_stratum_past_the_context_is_ignored():
    assert make_strata((0, 4, 16), {16: 0.5}, 8, 256) == make_strata((0, 4, 16), {}, 8, 256)


@pytest.mark.parametrize("natural", [1, 2, 10, 255, 256, 257, 768, 12_288, 16_384])
@pytest.mark.parametrize("share", [1e-9, 0.001, 0.1, 1 / 3, 0.5, 0.99, 1.0])
def test_kept_rows_is_the_share_rounded_down_to_whole_quanta(natural, share):
    rows = kept_rows(natural, share)
    wanted = max(1, round(natural * share))
    assert 1 <= rows <= natural
    if wanted < QUANTUM:
        assert rows == wanted
    else:
        assert rows == max(n for n in range(0, natural + 1, QUANTUM) if n <= wanted)


@pytest.mark.parametrize(
    ("natural", "share", "rows"),
    [(256, 1.0, 256), (256, 0.999, 256), (256, 0.5, 128), (511, 1.0, 256), (512, 0.999, 256), (1000, 0.2, 200)],
)
def test_kept_rows_at_the_border(natural, share, rows):
    assert kept_rows(natural, share) == rows


@pytest.mark.parametrize("edges", [(), (1, 4), (0, 0), (0, 4, 4), (0, 4, 2), (-1, 0, 4)])
def test_edges_that_do_not_rise_from_zero_are_refused(edges):
    with pytest.raises(ValueError, match=r"must start with 0 and rise, got \["):
        make_strata(edges, {}, 8, 1)


def test_a_share_for_no_stratum_is_refused_by_name():
    with pytest.raises(ValueError, match=r"keep names position 3, which starts no stratum; edges are \[0, 1, 4\]"):
        make_strata((0, 1, 4), {3: 0.5}, 8, 1)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.0001, float("nan"), float("inf")])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match="above 0 and at most 1, got"):
        make_strata((0, 1), {0: share}, 8, 1)
