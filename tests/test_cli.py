"The launcher: strict before it starts, one process a chapter, nothing done twice, and it goes on after a kill."
import io, json, os, re, signal, subprocess, sys, time
from pathlib import Path

import nbformat
import pytest
import yaml
from conftest import SMALL
from click.testing import CliRunner
from rich.console import Console

from ganprompt.files import UserError, root, write_json
from ganprompt.processes import TimeOver
from ganprompt.runs import complete, manifest, stage
from ganprompt.jobs import (ask_run, chapters, chosen_values, convert, parameters, read_chapter, read_parameters,
                            stage_call, upstream)
from ganprompt.launcher import launch
from ganprompt.scorer import bank_for
from ganprompt.results import entry_path
from ganprompt.cli import chosen_chapters, cli, main
from ganprompt.sweep import Sweep, make_missing, read_plan, studies

TRAIN = '''
import os, time
def make(folder):
    (folder.parent/"kernel.pid").write_text(str(os.getpid()))
    seed_all(0)
    import torch
    start, state = load_checkpoint(folder) or (0, {"x": 0.})
    x = state["x"]
    for step in range(start, steps):
        x = .9 * x + torch.rand(()).item()
        save_checkpoint(folder, step + 1, {"x": x})
        print("step", step, flush=True)
        time.sleep(pause)
    write_json(folder/"x.json", {"x": x, "began": start})
stage(run, "train", {"steps": steps}, make)'''
TRAIN_PARAMETERS = 'steps: int = 30  # Steps\npause: float = 0.  # Seconds a step'


def notebook(path, declared, body, tags=("parameters",)):
    cells = [nbformat.v4.new_markdown_cell("# Toy\n\n## Run this stage"),
             nbformat.v4.new_code_cell('run: str = "demo"  # Run folder\nseed: int = 0  # Seed\n' + declared,
                                       metadata={"tags": list(tags)}),
             nbformat.v4.new_code_cell("from ganprompt.files import *\nfrom ganprompt.processes import *\n"
                                       "from ganprompt.runs import *\n" + body)]
    path.parent.mkdir(exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)


def go(nbs, run, **given):
    "Launch and return what was printed."
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    launch(chapters(nbs), chosen_values(chapters(nbs), {"run": str(run), **given}), console)
    return console.file.getvalue()


@pytest.mark.parametrize("path", sorted((root()/"nbs").glob("[0-9]*.ipynb")), ids=lambda p: p.stem)
def test_every_chapter_is_strict(path):
    "One parameters cell, which papermill understands as we do, with a help text a line."
    chapter = read_chapter(path)
    if chapter is None: return
    import papermill
    assert "run" in chapter.parameters
    assert all(p.type in ("str", "int", "float", "bool") and p.help for p in chapter.parameters.values())
    theirs = papermill.inspect_notebook(path)
    assert ({(n, p["inferred_type_name"], p["help"]) for n, p in theirs.items()}
            <= {(n, p.type, p.help) for n, p in chapter.parameters.items()})


def test_shared_parameters_agree():
    for c in chapters():
        for name, p in c.parameters.items():
            assert (p.type, p.default) == parameters(chapters())[name][1:3], f"{c.path.name}: {name}"


@pytest.mark.parametrize("tags", [[], ["parameter"]])
def test_chapter_without_its_tag_is_refused(tmp_path, tags):
    notebook(tmp_path/"01_toy.ipynb", "", "", tags)
    with pytest.raises(UserError, match="01_toy.ipynb: 0 cells are tagged `parameters`"): chapters(tmp_path)


def test_line_of_another_form_is_refused():
    with pytest.raises(UserError, match="line 2"): read_parameters("a: int = 1\nb: int = a + 1", "toy")


