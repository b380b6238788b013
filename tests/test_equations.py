"""The paper's equations as the library computes them, against numpy and plain forward passes on a tiny shop; and
models that must learn in the right direction."""
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from scipy.spatial.distance import jensenshannon

from ganprompt.files import root
from ganprompt.processes import later, seed_all
from ganprompt.templates import read_templates
from ganprompt.backbones import Epochs, Reader, adamw, descend, pocket_model, t5_tokenizer
from ganprompt.encoder import (COUPLINGS, EncoderSettings, Versions, adversarial_update, contrast, cosine,
                               discriminator, js, pool, separability, split_users, total, version_loss, version_states)
from ganprompt.scorer import Questions, States, bank_for, describe, load_recommender, scores_of
from ganprompt.recommender import (Best, RecommenderSettings, T5Decoder, T5Ranker, Trained, divergence, list_auc,
                                   rec_loss, sample_rows, train_with_patience, training_items, tune_on_states)
from ganprompt.gather import GatherSettings, gather_update
from ganprompt import encoder, gather, recommender

KINDS, THINGS = ("oak", "tin"), ("bowl", "desk lamp", "chair", "spoon", "shelf", "clock")
TITLES = [f"{kind} {thing}" for kind in KINDS for thing in THINGS]
TEMPLATES = {"recommendation": "The user bought {purchase_history} . Does the user buy {target_item} next ?",
             "adversarial": "Focus on {attribute} : {title_seq}"}
WORDS = ["round", "old"]


def tiny_reader():
    "A `Reader` of twelve items, without a run."
    reader = Reader.__new__(Reader)
    words = sorted({w for t in TEMPLATES.values() for w in t.split() if "{" not in w}
                   | set("yes no , Focus on .".split()) | set(WORDS))
    reader.__dict__ |= dict(titles=TITLES, templates=TEMPLATES, noun="things", title_tokens=4, history_items=3,
                            tokenizer=t5_tokenizer(TITLES*3, words))
    return reader


def shoppers(n, seed=0):
    "Rows of shoppers who stay with one kind of thing: the next item is of the kind of the history."
    rng = np.random.default_rng(seed)
    kind, length = rng.integers(2, size=n), rng.integers(1, 4, size=n)
    history = [(6*k + rng.choice(6, m, replace=False)).tolist() for k, m in zip(kind, length)]
    target = [int(rng.choice([i for i in range(6*k, 6*k + 6) if i not in h])) for k, h in zip(kind, history)]
    return pl.DataFrame({"user": np.arange(n), "history": history, "target": target}), kind


@pytest.fixture
def world():
    seed_all(0)
    reader = tiny_reader()
    model = pocket_model("t5", reader.tokenizer, 32, 1)
    with torch.no_grad():
        for p in model.parameters(): p.mul_(1.5) # states apart, answers far from a coin's
    return reader, model.eval()


def states_alone(model, ids):
    "Encoder states of one prompt, read by itself."
    with torch.no_grad(): return model.encoder(input_ids=torch.tensor([ids])).last_hidden_state[0].double().numpy()


def softmax(z): return np.exp(z - z.max(-1, keepdims=True))/np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)


# Section 3.2.3: D_cos, D_JS, D_total; section 3.2.4: the discriminator

def test_pool_is_the_mean_over_tokens():
    states, mask = torch.tensor([[[1., 2.], [3., 6.], [9., 9.]]]), torch.tensor([[1, 1, 0]])
    assert pool(states, mask).tolist() == [[2., 4.]]


def test_cosine_and_divergence_over_all_pairs():
    x = np.random.default_rng(1).normal(size=(3, 4, 5))
    pairs = [(a, b) for h in x for i, a in enumerate(h) for b in h[i + 1:]]
    cos = np.mean([a @ b/np.linalg.norm(a)/np.linalg.norm(b) for a, b in pairs])
    div = np.mean([jensenshannon(softmax(a), softmax(b))**2 for a, b in pairs])
    assert cosine(torch.tensor(x)).item() == pytest.approx(cos) and js(torch.tensor(x)).item() == pytest.approx(div)


