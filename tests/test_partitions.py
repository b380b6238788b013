"A data set that is made part by part has the rows and the numbers of the one that is made at once."
import json

import numpy as np
import polars as pl
import pytest

from ganprompt import partitions as P
from ganprompt.data import DataSettings, make_data
from ganprompt.files import UserError

FILES = "interactions", "sequences", "candidates_uni99", "candidates_pop99", "candidates_full"


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    "Purchases with repeats, equal times, missing values, rare items, and a user who has everything."
    rng = np.random.default_rng(0)
    rows = [[f"U{u}", f"i{i}", stars, t] for u, i, stars, t in zip(
        (300*rng.random(6000)**2).astype(int), (150*rng.random(6000)**2).astype(int),
        rng.choice(["3", "4", "5", ""], 6000, p=[.1, .2, .69, .01]), rng.integers(0, 900, 6000))]
    for row in rows[::97]: row[3] = ""
    rows += [["U999", f"i{i}", 5, i] for i in range(150)]
    path = tmp_path_factory.mktemp("shop")/"shop.csv"
    lines = [rows[i] for i in rng.permutation(len(rows))]
    path.write_text("\n".join(",".join(map(str, row)) for row in [["user", "item", "rating", "time"], *lines]) + "\n")
    return path


@pytest.mark.parametrize("how", [
    dict(), dict(cut="holdout-first"), dict(protocol="time", rating=4.), dict(core=3, max_sequence=6),
    dict(core=1, min_history=1, max_history=2, cut="holdout-first", protocol="time"), dict(split_seed=7),
], ids=lambda how: ",".join(how) or "defaults")
def test_parts_are_the_whole(shop, tmp_path, monkeypatch, how):
    monkeypatch.setattr(P, "SAMPLED", 3)
    p = DataSettings(dataset=str(shop), run=str(tmp_path/"run"), **how)
    whole, parts = make_data(p), P.partition_data(p, tmp_path/"parts", part_rows=700)
    assert len(list((parts/"users.parquet").iterdir())) > 3 and not (parts/"work").exists()
    for name in (*FILES, "users", "items"):
        found, wanted = (pl.read_parquet(folder/f"{name}.parquet") for folder in (parts, whole))
        assert found.equals(wanted), name
    assert (parts/"drops.csv").read_text() == (whole/"drops.csv").read_text()
    told = [json.loads((folder/"dataset.json").read_text()) for folder in (parts, whole)]
    assert {k: v for k, v in told[0].items() if k != "notes"} == {k: v for k, v in told[1].items() if k != "notes"}


def test_two_processes_do_the_same(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(P, "SAMPLED", 3)
    p = DataSettings(dataset=str(shop))
    one, two = (P.partition_data(p, tmp_path/str(n), n, 1500) for n in (1, 2))
    for name in FILES:
        files = list((one/f"{name}.parquet").iterdir())
        assert len(files) > 1
        for f in files: assert pl.read_parquet(f).equals(pl.read_parquet(two/f"{name}.parquet"/f.name))


def test_what_is_wrong_leaves_nothing_behind(shop, tmp_path):
    with pytest.raises(UserError, match="nothing left to train or to test on.*\n.*read"):
        P.partition_data(DataSettings(dataset=str(shop), core=500), tmp_path/"none")
    (tmp_path/"bad.csv").write_text("user,item,rating,time\nu,i,good,1\n")
    with pytest.raises(UserError, match="bad.csv, line 2: 'rating' is not a number"):
        P.partition_data(DataSettings(dataset=str(tmp_path/"bad.csv")), tmp_path/"none")
    assert not list(tmp_path.glob("none*"))
    (tmp_path/"there").mkdir()
    with pytest.raises(UserError, match="is there already"): P.partition_data(DataSettings(), tmp_path/"there")
