"The tables against values worked by hand, scipy and pdflatex."
import json, re, shutil, subprocess
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest
import scipy.stats
import yaml

from conftest import make
from ganprompt import baselines as B, idmodels as I, measures as G, metrics as M, pages as P, published, results as K
from ganprompt import tables as T
from ganprompt.data import load_candidates, load_sequences
from ganprompt.files import UserError, digest, root, write_json
from ganprompt.runs import manifest, stage

HAND = {"HGN": ["2 3 9 12", "2 2 8 20"], "SASRec": ["1 2 3 4", "1 1 3 15"], "ganprompt": ["1 1 2 4", "1 1 1 4"]}


def table(lists):
    "Kind -> ranks as text and length of the lists, or lengths, as the table of an entry."
    def one(name, x):
        return pl.DataFrame(dict(candidates=name, rank=list(map(int, x["rank"].split())), ties=0, size=x["size"]))
    return pl.concat([one(name, x) for name, x in lists.items()], how="vertical_relaxed")


def put(study, model, seed, ranks, size=21, dataset="beauty", lists=None, **more):
    "Keep a made-up entry."
    family = "ours" if "ganprompt" in model or "no-stage-1" in model else "id"
    kept = dict(model=model, dataset=dataset, synthetic=False, seed=seed, family=family, pocket=family == "ours",
                users=len(ranks.split()), users_digest="hand", data="hand",
                search=[], seconds={"search": 9., "train": 2. + seed, "score": 1.}, machine="by hand") | more
    lists = lists or {"uni99": {"rank": ranks, "size": size}}
    return K.write_entry(K.entry_path(study, dataset, model, seed), kept, table(lists))


@pytest.fixture
def hand(tmp_path):
    "Three models, two seeds, four users."
    for model, seeds in HAND.items():
        for seed, ranks in enumerate(seeds): put(tmp_path/"study", model, seed, ranks)
    return tmp_path/"study"


def made_up(study, users=150, seeds=3, dataset="beauty"):
    """A study of all models, with everything that a table has to cope with: a failed model, one not run, a missing
    seed, awkward names."""
    rng = np.random.default_rng(len(dataset))
    hard = rng.uniform(.3, 1.7, users)
    def ranks(p, size): return " ".join(map(str, np.minimum(rng.geometric(np.clip(p*hard, .001, 1)), size)))
    simple, text = {"random": .01, "popularity": .03, "last-item": .06}, {"P5 (titles)": .05, "P5 (ids)": .06,
            "TALLRec": .1, "A&B_model 5%": .07}
    ours = {"no-stage-1": .11, "ganprompt": .1, "no-stage-1, t5-ranker": .12, "ganprompt, t5-ranker": .12}
    by_id = {"Caser": .08, "DIN": .07, "HGN": .1, "GRU4Rec": .09, "SASRec": .11, "SASRec-CE": .13, "S3Rec": .1,
             "MF": .09, "LightGCN": .1}
    for family, models in dict(simple=simple, id=by_id, text=text, ours=ours).items():
        for model, p in models.items():
            for seed in range(seeds):
                if (model, seed) == ("MF", 1): continue
                lists = {"uni99": {"rank": ranks(p*rng.uniform(.9, 1.1), 100), "size": 100}}
                if family == "id":
                    lists["full"] = {"rank": ranks(p/12, 2600), "size": rng.integers(2590, 2601, users).clip(2600)}
                seconds = {"stage": 1500.} if family == "ours" else {"train": 60*p, "score": 2.}
                put(study, model, seed, "1", dataset=dataset, family=family, pocket=family in ("text", "ours"),
                    users=users, lists=lists, seconds=seconds)
    rows = [dict(dataset=dataset, source="ours", cut=cut, users=4144, items=2675, interactions=36414, sequences=4144,
                 sparsity=99.67) for cut in ("literal", "holdout-first")]
    failed = dict(model="CTRL", seed=0, kept_from="x", why="out of memory & <time>, 100 % of it_")
    K.entry_path(study, dataset, "x", 0).with_name("data.json").write_text(json.dumps(dict(dataset=dataset,
            synthetic=False, table1=rows)))
    K.entry_path(study, dataset, "CTRL", 0).with_suffix(".failed").write_text(json.dumps(failed))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "All tables of a made-up study of two data sets."
    folder = tmp_path_factory.mktemp("whole")
    made_up(folder/"study"); made_up(folder/"study", dataset="shoes_&_co", users=40, seeds=1)
    T.make_tables(folder/"study", folder/"out")
    return folder