def test_the_total_rewards_what_lies_apart():
    "By hand: .5 * .8 - .25 * .4 = .3 by default; as printed, .5."
    assert total(.8, .4, .5, .25) == pytest.approx(.3) and total(.8, .4, .5, .25, 1) == pytest.approx(.5)
    near, far = torch.tensor([[[1., 0.], [1., .1]]]), torch.tensor([[[5., 0.], [0., 5.]]])
    assert total(cosine(far), js(far)) < total(cosine(near), js(near))


def perceptron(D, x):
    "The discriminator's logits in numpy."
    layers = [(m.weight.detach().double().numpy(), m.bias.detach().double().numpy()) for m in D if hasattr(m, "weight")]
    for i, (w, b) in enumerate(layers): x = x @ w.T + b if i == len(layers) - 1 else np.maximum(x @ w.T + b, 0)
    return x


def test_the_discriminator_names_versions_by_cross_entropy():
    D, x = discriminator(5, 3), np.random.default_rng(2).normal(size=(4, 3, 5))
    p = softmax(perceptron(D, x))
    loss, accuracy = version_loss(D, torch.tensor(x, dtype=torch.float32))
    assert loss.item() == pytest.approx(-np.log(p[:, np.arange(3), np.arange(3)]).mean(), abs=1e-5)
    assert accuracy.item() == pytest.approx((p.argmax(-1) == np.arange(3)).mean())


# Section 3.4.1: L_G, term by term

def in_numbers(update):
    "An update whose figures are read at once."
    return lambda rows, rng: later(update(rows, rng))()


def stage1(world, coupling="cooperative", js_sign=-1, lr=0., gamma=.3, alpha=.7, beta=.2):
    reader, model = world
    rows, _ = shoppers(5)
    versions, D = Versions(reader, WORDS, rows), discriminator(32, 3)
    (opt_g, schedule), (opt_d, _) = adamw(model.parameters(), lr, 30, "adam"), adamw(D.parameters(), lr, 1, "adam")
    p = EncoderSettings(alpha=alpha, beta=beta, gamma=gamma, js_sign=js_sign, coupling=coupling,
                        lm_target="next-title")
    return versions, D, in_numbers(adversarial_update(model, D, versions, opt_g, schedule, opt_d, p))


def title_loss(model, versions, rows, rng):
    """L_LM: mean cross-entropy of the tokens of the next title, each history in one version drawn at random and read
    alone."""
    lost, tokens = 0, 0
    for r in rows:
        ids = versions.ids(r, int(rng.integers(len(WORDS) + 1)))
        labels = versions.plain.titles[versions.nexts[r]] + versions.plain.end
        before = torch.tensor([[model.config.decoder_start_token_id, *labels[:-1]]])
        with torch.no_grad():
            p = softmax(model(input_ids=torch.tensor([ids]), decoder_input_ids=before).logits[0].double().numpy())
        lost, tokens = lost - np.log(p[np.arange(len(labels)), labels]).sum(), tokens + len(labels)
    return lost/tokens


@pytest.mark.parametrize("coupling, js_sign", [("cooperative", -1), ("adversarial", -1), ("none", 1)])
def test_stage_1_computes_the_loss_of_section_3_4_1(coupling, js_sign, world):
    versions, D, update = stage1(world, coupling, js_sign)
    model, rows = world[1], np.arange(5)
    x = np.stack([[states_alone(model, versions.ids(r, v)).mean(0) for v in range(3)] for r in rows])
    pairs = [(a, b) for h in x for i, a in enumerate(h) for b in h[i + 1:]]
    cos = np.mean([a @ b/np.linalg.norm(a)/np.linalg.norm(b) for a, b in pairs])
    div = np.mean([jensenshannon(softmax(a), softmax(b))**2 for a, b in pairs])
    p = softmax(perceptron(D, x))
    named, lm = -np.log(p[:, np.arange(3), np.arange(3)]).mean(), title_loss(model, versions, rows,
            np.random.default_rng(7))
    got, coupled = update(rows, np.random.default_rng(7)), {"cooperative": 1, "adversarial": -1, "none": 0}[coupling]
    wanted = dict(lm=lm, cos=cos, js=div, total=.7*cos + js_sign*.2*div, d_loss=named,
                  d_accuracy=(p.argmax(-1) == np.arange(3)).mean(),
                  loss=lm + .3*(.7*cos + js_sign*.2*div + coupled*named))
    for name, value in wanted.items(): assert got[name] == pytest.approx(value, abs=2e-4), name


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_the_coupling_moves_the_encoder_its_way(coupling, world):
    "A discriminator held still: its loss falls with a cooperative encoder, rises with an adversarial one."
    versions, D, _ = stage1(world)
    model = world[1]
    (opt_g, schedule), (opt_d, _) = adamw(model.parameters(), 1e-3, 30, "adam"), adamw(D.parameters(), 0., 1, "adam")
    p = EncoderSettings(alpha=0., beta=0., gamma=100., js_sign=-1, coupling=coupling, lm_target="next-title")
    update = in_numbers(adversarial_update(model, D, versions, opt_g, schedule, opt_d, p))
    lost = [update(np.arange(5), np.random.default_rng(s))["d_loss"] for s in range(12)]
    change = lost[-1] - lost[0]
    assert (change < -.01 if coupling == "cooperative" else change > .01 if coupling == "adversarial"
            else abs(change) < .1)


