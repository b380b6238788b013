"The study of robustness: its losses, its stage, what is kept of it, and its tables."
import json

import numpy as np
import pytest
import torch
import yaml

from conftest import copy_run, make
from ganprompt import pictures, robustness as R, sensitivity, study as S
from ganprompt.files import UserError, root, write_json
from ganprompt.runs import manifest, stage
from ganprompt.models import load_model
from ganprompt.encoder import contrast, reader_for, separability
from ganprompt.scorer import Prompted, Questions, bank_for, load_recommender
from ganprompt.statistics import ends
from ganprompt.p5 import asker_for
from ganprompt.gather import GatherSettings, likeness, make_gather
from ganprompt.results import by_dataset
from ganprompt.sweep import plan_of, read_plan, studies, study_of


def test_the_contrast_is_that_of_looped_sums():
    a, b = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).double()
    twin = torch.zeros(5, 5, dtype=torch.bool); twin[1, 3] = twin[3, 1] = True
    s = [[float(np.dot(x, y)/np.linalg.norm(x)/np.linalg.norm(y)/.2) for y in b.numpy()] for x in a.numpy()]
    def row(i): return -np.log(np.exp(s[i][i])/sum(np.exp(s[i][j]) for j in range(5) if not twin[i, j]))
    def column(j): return -np.log(np.exp(s[j][j])/sum(np.exp(s[i][j]) for i in range(5) if not twin[i, j]))
    assert contrast(a, b, .2, twin).item() == pytest.approx(np.mean([row(i) + column(i) for i in range(5)])/2)


def test_likeness_by_hand():
    x = np.array([[[1., 0], [0, 1]], [[3, 0], [4, 3]]]) # the second history is nearer to the first one in other words
    assert likeness(x) == {"cosine": pytest.approx((1 + .6)/2), "found": .5}


def test_a_bank_needs_something_unseen_to_ask_with():
    "Recommendation templates alone count, and those that the run was trained on do not."
    seen, title = (dict(id="a", task="recommendation", split="seen"), dict(id="b", task="title", split="attack"))
    with pytest.raises(UserError, match="study_bank=x: bank.yaml has no unseen recommendation template"):
        S.unseen_in("bank.yaml", "x", [seen, title])
    S.unseen_in("bank.yaml", "x", [seen, seen | dict(id="c", split="attack")])


@pytest.fixture(scope="module")
def studied(finished, tmp_path_factory):
    "Two entries on the small shop, one of them with an encoder of its own."
    copy_run(finished, run := tmp_path_factory.mktemp("study")/"run", "recommender", "encoder")
    S.make_study(S.StudySettings(str(run), study_entries="one template,random templates,gathered amid nonsense",
                                 study_users=20, recommender_epochs=1))
    return run


def read(paths):
    "Entry -> what is kept of it."
    return {e["model"]: e for e in (S.read_entry(p, S.answers_of) for p in paths)}


def test_kept_ranks_are_those_of_the_report(studied, tmp_path):
    "The model that the study leaves, asked again by the command's own function."
    kept = read(paths := S.keep_study(str(studied), tmp_path/"kept"))
    for name in ("one template", "gathered amid nonsense"):
        said = json.loads(R.make_report(str(studied/"study"/S.slug(name)), str(studied), users=20,
                                        out=str(tmp_path/name)).with_suffix(".json").read_text())
        assert [t["id"] for t in kept[name]["by_template"]] == [t["id"] for t in said["by_template"]]
        np.testing.assert_allclose(S.table_of(kept[name])["hit@10"].mean(axis=1),
                                   [t["hit@10"] for t in said["by_template"]], atol=1e-9)
        assert kept[name]["measured"]["unseen"]["flips"] == pytest.approx(said["measured"]["unseen"]["flips"])
    assert kept["gathered amid nonsense"]["fingerprint"] == manifest(str(studied), "study")["fingerprint"]
    assert not any(str(studied.parent) in p.read_text() for p in paths)


