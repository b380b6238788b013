"The explorer's page: whole without a network, the same points on both sides, and it says what the run says."
import base64, gzip, html, json, re, shutil
from html.parser import HTMLParser

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from chromium import Browser, browser, until
from conftest import SMALL, copy_run
from ganprompt import explorer as E
from ganprompt.cli import cli
from ganprompt.files import UserError
from ganprompt.runs import Run
from ganprompt.templates import render

WORDS = ["organic", "waterproof"]
AWKWARD = "Soap & </script><b>Water</b>"


def toy(users=20, dims=8, shift=4.):
    "A view of users who have every version; one title is awkward."
    rng, n = np.random.default_rng(0), len(WORDS) + 1
    version = np.tile(np.arange(n), users)
    before = np.repeat(rng.normal(size=(users, dims)), n, axis=0) + .1*rng.normal(size=(users*n, dims))
    after = before + shift*rng.normal(size=(n, dims))[version]
    number = 3*np.arange(users) + 1 # not the row
    cards = pl.DataFrame(dict(
        user=number, target=np.arange(users) % 5, history=[f"Lamp {u}\n{AWKWARD}" for u in number],
        next=[f"Bag {u}" for u in number], length=np.arange(users) % 4 + 2, popularity=np.arange(users),
        own=[WORDS[u % 2] for u in range(users)], plain=[f"Lamp {u} , {AWKWARD}" for u in number],
        asked=[f"{E.GAP} : Lamp {u} , {AWKWARD}" for u in number], then=["Cup"]*users,
        answers=[f"ganprompt: P(yes) 0.5, rank {u} of 100" for u in number], p=[.5]*users, rank=number))
    points = pl.DataFrame(dict(user=np.repeat(number, n), version=version))
    return E.View("Toy", ["plain", *WORDS], points, cards, [("before", before), ("after", after)])


@pytest.fixture(scope="module")
def page(): return E.explorer_of(toy())


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found, self.scripts, self.text = [], [], text
        self.feed(text)
    def handle_starttag(self, tag, attributes): self.found.append((tag, dict(attributes)))
    def handle_data(self, data):
        if self.found and self.found[-1][0] == "script": self.scripts.append((self.found[-1][1], data))


def models(page):
    "Every model of the page's document: type -> list of its attributes."
    text = next(s for about, s in Tags(page.html).scripts if about.get("type") == "application/json")
    found = {}
    def walk(x):
        if isinstance(x, dict):
            if x.get("type") == "object" and "name" in x:
                found.setdefault(x["name"], []).append(x.get("attributes", {}) | {"id": x["id"]})
            for v in x.values(): walk(v)
        elif isinstance(x, list):
            for v in x: walk(v)
    walk(json.loads(html.unescape(text)))
    return found


def columns(page):
    "The columns of the points, as the page holds them."
    for source in models(page)["ColumnDataSource"]:
        data = dict(source["data"]["entries"])
        if "card" in data: return {k: decoded(v) for k, v in data.items()}, source["id"]


def decoded(array):
    data = base64.b64decode(array["array"]["data"])
    return np.frombuffer(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data, array["dtype"])


def test_nothing_is_fetched(page):
    tags = Tags(page.html)
    assert not [(t, a) for t, a in tags.found if {"src", "href", "data", "action"} & a.keys() or t in ("link", "base")]
    assert not re.search(r"@import|url\(\s*[\"']?http", page.html)
    assert sum(len(s) for about, s in tags.scripts if "type" not in about) > 1e6


def test_title_cannot_end_the_script(page):
    text = next(s for about, s in Tags(page.html).scripts if about.get("type") == "application/json")
    assert "</script" not in text and AWKWARD in html.unescape(text).replace("\\/", "/")


def test_both_sides_show_the_same_rows(page):
    view, (data, source) = toy(), columns(page)
    assert {len(v) for v in data.values()} == {len(view.points)}
    users = view.cards["user"].to_numpy()[data["card"]]
    assert users.tolist() == view.points["user"].to_list()
    assert data["version"].tolist() == view.points["version"].to_list()
    glyphs = [g["field"] for g in (m["x"] for m in models(page)["Scatter"]) if g["field"] in ("x0", "x1")]
    dots = [m for m in models(page)["GlyphRenderer"] if m["data_source"] == {"id": source}
            or m["data_source"].get("id") == source]
    assert {"x0", "x1"} <= set(glyphs) and len(dots) == 2


