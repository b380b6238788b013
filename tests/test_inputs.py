"""Chapter 05: files as shops keep them. Every way of writing one table gives the same reviews; what cannot be read
is told with its line. All names are invented."""
import csv, datetime, gzip, io, json

import polars as pl
import pytest

from ganprompt.corpora import find_source
from ganprompt.reviews import date_formats, read_reviews, read_titles
from ganprompt.data import DataSettings, dataset_info, gentler, make_data, prepare
from ganprompt.files import UserError

TITLES = ["Oak kettle", "Brass hook, large", "Linen \"sun\" rug", "Café stool", "Walnut tray", "Amber vase"]
IDS = ["0000001025", "000000102X", "12345678901234567890", "7", "SKU-5", "0x1F"]
ROWS = [(f"u{u:03}", IDS[(u + k) % 6], [5, 4.5, 3, 5, 5][k], 1_600_000_000 + 86_400*(7*u + k), TITLES[(u + k) % 6])
        for u in range(12) for k in range(5)]
HEAD = "user", "item", "rating", "time", "title"


def text(rows=ROWS, separator=",", head=HEAD, quoting=csv.QUOTE_MINIMAL, end="\n"):
    if len(separator) > 1: return "".join(separator.join(map(str, r)) + end for r in [head, *rows] if r)
    out = io.StringIO()
    writer = csv.writer(out, delimiter=separator, quoting=quoting, lineterminator=end)
    writer.writerows([head, *rows] if head else rows)
    return out.getvalue()


def comma(rows): return [(u, i, str(r).replace(".", ","), t, x) for u, i, r, t, x in rows]
def day(form, rows=ROWS):
    return [(u, i, r, pl.from_epoch(pl.Series([t]))[0].strftime(form), x) for u, i, r, t, x in rows]


def read(path, **how):
    "Rows as text, rating and order: what may not depend on how the table was written."
    source = find_source(str(path), **how)
    df, drops = read_reviews(source, .5)
    return [(u, i, r) for u, i, r, _ in df.rows()], read_titles(source, set(df["item"].cast(pl.String))), drops


PLAIN = sorted(ROWS, key=lambda r: r[3])
WANTED = [(u, i, r) for u, i, r, _, _ in PLAIN], dict(zip(IDS, TITLES))


@pytest.mark.parametrize("separator", [",", ";", "\t", "|", "::"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "latin-1", "cp1252"])
def test_separators_and_encodings(separator, encoding, tmp_path):
    mark = {"utf-16-le": "\ufeff", "utf-16-be": "\ufeff"}.get(encoding, "")
    (tmp_path/"shop.txt").write_bytes((mark + text(separator=separator)).encode(encoding))
    asked = dict(encoding=encoding) if encoding in ("latin-1", "cp1252") else {}
    assert read(tmp_path/"shop.txt", **asked)[:2] == WANTED


WAYS = {
    "decimal commas": text(comma(ROWS), ";"), "decimal commas in quotation marks": text(comma(ROWS)),
    "all quoted": text(quoting=csv.QUOTE_ALL),
    "windows lines": text(end="\r\n"), "old mac lines": text(end="\r"), "blank lines": text().replace("\n", "\n\n"),
    "no line at the end": text().rstrip("\n"),
    "no header": text(head=None), "an unknown separator": text(separator="^"),
    "a blank before": text().replace(",5,", ", 5,"),
    "iso": text(day("%Y-%m-%d")), "iso with time": text(day("%Y-%m-%dT%H:%M:%S")),
    "with a zone": text(day("%Y-%m-%d %H:%M:%S+00:00")), "with Z": text(day("%Y-%m-%dT%H:%M:%S.250Z")),
    "mixed": text(day("%Y-%m-%d", ROWS[:5]) + day("%Y-%m-%d %H:%M:%S", ROWS[5:])), "days last": text(day("%m/%d/%Y")),
    "days first": text(day("%d/%m/%Y %H:%M")), "dots": text(day("%d.%m.%Y")),
    "am and pm": text(day("%m/%d/%Y %I:%M %p")), "milliseconds": text([(*r[:3], 1000*r[3], r[4]) for r in ROWS]),
    "float times": text([(*r[:3], float(r[3]), r[4]) for r in ROWS]),
}

