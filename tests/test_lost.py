"Nothing lost: what a stage has finished outlives the error, or the kill, that comes after it."
import math, shutil

import numpy as np
import polars as pl
import pytest
from conftest import make

from ganprompt import backbones, processes, recommender, scorer
from ganprompt.backbones import BackbonesSettings, make_backbones
from ganprompt.data import load_sequences
from ganprompt.files import UserError


def test_an_error_in_the_second_backbone_keeps_the_first(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "cores", lambda: 1) # one after another, here
    make(tmp_path/"run", "prompts", shop)
    trained, real = [], backbones.train
    def train(*args):
        trained.append(args[-1])
        if trained == ["pocket t5", "pocket bert"]: raise UserError("the loss is nan")
        return real(*args)
    monkeypatch.setattr(backbones, "train", train)
    few = dict(pocket_width=32, pocket_layers=1, pocket_epochs=1)
    with pytest.raises(UserError): make_backbones(BackbonesSettings(str(tmp_path/"run"), **few))
    folder = make_backbones(BackbonesSettings(str(tmp_path/"run"), **few))
    assert trained == ["pocket t5", "pocket bert", "pocket bert"]
    assert set(pl.read_parquet(folder/"curves.parquet")["model"]) == {"t5", "bert"}


def test_an_error_in_the_second_recommender_keeps_the_first_and_its_scores(finished, shop, tmp_path, monkeypatch):
    """First a loss that is not finite, then another rank, and a stop while the last model is scored. Only what was
    not finished is done again, and the result is that of an undisturbed run."""
    monkeypatch.setattr(processes, "cores", lambda: 1) # one after another, here
    shutil.copytree(finished, run := tmp_path/"run")
    shutil.rmtree(run/"recommender")
    shutil.copytree(finished/"recommender/llm", llm := tmp_path/"llm")
    trained, scored, tune = [], [], recommender.tune_on_states
    def tune_on_states(*args):
        trained.append(args[-1].removeprefix("stage 2, "))
        if len(trained) == 3: raise UserError("the loss is nan")
        return tune(*args)
    monkeypatch.setattr(recommender, "tune_on_states", tune_on_states)
    def watched(score):
        def scores(model, *args):
            scored.append(type(model).__name__)
            if scored.count("CausalLM") == 2: raise KeyboardInterrupt
            return score(model, *args)
        return scores
    for kind in scorer.Prompted, scorer.Continued: monkeypatch.setattr(kind, "scores", watched(kind.scores))
    kinds = dict(recommender="t5-ranker,causal-lm", llm=str(llm))
    with pytest.raises(UserError, match="nan"): make(run, "recommender", shop, **kinds, lora_rank=4)
    with pytest.raises(KeyboardInterrupt): make(run, "recommender", shop, **kinds)
    assert trained == ["no-stage-1, t5-ranker", "ganprompt, t5-ranker", "no-stage-1, causal-lm",
                       "no-stage-1, causal-lm", "ganprompt, causal-lm"]
    folder = make(run, "recommender", shop, **kinds)
    chunks = math.ceil(len(load_sequences(str(run), "test"))/50) # of each model
    assert len(trained) == 5 and scored == ["T5Ranker"]*2*chunks + ["CausalLM"]*(2*chunks + 1)
    found, whole = (pl.read_parquet(f/"scores.parquet").filter(pl.col("model").is_in(trained[:2]))
                    for f in (folder, finished/"recommender"))
    # libraries that other tests have loaded change the last digits
    assert np.allclose(np.array(found["scores"].to_list()), np.array(whole["scores"].to_list()), atol=1e-3)
    assert (set(pl.read_parquet(folder/"scores.parquet")["model"]) == {*trained}
            and {p.name for p in folder.rglob(".*")} == {".part.json"})
