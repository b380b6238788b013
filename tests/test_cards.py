"The card beside a recommender: its lines load the model, and its numbers are those of the manifests."
import json, re, shutil

import numpy as np
import polars as pl
import pytest
import yaml

from ganprompt import p5 # noqa: F401, whose kinds are among those that can be loaded
from ganprompt.baselines import card_ranks
from ganprompt.data import load_candidates, load_sequences
from ganprompt.metrics import MetricsSettings, make_metrics
from ganprompt.runs import manifest, stage
from ganprompt.scorer import Questions, own_attributes


def card(folder): return (folder/"README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["ganprompt", "no-stage-1"])
def test_a_model_is_loaded_by_the_cards_own_lines(name, finished):
    lines, space = re.search("(?s)```python\n(.*?)\n```", card(finished/"recommender"/name))[1], {}
    assert len(lines.splitlines()) == 3
    exec(lines, space)
    run, model = space["run"], space["model"]
    rows, lists = load_sequences(run, "test"), load_candidates(run, "uni99")[1]
    kept = pl.read_parquet(finished/"recommender/scores.parquet").filter(model=name)["scores"]
    asked = Questions(model.reader, own_attributes(run), rows, attributes=model.attributes)
    mine = model.scores(asked, np.arange(3), lists)
    for z, was in zip(mine, kept): np.testing.assert_allclose(z, was.to_list(), atol=1e-4)


def test_its_numbers_are_those_of_the_manifests(finished, tmp_path):
    run = shutil.copytree(finished, tmp_path/"run")
    about, folder = manifest(run, "recommender"), run/"recommender/ganprompt"
    said, counts = card(folder), manifest(run, "data")["metrics"]
    assert yaml.safe_load(said.split("---")[1])["tags"] == ["recommendation", "t5-decoder"]
    assert f"validation AUC: {about['metrics']['valid_auc ganprompt']:.3f}" in said and about["commit"] in said
    assert f"{counts['users']:,} users, {counts['items']:,} items, {counts['train']:,} training sequences" in said
    assert "`../../encoder/model`" in said and "`../../backbones/t5`" in card(run/"recommender/no-stage-1")
    assert "Nothing was measured on test users" in said and "A pocket model" in said and "test HR@10" not in said
    assert not [name for name in about["outputs"] if name.endswith("README.md")]

    before = {p: p.read_bytes() for p in folder.iterdir()}
    make_metrics(MetricsSettings(str(run), resamples=50))
    mean, low, high = json.loads((run/"metrics/table.json").read_text())["metrics"]["ganprompt"]["hit@10"]
    said = card(folder)
    assert f"test HR@10 (uni99): {mean:.3f}, 95 % interval over users {low:.3f} to {high:.3f}" in said
    assert "Nothing was measured" not in said and "One training." in said
    assert [p.name for p, was in before.items() if p.read_bytes() != was] == ["README.md"]


def test_settings_that_are_no_defaults_say_so(finished):
    "Those that the shop's run was given, and no others."
    said, asked = card(finished/"recommender/ganprompt"), manifest(finished, "recommender")["parameters"]
    from ganprompt.recommender import RecommenderSettings
    known = json.loads((finished/"recommender/ganprompt/model.json").read_text())
    other = {k for k in known if k in asked and asked[k] != getattr(RecommenderSettings(), k)}
    assert {m[1] for m in re.finditer(r"(\w+) [^ ,]+ \(default", said)} == other and "seed" in known


def test_ranks_of_a_stage_are_its_cards_test_figures(finished, tmp_path):
    "Two users, ranks 1 and 3 of five: by hand."
    run = shutil.copytree(finished, tmp_path/"run")
    folder = run/"collm/TALLRec"
    folder.mkdir(parents=True)
    (folder/"model.json").write_text(json.dumps({"kind": "TALLRec", "llm": "../llm", "seed": 7, "text": "{title_seq}"}))
    facts = dict(pocket=False, backbone="some/model", valid=.625, valid_metric="AUC of 9 users")
    (run/"collm/models.json").write_text(json.dumps({"TALLRec": facts}))
    ranks = pl.DataFrame(dict(model="TALLRec", candidates=["uni99", "uni99", "full"], user=[0, 1, 0], rank=[1, 3, 9],
                              ties=0, size=5))
    ranks.write_parquet(run/"collm/ranks.parquet")
    card_ranks(run/"collm", manifest(run, "recommender") | dict(stage="collm", metrics={}))
    said = card(folder)
    for line in ("validation: 0.625 (AUC of 9 users)", "test AUC (uni99): 0.750", "test HR@1 (uni99): 0.500",
                 "test HR@5 (uni99): 1.000", "language model | some/model", "seed 7 (default 0)",
                 "`{title_seq}`, with"):
        assert line in said, line
    assert "A pocket model" not in said and "run_folder(run)/'collm/TALLRec'" in said


def test_a_stage_writes_its_cards_as_it_ends(finished, tmp_path):
    "Of a stage whose settings nobody knows; a card is no output, and what nobody can load has none."
    run = shutil.copytree(finished, tmp_path/"run")
    def make(folder):
        for name, kind in ("mine", "P5 (titles)"), ("other", "nobody's"):
            (folder/name).mkdir()
            (folder/name/"model.json").write_text(json.dumps({"kind": kind, "encoder": "../x", "seed": 7, "text": ""}))
        (folder/"mine/README.md").write_text("what another library leaves, or an earlier try")
        return {"valid_auc P5 (titles)": .875}
    folder = stage(str(run), "toy", {"seed": 7}, make)
    said = card(folder/"mine")
    assert "validation AUC: 0.875" in said and "| settings | seed 7 |" in said and "prompts of its own" in said
    assert {*manifest(run, "toy")["outputs"]} == {"mine/model.json", "other/model.json"}
    assert not (folder/"other/README.md").exists() and "(run)/'toy/mine'" in said
