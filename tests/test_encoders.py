"""Encoders of every kind with random weights: states, stage 1 in parts and in two processes, recommenders on top; real
models where the environment variable GANPROMPT_REAL names a folder that holds minilm and smollm2."""
import os, shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
import transformers as tf
from conftest import make
from test_equations import TEMPLATES, TITLES, WORDS, in_numbers, shoppers, tiny_reader
from tokenizers import ByteLevelBPETokenizer, processors

from ganprompt import encoder, models, scorer
from ganprompt.backbones import BackbonesSettings, adamw, bert_tokenizer, kind_named, pocket_model
from ganprompt.encoder import (COUPLINGS, TARGETS, EncoderSettings, Versions, adversarial_update, contrast,
                               discriminator, target_faults, version_states)
from ganprompt.models import (blank_of, check_encoder, encode, encoder_kind, load_encoder, load_tokenizer, longest,
                              vocabulary_words, width_of)
from ganprompt.recommender import Ranker, RecommenderSettings, kind_faults, list_auc, tune_on_states
from ganprompt.files import UserError
from ganprompt.processes import in_processes, seed_all
from ganprompt.scorer import Questions, States, describe, free_memory, load_recommender

TEXTS = [*TITLES, *(t.replace("{", "").replace("}", "") for t in TEMPLATES.values()), *WORDS, "yes no , ?"]
REAL = Path(os.environ.get("GANPROMPT_REAL", "-"))
BATCH = np.arange(5)


def byte_tokenizer(ends):
    "A byte-level tokenizer, with RoBERTa's ends or without any."
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([f" {t}" for t in TEXTS]*3, vocab_size=500, min_frequency=1, show_progress=False,
                            special_tokens=specials)
    inner, names = bpe._tokenizer, ("bos_token", "pad_token", "eos_token", "unk_token", "mask_token")
    if not ends: return tf.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    inner.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, cls_token="<s>", sep_token="</s>",
                                      **dict(zip(names, specials)))


SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
             hidden_dropout_prob=0., attention_probs_dropout_prob=0., initializer_range=.2) # .02 is for a width of 768
LLAMA = {k: v for k, v in SIZES.items() if "dropout" not in k}
MADE = {
    "t5": lambda t: pocket_model("t5", t, 32, 1),
    "bert": lambda t: tf.BertForMaskedLM(tf.BertConfig(vocab_size=len(t), **SIZES)),
    "minilm": lambda t: tf.BertModel(tf.BertConfig(vocab_size=len(t), **SIZES)),
    "roberta": lambda t: tf.RobertaForMaskedLM(tf.RobertaConfig(vocab_size=len(t), max_position_embeddings=66,
                                                                  **SIZES)),
    "llama": lambda t: tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=len(t), **LLAMA)),
    "gpt2": lambda t: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=len(t), n_embd=32, n_layer=2, n_head=2,
                                                       resid_pdrop=0., embd_pdrop=0., attn_pdrop=0., bos_token_id=2,
                                                       eos_token_id=2))}
KIND = {"t5": "t5", "bert": "bert", "minilm": "bare", "roberta": "bert", "llama": "causal", "gpt2": "causal"}


def tokenizer_for(name):
    if name in ("t5", "llama"): return tiny_reader().tokenizer
    if name in ("roberta", "gpt2"): return byte_tokenizer(name == "roberta")
    return bert_tokenizer(TITLES*3, [w for t in TEXTS for w in t.split()])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    "Name -> folder of a model with random weights and its tokenizer."
    home = tmp_path_factory.mktemp("encoders")
    for name, made in MADE.items():
        tokenizer = tokenizer_for(name)
        seed_all(0)
        made(tokenizer).save_pretrained(home/name)
        tokenizer.save_pretrained(home/name)
    return {name: home/name for name in MADE}


def world(folder):
    "A model, and a `Reader` of twelve items that reads for it."
    reader = tiny_reader()
    reader.tokenizer = load_tokenizer(str(folder))
    return reader, load_encoder(folder)


