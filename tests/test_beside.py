"Side by side: stages that do not need each other, and the parts of a stage; with the numbers of one after another."
import inspect, io, os, shutil, signal, subprocess, sys, time
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console
from test_cli import notebook

from ganprompt import launcher, processes
from ganprompt.files import Killed, UserError
from ganprompt.runs import complete, manifest
from ganprompt.processes import beside, side_by_side
from ganprompt.jobs import chapters, chosen_values
from ganprompt.launcher import launch, waits_for


def meeting():
    import time
    from pathlib import Path
    def meet(here, other):
        "Say that one is here, and wait for another who says the same at the same time."
        Path(here).touch()
        until = time.time() + 60
        while not Path(other).exists():
            assert time.time() < until, "nobody else came"
            time.sleep(.02)
    return meet


HELPERS = "import os, time\n" + inspect.getsource(meeting) + "meet = meeting()\n"
TOY = '''
def make(folder):
    (folder/"kernel").write_text(str(os.getpid()))
    {body}
stage(run, "{name}", {{"seed": seed}}, make, inputs={inputs})'''
LEFT, RIGHT = "meet(run + '/l', run + '/r')", "meet(run + '/r', run + '/l')"


def write_toys(nbs, left=LEFT, right=RIGHT, first="pass"):
    for i, (name, body, inputs) in enumerate([("first", first, []), ("left", left, ["first"]),
                                              ("right", right, ["first"]), ("last", "pass", ["left", "right"])]):
        notebook(nbs/f"0{i}_{name}.ipynb", "", HELPERS + TOY.format(name=name, body=body, inputs=inputs))
    return chapters(nbs)


def go(toys, run):
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    try: launch(toys, chosen_values(toys, {"run": str(run)}), console)
    finally: said = [line.split()[:2] for line in console.file.getvalue().splitlines() if "new run" not in line]
    return [line for line in said if line[1] != "begins"]


@pytest.fixture
def two(monkeypatch):
    for module in launcher, processes: monkeypatch.setattr(module, "cores", lambda: 2)


def test_stages_run_in_the_order_of_their_inputs_and_side_by_side_where_they_can(two, tmp_path):
    toys = write_toys(tmp_path/"nbs")
    assert waits_for(str(tmp_path/"run"), toys) == {"first": set(), "left": {"first"}, "right": {"first"},
                                                    "last": {"left", "right"}}
    said = go(toys, tmp_path/"run")
    assert said[0] == ["first", "done"] and said[3] == ["last", "done"] and len(said) == 4
    kernels = {(tmp_path/"run"/c.stage/"kernel").read_text() for c in toys}
    assert len(kernels) == 4 and not [k for k in kernels if Path(f"/proc/{k}").exists()]
    assert [line[1] for line in go(toys, tmp_path/"run")] == ["up"]*4


def test_a_stage_that_fails_lets_the_other_end_and_says_so_once(two, tmp_path):
    left = f"{LEFT}; from ganprompt.files import UserError; raise UserError('left is wrong')"
    run = tmp_path/"run"
    with pytest.raises(UserError) as e: go(write_toys(tmp_path/"nbs", left, f"{RIGHT}; time.sleep(2)"), run)
    assert str(e.value).count("left is wrong") == 1 and str(e.value).startswith("left: ")
    assert complete(run/"right") and not (run/"left").exists() and not (run/"logs/03_last.log").exists()
    (run/"r").touch()
    chapters.cache_clear()
    assert go(write_toys(tmp_path/"nbs", right=f"{RIGHT}; time.sleep(2)"), run)[-1] == ["last", "done"]


def test_what_chapters_wait_for(tmp_path):
    found = waits_for(str(tmp_path/"run"), chapters())
    assert found["figures"] == {"data", "prompts", "backbones", "attributes", "encoder"}
    assert found["metrics"] == found["figures"] | {"recommender"}
    assert found["baselines"] == {*found["metrics"], "metrics", "figures"} # it measures time
    assert {"baselines"} < found["gather"]


def test_functions_side_by_side(two, tmp_path):
    l, r, meet = str(tmp_path/"l"), str(tmp_path/"r"), meeting()
    def one(): meet(l, r); return "one", os.getpid(), beside()
    def other(): meet(r, l); return "other", os.getpid(), beside()
    found = side_by_side([one, other, lambda: 3])
    assert [found[0][0], found[1][0], found[2]] == ["one", "other", 3]
    assert found[0][1] == os.getpid() != found[1][1] and found[0][2] == found[1][2] == 2 and beside() == 1
    assert side_by_side([os.getpid, os.getpid], large=True) == [os.getpid()]*2


