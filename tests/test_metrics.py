"""The metrics against ir-measures and scikit-learn, and against figures printed in the paper."""
import json

import ir_measures
import numpy as np
import polars as pl
import pytest
from ir_measures import RR, Success, nDCG
from sklearn.metrics import roc_auc_score

from ganprompt import measures as G, metrics as M, published as P, statistics as S
from ganprompt.files import UserError


def tied_lists(n=300, seed=1):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 8, size=rng.integers(2, 60)).astype(float) for _ in range(n)]


def test_ranks_agree_with_ir_measures():
    lists = tied_lists()
    ours = G.per_user(np.arange(len(lists)), {"m": lists})
    qrels = [ir_measures.Qrel(str(u), "0", 1) for u in range(len(lists))]
    run = []
    for u, scores in enumerate(lists):
        order = np.lexsort((np.arange(len(scores)) == 0, -scores))   # ties: the target comes last
        run += [ir_measures.ScoredDoc(str(u), str(i), float(-place)) for place, i in enumerate(order)]
    names = {RR: "mrr"} | {Success @ k: f"hit@{k}" for k in (1, 5, 10)} | {nDCG @ k: f"ndcg@{k}" for k in (1, 5, 10)}
    found = {name: np.zeros(len(lists)) for name in names.values()}
    for got in ir_measures.iter_calc(list(names), qrels, run): found[names[got.measure]][int(got.query_id)] = got.value
    for name, values in found.items():
        np.testing.assert_allclose(ours[name].to_numpy(), values, atol=1e-6, err_msg=name)


def test_auc_agrees_with_scikit_learn():
    lists = tied_lists(seed=2)
    theirs = [roc_auc_score(np.arange(len(s)) == 0, s) for s in lists]
    np.testing.assert_allclose(G.ranking(lists)["auc"], theirs, atol=1e-12)


def test_a_constant_score_does_not_look_good():
    people = G.per_user(np.arange(5), {"constant": [np.zeros(100)] * 5})
    assert people["rank"].to_list() == [100] * 5 and people["hit@10"].sum() == 0 and people["auc"].to_list() == [.5] * 5


@pytest.mark.parametrize("lists, words", [([[1., 2.], [1.]], "another candidate"), ([[1., np.nan]], "NaN"),
                                          ([], "another candidate")])
def test_lists_that_cannot_be_ranked(lists, words):
    with pytest.raises(UserError, match=words): G.ranking(lists)


def test_a_data_set_that_was_made_up_says_so():
    assert G.data_name({"dataset": "demo", "synthetic": True}) == "Demo (synthetic)"
    assert G.data_name({"dataset": "beauty", "synthetic": False}) == "Beauty"


def test_paired_difference_needs_the_same_users():
    lists = tied_lists(5)
    people = pl.concat([G.per_user(np.arange(5), {"a": lists}), G.per_user(np.arange(1, 6), {"b": lists})])
    with pytest.raises(UserError, match="different users"): S.difference(people, "a", "b")


def test_measured_figures_are_always_consistent():
    rng = np.random.default_rng(3)
    for _ in range(100):
        lists = [rng.normal(size=100) + rng.uniform(0, 4) * (np.arange(100) == 0) for _ in range(20)]
        row = G.per_user(np.arange(20), {"m": lists}).select(G.METRICS).mean().row(0, named=True)
        assert set(P.consistency(row).values()) == {"ok"}


def test_bounds_are_reached():
    best, worst = ([1] * 3 + [2] * 4 + [6] * 2 + [11], [1] * 3 + [5] * 4 + [10] * 2 + [1e12])
    for ranks, side in ((worst, 0), (best, 1)):
        row = {m: v.mean() for m, v in G.gains(ranks).items()}
        for m, ends in P.bounds(row).items(): assert ends[side] == pytest.approx(row[m], abs=1e-9), m