def test_a_report_that_was_cut_short_asks_on(studied, monkeypatch):
    """Each template's scores are kept until the report is written, and used again by the same model for the same
    questions only."""
    model, asked = str(studied/"study/one-template"), []
    def counted(lm, questions, at, lists):
        asked.append(len(lists))
        if len(asked) == 4: raise KeyboardInterrupt
        return real(lm, questions, at, lists)
    real = Prompted.scores
    monkeypatch.setattr(Prompted, "scores", counted)
    home = studied/"robustness/one-template"
    def report(users=6): return R.make_report(model, str(studied), users=users)
    with pytest.raises(KeyboardInterrupt): report()
    assert len([*home.rglob("*.npy")]) == 3 and not (home/"report.html").exists()
    n = len(json.loads(report().with_suffix(".json").read_text())["by_template"])
    assert len(asked) == 4 + n - 3 + len(R.HISTORIES)
    assert not (home/".scores").exists() and (home/"report.html").exists()
    asked[:] = [0]*4; report(5)
    assert asked[4:] == [5]*(n + len(R.HISTORIES))


def test_another_bank_asks_the_same_recommender(studied, tmp_path, monkeypatch):
    """Trained again and asked under the fresh bank, and trained for the first bank and asked by the command's own
    function."""
    copy_run(studied, run := tmp_path/"run", "study")
    with pytest.raises(UserError, match="study_bank=none: there is no .*data/none.yaml"):
        S.make_study(S.StudySettings(str(run), study_bank="none"))
    monkeypatch.setattr(S, "bank_file", lambda p: seen)
    (seen := tmp_path/"seen.yaml").write_text('- {id: a, task: recommendation, group: own, split: seen, text: '
                                              '"{purchase_history} then {target_item} ?"}')
    with pytest.raises(UserError, match="seen.yaml has no unseen recommendation template"):
        S.make_study(S.StudySettings(str(run)))
    monkeypatch.undo()
    S.make_study(S.StudySettings(str(run), study_entries="one template", study_users=20, recommender_epochs=1,
                 study_bank="templates-fresh"))
    (kept,) = read(S.keep_study(str(run), tmp_path/"kept")).values()
    said = json.loads(R.make_report(str(studied/"study/one-template"), str(studied),
                                    str(root()/"data/templates-fresh.yaml"), users=20,
                                    out=str(tmp_path/"out")).with_suffix(".json").read_text())
    assert ([t["id"] for t in kept["by_template"]] == [t["id"] for t in said["by_template"]]
            and kept["by_template"][1]["id"] == "fresh-para-1")
    np.testing.assert_allclose(S.table_of(kept)["hit@10"].mean(axis=1), [t["hit@10"] for t in said["by_template"]],
                               atol=1e-9)


@pytest.mark.parametrize("how", [{}, dict(gather_same=1., gather_wordings=4, gather_nonsense=0)])
def test_gathering_moves_the_encoder_and_tells_histories_apart(how, finished, tmp_path):
    copy_run(finished, run := tmp_path/"run", "recommender", "encoder")
    folder = make_gather(GatherSettings(str(run), gather_batch=16, gather_epochs=3, **how))
    merit, curves = (json.loads((folder/"manifest.json").read_text())["metrics"],
                     S.pl.read_parquet(folder/"curves.parquet"))
    assert (((curves["same"] > 0) == bool(how)).all()
            and (curves["loss"] - curves["lm"] - curves["next"] - curves["same"]).abs().max() < 1e-4)
    assert merit["after"]["found"] > merit["before"]["found"] and merit["after"]["cosine"] > .5


def test_an_entry_that_fails_does_not_stop_the_rest_and_whole_ones_are_kept(studied, tmp_path, monkeypatch):
    copy_run(studied, run := tmp_path/"run", "study")
    calls, one = [], {e: json.loads((studied/"study/study.json").read_text())["entries"][e]
                      for e in ("one template", "gathered amid nonsense")}
    tables = S.pl.read_parquet(studied/"study/ranks.parquet")
    def fake(run, name, folder, p):
        calls.append(name)
        if name == "random templates": raise UserError("no templates to draw from")
        if name == "gathered amid nonsense" and calls.count("gathered amid nonsense") == 1: raise KeyboardInterrupt
        return {k: v for k, v in one[name].items() if k != "settings"}, tables.filter(entry=name).drop("entry")
    monkeypatch.setattr(S, "run_entry", fake)
    asked = S.StudySettings(str(run), study_entries="one template,random templates,gathered amid nonsense",
                            study_users=20)
    with pytest.raises(KeyboardInterrupt):
        S.make_study(asked)
    S.make_study(asked)
    assert calls == ["one template", "random templates", "gathered amid nonsense", "random templates",
                     "gathered amid nonsense"]
    assert (json.loads((run/"study/study.json").read_text())["entries"]["random templates"]
            == {"failed": "no templates to draw from"})
    assert ({p.name for p in S.keep_study(str(run), tmp_path/"kept")}
            == {"one-template-0.json", "gathered-amid-nonsense-0.json"})