@pytest.mark.parametrize("way", WAYS)
def test_ways_of_writing_a_csv_file(way, tmp_path):
    (tmp_path/"shop.csv").write_text(WAYS[way], newline="")
    assert read(tmp_path/"shop.csv", separator="^" if "unknown" in way else "")[:2] == WANTED


def test_packed(tmp_path):
    (tmp_path/"shop.csv.gz").write_bytes(gzip.compress(text(separator=";").encode("utf-16")))
    assert read(tmp_path/"shop.csv.gz")[:2] == WANTED


# --- JSON lines and parquet

def objects(names=HEAD, rows=ROWS): return "".join(json.dumps({n: x for n, x in zip(names, r)}) + "\n" for r in rows)

@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_lines(encoding, tmp_path):
    (tmp_path/"shop.jsonl").write_bytes(objects().encode(encoding))
    assert read(tmp_path/"shop.jsonl")[:2] == WANTED
    names = dict(zip(HEAD, "uid sku stars day name".split()))
    (tmp_path/"mine.jsonl").write_bytes("\n".join([objects(names.values(), day("%Y-%m-%d")), ""]).encode(encoding))
    assert read(tmp_path/"mine.jsonl", columns=",".join(f"{k}={v}" for k, v in names.items()))[:2] == WANTED


def test_json_lines_of_the_2023_release(tmp_path):
    "Its names are known, its title is the review's, and those of the items stand in another file."
    rows = [dict(rating=float(r), title="fine", text="ok", asin="z", parent_asin=i, user_id=u, timestamp=1000*t)
            for u, i, r, t, _ in ROWS]
    (tmp_path/"own.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path/"meta.jsonl").write_text("".join(json.dumps({"title": t, "parent_asin": i}) + "\n"
                                               for i, t in zip(IDS, TITLES)))
    assert read(tmp_path/"own.jsonl")[:2] == (WANTED[0], {})
    assert read(tmp_path/"own.jsonl", items_file=str(tmp_path/"meta.jsonl"))[:2] == WANTED