def test_the_default_spreads_versions_and_the_printed_sign_gathers_them(world):
    apart = {}
    for sign in (-1, 1):
        seed_all(1)
        reader = world[0]
        model = pocket_model("t5", reader.tokenizer, 32, 1)
        _, _, update = stage1((reader, model), "none", sign, 3e-3, 100., 0., 10.)
        apart[sign] = [update(np.arange(5), np.random.default_rng(s))["js"] for s in range(15)]
    assert apart[-1][-1] > 2*apart[-1][0] and apart[1][-1] < .7*apart[1][0]


def test_what_the_language_model_is_to_say(world):
    """Denoising: put back, the dropped spans give the prompt, and its end stands once. Answers: yes for what was
    bought, and for nothing else."""
    versions, _, _ = stage1(world)
    end, tokenizer = versions.plain.end, world[0].tokenizer
    no, yes = tokenizer.convert_tokens_to_ids(["▁no", "▁yes"])
    said = {yes: set(), no: set()}
    for seed in range(40):
        r = seed % 5
        left, dropped = versions.text_pair(r, "denoise", np.random.default_rng(seed))
        assert left[-1:] == dropped[-1:] == end and end[0] not in left[:-1] + dropped[:-1]
        spans, now = {}, None
        for t in dropped[:-1]:
            if t in versions.sentinels: spans[now := t] = []
            else: spans[now].append(t)
        whole = [x for t in left[:-1] for x in spans.get(t, [t])]
        assert whole + end in [versions.ids(r, v) for v in range(3)] and any(spans.values())
        ids, label = versions.text_pair(r, "answer", np.random.default_rng(seed))
        assert label[1:] == end
        said[label[0]].add(tuple(ids))
    asked_for = {tuple(versions.recommend.ids(versions.past[r], int(versions.nexts[r]), w)) for r in range(5)
                 for w in (None, *WORDS)}
    owned = {tuple(versions.recommend.ids(versions.past[r], i, w)) for r in range(5) for w in (None, *WORDS)
             for i in versions.past[r]}
    assert said[yes] and said[no] and said[yes] <= asked_for and not said[no] & (asked_for | owned)


def test_states_of_versions_are_those_of_each_prompt_alone(world):
    versions, _, _ = stage1(world)
    alone = np.stack([[states_alone(world[1], versions.ids(r, v)).mean(0) for v in range(3)] for r in range(5)])
    np.testing.assert_allclose(version_states(world[1], versions, size=2), alone, atol=1e-5)


def test_separability_of_what_is_apart_and_of_what_is_mixed():
    "Versions at the corners of a triangle; versions that do not differ: chance is one in three."
    rng, corners = np.random.default_rng(0), np.array([[9., 0], [0, 9], [-9, -9]])
    apart = separability(corners + rng.normal(size=(40, 3, 2))*.1)
    mixed = separability(rng.normal(size=(200, 1, 2)) + rng.normal(size=(200, 3, 2))*1e-3)
    assert apart["silhouette"] > .95 and apart["knn_purity"] == apart["linear_probe"] == 1.
    assert mixed["silhouette"] < .05 and mixed["knn_purity"] < .4 and abs(mixed["linear_probe"] - 1/3) < .1