@pytest.mark.parametrize("args, message", [
    (["--datset", "toys"], "unknown parameter 'datset'; the nearest known name is 'dataset'"),
    (["--max-histori=3"], "unknown parameter 'max_histori'; the nearest known name is 'max_history'"),
    (["--core", "many"], "--core: core must be int, not 'many'"),
    (["--preset", "huge"], "unknown preset 'huge'; there are pocket, minilm, smollm2, t5-small, paper, llama"),
    (["--until", "dinner"], "there is no stage 'dinner'"),
    (["--config", "nowhere.yaml"], "cannot read nowhere.yaml"),
])
def test_mistakes_on_the_command_line(tmp_path, monkeypatch, capsys, args, message):
    "One line, a non-zero exit code, and nothing made."
    monkeypatch.setattr(sys, "argv", ["ganprompt", "run", "--run", str(tmp_path/"run"), *args])
    with pytest.raises(SystemExit) as end: main()
    said = capsys.readouterr()
    assert end.value.code == 1 and message in said.err and said.err.count("\n") == 1 and not said.out
    assert not (tmp_path/"run").exists()


@pytest.mark.parametrize("text, message", [
    ("core: 5\ndatset: toys\n", "line 2: unknown parameter 'datset'; the nearest known name is 'dataset'"),
    ("\n\ncore: many\n", "line 3: core must be int, not 'many'"),
    ("core: [1, 2]\n", "line 1: core must be one value"),
    ("just words\n", "not a list of"),
    ("core: 'open\n", "is not YAML"),
])
def test_mistakes_in_a_config(tmp_path, text, message):
    (tmp_path/"my.yaml").write_text(text)
    with pytest.raises(UserError) as e: chosen_values(chapters(), {}, config=tmp_path/"my.yaml")
    assert message in str(e.value) and "my.yaml" in str(e.value) and "\n" not in str(e.value)


def test_precedence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/"my.yaml").write_text("core: 7\nrating: 4\ndataset: toys\ndata_dir: raw\n")
    values = chosen_values(chapters(), {"core": "9"}, config="my.yaml")
    assert (values["core"], values["rating"], values["min_history"]) == (9, 4., 3)
    assert values["run"] == "toys" and values["data_dir"] == str(tmp_path/"raw")


@pytest.mark.parametrize("name", list(yaml.safe_load((root()/"data"/"presets.yaml").read_text())))
def test_presets_name_known_parameters(name):
    values = chosen_values(chapters(), {}, preset=name)
    assert values["encoder"] == {"pocket": "pocket", "t5-small": "t5-small", "paper": "t5-base", "llama": "t5-base"
                                 }.get(name, "sentence-transformers/all-MiniLM-L6-v2")
    assert (values["llm"] != "pocket") == (name in ("smollm2", "llama"))


def test_presets_are_listed_with_their_needs():
    done = subprocess.run([sys.executable, "-c", "from ganprompt.cli import main; main()", "presets"],
                          capture_output=True, text=True, env=os.environ | {"COLUMNS": "160"})
    found = yaml.safe_load((root()/"data"/"presets.yaml").read_text())
    assert len(found) == 6 and all(f" {name} " in done.stdout for name in found), done.stderr
    for preset in found.values():
        assert re.search(r"measured|estimated", preset["needs"]) and preset["needs"].split()[0] in done.stdout


@pytest.mark.parametrize("type, text, value", [("bool", "True", True), ("bool", "no", False), ("float", "5e-5", 5e-5),
                                               ("str", "no", "no"), ("int", "-3", -3)])
def test_convert(type, text, value):
    p, = read_parameters(f"x: {type} = {value!r}", "toy").values()
    assert convert(p, text, "here") == value


def test_help():
    start = time.monotonic()
    page = CliRunner().invoke(cli, ["run", "--help"]).output
    assert time.monotonic() - start < 1
    listed = {"run"}
    for c in chapters():
        # a parameter is listed where it comes first
        assert (f"{c.path.stem}: {c.title}" in page) == bool(set(c.parameters) - listed)
        listed |= set(c.parameters)
        for name in c.parameters: assert f"--{name.replace('_', '-')} " in page
    assert "torch" not in subprocess.run([sys.executable, "-c", "import sys, ganprompt.cli; print([*sys.modules])"],
                                         capture_output=True, text=True).stdout


def test_underscores_are_as_good_as_dashes():
    for spelling in ("--max-history", "--max_history"):
        result = CliRunner().invoke(cli, ["run", spelling, "many"])
        assert str(result.exception) == "--max-history: max_history must be int, not 'many'"