def figure(r, model, metric):
    return r.stats.row(by_predicate=(pl.col("model") == model) & (pl.col("metric") == metric), named=True)


def test_hand_worked_figures(hand):
    r = T.results_of(K.read_tables(hand))
    ours, mrr = figure(r, "ganprompt", "hit@1"), figure(r, "HGN", "mrr")
    assert (ours["mean"], ours["seeds"]) == (.625, 2) and ours["sd"] == pytest.approx(.25/2**.5)
    assert (mrr["mean"] == pytest.approx(np.mean([1/2, 1/3, 1/9, 1/12, 1/2, 1/2, 1/8, 1/20]))
            and mrr["sd"] == pytest.approx(np.std([37/36/4, (1 + .175)/4], ddof=1)))
    assert figure(r, "SASRec", "auc")["mean"] == pytest.approx(1 - 22/20/8)
    assert (figure(r, "SASRec", "ndcg@5")["mean"]
            == pytest.approx((3 + np.log(2)/np.log(3) + 2/2 + np.log(2)/np.log(5))/8))
    best = {(row["model"], row["metric"]) for row in r.stats.filter("best").iter_rows(named=True)}
    assert best == {("ganprompt", m) for m in G.METRICS}
    assert ({(row["model"], row["metric"]) for row in r.stats.filter("best_baseline").iter_rows(named=True)}
            == {("SASRec", m) for m in G.METRICS})
    first = r.pairs.row(by_predicate=pl.col("metric") == "hit@1", named=True)
    # both seeds say .25; users 0, .5, .5, 0
    assert (first["improvement"] == pytest.approx(200/3) and first["difference"] == .25 and first["trainings"] == 2
            and first["low"] == pytest.approx(.25 - 1.96*(1/12)**.5/2, abs=1e-4))


def test_hand_worked_page(hand):
    text = P.to_md(T.page_of(T.results_of(K.read_tables(hand))))
    def cells(start):
        return [c.strip() for c in next(line for line in text.splitlines() if line.startswith(start)).split("|")][1:-1]
    assert cells("| GANPrompt (pocket)")[:4] == ["GANPrompt (pocket)", "2", "**.956 ± .009**", "**.625 ± .177**"]
    assert cells("| SASRec ")[3] == r".375 ± .177\*"
    assert cells("| Improvement")[3] == "+66.7"
    assert cells("| HR@1 ") == ["HR@1", "SASRec", "2", ".375", ".625", "+66.7", "+.250 [-.033, +.533]", "no"]
    assert "read titles" not in text and "read titles" in P.to_md(T.page_of(T.results_of(K.read_tables(hand)),
            {"titles": False}))
    assert (cells("| Caser ") == ["Caser", "0 of 2", *["–"]*8]
            and "Caser" in next(line for line in text.splitlines() if line.startswith("No entry")))


def test_negative_improvement_and_zero_baseline(tmp_path):
    put(tmp_path, "HGN", 0, "1 2 30"); put(tmp_path, "ganprompt", 0, "3 8 9", 31)
    path = K.entry_path(tmp_path, "beauty", "HGN", 0)
    path.write_text(rewritten(path.read_text(), "size", "size", 31))
    pairs = T.results_of(K.read_tables(tmp_path)).pairs
    assert dict(pairs.select("metric", "improvement").iter_rows())["hit@1"] == -100
    assert dict(pairs.select("metric", "improvement").iter_rows())["hit@10"] == pytest.approx(50)
    put(tmp_path, "HGN", 0, "21 21 21", 31)
    r = T.results_of(K.read_tables(tmp_path))
    assert (dict(r.pairs.select("metric", "improvement").iter_rows())["hit@1"] is None
            and "| Improvement (%) " in P.to_md(T.page_of(r)))


def test_the_interval_of_one_training_is_scipys(tmp_path):
    ranks = np.random.default_rng(0).integers(1, 100, 400)
    put(tmp_path, "HGN", 0, " ".join(map(str, ranks)), 100)
    r = T.results_of(K.read_tables(tmp_path))
    row, error = figure(r, "HGN", "mrr"), (1/ranks).std()/400**.5
    theirs = scipy.stats.bootstrap([1/ranks], np.mean, method="percentile", n_resamples=4000, rng=1).confidence_interval
    assert abs(row["low"] - theirs.low) < .2*error and abs(row["high"] - theirs.high) < .2*error
    assert "95 % intervals over users, for one training: they say nothing of the method" in P.to_md(T.page_of(r))