def test_the_probe_is_asked_about_histories_that_it_has_not_seen():
    "Versions that lie apart in the first half of the histories, the other way round in the second."
    x = np.random.default_rng(1).normal(size=(40, 2, 3))*.1
    x[:20, 0, 0] += 5; x[20:, 1, 0] += 5
    assert separability(x)["linear_probe"] == 0.


def test_held_out_shoppers_are_not_trained_on(monkeypatch):
    "At most half of the shoppers, each by the history before the validation item; none of their training rows."
    rows = {"train": pl.DataFrame({"user": [0, 0, 1, 2, 3, 4], "history": [[1]]*6, "target": [2]*6}),
            "valid": pl.DataFrame({"user": [0, 1, 2, 3, 4], "history": [[1, 2]]*5, "target": [3]*5})}
    monkeypatch.setattr(encoder, "load_sequences", lambda run, split: rows[split])
    for wanted, n in ((2, 2), (9, 2), (1, 1)):
        train, held = split_users("run", wanted, 0)
        assert len(held) == n and held["history"].to_list() == [[1, 2]]*n and held["user"].is_sorted()
        assert set(train["user"]) == set(range(5)) - set(held["user"]) and train["user"].is_sorted()


# Section 3.4.2: the answer and its loss

def log_odds(model, reader, ids):
    "Log-odds of yes from one plain forward pass of one prompt."
    start = torch.tensor([[model.config.decoder_start_token_id]])
    with torch.no_grad():
        z = model(input_ids=torch.tensor([ids]), decoder_input_ids=start).logits[0, 0].double().numpy()
    no, yes = reader.tokenizer.convert_tokens_to_ids(["▁no", "▁yes"])
    return z[yes] - z[no]


def bce(z):
    "Mean binary cross-entropy; the first of each row was bought."
    y = np.zeros_like(z); y[:, 0] = 1
    p = 1/(1 + np.exp(-z))
    return -(y*np.log(p) + (1 - y)*np.log(1 - p)).mean()


def test_the_loss_of_an_answer_by_hand():
    "Bought at odds 3 : 1, the other at 1 : 3: -ln .75 both times. Exchanged: -ln .25."
    right = torch.tensor([[np.log(3.), -np.log(3.)]])
    assert (rec_loss(right, "yes-no").item() == pytest.approx(-np.log(.75))
            and rec_loss(-right, "yes-no").item() == pytest.approx(-np.log(.25)))
    sure = torch.log(torch.tensor([[.75, .25]]))
    assert (rec_loss(sure, "vocab").item() == pytest.approx(-np.log(.75))
            and rec_loss(sure.flip(1), "vocab").item() == pytest.approx(-np.log(.25)))


def test_scores_of_logits_by_hand():
    z = torch.tensor([[1., 3., 0., -1.]]) # no is token 0, yes is token 1
    assert scores_of(z[:, :2], "yes-no", [0, 1]).item() == pytest.approx(2.)
    assert scores_of(z, "vocab", [0, 1]).item() == pytest.approx(3 - np.log(np.exp([1, 3, 0, -1]).sum()))


def test_list_auc_by_hand():
    assert list_auc(np.array([[.5, .1, .9, .5]])) == pytest.approx((1 + 0 + .5)/3)


def test_divergence_is_the_mean_of_both_directions():
    a, b = np.array([.3, -2.]), np.array([1.5, .2])
    p, q = ([1/(1 + np.exp(-z)), 1/(1 + np.exp(z))] for z in (a, b))
    def kl(p, q): return sum(x*np.log(x/y) for x, y in zip(p, q))
    assert divergence(torch.tensor(a), torch.tensor(b)).item() == pytest.approx(((kl(p, q) + kl(q, p))/2).mean())


PLAIN, OTHER = TEMPLATES["recommendation"], "next {target_item} ? The user bought {purchase_history}"
STAGE2 = RecommenderSettings(seed=0, score="yes-no", consistency=0., recommender_lr=0., recommender_epochs=1,
                             recommender_batch=8, patience=3)


def asked(reader, rows, texts=(PLAIN,)): return [Questions(reader, {}, rows, text) for text in texts]


def kept_states(model, questions, items, folder, name="states.bin"):
    return States([p for q in questions for p in model.ask(q, items)], 32, model.pad_id,
                  folder/name).fill(model.encoder), items