def test_kernel_is_this_environment(tmp_path):
    notebook(tmp_path/"nbs"/"01_who.ipynb", "", '''
import os, sys
stage(run, "who", {}, lambda folder: write_json(folder/"who.json", [sys.executable, os.getcwd()]))''')
    go(tmp_path/"nbs", tmp_path/"run")
    assert json.loads((tmp_path/"run"/"who"/"who.json").read_text()) == [sys.executable, str(tmp_path/"nbs")]


def ended(pid, within):
    "Whether a process is gone in time; one that nobody waits for counts as gone."
    until = time.monotonic() + within
    while time.monotonic() < until:
        try: state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError): return True
        if state == "Z": return True
        time.sleep(.1)
    return False


def test_killed_launcher_goes_on_and_then_rests(tmp_path):
    notebook(tmp_path/"nbs"/"01_train.ipynb", TRAIN_PARAMETERS, TRAIN)
    go(tmp_path/"nbs", tmp_path/"calm")
    code = f'''
from pathlib import Path
from ganprompt.jobs import *
from ganprompt.launcher import *
nbs = chapters(Path({str(tmp_path/"nbs")!r}))
launch(nbs, chosen_values(nbs, {{"run": {str(tmp_path/"killed")!r}, "pause": ".5", "steps": "30"}}))'''
    launcher = subprocess.Popen([sys.executable, "-c", code])
    log, until = tmp_path/"killed"/"logs"/"01_train.log", time.monotonic() + 60
    while not (log.exists() and "step 4" in log.read_text()) and time.monotonic() < until: time.sleep(.1)
    with pytest.raises(UserError, match=f"in use by process {launcher.pid}"): go(tmp_path/"nbs", tmp_path/"killed")
    launcher.send_signal(signal.SIGKILL); launcher.wait()
    assert ended(int((tmp_path/"killed"/"kernel.pid").read_text()), within=8), "the kernel outlived its launcher"
    assert not complete(tmp_path/"killed"/"train")
    said = go(tmp_path/"nbs", tmp_path/"killed")
    assert "train" in said and "done" in said
    calm, killed = (json.loads((tmp_path/run/"train"/"x.json").read_text()) for run in ("calm", "killed"))
    assert killed["began"] >= 5 and calm["began"] == 0 and calm["x"] == killed["x"]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path/"killed").rglob("*") if p.is_file()}
    assert "up to date" in go(tmp_path/"nbs", tmp_path/"killed")
    changed = {p.name for p, t in before.items() if p.stat().st_mtime_ns != t}
    assert changed <= {"run", "train"}, "only lock files may be touched"
    html = (tmp_path/"killed"/"report.html").read_text()
    # what was printed while it went on stands in the log
    assert html.count("<details class=\"chapter\"") == 1 and "step 29" in log.read_text()


@pytest.mark.parametrize("body, message", [
    ("raise UserError('no titles; use another data set')", "toy: no titles; use another data set\n(log: "),
    ("1/0", "toy: ZeroDivisionError: division by zero\n(log: "),
    ("print('words')", "its stage is not complete"),
    ("import os; os._exit(1)", "its process died"),
])
def test_failing_chapter(tmp_path, body, message):
    notebook(tmp_path/"nbs"/"01_toy.ipynb", "", body)
    with pytest.raises(UserError) as e: go(tmp_path/"nbs", tmp_path/"run")
    assert message in str(e.value) and str(tmp_path/"run"/"logs"/"01_toy.log") in str(e.value)
    assert not list((tmp_path/"run").glob("toy*")) and not (tmp_path/"run"/"report.html").exists()
    if "/0" in body: assert "ZeroDivisionError" in (tmp_path/"run"/"logs"/"01_toy.log").read_text()


def test_show(tmp_path):
    folder = tmp_path/"run"
    from ganprompt.runs import stage
    def make(f):
        (f/"table1.csv").write_text("data set,users\nbeauty,4144\n")
        return {"users": 4144}
    stage(folder, "data", {}, make)
    said = CliRunner().invoke(cli, ["show", str(folder)]).output
    assert "users 4144" in said and "data/table1.csv" in said and "beauty" in said and "missing" in said
    assert "there is no run" in str(CliRunner().invoke(cli, ["show", str(tmp_path/"none")]).exception)


def test_console_script():
    start = time.monotonic()
    done = subprocess.run([f"{sys.prefix}/bin/ganprompt", "--help"], capture_output=True, text=True, check=True)
    assert time.monotonic() - start < 2 and {"run", "show", "fetch"} <= set(done.stdout.split())


