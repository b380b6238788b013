"The whole way through real papermill: undisturbed, killed in both trainings, and again without change."
import json, shutil, subprocess, sys, time
from pathlib import Path

import polars as pl
import psutil
import pytest
from conftest import SMALL

GANPROMPT = str(Path(sys.executable).with_name("ganprompt"))


def command(run, shop, **more):
    values = SMALL | {"dataset": shop, "run": run, "figure_users": 30, "resamples": 100,
                      "recommender": "t5-decoder,t5-ranker"} | more
    return [GANPROMPT, "run", *(x for name, value in values.items()
                                for x in (f"--{name.replace('_', '-')}", str(value)))]


def launch(*args, **kwargs):
    return subprocess.run(command(*args, **kwargs), capture_output=True, text=True, timeout=600)


def kill_in(run, shop, stage):
    """Launch a training stage and kill the launcher once it has begun; so short a training has no checkpoint yet and
    starts over. The kernel, which has to notice by itself and looks once a second, is held for that long: on a fast
    machine it would be through."""
    code = "import os, sys; os.setsid(); os.execv(sys.argv[1], sys.argv[1:])"
    only = {"encoder": "encoder", "recommender": "encoder,recommender"}[stage]
    process = subprocess.Popen([sys.executable, "-c", code, *command(run, shop, only=only)], stdout=subprocess.DEVNULL)
    for _ in range(6000):
        if list((run/f"{stage}.partial").rglob("no-stage-1" if stage == "recommender" else ".fingerprint")): break
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(.02)
    time.sleep(.1)
    held = psutil.Process(process.pid).children(recursive=True)
    for child in held: child.suspend()
    process.kill(); process.wait() # the launcher alone
    time.sleep(2)
    for child in held: child.resume()
    assert held and not psutil.wait_procs(held, timeout=10)[1] and not (run/stage).exists()


@pytest.fixture(scope="module")
def whole(shop, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs")/"whole"
    done = launch(run, shop)
    assert done.returncode == 0, done.stderr
    return run, done.stdout


def test_a_run_ends_with_table_figures_and_report(whole):
    run, said = whole
    assert "measured" in said and "figure3.png" in said and "report.html" in said
    assert all((run/p).stat().st_size for p in ("metrics/table.csv", "metrics/table.html", "figures/figure3.png",
                                                "figures/figure3.pdf", "report.html"))
    assert len(list((run/"notebooks").glob("*.ipynb"))) == len(list((run/"logs").glob("*.log"))) == 8
    made = {f"{start}{kind}" for start in ("no-stage-1", "ganprompt") for kind in ("", ", t5-ranker")}
    assert set(json.loads((run/"metrics/table.json").read_text())["metrics"]) == {"random", "popularity"} | made


def test_again_without_change_executes_nothing(whole, shop):
    run, _ = whole
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and ".locks" not in p.parts}
    start = time.time()
    done = launch(run, shop)
    assert done.stdout.count("up to date") == 8 and " done " not in done.stdout and time.time() - start < 20
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and ".locks" not in p.parts}


def test_a_run_killed_in_both_trainings_ends_with_the_same_numbers(whole, shop, tmp_path):
    "Up to the metrics; that equal states give equal figures is a test of theirs."
    run = tmp_path/"killed"
    for stage in "data", "prompts", "backbones", "attributes": shutil.copytree(whole[0]/stage, run/stage)
    for stage in "encoder", "recommender": kill_in(run, shop, stage)
    done = launch(run, shop, only="encoder,recommender,metrics")
    assert done.returncode == 0, done.stderr
    assert json.loads((run/"metrics/table.json").read_text()) == json.loads((whole[0]/"metrics/table.json").read_text())
    for file in "encoder/states.parquet", "recommender/scores.parquet":
        assert pl.read_parquet(run/file).equals(pl.read_parquet(whole[0]/file))


def test_a_data_set_without_titles_stops_with_a_reason(shop, tmp_path):
    bare = tmp_path/"bare.csv"
    pl.read_csv(shop).drop("title").write_csv(bare)
    done = launch(tmp_path/"run", bare)
    assert done.returncode == 1 and "no item titles" in done.stderr and "Traceback" not in done.stderr
    assert ((tmp_path/"run/data").exists() and not (tmp_path/"run/prompts").exists()
            and not list((tmp_path/"run").glob("*.partial")))