# Chapter 08: any of them as an encoder

@pytest.mark.parametrize("name", MADE)
def test_every_kind_is_an_encoder(name, folders):
    reader, model = world(folders[name])
    assert encoder_kind(folders[name]) == KIND[name] == kind_named(str(folders[name]))
    assert width_of(model) == width_of(folders[name]) == 32 and blank_of(reader.tokenizer) in (
        "<extra_id_0>", "[MASK]", "<mask>", "something")
    check_encoder(model)
    versions = Versions(reader, WORDS, shoppers(5)[0], KIND[name])
    alone = []
    with torch.no_grad():
        for prompt in versions.prompts(BATCH):
            own = (model.encoder if name == "t5" else model.base_model)(torch.tensor([prompt])).last_hidden_state
            alone.append(own[0].mean(0).numpy())
    np.testing.assert_allclose(version_states(model, versions, 2).reshape(15, -1), alone, atol=1e-5)


def test_a_text_that_is_too_long_is_told(folders):
    model, long = load_encoder(folders["roberta"]), torch.full((1, 65), 7)
    assert longest(model) == 64 and encode(model, long[:, 1:], long[:, 1:] > 0).shape == (1, 64, 32)
    with pytest.raises(UserError, match="65 tokens and .*reads 64; lower --history"): encode(model, long, long > 0)


def test_a_model_that_minds_padding_is_refused(folders):
    model = load_encoder(folders["minilm"])
    own = model.forward
    model.forward = lambda input_ids, attention_mask: own(input_ids=input_ids)
    with pytest.raises(UserError, match="type bert does not read a padded text"): check_encoder(model)


def test_words_of_a_vocabulary(folders):
    for name in "t5", "minilm", "gpt2":
        tokenizer = load_tokenizer(str(folders[name]))
        words = vocabulary_words(tokenizer)
        assert {"oak", "tin", "chair"} <= set(words), name
        long = [tokenizer(f" {w}", add_special_tokens=False).input_ids for w in words if len(w) > 2]
        assert set(map(len, long)) == {1}, name


@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2"])
def test_a_blank_is_a_token_or_a_word(name, folders):
    reader, _ = world(folders[name])
    tokenizer = reader.tokenizer
    questions = Questions(reader, {}, shoppers(1)[0])
    said, asked = questions.context(0), questions.ids(0, 3)
    assert said != asked and (tokenizer.mask_token is None or said.count(tokenizer.mask_token_id) == 1)
    assert (" something" in tokenizer.decode(said)) == (name == "gpt2")


# Chapter 12: what each of them can learn to predict

def stage_1(folder, coupling="cooperative", lm_target="next-title", part=0, lr=0.):
    reader, model = world(folder)
    seed_all(1)
    versions = Versions(reader, WORDS, shoppers(7)[0], encoder_kind(folder))
    D = discriminator(32, 3)
    (opt_g, schedule), (opt_d, _) = adamw(model.parameters(), lr, 30, "adam"), adamw(D.parameters(), lr, 1, "adam")
    p = EncoderSettings(gamma=.5, coupling=coupling, lm_target=lm_target, encoder_part=part)
    return model, versions, in_numbers(adversarial_update(model, D, versions, opt_g, schedule, opt_d, p))


def gradients(model): return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


ASKED = [(name, target) for name in MADE for target in TARGETS[KIND[name]]]


@pytest.mark.parametrize("name, lm_target", ASKED)
@pytest.mark.parametrize("coupling", COUPLINGS)
def test_a_batch_in_parts_has_the_gradients_of_the_whole(name, lm_target, coupling, folders):
    found = []
    for part in 0, 2, 1:
        model, _, update = stage_1(folders[name], coupling, lm_target, part)
        row = update(np.arange(7), np.random.default_rng(3))
        found.append((gradients(model), row))
    (whole, terms), *others = found
    assert max(g.abs().max() for g in whole.values()) > 1e-2 and terms["lm"] > 0
    for parts, row in others:
        assert row == pytest.approx(terms, abs=1e-5) and parts.keys() == whole.keys()
        for k, g in whole.items(): torch.testing.assert_close(parts[k], g, atol=1e-5, rtol=0, msg=k)