def test_tables_make_what_is_missing_and_a_failure_does_not_stop_the_rest(shop, tmp_path, monkeypatch, capsys):
    """A shop without titles: the models that count can be made, those that read cannot; the second time only the
    failed stage is tried."""
    import polars as pl

    (bare := tmp_path/"bare.csv").write_text(pl.read_csv(shop).drop("title").write_csv())
    plan = dict(seeds=[0, 1], datasets={str(bare): ["p5", "baselines"]}, parameters=dict(core=2), stages=dict(
        baselines=dict(needs=["data"], models=["popularity", "last-item"]),
        p5=dict(needs=["data", "prompts", "backbones"], models=["P5 (ids)"])))
    (tmp_path/"plan.yaml").write_text(yaml.safe_dump(plan))
    monkeypatch.setattr("ganprompt.files.workspace", lambda: tmp_path)
    for again in False, True:
        monkeypatch.setattr(sys, "argv", ["ganprompt", "tables", "--data-dir", "", "--plan", str(tmp_path/"plan.yaml"),
                                          "--runs", str(tmp_path/"runs")])
        with pytest.raises(SystemExit) as end: main()
        said = capsys.readouterr()
        assert end.value.code == 3 and said.err.count("no item titles") == 2 and "Traceback" not in said.err
        assert ("bare-1-baselines: popularity, last-item" in said.out) != again and "bare-0-p5: P5 (ids)" in said.out
        assert ({p.name for p in (tmp_path/"data/results/tables/bare-csv").glob("*.json")}
                == {"data.json", "popularity-0.json", "popularity-1.json", "last-item-0.json", "last-item-1.json"})


@pytest.mark.parametrize("kind, stages, kept, asked", [
    ("robustness", dict(study=["one template", "P5"]), "one template", dict(study_entries=["P5", "one template,P5"])),
    ("tables", dict(baselines=["HGN", "MF"], collm=["CoLLM"]), "MF", dict(models=["HGN", "HGN,MF"])),
    ("sequences", dict(collm=["CoLLM"]), "CoLLM", dict(models=[None, "MF"]))])
def test_a_plan_asks_for_what_is_missing_as_its_kind_of_study_says(kind, stages, kept, asked, tmp_path, monkeypatch):
    """And keeps it so; the models that a stage reads are asked for where it is made, and those that are trained again
    take over the settings of the first run."""
    home, launched, defaults = tmp_path/f"{kind}-mine", [], chosen_values(chapters(), {})
    plan = dict(seeds=[0, 1], datasets={"beauty": stages}, parameters=dict(core=2), stages={
        stage: dict(needs=["data"], reads=["MF"] if stage == "collm" else []) for stage in stages})
    (first := entry_path(home, "beauty", kept, 0)).parent.mkdir(parents=True)
    first.write_text("{}")
    def keep(run, study, out, only):
        assert study == out == home
        for m in only: entry_path(study, "beauty", m, launched[-1][1]["seed"]).write_text("{}")
    monkeypatch.setitem(studies(), kind, studies()[kind]._replace(keep=keep))
    def launch(_, values, may_replace):
        if may_replace: launched.append((*may_replace, values))
    monkeypatch.setattr("ganprompt.sweep.launch", launch)
    sweep = Sweep(plan, str(home), "", str(tmp_path/"runs"))
    assert make_missing(sweep, sweep.jobs()) == [] == make_missing(sweep, sweep.jobs())
    for name, wanted in asked.items():
        said = {values["seed"]: values[name] for stage, values in launched if stage != "collm" or kind == "sequences"}
        assert [said.get(seed) for seed in (0, 1)] == wanted
    assert {v["core"] for _, v in launched} == {2} and {v["encoder"] for _, v in launched} == {defaults["encoder"]}
    assert ([v["search_run"] for _, v in launched if v["seed"]]
            == [str(home/"beauty") if kind != "robustness" else ""]*len(stages))


