"""Chapter 05: readers, cuts, splits, candidates, errors and downloads, on the demo and against values computed in
another way."""
import gzip, hashlib, http.server, json, os, threading
from dataclasses import fields
from pathlib import Path

import networkx as nx
import numpy as np
import polars as pl
import pytest

from ganprompt import data
from ganprompt.reviews import read_reviews
from ganprompt.corpora import categories, fetch_category, find_source, generate_demo
from ganprompt.data import DataSettings, load_candidates, load_sequences, make_data, prepare
from ganprompt.files import UserError, root
from ganprompt.runs import replacing

DEMO = root()/"data"/"demo"


def lines(path):
    with gzip.open(path, "rt") as f: return f.read().splitlines()


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs")/"demo"
    make_data(DataSettings(str(run)))
    return str(run)


# --- the committed demo

def test_committed_demo_is_what_seed_0_makes(tmp_path):
    generate_demo(tmp_path, seed=0)
    for name in ("reviews_Demo_5.json.gz", "meta_Demo.json.gz"): assert lines(tmp_path/name) == lines(DEMO/name)
    assert (tmp_path/"truth.json").read_bytes() == (DEMO/"truth.json").read_bytes()
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 300_000
    generate_demo(tmp_path/"b", seed=1)
    assert lines(tmp_path/"b"/"meta_Demo.json.gz") != lines(DEMO/"meta_Demo.json.gz")


def test_papermill_sees_every_parameter():
    from papermill.inspection import inspect_notebook
    found = inspect_notebook(str(root()/"nbs"/"05_data.ipynb"))
    # replace: for the stage before it runs
    assert [p for p in found if p != "replace"] == [f.name for f in fields(DataSettings)]


# --- cut and splits, against a naive second implementation

def naive_core(rows, core):
    graph = nx.Graph()
    graph.add_edges_from((("u", u), ("i", i)) for u, i in rows)
    inside = nx.k_core(graph, core)
    return {(u, i) for u, i in rows if inside.has_edge(("u", u), ("i", i))}


def test_core_and_leave_one_out_agree_with_plain_python(demo):
    rows = [json.loads(x) for x in lines(DEMO/"reviews_Demo_5.json.gz")]
    fives = [(r["unixReviewTime"], n, r["reviewerID"], r["asin"]) for n, r in enumerate(rows) if r.get("overall") == 5]
    kept = naive_core([(u, i) for _, _, u, i in fives], 5)
    wanted = {}
    for _, _, u, i in sorted(fives):
        if (u, i) in kept: wanted.setdefault(u, []).append(i)
    users, items = (pl.read_parquet(f"{demo}/data/{f}.parquet") for f in ("users", "items"))
    for split, back in (("test", 1), ("valid", 2)):
        found = {users["raw_user"][u]: ([items["raw_item"][i] for i in h], items["raw_item"][t])
                 for u, _, h, t, _ in load_sequences(demo, split).rows()}
        assert found == {u: (x[:-back][-10:], x[-back]) for u, x in wanted.items()}
    train = sorted((u, [*h, t]) for u, _, h, t, _ in load_sequences(demo, "train").rows())
    number = {raw: n for n, raw in enumerate(items["raw_item"])}
    assert train == sorted((n, [number[i] for i in wanted[u][max(0, p - 10):p + 1]])
                           for n, u in enumerate(users["raw_user"]) for p in range(3, len(wanted[u]) - 2))


def test_holdout_first_brings_back_last_items():
    reviews, _ = read_reviews(find_source("demo"))
    made = prepare(reviews, cut="holdout-first")
    last = dict(reviews.group_by("user", maintain_order=True).agg(pl.col("item").last()).rows())
    rest = [(u, i) for u, i in reviews.select("user", "item").rows() if last[u] != i]
    core = naive_core(rest, 5)
    assert set(made["core"].select("user", "item").rows()) == core
    users, items = {u for u, _ in core}, {i for _, i in core}
    assert len(made["interactions"]) == len(core) + sum(last[u] in items for u in users)


