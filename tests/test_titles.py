"Titles one by one: what a place may see, the loss by hand, one score an item, towers, and no word that matters."
import json, shutil

import numpy as np
import polars as pl
import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from ganprompt import backbones, titles as T
from ganprompt.backbones import pocket_model, t5_tokenizer
from ganprompt.baselines import COUNTED
from ganprompt.data import DataSettings, load_candidates, load_sequences, load_training, make_data
from ganprompt.encoder import reader_for
from ganprompt.files import UserError, run_folder
from ganprompt.idmodels import mean_figures
from ganprompt.prompts import PromptsSettings, load_titles, make_prompts
from ganprompt.robustness import score_bank, test_lists as lists_of_test
from ganprompt.runs import replacing
from ganprompt.scorer import Questions, bank_for, load_recommender, own_attributes
from ganprompt.study import StudySettings, make_study
from ganprompt.titles import TitlesSettings, make_titles

FEW = dict(titles_epochs=3, titles_batch=16, titles_patience=3)


def encoder(folder, titles, kind="t5"):
    "An untrained language model that knows the words of some titles."
    torch.manual_seed(0)
    tokenizer = t5_tokenizer(titles, [], 1)
    pocket_model(kind, tokenizer, 32, 1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def ranks(run): return pl.read_parquet(run_folder(run)/"titles/ranks.parquet")
def about(run): return json.loads((run_folder(run)/"titles/models.json").read_text())


@pytest.fixture(scope="module")
def small(shop, tmp_path_factory):
    "The data and titles of a small shop, and a model that reads them."
    home = tmp_path_factory.mktemp("titles")
    make_data(DataSettings(str(home/"run"), str(shop), core=2))
    make_prompts(PromptsSettings(str(home/"run")))
    return str(home/"run"), encoder(home/"lm", load_titles(str(home/"run")))


@pytest.mark.parametrize("length", [1, 5, 9])
def test_a_place_sees_itself_and_what_stands_before_it(length):
    torch.manual_seed(0)
    net, x, lengths = T.causal_model(9).eval(), torch.randn(1, length, T.WIDTH), torch.tensor([length])
    for at in range(length):
        other = x.clone()
        other[:, at] = torch.randn(T.WIDTH)
        moved = (net(other, lengths) - net(x, lengths)).abs().amax(2)[0]
        assert moved[:at].sum() == 0 and (moved[at:] > 1e-4).all()


def test_a_history_among_longer_ones_is_read_as_alone():
    "Padding changes nothing, and the newest item stands at the last place however long the history is."
    torch.manual_seed(0)
    net, vectors = T.causal_model(6).eval(), torch.randn(20, T.WIDTH + 1)
    histories, all_items = [[3], [1, 2, 5, 7, 9, 11], [4, 4, 0]], [np.arange(20)]
    together = T.listed_scores(net, vectors, histories, all_items*3)
    for history, z in zip(histories, together):
        assert np.allclose(T.listed_scores(net, vectors, [history], all_items)[0], z, atol=1e-5)
    cut = T.listed_scores(net, vectors, [[8, 8, *histories[1]]], all_items)[0] # only the last six are read
    assert np.allclose(cut, together[1], atol=1e-5)
    net.place.weight.data[:-1] += 1 + torch.randn(5, T.WIDTH)
    assert np.allclose(T.listed_scores(net, vectors, [[3]], all_items)[0], together[0], atol=1e-5)


def test_the_loss_by_hand():
    torch.manual_seed(0)
    net = T.new_net(7, 4, torch.randn(7, 5), True, 0.).eval()
    net.items.often.data, net.causal.sure.data = torch.arange(7)/5, torch.tensor(7.5).log()
    histories, nexts = [[1, 2, 6], [0], [3, 3]], [5, 2, 0]
    seen = torch.tensor([[1, 2, 6], [0, 0, 0], [3, 3, 0]])
    found = T.next_item_loss(net, seen, torch.tensor([3, 1, 2]), torch.tensor(nexts)).item()
    text, linear, table = (x.detach().numpy() for x in (net.items.text, net.items.linear, net.items.table))
    v, losses, often = text @ linear + table, [], np.arange(7)/5
    for history, last in zip(histories, nexts):
        states = net.causal(torch.tensor(v[history])[None], torch.tensor([len(history)]))[0].detach().numpy()
        for h, item in zip(states[:, :-1], [*history[1:], last]):
            assert np.linalg.norm(h) == pytest.approx(7.5, rel=1e-5)
            cosine = v @ h/np.linalg.norm(v, axis=1)/np.linalg.norm(h)
            p = np.exp(7.5*cosine + often)/np.exp(7.5*cosine + often).sum()
            losses.append(-np.log(p[item]))
    assert len(losses) == 6 and found == pytest.approx(np.mean(losses), rel=1e-5)


def test_principal_directions():
    "PCA's, brought to length 1; no shift, turn or scale changes a cosine, and the first are the same without the rest."
    from sklearn.decomposition import PCA
    rng = np.random.default_rng(0)
    x = rng.normal(size=(60, 6))*[9, 5, 3, 2, 1, .5] + 4
    found, theirs = T.principal_vectors(x), PCA(6).fit_transform(x)
    assert np.allclose(np.abs(found), np.abs(theirs)/np.linalg.norm(theirs, axis=1, keepdims=True), atol=1e-5)
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    again = T.principal_vectors(3*x @ turn - 7)
    assert np.allclose(again @ again.T, found @ found.T, atol=1e-5)
    three = theirs[:, :3]/np.linalg.norm(theirs[:, :3], axis=1, keepdims=True)
    assert np.allclose(np.abs(T.principal_vectors(x, 3)), np.abs(three), atol=1e-5)
    assert T.principal_vectors(np.c_[x, x]).shape == (60, 6) # nothing is made of directions that are not there


@pytest.mark.parametrize("kind", ["t5", "bert", "causal"])
def test_each_title_is_read_alone(kind, tmp_path):
    some = ["rose soap", "oat", "rose and oat soap for dry skin", "soap"]
    folder = encoder(tmp_path, some, kind)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    head = {"t5": tf.T5EncoderModel, "bert": tf.BertModel, "causal": tf.LlamaModel}[kind].from_pretrained(folder).eval()
    found = T.title_vectors(folder, some)
    for title, vector in zip(some, found):
        with torch.no_grad(): states = head(torch.tensor([tokenizer(title).input_ids])).last_hidden_state[0]
        assert np.allclose(vector, states.mean(0).numpy(), atol=1e-5)
    assert len({tuple(v) for v in found.round(4)}) == 4


def test_weights_that_are_missing_are_told(tmp_path):
    from safetensors.torch import save_file
    folder = encoder(tmp_path, ["rose soap"], "bert")
    weights = load_file(tmp_path/"model.safetensors")
    save_file({k: w for k, w in weights.items() if "layer.0" not in k}, tmp_path/"model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="no weights for .*layer.0"): T.title_vectors(folder, ["rose"])


def test_titles_beat_popularity_on_the_demo(tmp_path):
    "Words tell there what a shopper likes; even an untrained model that reads them does, and ids take longer."
    run = str(tmp_path/"demo")
    make_data(DataSettings(run)); make_prompts(PromptsSettings(run))
    make_titles(TitlesSettings(run, vectors="text", title_encoder=encoder(tmp_path/"lm", load_titles(run)),
                               titles_epochs=20, titles_batch=32, titles_lr=.003))
    bought, (_, lists) = load_training(run), load_candidates(run, "uni99")
    popular = COUNTED["popularity"](bought, len(load_titles(run)))
    hits = np.mean([sum(popular(None, x) >= popular(None, x[:1])) <= 10 for x in lists])
    found = mean_figures(ranks(run))["Sequence (titles)"]
    assert found["hit@10"] > hits + .05 and .7 < found["auc"] < 1
    said = about(run)["Sequence (titles)"]
    assert set(ranks(run)["candidates"]) == {"uni99", "full"} and said["family"] == "text" and said["pocket"]


def test_killed_and_resumed_is_as_uninterrupted(small, tmp_path, monkeypatch):
    run, lm = small
    asked = dict(vectors="both,id", title_encoder=lm, **FEW)
    monkeypatch.setattr(backbones, "EVERY", 0)
    for name in "whole", "killed": shutil.copytree(run, tmp_path/name)
    make_titles(TitlesSettings(str(tmp_path/"whole"), **asked))
    loss, left = T.next_item_loss, [7, 9]
    def killed(*args):
        if left and (left.__setitem__(0, left[0] - 1) or left[0] < 0): left.pop(0); raise KeyboardInterrupt
        return loss(*args)
    monkeypatch.setattr(T, "next_item_loss", killed)
    for _ in range(2):
        torch.manual_seed(5)
        with pytest.raises(KeyboardInterrupt): make_titles(TitlesSettings(str(tmp_path/"killed"), **asked))
        assert list((tmp_path/"killed/titles.partial").rglob("checkpoint.pt"))
    make_titles(TitlesSettings(str(tmp_path/"killed"), **asked))
    for name in "both", "id":
        one, other = (load_file(tmp_path/r/f"titles/{name}/model.safetensors") for r in ("whole", "killed"))
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert ranks(tmp_path/"whole").equals(ranks(tmp_path/"killed"))


def test_titles_are_read_once_and_ids_read_none(small, tmp_path, monkeypatch):
    run, lm = small
    calls, read = [], T.title_vectors
    monkeypatch.setattr(T, "title_vectors", lambda *args: calls.append(1) or read(*args))
    shutil.copytree(run, tmp_path/"run")
    make_titles(TitlesSettings(str(tmp_path/"run"), vectors="id", title_encoder=lm, **FEW))
    assert not calls
    make_titles(TitlesSettings(str(tmp_path/"run"), vectors="id,text,both,towers", title_encoder=lm, **FEW))
    assert calls == [1] and set(about(tmp_path/"run")) == set(T.VECTORS.values())
    assert not [m for m in about(tmp_path/"run").values() if "failed" in m]


def test_names_of_items_mean_nothing_to_titles(small, tmp_path):
    "All items numbered anew, with their titles, have the scores they had."
    run, _ = small
    n = len(load_titles(run))
    text, order = torch.randn(n, 8), np.random.default_rng(0).permutation(n)
    torch.manual_seed(0)
    net = T.new_net(n, 5, text, False, 0.).eval()
    net.items.often.data = torch.randn(n)
    before = T.listed_scores(net.causal, net.items().detach(), [[0, 3, 2]], [np.arange(n)])[0]
    net.items.text, net.items.often.data = text[np.argsort(order)], net.items.often.data[np.argsort(order)]
    after = T.listed_scores(net.causal, net.items().detach(), [order[[0, 3, 2]].tolist()], [order])[0]
    assert np.allclose(before, after, atol=1e-5)


def test_an_item_has_one_score(small):
    torch.manual_seed(0)
    net, vectors = T.causal_model(5).eval(), torch.randn(30, T.WIDTH + 1)
    rng, histories = np.random.default_rng(0), [[1, 2], [3], [9, 8, 7]]
    whole = T.listed_scores(net, vectors, histories, [np.arange(30)]*3)
    lists = [rng.permutation(30)[:k] for k in (30, 7, 2)]
    for z, items, found in zip(whole, lists, T.listed_scores(net, vectors, histories, lists)):
        assert np.array_equal(z[items], found) and np.exp(z).mean() == pytest.approx(1, abs=1e-5)


def test_templates_do_not_change_its_answers(finished, tmp_path):
    "Under the whole bank, from a saved folder as any recommender; in the study its ranks do not move."
    shutil.copytree(finished, run := tmp_path/"run")
    make_titles(TitlesSettings(str(run), vectors="text", **FEW))
    reader, (rows, lists) = reader_for(str(run))[0], lists_of_test(str(run), 8)
    model, bank = load_recommender(run/"titles/text", reader), bank_for(reader)
    scores = score_bank(model, own_attributes(str(run)), bank, rows, lists)
    assert len(scores) > 50 and np.array_equal(scores, np.broadcast_to(scores[0], scores.shape), equal_nan=True)
    kept = ranks(run).filter(pl.col("candidates") == "uni99", pl.col("user").is_in(rows["user"].implode()))
    assert [(row >= row[0]).sum() for row in scores[0]] == kept["rank"].to_list()
    late = load_sequences(str(run), "test")[:3]
    z = model.scores(Questions(reader, {}, late), np.array([2, 0]), [[0, 1], [1], [2, 3, 4]])
    assert [len(x) for x in z] == [3, 2] and z[1][0] == pytest.approx(model.ranked(late[:1], [np.array([0])])[0][0],
                                                                           abs=1e-5)
    make_study(StudySettings(str(run), study_entries="titles alone", study_users=6, recommender_epochs=1))
    (e,) = json.loads((run/"study/study.json").read_text())["entries"].values()
    assert e["measured"]["unseen"]["tau"] == 1 and e["measured"]["unseen"]["flips"] == 0 and e["valid"] > .4


def test_towers_are_weighed_on_validation_users(small, tmp_path):
    "The best of all weights by a slow loop; one that knows nothing gets none; loaded and asked, the mean is theirs."
    rng = np.random.default_rng(0)
    good, noise = rng.normal(size=(300, 20)), rng.normal(size=(300, 20))
    good[:, 0] += 1.5
    other = rng.normal(size=(300, 20)); other[:, 0] += 1.2
    def value(w): return T.ndcg(list(w[0]*good + w[1]*noise + w[2]*other))
    grid = [(a/10, b/10, (10 - a - b)/10) for a in range(11) for b in range(11 - a)]
    found = T.best_weights([list(good), list(noise), list(other)])
    assert value(found) == max(map(value, grid)) and len(grid) == 66 and found[1] <= .1 < found[2]
    assert value(found) > max(T.ndcg(list(good)), T.ndcg(list(other)))
    run, lm = small
    shutil.copytree(run, tmp_path/"run")
    make_titles(TitlesSettings(str(tmp_path/"run"), vectors="towers,id,text", title_encoder=lm, **FEW))
    rows, lists = load_sequences(run, "test")[:5], [np.arange(9)]*5
    each = {name: load_recommender(tmp_path/"run/titles"/name, None) for name in ("text", "id", "towers")}
    assert list(each["towers"].towers) == ["id", "text"] and each["towers"].weights.sum() == pytest.approx(1)
    wanted = sum(w*np.array(each[name].ranked(rows, lists)) for name, w in zip(["id", "text"], each["towers"].weights))
    np.testing.assert_allclose(each["towers"].ranked(rows, lists), wanted, atol=1e-5)
    said = about(tmp_path/"run")
    assert said["Sequence (towers)"]["valid"] >= max(said[m]["valid"] for m in T.VECTORS.values() if m in said) - 1e-9
    assert said["Sequence (towers)"]["parameters"] == sum(said[T.VECTORS[n]]["parameters"] for n in ("id", "text"))


def test_without_titles_only_ids_can_be_learned(small, shop, tmp_path):
    pl.read_csv(shop).drop("title").write_csv(tmp_path/"bare.csv")
    run = str(tmp_path/"run")
    make_data(DataSettings(run, str(tmp_path/"bare.csv"), core=2))
    with pytest.raises(UserError, match="no complete stage 'prompts'"):
        make_titles(TitlesSettings(run, vectors="text,id", title_encoder=small[1], **FEW))
    make_titles(TitlesSettings(run, vectors="id", **FEW))
    assert 0 < about(run)["Sequence (ids)"]["valid"] < 1 and about(run)["Sequence (ids)"]["family"] == "id"


@pytest.mark.parametrize("bad, said", [(dict(vectors="text,ids"), "vectors='ids'.*did you mean 'id'"),
                                       (dict(vectors="text,towers"), "towers is the mean of the others"),
                                       (dict(titles_dropout=1.), "titles_dropout=1.0 cannot be"),
                                       (dict(titles_epochs=0), "titles_epochs=0 cannot be"),
                                       (dict(title_encoder="no/such-model"), "'no/such-model' is neither a folder")])
def test_what_cannot_work_is_told_first(bad, said, small):
    with pytest.raises(UserError, match=said): make_titles(TitlesSettings(small[0], **bad))


def test_other_values_are_not_mixed(small, tmp_path):
    "A model made with another seed is another."
    run, lm = small
    shutil.copytree(run, tmp_path/"run")
    asked = dict(run=str(tmp_path/"run"), vectors="text", **FEW)
    make_titles(TitlesSettings(title_encoder=lm, **asked))
    before = load_file(tmp_path/"run/titles/text/model.safetensors")
    with pytest.raises(UserError, match="seed 0 -> 1"): make_titles(TitlesSettings(title_encoder=lm, seed=1, **asked))
    with replacing(True): make_titles(TitlesSettings(title_encoder=lm, seed=1, **asked))
    after = load_file(tmp_path/"run/titles/text/model.safetensors")
    assert not torch.equal(before["items"], after["items"])
    assert "title_encoder" not in json.loads((tmp_path/"run/titles/text/model.json").read_text())


def test_hits_by_frequency_count_ranks_up_to_ten():
    "Targets bought once and ninety times; rank 10 is a hit, rank 11 is none."
    ranks = pl.DataFrame(dict(model=["m"]*6, user=range(6), rank=[10, 11, 11, 1, 10, 11]))
    found = T.by_frequency(np.array([1, 1, 1, 90, 90, 90]), ranks, groups=2)
    assert found["bought"].to_list() == ["1 to 1", "90 to 90"] and found["lists"].to_list() == [3, 3]
    np.testing.assert_allclose(found["HR@10"], [1/3, 2/3])


@pytest.mark.parametrize("share, fits", [(0., True), (.5, True), (1., False), (-.1, False)])
def test_no_number_may_be_dropped_or_nearly_all(share, fits):
    assert any("titles_dropout" in fault for fault in TitlesSettings("demo", titles_dropout=share).check()) is not fits
