"""Robustness: a bank put to real models, the report, the command."""
import json
import sys
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest

from ganprompt import recommender, robustness as R, sensitivity as S
from ganprompt.cli import main
from ganprompt.templates import read_templates
from ganprompt.files import UserError, root
from ganprompt.scorer import Prompted

RNG = np.random.default_rng(0)
BANK = [dict(id=split, group=split, split=split, text="{purchase_history} {target_item} ?")
        for split in ("seen", "attack")]


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
    assert [row["id"] for row in about["histories"]] == ["as it is", *R.HISTORIES]
    for k in "hit@10", "tau": assert about["histories"][0][k] == about["by_template"][0][k]
    assert about["histories"][4]["tau"] < 1 and len(about["tokens"]) == 2 and "other histories" in page


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
    table = R.figure1(scores, bank, pl.DataFrame({"user": [0, 1], "history": [[0], [3, 2, 3, 0, 1]]}), [[0, 1, 2, 3]]*2,
                      ["A", "B", "C", "D"])
    assert (table["group"].to_list() == ["paper", "paraphrase"] and table["1."].to_list() == ["A", "D"]
            and table["rank of the target"].to_list() == [1, 4])
    assert "history: A , B does" in table["prompt"][0] # the two last


def test_the_columns_of_every_template():
    table = S.template_table(RNG.normal(size=(2, 5, 12)), BANK)
    head = R.template_block(table, S.bank_intervals(RNG.normal(size=(2, 5, 12)), BANK, range(5), resamples=10)[1],
                            [7., 8.]).head
    assert head == ["id", "group", "split", "HR@10", "flips", "tau", "rbo", "drop", "NDCG@10", "AUC", "tokens"]


def test_a_report_says_how_often_a_model_says_yes_under_its_own_template(monkeypatch, tmp_path):
    "To what was bought: to one of three users here. An even chance is a no, as for flips."
    z = np.array([[[1., 5, 6], [0., 5, 6], [-1., 5, 6]], [[1., 5, 6], [1., 5, 6], [-1., 5, 6]]])
    rows = pl.DataFrame({"user": [4, 7, 9], "history": [[0], [1], [2]]})
    model = SimpleNamespace(reader=SimpleNamespace(ends=(None, None)))
    found = dict(check_report=[], is_saved=False, need=None, own_attributes={}, bank_for=BANK, load_recommender=model,
                 reader_for=(SimpleNamespace(titles=list("ABC")), ""), test_lists=(rows, [[0, 1, 2]]*3),
                 score_key="key", dataset_info={"dataset": "toy", "synthetic": True}, tokens_of=[10., 12.],
                 under_histories=[])
    for name, value in found.items(): monkeypatch.setattr(R, name, lambda *args, value=value: value)
    def score_bank(*args):
        args[-1].mkdir(parents=True)
        return z
    monkeypatch.setattr(R, "score_bank", score_bank)
    page = R.make_report("some/model", str(tmp_path/"run"))
    about = json.loads(page.with_suffix(".json").read_text())
    assert page == tmp_path/"run/robustness/model/report.html" and not (page.parent/".scores").exists()
    assert about["yes"] == pytest.approx(1/3) and "says yes to 33% of the targets" in page.read_text()
    assert 0 <= about["seconds"] < 600 and about["users"] == 3


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