def test_the_interval_of_several_trainings_is_students(tmp_path):
    ranks = np.random.default_rng(0).integers(1, 100, (3, 400))
    for seed in range(3): put(tmp_path, "HGN", seed, " ".join(map(str, ranks[seed])), 100)
    r = T.results_of(K.read_tables(tmp_path))
    row, x = figure(r, "HGN", "mrr"), 1/ranks
    low, high = scipy.stats.t.interval(.95, 2, x.mean(), scipy.stats.sem(x.mean(1)))
    users = 1.96*scipy.stats.sem(x.mean(0))
    assert (row["high"] - row["low"])/2 == pytest.approx((((high - low)/2)**2 + users**2)**.5, rel=1e-4)
    assert "95 % intervals over 3 trainings and users (a claim wants 5 trainings)" in P.to_md(T.page_of(r))


def test_one_training_gives_no_verdict(tmp_path):
    "GANPrompt is better for every user: with one training that is still no claim, with two that agree it is one."
    put(tmp_path, "HGN", 0, "5 5 5 5"); put(tmp_path, "ganprompt", 0, "1 1 1 1")
    def verdicts():
        return {line.split("|")[-2].strip()
                for line in P.to_md(T.page_of(T.results_of(K.read_tables(tmp_path)))).splitlines()
                if line.startswith(("| HR@1 ", "| MRR "))}
    assert verdicts() == {"–"}
    put(tmp_path, "HGN", 1, "5 5 5 5"); put(tmp_path, "ganprompt", 1, "1 1 1 1")
    assert verdicts() == {"yes, better"}


def test_tau_and_swaps(whole):
    entries = [e for e in K.read_tables(whole/"study") if e["dataset"] == "beauty"]
    ids = [e for e in entries if e["family"] == "id"]
    models = list(dict.fromkeys(e["model"] for e in ids))
    def mean(model, name):
        return np.mean([G.gains(e["lists"][name].rank)["mrr"].mean() for e in ids if e["model"] == model])
    u, f = ([mean(m, name) for m in models] for name in ("uni99", "full"))
    row = K.sampling_table(entries).row(by_predicate=pl.col("metric") == "mrr", named=True)
    assert (row["tau"] == pytest.approx(scipy.stats.kendalltau(u, f).statistic) and row["models"] == 9
            and row["pairs"] == 36)
    swapped = {f"{a} > {b}" for i, a in enumerate(models) for j, b in enumerate(models) if u[i] > u[j] and f[i] < f[j]}
    assert set(filter(None, row["swapped"].split(", "))) == swapped and len(swapped) == round(36*(1 - row["tau"])/2)


def test_a_clear_swap_is_told(tmp_path):
    n = 60
    for seed, clear in ((0, ""), (1, "HGN > SASRec")): # one training makes nothing clear
        for model, sampled, full in (("HGN", "1", "99"), ("SASRec", "5", "1")):
            put(tmp_path, model, seed, "1", users=n, lists={"uni99": {"rank": " ".join([sampled]*n), "size": 100},
                                                            "full": {"rank": " ".join([full]*n), "size": 2000}})
        row = K.sampling_table(K.read_tables(tmp_path)).row(by_predicate=pl.col("metric") == "mrr", named=True)
        assert (row["tau"], row["swapped"], row["clear"]) == (-1, "HGN > SASRec", clear)


def test_auc_comes_back_from_rank_and_ties(tmp_path):
    rng = np.random.default_rng(1)
    lists = [rng.integers(0, 4, rng.integers(2, 50)).astype(float) for _ in range(200)]
    path = K.write_entry(tmp_path/"s/d/m-0.json", {}, I.rank_rows("m", range(200), "uni99", lists))
    want = G.ranking(lists)
    got = G.figures_of(*K.read_entry(path, lambda e, table: {"ranks": K.ranks_of(table, 200)})["ranks"])
    np.testing.assert_allclose(got["auc"], want["auc"], atol=1e-12)
    np.testing.assert_allclose(got["mrr"], 1/want["rank"], atol=0)


def test_other_users_are_refused(hand):
    put(hand, "ganprompt", 1, "1 1 1 4", users_digest="others")
    with pytest.raises(UserError, match=r"ganprompt \(seed 1\) and HGN \(seed 0\) were scored for different users"):
        T.make_tables(hand, hand/"out")


def rewritten(text, name, new_name, value=None):
    "A kept file's text in which one key, at any depth, has another name or another value, however it is laid out."
    def pairs(found):
        return {new_name if k == name else k: v if k != name or value is None else value for k, v in found}
    return json.dumps(json.loads(text, object_pairs_hook=pairs))


