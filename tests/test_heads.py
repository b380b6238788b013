"""Logits against transformers' own, over many architectures with random weights: biases, scales, caps, windows,
bfloat16; and the tokens of yes and no."""
import math

import numpy as np
import pytest
import torch
import transformers as tf

from ganprompt.models import (answer_logits, answers, check_t5, encode, follows, head_rows, load_model, log_odds,
                              spellings)
from ganprompt.backbones import check_causal, label_loss, last_logits, negatives
from ganprompt.encoder import js
from ganprompt.p5 import log_likelihood
from ganprompt.engine import answer_tails, answer_whole, lay_out, pack, read_prefix, shares_prefix, sight
from ganprompt.files import UserError
from ganprompt.scorer import scores_of

N = 60  # tokens of every vocabulary
SMALL = dict(vocab_size=N, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
             num_key_value_heads=1, pad_token_id=0, bos_token_id=1, eos_token_id=2)
GEMMA = SMALL | dict(head_dim=8, final_logit_softcapping=2.)
CAUSAL = {
    "llama": (tf.LlamaConfig, SMALL), "qwen2": (tf.Qwen2Config, SMALL),
    "qwen3": (tf.Qwen3Config, SMALL | dict(head_dim=8)), "mistral": (tf.MistralConfig, SMALL),
    "gpt2": (tf.GPT2Config, dict(vocab_size=N, n_embd=16, n_layer=2, n_head=2)),
    "gptj": (tf.GPTJConfig, dict(vocab_size=N, n_embd=16, n_layer=2, n_head=2, rotary_dim=4, bos_token_id=1,
                                 eos_token_id=2)),
    "gpt_neox": (tf.GPTNeoXConfig, SMALL), "gpt_neo": (tf.GPTNeoConfig, dict(vocab_size=N, hidden_size=16, num_layers=2,
            num_heads=2, attention_types=[[["global", "local"], 1]], bos_token_id=1, eos_token_id=2)),
    "opt": (tf.OPTConfig, dict(vocab_size=N, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                               word_embed_proj_dim=8)),
    "phi": (tf.PhiConfig, SMALL), "phi3": (tf.Phi3Config, SMALL), "gemma2": (tf.Gemma2Config, GEMMA),
    "gemma3": (tf.Gemma3TextConfig, GEMMA),
    "cohere": (tf.CohereConfig, SMALL | dict(logit_scale=.3)), "granite": (tf.GraniteConfig, SMALL
            | dict(logits_scaling=5., embedding_multiplier=3.)),
    "bloom": (tf.BloomConfig, dict(vocab_size=N, hidden_size=16, n_layer=2, n_head=2)),
    "mpt": (tf.MptConfig, dict(vocab_size=N, d_model=16, n_layers=2, n_heads=2)),
    "mamba": (tf.MambaConfig, dict(vocab_size=N, hidden_size=16, num_hidden_layers=2, state_size=4)),
    "biogpt": (tf.BioGptConfig, SMALL), "olmo2": (tf.Olmo2Config, SMALL), "starcoder2": (tf.Starcoder2Config, SMALL),
    "smollm3": (tf.SmolLM3Config, SMALL), "stablelm": (tf.StableLmConfig, SMALL)}