def test_values_of_other_types(tmp_path):
    "Numbers as texts, ids as numbers, a rating that is not a number: missing."
    rows = [{"user": n % 7, "item": float(n % 5), "rating": "4.5" if n else float("nan"), "time": str(n)}
            for n in range(30)]
    (tmp_path/"x.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found, _, drops = read(tmp_path/"x.jsonl")
    assert found[0] == ("1", "1", 4.5) and drops[1]["rows_out"] == 29


@pytest.mark.parametrize("kind", [pl.Int32, pl.Int64, pl.Float64, pl.String, pl.Categorical])
@pytest.mark.parametrize("other", [pl.Int64, pl.String])
def test_ids_are_text_in_both_files(kind, other, tmp_path):
    df = pl.DataFrame({"user": [1, 2, 3]*4, "item": [10, 11, 12, 13]*3, "rating": [5., None, float("nan")] + [4.]*9,
                       "time": range(12)})
    df.with_columns(pl.col("item").cast(pl.String if kind == pl.Categorical else kind).cast(kind),
                    pl.col("user").cast(kind if kind.is_numeric() else pl.String)).write_parquet(tmp_path/"x.parquet")
    items = pl.DataFrame({"item": [10, 11, 12, 13], "title": list("abcd")}).cast({"item": other})
    items.write_parquet(tmp_path/"items.parquet")
    items.write_csv(tmp_path/"items.csv", separator=";")
    for name in "items.parquet", "items.csv":
        found, titles, drops = read(tmp_path/"x.parquet", items_file=str(tmp_path/name))
        assert {u for u, _, _ in found} == set("123") and titles == dict(zip(["10", "11", "12", "13"], "abcd"))
        assert [(d["step"], d["rows_out"]) for d in drops[:2]] == [("read", 12), ("missing", 10)]


@pytest.mark.parametrize("mark", ["", "NA", "NaN", "null", " "])
def test_missing_ratings_and_times(mark, tmp_path):
    (tmp_path/"x.csv").write_text(text([("u", "a", 5, 3, "A"), ("u", "b", mark, 2, "B"), ("u", "c", 5, mark, "C"),
                                        ("u", "d", 5, 1, "D")]))
    found, _, drops = read(tmp_path/"x.csv")
    assert [i for _, i, _ in found] == ["c", "d", "a"] and [d["rows_out"] for d in drops[:2]] == [4, 3]


# --- MovieLens' own files: one command each

def movielens_1m(d):
    "ratings.dat and movies.dat: no header, two colons, movies in Latin-1."
    films = {i: f"{name} ({1950 + i})" for i, name in enumerate(["Le Café bleu", "Night: Part 2", "Oak Kettle, The",
            "Señor Linen", "A | B"], 1)}
    (d/"ratings.dat").write_text("".join(f"{u}::{(u + k) % 5 + 1}::{5 - k % 2}::{978300760 + 60*(9*u + k)}\n"
                                         for u in range(1, 31) for k in range(4)))
    (d/"movies.dat").write_bytes("".join(f"{i}::{t}::Comedy|Children's\n" for i, t in films.items()).encode("latin-1"))
    return films

def test_movielens_1m(tmp_path):
    films = movielens_1m(tmp_path)
    run = str(tmp_path/"run")
    folder = make_data(DataSettings(run, dataset=str(tmp_path/"ratings.dat"), items_file=str(tmp_path/"movies.dat"),
                                    encoding="latin-1", rating=4, core=2, min_history=1))
    items = pl.read_parquet(folder/"items.parquet")
    assert dict(items.select("raw_item", "title").rows()) == {str(i): t for i, t in films.items()}
    with pytest.raises(UserError,
                       match=r"movies.dat, line 1: byte 0xe9 after '1::Le Caf' is not utf-8.*--encoding cp1252.*Café "
                             r"bleu"):
        make_data(DataSettings(str(tmp_path/"no"), dataset=str(tmp_path/"ratings.dat"),
                               items_file=str(tmp_path/"movies.dat"), rating=4, core=2, min_history=1))
    assert not list((tmp_path/"no").glob("data*"))


def movielens_latest(d):
    "ratings.csv with half stars, movies.csv with quoted titles."
    rows = [(u, 100 + (u + k) % 6, [.5, 3.5, 4, 4.5, 5][k], 964982703 + 60*(9*u + k)) for u in range(1, 31)
            for k in range(5)]
    (d/"ratings.csv").write_text(text(rows, head=("userId", "movieId", "rating", "timestamp")))
    (d/"movies.csv").write_text(text([(100 + i, f"{t} (19{50 + i})", "Drama|War") for i, t in enumerate(TITLES)],
                                     head=("movieId", "title", "genres")))

def test_movielens_latest(tmp_path):
    movielens_latest(tmp_path)
    folder = make_data(DataSettings(str(tmp_path/"run"), dataset=str(tmp_path/"ratings.csv"),
                                    items_file=str(tmp_path/"movies.csv"), rating=.5, rating_scale="0.5-5", core=2,
                                    min_history=1))
    assert (pl.read_parquet(folder/"items.parquet")["title"][1] == "Brass hook, large (1951)"
            and pl.read_parquet(folder/"interactions.parquet")["rating"].min() == .5)
    _, _, drops = read(tmp_path/"ratings.csv")
    assert drops[2] == dict(step="scale", rows_in=150, rows_out=120,
                            why="rating outside 1 to 5, the first (0.5) in line 2")
    (tmp_path/"movies.csv").rename(tmp_path/"u.item")
    assert read(tmp_path/"ratings.csv", items_file=str(tmp_path/"u.item"),
                columns="user=userId,item=movieId,time=timestamp")[1]["101"].startswith("Brass hook, large")


# --- ratings

def test_scales(tmp_path):
    (tmp_path/"ten.csv").write_text(text([(f"u{n}", "i", n, n, "x") for n in range(-1, 11)]))
    df, drops = read_reviews(find_source(str(tmp_path/"ten.csv"), rating_scale="0-10"), 8)
    assert df["rating"].to_list() == [8, 9, 10] and [d["rows_out"] for d in drops] == [12, 12, 11, 3, 3]
    assert drops[2]["why"] == "rating outside 0 to 10, the first (-1) in line 2"
    with pytest.raises(UserError, match="ten.csv, line 9: rating 6 is outside 1 to 5.*--rating-scale 0-10"):
        read(tmp_path/"ten.csv")
    with pytest.raises(UserError, match="rating=6 is above the scale of 1-5"):
        make_data(DataSettings(str(tmp_path/"r"), dataset=str(tmp_path/"ten.csv"), rating=6))
    with pytest.raises(UserError, match="rating_scale='five' is not understood"):
        find_source(str(tmp_path/"ten.csv"), rating_scale="five")


# --- dates

@pytest.mark.parametrize("form, options", [("%m/%d/%Y", ["%d/%m/%Y", "%m/%d/%Y"]),
                                           ("%d.%m.%Y", ["%d.%m.%Y", "%m.%d.%Y"]),
                                           ("%d-%m-%y", ["%d-%m-%y", "%m-%d-%y", "%y-%m-%d"]),
                                           ("%m/%d/%Y %H:%M", ["%d/%m/%Y %H:%M", "%m/%d/%Y %H:%M"])])
def test_dates_that_can_be_read_in_two_ways(form, options, tmp_path):
    rows = [("u", f"i{n}", 5, datetime.date(2021, n + 1, 1 + n % 9).strftime(form), "x") for n in range(10)]
    (tmp_path/"x.csv").write_text(text(rows))
    with pytest.raises(UserError, match="can be read in more than one order") as e: read(tmp_path/"x.csv")
    assert all(f"--date-format '{o}'" in str(e.value) for o in options)
    assert [i for _, i, _ in read(tmp_path/"x.csv", date_format=form)[0]] == [f"i{n}" for n in range(10)]


def test_a_day_over_12_late_in_the_file_tells(tmp_path):
    rows = [("u", f"i{n}", 5, "01/02/2021", "x") for n in range(300)] + [("u", "late", 5, "01/13/2021", "x")]
    (tmp_path/"x.csv").write_text(text(rows))
    _, _, drops = read(tmp_path/"x.csv")
    assert drops[0]["why"] == "rows of x.csv, times as %m/%d/%Y"


@pytest.mark.parametrize("times, how, match", [
    (["1 May 2021"]*3, {}, "are no numbers, and not all in one of the usual forms.*--date-format '%d %b %Y'"),
    (["09/17/2020"]*3, dict(date_format="%d/%m/%Y"),
     "are not written as '%d/%m/%Y'; --date-format '%m/%d/%Y' would fit"),
    (["2021-01-01"]*250 + ["soon"], {}, "x.csv, line 252: 'time' is not a date as '%Y-%m-%d' reads it: 'soon'"),
    ([1_600_000_000]*250 + ["soon"], {}, "x.csv, line 252: 'time' is not a number: 'soon'"),
    ([1_600_000_000, 1_600_000_000_000], {}, "cannot all be seconds"),
    ([5], dict(date_format="dmy"), "date_format='dmy' names no parts")])
def test_times_that_cannot_be_read(times, how, match, tmp_path):
    (tmp_path/"x.csv").write_text(text([("u", f"i{n}", 5, t, "x") for n, t in enumerate(times)]))
    with pytest.raises(UserError, match=match): read(tmp_path/"x.csv", **how)


def test_a_month_in_words_by_option(tmp_path):
    (tmp_path/"x.csv").write_text(text([("u", "b", 5, "2 May 2021", "x"), ("u", "a", 5, "30 Apr 2021", "x")]))
    assert [i for _, i, _ in read(tmp_path/"x.csv", date_format="%d %b %Y")[0]] == ["a", "b"]


def test_date_formats():
    assert (date_formats("2021/1/4") == {"Ymd": "%Y/%m/%d"} and not date_formats("2021-04")
            and not date_formats("123/1/1") and not date_formats("1-2/2021"))


# --- faults with their line

SHORT = text(ROWS[:8])
@pytest.mark.parametrize("table, match", [
    (text(ROWS[:300]).replace('"Brass hook, large"', "Brass hook, large"),
     "line 3: 6 fields in place of 5: .*Brass hook, large.*put quotation marks"),
    (SHORT + "u9,i9,5\n", "line 10: 3 fields in place of 5"),
    (text(ROWS*9) + "u9,i9,5\n", "line 542: 3 fields in place of 5"),
    (text(ROWS*9) + "u9,i9,5,1,a,b\n", "line 542: 6 fields in place of 5"),
    (text([*[(*r[:4], f"{r[4]}\nin two lines") for r in ROWS], ("u", "i", 9, 1, "x")]),
     "line 122: rating 9 is outside 1 to 5"),
    (text([*[(*r[:4], f"{r[4]}\nin two lines") for r in ROWS*9], ("u", "i", "nine", 1, "x")]),
     "line 1082: 'rating' is not a number: 'nine'"),
    (text(head=("uid", "sku", "stars", "ts", "name")),
     r"no column 'user', 'item', 'rating', 'time'; it has uid, sku, stars, ts, name \(separator ','.*--columns "
     r"user=…,item=…,rating=…,time=…"),
    ("[1, 2]\n", "one JSON list"), ("", "the file is empty"), ("<!DOCTYPE html><p>", "a web page"),
    ("PK\3\4....", "a workbook"), ("just some words\nmore\n", "no column 'user'"),
    (text(ROWS*9) + 'u9,i9,5,1,"open\n' + text(head=None), "line 542: .*quotation marks"),
    (SHORT + 'u9,i9,5,1,"open\n' + SHORT[:50].replace('"', ""), "line 10: unexpected end of data"),
    (SHORT + 'u9,i9,5,1,"open\n' + SHORT + 'u,i,5,1,"Big" lamp\n', "line 10: ")])
def test_faults_of_a_table(table, match, tmp_path):
    (tmp_path/"x.csv").write_text(table)
    with pytest.raises(UserError, match="(?s)x.csv.*" + match):
        make_data(DataSettings(str(tmp_path/"run"), dataset=str(tmp_path/"x.csv"),
                               columns="title=title" if ",title" in table else ""))
    assert not list((tmp_path/"run").glob("data*"))


def test_a_byte_that_is_not_utf8(tmp_path):
    (tmp_path/"x.csv").write_bytes(text(ROWS*99).encode() + "u,i,5,1,Señor\n".encode("latin-1"))
    with pytest.raises(UserError,
                       match=r"x.csv, line 5942: byte 0xf1 after .*Se' is not utf-8.*--encoding cp1252 \(then it "
                             r"reads '.*Señor'"):
        read(tmp_path/"x.csv")
    (tmp_path/"reviews_Baby_5.json.gz").write_bytes(gzip.compress(b'{"reviewerID": "u", "asin": "a", "overall": 5.0, '
                                                                  b'"unixReviewTime": 1}\n'))
    (tmp_path/"meta_Baby.json.gz").write_bytes(gzip.compress(b"{'asin': 'b', 'title': 'x'}\n{'asin': 'a', 'title': "
                                                             b"'Caf\xe9'}\n"))
    with pytest.raises(UserError, match="meta_Baby.json.gz, line 2: byte 0xe9"):
        read_titles(find_source("baby", str(tmp_path)), {"a"})
    assert read_titles(find_source("baby", str(tmp_path), encoding="latin-1"), {"a"}) == {"a": "Café"}
    with pytest.raises(UserError, match="encoding='latin-99' is not known"):
        find_source(str(tmp_path/"x.csv"), encoding="latin-99")


def test_utf16_without_a_mark(tmp_path):
    (tmp_path/"x.csv").write_bytes(text().encode("utf-16-le"))
    with pytest.raises(UserError, match="UTF-16 without a mark.*--encoding utf-16-le"): read(tmp_path/"x.csv")
    assert read(tmp_path/"x.csv", encoding="utf-16-le")[:2] == WANTED


def test_not_parquet(tmp_path):
    for name, content in (("x.parquet", b"user,item\n"), ("y.parquet", b"PAR1 and no more")):
        (tmp_path/name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.*(not a|damaged) parquet file"): read(tmp_path/name)


def test_the_2023_release_has_rows_without_stars(tmp_path):
    rows = [dict(rating=5.0 if n != 3 else 0.0, user_id=f"u{n % 3}", parent_asin=f"i{n}", timestamp=n)
            for n in range(9)]
    (tmp_path/"All_Beauty.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    df, drops = read_reviews(find_source("beauty", str(tmp_path)))
    assert len(df) == 8 and drops[2]["why"] == "rating outside 1 to 5, the first (0) in line 4"


# --- titles

def test_titles_that_are_missing_or_elsewhere(tmp_path):
    with open(shop(tmp_path)) as f: (tmp_path/"x.csv").write_text(f.read().replace("title", "name"))
    with pytest.raises(UserError, match="no column 'label'; it has user, item, rating, time, name"):
        find_source(str(tmp_path/"x.csv"), columns="title=label")
    make_data(DataSettings(str(tmp_path/"run"), dataset=str(tmp_path/"x.csv"), rating=3, core=2))
    info = dataset_info(str(tmp_path/"run"))
    assert (not info["has_titles"] and "x.csv has the columns user, item, rating, time, name" in info["titles_missing"]
            and "fetch" not in info["titles_missing"])
    (tmp_path/"items.csv").write_text("item,name\n1,a\n")
    with pytest.raises(UserError, match="items.csv: no column 'title'; it has item, name"):
        find_source(str(tmp_path/"x.csv"), items_file=str(tmp_path/"items.csv"))
    with pytest.raises(UserError, match="no file .*none.csv; check the path given as --items-file"):
        find_source(str(tmp_path/"x.csv"), items_file=str(tmp_path/"none.csv"))
    (tmp_path/"items.csv").write_text("item,title\n1,a, b\n")
    with pytest.raises(UserError, match="items.csv, line 2: 3 fields in place of 2"):
        read_titles(find_source(str(tmp_path/"x.csv"), items_file=str(tmp_path/"items.csv")), {"1"})


def test_options_of_a_table_are_refused_for_a_release():
    with pytest.raises(UserError, match="for a file of your own"): find_source("demo", separator=";")


# --- what a cut leaves

def shop(tmp_path):
    "60 users of 30 items; few ratings are 5."
    rows = [(f"u{u}", f"i{(7*u + 3*k) % 30}", [5, 4, 4, 5, 3, 5, 4, 2, 1, 5][(u + k) % 10], 100*u + k, "x y")
            for u in range(60) for k in range(10)]
    (tmp_path/"shop.csv").write_text(text(rows))
    return str(tmp_path/"shop.csv")


def test_gentler_values_keep_what_they_say(tmp_path):
    source = find_source(shop(tmp_path))
    found = gentler(source, rating=5, core=5)
    assert ({(g["rating"], g["core"]) for g in found} == {(r, c) for r in (5, 4, 3, 1) for c in (5, 3, 2)} - {(5, 5)}
            and found[0]["rating"] == 4 or found[0]["core"] == 3)
    for g in found:
        made = prepare(read_reviews(source, g["rating"])[0], g["core"])
        assert g["interactions"] == len(made["core"]) and g["users"] == (made["sequences"]["split"] == "test").sum()


def test_little_is_left_and_lists_are_short(tmp_path):
    run = str(tmp_path/"run")
    folder = make_data(DataSettings(run, dataset=shop(tmp_path), rating=4, core=3))
    info, summary = dataset_info(run), (folder/"summary.txt").read_text()
    sizes = pl.read_parquet(folder/"candidates_uni99.parquet")["items"].list.len()
    assert info["candidates"]["uni99"] == dict(least=sizes.min(), most=sizes.max()) and sizes.max() < 31
    little, short = info["notes"]
    assert (little.startswith("few users: 420 of 600 ratings (70.0%) and 60 users")
            and "60 users to test on, with rating 4 and core 3" in little)
    assert (f"hold {sizes.min()} to {sizes.max()} candidates, not 100" in short
            and f"HR@10 is {(10/sizes).mean():.3f}" in short)
    assert "     rating       600 ->       420  rating below 4" in summary and summary.count("WARNING") == 2


def test_nothing_left_names_gentler_values(tmp_path):
    with pytest.raises(UserError,
                       match=r"(?s)nothing left.*rating below 5.*--rating 5 --core 3 would keep 240 interactions, 60 "
                             r"users"):
        make_data(DataSettings(str(tmp_path/"run"), dataset=shop(tmp_path), rating=5, core=9))


def test_the_demo_has_nothing_to_warn_of(tmp_path):
    make_data(DataSettings(str(tmp_path/"run")))
    assert (dataset_info(str(tmp_path/"run"))["notes"] == []
            and dataset_info(str(tmp_path/"run"))["candidates"]["uni99"] == dict(least=100, most=100))
