"""Figures 1 to 3 from what is kept: the same points, the same figures, nobody's number and no title of a release."""
import json, re

import numpy as np
import polars as pl
import pytest

from ganprompt import pictures as P
from ganprompt.files import UserError, root
from ganprompt.pages import TWO_COLUMNS

STUDIES = "figure1", "figure2", "figure3", "coupling"


def toy_points(users=5, versions=3):
    rng = np.random.default_rng(0)
    who = pl.DataFrame(dict(user=np.repeat([7, 4, 90, 11, 30][:users], versions), version=[*range(versions)]*users))
    return pl.concat([who.select(pl.lit(m).alias("method"), pl.lit(s).alias("stage"), "user", "version",
                                 **{c: pl.Series(rng.normal(size=len(who))*20) for c in "xy"})
                      for m in ("UMAP", "t-SNE") for s in ("before", "after")])


def keep_toy(home, dataset, coupling="cooperative", seed=0, probe=.5, users=5):
    separability = {w: dict(silhouette=.1, knn_purity=.2, linear_probe=p)
                    for w, p in (("before", probe), ("after", 1.))}
    e = dict(dataset=dataset, synthetic=False, pocket=True, words=["a", "b"], separability=separability,
             coupling=coupling, users=users, seed=seed)
    return P.write_entry(P.entry_path(home, dataset, coupling, seed), e, P.small_points(toy_points()))


def test_points_lose_the_number_of_their_user_and_keep_their_place():
    points = toy_points()
    small = P.small_points(points)
    assert sorted(set(small["user"])) == [0, 1, 2, 3, 4] and small.columns == points.columns
    pairs = set(zip(points["user"], small["user"]))
    assert len(pairs) == 5 # one for one
    np.testing.assert_allclose(small.select("x", "y"), points.select("x", "y"), atol=.0051)


def test_points_are_drawn_as_they_are_kept(tmp_path, monkeypatch):
    "One entry a data set, the first seed's, in the paper's order; titles and page say what the entries say."
    home = tmp_path/"figure3"
    for dataset, seed, probe in (("toys", 0, .4), ("beauty", 1, .9), ("beauty", 0, .3)): keep_toy(home, dataset,
            seed=seed, probe=probe)
    drawn, draw = {}, P.draw_six
    def watched(rows, method="UMAP"):
        drawn[method] = draw(rows, method)
        return drawn[method]
    monkeypatch.setattr(P, "draw_six", watched)
    made = P.draw_points(home, tmp_path/"out")
    assert {p.name for p in made} == {"figure3.md", "figure3.html", "figure3.tex", "figure3.csv", "figure3.png",
                                      "figure3.pdf", "figure3-tsne.png", "figure3-tsne.pdf"}
    for method, fig in drawn.items():
        assert [s.get_suptitle().partition(":")[0] for s in fig.subfigs] == ["Beauty", "Toys"]
        assert [re.search(r"probe ([.\d]+)", ax.get_title())[1] for ax in fig.axes] == ["0.30", "1.00", "0.40", "1.00"]
        kept = pl.read_parquet(next(home.glob("toys/*.parquet"))).filter(method=method, stage="after")
        dots = np.concatenate([c.get_offsets() for c in fig.axes[3].collections])
        assert sorted(map(tuple, dots)) == sorted(kept.select("x", "y").rows())
    page = pl.read_csv(tmp_path/"out/figure3.csv")
    assert page.select("dataset", "seed", "when", "linear_probe").rows() == [
        (dataset, seed, *x) for dataset, seed, probe in (("Beauty", 0, .3), ("Beauty", 1, .9), ("Toys", 0, .4))
        for x in (("before", probe), ("after", 1.))]
    assert b"/Type3" not in (tmp_path/"out/figure3.pdf").read_bytes()