def test_stage_2_computes_the_loss_of_section_3_4_2(world, tmp_path):
    """Two wordings of eight rows of three items: mean of the two losses, and three times the divergence between the
    wordings."""
    reader, t5 = world
    model, (rows, _) = T5Decoder(t5, reader), shoppers(8)
    items = np.column_stack([rows["target"], np.random.default_rng(3).integers(12, size=(8, 2))])
    questions = asked(reader, rows, (PLAIN, OTHER))
    z = np.array([[[log_odds(t5, reader, q.ids(r, int(i))) for i in items[r]] for r in range(8)] for q in questions])
    p, q = 1/(1 + np.exp(-z))
    kl = ((p*np.log(p/q) + (1 - p)*np.log((1 - p)/(1 - q))) + (q*np.log(q/p) + (1 - q)*np.log((1 - q)/(1
            - p)))).mean()/2
    sets = kept_states(model, questions, items, tmp_path), kept_states(model, questions[:1], items, tmp_path,
            "valid.bin")
    (row,) = tune_on_states(model, *sets, tmp_path, replace(STAGE2, consistency=3.), "here")
    assert (row["loss"] == pytest.approx((bce(z[0]) + bce(z[1]))/2, abs=1e-4)
            and row["apart"] == pytest.approx(3*kl, abs=1e-4))
    rest = z[0][:, 1:]
    assert row["valid_auc"] == pytest.approx(((rest < z[0][:, :1]) + .5*(rest == z[0][:, :1])).mean())


@pytest.mark.parametrize("kind", [T5Decoder, T5Ranker])
def test_a_recommender_learns_what_was_bought(kind, tmp_path):
    """Shoppers stay with one kind of thing. Two hundred steps tell the bought from the others, and give yes to the
    bought: chance is .5."""
    seed_all(0)
    reader = tiny_reader()
    model = kind(pocket_model("t5", reader.tokenizer, 32, 1), reader)
    model.encoder.decoder.requires_grad_(True)
    rows, kinds = shoppers(240)
    others = np.random.default_rng(4).integers(6, size=(240, 2)) + 6*(1 - kinds)[:, None]
    items, (q,) = np.column_stack([rows["target"], others]), asked(reader, rows)
    sets = kept_states(model, [q], items, tmp_path), kept_states(model, asked(reader, rows[200:]), items[200:],
            tmp_path, "valid.bin")
    curves = tune_on_states(model, *sets, tmp_path, replace(STAGE2, recommender_lr=1e-2, recommender_epochs=12,
            recommender_batch=16), "here")
    fresh, kinds = shoppers(60, seed=9)
    lists = np.column_stack([fresh["target"], np.random.default_rng(5).integers(6, size=(60, 3))
                             + 6*(1 - kinds)[:, None]])
    z = np.stack(model.scores(asked(reader, fresh)[0], np.arange(60), list(lists)))
    assert (list_auc(z) > .9 and curves[-1]["loss"] < .6*curves[0]["loss"]
            and (z[:, 0] > 0).mean() > .6 > .4 > (z[:, 1:] > 0).mean())


@pytest.mark.parametrize("kind", [T5Decoder, T5Ranker])
def test_every_way_of_scoring_gives_the_scores_of_one_prompt_at_a_time(kind, world):
    "Lists of unequal length, in any order; the decoder's scores are those of a plain forward pass."
    reader, t5 = world
    model, (rows, _) = kind(t5, reader), shoppers(6)
    (questions,), rng = asked(reader, rows), np.random.default_rng(6)
    lists = [rng.permutation(12)[:n] for n in (3, 12, 5, 1, 7, 12)]
    at = np.array([4, 0, 5, 2, 3])
    z = model.scores(questions, at, lists)
    assert [len(row) for row in z] == [7, 3, 12, 5, 1]
    for r, row in zip(at, z):
        alone = [model.scores(questions, np.array([r]), [None]*r + [[i]])[0][0] for i in lists[r]]
        np.testing.assert_allclose(row, alone, atol=1e-4)
        if kind is T5Decoder:
            np.testing.assert_allclose(row, [log_odds(t5, reader, questions.ids(r, int(i))) for i in lists[r]],
                                       atol=1e-4)