def test_dropout_is_the_same_when_a_part_is_read_again(folders):
    "The gradient of a batch in parts is that of what was computed first: numerically, along itself."
    model, versions, _ = stage_1(folders["minilm"])
    for m in model.modules():
        if isinstance(m, torch.nn.Dropout): m.p = .5
    model = model.train().double()
    def loss():
        seed_all(5)
        read = lambda at: encoder.pooled(model, versions.titles(at), 0)
        return sum((x**3).sum() for x in encoder.in_parts(read, 5, 2))
    loss().backward()
    weight = model.embeddings.word_embeddings.weight
    slope = weight.grad/weight.grad.norm()
    with torch.no_grad():
        ends = []
        for step in (1e-4, -1e-4):
            weight += step*slope
            ends.append(loss().item())
            weight -= step*slope
    assert (ends[0] - ends[1])/2e-4 == pytest.approx(weight.grad.norm().item(), rel=1e-2)


def test_a_title_is_told_from_the_batchs_others():
    "By hand: cosines 1, 0 and 0, .8 of two histories and two titles at a temperature of .5."
    a, b = torch.tensor([[2., 0.], [0., 1.]]), torch.tensor([[1., 0.], [.6, .8]])
    s = np.array([[1, .6], [0, .8]])/.5
    rows, columns = (np.log(np.exp(s).sum(axis)) - s.diagonal() for axis in (1, 0))
    assert contrast(a, b, .5).item() == pytest.approx((rows.mean() + columns.mean())/2, abs=1e-6)
    same = torch.tensor([[False, True], [True, False]])
    assert contrast(a, b, .5, same).item() == 0 # nothing is left to be told apart from


def test_histories_with_the_same_next_item_are_no_wrong_answers(folders):
    model, versions, _ = stage_1(folders["minilm"])
    versions.nexts = np.array([3, 3, 8, 8, 1, 3, 0])
    x = torch.tensor(version_states(model, versions))
    rng = np.random.default_rng(2)
    chosen = np.random.default_rng(2).integers(3, size=7)
    got = encoder.language_loss(model, versions, np.arange(7), x, EncoderSettings(temperature=.2), rng).item()
    with torch.no_grad(): y = torch.cat([encoder.pooled(model, versions.titles([r]), 0) for r in range(7)]).numpy()
    unit = lambda v: v/np.linalg.norm(v, axis=-1, keepdims=True)
    s = unit(x.numpy()[np.arange(7), chosen]) @ unit(y).T/.2
    s[(versions.nexts[:, None] == versions.nexts) & ~np.eye(7, dtype=bool)] = -np.inf
    wanted = np.mean([np.log(np.exp(s).sum(axis)) - s.diagonal() for axis in (0, 1)])
    assert got == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_masked_tokens_are_restored_where_they_stood(name, folders):
    _, versions, _ = stage_1(folders[name])
    mask = versions.tokenizer.mask_token_id
    for seed in range(20):
        ids, labels = versions.text_pair(seed % 7, "denoise", np.random.default_rng(seed))
        hidden = [i for i, t in enumerate(ids) if t == mask]
        assert hidden == [i for i, t in enumerate(labels) if t != -100] and len(hidden) >= 1
        whole = [labels[i] if i in hidden else t for i, t in enumerate(ids)]
        assert whole in [versions.ids(seed % 7, v) for v in range(3)]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_causal_model_goes_on(name, folders):
    _, versions, _ = stage_1(folders[name])
    tokenizer, said = versions.tokenizer, set()
    for seed in range(20):
        row = seed % 7
        ids, labels = versions.text_pair(row, "next-title", np.random.default_rng(seed))
        first = next(i for i, t in enumerate(labels) if t != -100)
        assert ids[first:] == labels[first:] == versions.plain.titles[versions.nexts[row]] + versions.plain.end
        text = tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert text.endswith(f"{TITLES[versions.past[row][-1]]} , {TITLES[versions.nexts[row]]}")
        ids, labels = versions.text_pair(row, "answer", np.random.default_rng(seed))
        assert [t for t in labels if t != -100] == ids[-1:] and "next ?" in tokenizer.decode(ids[:-1])
        said.add(tokenizer.decode(ids[-1:]).strip())
    assert said == {"yes", "no"}


