"The scorer and the recommenders against transformers' own forward passes; kept states in every place; bad input."
import json, shutil

import numpy as np
import polars as pl
import pytest
import torch
import transformers as tf
from conftest import make

from ganprompt import backbones
from ganprompt.models import answer_logits, encode, load_model, resolve
from ganprompt.data import load_candidates, load_sequences
from ganprompt.encoder import reader_for
from ganprompt.prompts import pad
from ganprompt.recommender import CausalLM, RecommenderSettings, T5Decoder, T5Ranker, find_llm
from ganprompt.files import UserError
from ganprompt.scorer import Questions, load_recommender, own_attributes, score_prompts

LLMS = {"llama": (tf.LlamaForCausalLM, tf.LlamaConfig, dict(num_key_value_heads=2), "q_proj,v_proj"),
        "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config, dict(num_key_value_heads=2), "q_proj,k_proj"),
        "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, dict(n_embd=32, n_layer=2, n_head=4), "c_attn")}


@pytest.fixture(scope="module")
def shown(finished):
    "Reader, folder of the encoder, questions and candidate lists of the test users."
    run = str(finished)
    reader, _ = reader_for(run)
    return reader, str(finished/"encoder/model"), Questions(reader, own_attributes(run),
                                                            load_sequences(run, "test")), load_candidates(run,
                                                                    "uni99")[1]


def byte_level(titles):
    "A tokenizer like those of GPT-2 and Qwen: byte-level pairs, a word with the space before it."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer.train_from_iterator([f" {t} ?" for t in titles] + [" yes", " no"]*1000, trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def padded(prompts, reader): return pad(prompts, reader.tokenizer.pad_token_id)


def start_tokens(model, n): return torch.full((n, 1), model.config.decoder_start_token_id)


def test_scores_are_those_of_the_whole_model(shown):
    reader, path, questions, lists = shown
    model = T5Decoder(load_model(path, "t5"), reader)
    prompts = [questions.ids(r, int(i)) for r in range(6) for i in lists[r][:20]]
    ids, mask = padded(prompts, reader)
    with torch.inference_mode():
        starts = start_tokens(model.encoder, len(ids))
        z = model.encoder(input_ids=ids, attention_mask=mask, decoder_input_ids=starts).logits[:, 0]
    no, yes = (reader.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("no", "yes"))
    assert np.allclose(score_prompts(model, prompts), (z[:, yes] - z[:, no]).numpy(), atol=1e-4)
    assert np.allclose(score_prompts(model, prompts, "vocab"), z.log_softmax(-1)[:, yes].numpy(), atol=1e-4)


@pytest.mark.parametrize("gated", ["relu", "gated-gelu"])
def test_one_query_gives_the_gradients_of_the_whole_decoder(gated):
    torch.manual_seed(0)
    config = tf.T5Config(vocab_size=50, d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=2, feed_forward_proj=gated,
                         decoder_start_token_id=0, dropout_rate=0.)
    model, mask = tf.T5ForConditionalGeneration(config), torch.tensor([[1]*9, [1]*5 + [0]*4])
    states, found = torch.randn(2, 9, 32), {}
    for way in "ours", "whole":
        model.zero_grad()
        if way == "ours": z = answer_logits(model, states, mask, [3, 4])
        else:
            z = model(encoder_outputs=(states,), attention_mask=mask,
                      decoder_input_ids=start_tokens(model, 2)).logits[:, 0, [3, 4]]
        z.sigmoid().sum().backward()
        found[way] = {n: p.grad.clone() for n, p in model.decoder.block.named_parameters() if p.grad is not None
                      and p.grad.abs().max() > 0}
    assert found["ours"].keys() == found["whole"].keys() and len(found["ours"]) > 10
    assert all(torch.allclose(g, found["whole"][n], atol=1e-6) for n, g in found["ours"].items())


@pytest.mark.parametrize("n", [3, 40]) # fewer and more than a head is wide: two ways to compute
def test_the_ranker_is_the_decoder_with_another_first_input(n, shown):
    reader, path, questions, _ = shown
    model = T5Ranker(load_model(path, "t5"), reader)
    ids, mask = padded([questions.context(r) for r in range(3)], reader)
    items = np.random.default_rng(0).integers(len(reader.titles), size=(3, n))
    with torch.inference_mode():
        states = encode(model.encoder, ids, mask)
        ours = model.answer((states, mask), items, model.names)
        for r in range(3):
            x = model.item_vectors()[items[r]].unsqueeze(1)
            whole = model.encoder(encoder_outputs=(states[[r]*n],), attention_mask=mask[[r]*n],
                             decoder_inputs_embeds=x).logits[:, 0, model.names]
            assert torch.allclose(ours[r], whole, atol=1e-4)


@pytest.mark.parametrize("kind", LLMS)
def test_a_shared_prefix_changes_no_score(kind, shown, finished, tmp_path):
    "Candidates of several users with histories of different lengths, against one plain forward pass for each."
    reader, path, questions, lists = shown
    model_class, config_class, more, modules = LLMS[kind]
    torch.manual_seed(0)
    sizes = (dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4) if kind != "gpt2"
             else {})
    tokenizer = reader.tokenizer if kind == "llama" else byte_level(reader.titles)
    model_class(config_class(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=1, **sizes,
                             **more)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = CausalLM.new(reader, {"encoder": path, "llm": resolve(str(tmp_path))},
                         RecommenderSettings(lora_modules=modules))
    for name, p in model.peft.named_parameters():
        if "lora_B" in name: torch.nn.init.normal_(p, std=.1)
    found = model.scores(questions, np.arange(4), lists)
    for r in range(4):
        ids, mask = padded([questions.context(r)], reader)
        with torch.inference_mode():
            prefix = model.module["projection"](encode(model.encoder, ids, mask))[0]
            for j in 0, 1, 50, 99:
                tail = model.tails[lists[r][j]]
                said = tokenizer.decode(tail).strip()
                # a long title is cut
                assert said.endswith("?") and reader.titles[lists[r][j]].startswith(said[:-1].strip())
                text = torch.cat([prefix, model.lm.get_input_embeddings()(torch.tensor(tail))])
                z = model.peft(inputs_embeds=text.unsqueeze(0)).logits[0, -1]
                assert abs(found[r][j] - (z[model.names[1]] - z[model.names[0]]).item()) < 1e-4


def test_half_precision_stays_near(shown, finished, monkeypatch):
    "bfloat16, which is used where the processor is fast at it: forced here, to see that every recommender works in it."
    reader, _, questions, lists = shown
    for kind in "", ", causal-lm", ", t5-ranker":
        model = load_recommender(finished/f"recommender/ganprompt{kind}", reader)
        full = np.concatenate(model.scores(questions, np.arange(5), lists))
        model.vectors = None
        monkeypatch.setattr("ganprompt.models.bf16_pays", lambda: True)
        half = np.concatenate(model.scores(questions, np.arange(5), lists))
        monkeypatch.undo()
        assert half.dtype == np.float32 and 0 < np.abs(half - full).max() < .05*max(1, np.abs(full).max())


def test_where_states_are_kept_changes_no_number(finished, shop, tmp_path, capsys):
    shutil.copytree(finished, run := tmp_path/"run")
    kept = {}
    for place, budget in {"kept in memory": {}, "kept in a mapped file": dict(cache_gb=0.),
                          "computed each time": dict(cache_gb=0., cache_file_gb=0.)}.items():
        shutil.rmtree(run/"recommender")
        make(run, "recommender", shop, recommender="t5-decoder,t5-ranker", recommender_epochs=1, **budget)
        assert place in capsys.readouterr().out
        kept[place] = np.array(pl.read_parquet(run/"recommender/scores.parquet")["scores"].to_list())
        assert not list((run/"recommender").rglob("*.bin"))
        assert np.allclose(kept[place], kept["kept in memory"], atol=1e-4)


def test_any_causal_model_of_a_folder_serves(finished, shop, tmp_path):
    run, llm = tmp_path/"run", tmp_path/"qwen"
    shutil.copytree(finished, run)
    reader = reader_for(str(finished))[0]
    tokenizer = byte_level(reader.titles)
    tf.Qwen2ForCausalLM(tf.Qwen2Config(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64,
                                       num_hidden_layers=1, num_attention_heads=2,
                                       num_key_value_heads=1, bos_token_id=None, eos_token_id=1)).save_pretrained(llm)
    tokenizer.save_pretrained(llm)
    folder = make(run, "recommender", shop, recommender="causal-lm", llm=str(llm), lora_modules="q_proj,o_proj",
                  lora_rank=2, recommender_epochs=1)
    about = json.loads((folder/"ganprompt, causal-lm/adapter/adapter_config.json").read_text())
    assert about["r"] == 2 and set(about["target_modules"]) == {"q_proj", "o_proj"} and not (folder/"llm").exists()
    assert type(load_recommender(folder/"ganprompt, causal-lm", reader).lm).__name__ == "Qwen2ForCausalLM"


def test_whole_catalogues_are_ranked(finished, shop, tmp_path):
    run = tmp_path/"run"
    shutil.copytree(finished, run)
    folder = make(run, "recommender", shop, recommender="t5-ranker", candidates="full", recommender_epochs=1)
    users, lists = load_candidates(str(run), "full")
    scores = pl.read_parquet(folder/"scores.parquet").filter(model="ganprompt, t5-ranker")
    assert (scores["user"].to_list() == list(users)
            and [len(s) for s in scores["scores"]] == [len(items) for items in lists])


@pytest.mark.parametrize("bad, said", [(dict(recommender="t5-decoder,llama"), "recommender='llama'.*causal-lm"),
                                       (dict(recommender="causal-lm", llm="no-such-llm"), "no-such-llm.*neither"),
                                       (dict(recommender="causal-lm", lora_modules="w_q"),
                                        "lora_modules='w_q'.*q_proj"),
                                        (dict(recommender="causal-lm", four_bit=True), "four_bit needs a GPU")])
def test_a_wrong_recommender_is_named(bad, said, finished, shop, tmp_path):
    shutil.copytree(finished, tmp_path/"run")
    shutil.copytree(finished/"recommender/llm", tmp_path/"llm") # spares training one
    with pytest.raises(UserError, match=said):
        make(tmp_path/"run", "recommender", shop, **({"llm": str(tmp_path/"llm")} | bad))
    assert not list((tmp_path/"run").glob("*.partial"))


def test_a_pocket_llama_is_trained_once_and_whole(finished, tmp_path, monkeypatch):
    "A folder with a configuration and no weights, as a kill while it is saved leaves it, is no model."
    trainings = []
    monkeypatch.setattr(backbones, "train", lambda *args: trainings.append(args[-1]) or [])
    (tmp_path/"llm").mkdir()
    shutil.copy(finished/"recommender/llm/config.json", tmp_path/"llm")
    for _ in range(2):
        assert find_llm(str(finished), RecommenderSettings(), tmp_path/"llm") == str(tmp_path/"llm")
    assert trainings == ["pocket causal"] and load_model(str(tmp_path/"llm"), "causal").num_parameters() > 0