def test_places_are_those_of_the_layout(page):
    "Each side's points, in the order of the states, as chapter 20 lays them out."
    from ganprompt.figures import layouts
    view, (data, _) = toy(), columns(page)
    for side, place in enumerate(layouts(view.sides[0][1], view.sides[1][1], "UMAP", 0)):
        np.testing.assert_allclose(np.c_[data[f"x{side}"], data[f"y{side}"]], place, rtol=1e-5, atol=1e-5)


def test_neighbours_are_the_nearest_in_all_dimensions():
    for _, x in toy().sides:
        far = ((x[:, None] - x[None])**2).sum(-1) + np.diag([np.inf]*len(x))
        np.testing.assert_array_equal(E.neighbours(x), far.argsort(1)[:, :E.LISTED])
    assert E.neighbours(np.zeros((4, 2)), 8).shape == (4, 3)
    assert all(i not in row for i, row in enumerate(E.neighbours(np.zeros((4, 2)), 3))) # twins


def test_neighbours_agree_with_another_search():
    "scikit-learn's tree, which compares far fewer pairs."
    from sklearn.neighbors import NearestNeighbors
    x = np.random.default_rng(1).normal(size=(300, 6)).astype(np.float32)
    theirs = NearestNeighbors(n_neighbors=E.LISTED + 1, algorithm="kd_tree").fit(x).kneighbors(x, return_distance=False)
    np.testing.assert_array_equal(E.neighbours(x), theirs[:, 1:])


def test_the_page_holds_the_neighbours(page):
    view = toy()
    held = next(dict(s["data"]["entries"]) for s in models(page)["ColumnDataSource"] if "left" in
                dict(s["data"]["entries"]))
    for side, (_, x) in zip(("left", "right"), view.sides):
        assert decoded(held[side]).tolist() == E.neighbours(x).ravel().tolist()


def test_every_colouring_has_its_column_and_its_legend():
    view = toy()
    data = E.columns_of(view, (np.zeros((60, 2)),)*2)
    ways = E.colourings(view, data)
    assert list(ways) == ["version", "own attribute", "target", "popularity", "history length", "user"]
    for field, mapper, legend in ways.values():
        assert len(data[field]) == 60 and legend
        if mapper.__class__.__name__ == "LinearColorMapper": assert mapper.low < data[field].min() <= data[field].max()
        assert data[field].max() <= mapper.high
    assert [view.names[1:][i] for i in data["own"][::3]] == view.cards["own"].to_list()


@pytest.fixture(scope="module")
def view(finished): return E.view_of(Run(finished))


def test_what_is_said_of_a_user_is_what_the_run_says(finished, view):
    run, cards = Run(finished), view.cards
    held = E.held_histories(run)
    asked = run.sequences("valid")
    assert len(cards) == 30 and set(cards["user"]) == set(run.states("after")["user"])
    counts = run.interactions.filter(pl.col("split") == "train")["item"].value_counts()
    for card, row in zip(cards.to_dicts(), held.to_dicts()):
        valid = asked.filter(pl.col("row") == row["row"]).to_dicts()[0]
        assert card["user"] == row["user"] == valid["user"] and card["target"] == valid["target"]
        assert card["history"].split("\n") == [run.titles[i] for i in valid["history"]]
        assert card["next"] == run.titles[valid["target"]] and card["length"] == len(valid["history"])
        assert card["own"] == run.attributes.filter(pl.col("row") == row["row"])["attribute"][0]
        bought = counts.filter(pl.col("item") == card["target"])["count"].to_list()
        assert card["popularity"] == (bought[0] if bought else 0)


def test_prompts_are_those_that_the_encoder_reads(finished, view):
    "With the word in its gap, the text has the very tokens of the version, but for titles that are cut."
    from ganprompt.attributes import load_attributes
    from ganprompt.encoder import Versions, reader_for
    run = Run(finished)
    reader, _ = reader_for(run)
    reader.title_tokens = 1000
    versions = Versions(reader, load_attributes(run), E.held_histories(run))
    for r, card in enumerate(view.cards.to_dicts()):
        seen = [run.titles[i] for i in versions.past[r][-reader.history_items:]]
        for v, word in enumerate(view.names):
            text = card["asked"].replace(E.GAP, word) if v else card["plain"]
            assert text == (render(run.templates["adversarial"], title_seq=seen, attribute=word) if v
                            else render("{title_seq}", title_seq=seen))
            assert versions.tokenizer(text).input_ids == versions.ids(r, v)