def test_within_minutes_entries_are_made_one_by_one_and_kept_as_they_end(shop, tmp_path, monkeypatch, capsys):
    """In this process; what ran out of time goes on, what failed is told, and what is kept is not made again. The
    plan's own entries count, and one that is made elsewhere too is not asked for."""
    from ganprompt import study

    plan = dict(seeds=[0], datasets={str(shop): ["study"]}, parameters=SMALL | dict(
        study_users=6, recommender_epochs=1, study_recommender="ranker"), encoders={}, entries={
            "one": dict(encoder="backbone", attributes=False), "two": dict(encoder="backbone"),
            "three": dict(tuned=False, llm="no/such-model"),
            "four": dict(encoder="backbone", wordings=2)}, stages=dict(study=dict(
                needs=["data", "prompts", "backbones", "attributes"], models=["one", "two", "three", "four"])))
    plan["parameters"].pop("recommender")
    (tmp_path/"plan.yaml").write_text(yaml.safe_dump(plan))
    home, made, real = tmp_path/"robustness-mine", [], study.score_bank
    def timed(model, own, bank, rows, lists, name, keep):
        made.append(name)
        if made == ["one", "two"]: raise TimeOver("after 60 s")
        return real(model, own, bank, rows, lists, name, keep)
    monkeypatch.setattr(study, "score_bank", timed)
    monkeypatch.setattr(study, "bank_for", lambda *p: [t for t in bank_for(*p) if t["split"] != "attack"][::6])
    def go():
        monkeypatch.setattr(sys, "argv", ["ganprompt", "tables", str(home), "--data-dir", "", "--plan",
                                          str(tmp_path/"plan.yaml"), "--runs", str(tmp_path/"runs"), "--minutes", "60"])
        with pytest.raises(SystemExit) as end: main()
        return end.value.code, capsys.readouterr()
    code, said = go()
    assert not code and "after 60 s: 3 entries are left" in said.out and made == ["one", "two"]
    assert [p.name for p in home.rglob("*-0.json")] == ["one-0.json"]
    assert (tmp_path/"runs/shop-0-study-two/study.partial").is_dir() and not [*tmp_path.glob("runs/*/notebooks")]
    code, said = go()
    assert code == 3 and "no/such-model" in said.err and made == ["one", "two", "two", "four"]
    assert sorted(p.name for p in home.rglob("*-0.json")) == ["four-0.json", "one-0.json", "two-0.json"]
    kept = json.loads(next(home.rglob("four-0.json")).read_text())
    assert kept["settings"]["wordings"] == 2 and kept["recommender"] == "ranker"
    assert "study_file" not in kept["parameters"]


@pytest.mark.parametrize("text, message", [("seeds: [0]\n", "not a plan"),
                                           ("datasets: {a: [dinner]}\nstages: {}\n", "no stage 'dinner'"),
                                           ("a: [", "is not YAML")])
def test_mistakes_in_a_plan(tmp_path, text, message):
    (tmp_path/"plan.yaml").write_text(text)
    with pytest.raises(UserError, match=message): read_plan(str(tmp_path/"plan.yaml"))


def test_only_these_stages():
    assert [c.stage for c in chosen_chapters(chapters(), only="baselines, data")] == ["data", "baselines"]
    with pytest.raises(UserError, match="--only: there is no stage 'dinner'"):
        chosen_chapters(chapters(), only="data,dinner")
    assert ("baselines" not in [c.stage for c in chosen_chapters(chapters())]
            and [c.stage for c in chosen_chapters(chapters(), "benchmarks")][-1] == "benchmarks")


VALUE = """
def make(folder):
    write_json(folder/"value.json", [seed, size])
with replacing(replace): stage(run, "toy", {"seed": seed, "size": size}, make)"""
VALUE_PARAMETERS = ('size: int = 1  # Size\npause: float = 0.  # Not of the result\nreplace: bool = False  # Whether '
                    'it may be replaced')


