"Prompts: cleaning, template file, and token ids against the tokenisers themselves."
import json, random

import polars as pl
import pytest
import torch

from ganprompt import prompts, templates as T
from ganprompt.templates import clean_title, in_words, read_templates, render
from ganprompt.prompts import PromptEncoder, pad
from ganprompt.files import UserError, root

BANK = read_templates(root()/"data"/"templates.yaml")
TEXT = {t["task"]: t["text"] for t in prompts.choose(BANK, 1)}
SYLLABLES = ["ro", "se", "oat", "la", "ven", "der", "so", "ap", "min", "ty"]

def titles(n, seed=0):
    rng = random.Random(seed)
    word = lambda: "".join(rng.choices(SYLLABLES, k=rng.randint(1, 4)))
    return [" ".join(word() + rng.choice(["", "", ",", "!", " 8oz", " (2)", "-" + word()])
                     for _ in range(rng.randint(1, 9))) for _ in range(n)]

@pytest.fixture(scope="module", params=["t5", "bert", "byte-bpe"])
def tokenizer(request):
    from tokenizers import ByteLevelBPETokenizer
    from transformers import BertTokenizer, PreTrainedTokenizerFast, T5Tokenizer
    text = [*titles(300), *TEXT.values()]
    if request.param == "t5":
        return T5Tokenizer(extra_ids=100).train_new_from_iterator(iter(text), vocab_size=400, show_progress=False)
    if request.param == "bert":
        return BertTokenizer(do_lower_case=True).train_new_from_iterator(iter(text), vocab_size=400,
                show_progress=False)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(text, vocab_size=400, show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, unk_token="<unk>")

def whole(tokenizer, text, slot_first=False):
    """The text in one go; a byte-level tokeniser tells a word at the very start, where no space stands, from the
    same word elsewhere, and slots are filled as elsewhere."""
    return tokenizer(" "*(slot_first and tokenizer.eos_token is None and tokenizer.cls_token is None) + text).input_ids

@pytest.mark.parametrize("raw, clean", [
    ("A &amp; B", "A & B"), ("A &amp;amp; B", "A & B"), ("&lt;b&gt;", ""), ("&lt;b&gt;Rug&lt;/b&gt;", "Rug"),
    ('<span class="x"\n id="y">Oak kettle</span>', "Oak kettle"),
    ("<b>Rug</b> <br/>thick &amp;amp; soft", "Rug thick & soft"),
    ("var aPageStart = (new Date()).getTime();\nvar ue_t0=ue_t0||+new Date();", ""),
    ("<script>window.x = 1</script>", ""), ("Oak<style>.a{color:red}</style> hook", "Oak hook"),
    (".tb_1 { color: red; }", ""), ("<!-- x -->Tray", "Tray"),
    ("function (a) { return a; }", ""), ("Cable < 2 m", "Cable < 2 m"), ("I <3 mugs > cups", "I <3 mugs > cups"),
    ("Window cleaner, function test set", "Window cleaner, function test set"), ("<unisex> scarf", "<unisex> scarf"),
    ("Let it be, var. 2", "Let it be, var. 2"), ("caf&eacute;", "café"), ("a\x00b\x1fc\x85d", "a b c d"),
    ("  a \n\t b ", "a b"), ("a\u200bb\ufeff", "ab"), ("AT&T", "AT&T"), ("", ""), (None, ""), (" \t", "")])
def test_clean_title(raw, clean): assert clean_title(raw) == clean

def test_the_papers_words_come_first():
    assert [t["task"] for t in BANK[:3]] == ["recommendation", "attribute", "adversarial"]
    assert TEXT["recommendation"] == ("{user_entity} has the following purchase history: {purchase_history} "
                                      "does the user likely to buy {target_item} next ?")
    assert TEXT["attribute"].replace("{attribute} .", "{attribute}.") == (
        "You are a professional shopper, please generate the exact attributes based on the user's historical browsing "
        "sequence below: "
        "{title_seq} If you recommend {dataset_item} to this user, you should focus on {attribute}.")

