"TALLRec and CoLLM: what is trained and what is not, what a score is, what neither may see."
import json, os, shutil, signal, time

import numpy as np
import polars as pl
import pytest
import torch
from conftest import begin
from safetensors.torch import load_file, save_file
from waiting import wait_at

from ganprompt import collm
from ganprompt.collm import CollmSettings, CoLLM, Texts, collaborative, make_collm, text_reader
from ganprompt.data import load_candidates, load_sequences, load_training
from ganprompt.encoder import reader_for
from ganprompt.prompts import pad
from ganprompt.recommender import RecommenderSettings, training_items
from ganprompt.files import UserError, run_folder
from ganprompt.runs import stage
from ganprompt.scorer import described, load_recommender, score_tails

SMALL = dict(recommender_epochs=2, recommender_batch=16, recommender_lr=.005, valid_users=40)


def give_vectors(run, width=8):
    "A stage `baselines` with vectors only: the largest singular directions of who bought what, in the training part."
    def make(folder):
        bought = load_training(run)
        matrix = torch.zeros(len(bought), len(pl.read_parquet(run_folder(run)/"data/items.parquet")))
        for user, items in enumerate(bought): matrix[user, items] = 1
        u, s, v = torch.svd_lowrank(matrix, width)
        save_file({"user": (u*s).contiguous(), "item": v.contiguous()}, folder/"MF.safetensors")
    return stage(run, "baselines", {}, make, inputs=["data"])


def keep_always(run, waits):
    from ganprompt import backbones
    backbones.EVERY = 0
    if waits: wait_at(waits)
    make_collm(CollmSettings(run, **SMALL))


def start(run, waits=None):
    """The stage in a process of its own, with a checkpoint at every step; the second time that it saves the file
    `waits` it waits to be killed."""
    return begin(keep_always, str(run), waits)


@pytest.fixture(scope="module")
def done(finished, tmp_path_factory):
    "A small run with both models trained."
    run = tmp_path_factory.mktemp("collm")/"run"
    shutil.copytree(finished, run)
    give_vectors(str(run))
    assert start(run).wait() == 0
    return run


def asked(run, split="valid", n=6):
    rows, lists = load_sequences(str(run), split)[:n], load_candidates(str(run), "uni99", split)[1][:n]
    return rows, np.stack(lists)


def load(run, name): return load_recommender(run_folder(run)/"collm"/name, reader_for(str(run))[0])
def untrained(run):
    about = described(run/"collm/CoLLM")
    return CoLLM.new(reader_for(str(run))[0], about, RecommenderSettings.of(about))


def scores(model, rows, items):
    return np.stack(score_tails(model, Texts(model, rows).prompts, [[model.tails[i] for i in row] for row in items]))


def test_step_2_moves_the_mapping_and_nothing_else(done):
    before, after = untrained(done), load(done, "CoLLM")
    adapter = load_file(done/"collm/TALLRec/adapter/adapter_model.safetensors")
    held = {n.replace(".default", ""): p for n, p in after.peft.state_dict().items() if "lora" in n}
    # two layers, seven modules (all linear ones), two factors
    assert len(adapter) == 28 and all(torch.equal(held[n], w) for n, w in adapter.items())
    assert ([n for n, p in after.module.named_parameters() if p.requires_grad]
            == [n for n, _ in after.module.named_parameters() if ".mapping." in n])
    moved = {n for (n, a), b in zip(before.module.state_dict().items(), after.module.state_dict().values())
             if not torch.equal(a, b)}
    assert all(".mapping." in n for n in moved) and after.soft.mapping[2].weight.abs().max() > 0
    assert not list((done/"collm/CoLLM").glob("adapter*")) and not list((done/"collm").rglob("*.bin"))


def test_the_mapping_starts_silent(done):
    model = untrained(done)
    assert (model.soft(torch.arange(model.soft.end, model.soft.end + len(model.soft.vectors))) == 0).all()
    words = torch.arange(model.soft.end)
    assert torch.equal(model.soft(words), model.soft.words(words))