def test_both_signs_of_the_divergence_and_no_third():
    for sign in (-1, 1): assert not EncoderSettings(js_sign=sign).check()
    (fault,) = EncoderSettings(js_sign=0).check()
    assert "js_sign=0" in fault


def test_states_as_rows():
    "Two shoppers, three versions: shopper by shopper, version by version."
    x, held = np.arange(12.).reshape(2, 3, 2), pl.DataFrame({"user": [7, 9]})
    rows = encoder._states(x, held, "before")
    assert rows.select("stage", "user", "version").rows() == [("before", u, v) for u in (7, 9) for v in range(3)]
    assert rows["x"].to_list() == x.reshape(6, 2).tolist()


def test_a_template_has_the_word_where_it_has_a_place_for_it():
    """Asked without attribute words, only a template that names one gets it; a row without a word is asked in words
    that need none."""
    reader, (rows, _) = tiny_reader(), shoppers(2)
    rows, own = rows.with_columns(row=pl.Series([4, 5])), {4: "round"}
    q = Questions(reader, own, rows, "A {attribute} thing after {purchase_history} : is it {target_item} ?",
                  attributes=False)
    assert (q.words == ["round", None] and "round" in reader.tokenizer.decode(q.ids(0, 3))
            and "{" not in reader.tokenizer.decode(q.ids(1, 3)))
    assert (Questions(reader, own, rows, PLAIN, attributes=False).words == [None, None]
            and Questions(reader, own, rows, PLAIN).words == ["round", None])


def test_what_may_have_been_trained_on_counts_as_seen(tmp_path):
    "Another bank that repeats a seen template of ours, an unseen one, and the run's own."
    ours = [t for t in read_templates(root()/"data/templates.yaml") if t["task"] == "recommendation"]
    seen, unseen = (next(t["text"] for t in ours if (t["split"] == "seen") == wanted) for wanted in (True, False))
    other = [dict(id=f"t{i}", task="recommendation", group="mine", split="unseen-paraphrase", text=text)
             for i, text in enumerate((unseen, seen, PLAIN))]
    (path := tmp_path/"bank.yaml").write_text(yaml.safe_dump(other))
    bank = bank_for(SimpleNamespace(templates={"recommendation": PLAIN}), str(path))
    assert [(t["text"], t["split"]) for t in bank] == [(PLAIN, "seen"), (unseen, "unseen-paraphrase"), (seen, "seen")]


def test_the_causal_recommender_reads_projected_states_before_the_question(tmp_path):
    """Section 3.3: sigma(W E + b) in the size of the word embeddings, then the words; against plain forward passes,
    before and after it is saved."""
    import transformers as tf
    seed_all(0)
    reader, (rows, _) = tiny_reader(), shoppers(5)
    pocket_model("t5", reader.tokenizer, 32, 1).save_pretrained(tmp_path/"t5")
    tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=len(reader.tokenizer), hidden_size=24, intermediate_size=32,
                                       num_hidden_layers=2, num_attention_heads=2,
                                       initializer_range=.2)).save_pretrained(tmp_path/"llm")
    reader.tokenizer.save_pretrained(tmp_path/"llm")
    model = recommender.CausalLM.new(reader, start := {"encoder": str(tmp_path/"t5"), "llm": str(tmp_path/"llm")},
                                     RecommenderSettings(lora_rank=3))
    adapters = model.peft.peft_config["default"]
    assert (adapters.r, adapters.lora_alpha) == (3, 6)
    with torch.no_grad():
        for name, w in model.module.named_parameters():
            if "lora_B" in name: w.normal_(0, .3) # adapters begin as nothing
        model.module["projection"].linear.bias.normal_()
    (questions,), lists = asked(reader, rows), [np.arange(12)]*5
    z = np.stack(model.scores(questions, np.arange(5), lists))
    words, layer = model.lm.get_input_embeddings().weight, model.module["projection"].linear
    def alone(r, item):
        (prompt,) = model.ask(asked(reader, rows[r:r + 1])[0], np.array([[item]]))
        states = torch.tensor(states_alone(model.encoder, prompt)).float()
        with torch.no_grad():
            x = torch.cat([torch.tanh(states @ layer.weight.T + layer.bias)*words.std(), words[model.tails[item]]])
            logits = model.lm(inputs_embeds=x[None]).logits[0, -1].double().log_softmax(-1)
        return (logits[model.names[1]] - logits[model.names[0]]).item()
    np.testing.assert_allclose(z, [[alone(r, i) for i in range(12)] for r in range(5)], atol=1e-4)
    (tmp_path/"kept").mkdir()
    model.save(tmp_path/"kept")
    describe(tmp_path/"kept", "causal-lm", start, RecommenderSettings(attributes=False))
    beside = json.loads((tmp_path/"kept/adapter/adapter_config.json").read_text())
    assert (beside["base_model_name_or_path"] == "llm" and beside["target_modules"] == sorted(beside["target_modules"])
            and len(beside["target_modules"]) == 14)
    assert not any(str(tmp_path) in p.read_text() for p in (tmp_path/"kept/adapter").iterdir()
                   if p.suffix != ".safetensors")
    again = load_recommender(tmp_path/"kept", reader)
    assert not again.attributes
    np.testing.assert_allclose(np.stack(again.scores(questions, np.arange(5), lists)), z, atol=1e-5)