def test_a_run_remembers_what_it_was_made_with(tmp_path):
    """Later launches need its name; a contradiction is refused before a chapter runs, unless replacing is allowed,
    which is not part of the result."""
    notebook(tmp_path/"nbs"/"01_toy.ipynb", VALUE_PARAMETERS, VALUE)
    nbs, run = tmp_path/"nbs", tmp_path/"run"
    made = lambda: json.loads((run/"toy/value.json").read_text())
    assert "a new run" in go(nbs, run, size="5") and made() == [0, 5]
    assert "up to date" in go(nbs, run) and "up to date" in go(nbs, run, replace="true") and made() == [0, 5]
    log = (run/"logs/01_toy.log").stat().st_mtime_ns
    with pytest.raises(UserError,
                       match="stage 'toy' of run .* was made with other values: size 5 -> 1; to replace it: --replace "
                             "true"):
        go(nbs, run, size="1")
    assert (run/"logs/01_toy.log").stat().st_mtime_ns == log and made() == [0, 5]
    assert "done" in go(nbs, run, size="2", replace="true") and made() == [0, 2] and "up to date" in go(nbs, run)
    assert (json.loads((run/"run.json").read_text()) == {"parameters": {"size": 2}}
            and chosen_values(chapters(nbs), {"run": str(run)})["size"] == 2)


def test_what_was_chosen_is_remembered_for_stages_to_come(tmp_path):
    notebook(tmp_path/"nbs"/"01_toy.ipynb", VALUE_PARAMETERS, VALUE)
    notebook(tmp_path/"nbs"/"02_late.ipynb", "late: int = 0  # Late",
             'stage(run, "late", {"seed": seed, "late": late}, lambda folder: write_json(folder/"late.json", late))')
    first, both = chapters(tmp_path/"nbs")[:1], chapters(tmp_path/"nbs")
    given = {"run": str(tmp_path/"run"), "late": "3", "seed": "1"}
    launch(first, chosen_values(both, given), Console(file=io.StringIO()))
    launch(both, chosen_values(both, {"run": str(tmp_path/"run")}), Console(file=io.StringIO()))
    assert (json.loads((tmp_path/"run/late/late.json").read_text()) == 3
            and manifest(tmp_path/"run", "late")["seed"] == 1)


@pytest.fixture
def chain(tmp_path):
    "A run with stages as the chapters make them, but for what they hold."
    run = tmp_path/"run"
    for name, params in ("data", {"dataset": "shop.csv", "core": 3}), ("backbones",
            {"seed": 0, "encoder": "pocket"}), ("encoder", {"seed": 0, "alpha": 1.}), ("recommender",
                    {"seed": 0, "recommender": "t5-decoder,t5-ranker"}):
        inputs = [other for other in stage_call(name).get("inputs", ()) if complete(run/other)]
        stage(run, name, params, lambda folder: write_json(folder/"x.json", params), inputs=inputs,
              grows=stage_call(name).get("grows", ()), given={"dataset": "/a/shop.csv"} if name == "data" else None)
    return run


def test_what_the_run_contradicts_is_refused_first(chain):
    values = chosen_values(chapters(), {"run": str(chain)})
    assert (values["dataset"] == "/a/shop.csv" and values["core"] == 3
            and values["recommender"] == "t5-decoder,t5-ranker")
    assert (set(upstream(chain, ["recommender"])) == {"data", "backbones", "encoder"}
            and set(stage_call("metrics")["inputs"]) == {"data", "recommender"})
    ask_run(["data", "encoder", "recommender"], values)
    for changed, stages, said in [({"seed": 1}, ["recommender"],
                                   "recommender of run .* would be built on 'backbones', which was made with other "
                                   "values: seed 0 -> 1"),
                                  ({"alpha": 2.}, ["encoder"],
                                   "stage 'encoder' .* was made with other values: alpha 1.0 -> 2.0"),
                                  ({"core": 5}, ["metrics"],
                                   "metrics of run .* would be built on 'data', .*core 3 -> 5"),
                                  ({"dataset": "demo"}, ["data"], "dataset '/a/shop.csv' -> 'demo'")]:
        with pytest.raises(UserError, match=said): ask_run(stages, values | changed)
    # not what they read
    for stages in ["encoder"], ["baselines"]: ask_run(stages, values | {"recommender": "causal-lm"})
    for more in "t5-ranker", "t5-decoder,t5-ranker,causal-lm": ask_run(["recommender"], values | {"recommender": more})
    ask_run(["encoder", "recommender"], values | {"alpha": 2., "replace": True})
    ask_run(["encoder"], values | {"alpha": 2.}, may_replace=["encoder"])
    with pytest.raises(UserError, match="built on 'encoder'"):
        ask_run(["recommender"], values | {"alpha": 2., "replace": True})