@pytest.mark.parametrize("name", ["minilm", "bert", "llama"])
def test_every_kind_learns_and_spreads_its_versions(name, folders):
    model, versions, update = stage_1(folders[name], lr=3e-3)
    rows = [update(np.arange(7), np.random.default_rng(s)) for s in range(60)]
    first, last = rows[0], rows[-1]
    assert last["cos"] < first["cos"] - .1 and last["lm"] < first["lm"]
    assert last["d_accuracy"] > .75 > .5 > first["d_accuracy"]


def test_two_processes_tell_each_other_their_vectors(folders):
    def work():
        model, _, update = stage_1(folders["minilm"], part=2)
        row = update(np.arange(7), np.random.default_rng(3))
        small = update(np.arange(1), np.random.default_rng(3)) # one of them has no row
        return {k: g.numpy() for k, g in gradients(model).items()}, row, small
    (alone, *terms), (both, *too) = work(), in_processes(2, work)
    for a, b in zip(terms, too): assert b == pytest.approx(a, abs=1e-5)
    assert alone.keys() == both.keys()
    for k, g in alone.items(): np.testing.assert_allclose(both[k], g, atol=1e-5, err_msg=k)


@pytest.mark.parametrize("kind, target, said", [
    ("bare", "denoise", "BERT's family, which has nothing to say it with; choose next-title"),
    ("bare", "answer", "choose next-title"), ("bert", "answer", "choose next-title or denoise"),
    ("causal", "denoise", "choose next-title or answer")])
def test_what_an_encoder_cannot_say_is_refused(kind, target, said, folders):
    assert said in target_faults(kind, target)[0]
    name = next(n for n, k in KIND.items() if k == kind)
    p, values = EncoderSettings(lm_target=target), {"encoder": str(folders[name])}
    assert p.fits(values) == target_faults(kind, target) and not EncoderSettings().fits(values)
    assert not p.fits({"encoder": "pocket"}) and not p.fits({"encoder": "org/not-fetched-yet"})


def test_what_needs_a_t5_is_refused_before_work_starts(folders):
    from ganprompt.p5 import P5Settings
    values = {"encoder": str(folders["minilm"])}
    for kind in "t5-decoder", "t5-ranker":
        said, = RecommenderSettings(recommender=f"{kind},ranker").fits(values)
        assert f"{kind!r} is a T5's own decoder" in said and "causal-lm or ranker" in said
        assert not RecommenderSettings(recommender=kind).fits({"encoder": "pocket"})
    assert not kind_faults("ranker", "t5") and not kind_faults("causal-lm", "bare")
    assert "a T5 is needed" in P5Settings().fits(values)[0] and not P5Settings().fits({"encoder": "pocket"})
    assert not BackbonesSettings(**values).check()


def test_models_that_were_brought_are_found_by_their_hub_names(folders, tmp_path, monkeypatch):
    from ganprompt.models import find_model
    name, other = "sentence-transformers/all-MiniLM-L6-v2", "HuggingFaceTB/SmolLM2-135M-Instruct"
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **more: 1/0) # no cache
    shutil.copytree(folders["minilm"], tmp_path/"models/minilm")
    monkeypatch.setenv("GANPROMPT_REAL", str(tmp_path/"models"))
    assert find_model(name) == tmp_path/"models/minilm" and kind_named(name) == "bare"
    assert find_model(other) is None is find_model("org/minilm")
    monkeypatch.setenv("GANPROMPT_REAL", "")
    monkeypatch.chdir(tmp_path/"models")
    assert find_model(name) is None