@pytest.mark.parametrize("name", ["TALLRec", "CoLLM"])
def test_scores_are_logit_differences_of_a_plain_forward_pass(name, done):
    model, (rows, items) = load(done, name), asked(done, n=3)
    shared, texts = scores(model, rows, items), Texts(model, rows)
    no, yes = (model.reader.tokenizer(w, add_special_tokens=False).input_ids for w in ("no", "yes"))
    with torch.inference_mode():
        for r in range(3):
            for c in (0, 1, 50):
                z = model.lm(input_ids=torch.tensor([texts.prompts[r] + model.tails[items[r, c]]])).logits[0, -1]
                assert abs((z[yes] - z[no]).item() - shared[r, c]) < 1e-4


def test_prompts_are_the_titles(done):
    text, soft = (load(done, name) for name in ("TALLRec", "CoLLM"))
    rows, items = asked(done, n=1)
    titles, history = pl.read_parquet(done/"prompts/titles.parquet")["title"].to_list(), rows["history"][0].to_list()
    def cut(item): return text.reader.tokenizer(titles[item], add_special_tokens=False).input_ids[:8]
    comma, mark = (text.reader.tokenizer(w, add_special_tokens=False).input_ids for w in (",", "?"))
    def context(model, history, user):
        return Texts(model, pl.DataFrame({"user": [user], "history": [history]})).prompts[0]
    assert context(text, history[:2], 0) == cut(history[0]) + comma + cut(history[1])
    assert text.tails[items[0, 0]] == cut(items[0, 0]) + mark
    n, users = soft.soft.end, len(soft.soft.vectors) - len(titles)
    assert context(soft, history, 3) == context(text, history, 3) + [n + 3]
    assert soft.tails[items[0, 0]] == [n + users + items[0, 0]] + text.tails[items[0, 0]]


def test_tallrec_in_several_wordings_reads_each_question_in_them(done):
    """The first wording is the one that it is asked in alone; the others are seen templates with a blank, and a step
    on two wordings is the mean of both losses."""
    from ganprompt.recommender import logits_at, rec_loss, states_update
    from ganprompt.scorer import Questions, bank_for, scores_of
    model, (rows, lists) = load(done, "TALLRec"), asked(done, n=6)
    p, items = RecommenderSettings(str(done), wordings=3, recommender_batch=6), lists[:, :5]
    texts, alone = Texts(model, rows, model.asked(rows, p)), Texts(model, rows)
    assert texts.prompts[:6] == alone.prompts and len(texts.prompts) == 18
    seen = [Questions(model.reader, {}, rows, t["text"], False) for t in bank_for(model.reader)[1:]
            if t["split"] == "seen"]
    assert all(prompt in [q.context(i % 6) for q in seen] for i, prompt in enumerate(texts.prompts[6:], 6))
    assert all(texts.prompts[6 + i] != texts.prompts[12 + i] for i in range(6))
    opt = torch.optim.SGD([w for w in model.module.parameters() if w.requires_grad], 0.)
    at, rng = np.arange(6), np.random.default_rng(0)
    w = int(np.random.default_rng(0).integers(1, 3))
    z = [scores_of(logits_at(model, texts, items, at, model.names, w), "yes-no", model.names) for w in (0, w)]
    found = states_update(model, (texts, items), p, opt, None)(at, rng)["loss"]
    assert torch.isclose(found, sum(rec_loss(x, "yes-no") for x in z)/2) and not torch.allclose(*z)


