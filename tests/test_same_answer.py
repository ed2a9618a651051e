"""The judge of `tests.bench.same_answer` against plain figures over rows that are repeated as often as they count."""

import torch

from tests import reference
from tests.bench.same_answer import Rows, Weights, judge

D, F, K = 8, 64, 4


def test_the_judge_weighs_rows_and_evaluates_at_the_l0_that_it_is_asked_for() -> None:
    torch.manual_seed(0)
    weights = Weights(torch.randn(D, F), torch.randn(F), torch.randn(F, D), torch.randn(D), threshold=1.0)
    rows = [Rows(torch.randn(100, D), 1.0), Rows(torch.randn(50, D) + 1, 3.0)]
    found = judge(weights, rows, K)

    x = torch.cat([rows[0].values, rows[1].values.repeat(3, 1)])
    pre_acts = x @ weights.W_enc + weights.b_enc
    equal = pre_acts.flatten().sort(descending=True).values[K * len(x)]
    for name, threshold in (("own", torch.tensor(1.0)), ("equal", equal)):
        kept = pre_acts > threshold
        expected = reference.fvu(x, (pre_acts * kept) @ weights.W_dec + weights.b_dec)
        assert abs(found[name][0] / expected - 1) < 1e-4
        assert abs(found[name][1] - float(kept.sum()) / len(x)) < 1e-2
    assert K - 3 / len(x) <= found["equal"][1] <= K
