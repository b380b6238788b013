"""Measures of robustness against other people's code and hand-worked cases, and their intervals."""
import numpy as np
import polars as pl
import pytest

from ganprompt import robustness as R, sensitivity as S, statistics as C

RNG = np.random.default_rng(0)


def test_cps_and_its_parts():
    "Worked from Mizrahi et al.'s definitions: MaxP .8, AvgP .6, Sat 1 - .2 = .8, CPS .64."
    m = S.over_templates([.4, .6, .8])
    assert [round(m[k], 12) for k in ("avg", "min", "max", "spread", "median", "cps")] == [.6, .4, .8, .4, .6, .64]
    assert m["q05"] == pytest.approx(.42) and m["q95"] == pytest.approx(.78)
    assert S.over_templates([.5]*9)["cps"] == .5 and S.over_templates([0.]*9)["cps"] == 0
    assert S.drop_rate([.4, .2], .4) == pytest.approx(.25) and np.isnan(S.drop_rate([.4], 0))


@pytest.mark.parametrize("shape", [(2, 5), (7, 30)])
def test_pss_is_the_mean_over_pairs(shape):
    x = RNG.random(shape)
    pairs = [(i, j) for i in range(len(x)) for j in range(i)]
    np.testing.assert_allclose(S.pss(x), np.mean([abs(x[i] - x[j]) for i, j in pairs], axis=0), atol=1e-12)
    np.testing.assert_allclose(S.pss(x[RNG.permutation(len(x))]), S.pss(x), atol=1e-12)


def test_posix_by_its_definition():
    "A loop over the paper's equation 1, with probabilities of both answers."
    z = RNG.normal(size=(5, 8))*3
    p = 1/(1 + np.exp(-z))
    def prob(t, u, yes): return p[t, u] if yes else 1 - p[t, u]
    for u in range(8):
        answers = [p[t, u] > .5 for t in range(5)]
        psi = np.mean([abs(np.log(prob(s, u, answers[t])/prob(t, u, answers[t]))) for s in range(5) for t in range(5)
                       if s != t])
        assert S.posix(z)[u] == pytest.approx(psi)
    assert np.isfinite(S.posix(np.array([[900.], [-900.]]))).all()
    # an even chance is a no, as it is for flips: log(1/2) against log of 1 - p, then of p, with p/(1 - p) = 3
    even = np.log([[1.], [3.]])
    assert S.posix(even)[0] == pytest.approx((np.log(.5/.25) + np.log(.75/.5))/2) and S.flips(even).all()


def test_tau_equals_scipy():
    from scipy.stats import kendalltau
    for z in (RNG.normal(size=(4, 50)), RNG.integers(0, 5, (4, 50)).astype(float)):
        np.testing.assert_allclose(S.tau(z[0], z[1:]), [kendalltau(z[0], other).statistic for other in z[1:]],
                                   atol=1e-12)
    assert np.isnan(S.tau(np.ones(5), np.arange(5.)[None])).all()


@pytest.mark.parametrize("p, mixed, turned", [(.5, .35052083333333334, 6.712312796074904e-17),
                                              (.9, .8138115, .0015403985936540256),
                                              (.98, .9587914980373333, .25860588701918846)])
def test_rbo_equals_another_implementation(p, mixed, turned):
    """What the package rbo 0.1.3 gives (it wants numpy 1, so it is not installed here): seven items in the orders
    1234567 and 3216475, and a hundred turned round."""
    assert S.rbo(np.arange(1, 8), np.array([3, 2, 1, 5, 7, 4, 6]), p) == pytest.approx(mixed, abs=1e-12)
    assert S.rbo(np.arange(1, 101), np.arange(100, 0, -1), p) == pytest.approx(turned, abs=1e-12)


def test_ranks():
    assert S.ranks(np.array([[.1, .9, .5], [2, 2, 3]])).tolist() == [[3, 1, 2], [2, 3, 1]]


def test_diversity_counts_kinds():
    "Three groups of equal states at right angles count as three, however they are scaled and turned."
    turn = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    x = np.repeat(np.eye(3, 6), 4, axis=0)*RNG.uniform(1, 9, (12, 1)) @ turn
    found = S.diversity(x)
    assert found["vendi"] == pytest.approx(3) and found["cosine"] == pytest.approx(3*12/(12*11))


SPLITS = ["seen", "seen", *["unseen-paraphrase"]*4, *["attack"]*4]


BANK = [dict(id=str(i), group="toy", split=s) for i, s in enumerate(SPLITS)]


def made(kind, users=200, n=50):
    """Scores of a model that ignores its prompt, of one that has learned the seen templates by heart, of one that
    minds none."""
    rng = np.random.default_rng(0) # the same whatever was tested before
    truth, noise = rng.normal(size=(users, n)) + 2.5*(np.arange(n) == 0), rng.normal(size=(len(BANK), users, n))
    if kind == "constant": return np.zeros_like(noise)
    if kind == "robust": return truth + .1*noise
    return np.where(np.array(SPLITS)[:, None, None] == "seen", truth + .1*noise, noise)