def test_the_double_softmax_orders_alike_only_where_yes_and_no_share_the_same_mass(done):
    model, (rows, items) = load(done, "TALLRec"), asked(done, n=1)
    ids, mask = pad([Texts(model, rows).prompts[0] + model.tails[i] for i in items[0]], model.pad_id)
    with torch.inference_mode():
        logits = model.lm(input_ids=ids, attention_mask=mask).logits[torch.arange(len(ids)), mask.sum(1) - 1].double()
    no, yes = model.names
    s, p = logits[:, yes] - logits[:, no], logits.softmax(-1)
    twice = p[:, [yes, no]].softmax(-1)[:, 0]
    mass = p[:, yes] + p[:, no]
    assert torch.allclose(twice, torch.sigmoid(mass*torch.tanh(s/2))) # the identity of the chapter
    assert twice.min() > .2689 and twice.max() < .7311
    two = logits[:, [yes, no]].softmax(-1).softmax(-1)[:, 0] # a vocabulary of two words
    assert torch.equal(two.argsort(), s.argsort()) and two.diff().abs().max() < s.diff().abs().max()/4


@pytest.mark.parametrize("name", ["TALLRec", "CoLLM"])
def test_renumbering_users_and_items_changes_no_score(name, done, monkeypatch):
    run, rng, (rows, items) = str(done), np.random.default_rng(0), asked(done)
    before, vectors = scores(load(done, name), rows, items), collaborative(run)
    titles = pl.read_parquet(done/"prompts/titles.parquet")["title"].to_list()
    users = len(vectors) - len(titles)
    new_item, new_user = rng.permutation(len(titles)), rng.permutation(users)
    moved = rows.with_columns(history=pl.Series([[int(new_item[i]) for i in h] for h in rows["history"].to_list()]),
                              user=pl.Series(new_user[rows["user"].to_numpy()]))
    rows_moved = torch.cat([vectors[:users][np.argsort(new_user)], vectors[users:][np.argsort(new_item)]])
    monkeypatch.setattr("ganprompt.backbones.load_titles", lambda run: [titles[i] for i in np.argsort(new_item)])
    monkeypatch.setattr("ganprompt.collm.collaborative", lambda run: rows_moved)
    assert np.allclose(scores(load(done, name), moved, new_item[items]), before, atol=1e-5)


def test_only_collm_looks_at_the_vectors(done, monkeypatch):
    "With others in their place its scores change, by as much as they differ within a list."
    run, (rows, items) = str(done), asked(done)
    before = {name: scores(load(done, name), rows, items) for name in ("TALLRec", "CoLLM")}
    other = collaborative(run).flip(0)
    monkeypatch.setattr("ganprompt.collm.collaborative", lambda run: other)
    after = {name: scores(load(done, name), rows, items) for name in ("TALLRec", "CoLLM")}
    assert np.array_equal(before["TALLRec"], after["TALLRec"])
    assert np.abs(before["CoLLM"] - after["CoLLM"]).max() > before["CoLLM"].std(1).mean()


def test_no_held_out_purchase_is_ever_a_positive_or_in_a_history(done):
    "Titles of the whole catalogue are public and may be drawn as negatives; what is held out is who bought them."
    run, rows = str(done), load_sequences(str(done), "train")
    items = training_items(load_training(run), rows, len(pl.read_parquet(done/"data/items.parquet")), 4, 0)
    held = {(u, i) for split in ("valid", "test") for u, i in load_sequences(run, split).select("user",
            "target").iter_rows()}
    owned = load_training(run)
    for user, history, (bought, *others) in zip(rows["user"], rows["history"].to_list(), items.tolist()):
        assert (user, bought) not in held and not held & {(user, i) for i in history}
        assert not set(others) & set(owned[user])


def test_nothing_that_training_reads_changes_if_held_out_purchases_are_hidden(done, tmp_path):
    run = tmp_path/"hidden"
    shutil.copytree(done, run)
    for file, column in ("sequences", "target"), ("interactions", "item"):
        table = pl.read_parquet(run/f"data/{file}.parquet")
        kept = pl.when(pl.col("split") == "train").then(column).otherwise(0)
        hidden = table.with_columns(kept.cast(table.schema[column]).alias(column))
        assert not hidden.equals(table)
        hidden.write_parquet(run/f"data/{file}.parquet")
    both = [(str(r), load_sequences(str(r), "train")) for r in (done, run)]
    (reader, rows), (other, rows_too) = ((text_reader(reader_for(r)[0], str(done/"collm/llm")), x) for r, x in both)
    assert rows.select("user", "history", "target").equals(rows_too.select("user", "history", "target"))
    assert (np.array_equal(*(training_items(load_training(r), x, len(reader.titles), 4, 0) for r, x in both))
            and torch.equal(*(collaborative(r) for r, _ in both)))
    # what the pocket Llama is made from
    assert reader.past == other.past and np.array_equal(reader.nexts, other.nexts) and reader.texts() == other.texts()