@pytest.mark.parametrize("change", [
    lambda s: s[:50], lambda s: "[]",
    *(lambda s, how=how: rewritten(s, *how) for how in (
        ("users", "users", 5), ("ranks_digest", "ranks_digest", 3), ("users_digest", "digest"),
        ("ranks_digest", "digest"), ("size", "size", 11), ("size", "sizes"), ("ties", "ties", 2)))])
def test_damaged_entries_are_named(hand, change):
    path = K.entry_path(hand, "beauty", "HGN", 0)
    before = path.read_text()
    path.write_text(change(before))
    assert path.read_text() != before
    with pytest.raises(UserError, match="hgn-0.json is damaged .* ganprompt keep"): K.read_tables(hand)


@pytest.mark.parametrize("ranks", [[2, 0, 9, 12], [2, 3, 9, 22], ["2", "3", "x", "12"], [2, None, 9, 12], [2, 3, 9],
                                   [2, 3, 9, 12, 1]])
def test_impossible_ranks_are_refused(hand, ranks):
    put(hand, "HGN", 0, "1 1 1 1")
    path = K.entry_path(hand, "beauty", "HGN", 0)
    rows = pl.DataFrame(dict(candidates="uni99", rank=ranks, ties=0, size=21))
    K.write_entry(path, json.loads(path.read_text()), rows)
    with pytest.raises(UserError, match="hgn-0.json is damaged .* ganprompt keep"): K.read_tables(hand)


def test_data_that_were_found_to_be_the_same_are_compared(hand):
    "Their files differ in a column, so that their hashes do; what is not on the list is other data."
    (first, second, *_), *_ = yaml.safe_load((root()/"data/same_data.yaml").read_text())
    assert first != second
    put(hand, "HGN", 0, HAND["HGN"][0], data=first)
    with pytest.raises(UserError, match="different users or lists"): K.people(K.read_tables(hand))
    for model, seeds in HAND.items():
        for seed, ranks in enumerate(seeds): put(hand, model, seed, ranks, data=second if model == "HGN" else first)
    assert len(K.people(K.read_tables(hand))) == 24


def test_nothing_kept(tmp_path):
    with pytest.raises(UserError, match="ganprompt keep"): T.make_tables(tmp_path/"none", tmp_path/"out")
    assert not (tmp_path/"out").exists()


def test_twice_the_same_bytes(whole):
    before = {p.name: p.read_bytes() for p in (whole/"out").iterdir()}
    assert {p.name for p in T.make_tables(whole/"study", whole/"out")} == set(before)
    assert before == {p.name: p.read_bytes() for p in (whole/"out").iterdir()}
    assert {"table1.tex", "table2_beauty.html", "table2_beauty.png", "table_shoes-co.md", "sampling.csv"} <= set(before)


def test_what_is_missing_is_said(whole):
    text = (whole/"out/table2_beauty.md").read_text()
    assert "Missing seeds: MF: 1." in text and "No entry on uni99 lists: BERT4Rec, CoLLM." in text
    assert (re.search(r"\| MF +\| 2 of 3 ", text) and re.search(r"\| CTRL +\| 0 of 3 +\| – ", text)
            and "Failed: CTRL, seed 0: out of memory" in text)


def test_rows_are_in_the_papers_order(whole):
    r = T.results_of([e for e in K.read_tables(whole/"study") if e["dataset"] == "beauty"])
    assert [row["model"] for row in r.rows] == ["last-item", "popularity", "random", "Caser", "DIN", "HGN", "GRU4Rec",
                                                "BERT4Rec", "SASRec", "SASRec-CE", "S3Rec", "MF", "LightGCN",
                                                "P5 (ids)", "P5 (titles)",
                                                "TALLRec", "CoLLM", "CTRL", "A&B_model 5%", "no-stage-1, t5-ranker",
                                                "ganprompt, t5-ranker", "no-stage-1", "ganprompt"]
    assert r.pairs["baseline"].is_in(["ganprompt", "no-stage-1"]).sum() == 0


def test_reported_figures_have_their_marks(whole):
    marks = {(r["model"], r["metric"]): r["mark"]
             for r in published.check_tables(published.paper_tables().filter(dataset="beauty")).iter_rows(named=True)}
    text = (whole/"out/table2_beauty.md").read_text()
    for line in text.splitlines():
        if "(reported)" in line:
            name, *cells = [c.strip() for c in line.split("|")[1:-1]]
            for metric, cell in zip(G.METRICS, cells):
                assert ("(!)" in cell) == (marks.get((name.removesuffix(" (reported)"), metric), "ok") != "ok"), (name,
                        metric)
    assert text.count("(reported)") == 9 and text.count("(!)") > 9
    table = pl.read_csv(whole/"out/table2_beauty.csv")
    both = table.filter(model="ganprompt", metric="ndcg@5").row(0, named=True)
    assert both["reported"] == .552869 and both["reported_mark"] == "too high" and 0 < both["measured"] < 1
    assert table.filter(reported_model="P5", metric="auc")["measured"].to_list() == [None]
    assert "(reported)" not in (whole/"out/table_shoes-co.md").read_text()


