"""Prefixes read once: how many forward passes that takes, what they compute that counts, and the same scores as from
whole prompts, under templates of every form."""
import math, os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
import transformers as tf
from test_heads import byte_level
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ganprompt.backbones import Reader
from ganprompt.gpu import useful_operations
from ganprompt.engine import answer_tails, read_prefix, stretches, token_budget
from ganprompt.models import load_model, load_tokenizer
from ganprompt.scorer import Questions, UntunedCausal, chat_ends, score_tails, with_tokenizer

TITLES = [f"{a} {b} {i}" for i, (a, b) in enumerate((a, b) for a in ("red", "small", "an old") for b in ("cup", "tin",
        "bowl with a lid", "pan"))]


def llama(words=300, **more):
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**dict(vocab_size=words, hidden_size=32, intermediate_size=48,
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, initializer_range=.3,
            bos_token_id=None, eos_token_id=None) | more)).eval()


def reader_of(tokenizer):
    reader = Reader.__new__(Reader)
    reader.__dict__ |= dict(titles=TITLES, templates={"recommendation": "The user has {purchase_history} . Next "
            "{target_item} ?"}, noun="things", title_tokens=6, history_items=4, tokenizer=tokenizer, ends=(None, []))
    return reader


@pytest.fixture(scope="module")
def untuned():
    tokenizer = byte_level([f" {t}" for t in TITLES] + ["yes", "no", " yes", " no"])
    return UntunedCausal(llama(len(tokenizer)), reader_of(tokenizer), "?")


def questions_of(model, text):
    rng = np.random.default_rng(0)
    history = [rng.choice(12, n, replace=False).tolist() for n in (4, 1, 3)]
    return Questions(model.reader, {0: "tin", 1: "cup", 2: "lid"}, pl.DataFrame({"row": range(3), "history": history}),
                     text, attributes=False)


@pytest.mark.parametrize("text", [
    "", "The user has {purchase_history} . Next {target_item} ?", "{target_item} ? The user has {purchase_history} .",
    "Is {target_item} next after {purchase_history} , or is {target_item} not ?", "Focus on {attribute} : "
    "{purchase_history:sep=;} and {target_item:case=upper} ? Answer yes or no", "{target_item} {purchase_history}"])
def test_scores_are_those_of_whole_prompts(untuned, text):
    "The item last, first, in the middle and twice; against one plain forward pass a question."
    asked, lists = questions_of(untuned, text), [[3, 0, 7], [5], [1, 2, 11, 4]]
    found = untuned.scores(asked, np.arange(3), lists)
    for row, items, z in zip(range(3), lists, found):
        for item, score in zip(items, z):
            ids = torch.tensor([asked.ids(row, item)])
            with torch.no_grad(): p = untuned.lm(ids).logits[0, -1, untuned.names].double().softmax(-1)
            n = len(p)//2
            assert score == pytest.approx(math.log(p[n:].sum()/p[:n].sum()), abs=1e-4)


def test_sixty_shoppers_take_two_forward_passes(untuned, monkeypatch):
    "A hundred candidates each, within 65,536 tokens: one pass over the prefixes, one over all that follows."
    rng, read = np.random.default_rng(0), []
    prefixes = [rng.integers(3, 200, n).tolist() for n in rng.integers(150, 190, 60)]
    tails = [[rng.integers(3, 200, n).tolist() for n in rng.integers(5, 14, 100)] for _ in prefixes]
    body = untuned.lm.model
    before = body.register_forward_pre_hook(lambda _, args, given: read.append(next(
        x for x in (given.get("input_ids"), given.get("inputs_embeds")) if x is not None).shape[:2]), with_kwargs=True)
    z = score_tails(untuned, prefixes, tails, budget=65536)
    before.remove()
    tokens = sum(map(len, prefixes)) + sum(len(t) for row in tails for t in row)
    assert len(read) == 2 and [len(x) for x in z] == [100]*60
    assert sum(math.prod(shape) for shape in read) < 1.15*tokens # padding
    few = score_tails(untuned, prefixes[:3], tails[:3], budget=300)
    for a, b in zip(few, z): np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("prefix, tail, n, backward", [(170, 9, 100, False), (60, 12, 100, False), (170, 9, 5, True)])
def test_what_is_computed_counts(prefix, tail, n, backward):
    "Operations done against useful ones in two layers of SmolLM2's size, by torch's own count, attention included."
    lm, mask = llama(hidden_size=576, intermediate_size=1536, num_attention_heads=9,
                     num_key_value_heads=3), torch.ones(1, prefix, dtype=torch.int64)
    lm.requires_grad_(backward)
    with FlopCounterMode(display=False) as counted, sdpa_kernel(SDPBackend.MATH):
        embeds = lm.get_input_embeddings()(mask)
        z = answer_tails(lm, read_prefix(lm, embeds, mask), np.zeros(n, int), [[5]*tail]*n, [5, 9])
        if backward: z.sum().backward()
    # of the last layer the prefix's keys and values alone reach the loss: there is less to go back through
    useful = useful_operations(lm, [[5]*prefix], [[[5]*tail]*n])
    assert 1 - .3*backward <= counted.get_total_flops()/(1 + 2*backward)/useful < 1.3


@pytest.mark.parametrize("free, tokens", [(8e9, 34722), (8e10, 65536), (1e8, 4096)])
def test_a_gpus_budget_by_hand(free, tokens, monkeypatch):
    "30 layers of width 576 in 16 bits: 2*30 + 40 times 576 times 2 bytes a token, of half of what is free."
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 1e12))
    weight = SimpleNamespace(device=torch.device("cuda"), element_size=lambda: 2)
    config = tf.LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9)
    assert token_budget(SimpleNamespace(config=config, parameters=lambda: iter([weight]*2))) == tokens


def test_stretches_by_hand():
    assert token_budget(llama()) == 4096 # a CPU's cache
    assert stretches(np.array([4, 4, 4, 1]), 8) == [slice(0, 2), slice(2, 4)]
    assert stretches(np.array([40, 4, 4]), 8) == [slice(0, 1), slice(1, 3)]


REAL = Path(os.environ.get("GANPROMPT_REAL", "-"))/"smollm2"

@pytest.mark.skipif(not REAL.is_dir(), reason="GANPROMPT_REAL names no folder with smollm2")
def test_a_real_model_scores_as_in_plain_forward_passes():
    "SmolLM2 through its chat template, two shoppers and five of forty candidates: log-odds within 1e-4 in float32."
    tokenizer, lm = load_tokenizer(str(REAL)), load_model(str(REAL), "causal")
    *ends, text = chat_ends(tokenizer)
    model = UntunedCausal(lm, with_tokenizer(reader_of(tokenizer), tokenizer, tuple(ends)), text)
    assert model.shares and len(model.names) > 2
    asked, lists = questions_of(model, ""), [np.random.default_rng(r).integers(12, size=40) for r in range(3)]
    for row, items, found in zip(range(2), lists, model.scores(asked, np.arange(2), lists)):
        for item, score in list(zip(items, found))[:5]:
            with torch.no_grad():
                p = lm(torch.tensor([asked.ids(row, int(item))])).logits[0, -1, model.names].double().softmax(-1)
            assert score == pytest.approx(math.log(p[len(p)//2:].sum()/p[:len(p)//2].sum()), abs=1e-4)