def test_pages_and_pictures_come_from_kept_entries(studied, tmp_path):
    S.keep_study(str(studied), tmp_path/"kept")
    made = S.draw_study(tmp_path/"kept", tmp_path/"out")
    assert ({p.suffix for p in made} == {".md", ".html", ".tex", ".csv", ".png", ".pdf"}
            and all(p.stat().st_size > 500 for p in made))
    text = next(p for p in made if p.suffix == ".md").read_text()
    assert [p.stem.rsplit("_", 1)[1] for p in made if p.suffix == ".png"][-1] == "figure1" and "_figure1.png" in text
    assert "pocket models" in text and ("over users and templates, for one training: they say nothing of the "
                                        "method") in text and ("The control of gathered amid nonsense, gathered in one "
                                                               "wording, is not among these "
                                                               "entries") in text and ("Difference to random "
                                                                                       "templates") in text
    before = {p: p.read_bytes() for p in made}
    assert {p: p.read_bytes() for p in S.draw_study(tmp_path/"kept", tmp_path/"out")} == before


def test_figure_1_with_titles_says_what_the_run_answered(studied, tmp_path, monkeypatch):
    "From the stage's own table: whose history it is, what was bought, the heads and ranks of both entries."
    monkeypatch.setattr(pictures, "dataset_info", lambda run: dict(dataset="shop", synthetic=True))
    (path,) = pictures.keep_figure1(str(studied), tmp_path/"figure1")
    facts, titles = json.loads(path.read_text()), reader_for(str(studied))[0].titles
    (rows, lists), user = R.test_lists(str(studied), 20), facts["user"]
    assert facts["history"] == [titles[i] for i in rows["history"][user]]
    assert facts["bought"] == titles[lists[user][0]] and facts["names"] == list(S.BEFORE_AFTER)
    answers = S.pl.read_parquet(studied/"study/ranks.parquet")
    for at, name in enumerate(facts["names"]):
        mine = answers.filter(entry=name)
        clean, *others = (part for _, part in mine.group_by("template", maintain_order=True))
        attack = next(part for part in others if part["group"][0] == "attack" and part["split"][0] != "seen")
        first, last = facts["rows"][0], next(row for row in facts["rows"] if row["group"] == "attack")
        for row, part in ((first, clean), (last, attack)):
            assert row["heads"][at] == [[titles[lists[user][c]], c == 0] for c in part["head"][user]]
        assert (first["ranks"][at], last["ranks"][at]) == (rank := clean["rank_shift"][user],
                                                           rank + attack["rank_shift"][user])
    made = pictures.draw_answers(tmp_path/"figure1", tmp_path)
    assert [p.name for p in made] == [f"figure1_{facts['dataset']}.png", f"figure1_{facts['dataset']}.pdf"]


def test_entries_that_cannot_be_compared_are_refused(studied, tmp_path):
    paths = S.keep_study(str(studied), tmp_path/"kept")
    other = json.loads(paths[0].read_text())
    paths[0].write_text(json.dumps(other | {"users_digest": "x"}))
    with pytest.raises(UserError, match="other users, data, recommenders or templates"):
        S.read_study_entries(tmp_path/"kept")
    paths[0].write_text(json.dumps(other | {"backbone": "x"}))
    with pytest.raises(UserError, match="seed 0: kept entries started from different backbones"):
        S.read_study_entries(tmp_path/"kept")
    paths[0].write_text(json.dumps(other | {"users": 3}))
    with pytest.raises(UserError, match="is damaged"): S.read_study_entries(tmp_path/"kept")
    with pytest.raises(UserError, match="keep some first"): S.read_study_entries(tmp_path/"none")


