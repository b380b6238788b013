"Two processes do the work of one: the same numbers, from Python and from papermill; errors and kills end all of them."
import json, os, shutil, signal, socket, subprocess, sys, time
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import SMALL, make, start

from ganprompt import processes
from ganprompt.files import Killed, UserError, root
from ganprompt.runs import manifest, stage
from ganprompt.processes import gathered, in_processes, is_main, part, rank, save_checkpoint, shard, summed, totals

# Largest difference of an encoder state, of a point of a curve, or of a score, between one process and two
TOLERANCE = 1e-4
# The same of scores after training: where a gradient is almost zero, AdamW makes a step of what is rounding; .002 was
# seen while the losses began 1e-7 apart
DRIFT = 1e-2


@pytest.fixture(scope="session")
def ready(finished, tmp_path_factory):
    "A run with all that stage 1 needs."
    run = copy(finished, tmp_path_factory.mktemp("runs")/"ready")
    for made in "encoder", "recommender": shutil.rmtree(run/made)
    return run


def copy(run, to):
    shutil.copytree(run, to)
    return to


def numbers(run, stage="encoder"):
    "All that stage 1 measures: states of held-out users, and the learning curves."
    states = np.array(pl.read_parquet(run/stage/"states.parquet")["x"].to_list())
    return states, pl.read_parquet(run/stage/"curves.parquet").drop("model", "step", "d_accuracy").to_numpy()


def assert_same(run, single):
    found, wanted = numbers(run), numbers(single)
    largest = [float(np.abs(a - b).max()) for a, b in zip(found, wanted)]
    print("largest differences of states and curves:", largest)
    assert max(largest) < TOLERANCE
    assert (manifest(run, "encoder")["metrics"]["processes"] == 2
            and manifest(run, "encoder")["fingerprint"] == manifest(single, "encoder")["fingerprint"])
    assert not list((run/"encoder").rglob("checkpoint*"))


@pytest.fixture(scope="session")
def two(ready, shop, tmp_path_factory):
    "A run with a stage 1 of two processes."
    run = copy(ready, tmp_path_factory.mktemp("runs")/"two")
    assert start(run, "encoder", shop, processes=2).wait() == 0
    return run


def test_stage_1_in_two_processes(two, finished): assert_same(two, finished)


def mill(chapter, run, out, **more):
    "Execute a chapter with two processes, as papermill does."
    import papermill
    notebook = root()/f"nbs/{chapter}.ipynb"
    values = ({k: v for k, v in SMALL.items() if k in papermill.inspect_notebook(str(notebook))}
              | {"run": str(run), "processes": 2} | more)
    papermill.execute_notebook(notebook, out, values, kernel_name="python3", language="python", cwd=notebook.parent,
                               progress_bar=False)


def test_stage_1_in_two_processes_from_papermill(ready, finished, tmp_path):
    run = copy(ready, tmp_path/"mill")
    mill("12_encoder", run, tmp_path/"out.ipynb")
    assert_same(run, finished)


def test_stage_2_in_two_processes_from_papermill(finished, tmp_path):
    run = copy(finished, tmp_path/"mill")
    shutil.rmtree(run/"recommender")
    mill("14_recommender", run, tmp_path/"out.ipynb", llm=str(finished/"recommender/llm")) # spares training one
    assert manifest(run, "recommender")["metrics"]["processes"] == 2
    one, two = (pl.read_parquet(r/"recommender/scores.parquet") for r in (finished, run))
    assert one.select("model", "user").equals(two.select("model", "user"))
    both = one.with_columns(largest=np.array([np.abs(np.subtract(a, b)).max()
                                              for a, b in zip(one["scores"].to_list(), two["scores"].to_list())]))
    print("largest differences of scores:", dict(both.group_by("model").agg(pl.col("largest").max()).rows()))
    losses = [pl.read_parquet(r/"recommender/curves.parquet").sort("model", "step")["loss"].to_numpy()
              for r in (finished, run)]
    assert np.abs(losses[0] - losses[1]).max() < TOLERANCE
    assert both["largest"].max() < DRIFT # log-odds


def test_scoring_in_two_processes(finished):
    from ganprompt.recommender import score_lists
    for name in "ganprompt", "ganprompt, causal-lm", "ganprompt, t5-ranker":
        kept = pl.read_parquet(finished/"recommender/scores.parquet").filter(model=name)
        found = score_lists(str(finished), finished/"recommender"/name, "uni99", np.arange(len(kept)), "yes-no",
                            processes=2)
        assert found["user"].equals(kept["user"])
        assert np.allclose(np.array(found["scores"].to_list()), np.array(kept["scores"].to_list()), atol=1e-5)


