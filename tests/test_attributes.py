"Attributes: which words may be one, what the model is asked, and how the votes are counted."
import json, shutil

import numpy as np
import polars as pl
import pytest
import torch

from ganprompt import attributes
from ganprompt.attributes import (AttributesSettings, calibrated, choices, fill, make_attributes, usable, vote,
                                  whole_words, word_counts)
from ganprompt.prompts import PromptEncoder
from ganprompt.files import UserError
from ganprompt.runs import stage

TITLES = ["Rose soap", "Oat soap 8 oz", "The rose cream for you", "Shampooing b12 rose-oat"]
TEMPLATE = "the shopper saw {title_seq} and should focus on {attribute} ."

@pytest.fixture(scope="module")
def tokenizer():
    from transformers import BertTokenizer
    return BertTokenizer(do_lower_case=True).train_new_from_iterator([*TITLES[:3]*20, TEMPLATE], vocab_size=120,
            show_progress=False)

@pytest.fixture(scope="module")
def model(tokenizer):
    from transformers import BertConfig, BertForMaskedLM
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2,
                                      num_attention_heads=2,
                                      intermediate_size=64, max_position_embeddings=40)).eval()

def test_no_stop_words_pieces_numbers_punctuation(tokenizer):
    counts = word_counts(tokenizer, TITLES, [[0, 1, 2, 3], [2]])
    # not the, for, you, 8, oz, b12, nor the pieces of Shampooing
    assert counts == {"rose": 4, "soap": 2, "oat": 2, "cream": 2}
    assert (tokenizer.tokenize("shampooing")[0] in tokenizer.get_vocab()
            and not set(tokenizer.tokenize("shampooing")) & set(counts))

@pytest.mark.parametrize("word", ["the", "for", "##soap", "so", "8", "b12", ",", "[MASK]", "[UNK]", "", "rose-oat",
                                  "cannot"])
def test_unusable(word): assert not usable(word)

def test_whole_words():
    assert (whole_words(["sham", "##poo", "rose", "so", "##ap", "##y", "oat"]) == ["rose", "oat"]
            and whole_words([]) == [])

def test_fill_reads_the_mask_and_nothing_else(tokenizer, model):
    enc = PromptEncoder(tokenizer, TEMPLATE, TITLES)
    histories = [[0], [0, 1, 2], [3], [2, 1], [1], []]
    prompts = [enc.ids(h, attribute=tokenizer.mask_token) for h in histories]
    words = tokenizer.convert_tokens_to_ids(["rose", "oat", "cream"])
    got = fill(model, tokenizer, prompts, words, batch_size=2)
    for p, row in zip(prompts, got): # one by one, the transformers way: no batch, no padding
        with torch.inference_mode():
            logits = model(torch.tensor([p])).logits[0, p.index(tokenizer.mask_token_id), words]
        np.testing.assert_allclose(row, torch.log_softmax(logits, 0), atol=1e-5)

def test_prompt_longer_than_the_model(tokenizer, model):
    enc = PromptEncoder(tokenizer, TEMPLATE, TITLES, title_tokens=99, history_items=99)
    with pytest.raises(UserError, match="the model reads 40"):
        fill(model, tokenizer, [enc.ids([3]*20, attribute="[MASK]")], [5])

def test_votes_by_hand():
    p = np.array([[.5, .3, .2], [.5, .2, .3], [.8, .1, .1]])
    votes, order = vote(np.log(p), np.log(p))
    assert votes.tolist() == [3, 0, 0] and order.tolist() == [0, 1, 2] # 1 and 2 have no votes and the same mean
    np.testing.assert_allclose(np.exp(calibrated(np.log(p)))[0], [.5/.6, .3/.2, .2/.2])
    votes, order = vote(calibrated(np.log(p)), np.log(p)) # ratios: (.83, 1.5, 1), (.83, 1, 1.5), (1.33, .5, .5)
    assert votes.tolist() == [1, 1, 1] and order.tolist() == [0, 1, 2]