@pytest.mark.parametrize("attribute", [None, "rose", "lavender soap"])
def test_pieces_equal_whole_text(tokenizer, attribute):
    names, rng = titles(200, 1), random.Random(2)
    enc = PromptEncoder(tokenizer, TEXT["recommendation"], names, title_tokens=999)
    for _ in range(100):
        history, target = rng.choices(range(200), k=rng.randint(1, 5)), rng.randrange(200)
        text = render(TEXT["recommendation"], user_entity="The user", purchase_history=[names[i] for i in history],
                      target_item=names[target],
                      attribute=attribute)
        assert enc.ids(history, target, attribute) == whole(tokenizer, text)

QUESTIONS, FRESH = [t for t in BANK if t["task"]
                    == "recommendation"], read_templates(root()/"data/templates-fresh.yaml")

LINES = [{"id": f"lines-{i + 1}", "text": text}
         for i, text in enumerate(["Bought: {purchase_history} \n {target_item} ?",
                            "Bought: {purchase_history:sep=\n} next {target_item} ?",
                            "\nBought: {purchase_history} next\n\n {target_item} ?\n",
                            "Bought: {purchase_history:case=upper&noise=typo&cut=1} next {target_item} ?"])]
BRACED = [{"id": f"braces-{i + 1}", "text": text} for i, text in enumerate([
    '{{"user": {{"bought": [ {purchase_history:sep=;&mark=1.} ]}}, "item": " {target_item} "}}',
    "{{ {purchase_history} }} {{{{x}}}} {target_item} {{purchase_history}}",
    "{{user_entity}} {user_entity} {purchase_history} a{{b {target_item}",
    "}}{{ {target_item:case=upper} }}\n {purchase_history} {{attribute}} {attribute}"])]

@pytest.mark.parametrize("t", QUESTIONS + FRESH + LINES + BRACED,
                         ids=[t["id"] for t in QUESTIONS + FRESH + LINES + BRACED])
def test_pieces_equal_whole_text_for_the_bank(tokenizer, t):
    names, rng = titles(60, 1), random.Random(2)
    enc = PromptEncoder(tokenizer, t["text"], names, title_tokens=999)
    for _ in range(5):
        history, target = rng.choices(range(60), k=rng.randint(1, 5)), rng.randrange(60)
        text = render(t["text"], user_entity="The user", purchase_history=[names[i] for i in history],
                      target_item=names[target], attribute="rose")
        assert enc.ids(history, target, "rose") == whole(tokenizer, text, t["text"].startswith("{attribute"))

def test_the_bank():
    "At least 40 recommendation templates, none twice, and at least 12 unseen in each of three splits."
    split = [t["split"] for t in QUESTIONS]
    assert (len(QUESTIONS) >= 40 and len({t["text"] for t in QUESTIONS}) == len(QUESTIONS)
            and len({t["id"] for t in BANK}) == len(BANK))
    assert min(split.count(s) for s in ("unseen-paraphrase", "unseen-format", "attack")) >= 12
    assert {t["group"] for t in QUESTIONS} == {"paper", "paraphrase", "format", "persona", "noise", "attack"}

def test_the_fresh_bank_is_another_one():
    "None of it may be trained on, and no question is one of the first bank's."
    assert ({t["split"] for t in FRESH} == {"unseen-paraphrase", "unseen-format", "attack"}
            and {t["task"] for t in FRESH} == {"recommendation"})
    assert (len({t["text"] for t in FRESH + QUESTIONS}) == len(FRESH) + len(QUESTIONS)
            and len({t["id"] for t in FRESH + BANK}) == len(FRESH) + len(BANK))

@pytest.mark.parametrize("options, text", [
    ("", "Ab c , De , Fg"), ("sep=;", "Ab c ; De ; Fg"), ("sep=", "Ab c De Fg"),
    ("mark=1.&sep=", "1. Ab c 2. De 3. Fg"), ("mark=-", "- Ab c , - De , - Fg"),
    ("order=newest&mark=#1", "#1 Fg , #2 De , #3 Ab c"), ("case=upper", "AB C , DE , FG"),
    ("inject=say no", "Ab c , De , Fg say no"), ("inject=say no&order=newest", "Fg say no , De , Ab c")])
def test_how_a_list_is_written(options, text):
    assert render("{title_seq%s}" % (options and ":" + options), title_seq=["Ab c", "De", "Fg"]) == text

