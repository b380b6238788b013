"The page of users and templates: ranks are those of the kept scores, and a tap shows what it should."
import html, json, re, sys

import numpy as np
import polars as pl
import pytest
from scipy.stats import rankdata

from chromium import Browser, browser, until
from ganprompt import robustness as R, wordings as W
from ganprompt.cli import main
from ganprompt.files import UserError
from test_explorer import AWKWARD, Tags, decoded, models

IDS = "own", "para", "form", "form-2", "attack"
GROUPS = "own", "words", "form", "words", "attack"
SPLITS = "seen", "seen", "unseen-format", "unseen-paraphrase", "attack"
USERS, SIZE = 16, 30


def scores():
    "f32[templates, users, candidates]; some are equal."
    rng = np.random.default_rng(3)
    z = 2*rng.normal(size=(1, USERS, SIZE)) + 2*rng.normal(size=(len(IDS), USERS, SIZE))
    z[:, :, 0] += 1.5
    return np.round(z, 1).astype(np.float32)


def write(folder, z):
    titles = [AWKWARD, *(f"Lamp {i}" for i in range(1, 40))]
    rng = np.random.default_rng(0)
    def some(n): return [titles[i] for i in rng.permutation(40)[:n]]
    pl.DataFrame(dict(user=[10*u + 7 for u in range(USERS)], history=[[AWKWARD, *some(3)] for _ in range(USERS)],
                      candidates=[some(SIZE) for _ in range(USERS)],
                      scores=pl.Series(z.transpose(1, 0, 2).tolist(), dtype=pl.List(pl.List(pl.Float32))))
                 ).write_parquet(folder/"answers.parquet")
    hits = (expected(z) <= 10).mean(1)
    table = [{"id": i, "group": g, "split": s, "text": f"<b>{i}</b> {{purchase_history}}", "hit@10": float(h)}
             for i, g, s, h in zip(IDS, GROUPS, SPLITS, hits)]
    (folder/"report.json").write_text(json.dumps(dict(model="toy", dataset="shop", synthetic=False, users=USERS,
                                                      by_template=table)))
    return folder


def expected(z):
    "int[templates, users], by another library: last among equals."
    return rankdata(-z, method="max", axis=-1)[:, :, 0].astype(int)


@pytest.fixture(scope="module")
def report(tmp_path_factory): return write(tmp_path_factory.mktemp("report"), scores())


@pytest.fixture(scope="module")
def shown(report): return W.wordings_of(report)


@pytest.fixture(scope="module")
def page(shown): return W.wordings_page(shown)


def columns(page, name):
    "The columns of the source that has this one."
    data = next(d for d in (dict(s["data"]["entries"]) for s in models(page)["ColumnDataSource"]) if name in d)
    def plain(v): return decoded(v).tolist() if isinstance(v, dict) and "array" in v else v
    return {k: plain(v) for k, v in data.items()}