class Shape(HTMLParser):
    "Tags that are open, cells a row, scripts."
    def __init__(self): super().__init__(); self.open, self.rows, self.tags = [], [], []
    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "tr": self.rows.append(0)
        if tag in ("td", "th"): self.rows[-1] += 1
        if tag not in ("meta", "img"): self.open.append(tag)
    def handle_endtag(self, tag): assert self.open.pop() == tag


@pytest.mark.parametrize("name", ["table1", "table2_beauty", "table_shoes-co"])
def test_html_is_whole(whole, name):
    text, shape = (whole/f"out/{name}.html").read_text(), Shape()
    shape.feed(text)
    assert (not shape.open and "script" not in shape.tags and shape.tags.count("caption") == shape.tags.count("table")
            and "http" not in text)
    for block in re.findall(r"<table>.*?</table>", text, re.S):
        one = Shape(); one.feed(block)
        assert len(set(one.rows)) == 1
    if "beauty" in name:
        assert "A&amp;B_model 5%" in text and "&lt;time&gt;" in text and "<strong>" in text and "<sup>*</sup>" in text


@pytest.mark.parametrize("name", ["table1", "table2_beauty", "table_shoes-co"])
def test_latex_compiles(whole, name):
    text = (whole/f"out/{name}.tex").read_text()
    assert (text.count(r"\begin{table}") == text.count(r"\end{tabular}") == text.count(r"\toprule")
            == text.count(r"\bottomrule"))
    for block in re.findall(r"\\toprule\n(.*?)\\bottomrule", text, re.S):
        assert len({len(re.findall(r"(?<!\\)&", line)) for line in block.splitlines() if line.endswith(r"\\")}) == 1
    if "beauty" in name:
        assert r"A\&B\_model 5\%" in text and r"\textbf{" in text and "$^*$" in text and r"of it\_" in text
    if not shutil.which("pdflatex"): return
    done = subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", f"-output-directory={whole}",
                           whole/f"out/{name}.tex"], capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Overfull" not in done.stdout, re.findall("Overfull.*", done.stdout)


def test_escapes():
    assert P.written("t5-x -.5 [-1, -2]", "tex") == "t5-x $-$.5 [$-$1, $-$2]"
    assert (P.written("50% of A&B_c #1 {x} ~ ^ \\ ± –", "tex")
            == r"50\% of A\&B\_c \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} $\pm$ --")
    assert P.written("a|b*", "md") == r"a\|b\*" and P.written("<b>&", "html") == "&lt;b&gt;&amp;"


@pytest.fixture
def run(shop, tmp_path):
    """A run with a data stage, recommenders whose scores are drawn at random, and a baseline stage as those chapters
    leave it."""
    folder = tmp_path/"shop-3"
    make(folder, "data", shop)
    users, lists = load_candidates(str(folder), "uni99")
    numbers = load_sequences(str(folder), "test")["row"][:50]
    rng = np.random.default_rng(0)
    def scored(i): return [rng.integers(0, 9, len(x)).astype(np.float32) for x in lists[i:i + 50]]
    def recommend(to):
        pl.concat([pl.DataFrame({"model": model, "row": numbers, "user": users[:50], "scores": scored(0)})
                   for model in ("no-stage-1", "ganprompt", "ganprompt, causal-lm")]).write_parquet(to/"scores.parquet")
        write_json(to/"recommender.json", {"candidates": "uni99", "pocket": True, "encoder": "pocket", "llm": "tiny",
                                           "backbones": {"no-stage-1": ["pocket"], "ganprompt": ["pocket"],
                                                         "ganprompt, causal-lm": ["pocket", "tiny"]}})
        return {"valid_auc ganprompt": .7}
    def baseline(to):
        frames = [I.rank_rows(m, users[:50], c, scored(0)) for m in ("HGN", "popularity") for c in ("uni99", "full")]
        return B.finish(to, frames, {"HGN": ABOUT, "popularity": dict(family="simple", pocket=False),
                                     "CTRL": dict(family="text", failed="no memory")})
    for name, what in (("recommender", recommend), ("baselines", baseline)):
        stage(folder, name, dict(seed=3), what, inputs=["data"])
    return folder


