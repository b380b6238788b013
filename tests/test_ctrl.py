"CTRL: the contrastive loss by loops, what the collaborative model may see, and what it must not read."
import itertools, re, shutil

import numpy as np
import polars as pl
import pytest
import torch

from ganprompt import backbones, ctrl
from ganprompt.data import load_candidates, load_sequences, load_training
from ganprompt.encoder import reader_for
from ganprompt.measures import ranking
from ganprompt.statistics import bootstrap
from ganprompt.prompts import load_titles, pad
from ganprompt.robustness import make_report
from ganprompt.scorer import Questions, own_attributes
from ganprompt.files import UserError

FEW = dict(ctrl_align_epochs=1, ctrl_epochs=3, ctrl_width=32, valid_users=40)


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory):
    "A copy of the small run, and its stage."
    run = tmp_path_factory.mktemp("ctrl")/"run"
    shutil.copytree(finished, run)
    return run, ctrl.make_ctrl(ctrl.CtrlSettings(str(run), **FEW))


def looped(a, b):
    "The similarity of section 4.2.2, one product at a time."
    n, spaces = a.shape[:2]
    return torch.tensor([[sum(max(float(a[i, m] @ b[j, k]) for k in range(spaces)) for m in range(spaces))
                          for j in range(len(b))] for i in range(n)])


def test_the_loss_is_that_of_looped_similarities():
    torch.manual_seed(0)
    text, ids = torch.randn(2, 5, 3, 4)
    assert torch.allclose(ctrl.max_sim(text, ids), looped(text, ids), atol=1e-5)
    own = torch.arange(5)
    wanted = sum(torch.nn.functional.cross_entropy(looped(*pair)/.7, own) for pair in ((text, ids), (ids, text)))/2
    assert torch.isclose(ctrl.info_nce(text, ids, .7), wanted, atol=1e-5)


def test_the_loss_by_hand():
    "Two samples, one space: similarities [[1, 0], [0, 1]] either way, so each term is log(1 + exp(-1/tau))."
    x = torch.eye(2).unsqueeze(1)
    assert torch.isclose(ctrl.info_nce(x, x, .5), torch.tensor(np.log1p(np.exp(-2.)), dtype=torch.float32))


def test_the_loss_of_purchases_by_loops():
    torch.manual_seed(0)
    model, pieces, others = ctrl.collaborative_model(12, 4, 8).eval(), [[3, 7, 0], [5, 2], [1, 9, 4, 6, 8]], [7, 11, 0]
    torch.nn.init.normal_(model["item"].weight); torch.nn.init.normal_(model["bias"].weight)
    yes, no = [], []
    for piece in pieces:
        for end in range(1, len(piece)):
            z = ctrl.item_scores(model, ctrl.last_states(model, [piece[:end]]))[0]
            yes.append(z[piece[end]]); no += [z[i] for i in others if i not in piece]
    def bce(z, y): return torch.nn.functional.binary_cross_entropy_with_logits(torch.stack(z), torch.full((len(z),), y))
    assert torch.isclose(ctrl.purchase_loss(model, *pad(pieces, 0), torch.tensor(others)),
                         (bce(yes, 1.) + bce(no, 0.))/2, atol=1e-5)


def test_every_purchase_but_the_first_is_foretold_once():
    rng, people, first = np.random.default_rng(0), [], 0
    for n in rng.integers(0, 40, size=50): people.append(list(range(first, first + n))); first += n
    for places in 1, 3, 10:
        pieces = ctrl.windows(people, places)
        assert sorted(i for p in pieces for i in p[1:]) == sorted(i for p in people for i in p[1:])
        assert all(2 <= len(p) <= places + 1 for p in pieces)