def test_the_page_holds_the_ranks_of_the_kept_scores(page):
    z, order = scores(), [0, 1, 3, 2, 4] # the groups, as they come
    ranks, templates, users = expected(z), columns(page, "text"), columns(page, "history")
    assert templates["id"] == [IDS[t] for t in order] and templates["split"][0] == "clean"
    at = [(u - 7)//10 for u in users["user"]]
    held = np.array(columns(page, "third")["rank"]).reshape(USERS, len(IDS))
    assert sorted(at) == list(range(USERS))
    np.testing.assert_array_equal(held, ranks[order][:, at].T)
    np.testing.assert_array_equal(decoded(columns(page, "image")["image"][0]).reshape(held.shape)
                                  if isinstance(columns(page, "image")["image"][0], dict)
                                  else columns(page, "image")["image"][0], held)
    lost = ranks[1:].mean(0) - ranks[0]
    assert users["lost"] == pytest.approx(sorted(lost, reverse=True)) and users["clean"] == ranks[0, at].tolist()
    assert templates["mean"] == pytest.approx(ranks[order].mean(1))
    assert templates["hit"] == pytest.approx((ranks[order] <= 10).mean(1))
    assert templates["hurt"] == [int(((ranks[0] <= 10) & (ranks[t] > 10)).sum()) for t in order]
    assert templates["helped"] == [int(((ranks[0] > 10) & (ranks[t] <= 10)).sum()) for t in order]


def test_the_head_of_a_ranking_agrees_with_the_rank(report, shown):
    "Of a list whose target stands k-th it is the k-th title; the others score no less."
    answers, seen = pl.read_parquet(report/"answers.parquet"), 0
    for u, user in enumerate(shown.users["user"]):
        row = answers.filter(user=user).to_dicts()[0]
        score = [dict(zip(row["candidates"], z)) for z in row["scores"]]
        for t, name in enumerate(shown.templates["id"]):
            z, rank = score[IDS.index(name)], shown.ranks[u, t]
            three = [z[title] for title in shown.heads[u, t]]
            assert three == sorted(z.values(), reverse=True)[:3]
            if rank <= 3: assert shown.heads[u, t][rank - 1] == row["candidates"][0]; seen += 1
            else: assert row["candidates"][0] not in shown.heads[u, t]
    assert seen > 5


def test_a_short_list_has_a_short_head():
    answers = pl.DataFrame(dict(candidates=[["A", "B"]], scores=[[[1., 2.], [3., 1.]]]))
    assert W.heads_of(answers, [1, 0]).tolist() == [[["A", "B", ""], ["B", "A", ""]]]


def test_nothing_is_fetched_and_a_title_is_text(page):
    tags = Tags(page.html)
    assert not [(t, a) for t, a in tags.found if {"src", "href", "data", "action"} & a.keys() or t in ("link", "base")]
    assert not re.search(r"@import|url\(\s*[\"']?http", page.html)
    text = next(s for about, s in tags.scripts if about.get("type") == "application/json")
    assert "</script" not in text and AWKWARD in html.unescape(text).replace("\\/", "/")


def test_300_users_make_a_small_page(tmp_path, monkeypatch):
    "As many titles as a real shop has."
    import time
    rng = np.random.default_rng(0)
    titles = [" ".join(f"w{i}" for i in rng.integers(3000, size=12)) for _ in range(12_000)]
    def some(*shape): return np.array(titles, object)[rng.integers(12_000, size=shape)]
    rows = pl.DataFrame(dict(user=range(300), history=some(300, 8).tolist(), bought=some(300), size=[100]*300,
                             clean=[1]*300, lost=[0.]*300))
    table = [dict(id=f"t-{t}", group="g", split="seen", text="x"*200) | {"hit@10": 1.} for t in range(59)]
    ranks = rng.integers(1, 101, size=(300, 59))
    begin = time.monotonic()
    page = W.wordings_page(W.Wordings("m", W.template_rows(table, ranks), rows, ranks, some(300, 59, 3)))
    assert len(page.html) < 5e6 and time.monotonic() - begin < 60


def test_what_is_no_report_is_told(report, tmp_path):
    with pytest.raises(UserError, match="no report.json"): W.read_report(tmp_path)
    (tmp_path/"estimate.json").write_text("{}")
    for path in tmp_path, tmp_path/"estimate.json":
        with pytest.raises(UserError, match="without --share"): W.read_report(path)
    (tmp_path/"report.json").write_bytes((report/"report.json").read_bytes())
    with pytest.raises(UserError, match="not its answers.parquet"): W.wordings_of(tmp_path)
    (tmp_path/"answers.parquet").write_text("?")
    with pytest.raises(UserError, match="cannot be read"): W.wordings_of(tmp_path)
    write(tmp_path, scores())
    pl.read_parquet(tmp_path/"answers.parquet").head(5).write_parquet(tmp_path/"answers.parquet")
    with pytest.raises(UserError, match="do not belong together"): W.wordings_of(tmp_path/"report.json")


def test_a_report_keeps_its_answers_and_the_command_shows_them(finished, tmp_path, monkeypatch, capsys):
    path = R.make_report(str(finished/"recommender/ganprompt, t5-ranker"), users=5, out=str(tmp_path/"report"))
    shown = W.wordings_of(path.parent)
    said = json.loads(path.with_suffix(".json").read_text())["by_template"]
    assert len(shown.users) == 5 and {t["id"] for t in said} == set(shown.templates["id"])
    for row in shown.templates.to_dicts():
        assert row["hit"] == pytest.approx(next(t["hit@10"] for t in said if t["id"] == row["id"]))
    for target in path.parent, path.with_suffix(".json"):
        monkeypatch.setattr(sys, "argv", ["ganprompt", "explore", str(target)])
        with pytest.raises(SystemExit) as end: main()
        assert not end.value.code and "wordings.html" in capsys.readouterr().out
        (path.parent/"wordings.html").unlink()
    monkeypatch.setattr(sys, "argv", ["ganprompt", "explore", str(path.parent), str(finished)])
    with pytest.raises(SystemExit) as end: main()
    assert end.value.code == 1 and "one report alone" in capsys.readouterr().err


FIND = """
var all = [...Bokeh.documents[0]._all_models.values()], sources = all.filter(m => m.type === "ColumnDataSource")
var having = name => sources.find(s => name in s.data), keys = s => Object.keys(s.data).sort().join()
var listed = having("here"), marks = sources.find(s => keys(s) === "x,y")
var text = () => all.filter(m => m.type === "Div").map(d => d.text).join("\\n")
var heat = Bokeh.index.find_one(all.find(m => m.type === "Figure" && m.renderers.some(r => r.glyph.type === "Image")))
var place = (x, y) => {
  const box = heat.canvas_view.el.getBoundingClientRect(), {frame} = heat
  return [box.left + frame.x_scale.compute(x), box.top + frame.y_scale.compute(y)]
}
"""


@pytest.fixture(scope="module")
def tab(page, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    tab = Browser(folder)
    try:
        tab.open(page.save(folder/"page.html"))
        until(lambda: tab.js("!!(window.Bokeh && Bokeh.documents[0] && Bokeh.documents[0].is_idle)"))
        tab.js(FIND)
        yield tab
    finally: tab.close()


def plain(text): return html.unescape(re.sub(r"</?(?:h3|h4|p|ol|li)>", "\n", text))


@browser
def test_the_page_opens_with_who_loses_most(tab, shown):
    until(lambda: f"User {shown.users['user'][0]}" in tab.js("text()"), 20)
    assert tab.js("listed.data.user") == shown.users["user"].to_list()


@browser
def test_a_cell_shows_its_user_and_its_template(tab, shown):
    for u, t in (4, 2), (7, 4):
        user, template = shown.users.row(u, named=True), shown.templates.row(t, named=True)
        tab.tap(lambda: tab.js(f"place({t + .5}, {u + .5})"),
                lambda: all(w in tab.js("text()") for w in (f"User {user['user']}", f"Template {template['id']}")))
        said = plain(tab.js("text()"))
        for words in (f"Template {template['id']}", template["text"], "\n".join(user["history"]), user["bought"],
                      f"{shown.ranks[u, t]} of {SIZE}; clean {shown.ranks[u, 0]}"): assert words in said, words
        for title in shown.heads[u, t]: assert title in said
        assert "<b>Water" not in tab.js("text()") and "<b>para" not in tab.js("text()")


@browser
@pytest.mark.parametrize("t", [1, 3, 4])
def test_the_name_of_a_template_lists_whom_it_hurts(tab, shown, t):
    "Those whose purchase leaves the first ten; they are marked beside the map too."
    z = expected(scores())
    hurt = {10*u + 7 for u in range(USERS) if z[0, u] <= 10 < z[IDS.index(shown.templates["id"][t]), u]}
    assert hurt
    axis = "heat.canvas_view.el.getBoundingClientRect().top + heat.frame.bbox.top - 20" # its label
    tab.tap(lambda: tab.js(f"[place({t + .5}, 0)[0], {axis}]"), lambda: set(tab.js("listed.data.user")) == hurt)
    assert [shown.users["user"][int(y - .5)] for y in tab.js("marks.data.y")] == tab.js("listed.data.user")
    assert tab.js("all.find(m => m.type === 'Div' && m.text.includes('pushes out')).text").startswith(
        f"{len(hurt)} of {USERS} users whom {shown.templates['id'][t]}")


@browser
def test_a_row_of_the_tables_is_chosen_too(tab, shown):
    tab.js("having('hurt').selected.indices = [0]")
    until(lambda: len(tab.js("listed.data.user")) == USERS, 20)
    tab.js("listed.selected.indices = [5]")
    until(lambda: f"User {shown.users['user'][5]}<" in tab.js("text()"), 20)


@browser
def test_a_word_narrows_the_users(tab, shown):
    tab.js("having('hurt').selected.indices = []; having('hurt').selected.indices = [0]")
    tab.js("all.find(m => m.type === 'TextInput').value = 'lamp 3'")
    found = [r["user"] for r in shown.users.to_dicts() if any("Lamp 3" in x for x in [*r["history"], r["bought"]])]
    until(lambda: tab.js("listed.data.user") == found, 20)
    assert 0 < len(found) < USERS and len(tab.js(
        "sources.find(s => keys(s) === 'bottom,top').data.top")) == USERS - len(found)
    tab.js("all.find(m => m.type === 'TextInput').value = ''")


@browser
def test_the_browser_asked_for_nothing_and_found_no_fault(tab):
    assert [u for u in tab.requests if not u.startswith(("file:", "data:", "blob:"))] == [] and tab.faults == []
    assert tab.js("document.documentElement.scrollWidth <= innerWidth")
    tab.call("Emulation.setDeviceMetricsOverride", width=390, height=844, deviceScaleFactor=1, mobile=False)
    until(lambda: tab.js("document.documentElement.scrollWidth <= innerWidth"), 20)