def test_only_with_another_seed_is_refused_on_the_command_line(chain, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ganprompt", "run", "--run", str(chain), "--only", "encoder", "--seed", "1",
                                      "--dataset", "demo"])
    with pytest.raises(SystemExit): main()
    said = capsys.readouterr()
    assert "was made with other values: seed 0 -> 1" in said.err and not said.out and not (chain/"notebooks").exists()


def test_show_says_why(chain):
    about = manifest(chain, "backbones")
    write_json(chain/"backbones/manifest.json", about | {"sources": about["sources"] | {"backbones.py": "0"},
                                                         "fingerprint": "0"})
    said = CliRunner().invoke(cli, ["show", str(chain)]).output
    assert ("backbones is out of date: sources: backbones.py\n" in said
            and "encoder is out of date: input backbones is out of date\n" in said)


def papermill(nb, tmp_path, *parameters):
    "Execute a notebook as a user without the launcher does."
    words = [w for name, value in parameters for w in ("-p", name, str(value))]
    return subprocess.run([sys.executable, "-m", "papermill", str(nb), str(tmp_path/"out.ipynb"), "-k", "python3", "-l",
                           "python", "--no-progress-bar", *words], capture_output=True, text=True, timeout=300)


def test_papermill_replaces_nothing_unasked(tmp_path):
    notebook(tmp_path/"nbs"/"01_toy.ipynb", VALUE_PARAMETERS, VALUE)
    run, made = tmp_path/"run", lambda: json.loads((tmp_path/"run/toy/value.json").read_text())
    one = lambda *parameters: papermill(tmp_path/"nbs/01_toy.ipynb", tmp_path, ("run", run), *parameters)
    assert one().returncode == 0 and made() == [0, 1]
    failed = one(("seed", 1))
    assert (failed.returncode and "was made with other values: seed 0 -> 1" in failed.stderr
            and "-p replace true" in failed.stderr and made() == [0, 1])
    assert one(("seed", 1), ("replace", "true")).returncode == 0 and made() == [1, 1]


def test_a_real_chapter_begins_no_run_for_a_misspelt_name(tmp_path):
    failed = papermill(root()/"nbs/07_prompts.ipynb", tmp_path, ("run", 2024))
    assert (failed.returncode and "there is no run" in failed.stderr and "TypeError" not in failed.stderr
            and not (root()/"runs/2024").exists())


def test_a_notebook_that_was_edited_but_not_exported_is_told_apart(tmp_path):
    "What counts as the source of its stage are the cells as they were typed."
    texts = ["".join(c["source"]) for c in json.loads((root()/"nbs/07_prompts.ipynb").read_text())["cells"]
             if c["cell_type"] == "code"]
    cells = [nbformat.v4.new_code_cell(text) for text in texts if text.startswith("#| export")]
    cells.append(nbformat.v4.new_code_cell("import json\nfrom ganprompt import "
                                           "files\njson.dump(files.sources('prompts', make_prompts) == "
                                           "files.sources('prompts'), open('said.json', 'w'))"))
    for edit in False, True:
        if edit: cells[-2].source += "\n\ndef make_prompts(run): return 1" # as a cell that was typed and not exported
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path/"nb.ipynb")
        done = subprocess.run([sys.executable, "-m", "papermill", "nb.ipynb", "out.ipynb", "-k", "python3", "-l",
                               "python", "--no-progress-bar"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path/"said.json").read_text()) == (not edit)


def test_the_demo_is_not_kept_beside_real_data(tmp_path, monkeypatch, capsys):
    from ganprompt import data
    monkeypatch.setattr(data, "dataset_info", lambda run: {"dataset": "demo"})
    before = {p: p.stat().st_mtime_ns for folder in ("data/results", "figures") for p in (root()/folder).rglob("*")
              if p.is_file()}
    for study in "end_to_end", "tables", "robustness":
        monkeypatch.setattr(sys, "argv", ["ganprompt", "keep", str(tmp_path/"demo"), "--study", study])
        with pytest.raises(SystemExit): main()
        assert "demo is made up" in (said := capsys.readouterr().err) and f"--study ./{study}" in said
    assert before == {p: p.stat().st_mtime_ns for folder in ("data/results", "figures")
                      for p in (root()/folder).rglob("*") if p.is_file()}