def test_a_place_does_not_see_what_comes_later():
    model = ctrl.collaborative_model(50, 10, 16).eval()
    items = torch.randint(50, (4, 10), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        h = ctrl.place_states(model, items)
        for cut in range(1, 10):
            other = items.clone(); other[:, cut:] = (other[:, cut:] + 7) % 50
            changed = ctrl.place_states(model, other)
            assert (torch.allclose(changed[:, :cut], h[:, :cut], atol=1e-5)
                    and not torch.allclose(changed[:, cut], h[:, cut], atol=1e-3))


def test_numbering_items_and_users_anew_changes_no_score(trained):
    "The weights of an item go with its number."
    run, folder = trained
    model, rows, rng = ctrl.load_ctrl(folder/"CTRL/model.safetensors"), load_sequences(str(run),
            "test"), np.random.default_rng(0)
    histories, n = rows["history"].to_list(), model["item"].num_embeddings
    items, users = rng.permutation(n), rng.permutation(len(rows))
    z = ctrl.catalogue_scores(model, histories)
    with torch.no_grad():
        for name in "item", "bias": model[name].weight.copy_(model[name].weight[np.argsort(items)].clone())
    moved = ctrl.catalogue_scores(model, [[int(items[i]) for i in histories[u]] for u in users])
    assert np.allclose(moved[:, items], z[users], atol=1e-5)


def test_scores_need_no_titles(trained, tmp_path):
    run, folder = trained
    shutil.copytree(run, tmp_path/"run")
    path = tmp_path/"run/prompts/titles.parquet"
    pl.read_parquet(path).with_columns(title=pl.lit("nothing")).write_parquet(path)
    assert set(load_titles(str(tmp_path/"run"))) == {"nothing"}
    def scores(run):
        rows, lists = load_sequences(str(run), "test"), load_candidates(str(run), "uni99")[1]
        return np.concatenate(ctrl.catalogue_lists(ctrl.load_ctrl(folder/"CTRL/model.safetensors"), rows[:20], lists))
    assert scores(run).tobytes() == scores(tmp_path/"run").tobytes()
    shutil.rmtree(tmp_path/"run/prompts"); shutil.rmtree(tmp_path/"run/backbones")
    assert scores(run).tobytes() == scores(tmp_path/"run").tobytes()


def test_what_is_held_out_enters_no_training(trained, tmp_path):
    """Another item bought last, in all files that know of it: the pieces, the samples and their prompts are the same
    to the byte."""
    run, other = trained[0], tmp_path/"run"
    shutil.copytree(run, other)
    def another(column): return (pl.col(column) + 1) % pl.col(column).max()
    held = pl.col("split").is_in(["valid", "test"])
    for file, column in ("interactions", "item"), ("sequences", "target"):
        path = other/f"data/{file}.parquet"
        before = pl.read_parquet(path)
        after = before.with_columns(pl.when(held).then(another(column)).otherwise(pl.col(column)).alias(column))
        assert not after.equals(before)
        after.write_parquet(path)
    def seen(run):
        rows = load_sequences(str(run), "train")
        histories, items = rows["history"].to_list(), rows["target"].to_list()
        reader = reader_for(str(run))[0]
        prompt = reader.encoder(reader.templates["recommendation"])
        return repr([ctrl.windows(load_training(str(run)), 10), histories, items,
                     [prompt.ids(h, i) for h, i in zip(histories, items)]]).encode()
    assert seen(run) == seen(other)


def test_alignment_trains_both_models_and_reaches_unseen_samples(trained):
    run, folder = trained
    reader, path = reader_for(str(run))
    p = ctrl.CtrlSettings(seed=0, ctrl_align_epochs=5, ctrl_align_lr=3e-3, ctrl_temperature=.4, ctrl_width=32)
    aligner = ctrl.Aligner(ctrl.new_model(str(run), p), reader, path, 4)
    before = {n: w.clone() for n, w in aligner.trained.named_parameters()}
    valid = load_sequences(str(run), "valid")
    def own_first(): # share of other samples that suit a text less well than its own; none of these is trained on
        s = ctrl.similarities(aligner, valid)
        return (s < s.diagonal()[:, None]).sum()/(s.size - len(s))
    blind = own_first()
    ctrl.train_aligner(aligner, load_sequences(str(run), "train"), folder, p)
    (folder/"checkpoint.pt").unlink(missing_ok=True)
    still = {n for n, w in aligner.trained.named_parameters() if torch.equal(w, before[n])}
    assert still == {"model.bias.weight"} # step 1 does not use it
    assert abs(blind - .5) < .1 and own_first() > .65


def test_ranks_are_those_of_the_saved_model(trained):
    run, folder = trained
    ranks = pl.read_parquet(folder/"ranks.parquet")
    for name, kind in itertools.product(ctrl.CTRL_MODELS, ("uni99", "full")):
        kept, (users, lists) = ranks.filter(model=name, candidates=kind), load_candidates(str(run), kind)
        z = ctrl.catalogue_scores(ctrl.load_ctrl(folder/name/"model.safetensors"),
                                  load_sequences(str(run), "test")["history"].to_list())
        assert kept["user"].to_list() == list(users) and kept["size"].to_list() == [len(items) for items in lists]
        assert kept["rank"].to_list() == [1 + int((row[items[1:]] >= row[items[0]]).sum())
                                          for row, items in zip(z, lists)]


@pytest.mark.parametrize("name", ctrl.CTRL_MODELS)
def test_its_card_loads_it_and_no_wording_reaches_it(name, trained, tmp_path):
    run, folder = trained
    card, space = (folder/name/"README.md").read_text(), {}
    exec(re.search("(?s)```python\n(.*?)\n```", card)[1], space)
    rows, lists = load_sequences(str(run), "test"), load_candidates(str(run), "uni99")[1]
    said = space["model"].scores(Questions(space["model"].reader, own_attributes(str(run)), rows), np.arange(5), lists)
    z = ctrl.catalogue_scores(ctrl.load_ctrl(folder/name/"model.safetensors"), rows["history"].to_list()[:5])
    for mine, row, items in zip(said, z, lists): np.testing.assert_array_equal(mine, row[items])
    assert "none; it reads no template" in card and ("ctrl_temperature" in card) == (name == "CTRL")
    page = make_report(str(folder/name), users=6, out=str(tmp_path/"report"))
    for answers in pl.read_parquet(page.with_name("answers.parquet"))["scores"].to_list(): # one list a wording
        assert len(answers) > 50 and all(answer == answers[0] for answer in answers)


def test_both_models_beat_chance_beyond_their_intervals(trained):
    run, folder = trained
    p = ctrl.CtrlSettings(**FEW | dict(seed=0, ctrl_epochs=60, ctrl_lr=1e-2, ctrl_negatives=128, ctrl_patience=60))
    for start in ctrl.load_ctrl(folder/"CTRL/model.safetensors"), ctrl.new_model(str(run), p):
        ctrl.fine_tune(str(run), start, folder, p)
        (folder/"checkpoint.pt").unlink(missing_ok=True)
        rows, lists = load_sequences(str(run), "test"), load_candidates(str(run), "uni99")[1]
        auc = ranking(ctrl.catalogue_lists(start, rows, lists))["auc"]
        assert bootstrap(auc[:, None])[1, 0] > .5


def test_a_killed_training_ends_with_the_same_ranks(trained, tmp_path, monkeypatch):
    "Stopped as by a kill in either step, once a checkpoint is written; then started again."
    run, folder = trained
    shutil.copytree(run, tmp_path/"run")
    shutil.rmtree(tmp_path/"run/ctrl")
    monkeypatch.setattr(backbones, "EVERY", 0.)
    for step in "info_nce", "purchase_loss":
        real, calls = getattr(ctrl, step), iter(range(10**6))
        def dies(*args):
            if next(calls) == 3: raise KeyboardInterrupt
            return real(*args)
        with monkeypatch.context() as m:
            m.setattr(ctrl, step, dies)
            with pytest.raises(KeyboardInterrupt): ctrl.make_ctrl(ctrl.CtrlSettings(str(tmp_path/"run"), **FEW))
        assert list((tmp_path/"run/ctrl.partial").rglob("checkpoint.pt"))
    again = ctrl.make_ctrl(ctrl.CtrlSettings(str(tmp_path/"run"), **FEW))
    assert pl.read_parquet(again/"ranks.parquet").equals(pl.read_parquet(folder/"ranks.parquet"))
    assert not list(again.rglob("checkpoint*"))


def test_an_odd_width_is_refused(finished):
    with pytest.raises(UserError, match="ctrl_width=33.*even"):
        ctrl.make_ctrl(ctrl.CtrlSettings(str(finished), ctrl_width=33))
