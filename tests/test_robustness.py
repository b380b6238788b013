"""Robustness: measures against other people's code and hand-worked cases, a bank put to real models, the report, the
command."""
import json
import sys
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from ganprompt import robustness as R, sensitivity as S, statistics as C
from ganprompt.cli import main
from ganprompt.templates import read_templates
from ganprompt.files import UserError, root

RNG = np.random.default_rng(0)


def test_cps_and_its_parts():
    "Worked from Mizrahi et al.'s definitions: MaxP .8, AvgP .6, Sat 1 - .2 = .8, CPS .64."
    m = S.over_templates([.4, .6, .8])
    assert [round(m[k], 12) for k in ("avg", "min", "max", "spread", "median", "cps")] == [.6, .4, .8, .4, .6, .64]
    assert m["q05"] == pytest.approx(.42) and m["q95"] == pytest.approx(.78)
    assert S.over_templates([.5]*9)["cps"] == .5 and S.over_templates([0.]*9)["cps"] == 0
    assert S.drop_rate([.4, .2], .4) == pytest.approx(.25) and np.isnan(S.drop_rate([.4], 0))


@pytest.mark.parametrize("shape", [(2, 5), (7, 30)])
def test_pss_is_the_mean_over_pairs(shape):
    x = RNG.random(shape)
    pairs = [(i, j) for i in range(len(x)) for j in range(i)]
    np.testing.assert_allclose(S.pss(x), np.mean([abs(x[i] - x[j]) for i, j in pairs], axis=0), atol=1e-12)
    np.testing.assert_allclose(S.pss(x[RNG.permutation(len(x))]), S.pss(x), atol=1e-12)


def test_posix_by_its_definition():
    "A loop over the paper's equation 1, with probabilities of both answers."
    z = RNG.normal(size=(5, 8))*3
    p = 1/(1 + np.exp(-z))
    def prob(t, u, yes): return p[t, u] if yes else 1 - p[t, u]
    for u in range(8):
        answers = [p[t, u] > .5 for t in range(5)]
        psi = np.mean([abs(np.log(prob(s, u, answers[t])/prob(t, u, answers[t]))) for s in range(5) for t in range(5)
                       if s != t])
        assert S.posix(z)[u] == pytest.approx(psi)
    assert np.isfinite(S.posix(np.array([[900.], [-900.]]))).all()


def test_tau_equals_scipy():
    from scipy.stats import kendalltau
    for z in (RNG.normal(size=(4, 50)), RNG.integers(0, 5, (4, 50)).astype(float)):
        np.testing.assert_allclose(S.tau(z[0], z[1:]), [kendalltau(z[0], other).statistic for other in z[1:]],
                                   atol=1e-12)
    assert np.isnan(S.tau(np.ones(5), np.arange(5.)[None])).all()


@pytest.mark.parametrize("p, mixed, turned", [(.5, .35052083333333334, 6.712312796074904e-17),
                                              (.9, .8138115, .0015403985936540256),
                                              (.98, .9587914980373333, .25860588701918846)])
def test_rbo_equals_another_implementation(p, mixed, turned):
    """What the package rbo 0.1.3 gives (it wants numpy 1, so it is not installed here): seven items in the orders
    1234567 and 3216475, and a hundred turned round."""
    assert S.rbo(np.arange(1, 8), np.array([3, 2, 1, 5, 7, 4, 6]), p) == pytest.approx(mixed, abs=1e-12)
    assert S.rbo(np.arange(1, 101), np.arange(100, 0, -1), p) == pytest.approx(turned, abs=1e-12)


def test_ranks():
    assert S.ranks(np.array([[.1, .9, .5], [2, 2, 3]])).tolist() == [[3, 1, 2], [2, 3, 1]]


def test_diversity_counts_kinds():
    "Three groups of equal states at right angles count as three, however they are scaled and turned."
    turn = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    x = np.repeat(np.eye(3, 6), 4, axis=0)*RNG.uniform(1, 9, (12, 1)) @ turn
    found = S.diversity(x)
    assert found["vendi"] == pytest.approx(3) and found["cosine"] == pytest.approx(3*12/(12*11))


SPLITS = ["seen", "seen", *["unseen-paraphrase"]*4, *["attack"]*4]
BANK = [dict(id=str(i), group="toy", split=s) for i, s in enumerate(SPLITS)]

