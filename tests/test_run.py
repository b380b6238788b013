"A run as an object: each chapter's readers give what its stage made."
import polars as pl
import pytest

import ganprompt
from ganprompt import Run
from ganprompt.data import load_candidates, load_sequences
from ganprompt.files import UserError, _definitions, root


def test_every_reader_gives_frames_that_fit_together(finished):
    run = Run(finished)
    assert (list(run.stages) == ["data", "prompts", "backbones", "attributes", "encoder", "recommender"]
            and not any(run.stages.values()))
    assert run.stage("encoder") == finished/"encoder" and "encoder" in repr(run)
    assert run.sequences("valid").equals(load_sequences(str(finished), "valid"))
    lists = run.candidates("pop99")
    assert [x.tolist() for x in load_candidates(str(finished), "pop99")[1]] == lists["items"].to_list()
    assert len(run.titles) == len(run.items) and set(run.words) >= set(run.attributes["attribute"].drop_nulls())
    states = run.states("before")
    assert states["version"].n_unique() == 1 + len(run.words) and not states.equals(run.states())
    scores, test = run.scores("no-stage-1"), run.sequences()
    assert (scores["items"].list.len().equals(scores["scores"].list.len())
            and scores["items"].list.first().to_list() == test["target"].to_list())
    mine = run.shopper(3)
    assert (mine["item"].to_list()[-1] == test.filter(user=3)["target"][0] and mine["time"].is_sorted()
            and mine["title"].null_count() == 0)
    assert "{target_item}" in run.templates["recommendation"]


def test_what_is_not_there_is_said(finished, tmp_path):
    with pytest.raises(UserError, match="no run .*ganprompt run"): Run(tmp_path/"none")
    with pytest.raises(UserError, match="'metrics'"): Run(finished).ranks
    with pytest.raises(UserError, match="model='ganpromt' .*did you mean 'ganprompt'"): Run(finished).scores("ganpromt")
    with pytest.raises(UserError, match="when='during'"): Run(finished).states("during")
    with pytest.raises(AttributeError, match="no attribute 'Runs'"): ganprompt.Runs


def test_readers_are_found_by_completion_and_make_no_stage_out_of_date(finished):
    assert ({"sequences", "titles", "candidates", "attributes", "states", "scores", "ranks", "table", "points"}
            <= set(dir(Run(finished))))
    known = _definitions((root()/"ganprompt/data.py").read_text())[0]
    assert "load_sequences" in known and not {"items", "sequences", "candidates"} & set(known)
    assert isinstance(Run(finished).interactions, pl.DataFrame)