def test_time_protocol_is_global(tmp_path):
    folder = make_data(DataSettings(str(tmp_path/"r"), protocol="time"))
    inter = pl.read_parquet(folder/"interactions.parquet")
    rows = pl.read_parquet(folder/"sequences.parquet").join(inter, left_on=["user", "target"],
                                                            right_on=["user", "item"])
    span = {s: (t.min(), t.max()) for (s,), t in ((k, g["time"]) for k, g in rows.group_by("split"))}
    assert span["train"][1] < span["valid"][0] and span["valid"][1] < span["test"][0]
    assert (inter["time"] < span["test"][0]).mean() == pytest.approx(.9, abs=.01)
    assert not rows.filter(pl.col("split") != "train").select("user", "split").is_duplicated().any()


def test_long_histories_in_parts(tmp_path):
    folder = make_data(DataSettings(str(tmp_path/"r"), max_sequence=10))
    inter, test = pl.read_parquet(folder/"interactions.parquet"), load_sequences(str(tmp_path/"r"), "test")
    sizes = inter.group_by("user").len()["len"].to_list()
    assert len(test) == sum(n // 10 + (n % 10 >= 4) for n in sizes) > len(sizes)
    users, lists = load_candidates(str(tmp_path/"r"), "uni99")
    assert users.tolist() == test["user"].to_list() and [c[0] for c in lists] == test["target"].to_list()
    seen = load_sequences(str(tmp_path/"r"), "train")
    taught = {(u, i) for u, _, h, t, _ in seen.rows() for i in [*h, t]}
    assert not taught & set(test.select("user", "target").rows())
    every = pl.read_parquet(folder/"sequences.parquet")
    assert (every["row"].to_list() == list(range(len(every))) and test["row"].is_unique().all()
            and test["user"].is_duplicated().any())
    for name in ("uni99", "pop99", "full"): # a list is known by its sequence, not by its user
        lists = pl.read_parquet(folder/f"candidates_{name}.parquet").filter(split="test")
        assert lists["row"].to_list() == test["row"].to_list()


def test_who_has_everything_is_not_ranked(tmp_path):
    """A user who has bought the whole catalogue: there is nothing to rank the target against. The others stay, with
    shorter lists."""
    lines = [f"u{u},i{i},5,{100*u + k}" for u in range(6)
             for k, i in enumerate(range(8) if not u else [(u + j) % 8 for j in range(6)])]
    (tmp_path/"small.csv").write_text("\n".join(["user,item,rating,time", *lines]))
    make_data(DataSettings(str(tmp_path/"r"), dataset=str(tmp_path/"small.csv"), core=2))
    names = pl.read_parquet(tmp_path/"r/data/users.parquet")["raw_user"].to_list()
    for split in ("valid", "test"):
        assert {names[u] for u in load_sequences(str(tmp_path/"r"), split)["user"]} == {f"u{u}" for u in range(1, 6)}
    assert ("u0" in {names[u] for u in load_sequences(str(tmp_path/"r"), "train")["user"]}
            and all(len(x) == 3 for x in load_candidates(str(tmp_path/"r"), "uni99")[1]))


# --- candidates

def test_candidates_hold_the_target_once_and_nothing_seen(demo):
    seen = {u: set(x)
            for u, x in pl.read_parquet(f"{demo}/data/interactions.parquet").group_by("user").agg("item").rows()}
    for name in ("uni99", "pop99", "full"):
        users, lists = load_candidates(demo, name, "valid")
        assert [c[0] for c in lists] == load_sequences(demo, "valid")["target"].to_list()
        for u, c in zip(users, lists):
            assert (len(c) == len(set(c)) == (100 if name != "full" else 299 - len(seen[u]) + 1)
                    and set(c) & seen[u] == {c[0]})


def test_uniform_and_popular_lists_have_the_right_frequencies(demo):
    popularity = np.bincount(pl.read_parquet(f"{demo}/data/interactions.parquet")["item"], minlength=299)
    times = {name: np.bincount(np.concatenate([c[1:] for c in load_candidates(demo, name)[1]]), minlength=299)
             for name in ("uni99", "pop99")}
    free = 600 - popularity # users whose lists may hold the item
    assert np.corrcoef(times["pop99"], popularity)[0, 1] > .8
    assert abs(times["uni99"] / free * 299 / 99 - 1).std() < .12 # binomial noise of about 6 %


def test_lists_do_not_depend_on_other_users_or_on_ids(demo, tmp_path):
    rows, back = lines(DEMO/"reviews_Demo_5.json.gz"), {}
    (tmp_path/"b").mkdir()
    for name in ("meta_Demo.json.gz", "truth.json"): (tmp_path/"b"/name).write_bytes((DEMO/name).read_bytes())
    fewer = [r for r in rows if json.loads(r)["reviewerID"] != "DEMOUSER0000"] # all dense user ids move by one
    (tmp_path/"b"/"reviews_Demo_5.json.gz").write_bytes(gzip.compress("\n".join(fewer).encode()))
    make_data(DataSettings(str(tmp_path/"r"), data_dir=str(tmp_path/"b")))
    for run in (demo, str(tmp_path/"r")):
        names, items = (pl.read_parquet(f"{run}/data/users.parquet")["raw_user"],
                        pl.read_parquet(f"{run}/data/items.parquet")["raw_item"])
        back[run] = {names[int(u)]: [items[int(i)] for i in c] for u, c in zip(*load_candidates(run, "uni99"))}
    one, two = back.values()
    assert len(two) == len(one) - 1 and all(one[u] == two[u] for u in two)


def test_the_same_again_and_another_seed(demo, tmp_path):
    def hashes(run):
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in Path(run, "data").glob("*.parquet")}
    make_data(DataSettings(str(tmp_path/"a")))
    assert hashes(tmp_path/"a") == hashes(demo)
    with replacing(True): make_data(DataSettings(str(tmp_path/"a"), split_seed=1))
    other = hashes(tmp_path/"a")
    assert {f for f in other if other[f] != hashes(demo)[f]} == {"candidates_uni99.parquet", "candidates_pop99.parquet"}