def made(kind, users=200, n=50):
    """Scores of a model that ignores its prompt, of one that has learned the seen templates by heart, of one that
    minds none."""
    rng = np.random.default_rng(0) # the same whatever was tested before
    truth, noise = rng.normal(size=(users, n)) + 2.5*(np.arange(n) == 0), rng.normal(size=(len(BANK), users, n))
    if kind == "constant": return np.zeros_like(noise)
    if kind == "robust": return truth + .1*noise
    return np.where(np.array(SPLITS)[:, None, None] == "seen", truth + .1*noise, noise)

def test_measures_tell_constant_and_memorising_models_from_a_robust_one():
    constant, memory, robust = (S.measure_bank(made(kind), BANK) for kind in ("constant", "memory", "robust"))
    for split in ("unseen-paraphrase", "attack", "unseen"):
        c, m, r = (x[split] for x in (constant, memory, robust))
        assert c["flips"] == c["posix"] == 0 and c["hit@10"]["cps"] == 0                # insensitive and useless
        assert r["hit@10"]["cps"] > .7 > .5 > m["hit@10"]["cps"]
        assert m["hit@10"]["drop"] > .5 > .05 > r["hit@10"]["drop"]
        assert m["tau"] < .1 < .8 < r["tau"] and m["posix"] > 3*r["posix"] and m["hit@10"]["pss"] > 3*r["hit@10"]["pss"]
    assert memory["seen"]["hit@10"]["drop"] < .05 and "unseen-format" not in memory
    assert abs(memory["clean"]["hit@10"] - robust["clean"]["hit@10"]) < .1


def test_intervals_cover_users_and_templates():
    """With one figure for all, nothing varies; if only templates differ, the interval is that of a mean of few
    templates; the same draws serve all models."""
    n, users = 12, 300
    def mean(m): return m.mean(-1)
    flat = C.redrawn({"a": np.full((n, users), .3)}, mean, 200)["a"]
    assert np.allclose(flat, .3)
    steps = np.repeat(RNG.normal(size=(n, 1)), users, axis=1)
    value, low, high = C.ends(C.redrawn({"a": steps}, mean, 4000)["a"])
    assert value == pytest.approx(steps.mean()) and (high - low)/2 == pytest.approx(1.96*steps.std()/n**.5, rel=.15)
    both = C.redrawn({"a": steps, "b": steps + .1}, mean, 50)
    np.testing.assert_allclose(both["b"] - both["a"], .1)
    # trainings that differ: Student's interval, two degrees of freedom
    three = np.array([.1, .4, .7])[:, None, None] + np.zeros((3, n, users))
    assert (C.ends(C.redrawn({"a": three}, mean, 50)["a"])
            == pytest.approx([.4, .4 - 4.30265*.3/3**.5, .4 + 4.30265*.3/3**.5], abs=1e-4))
    # trainings that agree add nothing
    np.testing.assert_allclose(C.redrawn({"a": np.stack([steps]*3)}, mean, 50)["a"], np.repeat(both["a"], 3, axis=1))
    shared = C.redrawn({"a": three, "b": three + .1}, mean, 50)
    np.testing.assert_allclose(shared["b"] - shared["a"], .1)


def test_the_bank_starts_with_the_runs_own_template(finished):
    reader, _ = R.reader_for(str(finished))
    bank = R.bank_for(reader)
    assert bank[0]["text"] == reader.templates["recommendation"] and len({t["text"] for t in bank}) == len(bank)
    reader.templates = reader.templates | {"recommendation": "Does {purchase_history} go with {target_item} ?"}
    assert R.bank_for(reader)[0]["id"] == "own" and len(R.bank_for(reader)) == len(bank) + 1


def test_wrong_attributes_are_somebody_elses(finished):
    reader, _ = R.reader_for(str(finished))
    own, rows = R.own_attributes(str(finished)), R.test_lists(str(finished), 5)[0]
    wrong = next(t for t in R.bank_for(reader) if "{attribute:wrong}" in t["text"])
    asked = R.Questions(reader, own, rows, wrong["text"])
    assert (all(word != own[row] and word in own.values() for row, word in zip(rows["row"], asked.words))
            or len(set(own.values())) == 1)
    ids, word = asked.ids(0, 1), reader.tokenizer(asked.words[0], add_special_tokens=False).input_ids
    assert ids[2:2 + len(word)] == word and reader.tokenizer.decode(ids).count("Focus on") == 1


