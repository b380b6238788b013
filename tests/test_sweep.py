"""Jobs of a study: each made once and kept whole, whoever works beside, and what is said of those that are missing."""
import json, os, shutil, subprocess, sys
from pathlib import Path

import pytest
import yaml
from chromium import until
from conftest import begin, warm

from ganprompt import sweep as W
from ganprompt.files import UserError, root
from ganprompt.runs import replacing, settings_of, stage_maker
from ganprompt.cli import main
from ganprompt.sweep import Sweep, chosen_jobs, job_rows, make_missing, read_plan
from ganprompt.results import entry_path, lists_of, read_entry, read_tables

COUNTING = dict(baselines=dict(needs=["data"], models=["popularity", "last-item"]))


def plan_for(shop, seeds, **stages):
    stages = stages or COUNTING
    return dict(seeds=[*range(seeds)], datasets={str(shop): {s: about["models"] for s, about in stages.items()}},
                parameters=dict(core=2), stages=stages)


def made_here(chapters, values, may_replace=()):
    "In place of the launcher: the stages in this process, and a line for each launch of a job's own stage."
    for c in chapters:
        make = stage_maker(c.stage)
        with replacing(c.stage in may_replace): make(settings_of(make).of(values))
    if may_replace:
        with open(f"{values['run']}.made", "a") as file: file.write("made\n")


def work(barrier, sweep, backwards):
    W.launch = made_here
    for seed in sweep.plan["seeds"]:
        jobs = chosen_jobs(sweep.jobs(alone=True), seed=seed)
        barrier.wait()
        assert not make_missing(sweep, jobs[::-1] if backwards else jobs)


def test_two_beside_each_other_twenty_times(shop, tmp_path):
    """Two processes fill the two entries of a seed, the one forwards, the other backwards: they meet at the data, at an
    entry, and at the file of the data set. Nothing is made twice, lost, or torn."""
    sweep, barrier = Sweep(plan_for(shop, 20), str(tmp_path/"tables"), "", str(tmp_path/"runs")), warm.Barrier(2)
    both = [begin(work, barrier, sweep, backwards) for backwards in (False, True)]
    assert [process.wait() for process in both] == [0, 0]
    entries = read_tables(tmp_path/"tables")
    assert sorted((e["model"], e["seed"]) for e in entries) == sorted((m, s) for m in ("popularity", "last-item")
                                                                     for s in range(20))
    assert {p.name: p.read_text() for p in (tmp_path/"runs").glob("*.made")} == {
        f"{job.name}.made": "made\n" for job in sweep.jobs(alone=True)}
    kept = tmp_path/"tables"/"shop-csv"
    assert len(json.loads((kept/"data.json").read_text())["table1"]) == 2
    assert not [p for p in kept.iterdir() if p.suffix not in (".json", ".parquet")] and len([*kept.iterdir()]) == 81


