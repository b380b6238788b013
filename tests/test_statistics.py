"""Intervals against other libraries, by hand, and by how often they hold the truth."""
import numpy as np
import polars as pl
import pytest
import scipy.stats

from ganprompt import measures as G, statistics as S

RNG = np.random.default_rng(0)


def test_interval_holds_the_truth_95_times_in_100():
    rng = np.random.default_rng(0)
    ends = [S.bootstrap(rng.normal(size=(80, 1)), 400, seed).ravel() for seed in range(300)]
    assert .90 < np.mean([low < 0 < high for _, low, high in ends]) < .98


def test_a_method_has_students_interval_over_its_trainings():
    "By hand, and against scipy where trainings are all the noise."
    each = np.array([[.30, .1], [.34, .1], [.41, .1]])
    mean, low, high = S.student(each, np.array([0., .02]))
    theirs = scipy.stats.t.interval(.95, 2, each[:, 0].mean(), scipy.stats.sem(each[:, 0]))
    np.testing.assert_allclose([low[0], high[0]], theirs)
    np.testing.assert_allclose([mean[1], low[1], high[1]], [.1, .1 - 1.96*.02, .1 + 1.96*.02])
    both = S.student(each[:, :1], np.array([.02]))
    assert (both[2] - both[0])[0] == pytest.approx((((theirs[1] - theirs[0])/2)**2 + (1.96*.02)**2)**.5)


def test_one_training_has_an_interval_over_users_and_says_so():
    x = np.random.default_rng(0).normal(size=(1, 50, 2))
    np.testing.assert_array_equal(S.interval(x), S.bootstrap(x[0]))
    draws = np.r_[.5, np.arange(101)/100]
    # percentiles of 0, .01, … 1
    for one in (draws, draws[:, None]): assert S.ends(one) == pytest.approx([.5, .025, .975])
    assert S.scope(1) == "over users, for one training: they say nothing of the method"
    assert (S.scope(3, "users and templates") == "over 3 trainings, users and templates (a claim wants 5 trainings)"
            and S.scope(5) == "over 5 trainings and users")


def test_the_interval_of_one_trainings_draws_has_two_ends():
    """Draws 1, 2, …, 5 with a standard deviation of the root of 2, about a value of 3; one without a value does not
    count."""
    draws = np.array([3., 1, 2, 3, 4, 5, np.nan])
    assert S.ends(draws, True) == pytest.approx([3, 3 - 1.96*2**.5, 3 + 1.96*2**.5])
    assert S.ends(draws) == pytest.approx([3, 1.1, 4.9])
    assert np.isnan(S.ends(np.array([3., np.nan]))[1:]).all()


def test_pairs_of_single_trainings_have_no_interval():
    "Two users, eight metrics; .3 and .5 against .1 and .2."
    def users(*values): return np.array(values)[:, None]*np.ones(len(G.METRICS))
    one = {"a": {0: users(.3, .5)}, "b": {0: users(.1, .2)}}
    mean, low, high = S.paired_gaps(one, [("a", "b"), ("b", "a")])
    np.testing.assert_allclose(mean, [[.25]*8, [-.25]*8])
    assert np.isnan(low).all() and np.isnan(high).all()
    two = {m: seeds | {1: seeds[0] + (m == "a")*.1} for m, seeds in one.items()}
    mean, low, high = S.paired_gaps(two, [("a", "b")])
    np.testing.assert_allclose(mean, [[.3]*8])
    assert (low < mean).all() and (mean < high).all()


def test_the_best_is_bold_and_the_best_baseline_has_a_star():
    figures = pl.DataFrame({"model": ["ours", "x", "y"]*2, "metric": ["auc"]*3 + ["mrr"]*3,
                            "mean": [.9, .7, .8, .1, .3, .3], "ours": [True, False, False]*2})
    marked = S.mark_best(figures)
    assert marked["best"].to_list() == [True, False, False, False, True, True]
    assert marked["best_baseline"].to_list() == [False, False, True, False, True, True]


STATISTICS = {"mean": lambda m: m.mean(-1), "q05": lambda m: np.quantile(m, .05, axis=-1),
              "CPS": lambda m: m.max(-1)*(1 - m.max(-1) + m.mean(-1))}


@pytest.mark.parametrize("trainings", [3, 5, 10])
@pytest.mark.parametrize("by_training, by_user, by_template", [(.03, 0, 0), (0, .4, 0), (.02, .3, .03)])
def test_a_methods_interval_holds_the_truth_95_times_in_100(trainings, by_training, by_user, by_template, studies=700,
                                                            templates=20, users=50):
    """Of figures over templates too. The truth of a figure is its mean over banks of as many templates, without the
    noise of trainings and users."""
    rng = np.random.default_rng(trainings)
    banks = .4 + by_template*rng.normal(size=(20000, templates))
    found = {f"{i}": .4 + by_training*rng.normal(size=(trainings, 1, 1))
             + by_template*rng.normal(size=(1, templates, 1)) + by_user*rng.normal(size=(1, 1, users))
             for i in range(studies)}
    for name, statistic in STATISTICS.items():
        truth, held = statistic(banks).mean(), [S.ends(draws) for draws in S.redrawn(found, statistic, 100).values()]
        assert np.mean([low < truth < high for _, low, high in held]) > .93, name
    if (by_user, trainings) == (0, 3): # the old way, kept as the reason: three trainings drawn again from themselves
        lots = rng.integers(3, size=(400, 3))
        drawn = np.array([x[:, 0, 0][lots].mean(axis=1) for x in found.values()])
        low, high = np.quantile(drawn, [.025, .975], axis=1)
        assert np.mean((low < .4) & (.4 < high)) < .80