# --- formats: the demo written in each of them gives the same sequences

def as_2014_csv(d, rows):
    (d/"ratings_Baby.csv").write_text("".join(
        f"{r['reviewerID']},{r['asin']},{r.get('overall', '')},{r['unixReviewTime']}\n" for r in rows))
    return "baby", ""
def as_2018_csv(d, rows):
    (d/"Gift_Cards.csv").write_text("".join(
        f"{r['asin']},{r['reviewerID']},{r.get('overall', '')},{r['unixReviewTime']}\n" for r in rows))
    return "gift_cards", ""
def as_2018(d, rows):
    (d/"Luxury_Beauty_5.json.gz").write_bytes(gzip.compress("\n".join(json.dumps({"verified": True,
            "style": {"Size:": " 3"}} | r) for r in rows).encode()))
    return "Luxury_Beauty", ""
def as_2023(d, rows):
    new = [{"rating": r.get("overall"), "title": "x", "images": [], "asin": "z", "parent_asin": r["asin"],
            "user_id": r["reviewerID"], "timestamp": r["unixReviewTime"] * 1000} for r in rows]
    (d/"All_Beauty.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, new)).encode()))
    (d/"meta_All_Beauty.jsonl.gz").write_bytes(gzip.compress("\n".join(json.dumps({"main_category": "All Beauty",
            "title": f"T {a}", "parent_asin": a}) for a in {r["asin"] for r in rows}).encode()))
    return "beauty", ""
def as_2023_csv(d, rows):
    (d/"Video_Games.csv").write_text("user_id,parent_asin,rating,timestamp\n"
                                     + "".join(
        f"{r['reviewerID']},{r['asin']},{r.get('overall', '')},{r['unixReviewTime'] * 1000}\n" for r in rows))
    return "video_games", ""
def own(d, rows, name):
    frame = pl.DataFrame(rows, schema_overrides={"overall": pl.Float64}).select(uid="reviewerID", sku="asin",
            stars="overall", day=pl.from_epoch("unixReviewTime", "s").dt.date(),
            label=pl.concat_str(pl.lit("T "), "asin"))
    (frame.write_csv if name.endswith("csv") else frame.write_parquet)(d/name)
    return str(d/name), "user=uid,item=sku,rating=stars,time=day,title=label"
def as_own_csv(d, rows): return own(d, rows, "mine.csv")
def as_own_parquet(d, rows): return own(d, rows, "mine.parquet")


@pytest.mark.parametrize("write, titles", [(as_2014_csv, 0), (as_2018_csv, 0), (as_2018, 0), (as_2023, 299),
                                           (as_2023_csv, 0), (as_own_csv, 299), (as_own_parquet, 299)])
def test_every_format_gives_the_same_sequences(write, titles, demo, tmp_path):
    dataset, columns = write(tmp_path, [json.loads(x) for x in lines(DEMO/"reviews_Demo_5.json.gz")])
    folder = make_data(DataSettings(str(tmp_path/"run"), dataset=dataset, data_dir=str(tmp_path), columns=columns))
    assert pl.read_parquet(folder/"sequences.parquet").equals(pl.read_parquet(f"{demo}/data/sequences.parquet"))
    about = json.loads((folder/"dataset.json").read_text())
    assert about["titles"] == titles and about["has_titles"] == (titles > 0) and not about["synthetic"]


def test_a_row_without_time_comes_first(tmp_path):
    rows = [("u", "abcdef"[k], 5, None if k == 2 else k) for k in range(6)]
    pl.DataFrame(rows, schema=["user", "item", "rating", "time"], orient="row").write_parquet(tmp_path/"x.parquet")
    reviews, drops = read_reviews(find_source(str(tmp_path/"x.parquet")))
    assert "".join(reviews["item"]) == "cabdef" and drops[-1]["why"].startswith("1 rows without a time")


def test_repeats_keep_the_first_and_ties_the_file_order(tmp_path):
    rows = [("u", "b", 5, 9), ("u", "a", 5, 9), ("u", "b", 5, 1), ("u", "c", 4, 0)]
    pl.DataFrame(rows, schema=["user", "item", "rating", "time"], orient="row").write_csv(tmp_path/"x.csv")
    reviews, drops = read_reviews(find_source(str(tmp_path/"x.csv")))
    assert reviews.select("item", "time").rows() == [("b", 1), ("a", 9)]
    assert [(d["step"], d["rows_out"]) for d in drops] == [("read", 4), ("missing", 4), ("rating", 3), ("repeat", 2)]


# --- mistakes: one message, and nothing is left behind

GOOD = [f'{{"reviewerID": "u{n % 7}", "asin": "i{n % 11}", "overall": 5.0, "unixReviewTime": {n}}}' for n in range(70)]

def refuse(tmp_path, match, text=None, name="reviews_Baby_5.json.gz", dataset="baby", raw=None, **params):
    if text is not None:
        (tmp_path/name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    if raw is not None: (tmp_path/name).write_bytes(raw)
    with pytest.raises(UserError, match=match):
        make_data(DataSettings(str(tmp_path/"run"), dataset=dataset, data_dir=str(tmp_path), **params))
    assert not [p for p in (tmp_path/"run").glob("data*")]


def test_missing_file(tmp_path): refuse(tmp_path, "looked for reviews_Baby_5.json.gz.*ganprompt fetch Baby")
def test_missing_own_file(tmp_path): refuse(tmp_path, "no file", dataset=str(tmp_path/"none.csv"))
def test_unknown_dataset(tmp_path): refuse(tmp_path, "did you mean 'toys'", dataset="toyz")
def test_unknown_cut(tmp_path): refuse(tmp_path, "did you mean 'holdout-first'", cut="holdout")
def test_bad_lengths(tmp_path): refuse(tmp_path, "min_history=12", min_history=12)
def test_truncated_gzip(tmp_path):
    refuse(tmp_path, "truncated", raw=(DEMO/"reviews_Demo_5.json.gz").read_bytes()[:20000])
def test_not_gzip(tmp_path): refuse(tmp_path, "gzip|line 1", raw=b"<html>Moved</html>")
def test_malformed_line(tmp_path):
    refuse(tmp_path, r"reviews_Baby_5.json.gz, line 3: ", "\n".join([*GOOD[:2], GOOD[2][:30], *GOOD[3:]]))
def test_rating_is_text(tmp_path):
    refuse(tmp_path, "line 4: 'overall' is not a number", "\n".join([*GOOD[:3], GOOD[3].replace("5.0", '"good"')]))
def test_missing_column_json(tmp_path):
    refuse(tmp_path, "'overall'.*reviewerID, asin, stars", "\n".join(GOOD).replace("overall", "stars"))
def test_missing_column_csv(tmp_path):
    refuse(tmp_path, "no column 'rating'; it has user, item, stars, time", "user,item,stars,time\na,b,5,1\n", "x.csv",
           str(tmp_path/"x.csv"))
def test_malformed_csv(tmp_path):
    refuse(tmp_path, "x.csv, line 3: 5 fields", "user,item,rating,time\na,b,5,1\na,b,5,1,7\n", "x.csv",
           str(tmp_path/"x.csv"))
def test_csv_rating_is_text(tmp_path):
    refuse(tmp_path, "x.csv, line 2: 'rating' is not a number", "user,item,rating,time\na,b,five,1\n", "x.csv",
           str(tmp_path/"x.csv"))
def test_bad_columns_option(tmp_path):
    refuse(tmp_path, "columns: 'usr'", "user,item,rating,time\n", "x.csv", str(tmp_path/"x.csv"), columns="usr=a")
def test_rating_out_of_range(tmp_path):
    refuse(tmp_path, "line 6: rating 7 is outside 1 to 5", "\n".join([*GOOD[:5], GOOD[5].replace("5.0", "7.0"),
            *GOOD[6:]]))
def test_csv_rating_out_of_range(tmp_path):
    refuse(tmp_path, "x.csv, line 3: rating 8 ", "user,item,rating,time\na,b,5,1\na,c,8,1\n", "x.csv",
           str(tmp_path/"x.csv"))
def test_nothing_left(tmp_path):
    refuse(tmp_path, r"(?s)nothing left.*rating below 5.*fewer than 50", "\n".join(GOOD), core=50)
def test_empty_file(tmp_path): refuse(tmp_path, "nothing left|no row", "")
def test_malformed_meta(tmp_path):
    (tmp_path/"meta_Baby.json.gz").write_bytes(gzip.compress(b"{'asin': 'i1', 'title': 'Lamp'}\n{'asin': 'i2', "
                                                             b"'title': __import__('os')}\n"))
    refuse(tmp_path, "meta_Baby.json.gz, line 2: not JSON, nor a Python literal", "\n".join(GOOD))


# --- downloads, from a server on this machine

class Home(http.server.BaseHTTPRequestHandler):
    "Serves `files`, with ranges; closes the connection after `cut` bytes of an answer (once)."
    files, cut, asked = {}, None, []

    def do_GET(self):
        body, wanted = self.files.get(self.path.lstrip("/")), self.headers.get("Range")
        Home.asked.append((self.path, wanted))
        if body is None: return self.send_error(404)
        start = int(wanted[6:-1]) if wanted else 0
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            return self.end_headers()
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", len(body) - start)
        self.end_headers()
        self.wfile.write(body[start:][:Home.cut])
        Home.cut = None

    def log_message(self, *args): pass


@pytest.fixture
def home(monkeypatch):
    Home.files = {f"{kind}_Baby{five}.json.gz": (DEMO/f"{kind}_Demo{five}.json.gz").read_bytes()
                  for kind, five in (("reviews", "_5"), ("meta", ""))}
    Home.cut, Home.asked = None, []
    monkeypatch.setattr(data.time, "sleep", lambda s: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Home)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_fetch(home, tmp_path, capfd):
    paths = fetch_category("baby", str(tmp_path), base_url=home)
    assert {p.name: p.read_bytes() for p in paths} == Home.files
    assert not capfd.readouterr().err # into a pipe, and done within a minute
    mark = (tmp_path/"meta_Baby.json.gz.sha256").read_text().split()
    assert mark == [hashlib.sha256(Home.files["meta_Baby.json.gz"]).hexdigest(), "meta_Baby.json.gz"]
    Home.asked.clear()
    assert fetch_category("baby", str(tmp_path), base_url=home) == paths and not Home.asked # nothing is fetched twice


def test_a_cut_connection_goes_on_where_it_was(home, tmp_path):
    Home.cut = 5000
    path = fetch_category("baby", str(tmp_path), base_url=home)[0]
    assert path.read_bytes() == Home.files[path.name]
    assert [r for p, r in Home.asked if "reviews" in p] == [None, "bytes=5000-"]


def test_a_part_from_before_is_used(home, tmp_path):
    whole = Home.files["reviews_Baby_5.json.gz"]
    (tmp_path/"reviews_Baby_5.json.gz.part").write_bytes(whole[:7000])
    (tmp_path/"meta_Baby.json.gz.part").write_bytes(Home.files["meta_Baby.json.gz"]) # whole, but not yet named
    paths = fetch_category("baby", str(tmp_path), base_url=home)
    assert paths[0].read_bytes() == whole and paths[1].exists() and not list(tmp_path.glob("*.part"))
    assert Home.asked[0][1] == "bytes=7000-"


def test_cut_every_time(tmp_path, home, monkeypatch):
    monkeypatch.setattr(Home, "do_GET", lambda self: (self.send_response(200), self.send_header("Content-Length", 99),
                                                      self.end_headers(), self.wfile.write(b"x" * 9)))
    with pytest.raises(UserError, match="connection cut after 9 of 99 bytes.*goes on"):
        fetch_category("baby", str(tmp_path), base_url=home)
    assert [p.name for p in tmp_path.iterdir()] == ["reviews_Baby_5.json.gz.part"]


def test_wrong_checksum(home, tmp_path):
    (tmp_path/"reviews_Baby_5.json.gz.sha256").write_text("0" * 64 + "  reviews_Baby_5.json.gz\n")
    with pytest.raises(UserError, match="records 000000000000"): fetch_category("baby", str(tmp_path), base_url=home)
    assert [p.name for p in tmp_path.iterdir()] == ["reviews_Baby_5.json.gz.sha256"]


def test_damaged_on_the_server(home, tmp_path):
    Home.files["reviews_Baby_5.json.gz"] = Home.files["reviews_Baby_5.json.gz"][:9000]
    with pytest.raises(UserError, match="not a sound gzip"): fetch_category("baby", str(tmp_path), base_url=home)
    assert not list(tmp_path.iterdir())


def test_changed_on_disk(home, tmp_path):
    path = fetch_category("baby", str(tmp_path), base_url=home)[0]
    path.write_bytes(gzip.compress(b"other"))
    with pytest.raises(UserError, match="SHA-256"): fetch_category("baby", str(tmp_path), base_url=home)


@pytest.mark.parametrize("category, release, match", [("toys", "2014", "404"), ("demo", "2014", "no category 'demo'"),
                                                      ("baby", "2013", "'2013' is not known"),
                                                      ("babi", "2014", "did you mean 'Baby'")])
def test_fetch_refuses(category, release, match, home, tmp_path):
    with pytest.raises(UserError, match=match): fetch_category(category, str(tmp_path), release, home)
    assert not list(tmp_path.iterdir())


def test_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(data.time, "sleep", lambda s: None)
    with pytest.raises(UserError, match="check the network"):
        fetch_category("baby", str(tmp_path), base_url="http://127.0.0.1:9")


# --- real files, if they are here

REAL = Path(os.environ.get("GANPROMPT_AMAZON", root()/"data"/"raw"))

@pytest.mark.parametrize("name, cut, counts", [
    ("beauty", "literal", (4144, 2675, 36414)), ("toys", "literal", (3963, 2929, 30605)),
    ("beauty", "holdout-first", (2090, 1446, 20845)), ("toys", "holdout-first", (1689, 1466, 13664))])
def test_counts_of_the_2014_files(name, cut, counts):
    file = REAL/f"reviews_{categories(name)[1][0]}_5.json.gz"
    if not file.exists(): pytest.skip("the release is not here")
    made = prepare(read_reviews(find_source(name, str(REAL)))[0], cut=cut)
    assert (len(made["users"]), len(made["items"]), len(made["core"])) == counts