def test_points_that_do_not_fit_their_entry_are_refused(tmp_path):
    path = keep_toy(tmp_path/"figure3", "beauty")
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(users=4)))
    with pytest.raises(UserError, match="cooperative-0.json is damaged .*60 points in place of 48"):
        P.read_points(tmp_path/"figure3")
    with pytest.raises(UserError, match="keep RUN --study"): P.read_points(tmp_path/"coupling")


def test_couplings_stand_in_their_order(tmp_path, monkeypatch):
    for coupling in ("none", "adversarial", "cooperative"): keep_toy(tmp_path/"coupling", "demo", coupling)
    seen = []
    monkeypatch.setattr(P, "draw_couplings", lambda rows: seen.extend(e["coupling"] for e, _ in rows))
    monkeypatch.setattr(P, "save_figure", lambda fig, stem: [stem])
    assert P.draw_kept_couplings(tmp_path/"coupling", tmp_path)[0].name == "coupling"
    assert seen == ["cooperative", "adversarial", "none"]


def facts(**more):
    head = [["Lamp", False], ["Bag", True], ["Mug", False]]
    words = "Will the user buy [item] ? "*3
    rows = [dict(group=g, words=words, heads=[head]*2, ranks=[2, 2]) for g in ("paper", "noise")]
    return dict(dataset="demo", synthetic=True, pocket=True, recommender="t5-ranker", names=["one", "two"], user=3,
                users=60, rows=rows) | more


def test_figure_1_says_history_wordings_and_heads():
    fig = P.draw_figure1(facts(), "Bought so far: Hat; Cup.")
    said = [t.get_text() for t in fig.axes[0].texts]
    assert "Bought so far: Hat; Cup." in said and said.count("2  Bag") == said.count("rank of what was bought: 2") == 4
    marked = {t.get_text() for t in fig.axes[0].texts if t.get_bbox_patch()}
    assert marked == {"2  Bag"} and "Demo (synthetic), t5-ranker (pocket)" in said[0]
    assert fig.get_size_inches()[0] == TWO_COLUMNS and {t.get_fontsize() for t in fig.axes[0].texts} == {7}
    fig.draw_without_rendering()
    boxes = [t.get_window_extent() for t in fig.axes[0].texts]
    assert all(0 <= b.x0 and b.x1 <= fig.bbox.x1 and 0 <= b.y0 and b.y1 <= fig.bbox.y1 for b in boxes)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i] if abs(a.y0 - b.y0) > 5)


def test_titles_of_a_release_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(P, "dataset_info", lambda run: dict(dataset="beauty", synthetic=False))
    with pytest.raises(UserError, match="those of beauty are not ours to print"):
        P.keep_figure1("any", tmp_path/"figure1")
    assert not (tmp_path/"figure1").exists()


def test_the_kept_pictures_are_small_and_name_no_user_and_no_title():
    home = root()/"data/results"
    for path in (home/"figure3").glob("*/*.json"):
        e = json.loads(path.read_text())
        table = pl.read_parquet(P.read_points("figure3") and next(path.parent.glob(f"{path.stem}.*.parquet")))
        assert table.columns == ["method", "stage", "user", "version", "x", "y"] and not e["synthetic"]
        assert sorted(set(table["user"])) == list(range(e["users"])) and not {"history", "titles"} & set(e)
        assert e["made"].keys() == {"encoder", "figures"} and not any(m["dirty"] for m in e["made"].values())
    for path in (home/"figure1").glob("*.json"): assert json.loads(path.read_text())["synthetic"]
    assert all(p.stat().st_size < 150_000 for study in STUDIES for p in (home/study).rglob("*.*"))


@pytest.mark.parametrize("study", STUDIES)
def test_the_committed_pictures_are_those_of_what_is_kept(study, tmp_path, monkeypatch, capsys):
    made = P.STUDIES[study].draw(study, tmp_path)
    for path in made:
        if path.suffix in (".md", ".csv"): assert path.read_text() == (root()/"figures"/path.name).read_text()
        assert (root()/"figures"/path.name).exists(), path.name
    assert sum(p.stat().st_size for p in made if p.suffix == ".pdf") < 600_000