def test_patience_and_the_best_weights():
    "Values .6, .7, .7, .65: the second epoch is the best, a tie is no progress, two epochs without any are the end."
    layer = torch.nn.Linear(1, 1, bias=False)
    best, weights = Best(trained := Trained(layer), 2), []
    for value, end in ((.6, False), (.7, False), (.7, False), (.65, True)):
        with torch.no_grad(): layer.weight += 1
        weights.append(layer.weight.item())
        assert best.stop(value) == end
    trained.load_state_dict(best.weights)
    assert layer.weight.item() == weights[1]


def test_training_with_patience_ends_early_with_the_best_weights(tmp_path):
    "The same values, after two steps each: eight steps of ten epochs, and the weights of the fourth."
    layer, values, weights = torch.nn.Linear(1, 1, bias=False), iter([.6, .7, .7, .65]), []
    def update_with(opt, schedule):
        def update(rows, rng):
            loss = layer(torch.ones(1, 1)).sum()
            descend(loss, opt, schedule)
            weights.append(layer.weight.item())
            return {"loss": loss}
        return update
    curves = train_with_patience(layer, update_with, lambda: {"decides": next(values), "does not": 1.}, .1, 2,
                                 Epochs(np.zeros(6), 10, 3, 0), tmp_path, "here")
    assert len(curves) == 8 and layer.weight.item() == weights[3] and len(set(weights)) == 8
    assert [row.get("decides") for row in curves] == [None, .6, None, .7, None, .7, None, .65]
    assert curves[1]["does not"] == 1


def test_rows_are_drawn_by_user_and_without_repetition():
    "All rows of a drawn user, in order."
    five, hundred = np.arange(5), np.repeat(np.arange(100), 2)
    assert (sample_rows(five, 0, 0).tolist() == sample_rows(five, 5, 0).tolist() == sample_rows(five, 9, 0).tolist()
            == [0, 1, 2, 3, 4])
    drawn = sample_rows(hundred, 20, 1)
    assert len(set(drawn)) == 40 and (np.diff(drawn) > 0).all() and len(set(hundred[drawn])) == 20
    assert drawn.tolist() == sample_rows(hundred, 20, 1).tolist() != sample_rows(hundred, 20, 2).tolist()


def test_training_items_begin_with_what_was_bought():
    items = training_items([[0, 1, 2], [3, 4, 5]], pl.DataFrame({"user": [1, 0, 1], "target": [4, 2, 5]}), 12, 4, 0)
    assert items[:, 0].tolist() == [4, 2, 5] and items.shape == (3, 5)
    assert not {*items[0, 1:], *items[2, 1:]} & {3, 4, 5} and not {*items[1, 1:]} & {0, 1, 2}


# Gathering

def test_contrast_by_hand():
    """Row against column cosines over the temperature, softmax both ways; a pair that is the same item counts
    neither way."""
    rng = np.random.default_rng(8)
    a, b = rng.normal(size=(3, 4)), rng.normal(size=(3, 4))
    s = a @ b.T/np.linalg.norm(a, axis=1)[:, None]/np.linalg.norm(b, axis=1)/.1
    def lost(s): return -np.log(np.diag(softmax(s))).mean()
    assert contrast(torch.tensor(a), torch.tensor(b)).item() == pytest.approx((lost(s) + lost(s.T))/2)
    same = np.zeros((3, 3), bool); same[0, 2] = True
    hidden = np.where(same, -np.inf, s)
    assert (contrast(torch.tensor(a), torch.tensor(b), .1, torch.tensor(same)).item()
            == pytest.approx((lost(hidden) + lost(hidden.T))/2))