def test_printed_tables_hang_together():
    paper = P.paper_tables()
    assert paper.shape == (27, 10)
    # as printed
    improvement = {"beauty": [6.46, 20.77, 3.71, 6.46, 26.08, 24.35, 13.43],
                   "toys": [67.12, 22.87, 14.21, 67.12, 23.28, 8.73, 8.95]}
    for dataset, printed in improvement.items():
        rows = P.reported(dataset)
        ours = [100 * (rows["GANPrompt"][m][0] / rows["best baseline"][m][0] - 1) for m in G.METRICS[1:]]
        np.testing.assert_allclose(ours, printed, atol=.011)


def test_marks_of_the_printed_tables():
    marks = {(r["dataset"], r["model"], r["metric"]): r["mark"]
             for r in P.check_tables(P.paper_tables()).iter_rows(named=True)}
    ours = [marks[d, "GANPrompt", f"ndcg@{k}"] for d in ("beauty", "sports", "toys") for k in (5, 10)]
    assert ours == ["too high"] * 4 + ["too low"] * 2
    assert marks["toys", "HGN", "ndcg@10"] == "ok" and marks["beauty", "TALLRec", "mrr"] == "too low"


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Two made-up entries of one study in a repository of their own."""
    monkeypatch.setattr("ganprompt.files.workspace", lambda: tmp_path)
    (tmp_path / "figures").mkdir()
    (tmp_path / "data/results/toy").mkdir(parents=True)
    for seed in (0, 1):
        lists = tied_lists(200, seed)
        people = G.per_user(np.arange(200), {"random": lists, "popularity": lists,
                                             "ganprompt": [s + 3 * (np.arange(len(s)) == 0) for s in lists]})
        record = dict(entry=f"toy-{seed}", dataset="toy", synthetic=True, pocket=True, seed=seed,
                      metrics=S.measure(people, 100),
                      differences={"ganprompt - popularity": S.difference(people, "ganprompt", "popularity", 100)},
                      parameters={"data": {"k": 5, "seed": seed}})
        (tmp_path / f"data/results/toy/toy-{seed}.json").write_text(json.dumps(record))
    return tmp_path


def test_summary_writes_table_and_picture(kept):
    text = M.summary("toy")[0].read_text()
    assert "| toy (synthetic), pocket models | ganprompt" in text and "ganprompt - popularity" in text
    for suffix in (".csv", ".png", ".md", ".html", ".tex"): assert (kept / f"figures/toy{suffix}").stat().st_size
    table = pl.read_csv(kept / "figures/toy.csv").filter(pl.col("model") == "ganprompt")
    assert set(table["seed"]) == {0, 1} and "over 2 trainings and users (a claim wants 5 trainings)" in text
    before = {p: p.read_bytes() for p in (kept / "figures").iterdir()}
    M.summary("toy")
    assert before == {p: p.read_bytes() for p in before}


def test_one_figure_a_line():
    "The three measured numbers stand in their columns, and the paper's beside them."
    found = {"metrics": {"GANPrompt": {m: [.2, .1, .3] for m in G.METRICS}},
             "reported": {"GANPrompt": {m: [.4, "theirs", "!"] for m in G.METRICS}}}
    lines = M.long_table(found)
    assert lines.filter(model="GANPrompt").select("measured", "low", "high").unique().row(0) == (.2, .1, .3)
    theirs = lines.drop_nulls("reported").select("model", "reported", "reported_model", "reported_mark")
    assert set(theirs.rows()) == {("ganprompt", .4, "theirs", "!")}


def test_summary_of_nothing(kept):
    with pytest.raises(UserError, match="ganprompt keep"): M.read_study("nothing")


# --- users with several lists

def test_two_rows_a_user_by_hand():
    """Ranks 1, 3 | 2, 11 | 1, 1: HR@1 is over lists, and a pair of models is compared list by list, in whatever
    order they come."""
    def list_of(rank): return np.r_[0., np.ones(rank - 1), -np.ones(20 - rank)]
    ranks, users, rows = [1, 3, 2, 11, 1, 1], [4, 4, 7, 7, 9, 9], [3, 8, 9, 12, 20, 21]
    a = G.per_user(users, {"a": [list_of(r) for r in ranks]}, rows)
    turned = [1, 0, 5, 4, 3, 2] # the other model's lists come in another order
    b = G.per_user([users[i] for i in turned], {"b": [list_of(ranks[i] + (i == 1)) for i in turned]},
                   [rows[i] for i in turned])
    assert S.measure(a)["a"]["hit@1"][0] == 3/6 and S.measure(a)["a"]["hit@10"][0] == 5/6
    d = S.difference(pl.concat([a, b]), "a", "b")
    assert d["mrr"][0] == pytest.approx((1/3 - 1/4)/6) and d["hit@10"] == [0, 0, 0]
    with pytest.raises(UserError, match="different users"):
        S.difference(pl.concat([a, b.with_columns(pl.col("row") + 1)]), "a", "b")


def test_scores_are_joined_by_their_sequence(shop, tmp_path):
    """A part of the users of a run whose long histories are cut in parts: each model's own list of scores, however
    the file is sorted, and all lists of a drawn user."""
    from conftest import make
    from ganprompt.data import load_candidates, load_sequences
    from ganprompt.recommender import sample_rows
    from ganprompt.runs import stage
    run = tmp_path/"r"
    make(run, "data", shop, max_sequence=6)
    test, lists = load_sequences(str(run), "test"), load_candidates(str(run), "uni99")[1]
    assert test["user"].is_duplicated().any()
    at = sample_rows(test["user"], 30, 0)
    mine = set(np.flatnonzero(test["user"].is_in(test["user"][at].implode())))
    assert len(set(test["user"][at])) == 30 and set(at) == mine
    def recommend(to):
        def rows(model, order):
            return pl.DataFrame({"model": model, "row": test["row"][order], "user": test["user"][order],
                                 "scores": [(lists[i] + .5).tolist() for i in order]})
        pl.concat([rows("ganprompt", at), rows("no-stage-1", at[::-1])]).write_parquet(to/"scores.parquet")
        (to/"recommender.json").write_text(json.dumps({"candidates": "uni99", "pocket": True, "encoder": "pocket"}))
        return {}
    stage(run, "recommender", {}, recommend, inputs=["data"])
    rows, scores = M.collect_scores(str(run))
    assert rows["row"].to_list() == test["row"][at].to_list()
    for model in ("ganprompt", "no-stage-1"):
        for i, z in zip(at, scores[model]): np.testing.assert_array_equal(z, lists[i] + .5)
    result = M.evaluate(str(run), G.per_user(rows["user"], scores, rows["row"]), 50, 0)
    assert ((result["users"], result["rows"]) == (30, len(at))
            and f"{len(at)} lists, for some users have several" in "".join(M.notes(result)))


def test_a_report_says_how_a_model_stands():
    "Generated from the paired differences, with the interval's ends in order."
    def d(*ends): return {m: list(ends) for m in G.METRICS}
    said = M.standing({"GANPrompt": {"random": d(.2, .15, .25), "popularity": d(-.033, -.051, -.012)},
                       "lost": {"random": d(-.01, -.03, .02), "popularity": d(.02, .01, .04)}})
    assert said[0] == ("GANPrompt's HR@10 lies above random by .200 [.150, .250]: it has learned something; below "
                       "popularity by .033 [.012, .051]: it has learned less than a count of purchases tells.")
    assert said[1] == ("lost's HR@10 lies within the noise of random (-.010 [-.030, +.020]): it has not been shown to "
                       "have learned anything; above popularity by .020 [.010, .040]: it knows more than a count of "
                       "purchases.")
    # an interval that touches zero holds it
    edge = M.standing({"edge": {"random": d(.1, 0., .2), "popularity": d(-.1, -.2, 0.)}})[0]
    assert "within the noise of random" in edge and "within the noise of popularity" in edge
    rng = np.random.default_rng(0)
    lists = [rng.normal(size=30) for _ in range(200)]
    people = G.per_user(np.arange(200), {"popularity": [z + 2*(np.arange(30) == 0) for z in lists], "random": lists,
                                         "ganprompt": [z + .7*(np.arange(30) == 0) for z in lists]})
    pairs = {"ganprompt": {other: S.difference(people, "ganprompt", other, 200) for other in ("random", "popularity")}}
    assert "above random" in M.standing(pairs)[0] and "it has learned less than a count" in M.standing(pairs)[0]
