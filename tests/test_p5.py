"""P5: likelihoods against transformers' own, prompts against a shopper's future and against renumbering, and the
stage on a small shop."""
import json, shutil

import numpy as np
import polars as pl
import pytest
import torch
import transformers as tf

from ganprompt.models import encode, load_model, load_tokenizer
from ganprompt.backbones import backbone
from ganprompt.data import load_candidates, load_sequences
from ganprompt.p5 import (P5Settings, PIECES, VARIANTS, add_tokens, asker_for, item_texts, log_likelihood, make_p5,
                          prompt_words, random_numbers, score_items, spell)
from ganprompt.prompts import load_titles, pad


def fresh(run, variant, seed=0):
    "Model, tokenizer and asker as training meets them."
    path = backbone(run, "t5")["path"]
    torch.manual_seed(seed)
    tokenizer, model = load_tokenizer(path), load_model(path, "t5")
    add_tokens(model, tokenizer, prompt_words(tokenizer) + (PIECES if variant == "ids" else []))
    return model, tokenizer, asker_for(run, variant, 0, tokenizer)


def renumbered(run, to, order):
    "A copy of a run in which item i has become order[i]."
    shutil.copytree(run, to)
    new = pl.Series(order)
    for name in "items", "interactions", "sequences", "candidates_uni99":
        path = to/f"data/{name}.parquet"
        table = pl.read_parquet(path)
        def moved(c): return pl.Series([order[i] for i in table[c].to_list()], dtype=table[c].dtype)
        def lists(c): return pl.Series([[order[i] for i in row] for row in table[c].to_list()], dtype=table[c].dtype)
        columns = ([moved(c).alias(c) for c in ("item", "target") if c in table.columns]
                   + [lists(c).alias(c) for c in ("history", "items") if c in table.columns])
        (table.with_columns(columns).sort("item") if name == "items"
         else table.with_columns(columns)).write_parquet(path)
    path = to/"prompts/titles.parquet"
    table = pl.read_parquet(path)
    table.with_columns(item=new[table["item"].to_list()].cast(table["item"].dtype)).sort("item").write_parquet(path)
    return str(to)


def read_in_training(run, asker):
    "Every text that training on a run can read: all prompts of each row, and its answer."
    rows = load_sequences(run, "train")
    return [([p.ids(h) for p in asker.prompts], asker.items[t])
            for h, t in zip(rows["history"].to_list(), rows["target"])]


@pytest.mark.parametrize("gated", ["relu", "gated-gelu"])
def test_likelihoods_are_those_of_transformers(gated):
    "Two layers, several heads, prompts and texts of different lengths; untied and unscaled output too."
    torch.manual_seed(0)
    model = tf.T5ForConditionalGeneration(tf.T5Config(vocab_size=50, d_model=32, d_kv=8, num_heads=4, d_ff=64,
                                                      num_layers=2, feed_forward_proj=gated, decoder_start_token_id=0,
                                                      tie_word_embeddings=gated == "relu")).eval()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 50, n).tolist() for n in (9, 4, 13)]
    # more tokens than a head is wide
    items = [[[*rng.integers(2, 50, n), 1] for n in rng.integers(0, 7, 20)] for _ in prompts]
    ids, mask = pad(prompts, 0)
    with torch.inference_mode():
        many = log_likelihood(model, encode(model, ids, mask), mask, items, 0)
        few = log_likelihood(model, encode(model, ids, mask), mask, [row[:1] for row in items], 0)
        for r, prompt in enumerate(prompts):
            for j, item in enumerate(items[r]):
                plain = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([item])).loss.item()
                assert abs(many[r, j].item() + plain*len(item)) < 1e-4
    assert torch.allclose(many[:, :1], few, atol=1e-4)


@pytest.mark.parametrize("variant", [kind.variant for kind in VARIANTS.values()])
def test_scores_of_a_run_are_those_of_one_question_at_a_time(variant, finished):
    run = str(finished)
    model, _, asker = fresh(run, variant)
    rows, lists = load_sequences(run, "test")["history"][:9].to_list(), [x[:n]
            for x, n in zip(load_candidates(run, "uni99")[1], (100, 3, 20, 100, 7, 50, 2, 99, 100))]
    found = score_items(model, asker, rows, lists, budget=1000)
    for r in range(9):
        assert found[r].shape == (len(lists[r]),)
        for j in 0, len(lists[r]) - 1:
            with torch.inference_mode():
                loss = model(input_ids=torch.tensor([asker.ask(rows[r])]),
                             labels=torch.tensor([asker.items[lists[r][j]]])).loss.item()
            assert abs(found[r][j] + loss*len(asker.items[lists[r][j]])) < 1e-3


def test_half_precision_stays_near(finished, monkeypatch):
    "bfloat16, as on a GPU: forced here."
    run = str(finished)
    model, _, asker = fresh(run, "titles")
    def scores():
        return np.concatenate(score_items(model, asker, load_sequences(run, "test")["history"][:5].to_list(),
                                          load_candidates(run, "uni99")[1][:5]))
    full = scores()
    monkeypatch.setattr("ganprompt.models.bf16_pays", lambda: True)
    half = scores()
    assert half.dtype == np.float32 and 0 < np.abs(half - full).max() < .05*np.abs(full).max()