T5 = dict(vocab_size=N, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
SEQ2SEQ = {"t5": (tf.T5Config, T5), "t5 v1.1": (tf.T5Config, T5 | dict(feed_forward_proj="gated-gelu",
        tie_word_embeddings=False)), "mt5": (tf.MT5Config, T5), "umt5": (tf.UMT5Config, T5)}


def random_model(kind, untied=False, **more):
    "A tiny model whose every number is random, biases and norms too: none that is forgotten would go unseen."
    config_class, sizes = (CAUSAL | SEQ2SEQ)[kind]
    config = config_class(**sizes | more)
    model = (tf.AutoModelForCausalLM if kind in CAUSAL else tf.AutoModelForSeq2SeqLM).from_config(config).eval()
    if untied: model.lm_head.weight = torch.nn.Parameter(torch.randn(N, 16))
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters(): p.add_(torch.randn_like(p)*.2)
    return model


def texts(lengths, seed=0):
    "Token ids padded on the right, and their mask."
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(3, N, mask.shape, generator=torch.Generator().manual_seed(seed))*mask, mask


@pytest.mark.parametrize("kind", CAUSAL)
def test_the_last_logits_are_those_of_a_plain_forward_pass(kind):
    "From words and from their embeddings; two rows and all; each text alone and unpadded."
    model, (ids, mask), rows = random_model(kind), texts([7, 4, 2]), [5, 9]
    with torch.no_grad():
        own = torch.stack([model(i[:n].unsqueeze(0)).logits[0, -1] for i, n in zip(ids, mask.sum(1))])
        for inputs in dict(input_ids=ids), dict(inputs_embeds=model.get_input_embeddings()(ids)):
            for wanted in rows, slice(None):
                torch.testing.assert_close(last_logits(model, mask, wanted, attention_mask=mask, **inputs),
                                           own[:, wanted], atol=1e-5, rtol=1e-5)
        whole = model(ids, attention_mask=mask).logits
    assert whole.shape == (3, 7, N) and own[:, rows].std() > 1e-3 # the head is itself again
    check_causal(model)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_one_step_of_any_t5_is_transformers_own(kind, tmp_path):
    random_model(kind, untied=kind == "t5 v1.1").save_pretrained(tmp_path)
    model, (ids, mask) = load_model(str(tmp_path), "t5"), texts([7, 4])
    assert (model.lm_head.weight is model.shared.weight) == (kind != "t5 v1.1")
    start = torch.zeros(2, 1, dtype=torch.int64)
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask, decoder_input_ids=start).logits[:, 0]
        torch.testing.assert_close(answer_logits(model, encode(model, ids, mask), mask, [5, 9]), own[:, [5, 9]],
                                   atol=1e-5, rtol=1e-4)
        item = [8, 4, 30, 1]
        ours = log_likelihood(model, encode(model, ids[:1], mask[:1]), mask[:1], [[item, [3, 1]]], 0)[0, 0]
        assert ours.item() == pytest.approx(-4*model(input_ids=ids[:1], labels=torch.tensor([item])).loss.item(),
                                            rel=1e-4)
    check_t5(model)


def test_no_other_model_passes_for_a_t5(tmp_path):
    bart = tf.BartForConditionalGeneration(tf.BartConfig(vocab_size=N, d_model=16, encoder_layers=1, decoder_layers=1,
                                                         encoder_ffn_dim=16, decoder_ffn_dim=16,
                                                         encoder_attention_heads=2, decoder_attention_heads=2))
    with pytest.raises(UserError, match="bart cannot carry our recommender"): check_t5(bart.eval())


BERT = dict(vocab_size=N, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)

@pytest.mark.parametrize("made", [lambda: tf.BertForMaskedLM(tf.BertConfig(**BERT)),
                                  lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**BERT)),
                                  lambda: tf.ElectraForMaskedLM(tf.ElectraConfig(**BERT, embedding_size=16))])
def test_an_encoder_is_no_causal_model(made, tmp_path):
    made().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not read from left to right|has no weights"):
        check_causal(load_model(str(tmp_path), "causal"))


def test_a_bert_that_decodes_is_one(tmp_path):
    tf.BertLMHeadModel(tf.BertConfig(**BERT, is_decoder=True)).save_pretrained(tmp_path)
    check_causal(load_model(str(tmp_path), "causal"))


def test_weights_are_never_drawn_at_random(tmp_path):
    tf.LlamaModel(tf.LlamaConfig(**SMALL, tie_word_embeddings=False)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no weights for lm_head"): load_model(str(tmp_path), "causal")


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "t5"])
def test_bfloat16_ties_no_candidates(kind):
    """A hundred candidates, in bfloat16 weights and in bfloat16 products: nearly as many values as in float32, in
    the same order but for near ties."""
    model, ids, mask = random_model(kind), *texts([12]*100)
    ids[:, :8] = ids[0, :8] # one history
    def z(model):
        with torch.no_grad():
            if kind == "t5":
                return scores_of(answer_logits(model, encode(model, ids, mask), mask, [5, 9]), "yes-no", [5, 9])
            return scores_of(last_logits(model, mask, [5, 9], input_ids=ids, attention_mask=mask), "yes-no", [5, 9])
    full = z(model)
    with torch.autocast("cpu", torch.bfloat16): mixed = z(model)
    for half in mixed, z(model.bfloat16()):
        assert half.dtype == torch.float32 and len(half.unique()) >= 99 <= len(full.unique())
        assert np.corrcoef(full.argsort().argsort(), half.argsort().argsort())[0, 1] > .97


def test_losses_are_float32_under_autocast():
    model, (ids, mask) = random_model("t5"), texts([7, 4])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states = model(input_ids=ids, attention_mask=mask, labels=ids,
                       output_hidden_states=True).decoder_hidden_states[-1].float()
        loss = label_loss(model, ids, input_ids=ids, attention_mask=mask)
    logits = torch.nn.functional.linear(states*16**-.5, model.lm_head.weight)
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()).item()
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(wanted, abs=1e-6)


