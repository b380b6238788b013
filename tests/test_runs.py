"""Stages: made once, whole or not at all, made again when what they were made from has changed, never replaced by
others unasked, and resumed after a kill."""
import hashlib, json, os, re, shutil, signal, subprocess, sys, time
from dataclasses import dataclass
from pathlib import Path

import pytest

from ganprompt import files, runs
from ganprompt.files import UserError, lock, root, run_folder, sources, write_json
from ganprompt.runs import Settings, commit, complete, fresh, kept, manifest, need, once, replacing, stage, stale
from ganprompt.processes import finite, load_checkpoint, save_checkpoint, seed_all

WALK = '''
import os, random, signal, sys, numpy as np, torch
from ganprompt.files import *
from ganprompt.processes import *
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
    weights = [p.tolist() for p in model.parameters()]
    write_json(folder/"end.json", {"loss": loss.item(), "weights": weights, "began": start})
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
    with replacing(True): go(2)
    (tmp_path/"r"/"toy"/"value.json").unlink()
    go(2)
    assert calls == [1, 1, 2, 2] and fresh(tmp_path/"r", "toy")


def test_dependents_rerun_only_when_the_input_differs(tmp_path):
    calls = []
    first = lambda value: toy(tmp_path/"r", [], value, "first")
    second = lambda: toy(tmp_path/"r", calls, 0, "second", inputs=["first"])
    first(1); second()
    with replacing(True): first(2)
    second()
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
        raise error("no")
    with pytest.raises(error, match="^no$"), replacing(True): stage(tmp_path/"r", "toy", {"value": 2}, fail)
    assert sorted(p.name for p in (tmp_path/"r").iterdir()) == [".locks", "toy"]
    assert json.loads((tmp_path/"r"/"toy"/"value.json").read_text()) == 1


@pytest.mark.parametrize("error", [ValueError, UserError, KeyboardInterrupt])
def test_failure_keeps_what_a_rerun_can_use(tmp_path, error):
    made = []
    def work(folder, fails=False):
        once(folder/"first", {}, lambda home: made.append("first") or write_json(home/"first.json", 1))
        assert (load_checkpoint(folder) is None) == fails
        if fails: save_checkpoint(folder, 7, {}); raise error("no")
    with pytest.raises(error): stage(tmp_path/"r", "toy", {}, lambda folder: work(folder, True))
    folder = stage(tmp_path/"r", "toy", {}, work)
    assert made == ["first"]
    assert (sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
            == ["first", "first/.part.json", "first/first.json", "manifest.json"])


def two_parts(run, made, seed=0, rank=8, fails=False):
    "A stage of a model that does not mind the rank, and one that does."
    def train(name):
        def make(home):
            made.append(name)
            if fails and name == "second": raise UserError(f"no rank {rank}")
            write_json(home/"weights.json", [name, seed])
            return {"loss": .1 + .2}
        return make
    def make(folder):
        both = once(folder/"first", {"seed": seed}, train("first")), once(folder/"second", {"seed": seed, "rank": rank},
                train("second"))
        write_json(folder/"both.json", both)
    with replacing(True): return stage(run, "two", {"seed": seed, "rank": rank}, make)


def test_parts_outlive_a_change_that_does_not_concern_them(tmp_path):
    made = []
    for rank in 8, 16:
        with pytest.raises(UserError): two_parts(tmp_path/"r", made, rank=rank, fails=True)
    two_parts(tmp_path/"r", made, rank=4)
    assert made == ["first", "second", "second", "second"]
    assert json.loads((tmp_path/"r/two/both.json").read_text()) == [{"loss": .1 + .2}]*2
    with pytest.raises(UserError): two_parts(tmp_path/"r", made, seed=1, fails=True)
    assert made[4:] == ["first", "second"] and manifest(tmp_path/"r", "two")["parameters"] == {"seed": 0, "rank": 4}


def test_a_part_depends_on_what_its_stage_reads(tmp_path):
    made = []
    def second(fails=False):
        def work(folder):
            once(folder/"part", {}, lambda home: made.append(1))
            if fails: raise ValueError
        return stage(tmp_path/"r", "second", {}, work, inputs=["toy"])
    toy(tmp_path/"r", [], 1)
    with pytest.raises(ValueError): second(fails=True)
    with replacing(True): toy(tmp_path/"r", [], 2)
    second()
    assert made == [1, 1]


def test_a_half_written_part_is_made_again(tmp_path):
    "Whatever files lie there: only the mark that is written last says that a part is whole."
    made = []
    def work(folder, dies=False):
        def train(home):
            made.append(1)
            (home/"config.json").write_text("{}")
            if dies: os._exit(9)
            (home/"weights").write_text("all of them")
        once(folder/"llm", {}, train)
    if not (pid := os.fork()): stage(tmp_path/"r", "toy", {}, lambda folder: work(folder, dies=True))
    os.waitpid(pid, 0)
    assert (tmp_path/"r/toy.partial/llm/config.json").exists()
    assert (stage(tmp_path/"r", "toy", {}, work)/"llm/weights").read_text() == "all of them" and made == [1]


def killed_at(n, function):
    """Call it in a fork that is killed before the n-th time that it changes the name of a file or removes one;
    whether it got so far."""
    if not (pid := os.fork()):
        left = [n]
        def deadly(do):
            def done(*args, **kwargs):
                left[0] -= 1
                if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)
                return do(*args, **kwargs)
            return done
        for name in "rename", "replace", "unlink", "rmdir", "mkdir": setattr(os, name, deadly(getattr(os, name)))
        try: function()
        finally: os._exit(0)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


def test_a_kill_at_any_step_loses_no_stage_and_no_part(tmp_path):
    "The old stage stands until the new one does, and what was whole is not made again."
    for n in range(100):
        run = tmp_path/str(n)
        two_parts(run, [], rank=8)
        log = run/"log"
        class Made(list):
            def append(self, name): log.open("a").write(f"{name}\n")
        died = killed_at(n, lambda: two_parts(run, Made(), rank=4))
        old, new = run/"two", run/"two.partial"
        standing = [json.loads((p/"manifest.json").read_text())["parameters"]["rank"] for p in (old, new)
                    if complete(p)]
        assert standing, f"killed at step {n}: neither the old stage nor the new one is there"
        before = log.read_text().split() if log.exists() else []
        whole = {p.parent.name for p in (old if 4 in standing else new).rglob(".part.json")}
        again = []
        two_parts(run, again, rank=4)
        assert not whole & set(again) and (4 not in standing or again == []) and len(before) == len(set(before))
        assert (sorted(p.name for p in (run/"two").iterdir()) == ["both.json", "first", "manifest.json", "second"]
                and manifest(run, "two")["parameters"]["rank"] == 4)
        assert not [p for p in run.iterdir() if p.name not in (".locks", "log", "two")]
        if not died: break
    assert 10 < n < 99


def test_kept_arrays(tmp_path):
    import numpy as np
    calls, x = [], np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    compute = lambda: calls.append(1) or x
    for _ in range(2): assert np.array_equal(kept(tmp_path/".scores/a/0-2.npy", compute), x)
    assert calls == [1]


def test_two_processes_do_not_make_one_stage(tmp_path):
    code = (f"import time\nfrom ganprompt.files import *\nwith lock({str(tmp_path/'r')!r}, 'toy'): print('mine', "
            "flush=True); time.sleep(60)")
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


@pytest.mark.parametrize("no_flock", [False, True])
def test_a_lock_holds_across_machines_and_a_dead_ones_is_taken(tmp_path, monkeypatch, no_flock):
    """As where the file system's locks hold on each machine alone: a process with another host's name, whose flock is
    no obstacle. It is named while it lives, and succeeded when its lease has run out."""
    import fcntl
    def refused(*_): raise OSError(38, "Function not implemented")
    pretend = "import fcntl, socket\nfcntl.flock = lambda *_: None\nsocket.gethostname = lambda: 'far-away'\n"
    body = (f"import ganprompt.files as f, time\nf.LEASE = 2.\nwith f.lock({str(tmp_path/'r')!r}, 'toy'):\n"
            "    print('mine', flush=True); time.sleep(60)")
    monkeypatch.setattr(files, "LEASE", 2.)
    if no_flock: monkeypatch.setattr(fcntl, "flock", refused)
    other = subprocess.Popen([sys.executable, "-c", pretend + body], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "mine\n"
        with pytest.raises(UserError, match=f"in use by process {other.pid} on far-away"):
            with files.lock(tmp_path/"r", "toy", wait=0): pass
        other.kill(); other.wait()
        with files.lock(tmp_path/"r", "toy", wait=0): pass
    finally: other.kill(); other.wait()


def test_unwritable_run_folder(tmp_path):
    (tmp_path/"file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write the run folder .*choose another with --run"):
        toy(tmp_path/"file"/"run", [])
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


def test_a_dense_file_holds_the_same(tmp_path):
    about = {"model": "P5, \u00e0 la carte", "lists": {"a": [1, 2.5, None]}, "ours": True, "at": Path("x")}
    for dense in False, True: write_json(tmp_path/f"{dense}.json", about, dense)
    plain, dense = ((tmp_path/f"{d}.json").read_text(encoding="utf-8") for d in (False, True))
    assert json.loads(plain) == json.loads(dense) == about | {"at": "x"}
    assert dense.splitlines() == ["{", '"model": "P5, \u00e0 la carte",', '"lists": {"a":[1,2.5,null]},',
                                  '"ours": true,', '"at": "x"', "}"]


@pytest.fixture
def home(tmp_path, monkeypatch):
    "A workspace of the test's own, so that its run `demo` may be made."
    monkeypatch.setattr(files, "workspace", lambda: tmp_path)
    return tmp_path


def test_need(home):
    calls = []
    def make(p:Settings): return toy(p.run, calls)
    need("demo", "toy", make); need("demo", "toy", make)
    assert calls == [1]
    toy("beauty", [], name="data")
    with pytest.raises(UserError,
                       match="no complete stage 'toy'; make it with: ganprompt run --run beauty --until toy"):
        need("beauty", "toy", make)


def test_a_misspelt_run_is_not_begun(home):
    toy("demo", [], name="data"); toy("beauty", [], name="data")
    for name, near in ("dmeo", "demo"), ("beuty", "beauty"), (home/"runs/bauty", "beauty"):
        with pytest.raises(UserError, match=f"there is no run '.*'; the nearest existing run is '{near}'"):
            need(name, "toy", lambda p: toy(p.run, []))
    assert {p.name for p in (home/"runs").iterdir()} == {"demo", "beauty"}
    assert run_folder(2024) == home/"runs"/"2024" # as papermill reads `-p run 2024`
    with pytest.raises(UserError, match="no run '2024'"): need(2024, "toy", lambda p: toy(p.run, []))


def chain(run, seed=0, **kw):
    "Three stages, each made from the one before."
    for name, inputs in ("first", []), ("second", ["first"]), ("third", ["second"]):
        stage(run, name, {"seed": seed, "name": name}, lambda folder: write_json(folder/"x.json", [seed, name]),
              inputs=inputs, **kw)


def test_being_out_of_date_is_passed_on(tmp_path):
    (file := tmp_path/"in.txt").write_text("a")
    chain(tmp_path/"r", files=[file])
    assert not any(stale(tmp_path/"r", name) for name in ("first", "second", "third"))
    first = manifest(tmp_path/"r", "first")
    write_json(tmp_path/"r/first/manifest.json", first | {"files": {str(tmp_path/"gone"): "0"}})
    assert stale(tmp_path/"r", "first") == f"cannot read {tmp_path/'gone'}: No such file or directory; check the path"
    assert (stale(tmp_path/"r", "second") == "input first is out of date"
            and stale(tmp_path/"r", "third") == "input second is out of date")
    for name in "first", "third":
        with pytest.raises(UserError,
                           match=f"stage {name!r} of run .* is out of date .*ganprompt run --run .* --until {name}"):
            need(tmp_path/"r", name)
    with pytest.raises(UserError, match="'third' of run"): toy(tmp_path/"r", [], name="fourth", inputs=["third"])
    shutil.rmtree(tmp_path/"r/first")
    assert stale(tmp_path/"r", "second") == "input first is missing"


def test_a_change_is_seen_although_the_file_was_hashed_before(tmp_path):
    "Also if size and time of the file stay the same, as long as it is young; and an old one that is written anew."
    (file := tmp_path/"in.txt").write_text("a")
    go = lambda: toy(tmp_path/"r", [], files=[file])
    go()
    then = file.stat().st_mtime_ns
    file.write_text("b"); os.utime(file, ns=(then, then))
    assert stale(tmp_path/"r", "toy") == f"file changed: {file}"
    go()
    for path in file, tmp_path/"r/toy/manifest.json": os.utime(path, ns=(10**18, 10**18))
    assert fresh(tmp_path/"r", "toy") and fresh(tmp_path/"r", "toy")
    file.write_text("c")
    assert not fresh(tmp_path/"r", "toy")


def test_what_was_found_fresh_is_not_hashed_again(tmp_path, monkeypatch):
    (file := tmp_path/"in.txt").write_text("a")
    chain(tmp_path/"r", files=[file])
    for path in [file, *tmp_path.glob("r/*/manifest.json")]: os.utime(path, ns=(10**18, 10**18))
    need(tmp_path/"r", "third")
    monkeypatch.setattr(runs, "fingerprint", None)
    monkeypatch.setattr(hashlib, "file_digest", None)
    for name in "first", "second", "third": need(tmp_path/"r", name)


def test_weights_and_tokenizer_of_a_model_count(tmp_path):
    (model := tmp_path/"model").mkdir()
    for name in "config.json", "model.safetensors", "tokenizer.json", "README.md": (model/name).write_text("1")
    go = lambda: stage(tmp_path/"r", "toy", {}, lambda folder: write_json(folder/"where.json", str(model)),
                       files=[model])
    go(); toy(tmp_path/"r", [], name="after", inputs=["toy"])
    (model/"README.md").write_text("2")
    assert fresh(tmp_path/"r", "after")
    for name in "model.safetensors", "tokenizer.json", "config.json", "merges.txt":
        (model/name).write_text("2")
        assert stale(tmp_path/"r", "toy") == f"model changed: {model}"
        go()
        # though its one output is the same: it says where the model lies
        assert stale(tmp_path/"r", "after") == "input toy has changed"
        toy(tmp_path/"r", [], name="after", inputs=["toy"])


def test_other_parameters_replace_nothing_unasked(tmp_path):
    run = tmp_path/"r"
    chain(run)
    with pytest.raises(UserError,
                       match=r"stage 'first' of run .* was made with other values: seed 0 -> 1; to replace it: "
                             r"--replace true"):
        chain(run, 1)
    assert json.loads((run/"first/x.json").read_text()) == [0, "first"]
    with replacing(True), pytest.raises(UserError,
                                        match=r"'third' of run .* would be built on another seed's second: seed 0 -> "
                                              r"1.*--seed 1 --until third --replace true"):
        stage(run, "third", {"seed": 1}, lambda folder: None, inputs=["second"])
    with replacing(True): chain(run, 1)
    assert (json.loads((run/"third/x.json").read_text()) == [1, "third"]
            and "replace" not in json.dumps(manifest(run, "third")["parameters"]))
    # a parameter that there was not before is a matter of the sources
    stage(run, "first", {"seed": 1, "name": "first", "new": 0}, lambda folder: None)
    with pytest.raises(UserError, match="seed 1 -> 2"): chain(run, 2)


def test_more_parts_replace_nothing(tmp_path):
    def go(parts, n=1):
        return stage(tmp_path/"r", "toy", {"parts": parts, "n": n}, lambda folder: write_json(folder/"x.json", parts),
                     grows=["parts"])
    saved = lambda: json.loads((tmp_path/"r/toy/x.json").read_text())
    go("a"); go("b, a"); go("a,b,c"); go("b"); go("c,a")
    assert saved() == "a,b,c" # fewer are there already
    for parts, n in ("a,d", 1), ("a,b,c,d", 2), ("b", 2):
        with pytest.raises(UserError, match="made with other values"): go(parts, n)
    with replacing(True): go("d")
    assert saved() == "d"
    go("all")
    assert json.loads((tmp_path/"r/toy/x.json").read_text()) == "all"


def test_a_stage_that_gets_more_parts_makes_only_those(tmp_path):
    "What is there is taken over, files beside the parts too; a changed setting, or a list that got shorter, is not."
    made = []
    def go(parts, rank=1):
        def make(folder):
            def part(name):
                def fill(home):
                    made.append(name)
                    write_json(folder/f"{name}.json", rank)
                    return name
                return once(folder/".parts"/name, None, fill) + once(folder/"models"/name, {"rank": rank}, fill)
            write_json(folder/"all.json", [part(name) for name in parts.split(",")])
        made.clear()
        folder = stage(tmp_path/"r", "toy", {"parts": parts, "rank": rank}, make, grows=["parts"])
        return sorted(p.name for p in folder.glob("*.json")), json.loads((folder/"all.json").read_text())
    assert go("a,b") == (["a.json", "all.json", "b.json", "manifest.json"], ["aa", "bb"]) and made == list("aabb")
    assert go("a,b,c")[1] == ["aa", "bb", "cc"] and made == ["c", "c"]
    assert "a.json" in go("c,b,a,d")[0] and made == ["d", "d"]
    assert json.loads((tmp_path/"r/toy/a.json").read_text()) == 1
    assert sorted(manifest(tmp_path/"r", "toy")["outputs"]) == ["a.json", "all.json", "b.json", "c.json", "d.json"]
    with replacing(True):
        assert go("a,b,c,d,e", rank=2)[1][0] == "aa" and made == list("aabbccddee")
        assert go("f", rank=2) == (["all.json", "f.json", "manifest.json"], ["ff"]) and made == ["f", "f"]


def test_a_kill_while_a_stage_is_outgrown_loses_nothing(tmp_path):
    def go(run, parts, log):
        def part(folder, name):
            def fill(home):
                with log.open("a") as f: f.write(name)
                write_json(home/"x", name)
            once(folder/name, None, fill)
        def make(folder):
            for name in parts.split(","): part(folder, name)
        return stage(run, "toy", {"parts": parts}, make, grows=["parts"])
    for n in range(60):
        run, log = tmp_path/str(n), tmp_path/f"{n}.log"
        go(run, "a,b", log)
        died = killed_at(n, lambda: go(run, "a,b,c", log))
        go(run, "a,b,c", log)
        assert sorted(p.name for p in (run/"toy").iterdir()) == ["a", "b", "c", "manifest.json"]
        assert log.read_text().startswith("abc") and set(log.read_text()[2:]) == {"c"}
        assert all(json.loads((run/f"toy/{name}/x").read_text()) == name for name in "abc")
        if not died: break
    assert 5 < n < 59


def test_what_was_told_counts_if_the_result_would_differ(tmp_path):
    "Two files of one name in two folders are two data sets, unless they hold the same."
    def go(file):
        return stage(tmp_path/"r", "data", {"dataset": "shop"}, lambda folder: write_json(folder/"x.json",
                file.read_text()), files=[file], given={"dataset": str(file)})
    for folder, text in ("a", "1"), ("b", "1"), ("c", "2"):
        (tmp_path/folder).mkdir(); (tmp_path/folder/"shop.csv").write_text(text)
    go(tmp_path/"a/shop.csv"); go(tmp_path/"b/shop.csv")
    with pytest.raises(UserError, match="a/shop.csv' -> .*c/shop.csv"): go(tmp_path/"c/shop.csv")
    (tmp_path/"a/shop.csv").write_text("3")
    go(tmp_path/"a/shop.csv")
    assert json.loads((tmp_path/"r/data/x.json").read_text()) == "3"


def test_a_stage_must_not_contradict_what_its_run_was_launched_with(tmp_path):
    (tmp_path/"r").mkdir()
    write_json(tmp_path/"r/run.json", {"parameters": {"lr": .5, "models": "a,b"}})
    go = lambda lr: stage(tmp_path/"r", "toy", {"lr": lr, "seed": 0}, lambda folder: None)
    with pytest.raises(UserError, match="launched with other values: lr 0.5 -> 0.1"): go(.1)
    assert not (tmp_path/"r/toy").exists() and go(.5)


def test_the_demo_is_made_with_what_was_chosen_for_it(home):
    (home/"runs/demo").mkdir(parents=True)
    write_json(home/"runs/demo/run.json", {"parameters": {"value": 7, "other": 1}})
    @dataclass(frozen=True)
    class ToySettings(Settings): value:int=1
    def make(p:ToySettings): return toy(p.run, [], p.value)
    assert json.loads((need("demo", "toy", make)/"value.json").read_text()) == 7


def test_the_demo_is_made_again_where_it_is_out_of_date(home, capsys):
    (file := home/"in.txt").write_text("a")
    def make(p:Settings): return toy(p.run, calls, files=[file])
    calls = []
    need("demo", "toy", make)
    file.write_text("b")
    need("demo", "toy", make)
    assert calls == [1, 1] and f"is out of date (file changed: {file}) and is made again" in capsys.readouterr().out


@pytest.fixture
def package(tmp_path, monkeypatch):
    "A copy of the package's text, that `sources` looks at."
    shutil.copytree(root()/"ganprompt", tmp_path/"ganprompt", ignore=shutil.ignore_patterns("__pycache__"))
    for module in files, runs: monkeypatch.setattr(module, "package_file", lambda name: tmp_path/"ganprompt"/name)
    def change(file, old, new):
        text, path = (tmp_path/"ganprompt"/file).read_text(), tmp_path/"ganprompt"/file
        assert len(re.findall(old, text)) == 1
        path.write_text(re.sub(old, new, text))
    return change


STAGES = ("data", "prompts", "backbones", "attributes", "encoder", "gather", "recommender", "metrics", "baselines",
          "titles", "p5", "collm", "ctrl", "figures", "benchmarks", "study")

@pytest.mark.parametrize("file, old, new, wanted", [
    ("recommender.py", r"\ndef rec_loss\(", "\n# in other words\ndef rec_loss(", set()),
    ("encoder.py", r'"Stage `encoder`', '"In other words, stage `encoder`', set()),
    ("encoder.py", r'"Stage `encoder`([^\n]*)\n', '"Stage `encoder`"; gc.collect()\n', {"encoder"}),
    ("recommender.py", r"\ndef rec_loss\(", "\ndef rec_loss(_=0, *, ", {"recommender", "collm", "study", "benchmarks"}),
    ("figures.py", r"@for_print\ndef draw_figure3\(", "X = 1\n@for_print\ndef draw_figure3(_=X, *, ", {"figures"}),
    ("metrics.py", r"def means_block\(", "def means_block(_=0, *, ", set()),
    # reached by a text that another process executes
    ("idmodels.py", r"def serve\(\):", "def serve(_=0):", {"baselines"}),
    # a kind of recommender, in the registry
    ("recommender.py", r"joint, plain, encoders = True, True,", "joint, plain, encoders = True, False,",
     {"recommender", "study", "benchmarks", "collm"}),
    ("p5.py", r"return 8\*len\(mask\)", "return 9*len(mask)", {"p5", "study"}),
    ("collm.py", r'starts = "llm", "adapter"', 'starts = "llm",', {"collm"}),
    # what only looks at values, or guesses a size
    ("encoder.py", r'"held_out_users"\)', '"held_out_users", "seed")', set()),
    ("encoder.py", r"return 7\*model_bytes", "return 8*model_bytes", set()),
    ("recommender.py", r"return 3\*model_bytes", "return 4*model_bytes", set()),
    # what changes no number is not among the parameters
    ("encoder.py", r'neutral = "encoder_part", "processes"', "neutral = ()", {"encoder"}),
    # a default of another stage
    ("attributes.py", r"k:int=5", "k:int=6", {"attributes", "encoder", "gather", "recommender", "benchmarks", "study",
                                              "collm", "ctrl", "p5"}),
    ("encoder.py", r"encoder_batch:int=16", "encoder_batch:int=32", {"encoder", "recommender", "figures", "benchmarks",
                                                                     "study"}),
    ("recommender.py", r"patience:int=2", "patience:int=3", {"recommender", "metrics", "collm", "study"}),
])
def test_sources_change_with_what_a_stage_reaches(package, file, old, new, wanted):
    before = {name: sources(name) for name in STAGES}
    package(file, old, new)
    changed = {name for name in STAGES if sources(name) != before[name]}
    assert changed <= wanted and bool(changed) == bool(wanted)


@pytest.mark.parametrize("name", STAGES)
def test_every_file_of_data_that_a_stage_reads_is_among_its_files(name):
    "Its name stands where the stage is made, or in what is used there; not only somewhere below."
    data = {p.name for p in (root()/"data").iterdir() if p.is_file()} - {"presets.yaml"}
    named = lambda one: {file for file in data if re.search(rf"['/]{re.escape(file)}'", repr(files._plain(one.node)))}
    reached = files._reach(name)
    start = reached[name, f"make_{name}"][1]
    told = named(start).union(*(named(one) for (_, what), (_, one) in reached.items() if what in start.names))
    # that one reads a stage's
    mine = {key: one for key, (hash, one) in reached.items() if hash == one.hash
            and key != ("prompts", "load_templates")}
    assert {file: key for key, one in mine.items() for file in named(one) - told} == {}


def test_a_change_of_sources_makes_a_stage_stale_and_says_where(tmp_path, package):
    stage(tmp_path/"r", "prompts", {}, lambda folder: None)
    assert fresh(tmp_path/"r", "prompts")
    package("prompts.py", r"def titles_table\(", "def titles_table(_=0, *, ")
    assert stale(tmp_path/"r", "prompts") == "sources: prompts.py"
    with pytest.raises(UserError, match=f"git checkout {manifest(tmp_path/'r', 'prompts')['commit'][:10]}"):
        need(tmp_path/"r", "prompts")
    stage(tmp_path/"r", "prompts", {}, lambda folder: None) # with the same parameters it is simply made again
    assert fresh(tmp_path/"r", "prompts")


def test_commit(tmp_path, monkeypatch):
    "Of the project's own checkout, and not of a repository that happens to hold it."
    def git(*args):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", tmp_path, *args], check=True,
                       capture_output=True)
    home = [tmp_path/"inner"]
    home[0].mkdir()
    monkeypatch.setattr(runs, "root", lambda: home[0])
    monkeypatch.setenv("GIT_DIR", str(root()/".git"))
    unknown = {"commit": "unknown", "dirty": "unknown"}
    assert commit() == unknown
    monkeypatch.delenv("GIT_DIR")
    git("init"); (tmp_path/"file").write_text("1"); git("add", "."); git("commit", "-m", "one")
    assert commit() == unknown
    home[0] = tmp_path.resolve()
    assert not commit()["dirty"] and re.fullmatch("[0-9a-f]{40}", commit()["commit"])
    (tmp_path/"file").write_text("2")
    assert commit()["dirty"]
    toy(tmp_path/"r", [])
    assert manifest(tmp_path/"r", "toy")["commit"] == commit()["commit"] and manifest(tmp_path/"r", "toy")["dirty"]


def test_parallel_chapters_wait_for_each_other(tmp_path):
    code = f'''
import os, time
from pathlib import Path
from ganprompt import files
from ganprompt.files import *
from ganprompt.runs import *
files.workspace = lambda: Path({str(tmp_path)!r})
def make(p:Settings):
    def work(folder): time.sleep(1); write_json(folder/"by.json", os.getpid())
    return stage(p.run, "slow", {{}}, work)
print((need("demo", "slow", make)/"by.json").read_text())'''
    both = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = {int(p.communicate(timeout=60)[0]) for p in both}
    assert len(said) == 1 and said <= {p.pid for p in both} and os.getpid() not in said


def test_threads_are_chosen_by_the_model_alone():
    """A pocket model computes with one thread however many there are, so that a busy machine neither slows it down
    many times nor changes its sums; a large one gets them all, and keeps them."""
    code = ("import torch; from ganprompt.models import set_threads; torch.set_num_threads(3); seen = []\n"
            "for width in 64, 600, 64: set_threads(torch.nn.Linear(width, 1000)); "
            "seen.append(torch.get_num_threads())\n"
            "print(seen)")
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
                         | {"CUDA_VISIBLE_DEVICES": ""})
    assert out.stdout.split("\n")[0] == "[1, 3, 3]"
