"Stages: made once, whole or not at all, and resumed after a kill."
import json, os, signal, subprocess, sys, time
from pathlib import Path

import pytest

from ganprompt.runs import (UserError, complete, finite, fresh, load_checkpoint, lock, manifest, need, root, run_folder, save_checkpoint, seed_all,
                            stage, write_json)

WALK = '''
import os, random, signal, sys, numpy as np, torch
from ganprompt.runs import *
run, kill_at = sys.argv[1], int(sys.argv[2])
def make(folder):
    seed_all(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(.5), torch.nn.Linear(8, 1))
    opt = torch.optim.AdamW(model.parameters(), lr=.1)
    start, state = load_checkpoint(folder) or (0, None)
    if state: model.load_state_dict(state["model"]); opt.load_state_dict(state["opt"])
    for step in range(start, 30):
        if step == kill_at: os.kill(os.getpid(), signal.SIGKILL)
        x = torch.from_numpy(np.random.rand(16, 4)).float() * random.random()
        loss = (model(x) - x.sum(1, keepdim=True)).pow(2).mean()
        opt.zero_grad(); loss.backward(); opt.step()
        if step % 7 == 6: save_checkpoint(folder, step + 1, {"model": model.state_dict(), "opt": opt.state_dict()})
    write_json(folder/"end.json", {"loss": loss.item(), "weights": [p.tolist() for p in model.parameters()], "began": start})
stage(run, "walk", {"seed": 0}, make)
'''


def walk(run, kill_at=-1): return subprocess.run([sys.executable, "-c", WALK, str(run), str(kill_at)]).returncode


def toy(run, calls, value=1, name="toy", **kw):
    def make(folder):
        calls.append(value)
        write_json(folder/"value.json", value)
        return {"value": value}
    return stage(run, name, {"value": value}, make, **kw)


def test_killed_training_ends_with_the_same_numbers(tmp_path):
    assert walk(tmp_path/"calm") == 0
    assert walk(tmp_path/"killed", 17) == -signal.SIGKILL
    assert not complete(tmp_path/"killed"/"walk") and (tmp_path/"killed"/"walk.partial"/"checkpoint.pt").exists()
    assert walk(tmp_path/"killed") == 0
    calm, killed = (json.loads((tmp_path/run/"walk"/"end.json").read_text()) for run in ("calm", "killed"))
    assert (calm.pop("began"), killed.pop("began")) == (0, 14)
    assert calm == killed
    assert manifest(tmp_path/"killed", "walk")["resumed"] and not list(tmp_path.rglob("checkpoint.pt"))


def test_checkpoint_of_other_parameters_is_not_used(tmp_path):
    def interrupted(folder):
        save_checkpoint(folder, 5, {})
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): stage(tmp_path/"r", "s", {"lr": 1}, interrupted)
    found = []
    stage(tmp_path/"r", "s", {"lr": 2}, lambda folder: found.append(load_checkpoint(folder)))
    assert found == [None]


def test_skip_and_rerun(tmp_path):
    calls, file = [], tmp_path/"in.txt"
    file.write_text("a")
    go = lambda value=1: toy(tmp_path/"r", calls, value, files=[file])
    go(); go()
    assert calls == [1]
    file.write_text("b")
    assert not fresh(tmp_path/"r", "toy")
    go()
    assert calls == [1, 1]
    go(2)
    (tmp_path/"r"/"toy"/"value.json").unlink()
    go(2)
    assert calls == [1, 1, 2, 2] and fresh(tmp_path/"r", "toy")


def test_dependents_rerun_only_when_the_input_differs(tmp_path):
    calls = []
    first = lambda value: toy(tmp_path/"r", [], value, "first")
    second = lambda: toy(tmp_path/"r", calls, 0, "second", inputs=["first"])
    first(1); second(); first(2); second()
    assert calls == [0, 0]
    (tmp_path/"r"/"first"/"manifest.json").unlink()
    with pytest.raises(UserError, match="no complete stage 'first'"): second()
    first(2); second()
    assert calls == [0, 0]