def test_a_killed_pair_leaves_nobody_behind_and_its_work_goes_on(ready, finished, shop, tmp_path):
    run = copy(ready, tmp_path/"killed")
    process = start(run, "encoder", shop, every=0, waits=run/"encoder.partial/checkpoint.pt", processes=2)
    while not list((run/"encoder.partial").rglob("checkpoint.pt")): assert process.poll() is None; time.sleep(.01)
    children = offspring(process.pid)
    os.kill(process.pid, signal.SIGKILL); process.wait()
    assert len(children) >= 2 and not (run/"encoder").exists()
    for _ in range(50):
        if not any(map(alive, children)): break
        time.sleep(.1)
    assert not any(map(alive, children))
    for n in 1, 2:
        again = copy(run, tmp_path/f"resumed by {n}")
        make(again, "encoder", shop, processes=n)
        assert manifest(again, "encoder")["resumed"]
        assert max(np.abs(a - b).max() for a, b in zip(numbers(again), numbers(finished))) < TOLERANCE


def offspring(pid):
    found = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [q for p in found for q in offspring(p)]


def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError: return False


def test_a_mistake_in_a_process_is_the_same_mistake_here(ready, shop, tmp_path):
    run, began = copy(ready, tmp_path/"wrong"), time.time()
    with pytest.raises(UserError, match="^the loss is nan in stage 1, step .*learning rate"):
        make(run, "encoder", shop, processes=2, encoder_lr=1e30)
    assert time.time() - began < 20


def work():
    "What two processes make of nine rows, and of one."
    import torch
    x = torch.arange(9.)
    mine, share = part(np.arange(9))
    mean = totals({"mean": share*x[mine].mean()})["mean"]
    one, weight = part(np.array([7]))
    alone = totals({"mean": weight*x[one].mean()})["mean"]
    several = [torch.ones(2, 2), torch.full((3,), float(rank()[0]))]
    summed(several)
    return mean, alone, np.concatenate(gathered(shard(9))).tolist(), [t.tolist() for t in several], rank()


def test_shares_add_up():
    mean, alone, order, several, who = in_processes(2, work)
    assert mean == pytest.approx(4) and alone == 7 and order == list(range(9)) and who == (0, 2)
    assert several == [[[2, 2], [2, 2]], [1, 1, 1]]
    assert in_processes(1, work)[:3] == (4, 7, list(range(9)))


def test_stage_1_in_processes_that_start_afresh(ready, finished, shop, tmp_path, monkeypatch):
    "The way that a machine with GPUs takes: all that stage 1 needs travels to a process that has touched none."
    run = copy(ready, tmp_path/"fresh")
    monkeypatch.setattr(processes, "_gpus", lambda: 2)
    make(run, "encoder", shop, processes=2)
    assert_same(run, finished)


def test_this_process_stays_as_it_was():
    from accelerate.state import AcceleratorState
    before = dict(os.environ), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"): in_processes(2, lambda: 1/rank()[0])
    assert before == (dict(os.environ), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    assert not AcceleratorState._shared_state and rank() == (0, 1) and is_main()


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("others", ["wait for it", "compute"])
def test_a_killed_process_is_no_mistake_and_costs_no_checkpoint(victim, others, tmp_path):
    """The message says to run again to go on: then there must be something to go on from, and no one left who is at
    work on it."""
    from ganprompt.processes import load_checkpoint
    def work():
        (tmp_path/f"{rank()[0]}.pid").write_text(str(os.getpid()))
        gathered(0)
        if rank()[0] == victim: os.kill(os.getpid(), signal.SIGKILL)
        if others == "compute": time.sleep(60)
        gathered(0)
    def make(folder):
        found = load_checkpoint(folder)
        if found: return {"step": found[0]}
        save_checkpoint(folder, 7, {})
        in_processes(2, work)
    began = time.time()
    with pytest.raises(Killed, match="(killed .SIGKILL.|died).*run again to go on"):
        stage(tmp_path/"run", "toy", {}, make)
    assert time.time() - began < 20 and not any(alive(int(p.read_text())) for p in tmp_path.glob("*.pid"))
    stage(tmp_path/"run", "toy", {}, make)
    assert manifest(tmp_path/"run", "toy")["metrics"] == {"step": 7}


def test_a_process_killed_before_the_others_have_joined():
    with pytest.raises(Killed):
        in_processes(2, lambda: os.kill(os.getpid(), signal.SIGKILL) if rank()[0] else time.sleep(60))


def test_a_signal_ends_all_of_them(tmp_path):
    code = ("import os, time\nfrom pathlib import Path\nfrom ganprompt.processes import *\n"
            f"in_processes(2, lambda: (Path({str(tmp_path)!r}, str(os.getpid())).touch(), time.sleep(60)))")
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while len(list(tmp_path.iterdir())) < 2: time.sleep(.05)
    process.terminate()
    assert process.wait(timeout=10) == -signal.SIGTERM
    assert not any(alive(int(p.name)) for p in tmp_path.iterdir())


def test_a_wrong_number_of_processes(monkeypatch):
    with pytest.raises(UserError, match="processes=0"): in_processes(0, work)
    monkeypatch.setattr(processes, "_gpus", lambda: 2)
    with pytest.raises(UserError, match="processes=3.* 2 GPUs"): in_processes(3, work)


# A module that Python imports first of all: it notes what its process writes below a folder
WATCH = """
import os, sys
def note(event, args):
    writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) or event in ("os.mkdir", "os.rename", "os.remove")
    if writes and str(args[0]).startswith({run!r}): os.write(log, f"{{event}} {{args[0]}}\\n".encode())
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
sys.addaudithook(note)
"""


def torchrun(node, port, home, script, *args):
    "One of two machines."
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(home), os.path.dirname(__file__), str(root())]),
                        "TMPDIR": str(home)}
    with open(home/"log", "w") as log:
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1",
                                 f"--node-rank={node}", "--master-addr=127.0.0.1", f"--master-port={port}", script,
                                 *map(str, args)], stdout=log, stderr=log, env=env)


