"The two trainings: killed and resumed, reloaded, permuted, and stopped by bad input."
import json, os, shutil, signal, time

import numpy as np
import polars as pl
import pytest
import torch
from conftest import make, start

from ganprompt import backbones
from ganprompt.models import answers, load_model, load_tokenizer, resolve
from ganprompt.backbones import Epochs, backbone, pocket_model, train
from ganprompt.data import load_candidates, load_sequences
from ganprompt.encoder import reader_for
from ganprompt.recommender import (CausalLM, RecommenderSettings, divergence, logits_at, make_recommender,
                                   worded)
from ganprompt.files import UserError
from ganprompt.scorer import KINDS, Questions, States, bank_for, load_recommender, own_attributes

MODELS = [f"{start}{kind}" for start in ("no-stage-1", "ganprompt") for kind in ("", ", causal-lm", ", t5-ranker")]


def states(run): return pl.read_parquet(run/"encoder/states.parquet")
def scores(run): return pl.read_parquet(run/"recommender/scores.parquet")


@pytest.mark.parametrize("what", ["encoder", "t5-decoder", "causal-lm", "t5-ranker"])
def test_a_killed_training_ends_with_the_same_numbers(what, finished, shop, tmp_path):
    llm = str(finished/"recommender/llm") # spares training one
    stage, more = ("encoder", {}) if what == "encoder" else ("recommender", {"recommender": what, "llm": llm})
    run, name = tmp_path/"killed", {"encoder": "", "t5-decoder": "ganprompt"}.get(what, f"ganprompt, {what}")
    shutil.copytree(finished, run)
    for made in ("recommender", stage): shutil.rmtree(run/made, ignore_errors=True)
    checkpoint = run/f"{stage}.partial"/name/"checkpoint.pt"
    process = start(run, stage, shop, every=0, waits=checkpoint, **more)
    for _ in range(12000):
        if checkpoint.exists(): break
        assert process.poll() is None
        time.sleep(.01)
    os.kill(process.pid, signal.SIGKILL); process.wait()
    assert not (run/stage).exists() and checkpoint.exists()
    assert start(run, stage, shop, **more).wait() == 0
    assert json.loads((run/stage/"manifest.json").read_text())["resumed"]
    if stage == "encoder": assert states(run).equals(states(finished))
    else:
        assert scores(run).equals(scores(finished).join(scores(run).select("model").unique(), on="model", how="semi",
                                                        maintain_order="left"))
    assert not list((run/stage).rglob("checkpoint*")) and not list((run/stage).rglob("*.bin"))


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_recommender_gives_its_scores_again(name, finished):
    run, folder = str(finished), finished/"recommender"
    (reader, _), (users, lists) = reader_for(run), load_candidates(run, "uni99")
    questions = Questions(reader, own_attributes(run), load_sequences(run, "test"))
    kept = pl.read_parquet(folder/"scores.parquet").filter(model=name)
    assert kept["user"].to_list() == list(users)
    again = load_recommender(folder/name, reader).scores(questions, np.arange(5), lists)
    assert np.allclose(np.concatenate(again), np.concatenate(kept["scores"].to_list()[:5]), atol=1e-5)


def test_adapters_and_projection_make_the_scores(finished):
    """What is saved of a causal recommender has moved, is all safetensors, and is what a reloaded model answers
    with: fresh adapters answer otherwise."""
    run, folder = str(finished), finished/"recommender/ganprompt, causal-lm"
    reader, (_, lists) = reader_for(run)[0], load_candidates(run, "uni99")
    questions, trained = Questions(reader, own_attributes(run), load_sequences(run, "test")), load_recommender(folder,
            reader)
    assert {p.suffix for p in folder.rglob("*") if p.is_file()} <= {".safetensors", ".json", ".md"}
    moved = [p.abs().max().item() for n, p in trained.module.named_parameters() if "lora_B" in n]
    assert moved and min(moved) > 0 # peft starts these at zero
    fresh = CausalLM.new(reader, {"encoder": str(finished/"encoder/model"), "llm": str(finished/"recommender/llm")},
                         RecommenderSettings())
    good, other = (np.concatenate(m.scores(questions, np.arange(5), lists)) for m in (trained, fresh))
    assert np.abs(good - other).max() > 1e-2