ABOUT = dict(family="id", pocket=False, settings={"width": 8}, search=[{"settings": {"width": 8}, "valid": .5}],
             valid=.5, valid_metric="ndcg@10", parameters=99, seconds={"train": 1.5})


def test_keep_models_of_a_run(run, tmp_path):
    paths = K.keep_models(str(run), tmp_path/"study")
    kept = {e["model"]: e for e in (K.read_entry(p, K.lists_of) for p in paths[1:])}
    assert set(kept) == {"random", "popularity", "HGN", "no-stage-1", "ganprompt", "ganprompt, causal-lm"}
    assert [p.name for p in paths] == ["data.json", "random-3.json", "popularity-3.json",
                                       *(f"{m}-3.json" for m in ("no-stage-1", "ganprompt", "ganprompt-causal-lm",
                                               "hgn"))]
    assert kept["popularity"]["stage"] == "baselines" and kept["random"]["stage"] == "recommender"
    ours, hgn = kept["ganprompt, causal-lm"], kept["HGN"]
    assert (ours["family"], ours["pocket"], ours["backbone"], kept["ganprompt"]["backbone"],
            kept["ganprompt"]["valid"]) == ("ours", True, "pocket + tiny", "pocket", .7)
    rows, scores = M.collect_scores(str(run), 3)
    assert ({e["users_digest"] for e in kept.values()} == {digest(rows["user"].to_list())}
            and hgn["fingerprint"] == manifest(run, "baselines")["fingerprint"])
    assert hgn["weights"] == 99 and hgn["parameters"] == {"seed": 3} and hgn["search"] == ABOUT["search"]
    assert not any(str(tmp_path) in p.read_text() for p in paths)
    for model, lists in scores.items():
        if model == "popularity": continue
        np.testing.assert_allclose(G.figures_of(*kept[model]["lists"]["uni99"])["auc"], G.ranking(lists)["auc"],
                                   atol=1e-12)


def test_keep_again_and_what_is_lacking(run, tmp_path):
    study = tmp_path/"study"
    paths = K.keep_models(str(run), study)
    first = paths[0]
    data = json.loads(first.read_text())
    assert [row["cut"] for row in data["table1"]] == ["literal", "holdout-first"]
    assert (json.loads((first.parent/"ctrl-3.failed").read_text())
            == dict(model="CTRL", seed=3, kept_from="shop-3", why="no memory"))
    assert (K.lacking(study, data["dataset"], 3, ["HGN", "CTRL", "popularity"]) == ["CTRL"]
            and K.lacking(study, "elsewhere/" + data["dataset"], 4, ["HGN"]) == ["HGN"])
    assert K.keep_models(str(run), study) == paths and json.loads(first.read_text()) == data
    text = next(p for p in T.make_tables(study, tmp_path/"out") if p.suffix == ".md").read_text()
    assert "Failed: CTRL, seed 3: no memory" in text and "GANPrompt, causal-lm (pocket)" in text


def test_nothing_to_keep(run, tmp_path):
    for name in ("recommender", "baselines"): shutil.rmtree(run/name)
    with pytest.raises(UserError, match="no ranked models; make some: ganprompt run"):
        K.keep_models(str(run), tmp_path/"study")


def test_a_user_with_several_lists_is_one_person():
    "Ranks 1, 3 of one user and 2 of another: the first user's figures are means over both lists."
    rows = I.rank_rows("m", [7, 7, 9], "uni99", [np.r_[0., np.ones(r - 1), -np.ones(9)] for r in (1, 3, 2)])
    e = dict(model="m", seed=0, dataset="toy", users=3, users_digest="x", data="y")
    e |= {"lists": {"uni99": K.ranks_of(rows, 3)}} | K.owners_of(K.owned(rows, 3), 3)
    people = K.people([e])
    assert (people["user"].to_list() == [0, 1] and people["hit@1"].to_list() == [.5, 0]
            and people["mrr"].to_list() == pytest.approx([2/3, 1/2]))
    del e["owners"]
    assert len(K.people([e])) == 3 and K.owners_of(K.owned(rows.with_columns(user=pl.Series([7, 8, 9])), 3), 3) == {}


def ranked(rng, users, kinds=("uni99", "full")):
    "Lists full of ties and of many lengths, as a run ranks them."
    def scores(): return rng.integers(0, 4, rng.integers(2, 50)).astype(float)
    rows = pl.concat([I.rank_rows("m", users, name, [scores() for _ in users]) for name in kinds])
    return rows.select("candidates", "user", *K.Ranks._fields)