def test_an_error_beside_lets_the_others_end(two, tmp_path):
    def fails(): raise UserError("a wrong row")
    def ends(): time.sleep(1); (tmp_path/"ended").touch()
    for functions in [fails, ends], [ends, fails]:
        with pytest.raises(UserError, match="^a wrong row$"): side_by_side(functions)
        (tmp_path/"ended").unlink()


def test_a_kill_beside_is_told(two, tmp_path):
    def ends(): time.sleep(1); (tmp_path/"ended").touch()
    def dies(): os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(Killed, match=r"was killed \(SIGKILL\).*run again to go on"): side_by_side([ends, dies])
    assert (tmp_path/"ended").exists()


def test_parts_side_by_side_have_the_numbers_of_one_after_another(finished, shop, tmp_path):
    shutil.copytree(finished, run := tmp_path/"run")
    for made in "backbones", "recommender": shutil.rmtree(run/made)
    llm = str(finished/"recommender/llm") # spares training one
    code = "from conftest import make; make({!r}, 'recommender', {!r}, llm={!r})".format(str(run), str(shop), llm)
    threads = "2" if os.environ.get("OMP_NUM_THREADS") == "1" else "1"
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True,
                   env=os.environ | {"OMP_NUM_THREADS": threads})
    def numbers(run, stage):
        return {file: hash for file, hash in manifest(run, stage)["outputs"].items()
                if file.endswith((".safetensors", ".parquet")) and not file.startswith("llm/")}
    for stage in "backbones", "recommender": assert numbers(run, stage) == numbers(finished, stage) != {}


def test_a_kernel_that_dies_while_it_waits_is_replaced(two, tmp_path, monkeypatch):
    started, real = [], launcher.start_kernel
    def start_kernel(chapter):
        started.append(chapter.stage)
        kernel = real(chapter)
        if started.count("left") == 1 and chapter.stage == "left": os.kill(kernel.provisioner.pid, signal.SIGKILL)
        return kernel
    monkeypatch.setattr(launcher, "start_kernel", start_kernel)
    assert go(write_toys(tmp_path/"nbs", first="time.sleep(2)"), tmp_path/"run")[-1] == ["last", "done"]
    assert sorted(started) == ["first", "last", "left", "left", "right"]


def test_an_interrupted_launch_leaves_no_kernel(tmp_path):
    write_toys(tmp_path/"nbs", left="time.sleep(60)", right="time.sleep(60)")
    code = f"""
import signal
from pathlib import Path
from ganprompt import jobs, launcher
signal.signal(signal.SIGINT, signal.default_int_handler) # a job in a shell's background would not hear it
launcher.cores = lambda: 2
toys = jobs.chapters(Path({str(tmp_path/"nbs")!r}))
launcher.launch(toys, jobs.chosen_values(toys, {{"run": {str(tmp_path/"run")!r}}}))"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    working, until = [tmp_path/f"run/{name}.partial/kernel" for name in ("left", "right")], time.time() + 60
    while not all(p.exists() and p.read_text() for p in working) and time.time() < until: time.sleep(.1)
    kernels = [p.read_text() for p in working]
    process.send_signal(signal.SIGINT)
    assert "KeyboardInterrupt" in process.communicate(timeout=120)[1]
    assert not [k for k in kernels if Path(f"/proc/{k}").exists()]


def test_a_fresh_process_knows_the_recommenders_of_a_notebook():
    "What a notebook's own cells have put into the registry is no module's, and travels with the work."
    code = """
from ganprompt import scorer
from ganprompt.processes import side_by_side
import ganprompt.processes as P
P.cores = lambda: 2
class Mine: pass
scorer.KINDS["mine"] = Mine
def look():
    from ganprompt.scorer import KINDS
    return KINDS["mine"].__name__
print(*side_by_side([look, look]))"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert said.stdout.split() == ["Mine", "Mine"], said.stderr[-500:]


class Unreadable:
    "Written down, but not read again."
    def __reduce__(self): return int, ("no number",)

@pytest.mark.parametrize("together", [lambda work: side_by_side([work, work]),
                                      lambda work: processes.in_processes(2, work)])
def test_work_that_a_fresh_process_cannot_read_is_told(together, monkeypatch):
    "By its error, and not as a process that died for lack of memory."
    monkeypatch.setattr(processes, "cores", lambda: 2)
    monkeypatch.setattr(processes, "_fork", processes._fresh) # as where there are GPUs
    with pytest.raises(RuntimeError, match="invalid literal"): together(partial(str, Unreadable()))