def test_adapters_are_not_rounded_away_in_16_bits(tmp_path, monkeypatch):
    """Of what an adapter adds nothing is lost on average, where peft's own sum loses a third of it; gradients are those
    of peft, the frozen weights get none; and in 32 bits it is peft's own."""
    from ganprompt.recommender import add_adapters
    tokenizer = backbones.t5_tokenizer(["red lamp"]*3, ["yes", "no"])
    lm = add_adapters(pocket_model("causal", tokenizer, 256, 1))
    layer = lm.get_base_model().model.layers[0].mlp.up_proj
    torch.manual_seed(0)
    x = torch.randn(8, 64, 256)
    for part in lm.parameters(): part.data = part.data.bfloat16().float()
    layer.lora_B["default"].weight.data.normal_(std=2e-4)
    def kept(forward):
        with torch.autocast("cpu", torch.bfloat16): said = forward(x)
        small = layer.lora_B["default"](layer.lora_A["default"](x)).double()*2
        exact = x.bfloat16().double() @ layer.base_layer.weight.double().T
        assert said.dtype == torch.bfloat16 and said.shape == exact.shape
        return (((said.double() - exact)*small).sum()/(small**2).sum()).item()
    peft = type(layer).forward
    assert abs(kept(layer.forward) - 1) < .08 and kept(lambda x: peft(layer, x)) < .85
    assert torch.equal(layer(x), peft(layer, x))
    def gradients(forward):
        lm.zero_grad()
        with torch.autocast("cpu", torch.bfloat16): forward(x).float().pow(2).mean().backward()
        assert layer.base_layer.weight.grad is None
        return [layer.lora_A["default"].weight.grad, layer.lora_B["default"].weight.grad]
    for ours, theirs in zip(gradients(layer.forward), gradients(lambda x: peft(layer, x))):
        assert (ours - theirs).abs().max() < .03*theirs.abs().max()


def test_the_encoder_stays_frozen_and_the_decoder_moves(finished):
    tuned, start = (load_model(str(finished/p), "t5").state_dict() for p in ("recommender/ganprompt", "encoder/model"))
    moved = {name.split(".")[0] for name in tuned if not torch.equal(tuned[name], start[name])}
    assert moved == {"decoder"} and not [n for n in tuned if "embed" in n and not torch.equal(tuned[n], start[n])]


@pytest.mark.parametrize("name", MODELS[3:])
def test_renumbering_all_items_changes_no_score(name, finished):
    run = str(finished)
    (reader, _), (_, lists) = reader_for(run), load_candidates(run, "uni99")
    rows, anew = load_sequences(run, "test"), reader_for(run)[0]
    order = np.random.default_rng(0).permutation(len(reader.titles))
    anew.titles = [reader.titles[i] for i in np.argsort(order)]
    moved = rows.with_columns(history=pl.Series([[int(order[i]) for i in h] for h in rows["history"].to_list()]))
    def scores(reader, rows, lists):
        return np.stack(load_recommender(finished/"recommender"/name, reader).scores(
            Questions(reader, own_attributes(run), rows), np.arange(5), lists))
    assert np.allclose(scores(reader, rows, lists), scores(anew, moved, [order[i] for i in lists]), atol=1e-5)


def test_stages_after_the_data_never_see_held_out_purchases(finished):
    rows = pl.read_parquet(finished/"data/interactions.parquet")
    seen = rows.filter(pl.col("split") == "train").group_by("user").agg("item")
    train = load_sequences(str(finished), "train").join(seen, on="user")
    assert train.select((pl.col("history").list.set_difference("item").list.len() == 0).all()).item()
    assert train.select(pl.col("item").list.contains(pl.col("target")).all()).item()


def test_a_loss_that_is_not_finite_stops_with_a_message(finished, shop, tmp_path):
    shutil.copytree(finished, tmp_path/"run")
    with pytest.raises(UserError, match="stage 1, step .*learning rate"):
        make(tmp_path/"run", "encoder", shop, encoder_lr=1e30)
    assert not (tmp_path/"run/encoder.partial").exists()