def kept_entry(study, rng, model="HGN", users=range(40), **more):
    "An entry of lists drawn at random: (its JSON, its ranks)."
    e = dict(model=model, dataset="beauty", synthetic=False, seed=0, family="id", pocket=False, users=len(users),
             users_digest="u", data="d", search=[], seconds={}, machine="m") | more
    rows = ranked(rng, users)
    return K.write_entry(K.entry_path(study, "beauty", model, 0), e, K.owned(rows, len(users))), rows


def ranks_file(path):
    (found,) = path.parent.glob(f"{path.stem}.*.parquet")
    return found


@pytest.mark.parametrize("users", [range(40), [0, 0, 5, 5, 5, 2]])
def test_ranks_come_back_as_they_were(tmp_path, users):
    path, rows = kept_entry(tmp_path, np.random.default_rng(0), users=users)
    (e,) = K.read_tables(tmp_path)
    for name, found in e["lists"].items():
        for c, x in zip(K.Ranks._fields, found):
            assert x.dtype == np.int64 and x.tolist() == rows.filter(candidates=name)[c].to_list()
    assert list(e["lists"]) == ["uni99", "full"]
    assert e["owners"].tolist() == [0, 0, 2, 2, 2, 1] if isinstance(users, list) else "owners" not in e


@pytest.mark.parametrize("ties, size, columns, constant", [
    (0, 21, [], {"ties": 0, "size": 21}), ([0, 0, 1, 0], 21, ["ties"], {"size": 21}),
    (0, [21, 22, 21, 30], ["size"], {"ties": 0}), ([0, 2, 1, 0], [4, 5, 6, 7], ["ties", "size"], {})])
def test_what_is_the_same_for_all_is_said_once(hand, ties, size, columns, constant):
    path = K.entry_path(hand, "beauty", "HGN", 0)
    rows = pl.DataFrame(dict(candidates="uni99", rank=[1, 3, 2, 4], ties=ties, size=size))
    K.write_entry(path, json.loads(path.read_text()), rows)
    assert pl.read_parquet(ranks_file(path)).columns == ["candidates", "rank", *columns]
    assert json.loads(path.read_text())["constant"] == constant
    for x, want in zip(K.read_tables(hand)[0]["lists"]["uni99"], ([1, 3, 2, 4], ties, size)):
        assert x.tolist() == np.broadcast_to(want, 4).tolist()


def flipped(content): return content[:30] + bytes([content[30] ^ 1]) + content[31:]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:len(b)//2], lambda b: b"", lambda b: b + b"x",
                                    flipped, lambda b: b"version https://git-lfs.github.com/spec/v1\n"])
def test_damaged_ranks_are_named(hand, damage):
    file = ranks_file(K.entry_path(hand, "beauty", "HGN", 0))
    file.write_bytes(damage(file.read_bytes()))
    said = rf"{file.name} is damaged, which hgn-0.json names; .* ganprompt keep RUN --study {hand.name}"
    with pytest.raises(UserError, match=said): K.read_tables(hand)


@pytest.mark.parametrize("lose", ["unlink", "rename"])
def test_missing_ranks_are_named(hand, lose):
    file = ranks_file(K.entry_path(hand, "beauty", "HGN", 0))
    file.unlink() if lose == "unlink" else file.rename(file.with_name("hgn-0.parquet"))
    said = rf"{file.name} is missing, which hgn-0.json names; restore it"
    with pytest.raises(UserError, match=said): K.read_tables(hand)


def test_ranks_of_another_entry_are_not_taken_for_its_own(hand):
    mine, other = (ranks_file(K.entry_path(hand, "beauty", "HGN", seed)) for seed in (0, 1))
    shutil.copy(other, mine)
    with pytest.raises(UserError, match=f"{mine.name} is damaged"): K.read_tables(hand)


def contents(folder): return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_replacing_an_entry_touches_no_other(hand):
    before, path = contents(hand), K.entry_path(hand, "beauty", "HGN", 0)
    mine = {path, ranks_file(path)}
    put(hand, "HGN", 0, "5 5 5 5")
    after = contents(hand)
    assert all(after[p] == b for p, b in before.items() if p not in mine)
    assert set(after) - set(before) == {ranks_file(path)} and set(before) - set(after) == mine - {path}
    put(hand, "HGN", 0, "2 3 9 12")
    assert contents(hand) == before


class Kill(BaseException): pass


