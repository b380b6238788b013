"What `make gpu` measures, as small as it can be, in a process of its own; kept, and drawn."
import gzip, json, os, shutil, subprocess, sys

import numpy as np
import pytest
import transformers as tf

from ganprompt import gpu
from ganprompt.backbones import bert_tokenizer, pocket_model, t5_tokenizer
from ganprompt.files import UserError, root
from ganprompt.gpu import (Longest, alike, draw_gpu, in_bits, keep_gpu, made_up, measure_gpu, paper_sizes, random_lm,
                           step_of_stage_1, useful_operations)
from ganprompt.models import bf16_pays
from ganprompt.processes import TimeOver


@pytest.fixture(scope="module")
def lent(tmp_path_factory):
    "Folders as a user brings them: Amazon's files of eighty shoppers, and two models of random weights."
    home = tmp_path_factory.mktemp("lent")
    (data := home/"data").mkdir()
    with gzip.open(root()/"data/demo/reviews_Demo_5.json.gz", "rt") as f: lines = f.readlines()
    users = sorted({json.loads(line)["reviewerID"] for line in lines})[:80]
    with gzip.open(data/"reviews_Beauty_5.json.gz", "wt") as f:
        f.writelines(line for line in lines if json.loads(line)["reviewerID"] in users)
    shutil.copy(root()/"data/demo/meta_Demo.json.gz", data/"meta_Beauty.json.gz")
    words = "yes no , . ? : user item the Purchases Target".split()
    texts = ["abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ 0123456789"]*3
    bert, causal = bert_tokenizer(texts, words), t5_tokenizer(texts, words)
    causal.chat_template = "{% for m in messages %}user : {{ m['content'] }} . {% endfor %}"
    tf.BertModel(tf.BertConfig(vocab_size=len(bert), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
                               intermediate_size=32)).save_pretrained(home/"models/minilm")
    pocket_model("causal", causal, 32, 1).save_pretrained(home/"models/smollm2")
    for name, tokenizer in ("minilm", bert), ("smollm2", causal): tokenizer.save_pretrained(home/"models"/name)
    return home


# What docs/gpu.md says is not needed on a lent machine
ABSENT = "papermill nbformat nbconvert jupyter_client IPython rich umap openTSNE seaborn bokeh recbole".split()


def command(run, *more):
    code = (f"import sys; sys.modules.update(dict.fromkeys({ABSENT})); from ganprompt.gpu import gpu_command; "
            "gpu_command()")
    return subprocess.run([sys.executable, "-c", code, "--tiny", "--run", str(run), *more], capture_output=True,
                          text=True, timeout=600, env=os.environ | {"PYTHONPATH": str(root())})


def test_every_part_is_measured_once_and_kept(lent, tmp_path):
    run, given = tmp_path/"run", ("--models", str(lent/"models"), "--data", str(lent/"data"))
    assert (done := command(run, *given)).returncode == 0, done.stderr[-2000:]
    files = {p: p.read_bytes() for p in (run/"measured").glob("*.json")}
    found = {part["part"]: part for part in map(json.loads, files.values())}
    assert len(found) == 25 and not any({"failed", "unfinished"} & {*part} for part in found.values()), found
    assert found["score pocket"]["forwards"] == 2 and .5 < found["score pocket"]["useful"] <= 1
    assert found["agreement pocket"]["tau"] == pytest.approx(1) and found["rate"]["budget"] == 4096
    assert found["stage 1, paper, 16 bits"]["tokens_a_step"] == 4*6*40
    for way in "flex", "compiled": assert found[f"score pocket, {way}"]["pairs_a_second"] > 0
    assert found["real, tuned, agreement"]["steps"] == 24 and found["real, tuned, agreement"]["tau"] > .8
    spent = json.loads((run/"spent.json").read_text())
    assert all(found[f"end to end, {name}"]["stage_seconds"] == it["seconds"] > 0 for name, it in spent.items())
    for home, coupling in (run, "cooperative"), (run/"as-printed", "none"):
        made = json.loads((home/"encoder/manifest.json").read_text())["parameters"]
        assert made["coupling"] == coupling and (home/"robustness/ganprompt, ranker/report.json").is_file()
    assert command(run, *given).returncode == 0
    assert files == {p: p.read_bytes() for p in (run/"measured").glob("*.json")}
    assert len(json.loads(keep_gpu(str(run), tmp_path/"gpu").read_text())["parts"]) == 25
    page = next(p for p in draw_gpu(tmp_path/"gpu", tmp_path/"out") if p.suffix == ".md").read_text()
    assert "| score pocket " in page and "Random weights" in page
    assert "was made with other values: dataset 'beauty' -> 'demo'" in command(run).stderr