def test_calibration_is_blind_to_a_words_overall_level():
    "A word made e times as likely for everybody gets the same calibrated score."
    logp = np.log(np.random.default_rng(0).dirichlet(np.ones(6), 50))
    np.testing.assert_allclose(calibrated(logp + np.arange(6)), calibrated(logp), atol=1e-9)

def test_choices_count_the_known():
    p = np.log(np.array([[.5, .3, .2], [.5, .2, .3]]))
    _, ways = choices(p, ["a", "b", "c"], np.array([1, 5, 3]), 2, {"b"})
    assert ways["plain"] == {"words": ["a", "b"], "found": 1} and ways["frequency"] == {"words": ["b", "c"], "found": 1}
    assert choices(p, ["a", "b", "c"], np.array([1, 5, 3]), 2, None)[1]["plain"]["found"] is None

@pytest.fixture
def run(tmp_path, monkeypatch, tokenizer, model):
    "A run whose earlier stages are four titles, three shoppers and the untrained model."
    folder = tmp_path/"bert"
    model.save_pretrained(folder); tokenizer.save_pretrained(folder)
    for name in "data", "prompts", "backbones": stage(tmp_path/"r", name, {}, lambda f: (f/"x").write_text("x") and {})
    rows = pl.DataFrame({"user": [0, 0, 1, 2], "split": ["train", "test", "train", "valid"],
                         "history": [[0, 1], [0, 1, 2], [3], [1, 2, 3]], "row": [0, 1, 2, 3]})
    stand_ins = dict(load_titles=lambda run: TITLES, load_sequences=lambda run, split: rows.filter(split=split),
                     load_training=lambda run: [[0, 1], [2], [1, 2, 3]],
                     load_templates=lambda run: {"attribute": TEMPLATE},
        dataset_info=lambda run: {"item_noun": "soaps"}, truth=lambda run: {"rose", "oat"},
        backbone=lambda run, kind: {"path": str(folder), "title_tokens": 8, "history_items": 5})
    for name, f in stand_ins.items(): monkeypatch.setattr(attributes, name, f)
    return tmp_path/"r"

@pytest.mark.parametrize("calibrate", [False, True])
def test_stage(run, calibrate):
    folder = make_attributes(AttributesSettings(run, k=2, calibrate=calibrate))
    made = json.loads((folder/"attributes.json").read_text())
    assert len(made["attributes"]) == 2 and made["attributes"] == made["ways"]["calibrated" if calibrate
            else "plain"]["words"]
    assert (made["found_true"] == len({"rose", "oat"} & set(made["attributes"]))
            and attributes.load_attributes(run) == made["attributes"])
    rows, counts = pl.read_parquet(folder/"rows.parquet").sort("row"), pl.read_parquet(folder/"counts.parquet")
    assert rows["user"].to_list() == [0, 0, 1, 2] and set(rows["attribute"]) <= set(made["attributes"])
    assert (counts["plain"].sum() == counts["calibrated"].sum() == 3
            and counts["word"].head(2).to_list() == made["attributes"])
    assert dict(zip(counts["word"], counts["purchases"])) == {"rose": 4, "soap": 3, "oat": 3, "cream": 2}
    assert (folder/"counts.png").stat().st_size > 1000

def test_more_words_than_there_are(run):
    with pytest.raises(UserError, match="4 usable words"): make_attributes(AttributesSettings(run, k=5))
    assert not (run/"attributes").exists() and not (run/"attributes.partial").exists()

def test_held_out_purchases_are_not_read(tmp_path):
    "The votes of the demo come from purchases before the held-out ones."
    from ganprompt.data import DataSettings, load_sequences, load_training, make_data
    make_data(DataSettings(tmp_path/"d"))
    training = load_training(tmp_path/"d")
    for split in "valid", "test":
        for user, target in load_sequences(tmp_path/"d", split).select("user", "target").iter_rows():
            assert target not in training[user]

# --- a row's own word