def answers(seed=0, templates=4, lists=70, candidates=20):
    "Scores full of ties, in lists of many lengths, and their bank."
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(templates, lists, candidates)).round(1)
    z[:, np.arange(candidates) >= rng.integers(3, candidates + 1, lists)[:, None]] = np.nan
    return z, [dict(id=f"t{i}", group="toy", split="attack" if i else "seen") for i in range(templates)]


ABOUT = dict(model="x", dataset="toy", seed=0, users=70, measured={"clean": {}})


@pytest.mark.parametrize("users", [range(70), np.arange(70)//2])
def test_answers_come_back_as_they_were(users, tmp_path):
    z, bank = answers()
    z[3] = z[3, :, :1] # a constant answerer: no order, so no tau
    e = S.read_entry(S.write_entry(tmp_path/"s/toy/x-0.json", ABOUT, S.answers_table(z, bank, users)), S.answers_of)
    for t in range(4):
        want = S.ranking(S.unpadded(z[t]))
        for c, x in zip(S.Ranks._fields, e["ranks"]): np.testing.assert_array_equal(x[t], want[c])
        assert {k: e["by_template"][t][k] for k in ("id", "group", "split")} == bank[t]
    np.testing.assert_array_equal(e["odds"], z[:, :60, 0])
    np.testing.assert_array_equal(e["heads"], [S.first_places(x[:60]) for x in z])
    table = sensitivity.template_table(z, bank)
    for k in ("flips", "tau", "rbo"):
        np.testing.assert_allclose([t[k] for t in e["by_template"]], table[k].to_numpy(), rtol=1e-6)
    assert e.get("owners", users) is users or e["owners"].tolist() == users.tolist()
    assert S.table_of(e)["hit@10"].shape == (4, len(set(users)))


def test_of_few_users_all_is_kept_and_of_old_entries_no_heads(tmp_path):
    z, bank = answers(lists=5)
    table = S.answers_table(z, bank, range(5)).drop("head")
    e = S.read_entry(S.write_entry(tmp_path/"s/toy/x-0.json", ABOUT | {"users": 5}, table), S.answers_of)
    np.testing.assert_array_equal(e["odds"], z[:, :, 0])
    assert "heads" not in e and S.plot_figure1([e]) is None


@pytest.mark.parametrize("change", [{"users": 35}, {"users": 3}, {"users": 0}, {"users": "70"}, {"seed": None},
                                    {"measured": {}}, {"constant": {"size": 2}}])
def test_answers_that_do_not_fit_their_entry_are_refused(change, tmp_path):
    z, bank = answers(candidates=3)
    path = S.write_entry(tmp_path/"s/toy/x-0.json", ABOUT, S.answers_table(z, bank, range(70)))
    assert S.read_entry(path, S.answers_of)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match="x-0.json is damaged .* ganprompt keep RUN --study s"):
        S.read_entry(path, S.answers_of)


def test_what_is_answered_is_kept_and_drawn(shop, tmp_path, monkeypatch):
    "The stage with scores drawn at random in place of models: from the answers to the pages."
    make(run := tmp_path/"shop-0", "data", shop)
    for name in ("prompts", "backbones", "attributes"):
        stage(run, name, dict(seed=0), lambda to: write_json(to/"x.json", {}), inputs=["data"])
    z, bank = answers(candidates=12)
    scores = {"random templates": z, "one template": -z, "gathered amid nonsense": z**2}
    others = {"attributes": z + z**2}
    rows = S.pl.DataFrame({"user": range(70)})
    asked = []
    def tuned(run, name, *rest):
        asked.append(name)
        if name == "agreement": raise UserError("no room")
        return name, .5, {}
    known = dict(tuned_model=tuned, score_bank=lambda model, *rest: (scores | others)[model],
                 test_lists=lambda *p: (rows, None), bank_for=lambda *p: bank, reader_for=lambda run: (None, None),
                 backbone=lambda *p: {"pocket": True, "name": "some/encoder"},
                 dataset_info=lambda run: {"dataset": "shop", "synthetic": False})
    for name, what in known.items(): monkeypatch.setattr(S, name, what)
    for name in ("own_attributes", "unseen_in", "need"): monkeypatch.setattr(S, name, lambda *p: None)
    S.make_study(S.StudySettings(str(run), study_entries=",".join([*scores, "agreement"]), recommender_epochs=1))
    paths = S.keep_study(str(run), tmp_path/"robustness")
    assert all(json.loads(path.read_text())["reads"] == ["some/encoder"] for path in paths)
    kept = read(paths)
    assert list(kept) == list(scores) and (run/"study/ranks.parquet").is_file()
    assert [p.name for p in (run/"study").glob(".*")] == [".entries"] and not list((run/"study").rglob(".scores"))
    for name, e in kept.items():
        for found, x in zip(e["ranks"].rank, scores[name]):
            np.testing.assert_array_equal(found, S.ranking(S.unpadded(x))["rank"])
        assert e["measured"]["unseen"] == sensitivity.measure_bank(scores[name], bank)["unseen"]
        assert set(e["measured"]["attack"]) == {"flips", "tau", "rbo", "posix", "templates"}
        assert e["users"] == 70 and e["stage_1"] == S.first_stage(e["settings"])
        assert e["backbone"] == manifest(str(run), "study")["inputs"]["backbones"]
    def contents(): return {p: p.read_bytes() for p in (tmp_path/"robustness").rglob("*.*")}
    before = contents()
    assert S.keep_study(str(run), tmp_path/"robustness") == paths and contents() == before
    assert all(p.stat().st_size > 500 for p in S.draw_study(tmp_path/"robustness", tmp_path/"out"))
    # one more entry: it is made, what failed is tried again, and the others are as they were
    asked.clear()
    S.make_study(S.StudySettings(str(run), study_entries="attributes," + ",".join([*scores, "agreement"]),
                                 recommender_epochs=1))
    assert asked == ["attributes", "agreement"]
    more = read(S.keep_study(str(run), tmp_path/"more"))
    assert sorted(more) == sorted([*scores, "attributes"]) and all(
        np.array_equal(more[name]["ranks"].rank, kept[name]["ranks"].rank) for name in scores)


def test_deaf_and_parrot_are_told_from_steady():
    "What the page says of a constant model, of one that has learned the seen template by heart, and of a robust one."
    rng, bank = np.random.default_rng(0), [dict(id=f"t{i}", group="toy", split="attack" if i else "seen")
                                           for i in range(13)]
    truth = rng.normal(size=(50, 100)) + 3*(np.arange(100) == 0)
    def entry(model, scores):
        found, ranks = sensitivity.measure_bank(scores, bank), [S.ranking(z) for z in scores]
        return dict(model=model, dataset="toy", synthetic=True, seed=0, users=50, recommender="none", pocket=False,
                    measured=found,
                    by_template=bank, ranks=S.Ranks(*(np.stack([r[c] for r in ranks]) for c in S.Ranks._fields)))
    noise = rng.normal(size=(13, 50, 100))
    mine = [entry("random templates", np.concatenate([truth[None], noise[1:]])),
            entry("deaf", np.full((13, 50, 100), -1.)), entry("steady", truth + .1*noise)]
    draws = S.drawn(mine)
    value = {s: {name: d[0].mean() for name, d in by.items()} for s, by in draws.items()}
    assert (value["clean"]["deaf"] == value["CPS"]["deaf"] == 0
            and value["clean"]["random templates"] == pytest.approx(value["clean"]["steady"], abs=.1))
    assert (value["CPS"]["steady"] > 3*value["CPS"]["random templates"]
            and ends(draws["q05"]["steady"] - draws["q05"]["random templates"])[1] > 0)


def test_figures_of_kept_entries_by_hand():
    "Each entry has its own seeds' tables, its costliest templates first, and its own separation."
    mine = by_dataset(S.read_study_entries("robustness-fresh"))["toys"]
    for name, (seeds, tables) in S.by_entry(mine).items():
        own = [e for e in mine if e["model"] == name]
        assert seeds == [e["seed"] for e in own] == sorted(seeds)
        hits = np.stack([S.table_of(e)["hit@10"] for e in own])
        np.testing.assert_array_equal(tables["hit@10"], hits)
        found = S.costliest(mine)[name]
        lost = {t["id"]: 1 - hits[:, i].mean()/hits[:, 0].mean()
                for i, t in enumerate(mine[0]["by_template"]) if t["split"] != "seen"}
        assert [x for _, x in found] == pytest.approx(sorted(lost.values(), reverse=True)[:5])
        assert all(lost[t] == pytest.approx(x) for t, x in found)
    order = list(S.read_entries()[1])
    assert [e["model"] for e in mine] == sorted((e["model"] for e in mine), key=order.index)
    trained = by_dataset(S.read_study_entries("ablation"))["toys"]
    for name, apart in S.separated(trained).items():
        each = [e["encoder"]["after"]["silhouette"] for e in trained if e["model"] == name]
        assert len(each) > 1 and apart["silhouette"] == pytest.approx(np.mean(each))


def test_room_for_each_entry():
    "Three times an encoder and seven times a recommender."
    def room(entries): return S.StudySettings(study_entries=entries).room({"encoder": "pocket"})
    assert room("one template,attributes") == 2*room("attributes") == 20*S.model_bytes("pocket")
    # weights and two moments in a checkpoint, the one before it, and the encoder
    assert GatherSettings().room({"encoder": "pocket"}) == (3 + 3 + 1)*S.model_bytes("pocket")


@pytest.mark.parametrize("plan", ["tables", "standard", "robustness", "robustness-fresh", "ablation", "real"])
def test_plans_name_what_there_is(plan):
    found = read_plan(str(root()/f"data/{plan}.yaml"))
    entries, readings = (list(S.read_entries(S.entries_file(plan))[1]),
                         list(yaml.safe_load((root()/"data/study.yaml").read_text())["readings"]))
    wanted = {"robustness": [e for e in entries if e not in readings], "real": entries,
              "ablation": ["attributes", "GANPrompt", "GANPrompt as printed", *readings]}
    assert found["parameters"].get("study_file") == (str(root()/"data/real.yaml") if plan == "real" else None)
    assert all(set(m.get("study", [])) <= set(entries) for m in found["datasets"].values())
    assert (S.bank_of(found).name
            == ("templates-fresh.yaml" if plan == "robustness-fresh" else "templates.yaml"))
    if plan in wanted:
        assert all(m["study"] == wanted[plan] and set(S.PAGES[plan][1]) <= set(entries)
                   for m in found["datasets"].values())


def test_another_run_of_a_study_has_its_pages():
    kinds = {name: study_of(name)[2] for name in ("robustness", "robustness-mine", "./ablation-2", "tables",
                                                  "robustnesses")}
    assert [*kinds.values()] == [studies()[kind] for kind in ("robustness", "robustness", "ablation", "tables", "")]
    assert kinds["robustness"].draw is S.draw_study is not kinds["tables"].draw
    assert ([plan_of(name).name for name in ("robustness-mine", "robustness-fresh", "tables")]
            == ["robustness.yaml", "robustness-fresh.yaml", "tables.yaml"])


def test_each_reading_changes_one_thing():
    encoders, entries = S.read_entries()
    readings = yaml.safe_load((root()/"data/study.yaml").read_text())["readings"]
    assert all(len(encoders[name]) == 1 and entries[name] == {"encoder": name, "tuned": True} for name in readings)


def test_readings_of_stage_1_are_measured_and_drawn(finished, tmp_path):
    copy_run(finished, run := tmp_path/"run", "recommender", "encoder")
    S.make_study(S.StudySettings(str(run), study_entries="attributes,GANPrompt,k 2", study_users=20,
                                 recommender_epochs=1))
    kept = read(S.keep_study(str(run), tmp_path/"ablation"))
    for name, path in ("GANPrompt", "spread"), ("k 2", "k-2"):
        states = S.pl.read_parquet(run/"study/encoders"/path/"states.parquet").filter(S.pl.col("stage") == "after")
        # plain, and one for each word: the shop has three
        assert states["version"].n_unique() == {"GANPrompt": 4, "k 2": 3}[name]
        x = np.array(states["x"].to_list()).reshape(-1, states["version"].n_unique(), len(states["x"][0]))
        assert (S.separated(list(kept.values()))[name]["silhouette"]
                == pytest.approx(separability(x)["silhouette"], abs=1e-6))
    assert kept["attributes"]["encoder"] == {}
    made = S.draw_study(tmp_path/"ablation", tmp_path/"out")
    text = next(p for p in made if p.suffix == ".md").read_text()
    assert ("Difference to GANPrompt" in text and "how far apart" in text
            and {p.name.split("_")[0] for p in made} == {"ablation"})


def test_p5_and_tallrec_rank_as_a_plain_forward_pass_does(finished, tmp_path):
    "Under the clean template and an unseen one: no kept states, no shared prefix, one candidate at a time."
    copy_run(finished, run := tmp_path/"run", "recommender", "encoder")
    S.make_study(S.StudySettings(str(run), study_entries="P5,TALLRec", study_users=10, recommender_epochs=1))
    kept, (rows, lists) = read(S.keep_study(str(run), tmp_path/"kept")), R.test_lists(str(run), 10)
    run_reader = reader_for(str(run))[0]
    p5, tallrec = load_model(str(run/"study/p5"), "t5"), load_recommender(run/"study/tallrec", run_reader)
    def of_p5(prompt, item):
        return -p5(input_ids=torch.tensor([prompt]), labels=torch.tensor([item])).loss.item()*len(item)
    def of_tallrec(prompt, tail):
        no, yes = tallrec.lm(input_ids=torch.tensor([prompt + tail])).logits[0, -1, tallrec.names].tolist()
        return yes - no
    readers = {"P5": run_reader, "TALLRec": tallrec.reader}
    texts = {"P5": asker_for(str(run), "titles", 0, readers["P5"].tokenizer, "{title_seq}").items,
             "TALLRec": tallrec.tails}
    bank = bank_for(readers["P5"])
    for name, score in ("P5", of_p5), ("TALLRec", of_tallrec):
        for at in 0, next(i for i, t in enumerate(bank) if t["id"] == "para-3"):
            asked = Questions(readers[name], {}, rows, bank[at]["text"], False)
            with torch.inference_mode():
                z = [np.array([score(asked.context(r), texts[name][i]) for i in lists[r]]) for r in range(3)]
            ranks = kept[name]["ranks"].rank[at, :3]
            assert [1 + int((row[1:] >= row[0]).sum()) for row in z] == ranks.tolist(), (name, at)
    odds = kept["P5"]["odds"]
    assert (odds > 0).any() and (odds < 0).any() # likelier than the mean candidate, or not


@pytest.mark.parametrize("change, message", [(lambda y: y["entries"]["GANPrompt"].update(wordngs=2),
                                              "unknown parameter 'wordngs'"),
                                              (lambda y: y["encoders"]["spread"].update(coupling_="none"),
                                               "unknown parameter 'coupling_'"),
                                             (lambda y: y["encoders"]["gathered amid nonsense"].update(k=2),
                                              "unknown parameter 'k'"),
                                              (lambda y: y["entries"]["GANPrompt"].update(encoder="gan"),
                                               "encoder must be one of backbone"),
                                             (lambda y: y["entries"]["P5"].update(recommender="P6"),
                                              "'P5': recommender must be one of .*P5 .titles."),
                                              (lambda y: y["entries"]["P5"].update(wordings=4),
                                               "unknown parameter 'wordings'")])
def test_mistakes_in_the_entries(change, message, tmp_path):
    found = yaml.safe_load((root()/"data/study.yaml").read_text())
    change(found)
    (tmp_path/"study.yaml").write_text(yaml.safe_dump(found))
    with pytest.raises(UserError, match=message): S.read_entries(tmp_path/"study.yaml")


@pytest.mark.parametrize("how,names", [
    ({}, ["some/encoder"]), ({"tuned": False}, ["some/encoder"]), ({"tuned": False, "llm": "some/lm"}, ["some/lm"]),
    ({"recommender": "causal-lm", "llm": "some/lm"}, ["some/encoder", "some/lm"]),
    ({"recommender": "TALLRec", "llm": "some/lm"}, ["some/lm"])])
def test_an_entry_names_the_models_that_it_is_made_of(how, names):
    assert S.models_read({"tuned": True} | how, "ranker", "some/encoder") == names