def test_the_interval_of_a_method_is_no_shorter_than_that_of_its_trainings_or_of_its_users():
    rng = np.random.default_rng(1)
    each, error = rng.normal(size=(3, 500)), rng.uniform(0, 2, 500)
    both, alone = (np.diff(S.student(each, e)[1:], axis=0)[0] for e in (error, 0*error))
    assert (both >= alone).all() and (both >= 2*1.96*error).all()


def test_a_user_is_drawn_with_all_lists():
    "Against a slow loop over users, and against lists taken for people: twice the same list is no news."
    rng = np.random.default_rng(3)
    users = np.repeat(np.arange(40), rng.integers(1, 4, 40))
    values = rng.random((40, 2))[users] + .05*rng.random((len(users), 2))
    draws, again = [], np.random.default_rng(5)
    for _ in range(300):
        drawn = again.integers(40, size=40)
        draws.append(np.concatenate([values[users == u] for u in drawn]).mean(0))
    found = S.bootstrap(values, 300, 5, users)
    np.testing.assert_allclose(found, [values.mean(0), *np.quantile(draws, [.025, .975], axis=0)], atol=1e-12)
    alone = S.bootstrap(values, 300, 5)
    assert ((found[2] - found[1]) > 1.15*(alone[2] - alone[1])).all()
    np.testing.assert_array_equal(S.bootstrap(values, 300, 5, np.arange(len(values))), alone)


def test_intervals_cover_users_and_templates():
    """With one figure for all, nothing varies; if only templates differ, the interval is that of a mean of few
    templates; the same draws serve all models."""
    n, users = 12, 300
    def mean(m): return m.mean(-1)
    flat = S.redrawn({"a": np.full((n, users), .3)}, mean, 200)["a"]
    assert np.allclose(flat, .3)
    steps = np.repeat(RNG.normal(size=(n, 1)), users, axis=1)
    value, low, high = S.ends(S.redrawn({"a": steps}, mean, 4000)["a"])
    assert value == pytest.approx(steps.mean()) and (high - low)/2 == pytest.approx(1.96*steps.std()/n**.5, rel=.15)
    both = S.redrawn({"a": steps, "b": steps + .1}, mean, 50)
    np.testing.assert_allclose(both["b"] - both["a"], .1)
    # trainings that differ: Student's interval, two degrees of freedom
    three = np.array([.1, .4, .7])[:, None, None] + np.zeros((3, n, users))
    assert (S.ends(S.redrawn({"a": three}, mean, 50)["a"])
            == pytest.approx([.4, .4 - 4.30265*.3/3**.5, .4 + 4.30265*.3/3**.5], abs=1e-4))
    # trainings that agree add nothing
    np.testing.assert_allclose(S.redrawn({"a": np.stack([steps]*3)}, mean, 50)["a"], np.repeat(both["a"], 3, axis=1))
    shared = S.redrawn({"a": three, "b": three + .1}, mean, 50)
    np.testing.assert_allclose(shared["b"] - shared["a"], .1)


def test_held_out_by_a_slow_loop():
    "Halve the users (not the lists), choose on one half, measure on the other, both ways."
    x, users = RNG.random((5, 13)), np.repeat(np.arange(7), [1, 2, 3, 1, 2, 2, 2])
    rng, high, low = np.random.default_rng(0), [], []
    for _ in range(30):
        first = np.isin(users, np.flatnonzero(rng.permutation(7) < 3))
        for a, b in ((first, ~first), (~first, first)):
            chosen = [x[t, a].mean() for t in range(5)]
            high.append(x[np.argmax(chosen), b].mean()); low.append(x[np.argmin(chosen), b].mean())
    found = S.held_out(x, users, splits=30)
    assert (found["max"] == pytest.approx(np.mean(high)) and found["min"] == pytest.approx(np.mean(low))
            and found["spread"] == pytest.approx(np.mean(high) - np.mean(low)))
    assert found["cps"] == pytest.approx(np.mean(high)*(1 - np.mean(high) + x.mean()))
    assert all(np.isnan(v) for v in S.held_out(x[:, :1]).values())


def test_users_are_drawn_with_all_their_lists():
    users = np.array([5, 5, 9, 2])
    counts, owner = S.user_draws(users, 50)
    assert (counts.shape == (51, 4) and (counts[0] == 1).all() and (counts[:, 0] == counts[:, 1]).all()
            and (counts[:, [0, 2, 3]].sum(axis=1) == 3).all() and owner.tolist() == [1, 1, 2, 0])
    x = np.array([[1., 2, np.nan, 4]])
    assert S.drawn_means(x, counts)[0, 0] == pytest.approx(7/3)
    for count, mean in zip(counts, S.drawn_means(x, counts)[:, 0]):
        drawn = [v for v, n in zip(x[0], count) for _ in range(int(n)) if not np.isnan(v)]
        assert mean == pytest.approx(np.mean(drawn)) if drawn else np.isnan(mean)