def test_vectors_of_whoever_is_not_in_the_training_part_are_the_mean(done, monkeypatch):
    bought = load_training(str(done))
    bought[3], gone = [], bought[0][0]
    kept = [[i for i in items if i != gone] for items in bought]
    monkeypatch.setattr("ganprompt.collm.load_training", lambda run: kept)
    vectors = collaborative(str(done))
    assert (vectors[3] == 0).all() and (vectors[len(bought) + gone] == 0).all()
    users = vectors[:len(bought)][[u for u, items in enumerate(kept) if items]]
    assert users.mean(0).abs().max() < 1e-4 and abs(users.std() - 1) < .1


def test_a_run_without_vectors_says_what_to_do(done, tmp_path):
    run = tmp_path/"none"
    shutil.copytree(done, run)
    (run/"baselines/MF.safetensors").unlink()
    about = json.loads((run/"baselines/manifest.json").read_text())
    (run/"baselines/manifest.json").write_text(json.dumps(about | {"outputs": {}}))
    with pytest.raises(UserError, match="MF among its models"): collaborative(str(run))


def test_a_killed_stage_goes_on_and_ends_with_the_same_numbers(done, tmp_path):
    run = tmp_path/"killed"
    shutil.copytree(done, run, ignore=shutil.ignore_patterns("collm"))
    for name in "TALLRec", "CoLLM": # killed in both steps
        checkpoint = run/f"collm.partial/{name}/checkpoint.pt"
        process = start(run, waits=checkpoint)
        while not checkpoint.exists():
            assert process.poll() is None
            time.sleep(.01)
        os.kill(process.pid, signal.SIGKILL); process.wait()
    assert not (run/"collm").exists() and start(run).wait() == 0
    for file in "TALLRec/adapter/adapter_model.safetensors", "CoLLM/mapping.safetensors":
        one, other = (load_file(r/"collm"/file) for r in (run, done))
        assert all(torch.equal(other[n], w) for n, w in one.items())
    assert pl.read_parquet(run/"collm/ranks.parquet").equals(pl.read_parquet(done/"collm/ranks.parquet"))
    assert not list((run/"collm").rglob("checkpoint*"))


def test_what_is_kept_of_both_models(done):
    ranks, about = pl.read_parquet(done/"collm/ranks.parquet"), json.loads((done/"collm/models.json").read_text())
    users, d, width = load_sequences(str(done), "test")["user"], 8, 32
    for name in "TALLRec", "CoLLM":
        mine = ranks.filter(model=name)
        assert (mine["user"].equals(users.cast(pl.Int32)) and set(mine["candidates"]) == {"uni99"}
                and (mine["rank"] <= mine["size"]).all())
        assert about[name]["family"] == "text" and about[name]["pocket"] and 0 < about[name]["valid"] < 1
    mapping = d*10*d + 10*d + 10*d*width + width
    assert about["CoLLM"]["parameters"] - about["TALLRec"]["parameters"] == mapping + collaborative(str(done)).numel()


def test_a_failed_first_step_is_told(done, tmp_path, monkeypatch):
    run = tmp_path/"failed"
    def none(*args): raise UserError("no adapters here")
    monkeypatch.setattr(collm, "add_adapters", none)
    shutil.copytree(done, run, ignore=shutil.ignore_patterns("collm"))
    with pytest.raises(UserError, match="TALLRec: .*adapters.*CoLLM: CoLLM starts from TALLRec, which failed"):
        make_collm(CollmSettings(str(run), **SMALL))
    assert not (run/"collm").exists() and not list((run/"collm.partial").rglob("adapter*"))