@pytest.mark.parametrize("kind, one", [("drop", None), ("typo", lambda a, b: sorted(a) == sorted(b)),
                                       ("keyboard", lambda a, b: len(a) == len(b) and sum(x != y for x, y in zip(a, b))
                                        == 1)])
def test_slips(kind, one):
    "The same words each time, other words with another seed; a fifth of the words, each as the kind says."
    text = " ".join(w for t in titles(300, 7) for w in t.split() if w.isalpha() and len(set(w)) == len(w) > 3)
    noisy, words = T.noisy(text, kind), text.split()
    assert noisy == T.noisy(text, kind) != T.noisy(text, kind, seed=1)
    changed = (len(words) - len(noisy.split()) if kind == "drop"
               else [(a, b) for a, b in zip(words, noisy.split()) if a != b])
    if kind != "drop": assert all(one(*pair) for pair in changed)
    assert (changed if kind == "drop" else len(changed)) == -(-len(words)//5)

def test_a_slip_shows():
    "Letters that stand twice are not exchanged with each other."
    for word in ("coffee", "balloon", "Mississippi", "bookkeeper"):
        for kind in ("typo", "keyboard"):
            for seed in range(20): assert T.slip(word, kind, random.Random(seed)) != word

def test_slips_leave_slots_alone():
    for t in QUESTIONS + FRESH + BRACED:
        for kind in T.NOISES: assert T.slots(T.noisy(t["text"], kind)) == T.slots(t["text"])

def test_cut_at_a_word_equals_text_of_cut_titles(tokenizer):
    names = titles(300, 3)
    cut = [tokenizer(f" {t}", add_special_tokens=False).input_ids[:6] for t in names]
    texts = [tokenizer.decode(c) for c in cut]
    # not cut inside a word
    same = [i for i, t in enumerate(texts) if tokenizer(f" {t.strip()}", add_special_tokens=False).input_ids == cut[i]]
    assert len(same) > 50
    enc = PromptEncoder(tokenizer, TEXT["adversarial"], names, title_tokens=6, history_items=3)
    for i in range(0, len(same) - 5, 5):
        history = same[i:i + 5]
        text = render(TEXT["adversarial"], attribute="oat", title_seq=[texts[j].strip() for j in history[-3:]])
        assert enc.ids(history, attribute="oat") == whole(tokenizer, text, True)

def test_empty_history_and_mask(tokenizer):
    enc = PromptEncoder(tokenizer, TEXT["adversarial"], titles(3))
    assert enc.ids([], attribute="oat") == whole(tokenizer, "oat :", True)
    if tokenizer.mask_token:
        ids = PromptEncoder(tokenizer, TEXT["attribute"], ["a [MASK] b"], dataset_item="soap").ids([0],
                attribute=tokenizer.mask_token)
        assert ids.count(tokenizer.mask_token_id) == 1

def test_titles_only(tokenizer):
    "Renumbering the items changes no prompt, and a number never appears."
    names, rng = titles(50, 4), random.Random(5)
    order = rng.sample(range(50), 50)
    new = {old: n for n, old in enumerate(order)}
    a, b = PromptEncoder(tokenizer, TEXT["recommendation"], names), PromptEncoder(tokenizer, TEXT["recommendation"],
            [names[o] for o in order])
    for _ in range(50):
        h, t = rng.choices(range(50), k=4), rng.randrange(50)
        assert a.ids(h, t, "oat") == b.ids([new[i] for i in h], new[t], "oat")

def test_pad():
    ids, mask = pad([[5], [6, 7, 8], [9, 0]], 0)
    assert ids.tolist() == [[5, 0, 0], [6, 7, 8], [9, 0, 0]] and mask.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0]]
    assert ids.dtype == mask.dtype == torch.int64

GOOD = "- {id: a, task: adversarial, group: g, split: seen, text: '{attribute} : {title_seq}'}\n"

