import pytest

from shared.store.strata import QUANTUM, check_strata, positions, quota, stratum_name, stratum_ranges

EDGES = (0, 1, 4, 16, 64, 256)


def test_ranges_for_a_window_of_128():
    assert stratum_ranges(EDGES, 128) == [(0, 1), (1, 4), (4, 16), (16, 64), (64, 128)]
    assert [stratum_name(*one) for one in stratum_ranges(EDGES, 128)][-1] == "064-128"


def test_positions_are_named_as_people_count_them():
    assert [positions(stratum_name(*one)) for one in ((0, 1), (1, 4), (4, 16), (64, 1024))] == [
        "0", "1-3", "4-15", "64-1023",
    ]  # fmt: skip


@pytest.mark.parametrize("context", [1, 2, 3, 4, 5, 15, 16, 17, 64, 65, 255, 256, 257, 1000])
def test_every_position_lies_in_exactly_one_stratum(context):
    ranges = stratum_ranges(EDGES, context)
    assert [p for start, stop in ranges for p in range(start, stop)] == list(range(context))
    assert all(start in EDGES for start, _ in ranges)


def test_an_edge_at_the_context_makes_no_empty_stratum():
    assert stratum_ranges((0, 4, 16), 16) == [(0, 4), (4, 16)]
    assert stratum_ranges((0, 4, 16), 4) == [(0, 4)]


@pytest.mark.parametrize("natural", [1, 2, 10, 255, 256, 257, 768, 12_288, 16_384])
@pytest.mark.parametrize("share", [1e-9, 0.001, 0.1, 1 / 3, 0.5, 0.99, 1.0])
@pytest.mark.parametrize("cap", [None, 1, 300, 1000])
def test_a_quota_is_the_share_up_to_the_cap_rounded_down_to_whole_quanta(natural, share, cap):
    rows = quota(natural, share, cap)
    wanted = min(max(1, round(natural * share)), cap or natural)
    assert 1 <= rows <= natural
    if wanted < QUANTUM:
        assert rows == wanted
    else:
        assert rows == max(n for n in range(0, natural + 1, QUANTUM) if n <= wanted)


@pytest.mark.parametrize(
    ("natural", "share", "rows"),
    [(256, 1.0, 256), (256, 0.999, 256), (256, 0.5, 128), (511, 1.0, 256), (512, 0.999, 256), (1000, 0.2, 200)],
)
def test_quotas_at_the_border(natural, share, rows):
    assert quota(natural, share, None) == rows


def test_nothing_to_choose_from_gives_nothing():
    assert quota(0, 1.0, 5) == 0


@pytest.mark.parametrize("edges", [(), (1, 4), (0, 0), (0, 4, 4), (0, 4, 2), (-1, 0, 4)])
def test_edges_that_do_not_rise_from_zero_are_refused(edges):
    with pytest.raises(ValueError, match=r"must start with 0 and rise, got \["):
        stratum_ranges(edges, 8)


def test_a_share_or_a_cap_for_no_stratum_is_refused_by_name():
    with pytest.raises(ValueError, match=r"keep names position 3, which starts no stratum; edges are \[0, 1, 4\]"):
        check_strata((0, 1, 4), {3: 0.5}, {}, 8)
    with pytest.raises(ValueError, match="cap names position 2"):
        check_strata((0, 1, 4), {}, {2: 5}, 8)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.0001, float("nan"), float("inf")])
def test_a_share_outside_0_to_1_is_refused(share):
    with pytest.raises(ValueError, match="above 0 and at most 1, got"):
        check_strata((0, 1), {0: share}, {}, 8)


def test_a_cap_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        check_strata((0, 1), {}, {0: 0}, 8)