def test_own_words_by_hand():
    "Two words, 'a' twice as likely for everybody: over that level the first row says b; nothing known, no word."
    logp = np.log([[.6, .4], [.9, .1], [.9, .1]])
    assert attributes.own_words(logp, np.log([2/3, 1/3]), ["a", "b"], np.array([True, True, False])) == ["b", "a", None]

def test_a_rows_word_comes_from_the_history_that_stands_in_it(finished, tmp_path):
    """What was bought later changes no word, and nothing else of the shopper does: the word is the same for equal
    histories."""
    made = pl.read_parquet(finished/"attributes/rows.parquet").sort("row")
    every = pl.read_parquet(finished/"data/sequences.parquet")
    assert made["row"].to_list() == every["row"].to_list() and made["user"].to_list() == every["user"].to_list()
    # one word a shopper would be read from later purchases too
    assert made.group_by("user").agg(pl.col("attribute").n_unique())["attribute"].max() > 1
    shutil.copytree(finished, tmp_path/"r", ignore=shutil.ignore_patterns("recommender", "encoder", "notebooks"))
    rng, path = np.random.default_rng(0), tmp_path/"r/data/sequences.parquet"
    last = every.sort("row").group_by("user", maintain_order=True).agg(pl.col("row").last())["row"]
    later = pl.col("row").is_in(last.implode())
    other = every["history"].gather(rng.permutation(len(every)))
    every.with_columns(target=pl.Series(rng.permutation(every["target"])),
                       history=pl.when(later).then(other).otherwise("history")).write_parquet(path)
    tokenizer, ask = attributes.listener(str(tmp_path/"r"))
    chosen = attributes.load_attributes(str(finished))
    logp, words, _ = attributes.ballot(str(finished), tokenizer, ask)
    level = np.log(np.exp(logp[:, [words.index(w) for w in chosen]]).mean(0))
    again = attributes.row_words(str(tmp_path/"r"), ask, chosen, level).sort("row")
    same = ~made["row"].is_in(last.implode())
    assert (made.filter(same)["attribute"].equals(again.filter(same)["attribute"])
            and not made["attribute"].equals(again["attribute"]))

def test_only_what_the_prompt_shows_is_known(run, monkeypatch):
    "A known title before the items that the prompt shows does not help."
    monkeypatch.setattr(attributes, "load_titles", lambda run: [*TITLES, "unknown item"])
    rows = pl.DataFrame({"user": [0, 0], "split": ["train", "test"], "history": [[0, 4, 4, 4, 4], [0, 4, 4, 4, 4, 4]],
                         "row": [0, 1]})
    monkeypatch.setattr(attributes, "load_sequences", lambda run, split: rows.filter(split=split))
    assert attributes.UNKNOWN == "unknown item"
    words = pl.read_parquet(make_attributes(AttributesSettings(run, k=2))/"rows.parquet")["attribute"].to_list()
    assert words[0] is not None and words[1] is None

def test_users_without_a_training_part_are_asked_too(shop, tmp_path):
    """One cut in time for all: whoever came later has no training part. Their rows have words, and no template of
    the bank fails."""
    from conftest import make
    from ganprompt.data import load_sequences, load_training
    from ganprompt.encoder import reader_for
    from ganprompt.templates import slots
    from ganprompt.scorer import Questions, bank_for, own_attributes
    run = str(tmp_path/"r")
    make(run, "attributes", shop, protocol="time", max_sequence=8)
    training, rows, own, (reader, _) = load_training(run), load_sequences(run,
            "test"), own_attributes(run), reader_for(run)
    late = rows.filter(pl.Series([not len(training[u]) for u in rows["user"]], dtype=pl.Boolean))
    assert len(late) and all(own[r] in attributes.load_attributes(run) for r in late["row"])
    texts = [t["text"] for t in bank_for(reader) if "attribute" in slots(t["text"])]
    for text in texts:
        for words in (own, {}):
            asked = Questions(reader, words, rows, text)
            assert all(len(asked.ids(r, 0)) > 5 and len(asked.context(r)) > 5 for r in range(len(rows)))
    assert texts