def test_a_head_with_adapters_is_whole():
    from peft import LoraConfig, get_peft_model
    model = random_model("llama", tie_word_embeddings=False)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)).eval()
    ids, mask = texts([6, 3])
    with torch.no_grad():
        own = tuned(ids, attention_mask=mask).logits[torch.arange(2), mask.sum(1) - 1]
        torch.testing.assert_close(last_logits(tuned.get_base_model(), mask, [5, 9], input_ids=ids,
                                               attention_mask=mask), own[:, [5, 9]])


WINDOWS = {"mistral": dict(sliding_window=6), "phi3": dict(sliding_window=6), "gemma2": dict(sliding_window=6),
           "gemma3": dict(sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
           "qwen2": dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
           "starcoder2": dict(sliding_window=6), "gpt_neo": dict(window_size=6)}
WHOLE = "mamba", "mpt", "bloom", "gpt_neo" # they count by places in the row, or keep no keys
TAILS = [[7, 8], [9, 30, 31], [5], [10, 11, 12, 13], [3, 4], [20], [21, 22]]
OWNER = np.array([0, 0, 0, 1, 1, 2, 2])

@pytest.mark.parametrize("longest", [4, 100])
@pytest.mark.parametrize("kind,more", [*((kind, {}) for kind in CAUSAL), *WINDOWS.items()])
def test_a_shared_prefix_changes_nothing(kind, more, longest):
    """Prefixes of three lengths, on both sides of a window, one of them empty; tails in one row and in several:
    against plain forward passes over each text alone."""
    model, (ids, before) = random_model(kind, **more), texts([9, 4, 1])
    before[2] = 0
    with torch.no_grad():
        own = torch.stack([model(torch.tensor([ids[o, :before[o].sum()].tolist() + t])).logits[0, -1, [5, 9]]
                           for o, t in zip(OWNER, TAILS)])
        embeds = model.get_input_embeddings()(ids)
        torch.testing.assert_close(answer_whole(model, embeds, before, OWNER, TAILS, [5, 9]), own, atol=1e-5, rtol=1e-4)
        assert shares_prefix(model) == (kind not in WHOLE)
        if kind in WHOLE: return
        found = answer_tails(model, read_prefix(model, embeds, before), OWNER, TAILS, [5, 9], longest)
    torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-4)


def test_gradients_flow_through_a_shared_prefix():
    "Of a loss over all tails, to the weights and to the prefix, against plain forward passes."
    model, (ids, before) = random_model("llama"), texts([9, 4, 2])
    def gradients(run):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        model.zero_grad(); run(embeds).sum().backward()
        return [p.grad.clone() for p in model.parameters()], embeds.grad*before[..., None]
    (ours, at), (own, there) = (gradients(f) for f in (
        lambda x: answer_tails(model, read_prefix(model, x, before), OWNER, TAILS, [5, 9], 4).square(),
        lambda x: answer_whole(model, x, before, OWNER, TAILS, [5, 9]).square()))
    torch.testing.assert_close(at, there, atol=1e-4, rtol=1e-3)
    for a, b in zip(ours, own): torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_rows_begin_with_whichever_prefix_comes_first():
    assert lay_out(np.array([1, 1, 2]), np.array([3, 3, 3]), 64).tolist() == [0, 0, 1]
    assert lay_out(np.array([1, 1, 2]), np.array([3, 3, 3]), 3).tolist() == [0, 1, 2]


def test_every_tail_lies_in_a_row_of_its_prefix():
    rng = np.random.default_rng(0)
    owner, lengths = np.arange(5).repeat([40, 1, 7, 100, 2]), rng.integers(1, 12, 150)
    row = lay_out(owner, lengths, 64)
    assert (np.diff(row) >= 0).all() and all(len(set(owner[row == r])) == 1 for r in set(row))
    tokens = np.bincount(row, lengths)
    assert tokens.max() < 64 + 12 and np.array_equal(np.unique(row), np.arange(row.max() + 1))
    for o in range(5): # no more rows than the tokens need, and they are filled alike
        mine = tokens[np.unique(row[owner == o])]
        assert len(mine) == math.ceil(mine.sum()/64) and np.ptp(mine) <= 2*12
    rows = pack(owner, [np.arange(n) + 100*i for i, n in enumerate(lengths)], 64)
    for i, n in enumerate(lengths):
        at = rows.tokens[1] == i
        assert rows.tokens[0][at].tolist() == (np.arange(n) + 100*i).tolist()
        assert rows.tokens[2][at].tolist() == list(range(n))
        assert rows.tokens[0][tuple(rows.ends[:, i])] == 100*i + n - 1 and rows.owner[rows.ends[0, i]] == owner[i]