def test_scores_and_ranks_are_the_runs(finished, view, tmp_path):
    from ganprompt.metrics import MetricsSettings, make_metrics
    run = Run(shutil.copytree(finished, tmp_path/"ranked"))
    make_metrics(MetricsSettings(str(run)))
    tests = run.sequences("test").unique("user", keep="first", maintain_order=True)
    for card in view.cards.to_dicts():
        mine = run.ranks.filter(pl.col("user") == card["user"])
        lines = card["answers"].split("\n")
        models = [line.split(": P(yes)")[0] for line in lines]
        assert sorted(models) == sorted(set(mine["model"]) - {"random", "popularity"})
        for model, line in zip(models, lines):
            p, rank = re.search(r"P\(yes\) ([\d.]+), rank (\d+) of", line).groups()
            assert int(rank) == mine.filter(pl.col("model") == model)["rank"][0]
            z = run.scores(model).filter(pl.col("user") == card["user"])["scores"][0][0]
            assert float(p) == pytest.approx(1/(1 + np.exp(-z)), abs=6e-4)
        assert not models[0].startswith("no-stage") and card["rank"] == int(re.search(r"rank (\d+)", lines[0])[1])
        assert card["then"] == run.titles[tests.filter(pl.col("user") == card["user"])["target"][0]]


def test_a_run_without_scores_has_a_page(finished, tmp_path):
    view = E.view_of(Run(copy_run(finished, tmp_path/"bare", "recommender", "metrics")))
    assert len(view.cards) == 30 and set(view.cards["answers"]) == {""} and view.cards["p"].null_count() == 30


def test_two_runs_are_shown_after_stage_1(finished, tmp_path):
    twin = shutil.copytree(finished, tmp_path/"twin")
    both = E.view_of(Run(finished), Run(twin))
    after = np.array(Run(finished).states("after").sort("user", "version")["x"].to_list(), np.float32)
    for (title, x), name in zip(both.sides, ("whole", "twin")):
        assert title.startswith(f"{name}, after stage 1") and np.array_equal(x, after)
    assert {line.split(",")[0] for line in both.cards["answers"][0].split("\n")} == {"whole", "twin"}


def test_runs_of_other_users_are_refused(finished, tmp_path):
    from ganprompt.encoder import EncoderSettings, make_encoder
    from ganprompt.runs import replacing
    other = shutil.copytree(finished, tmp_path/"other")
    values = SMALL | dict(run=str(other), seed=0, held_out_users=29)
    with replacing(True): make_encoder(EncoderSettings.of(values))
    with pytest.raises(UserError, match="do not show the same versions") as e: E.view_of(Run(finished), Run(other))
    assert "\n" not in str(e.value)


def test_the_command_writes_the_page(finished, tmp_path):
    said = CliRunner().invoke(cli, ["explore", str(finished), "--out", str(tmp_path/"new/page.html")])
    assert said.exit_code == 0 and "page.html" in said.output
    assert Tags((tmp_path/"new/page.html").read_text()).scripts


def test_the_command_takes_one_run_or_two(finished):
    said = CliRunner().invoke(cli, ["explore", *[str(finished)]*3])
    assert isinstance(said.exception, UserError) and "one run, or two" in str(said.exception)


def test_a_notebook_shows_the_same_page(page):
    (tag, frame), *_ = Tags(page._repr_html_()).found
    assert tag == "iframe" and frame["srcdoc"] == page.html


def test_a_slider_lays_out_anew(finished, monkeypatch):
    "Fewer neighbours give another layout of the same points; every control reaches it."
    who, few, many = (np.concatenate([ax.collections[0].get_offsets() for ax in E.laid_out(
        Run(finished), users=20, neighbors=n).axes]) for n in (15, 3, 15))
    assert who.shape == few.shape and np.array_equal(who, many) and not np.allclose(who, few)
    asked = []
    monkeypatch.setattr(E, "laid_out", lambda run, **chosen: asked.append((run.folder.name, chosen)))
    top, middle, bottom, _ = Run(finished).sliders().children
    (pick, method), (users, neighbours), (near, perplexity) = (box.children for box in (top, middle, bottom))
    method.value, neighbours.value, near.value, perplexity.value, users.value = "t-SNE", 7, .5, 12, 40
    assert asked[-1] == (finished.name, dict(method="t-SNE", users=40, neighbors=7, min_dist=.5, perplexity=12))
    assert finished.name in pick.options and len(asked) == 6


def opened(tab, path):
    "The page, once its panels stand still."
    tab.open(path)
    until(lambda: tab.js("!!(window.Bokeh && Bokeh.documents[0] && Bokeh.documents[0].is_idle)"))
    tab.js(FIND)