def test_a_row_without_a_word_is_asked_in_plain_words(finished):
    """A template with a place for the word, a row that has none: the run's own template, and no error. (Users
    without a training part, titles that nobody knows.)"""
    reader, _ = R.reader_for(str(finished))
    own, rows = R.own_attributes(str(finished)), R.test_lists(str(finished), 5)[0]
    del own[rows["row"][2]]
    wrong = next(t for t in R.bank_for(reader) if "{attribute:wrong}" in t["text"])
    asked, plain, worded = R.Questions(reader, own, rows, wrong["text"]), R.Questions(reader, {},
            rows), R.Questions(reader, own, rows)
    assert asked.ids(2, 1) == plain.ids(2, 1) == worded.ids(2, 1) and asked.context(2) == plain.context(2)
    assert asked.ids(1, 1) != plain.ids(1, 1) and worded.ids(1, 1) != plain.ids(1, 1)


def test_a_template_that_is_trained_on_is_seen(finished):
    "Whichever is chosen, it is the clean one, and no bank calls it unseen; nor what else may have been trained on."
    reader, _ = R.reader_for(str(finished))
    bank = [t for t in read_templates(root()/"data/templates.yaml") if t["task"] == "recommendation"]
    for n, t in enumerate(bank):
        if t["split"] == "seen": continue
        reader.templates = reader.templates | {"recommendation": t["text"]}
        first, *rest = R.bank_for(reader)
        assert (first["id"] == t["id"] and first["split"] == "seen"
                and {x["id"]: x["split"] for x in rest} == {x["id"]: x["split"] for x in bank if x is not t})
        break
    scores = RNG.normal(size=(3, 20, 10))
    measured = S.measure_bank(scores, R.bank_for(reader)[:1] + R.bank_for(reader)[-2:])
    assert measured["unseen"]["templates"] == 2 # the clean one is not among them


def test_another_bank_may_hold_what_was_trained_on(finished, tmp_path):
    reader, _ = R.reader_for(str(finished))
    seen = next(t for t in R.bank_for(reader)[1:] if t["split"] == "seen")
    (tmp_path/"b.yaml").write_text(json.dumps([dict(id="x", task="recommendation", group="g", split="attack", text=t)
                                               for t in (seen["text"],)]
                                               + [dict(id="y", task="recommendation", group="g", split="attack",
                                                       text="Buy {target_item} after {purchase_history} ?")]))
    assert ([(t["id"], t["split"]) for t in R.bank_for(reader, tmp_path/"b.yaml")[1:]]
            == [("x", "seen"), ("y", "attack")])


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_any_language_model(kind, finished, tmp_path):
    "What a whole forward pass of transformers gives, one prompt at a time and without padding."
    import torch
    from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration, LlamaConfig, LlamaForCausalLM
    reader, path = R.reader_for(str(finished))
    n = len(reader.tokenizer)
    torch.manual_seed(0)
    model = (LlamaForCausalLM(LlamaConfig(vocab_size=n, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                          num_attention_heads=2)) if kind == "causal" else
             BartForConditionalGeneration(BartConfig(vocab_size=n, d_model=16, encoder_layers=1, decoder_layers=1,
                                                     encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
                                                     decoder_attention_heads=2,
                                                     pad_token_id=0, decoder_start_token_id=2,
                                                     max_position_embeddings=512)))
    model.save_pretrained(tmp_path/kind); AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path/kind)
    wrapped = R.load_recommender(str(tmp_path/kind), reader)
    rows, lists = R.test_lists(str(finished), 3)
    bank, own = R.bank_for(reader)[:2], R.own_attributes(str(finished))
    z = R.score_bank(wrapped, own, bank, rows, lists)
    assert z.shape == (2, 3, len(lists[0]))
    questions = R.Questions(wrapped.reader, own, rows, bank[1]["text"])
    ids = torch.tensor([questions.ids(2, int(lists[2][7]))])
    with torch.no_grad():
        logits = (model.eval()(ids) if kind == "causal"
                  else model.eval()(ids, decoder_input_ids=torch.tensor([[2]]))).logits[0, -1]
    no, yes = logits[wrapped.names].view(2, -1).logsumexp(-1)
    assert z[1, 2, 7] == pytest.approx((yes - no).item(), abs=1e-4)