def test_small_jobs_keep_what_a_whole_stage_keeps(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(W, "launch", made_here)
    kept = {}
    for alone in False, True:
        sweep = Sweep(plan_for(shop, 1), str(tmp_path/f"tables-{alone}"), "", str(tmp_path/f"runs-{alone}"))
        assert make_missing(sweep, jobs := sweep.jobs(alone)) == [] == make_missing(sweep, jobs)
        found = {e["model"]: e for e in (read_entry(entry_path(tmp_path/f"tables-{alone}", "shop.csv", m, 0), lists_of)
                                         for m in COUNTING["baselines"]["models"])}
        kept[alone] = {m: (e["ranks_digest"], e["users_digest"], e["data"], e["valid"]) for m, e in found.items()}
        assert all(e["peak_memory_mb"] > 0 for e in found.values())
    assert kept[True] == kept[False]
    assert (tmp_path/"runs-True/shop-0-baselines-popularity/data").samefile(tmp_path/"runs-True/shop-0/data")


def test_a_job_waits_for_the_settings_that_it_takes_over(shop, tmp_path, monkeypatch):
    monkeypatch.setattr(W, "launch", lambda *args, **more: pytest.fail("launched"))
    plan = plan_for(shop, 2, baselines=dict(needs=["data"], models=["popularity", "MF"]))
    sweep = Sweep(plan, str(tmp_path/"tables"))
    first, other = chosen_jobs(sweep.jobs(alone=True), entry="MF")
    assert [job_rows(sweep, [job])[0]["after"] for job in (first, other)] == [[], [first.name]]
    (fault,) = make_missing(sweep, [other])
    assert f"{first.name} comes first" in fault
    popularity, = chosen_jobs(sweep.jobs(alone=True), seed=1, entry="popularity")
    assert job_rows(sweep, [popularity])[0]["after"] == []


def test_what_a_job_reads_of_a_stage_that_is_asked_for_parts_is_made_in_its_own_folder(tmp_path, monkeypatch):
    "Where two stages read the same id model too: in a folder that they share, all id models would be made."
    asked = []
    monkeypatch.setattr(W, "launch", lambda chapters, values, may_replace: asked.append(
        ([c.stage for c in chapters], Path(values["run"]).name, values["models"])))
    stages = {stage: dict(needs=["data", "baselines"], reads=["MF"], models=[stage]) for stage in ("collm", "ctrl")}
    plan = dict(seeds=[0], datasets={"beauty": {s: about["models"] for s, about in stages.items()}}, stages=stages)
    sweep = Sweep(plan, str(tmp_path/"tables"), "", str(tmp_path/"runs"))
    monkeypatch.setitem(W.studies(), "tables", W.studies()["tables"]._replace(keep=lambda *args: None))
    assert len(make_missing(sweep, sweep.jobs())) == 2 # nothing was made
    assert [row for row in asked if "baselines" in row[0]] == [(["baselines", s], f"beauty-0-{s}", "MF")
                                                               for s in stages]


def test_a_failure_is_kept_until_the_model_is_made(shop, tmp_path, monkeypatch):
    from ganprompt import baselines
    from ganprompt.tables import data_of
    monkeypatch.setattr(W, "launch", made_here)
    sweep = Sweep(plan_for(shop, 1), str(tmp_path/"tables"), "", str(tmp_path/"runs"))
    def broken(*args): raise UserError("no counting today")
    with monkeypatch.context() as m:
        m.setitem(baselines.COUNTED, "last-item", broken)
        (fault,) = make_missing(sweep, sweep.jobs())
    assert "last-item has failed" in fault
    (data,) = data_of(tmp_path/"tables")
    assert [(f["model"], f["seed"], f["why"]) for f in data["failed"]] == [("last-item", 0, "no counting today")]
    assert make_missing(sweep, chosen_jobs(sweep.jobs(True), entry="last-item")) == []
    assert data_of(tmp_path/"tables")[0]["failed"] == []


def said(monkeypatch, capsys, *words, command="fill"):
    monkeypatch.setattr(sys, "argv", ["ganprompt", command, *map(str, words)])
    with pytest.raises(SystemExit) as end: main()
    return end.value.code or 0, capsys.readouterr()


def test_the_command(shop, tmp_path, monkeypatch, capsys):
    "It lists, prints, makes one entry, and ends with 0, 1 or 3."
    (plan := tmp_path/"plan.yaml").write_text(yaml.safe_dump(plan_for(shop, 2) | dict(
        datasets={str(shop): ["baselines"]})))
    base = tmp_path/"tables", "--plan", plan, "--runs", tmp_path/"runs"
    monkeypatch.setattr(W, "launch", made_here)
    code, out = said(monkeypatch, capsys, *base, "--list")
    assert code == 0 and "4 of 4 are missing" in out.out and not (tmp_path/"runs").exists()
    code, out = said(monkeypatch, capsys, *base, "--seed", 1, "--entry", "popularity")
    assert code == 0 and [p.name for p in (tmp_path/"tables").glob("*/*-*.json")] == ["popularity-1.json"]
    code, out = said(monkeypatch, capsys, *base, "--list", "--json")
    rows = json.loads(out.out)
    assert [row["missing"] for row in rows] == [["popularity"], ["last-item"], [], ["last-item"]]
    took = [sum(json.loads(p.read_text())["seconds"].values())/60 # on other data sets, by the project
            for p in (root()/"data/results/tables").glob("*/last-item-*.json")]
    assert rows[1]["minutes"] == round(sum(took)/len(took), 2) and rows[1]["memory_mb"] is None
    assert rows[0]["memory_mb"] > 0 and not rows[0]["gpu"]
    code, out = said(monkeypatch, capsys, *base, "--dry-run", *rows[1]["args"])
    lines = out.out.splitlines()
    assert [line.split()[0] for line in lines] == ["mkdir", "papermill", "ln", "papermill", "ganprompt"]
    assert f"-r dataset {shop}" in lines[1] and "-r models last-item" in lines[3]
    code, out = said(monkeypatch, capsys, *base, "--entry", "popularty")
    assert code == 1 and "did you mean 'popularity'?" in out.err
    code, out = said(monkeypatch, capsys, tmp_path/"mine", *base[1:], "--list")
    assert code == 1 and "no plan makes" in out.err and "tables, standard" in out.err
    def fails(*args, **more): raise UserError("no room")
    monkeypatch.setattr(W, "launch", fails)
    code, out = said(monkeypatch, capsys, *base, *rows[1]["args"])
    assert code == 3 and out.err == "ganprompt: shop-0-baselines-last-item: no room\n"
    code, out = said(monkeypatch, capsys, tmp_path/"tables-none", *base[1:], "--data-dir", "", command="tables")
    assert code == 3 and out.err.count(": no room") == 2 and "no results" not in out.err # nothing to draw, and why


@pytest.mark.skipif(not shutil.which("snakemake"), reason="no Snakemake; with it: pip install -e '.[sweep]'")
def test_snakemake_makes_what_is_missing_and_then_nothing(tmp_path):
    from sweep import Sweeps
    sweeps = Sweeps(tmp_path, "snakemake", seeds=1)
    assert sweeps.begin().wait() == 0, (tmp_path/"snakemake.log").read_text()
    kept = sweeps.kept()
    assert sorted(kept) == ["last-item-0.json", "popularity-0.json"] and [*(tmp_path/"tables").glob("table*.md")]
    assert sweeps.begin().wait() == 0 and sweeps.kept() == kept


PLANS = "tables standard sequences robustness robustness-fresh ablation real".split()


@pytest.mark.parametrize("plan", PLANS)
def test_jobs_of_the_projects_plans(plan):
    "Every model is in one job, jobs have names of their own, and nothing is needed twice."
    sweep = Sweep(read_plan(str(root()/f"data/{plan}.yaml")), plan)
    jobs = sweep.jobs(alone=True)
    assert len({job.name for job in jobs} | {job.base for job in jobs}) == len(jobs) + len({job.base for job in jobs})
    assert len(entries := [(j.base, m) for j in jobs for m in j.models]) == len(set(entries)) == sum(
        len(job.models) for job in sweep.jobs())
    for job in jobs:
        shared, own = sweep.needs(job)
        assert shared + own == sweep.plan["stages"][job.stage]["needs"] and "data" in shared
        assert all(n not in sweep.needs(j)[0] for n in own for j in jobs if j.base == job.base)


HOLD = """
import os, sys, time
from pathlib import Path
from ganprompt.sweep import own_card
runs, n, sign = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
with own_card(runs, n):
    sign.with_suffix(".half").write_text(os.environ.get("CUDA_VISIBLE_DEVICES", "unset"))
    sign.with_suffix(".half").rename(sign)
    while not sign.with_suffix(".done").exists(): time.sleep(.05)
"""


@pytest.mark.parametrize("given,cards", [(None, {"0", "1"}), ("3,5,7", {"3", "5"})])
def test_each_job_of_a_pool_has_a_card_of_its_own(tmp_path, given, cards):
    "The third waits for one; who is killed gives its own back."
    env = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | (
        {"CUDA_VISIBLE_DEVICES": given} if given else {})
    signs = [tmp_path/name for name in "abcd"]
    def begin(sign): return subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path), "2", str(sign)], env=env)
    jobs = [begin(sign) for sign in signs[:2]]
    try:
        until(lambda: all(sign.exists() for sign in signs[:2]))
        assert {sign.read_text() for sign in signs[:2]} == cards
        jobs += [begin(sign) for sign in signs[2:]]
        signs[0].with_suffix(".done").touch()
        assert jobs[0].wait(30) == 0
        until(lambda: signs[2].exists() or signs[3].exists())
        third, fourth = (2, 3) if signs[2].exists() else (3, 2)
        assert signs[third].read_text() == signs[0].read_text() and not signs[fourth].exists()
        jobs[1].kill(); jobs[1].wait()
        until(lambda: signs[fourth].exists(), 120)
        assert signs[fourth].read_text() == signs[1].read_text()
    finally:
        for sign in signs: sign.with_suffix(".done").touch()
        for job in jobs: job.wait(30)


def test_without_a_pool_a_job_takes_what_it_is_given(tmp_path, monkeypatch):
    for given in ("1", None):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given) if given else monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
        with W.own_card(tmp_path, 0): assert os.environ.get("CUDA_VISIBLE_DEVICES") == given
