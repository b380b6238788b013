"""Figures 2 and 3: the same picture twice, the same users in every panel, versions apart where the states are apart."""

import numpy as np
import polars as pl
import pytest
from matplotlib.text import Text

from ganprompt import figures as F
from ganprompt.files import UserError
from ganprompt.pages import COLUMN, PRINT, TWO_COLUMNS, for_print, save_figure

VERSIONS = 6


def blobs(shift, users=40, dims=16, seed=0):
    rng = np.random.default_rng(seed)
    version = np.tile(np.arange(VERSIONS), users)
    x = np.repeat(rng.normal(size=(users, dims)), VERSIONS, axis=0) + .2 * rng.normal(size=(users * VERSIONS, dims))
    return version, x + shift * rng.normal(size=(VERSIONS, dims))[version]


@pytest.fixture(scope="module")
def states():
    frames = []
    for stage, shift in (("before", 0), ("after", 6)):
        version, x = blobs(shift)
        frames.append(pl.DataFrame(dict(stage=stage, user=np.repeat(np.arange(40), VERSIONS), version=version,
                                        x=x.tolist())))
    return pl.concat(frames)


@pytest.fixture(scope="module")
def points(states): return F.layout_points(states, 30, seed=3)


ABOUT = dict(dataset="toy", synthetic=True, pocket=True, words=list("abcde"), coupling="none",
             separability=dict(before=dict(silhouette=-.001, knn_purity=.2, linear_probe=.561),
                               after=dict(silhouette=.8, knn_purity=1., linear_probe=1.)))


def test_same_points_twice(states, points): assert points.equals(F.layout_points(states, 30, seed=3))


def test_same_users_in_every_panel(points):
    panels = [part for _, part in points.group_by("method", "stage")]
    assert len(panels) == 4 and all(set(p["user"]) == set(panels[0]["user"]) and len(p) == 30 * VERSIONS
                                    for p in panels)


@pytest.mark.parametrize("method", ["UMAP", "t-SNE"])
def test_separation_survives_the_layout(points, method):
    from sklearn.metrics import silhouette_score
    score = {stage: silhouette_score(p.select("x", "y"), p["version"]) for (stage,),
             p in points.filter(pl.col("method") == method).group_by("stage")}
    assert score["before"] < 0 < .6 < score["after"]


@pytest.mark.parametrize("method", ["UMAP", "t-SNE"])
def test_after_is_turned_to_before(points, method):
    before, after = (points.filter((pl.col("method") == method) & (pl.col("stage") == s)).select("x", "y").to_numpy()
                     for s in ("before", "after"))
    np.testing.assert_allclose(F.align(after, before), after, atol=1e-4 * np.abs(after).max())


def test_same_bytes_twice(points, tmp_path):
    def draw(name): return [p.read_bytes() for p in save_figure(F.draw_figure3([(ABOUT, points)]), tmp_path/name)]
    assert draw("one") == draw("two")


def test_labels(points):
    fig = F.draw_couplings([(ABOUT, points), (ABOUT | dict(coupling="cooperative"), points)])
    before, after = ("silhouette 0.00, purity 0.20\nlinear probe 0.56 (chance 0.17)",
                     "silhouette 0.80, purity 1.00\nlinear probe 1.00 (chance 0.17)")
    assert [ax.get_title() for ax in fig.axes] == [f"before stage 1\n{before}", f"after, coupling none\n{after}",
                                                   f"after, coupling cooperative\n{after}"]
    assert "synthetic data" in fig.get_suptitle() and "pocket model" in fig.get_suptitle()
    assert [t.get_text() for t in fig.legends[0].get_texts()] == ["plain", *"abcde"]


def test_states_of_different_users(states):
    with pytest.raises(UserError, match="same users"):
        F.pick_states(states.filter((pl.col("stage") == "before") | (pl.col("user") > 3)), 40)


def test_neighbours_are_those_that_umap_finds():
    x = blobs(3)[1].astype(np.float32)
    start = F.principal(x)
    own = F.load_umap()(n_neighbors=15, init=start.astype(np.float32), random_state=0, n_jobs=1).fit_transform(x)
    assert np.array_equal(F.embed(x, "UMAP", start), own)