# Chapter 36: gathering, with any encoder

@pytest.mark.parametrize("name", MADE)
def test_any_encoder_can_gather(name, folders):
    "Without a decoder nothing is written; the contrast is the loss, and it falls."
    from ganprompt.backbones import adamw
    from ganprompt.gather import GatherSettings, gather_losses, gather_update
    reader, model = world(folders[name])
    (rows, _), p = shoppers(24), GatherSettings(gather_same=1.)
    asked = [Questions(reader, {}, rows, attributes=False) for _ in range(2)]
    nexts, at = rows["target"].to_numpy(), np.arange(24)
    terms = gather_losses(model, reader, asked, nexts, p)(at, np.random.default_rng(0))
    assert (terms["lm"] > 0) == (KIND[name] == "t5") and terms["next"] > 0 and terms["same"] > 0
    update = gather_update(model.train(), reader, asked, nexts, *adamw(model.parameters(), 3e-3, 40), p)
    losses = [float(update(at, np.random.default_rng(i))["next"].detach()) for i in range(20)]
    assert losses[-1] < .9*losses[0]


# Chapter 14: recommenders on any encoder

@pytest.mark.parametrize("name", MADE)
def test_a_ranker_learns_on_any_frozen_encoder(name, folders, tmp_path):
    reader, _ = world(folders[name])
    (rows, kind), p = shoppers(60), RecommenderSettings(recommender_epochs=20, recommender_batch=16, patience=20,
                                                        recommender_lr=1e-2)
    rng = np.random.default_rng(0)
    others = [rng.choice([i for i in range(12) if i//6 != k], 3) for k in kind]
    items = np.column_stack([rows["target"], others])
    seed_all(0)
    model = Ranker.new(reader, {"encoder": str(folders[name])}, p)
    before = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    q = Questions(reader, {}, rows)
    contexts = [q.context(r) for r in range(60)]
    kept = States(contexts, width_of(model.encoder), model.pad_id, tmp_path/"s.bin").fill(model.encoder)
    tune_on_states(model, (kept, items), (kept, items), tmp_path, p, "test")
    scores = model.scores(q, np.arange(60), list(items))
    assert list_auc(scores) > .95
    assert all(torch.equal(v, before[k]) for k, v in model.encoder.state_dict().items())
    (tmp_path/"ranker").mkdir()
    model.save(tmp_path/"ranker"); describe(tmp_path/"ranker", "ranker", {"encoder": str(folders[name])}, p)
    again = load_recommender(tmp_path/"ranker", reader).scores(q, np.arange(60), list(items))
    np.testing.assert_allclose(again, scores, atol=1e-6)


def test_the_whole_pipeline_on_another_encoder(shop, folders, tmp_path):
    "Stage 1 and both recommenders, from the command's settings to scores."
    folder = make(tmp_path/"run", "recommender", shop, encoder=str(folders["minilm"]), recommender="ranker,causal-lm",
                  recommender_epochs=1)
    scores = pl.read_parquet(folder/"scores.parquet")
    assert set(scores["model"]) == {f"{start}, {kind}" for start in ("no-stage-1", "ganprompt")
                                    for kind in ("ranker", "causal-lm")}
    assert scores["scores"].explode().is_finite().all()
    assert encoder_kind(tmp_path/"run/encoder/model") == "bare"


# Chapter 13: states of sixteen bits, and memory that is really free

def test_states_of_sixteen_bits_stay_so(folders, tmp_path, monkeypatch):
    reader, model = world(folders["minilm"])
    q = Questions(reader, {}, shoppers(6)[0])
    prompts, rows = [q.context(r) for r in range(6)], np.arange(6)
    exact = States(prompts, 32, 0, tmp_path/"a.bin").fill(model)
    for module in models, scorer: monkeypatch.setattr(module, "bf16_pays", lambda: True)
    for memory, file in (1, 1), (0, 1), (0, 0):
        half = States(prompts, 32, 0, tmp_path/"b.bin", memory, file).fill(model)
        states, mask = half.get(rows)
        assert states.dtype == torch.bfloat16 and half.bytes*2 == exact.bytes
        used = mask == 1
        torch.testing.assert_close(states[used].float(), exact.get(rows)[0][used], atol=.05, rtol=.05)
        half.drop()


@pytest.mark.parametrize("version", [1, 2])
def test_a_containers_limit_counts(version, tmp_path):
    "3 GB available; the inner group may take 2 GB and has 1.5, of which .25 can be given back; the outer one is wider."
    proc = tmp_path/"proc"
    (proc/"self").mkdir(parents=True)
    (proc/"meminfo").write_text("MemTotal: 9000000 kB\nMemFree: 1 kB\nMemAvailable: 3000000 kB\n")
    assert free_memory(tmp_path) == 3000000*1024
    limit, used, kind = (("memory.max", "memory.current", "") if version == 2
                         else ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory"))
    (proc/"self/cgroup").write_text(f"7:cpu:/a\n{0 if version == 2 else 4}:{kind}:/outer/inner\n")
    outer = tmp_path/"sys/fs/cgroup"/kind/"outer"
    for folder, most, taken in (outer/"inner", "2000000000", "1500000000"), (outer, "max", "1600000000"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder/limit).write_text(f"{most}\n"); (folder/used).write_text(f"{taken}\n")
        (folder/"memory.stat").write_text("anon 5\ninactive_file 250000000\n")
    assert free_memory(tmp_path) == 750_000_000
    (outer/limit).write_text("1700000000")
    assert free_memory(tmp_path) == 350_000_000


# Real models

real = pytest.mark.skipif(not (REAL/"minilm").is_dir(), reason="GANPROMPT_REAL names no folder with minilm and smollm2")


@real
@pytest.mark.parametrize("name", ["minilm", "smollm2"])
def test_a_real_model_is_an_encoder(name):
    "Titles about the same thing are nearer to each other than to others; one step of stage 1 in parts."
    reader, model = world(REAL/name)
    check_encoder(model)
    reader.titles = ["rose shampoo for dry hair", "hair conditioner with rose", "steel garden spade", "garden shovel"]
    ids = Versions(reader, WORDS, shoppers(4)[0].with_columns(target=pl.Series([0, 1, 2, 3])), encoder_kind(REAL/name))
    with torch.no_grad(): x = encoder.pooled(model, ids.titles(range(4)), reader.tokenizer.pad_token_id)
    x = torch.nn.functional.normalize(x - x.mean(0), dim=-1)
    s = (x @ x.T).fill_diagonal_(-9)
    assert s.argmax(-1).tolist() == [1, 0, 3, 2]


# Chapter 11: a causal model names attribute words

def test_a_causal_model_names_words_by_how_it_goes_on(folders):
    from ganprompt.attributes import fill, slot_ids, word_counts
    reader, model = world(folders["gpt2"])
    tokenizer = reader.tokenizer
    words = [slot_ids(tokenizer, w) for w in ("oak", "tin", "chair")]
    assert [tokenizer.decode(i) for i in words] == [" oak", " tin", " chair"] and {len(i) for i in words} == {1}
    prompts, ids = [tokenizer("you should focus on").input_ids, tokenizer("focus on").input_ids], [i[0] for i in words]
    got = fill(model, tokenizer, prompts, ids)
    for row, prompt in zip(got, prompts):
        with torch.no_grad(): z = model(torch.tensor([prompt])).logits[0, -1, ids].log_softmax(-1)
        np.testing.assert_allclose(row, z, atol=1e-5)
    assert word_counts(tokenizer, ["Oak bowl, 8 oz", "oaken chair"], [[0, 1], [0]]) == {"oak": 2, "bowl": 2, "oaken": 1,
                                                                                      "chair": 1}
    assert not BackbonesSettings(bert=str(folders["gpt2"])).check()