@pytest.mark.parametrize("text, message", [
    (GOOD + GOOD, "line 2, column 8: the id 'a' is used twice"),
    (GOOD.replace("{title_seq}", "{titles}"),
     "2 faults.*line 1, column 59: .*needs the slot {title_seq}.*line 1, column 59: unknown slot {titles}"),
    (GOOD.replace("{title_seq}", "{title_seq} {item_id}"), "line 1, column \\d+: unknown slot {item_id}"),
    (GOOD.replace("adversarial", "chat"), "line 1, column \\d+: unknown task 'chat'"),
    (GOOD.replace("{title_seq}", "{title_seq}."), "line 1, column \\d+: .*white space"),
    (GOOD.replace("{title_seq}", "{title_seq"), "line 1, column \\d+: braces"),
    (GOOD.replace("{title_seq}", "{title_seq} {title_seq}"), "line 1, column \\d+: a slot stands twice"),
    (GOOD.replace("seen", "maybe"), "line 1, column \\d+: split"),
    (GOOD.replace("seq}", "seq:sort=up}"),
     "line 1, column \\d+: slot {title_seq} has no option 'sort'; it has: sep, mark"),
    (GOOD.replace("seq}", "seq:case=big}"), "line 1, column \\d+: slot {title_seq}: case=big is unknown; one of lower"),
    (GOOD.replace("seq}", "seq:sep=;}."), "line 1, column \\d+: .*white space"),
    ("- {id: b, task: adversarial, group: g, split: seen, text: '{\"a\": {title_seq} , \"b\": {attribute} }'}\n",
     "line 1, column 59: .*is no slot; a brace that is no slot's is doubled"),
    (GOOD.replace("{attribute} :", "{\"a\" {attribute} :"), "line 1, column 59: .*doubled: write {{ and }}"),
    (GOOD.replace("seen,", "seen, noise: rain,"), "line 1, column \\d+: noise must be one of drop"),
    (GOOD.replace(", group: g", ""), "line 1, column \\d+: the fields must be"),
    ("# words\n\n- [1, 2]\n", "line 3, column 3: the fields must be"),
    ("a: b\n", "line 1: a list of templates"), ("", "line 1: a list of templates"),
    ("- {id: a\n  task", "not YAML.*line 2")])
def test_faults_of_a_template_file(tmp_path, text, message):
    (tmp_path/"t.yaml").write_text(text)
    with pytest.raises(UserError, match=r"(?s)t\.yaml.*" + message): read_templates(tmp_path/"t.yaml")

def test_all_faults_are_told_at_once(tmp_path):
    rows = [GOOD, GOOD.replace("id: a", "id: b").replace("seen", "sen"), "\n", GOOD.replace("adversarial", "chat"),
            GOOD.replace("id: a", "id: c").replace("{title_seq}", "{title_seq:sort=up}. {x}")]
    (tmp_path/"t.yaml").write_text("".join(rows))
    with pytest.raises(UserError, match="t.yaml has 6 faults:") as e: read_templates(tmp_path/"t.yaml")
    found = [line.strip().split(": ")[0] for line in str(e.value).splitlines()[1:]]
    assert found == ["line 2, column 47", "line 4, column 8", "line 4, column 17", *["line 5, column 59"]*3]

def test_braces_go_through_every_path(tmp_path):
    "Words, slips, nonsense, a blank, the words of Figure 1, and the file a run keeps."
    import string, yaml
    from ganprompt.scorer import BLANK, blanked
    for t in BRACED:
        assert {n for n in T.slots(t["text"])} >= {"purchase_history", "target_item"}
        plain = (string.Formatter().vformat(in_words(t["text"]), (), {}) if "{" not in in_words(t["text"])
                 else in_words(t["text"]))
        assert "[history" in plain and "[item" in plain and "{{" not in in_words(t["text"]).replace("{{x}}", "")
        filled = dict(user_entity="The user", purchase_history=["a", "b"], attribute="oat")
        assert (render(blanked(t["text"]), **filled)
                == render(t["text"].replace("{target_item:case=upper}", "{target_item}"), target_item=BLANK, **filled))
    made = T.nonsense(sorted(T.fixed_words(BRACED[0]["text"])), 200)
    turned = sum(m["text"].index("{target_item") < m["text"].index("{purchase_history") for m in made)
    assert 40 < turned < 95 # one in three asks about the item first
    assert all(m["id"] == f"nonsense-{i}" and m["text"].count(f"cut=0.{i}}}") == 2 for i, m in enumerate(made, 1))
    bank = [dict(zip(T.TEMPLATE_FIELDS, (t["id"], "recommendation", "g", "seen", t["text"]))) for t in BRACED] + made
    (tmp_path/"t.yaml").write_text(yaml.safe_dump(bank, sort_keys=False))
    assert read_templates(tmp_path/"t.yaml") == bank and any("{{" in t["text"] for t in made)