@pytest.fixture(scope="session")
def machines(ready, finished, shop, tmp_path_factory):
    "What machines.py leaves: two machines that are one, each with a launcher of its own."
    out = tmp_path_factory.mktemp("machines")
    run, homes = copy(ready, out/"two"), [out/"first", out/"second"]
    for home in homes: home.mkdir()
    for home in homes: (home/"sitecustomize.py").write_text(WATCH.format(run=str(run), log=str(home/"writes")))
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    both = [torchrun(i, port, home, os.path.dirname(__file__) + "/machines.py", run, shop, finished, out)
            for i, home in enumerate(homes)]
    codes = [p.wait(timeout=300) for p in both]
    assert (out/"found.json").exists(), [(home/"log").read_text() for home in homes]
    return out, codes, json.loads((out/"found.json").read_text())


def test_two_machines_train_and_score_as_two_processes(machines, two, finished):
    "To the last bit."
    from ganprompt.recommender import score_lists
    out = machines[0]
    assert_same(out/"two", finished)
    for name in ("model/model.safetensors", "discriminator.safetensors", "states.parquet", "curves.parquet",
                 "separability.json"):
        assert (out/"two/encoder"/name).read_bytes() == (two/"encoder"/name).read_bytes(), name
    kept = score_lists(str(finished), finished/"recommender/ganprompt", "uni99", np.arange(40), "yes-no", processes=2)
    assert kept.equals(pl.read_parquet(out/"scores.parquet"))


def test_shares_of_two_machines_are_in_order(machines):
    assert machines[2]["work"] == [4, 7, list(range(9))]


def test_the_second_machine_writes_nothing_into_the_run(machines):
    first, second = ((machines[0]/name/"writes").read_text() for name in ("first", "second"))
    assert "encoder.partial/model" in first and not second


def test_what_goes_wrong_on_the_second_machine_is_told_on_the_first(machines):
    out, codes, found = machines
    assert found["mistake"] == "UserError: a row of the second half is wrong"
    assert found["killed"].startswith("Killed: one of the processes was killed (SIGKILL, on ")
    assert found["step"] == 7 # the checkpoint has stayed, and the work went on from it
    assert found["too many"].endswith("the launcher has started 2: set --processes 2")
    assert found["unplugged"] == "Killed: no sign of process 1 any more; run again to go on" and codes == [1, 1]


def test_machines_that_cannot_work_together(monkeypatch, tmp_path):
    kit = processes._kit()
    assert "does not see" in processes._unfit(str(tmp_path), kit)
    (tmp_path/"work").touch()
    assert not processes._unfit(str(tmp_path), kit)
    assert "'0' -> " in processes._unfit(str(tmp_path), kit | {"torch": "0"})
    monkeypatch.setenv("RANK", "1"); monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="process 1 of 2.*follow()"): in_processes(2, work)
    with pytest.raises(UserError, match="not by torchrun"): processes.follow()


def test_launchers_understand_what_the_how_to_says():
    "Their own readers of options find the command, and leave it its options."
    import re, shlex
    from accelerate.commands.launch import launch_command_parser
    from torch.distributed.run import get_args_parser
    text = (root()/"docs/machines.md").read_text().replace("\\\n", " ")
    lines = re.findall(r"^(torchrun|accelerate launch) (.+)$", text, re.M)
    assert [name for name, _ in lines] == ["torchrun", "accelerate launch"]
    for (_, line), parser in zip(lines, (get_args_parser(), launch_command_parser())):
        found = parser.parse_args(shlex.split(line))
        assert found.training_script == "ganprompt" and found.training_script_args[:2] == ["run", "--run"]