CHAT = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if "
        "add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

def small_llama(folder, titles, template=None):
    "A random Llama with a byte-level tokenizer that knows several spellings of yes and no."
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator([" yes", " no", "Yes", "No"]*1000 + list(titles),
                                  trainers.BpeTrainer(vocab_size=500,
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                      show_progress=False,
                                                      special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"]))
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   unk_token="<|endoftext|>", chat_template=template)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(made), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                 num_attention_heads=2, initializer_range=.3)).save_pretrained(folder)
    made.save_pretrained(folder)
    return made


@pytest.mark.parametrize("template, chat", [(CHAT, True), (CHAT, False), (None, True)])
def test_a_chat_model_is_asked_through_its_template(template, chat, finished, tmp_path):
    "The whole conversation, turned into tokens in one piece; and the pooled log-odds of a plain forward pass."
    import torch
    reader, _ = R.reader_for(str(finished))
    tokenizer = small_llama(tmp_path/"lm", reader.titles, template)
    model = R.load_recommender(str(tmp_path/"lm"), reader, chat=chat)
    rows, lists = R.test_lists(str(finished), 3)
    questions = R.Questions(model.reader, {}, rows, attributes=False)
    item, kept = int(lists[1][4]), [reader.titles[i] for i in rows["history"][1][-reader.history_items:]]
    ids, talk = questions.ids(1, item), template and chat
    said = tokenizer.decode(ids)
    start, end = ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n") if talk else ("", "")
    assert said.startswith(f"{start}The user has") and said.endswith(f"next ?{end}") and kept[-1][:5] in said
    assert ids == tokenizer(said, add_special_tokens=False).input_ids
    if talk:
        assert said == tokenizer.apply_chat_template([{"role": "user", "content": said[len(start):-len(end)]}],
                                                     tokenize=False, add_generation_prompt=True)
    assert set(tokenizer.convert_ids_to_tokens(model.names)) == {"yes", "no", "Yes", "No", "Ġyes", "Ġno"}
    with torch.no_grad(): p = model.lm(torch.tensor([ids])).logits[0, -1].softmax(-1)
    def all_of(word): return sum(p[i].item() for i in model.names if tokenizer.decode(i).strip().lower() == word)
    z = model.scores(questions, np.array([1]), [None, np.array([item])])[0][0]
    assert z == pytest.approx(np.log(all_of("yes")/all_of("no")), abs=1e-4)
    table = R.spelled(model, [ids, questions.ids(1, 0)], np.array([True, False]))
    assert (table.row(-1, named=True)["yes"] == "all"
            and table["p_yes"][-1] == pytest.approx(table["p_yes"][:-1].sum(), rel=1e-5))
    assert reader.ends == (None, None) and reader.tokenizer is not model.reader.tokenizer # the run's stays its own


def test_a_pocket_model_answers_as_it_was_taught(finished):
    reader, path = R.reader_for(str(finished))
    assert (len(R.load_recommender(path, reader).names)
            == len(R.load_recommender(str(finished/"recommender/llm"), reader).names) == 2)


def test_a_decoder_that_begins_with_a_mark_of_its_own(finished, tmp_path):
    import torch
    from transformers import AutoTokenizer, BartConfig, BartForConditionalGeneration
    reader, path = R.reader_for(str(finished))
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(vocab_size=len(reader.tokenizer), d_model=16, encoder_layers=1,
                                                    decoder_layers=1, encoder_ffn_dim=16, decoder_ffn_dim=16,
                                                    encoder_attention_heads=2,
                                                    decoder_attention_heads=2, pad_token_id=0, decoder_start_token_id=2,
                                                    max_position_embeddings=512)).eval()
    model.generation_config.forced_bos_token_id = 7
    model.final_logits_bias.normal_()
    model.save_pretrained(tmp_path); AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path)
    wrapped, (rows, _) = R.load_recommender(str(tmp_path), reader), R.test_lists(str(finished), 1)
    questions = R.Questions(wrapped.reader, {}, rows, attributes=False)
    with torch.no_grad():
        z = model(torch.tensor([questions.ids(0, 1)]), decoder_input_ids=torch.tensor([[2, 7]])).logits[0, -1,
                wrapped.names].view(2, -1).logsumexp(-1)
    assert (wrapped.scores(questions, np.array([0]), [np.array([1])])[0][0]
            == pytest.approx((z[1] - z[0]).item(), abs=1e-4))


