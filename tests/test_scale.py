"What a catalogue costs, by hand; shortlists against all products."
import json, sys

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from ganprompt import scale as S
from ganprompt.cli import cli
from ganprompt.files import UserError, root

TOKENS = dict(instruction=30, title=16, history=10)


def test_costs_are_those_of_a_hand():
    size = dict(users=1000, items=500)
    ranker = S.operations(dict(kind="ranker", weights=1e6), size, TOKENS)
    assert ranker == dict(once=2e6*16*500, user=2e6*190 + 2*384*500)
    causal = dict(kind="causal", weights=1e6)
    whole, listed = (S.operations(causal, size, TOKENS, n)["user"] for n in (0, 500))
    assert whole == listed == 2e6*(190 + 8000)
    assert S.hours(dict(once=3.6e15, user=3.6e12), 1000, 2, .5) == 2 # 7.2e15 operations at 1e12 a second


def test_a_ten_times_larger_model_or_crowd_costs_ten_times_as_much():
    plan = dict(catalogues={"a": dict(users=100, items=50), "b": dict(users=1000, items=50)}, tokens=TOKENS,
                shortlist=10,
                models={"s": dict(kind="causal", weights=1e6), "l": dict(kind="causal", weights=1e7)}, share=.5,
                cards={"c": dict(tflops=1, dollars=3)})
    rows = {(r["catalogue"], r["recommender"], r["items"]): r for r in S.cost_rows(plan).to_dicts()}
    for n in (10, 50):
        a = rows["a", "s", n]["hours"]
        assert np.allclose([rows["a", "l", n]["hours"], rows["b", "s", n]["hours"], rows["a", "s", n]["dollars"]],
                           [10*a, 10*a, 3*a])


@pytest.mark.parametrize("width", [8, 129])
def test_an_index_finds_what_products_find(width):
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(3000, width)).astype(np.float32)
    vectors[:, -1] *= 3 # some items are popular: their vectors are long
    states = np.c_[rng.normal(size=(100, width - 1)), np.ones(100)].astype(np.float32)
    exact, found = S.largest(states, vectors, 50), S.index_of(vectors).search(states, 50)[1]
    assert (np.diff(np.take_along_axis(states @ vectors.T, exact, 1), axis=1) <= 0).all()
    assert np.mean([np.isin(a, b).mean() for a, b in zip(exact, found)]) > .9


def test_who_lacks_the_library_is_told_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    for call in (lambda: S.keep_shortlist(tmp_path/"no run", tmp_path), lambda: S.index_of(np.eye(2))):
        with pytest.raises(UserError, match="wants faiss: pip install"): call()


def test_what_a_user_has_leaves_a_shortlist_and_the_purchase_does_not():
    near, own, targets = np.array([[5, 4, 3, 2, 1], [1, 2, 3, 4, 5]]), [[5, 3], []], np.array([2, 3])
    lists = S.without_own(near, own, 3)
    assert lists.tolist() == [[4, 2, 1], [1, 2, 3]]
    rows = S.shortlist_rows(lists, lists[:, ::-1], targets, (1, 2, 3, 9))
    assert rows["length"].to_list() == [1, 2, 3] and rows["exact"].to_list() == [0, .5, 1]
    assert rows["index"].to_list() == [.5, 1, 1] and rows["found"].to_list() == [0, .5, 1]


def test_the_page_is_drawn_from_what_is_kept(tmp_path):
    "A study of one's own, with one measurement."
    home = tmp_path/"scale"
    home.mkdir()
    kept = dict(dataset="shop", users=7, items=1234, machine="a machine", seconds=dict(build=1.25, index=.5, exact=3.),
                lists=[dict(length=10, found=.9, exact=.25, index=.125)])
    (home/"shop.json").write_text(json.dumps(kept))
    done = CliRunner().invoke(cli, ["tables", str(home)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    page = (home/"scale.md").read_text()
    assert "| 10     | .900" in page and ".125" in page and "7 users, 1,234 items" in page and "computed" in page
    assert "No GPU was measured here" in " ".join(page.split())
    costs = pl.read_csv(home/"scale.csv")
    cards = len(S.yaml.safe_load((root()/"data/scale.yaml").read_text())["cards"])
    assert len(costs) == 3*6*cards # three catalogues; four models, of which two also rank all items