def test_gathering_computes_its_loss(world):
    """Each history in two wordings; the answer's loss is that of the wording drawn; rows with one next item do not
    count against each other."""
    reader, model = world
    rows, _ = shoppers(5)
    nexts = rows["target"].to_numpy().copy(); nexts[3] = nexts[1]
    questions, p = asked(reader, rows, (PLAIN, OTHER)), GatherSettings(gather_same=.5, gather_next=2., temperature=.2)
    opt, schedule = adamw(model.parameters(), 0., 10, "adam")
    update = in_numbers(gather_update(model, reader, questions, nexts, opt, schedule, p))
    got = update(np.arange(5), np.random.default_rng(11))
    plain = reader.encoder("{title_seq}")
    x = np.array([[states_alone(model, q.context(r)).mean(0) for r in range(5)] for q in questions])
    y = np.array([states_alone(model, plain.ids([i])).mean(0) for i in nexts])
    def lost(a, b, hide):
        s = a @ b.T/np.linalg.norm(a, axis=1)[:, None]/np.linalg.norm(b, axis=1)/.2
        s = np.where(hide, -np.inf, s)
        return -(np.log(np.diag(softmax(s))).mean() + np.log(np.diag(softmax(s.T))).mean())/2
    twin = (nexts[:, None] == nexts) & ~np.eye(5, dtype=bool)
    same, following = lost(x[0], x[1], np.zeros((5, 5), bool)), np.mean([lost(v, y, twin) for v in x])
    rng = np.random.default_rng(11)
    rng.integers(1, 2) # the other wording of the batch: there is one
    said, tokens = 0, 0
    for r, w in enumerate(rng.integers(2, size=5)):
        labels = plain.titles[nexts[r]] + plain.end
        before = torch.tensor([[model.config.decoder_start_token_id, *labels[:-1]]])
        with torch.no_grad():
            z = model(input_ids=torch.tensor([questions[w].context(r)]),
                      decoder_input_ids=before).logits[0].double().numpy()
        said, tokens = said - np.log(softmax(z)[np.arange(len(labels)), labels]).sum(), tokens + len(labels)
    wanted = dict(lm=said/tokens, same=same, next=following, loss=said/tokens + .5*same + 2*following)
    for name, value in wanted.items(): assert got[name] == pytest.approx(value, abs=2e-4), name


def test_gathering_in_one_wording_has_only_the_next_item(world):
    "There is no other wording that a history could be the same in."
    (reader, model), (rows, _) = world, shoppers(5)
    opt, schedule = adamw(model.parameters(), 0., 10, "adam")
    update = in_numbers(gather_update(model, reader, asked(reader, rows, (PLAIN,)), rows["target"].to_numpy(), opt,
                                      schedule, GatherSettings(gather_wordings=1, gather_same=.5)))
    got = update(np.arange(5), np.random.default_rng(0))
    assert got["same"] == 0 and got["loss"] == pytest.approx(got["lm"] + got["next"], abs=1e-5)


def test_histories_are_looked_for_in_paraphrases_that_were_not_seen(world, monkeypatch):
    "Against the run's own words: a seen template and an attack are not among them."
    (reader, model), (rows, _) = world, shoppers(5)
    texts = PLAIN, "A {purchase_history} B {target_item} ?", OTHER, "{purchase_history} {target_item} now ?"
    bank = [dict(text=t, split=s) for t, s in zip(texts, ("seen", "seen", "unseen-paraphrase", "attack"))]
    monkeypatch.setattr(gather, "load_sequences", lambda run, part: {"valid": rows}[part])
    monkeypatch.setattr(gather, "bank_for", lambda reader: bank)
    alone = [[states_alone(model, q.context(r)).mean(0) for r in range(5)] for q in asked(reader, rows, (PLAIN, OTHER))]
    assert gather.likeness_of(model, "run", reader) == pytest.approx(gather.likeness(np.array(alone)), abs=1e-5)