def test_manifest_says_how(tmp_path):
    toy(tmp_path/"r", [], 3)
    m = manifest(tmp_path/"r", "toy")
    assert m["parameters"] == {"value": 3} and m["metrics"] == {"value": 3}
    # sha256sum of the three bytes that write_json makes of 3: "3\n"
    assert m["outputs"] == {"value.json": "1121cfccd5913f0a63fec40a6ffd44ea64f9dc135c66634ba001d10bcf4302a2"}
    assert {"python", "torch", "transformers", "polars"} <= set(m["versions"])
    assert m["wall_seconds"] >= 0 and m["peak_memory_mb"] > 10 and m["device"]


@pytest.mark.parametrize("error", [ValueError, UserError, KeyboardInterrupt])
def test_failure_leaves_nothing_half_written(tmp_path, error):
    toy(tmp_path/"r", [], 1)
    def fail(folder):
        write_json(folder/"value.json", 2)
        if error is UserError: save_checkpoint(folder, 1, {})
        raise error("no")
    with pytest.raises(error): stage(tmp_path/"r", "toy", {"value": 2}, fail)
    assert sorted(p.name for p in (tmp_path/"r").iterdir()) == [".locks", "toy"]
    assert json.loads((tmp_path/"r"/"toy"/"value.json").read_text()) == 1


def test_two_processes_do_not_make_one_stage(tmp_path):
    code = f"import time\nfrom ganprompt.runs import *\nwith lock({str(tmp_path/'r')!r}, 'toy'): print('mine', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match=f"in use by process {other.pid}"):
            with lock(tmp_path/"r", "toy", wait=0): pass
        other.send_signal(signal.SIGKILL)
        start = time.monotonic()
        toy(tmp_path/"r", [])
        assert time.monotonic() - start < 5
    finally: other.kill(); other.wait()


def test_unwritable_run_folder(tmp_path):
    (tmp_path/"file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the run folder .*choose another with --run"): toy(tmp_path/"file"/"run", [])
    with pytest.raises(UserError, match="cannot write the run folder"): toy("/proc/run", [])


def test_run_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_folder("beauty") == root()/"runs"/"beauty"
    assert run_folder("./here") == tmp_path/"here" and run_folder("a/b") == tmp_path/"a"/"b"
    assert run_folder(tmp_path) == tmp_path


def test_missing_input_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.csv: No such file"): toy(tmp_path/"r", [], files=["nowhere.csv"])
    assert not (tmp_path/"r"/"toy.partial").exists()


def test_generators_are_restored(tmp_path):
    import random

    import numpy as np
    import torch
    draw = lambda: (random.random(), np.random.rand(), torch.rand(()).item(), np.random.randn())
    seed_all(3); draw()
    save_checkpoint(tmp_path, 1, {"x": torch.ones(2)})
    after = draw()
    step, state = load_checkpoint(tmp_path)
    assert step == 1 and state["x"].tolist() == [1, 1] and draw() == after


def test_checkpoint_with_code_is_refused(tmp_path):
    import pickle

    import torch
    torch.save({"step": 1, "state": Path("x"), "rng": None}, tmp_path/"checkpoint.pt")
    with pytest.raises(pickle.UnpicklingError): load_checkpoint(tmp_path)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_non_finite_loss(loss):
    with pytest.raises(UserError, match="stage 2, step 7; lower the learning rate"): finite(loss, "stage 2, step 7")


def test_need(tmp_path):
    calls = []
    make = lambda run: toy(run, calls)
    need(tmp_path/"r", "toy", make); need(tmp_path/"r", "toy", make)
    assert calls == [1]
    (tmp_path/"real"/"data").mkdir(parents=True)
    write_json(tmp_path/"real"/"data"/"dataset.json", {"dataset": "beauty"})
    with pytest.raises(UserError, match="ganprompt run --run"): need(tmp_path/"real", "toy", make)


def test_parallel_chapters_wait_for_each_other(tmp_path):
    code = f'''
import os, time
from ganprompt.runs import *
def make(run):
    def work(folder): time.sleep(1); write_json(folder/"by.json", os.getpid())
    return stage(run, "slow", {{}}, work)
print((need({str(tmp_path/"r")!r}, "slow", make)/"by.json").read_text())'''
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {int(p.communicate(timeout=30)[0]) for p in both}
    assert len(said) == 1 and said <= {p.pid for p in both} and os.getpid() not in said