@pytest.mark.parametrize("bad, said", [(dict(coupling="rival"), "coupling='rival'"),
                                       (dict(lm_target="title"), "next-title"), (dict(optimizer="sgd"), "adafactor"),
                                       (dict(js_sign=2), "js_sign=2"), (dict(pocket_width=50), "multiple of 16"),
                                       (dict(k=10**6), "usable words")])
def test_a_wrong_value_is_named(bad, said, finished, shop, tmp_path):
    shutil.copytree(finished, tmp_path/"run")
    with pytest.raises(UserError, match=said): make(tmp_path/"run", "encoder", shop, **bad)
    assert not list((tmp_path/"run").glob("*.partial"))


@pytest.mark.parametrize("download", [False, True])
def test_a_hub_model_without_network(download, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    start = time.time()
    with pytest.raises(UserError, match="t5-none.*neither a folder nor in the local cache"):
        resolve("t5-none", download)
    assert time.time() - start < 30


def test_a_folder_with_pickled_weights_is_refused(tmp_path):
    (tmp_path/"config.json").write_text("{}"); (tmp_path/"pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="only safetensors"): resolve(str(tmp_path))


def test_a_tokenizer_that_splits_yes_is_refused(finished):
    from transformers import T5Tokenizer
    tokenizer = T5Tokenizer(extra_ids=100).train_new_from_iterator(["abc def"]*3, vocab_size=120, show_progress=False)
    with pytest.raises(UserError, match="must be one"): answers(tokenizer)


def test_a_local_folder_serves_as_backbone(finished, shop, tmp_path):
    where = {kind: backbone(str(finished), kind)["path"] for kind in ("encoder", "bert")}
    folder = make(tmp_path/"local", "backbones", shop, **where)
    assert not (folder/"t5").exists() and backbone(str(tmp_path/"local"), "encoder")["pocket"] is False


def test_a_pocket_causal_model_is_saved_and_loaded(finished, tmp_path):
    tokenizer = load_tokenizer(backbone(str(finished), "encoder")["path"])
    model = pocket_model("causal", tokenizer, 32, 1).eval()
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode(): assert torch.equal(model(ids).logits, load_model(str(tmp_path), "causal")(ids).logits)


@pytest.mark.parametrize("lm_target", ["answer", "denoise"])
@pytest.mark.parametrize("coupling, js_sign, optimizer", [("adversarial", 1, "adagrad"), ("none", -1, "adafactor")])
def test_every_reading_of_the_paper_trains(lm_target, coupling, js_sign, optimizer, finished, shop, tmp_path):
    shutil.copytree(finished, tmp_path/"run")
    folder = make(tmp_path/"run", "encoder", shop, lm_target=lm_target, coupling=coupling, js_sign=js_sign,
                  optimizer=optimizer)
    curves = pl.read_parquet(folder/"curves.parquet")
    assert np.isfinite(curves.select(pl.all().exclude("step", "model")).to_numpy()).all()
    assert np.allclose(curves["total"], curves["cos"] + js_sign*.1*curves["js"], atol=1e-5)


@pytest.fixture(scope="module")
def reworded(finished, shop, tmp_path_factory):
    "The ranker tuned in three wordings without attribute words: with much weight on consistency, and with none."
    def one(weight):
        shutil.copytree(finished, run := tmp_path_factory.mktemp("wordings")/"run",
                        ignore=shutil.ignore_patterns("recommender"))
        assert start(run, "recommender", shop, recommender="t5-ranker", attributes=False, wordings=3,
                     consistency=weight, recommender_epochs=4).wait() == 0
        return run
    return {weight: one(weight) for weight in (0., 30.)}


def test_other_wordings_are_seen_templates_and_differ(finished):
    reader, _ = reader_for(str(finished))
    rows, bank, own = load_sequences(str(finished), "train")[:60], bank_for(reader), own_attributes(str(finished))
    clean, *others = worded(reader, own, rows, attributes=False, wordings=3, nonsense=0, seed=1)
    by_template = {t["id"]: Questions(reader, own, rows, t["text"], attributes=False) for t in bank if t["split"]
                   == "seen"}
    used = []
    for r in range(len(rows)):
        assert (clean.context(r) == by_template[bank[0]["id"]].context(r)
                and not set(own.values())
                & set(reader.tokenizer.decode(clean.context(r)).partition("purchase")[0].split()))
        names = [next(name for name, q in by_template.items() if q.context(r) == other.context(r) and q.ids(r, 1)
                      == other.ids(r, 1)) for other in others]
        assert len({bank[0]["id"], *names}) == 3
        used += names
    assert len(set(used)) == len(by_template) - 1 # all of them, over sixty rows
    every = worded(reader, own, rows, attributes=False, wordings=len(by_template), nonsense=0, seed=1)
    assert len(every) == len(by_template)
    with pytest.raises(UserError, match=f"choose 1 to {len(by_template)}"):
        worded(reader, own, rows, attributes=False, wordings=len(by_template) + 1, nonsense=0, seed=1)
    def faults(more): return RecommenderSettings(str(finished), wordings=len(by_template) + more).check()
    assert not faults(0) and f"choose 1 to {len(by_template)}, " in faults(1)[0] # before work starts, and the same


def test_nonsense_is_drawn_beside_the_seen_templates_and_holds_the_same_titles(finished):
    reader, _ = reader_for(str(finished))
    rows, bank = load_sequences(str(finished), "train")[:60], bank_for(reader)
    seen = [Questions(reader, {}, rows, t["text"], attributes=False) for t in bank if t["split"] == "seen"]
    asked = worded(reader, {}, rows, attributes=False, wordings=5, nonsense=40, seed=1)
    others = [(r, q.context(r)) for q in asked[1:] for r in range(60)]
    said = [any(q.context(r) == ids for q in seen) for r, ids in others]
    expected = (len(seen) - 1)/(len(seen) - 1 + 40)
    assert abs(np.mean(said) - expected) < .1
    def joined(ids): return "".join(f",{i}" for i in ids) + ","
    titles = [(seen[0].prompt.titles[item], joined(ids)) for r, ids in others
              for item in rows["history"][r][-reader.history_items:]]
    assert all(joined(title[:2]) in prompt for title, prompt in titles) # every title, if not to its end
    assert not all(joined(title) in prompt for title, prompt in titles) # some are broken off
    again = worded(reader, {}, rows, attributes=False, wordings=5, nonsense=40, seed=2)
    # each seed has its own
    assert (len({str(ids) for _, ids in others} | {str(q.context(r)) for q in again[1:] for r in range(60)})
            > .8*2*len(others))


@pytest.mark.parametrize("kind", ["t5-decoder", "t5-ranker"])
def test_each_wording_has_logits_of_its_own(kind, finished, tmp_path):
    run = str(finished)
    (reader, path), rows = reader_for(run), load_sequences(run, "train")[:7]
    items, at = np.random.default_rng(0).integers(len(reader.titles), size=(7, 3)), np.array([4, 0, 6])
    asked, model = worded(reader, own_attributes(run), rows, attributes=True, wordings=3, nonsense=0,
            seed=0), KINDS[kind].new(reader, {"encoder": path}, RecommenderSettings())
    states = States([p for q in asked for p in model.ask(q, items)], model.encoder.config.d_model, model.pad_id,
                    tmp_path/"states.bin").fill(model.encoder)
    for w, questions in enumerate(asked):
        with torch.inference_mode(): z = logits_at(model, states, items, at, model.names, w)
        alone = model.scores(questions, at, list(items))
        np.testing.assert_allclose((z[..., 1] - z[..., 0]).numpy(), np.stack(alone), atol=1e-4)


def test_a_recommender_knows_how_it_was_asked(reworded):
    run = reworded[0.]
    reader, kept = reader_for(str(run))[0], scores(run).filter(model="no-stage-1, t5-ranker")
    model, rows, lists = load_recommender(run/"recommender/no-stage-1, t5-ranker", reader), load_sequences(str(run),
            "test"), load_candidates(str(run), "uni99")[1]
    assert model.attributes is False
    own = own_attributes(str(run))
    bare, with_words = (np.concatenate(model.scores(Questions(reader, own, rows, attributes=a), np.arange(5),
                                                  lists)) for a in (False, True))
    np.testing.assert_allclose(bare, np.concatenate(kept["scores"].to_list()[:5]), atol=1e-5)
    assert np.abs(bare - with_words).max() > 1e-3


def test_consistency_brings_the_answers_together(reworded):
    "Under templates that were not seen; and the curves show the term."
    apart = {}
    for weight, run in reworded.items():
        reader, rows, lists = reader_for(str(run))[0], load_sequences(str(run), "test")[:40], load_candidates(str(run),
                "uni99")[1]
        model = load_recommender(run/"recommender/no-stage-1, t5-ranker", reader)
        texts = ["", *(t["text"] for t in bank_for(reader) if t["split"] == "unseen-paraphrase")]
        clean, *others = (torch.tensor(np.concatenate(model.scores(Questions(reader, {}, rows, text),
                                                                 np.arange(40), lists))) for text in texts)
        apart[weight] = np.mean([divergence(clean, z).item() for z in others])/clean.var().item()
        curves = pl.read_parquet(run/"recommender/curves.parquet")["apart"]
        assert (curves.max() > 0) == (weight > 0)
    assert apart[30.] < .7*apart[0.], apart


@pytest.mark.parametrize("wrong", [dict(consistency=1.), dict(consistency=1., wordings=2, score="vocab")])
def test_consistency_needs_something_to_compare(wrong, finished):
    with pytest.raises(UserError, match="it needs --wordings 2"):
        make_recommender(RecommenderSettings(str(finished), **wrong))


def test_other_weights_in_the_folder_of_a_model_make_its_stages_out_of_date(finished, tmp_path):
    "The folder's name and config.json stay the same."
    import shutil

    from safetensors.torch import load_file, save_file

    from ganprompt.attributes import AttributesSettings, make_attributes
    from ganprompt.backbones import BackbonesSettings, make_backbones
    from ganprompt.runs import stale
    run, sizes = tmp_path/"run", {"title_tokens": 8, "history_items": 5}
    for name in "data", "prompts": shutil.copytree(finished/name, run/name)
    for kind in "t5", "bert": shutil.copytree(finished/"backbones"/kind, tmp_path/kind)
    asked = BackbonesSettings(str(run), encoder=str(tmp_path/"t5"), bert=str(tmp_path/"bert"), **sizes)
    again = lambda: make_backbones(asked)
    again()
    make_attributes(AttributesSettings(str(run), k=3))
    assert not stale(run, "attributes")
    for file in "t5/model.safetensors", "bert/tokenizer.json":
        path = tmp_path/file
        if path.suffix == ".json": path.write_text(path.read_text() + "\n")
        else: save_file({k: v + 1 for k, v in load_file(path).items()}, path, {"format": "pt"})
        assert (stale(run, "backbones") == f"model changed: {path.parent}"
                and stale(run, "attributes") == "input backbones is out of date")
        again()
        assert not stale(run, "backbones") and stale(run, "attributes") == "input backbones has changed"
        make_attributes(AttributesSettings(str(run), k=3))
        assert not stale(run, "attributes")


def test_a_step_is_under_way_when_the_figures_of_the_last_are_read(tmp_path, monkeypatch):
    said = []
    def later(figures):
        said.append(f"ask {len(said)}")
        return lambda: said.append("read") or figures
    monkeypatch.setattr(backbones, "later", later)
    train(lambda rows, rng: {"loss": 1.}, {}, Epochs(np.zeros(4), 1, 1, 0), tmp_path, "here")
    assert [s.split()[0] for s in said] == ["ask", "ask", "read", "ask", "read", "ask", "read", "read"]


@pytest.mark.parametrize("bad", range(3))
def test_a_loss_that_is_no_number_is_told_with_its_step_and_never_kept(bad, tmp_path, monkeypatch):
    monkeypatch.setattr(backbones, "EVERY", 0.)
    monkeypatch.setattr(backbones, "save_checkpoint", lambda folder, step, state: kept.append(state["curves"][:]))
    kept, losses = [], iter([1. if s != bad else float("nan") for s in range(3)])
    with pytest.raises(UserError, match=f"here, step {bad}"):
        train(lambda rows, rng: {"loss": torch.tensor(next(losses))}, {}, Epochs(np.zeros(3), 1, 1, 0), tmp_path,
              "here")
    assert all(np.isfinite(row["loss"]) for curves in kept for row in curves) and len(kept) <= bad