FIND = """
var all = [...Bokeh.documents[0]._all_models.values()], sources = all.filter(m => m.type === "ColumnDataSource")
var points = sources.find(s => "card" in s.data), table = sources.find(s => "point" in s.data && "own" in s.data)
var users = sources.find(s => "history" in s.data && s !== table), lines = all.filter(m => m.type === "Line")
var panel = all.filter(m => m.type === "Div").find(d => d.text.startsWith("Tap a point"))
var figures = all.filter(m => m.type === "Figure")
var place = (side, i) => {
  const view = Bokeh.index.find_one(figures[side]), {frame} = view, box = view.canvas_view.el.getBoundingClientRect()
  return [box.left + frame.x_scale.compute(points.data["x" + side][i]),
          box.top + frame.y_scale.compute(points.data["y" + side][i])]
}
var area = side => { // where points lie
  const {canvas_view, frame: {bbox}} = Bokeh.index.find_one(figures[side]), box = canvas_view.el.getBoundingClientRect()
  return [box.left + bbox.left, box.top + bbox.top, bbox.width, bbox.height]
}
var lone = () => { // a point with no other near it, on the left
  const at = Array.from(points.data.card.keys()).map(i => place(0, i))
  const gap = at.map(([x, y], i) => Math.min(...at.map(([a, b], j) => i === j ? 1e9 : Math.hypot(x - a, y - b))))
  return gap.indexOf(Math.max(...gap))
}
"""


@pytest.fixture(scope="module")
def tab(page, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    tab = Browser(folder)
    opened(tab, page.save(folder/"page.html"))
    yield tab
    tab.close()


@browser
def test_a_point_tapped_on_the_left_is_chosen_on_the_right(tab):
    view = toy()
    i = tab.js("lone()")
    tab.tap(lambda: tab.js(f"place(0, {i})"), lambda: tab.js("points.selected.indices") == [i])
    chosen = tab.js("""figures.map(f => f.renderers.filter(r => r.data_source === points)
                       .map(r => [...Bokeh.index.find_one(r).model.data_source.selected.indices]))""")
    assert chosen == [[[i]], [[i]]]
    user, version = view.points.row(i)
    card = view.cards.filter(pl.col("user") == user).to_dicts()[0]
    said = html.unescape(re.sub(r"<[^<>]*>", "\n", tab.js("panel.text")))
    prompt = card["asked"].replace(E.GAP, view.names[version]) if version else card["plain"]
    for text in (f"User {user}, {view.names[version]}", card["history"], prompt, card["next"], card["then"],
                 card["answers"]): assert text in said
    assert "<b>Water" not in tab.js("panel.text") # a title is text
    assert tab.js("table.data.user") == [user] and tab.js("[...table.data.point]") == [i]


@browser
def test_a_word_of_a_title_finds_its_users(tab):
    tab.js("all.find(m => m.type === 'TextInput').value = 'bag 4'") # of users 4, 40, 43, 46, 49
    found = toy().points.with_row_index().filter(pl.col("user").cast(str).str.starts_with("4"))["index"].to_list()
    until(lambda: tab.js("points.selected.indices") == found)
    assert tab.js("table.data.user") == toy().points["user"].gather(found).to_list()


@browser
def test_the_points_of_the_other_side_light_up_under_the_mouse(tab):
    i = tab.js("lone()")
    tab.hover(lambda: tab.js(f"place(0, {i})"), lambda: tab.js("points.inspected.indices") == [i])


@browser
def test_colours_change_on_both_sides(tab):
    tab.js("all.find(m => m.type === 'Select').value = 'popularity'")
    fields = tab.js("""figures.flatMap(f => f.renderers.filter(r => r.data_source === points)
                       .flatMap(r => [r.glyph, r.selection_glyph, r.nonselection_glyph, r.hover_glyph]))
                       .map(g => g.fill_color.field)""")
    assert fields == ["popularity"]*8


@browser
def test_webgl_that_a_cpu_imitates_is_not_taken(tab):
    tab.js("var frame = document.body.appendChild(document.createElement('iframe')); true")
    assert tab.js("!!frame.contentDocument.createElement('canvas').getContext('webgl')") # the browser imitates one
    assert not tab.js("!!document.createElement('canvas').getContext('webgl')")
    assert {f["lod_threshold"] for f in models(E.explorer_of(toy()))["Figure"]} == {E.FEW}


@browser
def test_the_browser_asked_for_nothing_and_found_no_fault(tab):
    assert [u for u in tab.requests if not u.startswith(("file:", "data:", "blob:"))] == [] and tab.faults == []