def test_titles_with_tags_or_scripts_are_counted(monkeypatch, tmp_path):
    run = fake_data(monkeypatch, tmp_path, ["<b>Rug</b>", "var a = 1;", "Oak <3", None])
    folder = prompts.make_prompts(prompts.PromptsSettings(run))
    import json
    assert prompts.load_titles(run) == ["Rug", "unknown item", "Oak <3", "unknown item"]
    assert (json.loads((folder/"manifest.json").read_text())["metrics"]
            == {"items": 4, "without_title": 2, "titles_with_tags_or_scripts": 2})

def test_missing_template_file(tmp_path):
    with pytest.raises(UserError, match="no template file"): read_templates(tmp_path/"none.yaml")

def fake_data(monkeypatch, tmp_path, rows):
    "A data stage without the data chapter."
    from ganprompt.runs import stage
    make = lambda folder: pl.DataFrame({"item": range(len(rows)), "title": rows},
                                       schema={"item": pl.Int32,
                                               "title": pl.String}).write_parquet(folder/"items.parquet")
    stage(tmp_path/"r", "data", {}, make)
    monkeypatch.setattr(prompts, "dataset_info", lambda run: {"dataset": "sports", "titles_missing": "name the column"})
    return tmp_path/"r"

def test_no_titles_says_why(monkeypatch, tmp_path):
    run = fake_data(monkeypatch, tmp_path, [None, ""])
    with pytest.raises(UserError, match="'sports' has no item titles.*name the column"):
        prompts.make_prompts(prompts.PromptsSettings(run))
    assert sorted(p.name for p in run.iterdir() if not p.name.startswith(".")) == ["data"]

def test_stage(monkeypatch, tmp_path):
    run = fake_data(monkeypatch, tmp_path, ["A &amp; B", None, " C"])
    folder = prompts.make_prompts(prompts.PromptsSettings(run))
    assert prompts.load_titles(run) == ["A & B", "unknown item", "C"] and prompts.load_templates(run) == TEXT
    assert (json.loads((folder/"manifest.json").read_text())["metrics"]
            == {"items": 3, "without_title": 1, "titles_with_tags_or_scripts": 0})
    when = (folder/"manifest.json").stat().st_mtime_ns
    assert prompts.make_prompts(prompts.PromptsSettings(run)) == folder
    assert (folder/"manifest.json").stat().st_mtime_ns == when


def test_two_slots_that_touch_words_are_one_fault():
    (fault,) = T._faults_of_slots("bought:{purchase_history} next:{target_item} ?", "recommendation")
    assert "white space" in fault and "{purchase_history} lacks it" in fault

@pytest.mark.parametrize("kind", ["t5", "bert", "causal"])
def test_pocket_tokenizers_have_met_every_case(kind, tmp_path):
    """Titles in capitals or small letters take hardly more tokens than as they are, none of them unknown, and after the
    model's folder has been read again: a pocket T5 keeps case, a pocket BERT does not."""
    from ganprompt.backbones import bert_tokenizer, pocket_model, t5_tokenizer
    from ganprompt.models import load_tokenizer
    some = [t.title() for t in titles(50)]
    made = (bert_tokenizer if kind == "bert" else t5_tokenizer)(some, TEXT["recommendation"].split() + ["yes"])
    for part in (pocket_model(kind, made, 16, 1), made): part.save_pretrained(tmp_path)
    read = load_tokenizer(tmp_path)
    def ids(how): return PromptEncoder(read, "{title_seq" + how + "}", some, 99, 50).ids(range(50))
    plain, upper, lower = ids(""), ids(":case=upper"), ids(":case=lower")
    assert read.unk_token_id not in plain + upper + lower and (plain == upper == lower) == (kind == "bert")
    assert max(len(upper), len(lower)) < 1.1*len(plain)
