"One protocol, one registry: a recommender of one's own is tuned, saved, loaded and asked as ours are."
import json, re, shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from conftest import make
from ganprompt.data import load_candidates, load_training
from ganprompt.encoder import reader_for
from ganprompt.files import UserError, root
from ganprompt.robustness import make_report
from ganprompt.scorer import KINDS, Recommender, Untuned, load_recommender
from ganprompt.study import StudySettings, make_study


class Bought(Recommender):
    "How often an item was bought in the training part, whatever the question."
    decided_by = "seed",
    def __init__(self, reader, counts): self.reader, self.counts = reader, counts
    def scores(self, questions, rows, lists, score="yes-no"): return [self.counts[lists[r]] for r in rows]
    def save(self, folder): np.save(folder/"counts.npy", self.counts)
    @classmethod
    def load(cls, folder, about, reader): return cls(reader, np.load(folder/"counts.npy"))
    @classmethod
    def fit(cls, run, folder, start, p):
        reader, bought = reader_for(run)[0], [i for items in load_training(run) for i in items]
        counts = np.bincount(bought, minlength=len(reader.titles)) + p.seed
        cls(reader, counts.astype(np.float32)).save(folder)
        return [{"step": 0, "loss": 1., "valid_auc": .5}]


@pytest.fixture
def tuned(finished, shop, tmp_path, monkeypatch):
    "A run whose recommenders are of a kind that this file defines."
    monkeypatch.setitem(KINDS, "bought", Bought)
    shutil.copytree(finished, run := tmp_path/"run")
    shutil.rmtree(run/"recommender")
    make(run, "recommender", shop, recommender="bought")
    return run


def test_a_kind_of_ones_own_is_tuned_saved_loaded_and_asked(tuned, tmp_path):
    folder, lists = tuned/"recommender", load_candidates(str(tuned), "uni99")[1]
    found = pl.read_parquet(folder/"scores.parquet")
    assert set(found["model"]) == {"no-stage-1, bought", "ganprompt, bought"}
    model = load_recommender(folder/"ganprompt, bought", reader_for(str(tuned))[0])
    mine = found.filter(model="ganprompt, bought")["scores"]
    assert isinstance(model, Bought) and mine[2].to_list() == model.counts[lists[2]].tolist()
    assert json.loads((folder/"ganprompt, bought/model.json").read_text()) == {
        "kind": "bought", "encoder": "../../encoder/model", "seed": 0}
    page = make_report(str(folder/"ganprompt, bought"), users=6, out=str(tmp_path/"report"))
    about = json.loads(page.with_suffix(".json").read_text())
    assert about["model"] == "ganprompt, bought" and about["measured"]["unseen"]["tau"] == 1 # it minds no wording
    make_study(StudySettings(str(tuned), study_entries="one template", study_recommender="bought", study_users=6,
                             recommender_epochs=1))
    (e,) = json.loads((tuned/"study/study.json").read_text())["entries"].values()
    assert e["measured"]["unseen"]["tau"] == 1 and e["valid"] == .5


def test_a_folder_says_which_kind_it_is(tuned, monkeypatch):
    reader, path = reader_for(str(tuned))
    assert isinstance(load_recommender(path, reader), Untuned) # any other language model
    monkeypatch.delitem(KINDS, "bought")
    with pytest.raises(UserError, match="the kind 'bought', which is not among untuned, t5-decoder"):
        load_recommender(tuned/"recommender/ganprompt, bought", reader)


def test_a_kind_that_has_no_stage_1_is_not_trained_on_one(finished, shop, tmp_path):
    for kind in "TALLRec", "untuned":
        with pytest.raises(UserError, match=f"recommender=.{kind}. is not known; choose one of t5-decoder, "):
            make(finished, "recommender", shop, recommender=kind)


def test_nobody_asks_a_recommender_which_kind_it_is():
    "No comparison with a kind's name, and none with a class, outside the benchmarks, which time kinds by name."
    names, classes = "|".join(map(re.escape, KINDS)), "|".join(kind.__name__ for kind in KINDS.values())
    asks = re.compile(rf"(==|!=|\bin) [\"']({names})[\"']|[\"']({names})[\"'] (==|!=|in)\b"
                      rf"|isinstance\([^()]*\b({classes})\b|\bkind (==|!=) ")
    chapters = "scorer recommender p5 collm robustness study results tables metrics sensitivity".split()
    for name in chapters:
        found = [line for line in Path(root()/f"ganprompt/{name}.py").read_text().splitlines() if asks.search(line)]
        assert not found, (name, found)