def test_one_failure_does_not_stop_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "pipeline", lambda *_: {"data": lambda: None, "prompts": lambda: None})
    tried = []
    def slow():
        tried.append(1)
        if len(tried) < 3: raise TimeOver("after 120 s")
        return {"x": 3}
    monkeypatch.setattr(gpu, "parts_of", lambda *_: {"a": lambda: 1/0, "b, slow": slow, "c": lambda: {"x": 2}})
    folder = measure_gpu(str(tmp_path/"run"))
    def said(name): return json.loads((folder/f"{name}.json").read_text())
    assert "ZeroDivisionError" in said("a")["failed"] and said("c")["x"] == 2
    assert said("b-slow")["unfinished"] == "after 120 s"
    measure_gpu(str(tmp_path/"run"), only="a; c") # both have an answer
    assert len(tried) == 1
    for _ in range(3): measure_gpu(str(tmp_path/"run"))
    assert len(tried) == 3 and said("b-slow")["x"] == 3 and "unfinished" not in said("b-slow")
    with pytest.raises(UserError, match="only"): measure_gpu(str(tmp_path/"run"), only="d")
    (folder/"a.json").unlink()
    assert not (measure_gpu(str(tmp_path/"run"), minutes=0)/"a.json").exists()


def test_a_part_is_given_up_after_its_time(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PART_SECONDS", .2)
    monkeypatch.setattr(gpu, "pipeline", lambda *_: {"data": lambda: None, "prompts": lambda: None})
    def forever():
        while True: pass
    monkeypatch.setattr(gpu, "parts_of", lambda *_: {"a": forever, "b": lambda: {"x": 1}})
    folder = measure_gpu(str(tmp_path/"run"))
    assert "unfinished" in json.loads((folder/"a.json").read_text()) and (folder/"b.json").exists()


def test_stage_1_reads_what_the_preset_asks_for(monkeypatch):
    "All tokens of all versions, in parts, in the bits that were asked for; the step is chapter 12's."
    import torch
    sizes, seen = paper_sizes(False), []
    assert (sizes["histories"], sizes["part"], sizes["tokens"]) == (256, 8, 10*34 + 20)
    versions = Longest(3, 40, 8)
    assert {len(p) for p in versions.prompts([0, 1, 2])} == {40} and len(versions.prompts([0])) == 6
    assert versions.ids(0, 1) == versions.ids(0, 1) != versions.ids(0, 2)
    real = gpu.adversarial_update
    def watched(model, **more):
        body = model.get_encoder()
        body.register_forward_hook(lambda *args: seen.append((args[1] or args[2].last_hidden_state,
                                                              torch.is_autocast_enabled("cpu"), model.training)))
        return real(model=model, **more)
    monkeypatch.setattr(gpu, "adversarial_update", watched)
    step_of_stage_1(**paper_sizes(True), sixteen=True)
    assert all(training and autocast for _, autocast, training in seen)
    first = len(seen)
    step_of_stage_1(**paper_sizes(True), sixteen=False)
    assert first == len(seen) - first > 2*2*2 and not any(autocast for _, autocast, _ in seen[first:])
    assert not bf16_pays()
    with in_bits(True): assert gpu.fast_math()._enabled


def test_likeness_of_scores_by_hand():
    "One pair of three stands the other way round: tau is (2 - 1)/3 for one user, and 1 for the other."
    found = alike([np.array([1., 2, 3]), np.array([0., 1])], [np.array([1., 3, 2]), np.array([0., 5])])
    assert found["tau"] == pytest.approx(2/3) and found["tau_least"] == pytest.approx(1/3)
    assert found["largest_difference"] == 4


def test_useful_operations_by_hand():
    "Two layers of width 64: four matrices 64 by 64, three 64 by 128; a prefix of 2, a tail of 3."
    lm = random_lm("pocket")
    weights = 2*(4*64*64 + 3*64*128)
    seen = (1 + 2) + (3 + 4 + 5)
    assert useful_operations(lm, [[5, 6]], [[[7, 8, 9]]]) == 2*weights*5 + 4*64*2*seen
    prefixes, tails = made_up(3, 4)
    assert all(150 <= len(p) <= 190 for p in prefixes) and all(5 <= len(t) <= 13 for row in tails for t in row)