def test_sight_by_hand():
    "Two tails, ab and c, after a prefix of two of three tokens."
    tail, place, before = torch.tensor([[0, 0, 1]]), torch.tensor([[0, 1, 0]]), torch.tensor([[1, 1, 0]])
    seen = sight(tail, place, before)[0, 0].int().tolist()
    assert seen == [[1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 1]]
    assert sight(tail, place, before, 2)[0, 0].int().tolist() == [[0, 1, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0],
                                                                  [0, 1, 0, 0, 0, 1]]


def byte_level(words):
    "A tokenizer like those of GPT-2 and SmolLM2, with these words as tokens."
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train_from_iterator(words*1000, trainers.BpeTrainer(vocab_size=400,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<|endoftext|>"],
            show_progress=False))
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token="<|endoftext|>")


def test_yes_and_no_follow_the_text():
    tok = byte_level(["yes", " yes", "no", " no", "Yes", "No", " Yes"]) # " No" is two tokens: " Yes" has no partner
    def words(ids): return tok.convert_ids_to_tokens(ids)
    assert (words(answers(tok, "buy next ?")) == ["Ġno", "Ġyes"]
            and words(answers(tok)) == words(answers(tok, "assistant\n")) == ["no", "yes"])
    assert set(words(spellings(tok, "next ?"))[:3]) == {"no", "No", "Ġno"} and len(spellings(tok, "next ?")) == 6
    assert ([w.lower().replace("yes", "no") for w in words(spellings(tok))[3:]]
            == [w.lower() for w in words(spellings(tok))[:3]])
    assert follows(tok, " yes", "next ?") == tok("next ? yes").input_ids[len(tok("next ?").input_ids):]
    with pytest.raises(UserError, match="must be one"): spellings(byte_level(["yes"]), "?")


def test_pooled_log_odds_are_those_of_the_summed_probabilities():
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    p = z.softmax(-1).numpy()
    np.testing.assert_allclose(log_odds(z).numpy(), np.log(p[:, 4:].sum(1)/p[:, :4].sum(1)), atol=1e-5)
    assert torch.equal(log_odds(z[:, :2]), z[:, 1] - z[:, 0])
    np.testing.assert_allclose(scores_of(z, "vocab", [0, 1, 2, 3]).numpy(), np.log(p[:, 2:4].sum(1)), atol=1e-5)
    head = torch.nn.Linear(16, N).bfloat16()
    assert head_rows(head, torch.randn(2, 16), [3]).dtype == torch.float32


def test_nothing_is_drawn_for_whom_owns_all():
    with pytest.raises(UserError, match="row 1 of 2: the user has all 3 items"):
        negatives([{0}, {0, 1, 2}], 3, 2, np.random.default_rng(0))
    assert (negatives([{0, 1}], 3, 5, np.random.default_rng(0)) == 2).all()


@pytest.mark.parametrize("apart", [1., 1e4])
def test_js_at_any_distance(apart):
    from scipy.spatial.distance import jensenshannon
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = (x*apart).float().requires_grad_()
    js(x).backward()
    p = x.detach().double().softmax(-1).numpy()
    own = np.mean([jensenshannon(row[i], row[j])**2 for row in p for i in range(4) for j in range(i)])
    assert js(x).item() == pytest.approx(own, abs=1e-6) and x.grad.isfinite().all()
    far = torch.eye(2)[None]*1e4
    assert js(far).item() == pytest.approx(math.log(2), abs=1e-7)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "qwen2"])
def test_a_prefix_is_shared_in_sixteen_bits_too(kind):
    "The probe knows how near is near; and sums in 32 bits come closer to float32 than sums in 16."
    model, (ids, before) = random_model(kind, num_hidden_layers=8).bfloat16().float(), texts([9, 4, 1])
    def answers_of(lm):
        with torch.no_grad():
            return answer_tails(lm, read_prefix(lm, lm.get_input_embeddings()(ids), before), OWNER, TAILS, [5, 9])
    full = answers_of(model)
    half = model.bfloat16() # no weight is rounded by that
    assert shares_prefix(half)
    narrow = answers_of(half)
    with torch.autocast("cpu", torch.bfloat16):
        assert shares_prefix(half)
        mixed = answers_of(half)
    assert mixed.dtype == narrow.dtype == torch.float32
    assert (mixed - full).abs().mean() < (narrow - full).abs().mean() < .1*full.abs().max()