def test_measures_tell_constant_and_memorising_models_from_a_robust_one():
    constant, memory, robust = (S.measure_bank(made(kind), BANK) for kind in ("constant", "memory", "robust"))
    for split in ("unseen-paraphrase", "attack", "unseen"):
        c, m, r = (x[split] for x in (constant, memory, robust))
        assert c["flips"] == c["posix"] == 0 and c["hit@10"]["cps"] == 0                # insensitive and useless
        assert r["hit@10"]["cps"] > .7 > .5 > m["hit@10"]["cps"]
        assert m["hit@10"]["drop"] > .5 > .05 > r["hit@10"]["drop"]
        assert m["tau"] < .1 < .8 < r["tau"] and m["posix"] > 3*r["posix"] and m["hit@10"]["pss"] > 3*r["hit@10"]["pss"]
    assert memory["seen"]["hit@10"]["drop"] < .05 and "unseen-format" not in memory
    assert abs(memory["clean"]["hit@10"] - robust["clean"]["hit@10"]) < .1


def test_cps_of_equal_templates_is_their_accuracy():
    """As defined it lies above the accuracy of every template, by the error of the best of 47; held out it does not.
    A template that is truly better is found, and not flattered."""
    rng = np.random.default_rng(1)
    tables = [(rng.random((47, 300)) < .3).astype(float) for _ in range(60)]
    assert np.mean([S.over_templates(x.mean(axis=1))["cps"] for x in tables]) > .325
    held = [C.held_out(x, splits=20) for x in tables]
    for k in ("max", "min", "cps"): assert np.mean([h[k] for h in held]) == pytest.approx(.3, abs=.006)
    chance = np.r_[.6, np.full(46, .3)]
    better = [C.held_out((rng.random((47, 300)) < chance[:, None]).astype(float), splits=20)["max"] for _ in range(20)]
    assert np.mean(better) == pytest.approx(.6, abs=.02)
    assert (S.measure_bank(made("robust"), BANK)["unseen"]["hit@10"]["held_out"]["cps"]
            <= S.measure_bank(made("robust"), BANK)["unseen"]["hit@10"]["cps"] + .01)


def test_intervals_of_the_page_hold_the_truth():
    """Hits that are coins: the interval of a template's HR@10 covers its chance; intervals are wider where users
    have several lists that agree."""
    def study(seed, lists=1):
        rng = np.random.default_rng(seed)
        # a hit: the target first, or last of 21
        z = np.repeat(np.where(rng.random((4, 60, 1)) < .4, 2., -2.)*(np.arange(21) == 0) + .1*rng.random((4, 60, 21)),
                      lists, axis=1)
        return S.bank_intervals(z, BANK[1:5], np.repeat(np.arange(60), lists), resamples=200)
    found = [study(s)[1]["hit@10"][2] for s in range(60)]
    assert .85 < np.mean([low <= .4 <= high for _, low, high in found])
    one, two = (study(0, n)[0]["unseen"]["avg"] for n in (1, 2))
    np.testing.assert_allclose(one, two)
    rng = np.random.default_rng(0)
    hits, by_split = (rng.random((4, 60)) < np.array([.8, .5, .4, .3])[:, None]), lambda z, b: S.bank_intervals(z, b,
            np.arange(60), resamples=50)[0]["unseen"]
    u = by_split(np.where(hits[:, :, None], 2., -2.)*(np.arange(21) == 0),
                 [BANK[0], *[t for t in BANK if t["split"] != "seen"][:3]])
    assert u["drop"][0] == pytest.approx(1 - hits[1:].mean()/hits[0].mean())
    assert u["cps"][0] == pytest.approx(u["best"][0]*(1 - (u["best"][0] - hits[1:].mean())))


def ragged(z, sizes):
    out = z.copy()
    for u, n in enumerate(sizes): out[:, u, n:] = np.nan
    return out


def test_lists_of_unequal_length_are_measured_one_by_one():
    "Each user's figures are those of the user alone, with a list of its own length."
    sizes = RNG.integers(5, 30, 12)
    z = ragged(RNG.normal(size=(len(BANK), 12, 30)), sizes)
    figures, order = S.by_template(z), S.agreement(z)
    for u, n in enumerate(sizes):
        alone = z[:, u:u + 1, :n]
        for m, v in S.by_template(alone).items(): np.testing.assert_allclose(figures[m][:, u], v[:, 0])
        for m, v in S.agreement(alone).items(): np.testing.assert_allclose(order[m][:, u], v[:, 0], atol=1e-12)
    measured, table = S.measure_bank(z, BANK), S.template_table(z, BANK)
    assert (all(np.isfinite(measured["unseen"][k]) for k in ("tau", "rbo", "flips", "posix"))
            and table["tau"].is_finite().all())
    assert R.figure1(z, [t | {"text": "{purchase_history} {target_item}"} for t in BANK],
                     pl.DataFrame({"history": [[0]]*12}), [range(n) for n in sizes],
                     [str(i) for i in range(30)]).height == 1