@pytest.mark.parametrize("step", range(4))
def test_a_kill_leaves_the_old_entry_or_the_new_one(hand, monkeypatch, step):
    "Killed before the ranks have their name, before the JSON is written or has its name, and before the old ranks go."
    def figures():
        mine = [e for e in K.read_tables(hand) if "weights" in e]
        return [(e["model"], e["seed"], e["weights"], e["lists"]["uni99"].rank.tolist()) for e in mine]
    path = put(hand, "HGN", 0, "1 2 3 4", weights=1)
    with monkeypatch.context() as m:
        def dies(*args, **more): raise Kill
        m.setattr(*[(T.Path, "rename"), (K, "write_json"), (T.Path, "replace"), (T.Path, "unlink")][step], dies)
        with pytest.raises(Kill): put(hand, "HGN", 0, "4 3 2 1", weights=2)
    old, new = ("HGN", 0, 1, [1, 2, 3, 4]), ("HGN", 0, 2, [4, 3, 2, 1])
    assert figures() == [new if step == 3 else old]
    put(hand, "HGN", 0, "4 3 2 1", weights=2)
    assert figures() == [new] and ranks_file(path) and K.read_tables(hand)


def test_a_first_entry_that_was_cut_short_is_not_there(tmp_path, monkeypatch):
    with monkeypatch.context() as m:
        def dies(*args, **more): raise Kill
        m.setattr(K, "write_json", dies)
        with pytest.raises(Kill): put(tmp_path, "HGN", 0, "1 2")
    assert K.lacking(tmp_path, "beauty", 0, ["HGN"]) == ["HGN"]
    put(tmp_path, "HGN", 0, "2 1")
    assert K.lacking(tmp_path, "beauty", 0, ["HGN"]) == [] and len(contents(tmp_path)) == 2


def test_entries_of_two_machines_are_put_together_by_copying(tmp_path):
    "Each made some of the models, both made one of them; the last copy of its JSON counts."
    def all_of(study): return {e["model"]: e["lists"]["uni99"].rank.tolist() for e in K.read_tables(study)}
    here, there = tmp_path/"here", tmp_path/"there"
    for model, ranks in (("HGN", "1 2 3"), ("SASRec", "3 2 1")): put(here, model, 0, ranks)
    for model, ranks in (("MF", "4 4 4"), ("SASRec", "1 1 1")): put(there, model, 0, ranks)
    shutil.copytree(there, here, dirs_exist_ok=True)
    assert all_of(here) == {"HGN": [1, 2, 3], "MF": [4, 4, 4], "SASRec": [1, 1, 1]}
    put(here, "SASRec", 0, "2 2 2")
    assert all_of(here)["SASRec"] == [2, 2, 2] and len(contents(here)) == 6


def test_the_kept_results_are_whole_and_small():
    "Every file of ranks is named by the JSON beside it, and by it alone."
    home, named = T.root()/"data/results", set()
    for path in home.glob("*/*/*.json"):
        if path.name == "data.json": continue
        named.add(K.ranks_path(path, json.loads(path.read_text())["ranks_digest"]))
    assert named == set(home.rglob("*.parquet")) and all(p.stat().st_size < 150_000 for p in home.rglob("*.*"))


def test_sequences_are_compared_on_the_same_users_and_seeds(tmp_path):
    "From the kept files, without the library: NDCG@10 of every user, paired differences, Student's t over seeds."
    kept, at = root()/"data/results/sequences", {}
    T.make_sequences("sequences", tmp_path)
    said = pl.read_csv(tmp_path/"sequences.csv")
    for model in "sasrec-ce", "sequence-towers":
        for path in sorted((kept/"toys").glob(f"{model}-?.json")):
            e = json.loads(path.read_text())
            ranks = pl.read_parquet(kept/f"toys/{path.stem}.{e['ranks_digest'][:12]}.parquet")
            r = ranks.filter(candidates="uni99")["rank"].to_numpy()
            at.setdefault(model, {})[e["seed"]] = np.where(r <= 10, 1/np.log2(r + 1), 0.)
    gaps = np.stack([at["sequence-towers"][s] - at["sasrec-ce"][s] for s in at["sequence-towers"]])
    n, mean = len(gaps), gaps.mean()
    half = np.sqrt(scipy.stats.t.ppf(.975, n - 1)**2*gaps.mean(axis=1).var(ddof=1)/n
                   + 1.96**2*gaps.mean(axis=0).var(ddof=1)/gaps.shape[1])
    row = said.filter(dataset="toys", model="Sequence (towers)", against="SASRec-CE", candidates="uni99",
                      metric="ndcg@10").row(0, named=True)
    np.testing.assert_allclose([row["value"], row["low"], row["high"]], [mean, mean - half, mean + half], atol=1e-5)
    assert row["trainings"] == n and row["low"] > 0
