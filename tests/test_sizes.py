"""How much is computed at once, and where it is kept: arithmetic of batches, budgets and places, on machines that
are made up."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_equations import STAGE2, T5Ranker, asked, kept_states, shoppers, tiny_reader # noqa: F401
from test_equations import world # noqa: F401 a fixture

from ganprompt import scorer
from ganprompt.templates import read_templates
from ganprompt.files import root
from ganprompt.engine import token_batches
from ganprompt.scorer import States, bank_for, place, score_contexts, scores_of


def test_batches_by_hand():
    "Short ones first; a batch is full when one more would not fit beside padding."
    assert [b.tolist() for b in token_batches(np.array([5, 1, 3, 3]), 6)] == [[1, 2], [3], [0]]
    assert [b.tolist() for b in token_batches(np.array([2]*7), 4)] == [[0, 1], [2, 3], [4, 5], [6]]
    assert [b.tolist() for b in token_batches(np.array([9, 9]), 4)] == [[0], [1]]


def test_batches_are_as_large_as_the_budget_allows():
    lengths = np.random.default_rng(0).integers(1, 40, 300)
    cut = token_batches(lengths, 200)
    assert sorted(np.concatenate(cut)) == list(range(300))
    for mine, following in zip(cut, cut[1:]):
        assert lengths[mine].max()*len(mine) <= 200 < lengths[following[0]]*(len(mine) + 1)


@pytest.fixture
def machine(monkeypatch):
    "4,096,000 free bytes of memory, 10,000,000 of disk, no GPU."
    monkeypatch.setattr(scorer, "free_memory", lambda: 4_096_000)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=10_000_000, total=10**12))
    monkeypatch.setattr(scorer, "device", lambda: torch.device("cpu"))


@pytest.mark.parametrize("need, memory, file, shared, where", [
    (2_048_000, 1, 1, False, "memory"), (2_048_001, 1, 1, False, "a mapped file"),
    (5_000_000, 1, 1, False, "a mapped file"), (5_000_001, 1, 1, False, "nowhere"),
    (1_000_000, .001, 1, False, "memory"), (1_000_001, .001, 1, False, "a mapped file"),
    (3_000_000, 1, .003, False, "a mapped file"), (3_000_001, 1, .003, False, "nowhere"),
    (10, 1, 1, True, "a mapped file")])
def test_half_of_what_is_free_is_taken(need, memory, file, shared, where, machine, tmp_path):
    assert place(need, memory, file, tmp_path, shared) == where


def test_processes_beside_each_other_share_what_is_free(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(scorer, "beside", lambda: 2)
    assert [place(n, 1, 1, tmp_path) for n in (1_024_000, 1_024_001)] == ["memory", "a mapped file"]


def test_a_number_stands_behind_its_name(tmp_path):
    (tmp_path/"meminfo").write_text("MemTotal: 512 kB\nMemAvailable: 123 kB\n")
    (tmp_path/"limit").write_text("max\n")
    assert scorer._number(tmp_path/"meminfo", "MemAvailable:") == 123 and scorer._number(tmp_path/"meminfo") == np.inf
    assert [scorer._number(tmp_path/n, m) for n, m in (("meminfo", "x"), ("limit", ""), ("none", ""))] == [np.inf]*3


def test_a_gpu_comes_first_and_half_of_its_free_memory_is_taken(machine, monkeypatch, tmp_path):
    monkeypatch.setattr(scorer, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (6_000, 10**12))
    assert [place(n, 1, 1, tmp_path) for n in (3_000, 3_001, 2_048_001)] == ["GPU memory", "memory", "a mapped file"]


def test_bfloat16_is_for_gpus_that_have_it(monkeypatch):
    for kind, able, pays in (("cpu", True, False), ("cuda", True, True), ("cuda", False, False)):
        monkeypatch.setattr("ganprompt.models.device", lambda: torch.device(kind))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: able)
        assert scorer.bf16_pays() is pays


def test_states_say_how_large_they_are(tmp_path):
    "Five tokens, a million wide, four bytes each."
    assert (str(States([[1, 2], [3, 4, 5]], 10**6, 0, tmp_path/"x", 0, 1e-6))
            == "2 prompts, 0.02 GB of states computed each time, for there is no room to keep them")


@pytest.mark.parametrize("memory_gb, file_gb", [(1, 1), (0, 1), (0, 0)])
def test_states_are_the_same_wherever_they_are_kept(memory_gb, file_gb, world, tmp_path): # noqa: F811
    _, model = world
    prompts = [[5, 6, 7, 1], [8, 1], [9, 10, 1]]
    states = States(prompts, 32, 0, tmp_path/"states.bin", memory_gb, file_gb).fill(model)
    assert (states.where == "nowhere") == (states.data is None) == (memory_gb == file_gb == 0)
    x, mask = states.get(np.array([2, 0]))
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    for row, ids in zip(x, (prompts[2], prompts[0])):
        with torch.no_grad(): alone = model.encoder(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert torch.allclose(row[:len(ids)], alone, atol=1e-5)
    states.drop()
    assert not (tmp_path/"states.bin").exists()


def test_the_vocabulary_is_the_last_axis():
    z = torch.tensor([[[1., 3., 0.], [2., 2., 2.]]]) # one prompt, two candidates, three pieces
    assert torch.allclose(scores_of(z, "vocab", [0, 1]), torch.tensor([[3 - np.log(np.exp([1, 3, 0]).sum()),
            -np.log(3)]], dtype=torch.float32))
    assert scores_of(z[..., :2], "yes-no", [0, 1]).tolist() == [[2., 0.]]


def test_a_small_budget_means_few_candidates_at_a_time(world): # noqa: F811
    "A candidate costs ten tokens: with a budget of 35 three go together; every budget gives the same scores."
    reader, t5 = world
    model, rows = T5Ranker(t5, reader), shoppers(4)[0]
    (questions,), asked_for = asked(reader, rows), []
    contexts, items = [questions.context(r) for r in range(4)], np.stack([np.random.default_rng(r).permutation(12)[:10]
            for r in range(4)])
    whole, answer = score_contexts(model, contexts, items), model.answer
    model.cost = lambda mask: 10
    model.answer = lambda memory, items, rows: (asked_for.append(items.shape), answer(memory, items, rows))[1]
    np.testing.assert_allclose(score_contexts(model, contexts, items, budget=35), whole, atol=1e-5)
    assert {columns for _, columns in asked_for} == {2, 3} and sum(n*columns for n, columns in asked_for) == 40


def test_the_bank_begins_with_what_is_trained_on(tmp_path):
    """A wording of one's own comes first and is called so; one of the bank's is moved to the front, and stands there
    once."""
    reader, bank = tiny_reader(), [t for t in read_templates(root()/"data/templates.yaml") if t["task"]
                                   == "recommendation"]
    assert [t["id"] for t in bank_for(reader)] == ["own", *(t["id"] for t in bank)]
    reader.templates = reader.templates | {"recommendation": bank[7]["text"]}
    assert ([t["id"] for t in bank_for(reader)] == [bank[7]["id"], *(t["id"] for i, t in enumerate(bank) if i != 7)]
            and bank_for(reader)[0]["split"] == "seen")