def test_figure_2_says_what_a_run_did(finished):
    "Sizes of the run's own files; stage 1 moves the whole T5, stage 2 the decoder's end and never the encoder."
    from safetensors.torch import load_file
    facts, weights = F.framework_facts(str(finished)), load_file(finished/"encoder/model/model.safetensors")
    numbers = {part: sum(w.numel() for k, w in weights.items() if k.startswith("decoder.") == (part == "decoder"))
               for part in ("encoder", "decoder")}
    assert facts["users"] == len(pl.read_parquet(finished/"data/users.parquet")) and facts["width"] == len(
        pl.read_parquet(finished/"encoder/states.parquet")["x"][0])
    assert facts["stage_1"] == {part: (n, n) for part, n in numbers.items()}
    (moved, whole), (changed, decoder) = facts["stage_2"]["encoder"], facts["stage_2"]["decoder"]
    assert (moved, whole, decoder) == (0, numbers["encoder"], numbers["decoder"]) and 0 < changed < decoder
    fig = F.draw_framework(facts)
    assert fig.get_size_inches()[0] == TWO_COLUMNS and {t.get_fontsize() for t in texts_of(fig)} == {7}
    said = " ".join(t.get_text() for t in fig.axes[0].texts)
    assert f"trained: {changed:,}" in said and "frozen" in said and f"{facts['users']:,} users" in said
    with pytest.raises(UserError, match="recommender 'ganprompt, causal-lm'"):
        F.framework_facts(str(finished), "ganprompt, causal-lm")


def texts_of(fig):
    "All that is written in a figure and is seen."
    fig.draw_without_rendering()
    return [t for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip()]


def test_six_panels_hold_the_points_and_the_figures_of_their_data_set(points):
    "A column a data set, before above after: every point is drawn once, where it lies."
    other = ABOUT | dict(dataset="beauty", synthetic=False, words=list("vwxyz"), separability={
        "before": dict(silhouette=-.5, knn_purity=.3, linear_probe=.25),
        "after": dict(silhouette=.25, knn_purity=.9, linear_probe=.75)})
    moved = points.with_columns(pl.col("x") + 100)
    fig = F.draw_six([(ABOUT, points), (other, moved)], "t-SNE")
    assert [ax.get_title().split()[1] for ax in fig.axes] == ["before", "after"]*2
    assert [ax.get_title().rsplit("\n")[-1] for ax in fig.axes] == [f"linear probe {x} (chance 0.17)"
                                                                    for x in ("0.56", "1.00", "0.25", "0.75")]
    for ax, (all_points, when) in zip(fig.axes, ((p, w) for p in (points, moved) for w in ("before", "after"))):
        drawn = np.concatenate([c.get_offsets() for c in ax.collections])
        wanted = all_points.filter(method="t-SNE", stage=when).select("x", "y").to_numpy()
        assert sorted(map(tuple, drawn)) == sorted(map(tuple, wanted))
    one, two = fig.subfigs
    assert "Toy (synthetic data)" in one.get_suptitle() and "Beauty: 30 held-out users" in two.get_suptitle().replace(
        "\n", " ")
    assert [t.get_text() for t in two.legends[0].get_texts()] == ["plain", *"vwxyz"]


def test_figures_are_as_wide_as_they_are_printed_and_can_be_read(points):
    row = ABOUT, points
    for fig in (F.draw_figure3([row]), F.draw_six([row]*3), F.draw_couplings([row]*3)):
        assert fig.get_size_inches()[0] == pytest.approx(TWO_COLUMNS)
        assert {t.get_fontsize() for t in texts_of(fig)} == {PRINT["font.size"]}
        inside = fig.get_tightbbox()
        assert inside.x0 > -.05 and inside.x1 < TWO_COLUMNS + .05


def test_nothing_is_written_over_something_else(points, tmp_path, monkeypatch):
    "In the files, both of them: a figure is laid out anew each time that it is drawn."
    from matplotlib.figure import Figure
    laid = []
    def watched(fig, path, **how): laid.append([t.get_window_extent() for t in texts_of(fig)])
    monkeypatch.setattr(Figure, "savefig", watched)
    for n, draw in enumerate((F.draw_figure3, F.draw_six, F.draw_couplings)):
        save_figure(draw([(ABOUT, points)]*3), tmp_path/str(n))
    assert len(laid) == 6
    for boxes in laid: assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_a_pdf_has_truetype_fonts(points, tmp_path):
    "Publishers take no Type 3 fonts. Ticks that are made as the file is written have the size of print too."
    said = save_figure(F.draw_figure3([(ABOUT, points)]), tmp_path/"a.b")[1].read_bytes()
    assert b"/FontFile2" in said and b"/Type3" not in said and b"/CreationDate" not in said
    @for_print
    def draw():
        from matplotlib.figure import Figure
        (fig := Figure(figsize=(COLUMN, 1))).subplots().plot([0, 1])
        return fig
    assert {t.get_fontsize() for t in texts_of(draw())} == {7} and for_print(lambda: None)() is None