def test_other_histories_are_asked_about_in_the_same_words(tmp_path):
    "A model that counts the history: what was left out, put in and halved comes back in its scores; the rest stays."
    from test_equations import shoppers, tiny_reader
    reader, (rows, _) = tiny_reader(), shoppers(40)
    class Counting:
        attributes = False
        def __init__(self): self.reader = reader
        def scores(self, questions, at, lists):
            n = questions.rows["history"].list.len().to_numpy()
            return [n[r] - .1*np.arange(len(lists[r])) for r in at]
    clean, lists = dict(id="own", split="seen", text="A {purchase_history} B {target_item} ?"), [[0, 1, 2]]*40
    z = R.score_bank(Counting(), {}, [clean], rows, lists)
    found = R.under_histories(Counting(), {}, clean, rows, lists, z, len(reader.titles), tmp_path)
    assert [row["tau"] for row in found] == [1.]*5 and [row["hit@10"] for row in found] == [1.]*5
    n = rows["history"].list.len().to_numpy()
    for how, wanted in zip(R.HISTORIES, (n, np.maximum(n - 1, 1), n + 1, n - n//2)):
        new = R.changed_rows(rows, how, len(reader.titles))
        np.testing.assert_array_equal(new["history"].list.len(), wanted)
        for before, after in zip(rows.iter_rows(named=True), new.iter_rows(named=True)):
            assert set(before["history"]) >= set(after["history"]) or how == "one more"
            assert before["target"] not in set(after["history"]) - set(before["history"])
    assert R.tokens_of(Counting(), {}, [clean, clean | {"text": clean["text"] + " A B"}], rows, lists)[1] > R.tokens_of(
        Counting(), {}, [clean], rows, lists)[0]


def test_everyone_is_asked_about_the_same_users(monkeypatch):
    "The rows of the test part with their own lists, whatever the order."
    rows = pl.DataFrame({"user": [4, 7, 9, 11]})
    monkeypatch.setattr(recommender, "load_sequences", lambda run, part: {"test": rows}[part])
    lists = [[40], [70], [90], [110]]
    monkeypatch.setattr(recommender, "load_candidates", lambda run, *which: {("uni99", "test"): (None, lists)}[which])
    some, theirs = R.test_lists("r", 2)
    assert some.height == 2 and [x[0] for x in theirs] == [10*u for u in some["user"]]
    assert R.test_lists("r", 0)[1] == lists


def test_a_part_of_the_questions(finished, tmp_path, monkeypatch, capsys):
    "Only what is named is asked; with all of it the figures are the report's; a tenth comes near, with an interval."
    model, asked, real = str(finished/"recommender/ganprompt, t5-ranker"), [], Prompted.scores
    def counted(self, questions, at, lists, *more):
        asked.append(len(at))
        return real(self, questions, at, lists, *more)
    monkeypatch.setattr(Prompted, "scores", counted)
    whole = R.make_report(model, users=30, out=str(tmp_path/"whole"))
    said = json.loads(whole.with_suffix(".json").read_text())
    n, hits = len(said["by_template"]), [t["hit@10"] for t in said["by_template"]]
    asked.clear()
    monkeypatch.setattr(sys, "argv", ["ganprompt", "robustness", model, "--users", "30", "--share", ".2", "--out",
                                      str(tmp_path/"part")])
    with pytest.raises(SystemExit) as end: main()
    about = json.loads((tmp_path/"part/estimate.json").read_text())
    assert not end.value.code and "estimate.html" in capsys.readouterr().out and asked == [30, *[6]*(n - 1)]
    assert (about["questions"], about["of"]) == (30 + 6*(n - 1), 30*n) and not (tmp_path/"part/.scores").exists()
    value, low, high = about["estimated"]["unseen"]
    assert abs(value - said["measured"]["unseen"]["hit@10"]["avg"]) < .06 and low < value < high
    assert about["estimated"]["clean"][0] == pytest.approx(hits[0])
    q = R.inquiry(model, "", "", 30, False, str(tmp_path/"all"), True)
    again = R.part_report(q, 1., draws=3)[0]
    assert [t["hit@10"][0] for t in again["by_template"]] == pytest.approx(hits)
    seen = q._replace(bank=[t | {"split": "seen"} for t in q.bank[:3]])
    assert list(R.part_report(seen, .5, draws=3)[0]["estimated"]) == ["clean"]
    for share in 0., 1.5:
        with pytest.raises(UserError, match="share=.* cannot be"): R.make_report(model, share=share)


def test_a_heat_map_names_each_group_once_marks_what_was_seen_and_names_what_falls_out():
    "Rows stand in their groups, whatever the bank's order; a model alone can make a template fall out."
    bank = [dict(id=i, group=g, split=s) for i, g, s in (
        ("own", "own", "seen"), ("s-a", "a", "seen"), ("s-b", "b", "seen"), ("a-1", "a", "attack"),
        ("b-1", "b", "attack"), ("b-2", "b", "attack"), ("a-2", "a", "attack"))]
    odds = np.linspace(-1, 1, 8) + .01*np.arange(7)[:, None]
    wild = odds.copy(); wild[4] = 4
    fig = R.plot_heat({"calm": odds, "wild": wild}, bank, title="Toy")
    calm, second, _ = fig.axes
    rows = [0, 1, 3, 6, 2, 4, 5]
    for ax, z in ((calm, odds), (second, wild)):
        np.testing.assert_allclose(ax.images[0].get_array(), 1/(1 + np.exp(-z[rows])))
        seen = [line.get_ydata() for line in ax.get_lines() if line.get_color() == "black"]
        assert [sum(y)/2 for y in seen] == [0, 1, 4]
    assert [t.get_text() for t in calm.get_yticklabels()] == ["own", "a", "b"]
    assert calm.get_yticks().tolist() == [0, 2, 5]
    assert [t.get_text() for t in second.texts] == ["b-1"] and second.texts[0].xy[1] == 5 and not calm.texts