def test_few_flips_are_not_taken_for_robustness():
    "A model that says yes to everything and ranks by guessing under what it has not seen."
    z, n = made("memory") + 20, 50
    assert S.measure_bank(z, BANK)["unseen"]["flips"] < .01
    floor = S.chance(np.full(200, n))
    assert floor["hit@10"] == .2 and floor["tau"] == 0
    said = S.verdict(S.template_table(z, BANK), floor)
    assert ("Few flips are not robustness here: under 8 of 9 templates" in said and "by chance" in said
            and "0.200 by chance" in said)
    assert "under none of these is half of the order" in S.verdict(S.template_table(made("robust") + 20, BANK), floor)
    assert "Under no template" in S.verdict(S.template_table(RNG.normal(size=(len(BANK), 200, n)), BANK), floor)
    def table(hit):
        return pl.DataFrame({"id": ["clean", "other"], "flips": [0., .01], "tau": [1., .9], "hit@10": [.6, hit]})
    # half of .6 - .2 is .2 above chance
    assert ("Few flips are not robustness" in S.verdict(table(.3), floor)
            and "under none of these" in S.verdict(table(.5), floor))
    # exactly half is not gone yet, of the order and of .75 - .25
    half = pl.DataFrame({"id": ["clean", "other"], "flips": [0., .01], "tau": [1., .5], "hit@10": [.75, .5]})
    assert "under none of these" in S.verdict(half, {"hit@10": .25})
    r = S.ranks(RNG.normal(size=(2, 300, n)))
    assert floor["rbo"] == pytest.approx(S.rbo(r[0], r[1]).mean(), abs=.02)


def test_a_templates_flips_are_those_of_the_target():
    "The first candidate's answers alone, in the table and in the measures; another's may turn."
    z = np.array([[[1., 1]], [[2., -1]], [[-1., 1]]]) # templates, one user, target and another
    assert S.template_table(z, BANK[:3])["flips"].to_list() == [0, 0, 1]
    assert S.measure_bank(z, BANK[:3])["unseen"]["flips"] == 1


def test_the_middle_of_each_interval_is_the_measure():
    "What `bank_intervals` says of each split and template is what `measure_bank` and `template_table` say of it."
    z = made("memory", users=40)
    splits, templates = S.bank_intervals(z, BANK, np.arange(40), resamples=20)
    measured, table = S.measure_bank(z, BANK), S.template_table(z, BANK)
    assert set(splits) == set(measured) - {"clean"} and splits["seen"]["avg"][0] > splits["attack"]["avg"][0] + .3
    for s, found in splits.items():
        for m in ("avg", "drop", "pss"): assert found[m][0] == pytest.approx(measured[s]["hit@10"][m])
        for m in ("posix", "flips", "tau", "rbo"): assert found[m][0] == pytest.approx(measured[s][m])
    for m in ("flips", "tau", "rbo"): np.testing.assert_allclose([v[0] for v in templates[m]], table[m])


@pytest.mark.parametrize("share", [.1, .4])
def test_a_part_of_the_questions_is_filled_in_by_the_likeliest_parameters(share):
    "The posterior's maximum, looked for by another optimiser in the equation's own form."
    from scipy.optimize import minimize
    rng, groups = np.random.default_rng(3), ["a", "a", "b", "b", "b"]
    x = (rng.random((5, 40)) < .3 + .08*np.arange(5)[:, None]).astype(float)
    asked, of = S.part_of(5, 40, share, rng), np.array([0, 0, 1, 1, 1])
    def odds(w): return w[0] + w[1:6, None] + w[6:8][of][:, None] + w[8:]
    def lost(w):
        z = odds(w)
        prior = (w[1:8]**2).sum()/(2*S.APART**2) + (w[8:]**2).sum()/2
        return np.where(asked, np.logaddexp(0, z) - x*z, 0).sum() + prior
    wanted = np.where(asked, x, 1/(1 + np.exp(-odds(minimize(lost, np.zeros(48)).x)))).mean(axis=1)
    got = S.estimated(np.where(asked, x, np.nan), asked, groups)
    np.testing.assert_allclose(got, wanted, atol=2e-3)
    assert asked.sum(axis=1).tolist() == [round(share*40)]*5


def test_each_users_worst_template():
    "Worked by hand: under their worst template the first user keeps 0, the second 1, the third 1/2."
    x = np.array([[[1., 1., .5], [0., 1., 1.]], [[1., 1., 1.], [1., 0., 1.]]])
    draws = C.drawn_worst({"model": x}, 200)["model"]
    np.testing.assert_allclose(draws[0], [.5, 2/3])
    assert draws.shape == (201, 2) and draws[1:].min() >= 0 and draws[1:].max() <= 1 and draws[1:].std() > .1