def test_an_encoder_is_refused(finished, tmp_path):
    from transformers import AutoTokenizer, BertConfig, BertForMaskedLM
    reader, path = R.reader_for(str(finished))
    BertForMaskedLM(BertConfig(vocab_size=len(reader.tokenizer), hidden_size=16, intermediate_size=32,
                               num_hidden_layers=1, num_attention_heads=2)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(path).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="bert does not read from left to right|has no weights"):
        R.load_recommender(str(tmp_path), reader)


def test_a_model_that_does_not_answer(finished, tmp_path):
    from safetensors.numpy import save_file
    (tmp_path/"config.json").write_text('{"model_type": "vit"}')
    save_file({"w": np.zeros(1)}, tmp_path/"model.safetensors")
    (tmp_path/"tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="vit neither answers nor continues"):
        R.load_recommender(str(tmp_path), R.reader_for(str(finished))[0])


def test_command_and_report(finished, tmp_path, monkeypatch, capsys):
    "The user's own templates; a recommender of a run; every number of the page comes from the scores."
    mine = tmp_path/"mine.yaml"
    mine.write_text("- {id: hello, task: recommendation, group: mine, split: attack, text: 'Hello {purchase_history} "
                    "and {target_item} ?'}\n")
    monkeypatch.setattr(sys, "argv", ["ganprompt", "robustness", str(finished/"recommender/ganprompt"), "--templates",
                                      str(mine), "--users", "8", "--out", str(tmp_path/"out")])
    with pytest.raises(SystemExit) as end: main()
    assert not end.value.code and "report.html" in capsys.readouterr().out
    about, page = json.loads((tmp_path/"out/report.json").read_text()), (tmp_path/"out/report.html").read_text()
    assert [t["id"] for t in about["by_template"]] == ["own", "hello"] and about["users"] == 8 and about["pocket"]
    assert "pocket model" in page and page.count("<img") == 2 and about["templates"] == "mine.yaml"
    assert about["measured"]["attack"]["hit@10"]["avg"] == pytest.approx(about["by_template"][1]["hit@10"])
    assert set(about["measured"]) == {"clean", "attack", "unseen"} == {"clean", *about["intervals"]["by_split"]}
    value, low, high = about["intervals"]["by_template"]["hit@10"][1]
    assert (low <= value <= high and value == pytest.approx(about["by_template"][1]["hit@10"])
            and about["verdict"] in page and "as defined" in page and "By chance" in page)


def test_mistakes_in_a_template_file_come_first(finished, tmp_path, monkeypatch, capsys):
    (tmp_path/"bad.yaml").write_text("- {id: a, task: recommendation, group: g, split: attack, text: 'Buy "
                                     "{target_item} ?'}\n")
    monkeypatch.setattr(R, "score_bank", lambda *a: pytest.fail("scored"))
    monkeypatch.setattr(sys, "argv", ["ganprompt", "robustness", str(finished/"recommender/ganprompt"), "--templates",
                                      str(tmp_path/"bad.yaml"), "--out", str(tmp_path/"out")])
    with pytest.raises(SystemExit) as end: main()
    said = capsys.readouterr().err
    assert (end.value.code == 1 and "bad.yaml, line 1" in said and "purchase_history" in said
            and "Traceback" not in said and not (tmp_path/"out").exists())


def test_figure1_shows_one_of_each_group():
    scores = np.zeros((3, 2, 4)); scores[:, 1] = [[4, 3, 2, 1], [1, 2, 3, 4], [4, 3, 2, 1]]; scores[:, 0] = [9, 8, 7, 6]
    bank = [t for t in read_templates(root()/"data/templates.yaml")
            if t["id"] in ("paper-recommendation", "s-para-1", "s-para-2")]
    table = R.figure1(scores, bank, pl.DataFrame({"user": [0, 1], "history": [[0], [1]]}), [[0, 1, 2, 3]]*2,
                      ["A", "B", "C", "D"])
    assert (table["group"].to_list() == ["paper", "paraphrase"] and table["1."].to_list() == ["A", "D"]
            and table["rank of the target"].to_list() == [1, 4])


# --- the best of many, intervals, lists of unequal length

def test_held_out_by_a_slow_loop():
    "Halve the users (not the lists), choose on one half, measure on the other, both ways."
    x, users = RNG.random((5, 13)), np.repeat(np.arange(7), [1, 2, 3, 1, 2, 2, 2])
    rng, high, low = np.random.default_rng(0), [], []
    for _ in range(30):
        first = np.isin(users, np.flatnonzero(rng.permutation(7) < 3))
        for a, b in ((first, ~first), (~first, first)):
            chosen = [x[t, a].mean() for t in range(5)]
            high.append(x[np.argmax(chosen), b].mean()); low.append(x[np.argmin(chosen), b].mean())
    found = C.held_out(x, users, splits=30)
    assert (found["max"] == pytest.approx(np.mean(high)) and found["min"] == pytest.approx(np.mean(low))
            and found["spread"] == pytest.approx(np.mean(high) - np.mean(low)))
    assert found["cps"] == pytest.approx(np.mean(high)*(1 - np.mean(high) + x.mean()))
    assert all(np.isnan(v) for v in C.held_out(x[:, :1]).values())


def test_cps_of_equal_templates_is_their_accuracy():
    """As defined it lies above the accuracy of every template, by the error of the best of 47; held out it does not.
    A template that is truly better is found, and not flattered."""
    rng = np.random.default_rng(1)
    tables = [(rng.random((47, 300)) < .3).astype(float) for _ in range(60)]
    assert np.mean([S.over_templates(x.mean(axis=1))["cps"] for x in tables]) > .325
    held = [C.held_out(x, splits=20) for x in tables]
    for k in ("max", "min", "cps"): assert np.mean([h[k] for h in held]) == pytest.approx(.3, abs=.006)
    chance = np.r_[.6, np.full(46, .3)]
    better = [C.held_out((rng.random((47, 300)) < chance[:, None]).astype(float), splits=20)["max"] for _ in range(20)]
    assert np.mean(better) == pytest.approx(.6, abs=.02)
    assert (S.measure_bank(made("robust"), BANK)["unseen"]["hit@10"]["held_out"]["cps"]
            <= S.measure_bank(made("robust"), BANK)["unseen"]["hit@10"]["cps"] + .01)


def test_users_are_drawn_with_all_their_lists():
    users = np.array([5, 5, 9, 2])
    counts, owner = C.user_draws(users, 50)
    assert (counts.shape == (51, 4) and (counts[0] == 1).all() and (counts[:, 0] == counts[:, 1]).all()
            and (counts[:, [0, 2, 3]].sum(axis=1) == 3).all() and owner.tolist() == [1, 1, 2, 0])
    x = np.array([[1., 2, np.nan, 4]])
    assert C.drawn_means(x, counts)[0, 0] == pytest.approx(7/3)
    for count, mean in zip(counts, C.drawn_means(x, counts)[:, 0]):
        drawn = [v for v, n in zip(x[0], count) for _ in range(int(n)) if not np.isnan(v)]
        assert mean == pytest.approx(np.mean(drawn)) if drawn else np.isnan(mean)


def test_intervals_of_the_page_hold_the_truth():
    """Hits that are coins: the interval of a template's HR@10 covers its chance; intervals are wider where users
    have several lists that agree."""
    def study(seed, lists=1):
        rng = np.random.default_rng(seed)
        # a hit: the target first, or last of 21
        z = np.repeat(np.where(rng.random((4, 60, 1)) < .4, 2., -2.)*(np.arange(21) == 0) + .1*rng.random((4, 60, 21)),
                      lists, axis=1)
        return S.bank_intervals(z, BANK[1:5], np.repeat(np.arange(60), lists), resamples=200)
    found = [study(s)[1]["hit@10"][2] for s in range(60)]
    assert .85 < np.mean([low <= .4 <= high for _, low, high in found])
    one, two = (study(0, n)[0]["unseen"]["avg"] for n in (1, 2))
    np.testing.assert_allclose(one, two)
    rng = np.random.default_rng(0)
    hits, by_split = (rng.random((4, 60)) < np.array([.8, .5, .4, .3])[:, None]), lambda z, b: S.bank_intervals(z, b,
            np.arange(60), resamples=50)[0]["unseen"]
    u = by_split(np.where(hits[:, :, None], 2., -2.)*(np.arange(21) == 0),
                 [BANK[0], *[t for t in BANK if t["split"] != "seen"][:3]])
    assert u["drop"][0] == pytest.approx(1 - hits[1:].mean()/hits[0].mean())
    assert u["cps"][0] == pytest.approx(u["best"][0]*(1 - (u["best"][0] - hits[1:].mean())))


def ragged(z, sizes):
    out = z.copy()
    for u, n in enumerate(sizes): out[:, u, n:] = np.nan
    return out

def test_lists_of_unequal_length_are_measured_one_by_one():
    "Each user's figures are those of the user alone, with a list of its own length."
    sizes = RNG.integers(5, 30, 12)
    z = ragged(RNG.normal(size=(len(BANK), 12, 30)), sizes)
    figures, order = S.by_template(z), S.agreement(z)
    for u, n in enumerate(sizes):
        alone = z[:, u:u + 1, :n]
        for m, v in S.by_template(alone).items(): np.testing.assert_allclose(figures[m][:, u], v[:, 0])
        for m, v in S.agreement(alone).items(): np.testing.assert_allclose(order[m][:, u], v[:, 0], atol=1e-12)
    measured, table = S.measure_bank(z, BANK), S.template_table(z, BANK)
    assert (all(np.isfinite(measured["unseen"][k]) for k in ("tau", "rbo", "flips", "posix"))
            and table["tau"].is_finite().all())
    assert R.figure1(z, [t | {"text": "{purchase_history} {target_item}"} for t in BANK],
                     pl.DataFrame({"history": [[0]]*12}), [range(n) for n in sizes],
                     [str(i) for i in range(30)]).height == 1


class Loud:
    "Scores that tell what was asked: the item, in the words of template t."
    reader, attributes = None, False
    def scores(self, text, at, lists): return [np.asarray(lists[r]) + np.float32(100*int(text)) for r in at]

def test_a_bank_is_put_to_lists_of_unequal_length(monkeypatch):
    monkeypatch.setattr(R, "Questions", lambda reader, own, rows, text, attributes: text)
    z = R.score_bank(Loud(), {}, [dict(id=t, text=t) for t in "01"], pl.DataFrame({"user": [0, 1]}),
                     [[3, 1, 2], [7]], "m")
    np.testing.assert_array_equal(z, np.array([[[3, 1, 2], [7, np.nan, np.nan]],
                                               [[103, 101, 102], [107, np.nan, np.nan]]], np.float32))
    monkeypatch.setattr(Loud, "scores", lambda self, text, at, lists: [np.full(len(lists[r]), np.nan) for r in at])
    with pytest.raises(UserError, match="under template 0 are NaN"):
        R.score_bank(Loud(), {}, [dict(id="0", text="0")], pl.DataFrame({"user": [0]}), [[3, 1, 2]])


def test_what_each_spelling_is_worth(monkeypatch):
    "Two ways to say no and two to say yes, probabilities given."
    import torch
    p = torch.tensor([[.1, .2, .3, .4], [.4, .3, .2, .1]]) # no, No, yes, Yes of two questions, the first of them bought
    monkeypatch.setattr(R, "whole_logits", lambda model, prompts: p.log())
    words = SimpleNamespace(convert_ids_to_tokens=lambda ids: ["no", "No", "yes", "Yes"])
    model = SimpleNamespace(names=[0, 1, 2, 3], reader=SimpleNamespace(tokenizer=words))
    found = R.spelled(model, [[1], [2]], np.array([True, False]))
    assert (found["no"].to_list() == ["no", "No", "all"] and found["yes"].to_list() == ["yes", "Yes", "all"]
            and found["auc"].to_list() == [1., 1., 1.])
    np.testing.assert_allclose(found["p_no"], [.25, .25, .5], atol=1e-6)
    np.testing.assert_allclose(found["p_yes"], [.25, .25, .5], atol=1e-6)


def test_few_flips_are_not_taken_for_robustness():
    "A model that says yes to everything and ranks by guessing under what it has not seen."
    z, n = made("memory") + 20, 50
    assert S.measure_bank(z, BANK)["unseen"]["flips"] < .01
    floor = S.chance(np.full(200, n))
    assert floor["hit@10"] == .2 and floor["tau"] == 0
    said = S.verdict(S.template_table(z, BANK), floor)
    assert ("Few flips are not robustness here: under 8 of 9 templates" in said and "by chance" in said
            and "0.200 by chance" in said)
    assert "under none of these is half of the order" in S.verdict(S.template_table(made("robust") + 20, BANK), floor)
    assert "Under no template" in S.verdict(S.template_table(RNG.normal(size=(len(BANK), 200, n)), BANK), floor)
    def table(hit):
        return pl.DataFrame({"id": ["clean", "other"], "flips": [0., .01], "tau": [1., .9], "hit@10": [.6, hit]})
    # half of .6 - .2 is .2 above chance
    assert ("Few flips are not robustness" in S.verdict(table(.3), floor)
            and "under none of these" in S.verdict(table(.5), floor))
    r = S.ranks(RNG.normal(size=(2, 300, n)))
    assert floor["rbo"] == pytest.approx(S.rbo(r[0], r[1]).mean(), abs=.02)


def test_a_recommender_of_ones_own_is_put_under_the_bank():
    "One method is enough: its numbers come back template by template, and its questions are in each template's words."
    from ganprompt.scorer import Questions
    from test_equations import shoppers, tiny_reader
    reader, (rows, _) = tiny_reader(), shoppers(4)
    class Longest:
        attributes = False
        def __init__(self, reader): self.reader = reader
        def scores(self, questions, at, lists):
            assert isinstance(questions, Questions)
            return [np.array([len(questions.ids(r, i)) + .1*i for i in lists[r]]) for r in at]
    bank = [dict(id=str(i), split="seen", text=text) for i, text in enumerate(
        ("A {purchase_history} B {target_item} ?", "A {purchase_history} B C D {target_item} ?"))]
    z = R.score_bank(Longest(reader), {}, bank, rows, [[0, 1, 2], [3, 4], [5], [6, 7]])
    assert z.shape == (2, 4, 3) and np.isnan(z[0, 1, 2])
    longer = z[1] - z[0]
    assert (longer[~np.isnan(longer)] > 0).all() and np.ptp(longer[~np.isnan(longer)]) < 1e-5


def test_a_templates_flips_are_those_of_the_target():
    "The first candidate's answers alone, in the table and in the measures; another's may turn."
    z = np.array([[[1., 1]], [[2., -1]], [[-1., 1]]]) # templates, one user, target and another
    assert S.template_table(z, BANK[:3])["flips"].to_list() == [0, 0, 1]
    assert S.measure_bank(z, BANK[:3])["unseen"]["flips"] == 1


def test_the_middle_of_each_interval_is_the_measure():
    "What `bank_intervals` says of each split and template is what `measure_bank` and `template_table` say of it."
    z = made("memory", users=40)
    splits, templates = S.bank_intervals(z, BANK, np.arange(40), resamples=20)
    measured, table = S.measure_bank(z, BANK), S.template_table(z, BANK)
    assert set(splits) == set(measured) - {"clean"} and splits["seen"]["avg"][0] > splits["attack"]["avg"][0] + .3
    for s, found in splits.items():
        for m in ("avg", "drop", "pss"): assert found[m][0] == pytest.approx(measured[s]["hit@10"][m])
        for m in ("posix", "flips", "tau", "rbo"): assert found[m][0] == pytest.approx(measured[s][m])
    for m in ("flips", "tau", "rbo"): np.testing.assert_allclose([v[0] for v in templates[m]], table[m])


def test_everyone_is_asked_about_the_same_users(monkeypatch):
    "The rows of the test part with their own lists, whatever the order."
    rows = pl.DataFrame({"user": [4, 7, 9, 11]})
    monkeypatch.setattr(R, "load_sequences", lambda run, part: {"test": rows}[part])
    lists = [[40], [70], [90], [110]]
    monkeypatch.setattr(R, "load_candidates", lambda run, name: {"uni99": (rows["user"], lists)}[name])
    some, theirs = R.test_lists("r", 2)
    assert some.height == 2 and [x[0] for x in theirs] == [10*u for u in some["user"]]
    assert R.test_lists("r", 0)[1] == lists