def test_numbers_are_the_names_and_the_seed():
    raw = [f"B{i:04}" for i in np.random.default_rng(1).permutation(300)]
    numbers, order = random_numbers(raw, 3), np.random.default_rng(2).permutation(300)
    assert sorted(numbers) == list(range(300)) and (random_numbers([raw[i] for i in order], 3) == numbers[order]).all()
    assert (random_numbers(raw, 4) != numbers).mean() > .9
    assert abs(np.corrcoef(numbers, np.argsort(np.argsort(raw)))[0, 1]) < .2
    assert (spell([3, 12, *range(10, 120)])[:2] == ["<00><03>", "<00><12>"]
            and spell(range(12345))[12044] == "<01><20><44>")


def test_a_number_is_its_pieces_and_every_word_of_a_prompt_one_token(finished):
    model, tokenizer, asker = fresh(str(finished), "ids")
    text, titles = item_texts(str(finished), "ids", 0), load_titles(str(finished))
    assert all(tokenizer.convert_ids_to_tokens(item) == [f"<{t[1:3]}>", f"<{t[5:7]}>", "</s>"]
               for item, t in zip(asker.items, text))
    assert len(asker.ask([0, 1,
                          2])) == len(("Here is the purchase history list of the user : try to recommend next item to "
                                       "the user").split()) + 3*2 + 2 + 1
    words = " ".join(t.strip("▁ ") for t in tokenizer.convert_ids_to_tokens(asker.ask([0])))
    assert (words.startswith("Here is the purchase history list of the user : <")
            and words.endswith("> try to recommend next item to the user </s>"))
    assert not set(tokenizer(titles,
                             add_special_tokens=False).input_ids[0]) & set(tokenizer.convert_tokens_to_ids(PIECES))
    new = model.shared.weight[tokenizer.convert_tokens_to_ids(PIECES)]
    assert .8 < new.std()/model.shared.weight[:200].std() < 1.2 and torch.unique(new, dim=0).shape[0] == 100


@pytest.mark.parametrize("variant", [kind.variant for kind in VARIANTS.values()])
def test_training_does_not_read_what_is_held_out(variant, finished, tmp_path):
    "The shoppers' valid and test items are exchanged for others: not a byte of what training reads changes."
    run = tmp_path/"run"
    shutil.copytree(finished, run)
    table, n = pl.read_parquet(run/"data/sequences.parquet"), len(load_titles(str(finished)))
    table.with_columns(target=pl.when(pl.col("split") == "train").then("target").otherwise((pl.col("target")
            + 7) % n)).write_parquet(run/"data/sequences.parquet")
    purchases = pl.read_parquet(run/"data/interactions.parquet")
    purchases.with_columns(item=pl.when(pl.col("split") == "train").then("item").otherwise((pl.col("item")
            + 7) % n)).write_parquet(run/"data/interactions.parquet")
    before, after = ([read_in_training(str(folder), fresh(str(folder), variant)[2])] for folder in (finished, run))
    assert before == after
    assert load_sequences(str(finished), "test")["target"].to_list() != load_sequences(str(run),
            "test")["target"].to_list()


@pytest.mark.parametrize("variant", [kind.variant for kind in VARIANTS.values()])
def test_renumbering_the_items_changes_nothing(variant, finished, tmp_path):
    n = len(load_titles(str(finished)))
    order = np.random.default_rng(0).permutation(n).tolist()
    other = renumbered(finished, tmp_path/"run", order)
    (model, _, asker), (_, _, moved) = fresh(str(finished), variant), fresh(other, variant)
    assert read_in_training(str(finished), asker) == read_in_training(other, moved)
    def scores(run, asker):
        return score_items(model, asker, load_sequences(run, "test")["history"][:10].to_list(),
                           load_candidates(run, "uni99")[1][:10])
    assert all(np.array_equal(a, b) for a, b in zip(scores(str(finished), asker), scores(other, moved)))


def test_the_stage(finished, tmp_path):
    run = tmp_path/"run"
    shutil.copytree(finished, run)
    folder = make_p5(P5Settings(str(run), recommender_epochs=1, recommender_batch=32, valid_users=20, test_users=60))
    ranks, models = pl.read_parquet(folder/"ranks.parquet"), json.loads((folder/"models.json").read_text())
    assert set(models) == set(VARIANTS) and all(m["family"] == "text" and m["pocket"] and 0 < m["valid"] < 1
                                                and m["seconds"]["train"] > 0 for m in models.values())
    assert (ranks["candidates"].unique().to_list() == ["uni99"]
            and ranks.group_by("model").len()["len"].to_list() == [60, 60])
    ids, titles = models["P5 (ids)"]["parameters"], models["P5 (titles)"]["parameters"]
    assert ids - titles == 100*32 # a vector a piece
    model, asker = load_model(str(folder/"ids"), "t5"), asker_for(str(run), "ids", 0, load_tokenizer(folder/"ids"))
    rows = ranks.filter(model="P5 (ids)")
    at = [load_sequences(str(run), "test")["user"].to_list().index(u) for u in rows["user"][:5]]
    z = score_items(model, asker, load_sequences(str(run), "test")["history"][at].to_list(),
                    [load_candidates(str(run), "uni99")[1][i] for i in at])
    assert rows["rank"][:5].to_list() == [int((s >= s[0]).sum()) for s in z]
    assert not list(folder.rglob("checkpoint.pt"))
