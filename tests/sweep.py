"""Twelve small entries through sweep/Snakefile, two at a time: the launcher is killed, then a job; each entry is made
once, none is lost, and the tables are those of `ganprompt tables`. Then one entry cannot be made: the others are, it is
named, and the next sweep makes it alone. By hand, some minutes: `python tests/sweep.py OUT --snakemake SNAKEMAKE`."""
import argparse, json, os, shutil, signal, subprocess, sys, time
from contextlib import suppress
from pathlib import Path

import psutil
import yaml

root = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(root), str(root/"tests")]
from conftest import write_shop  # noqa: E402

MODELS = ["popularity", "last-item"]
GANPROMPT = f"{sys.prefix}/bin/ganprompt"


class Sweeps:
    "The sweeps of one folder."
    def __init__(self, out, snakemake, seeds):
        self.seeds = seeds
        self.out, self.snakemake, self.study, self.runs = out, snakemake, out/"tables", out/"runs"
        self.plan = out/"plan.yaml"
        self.plan.write_text(yaml.safe_dump(dict(
            seeds=[*range(seeds)], datasets={str(write_shop(out/"shop.csv")): ["baselines"]}, parameters=dict(core=2),
            stages=dict(baselines=dict(needs=["data"], models=MODELS)))))

    def begin(self):
        given = dict(study=self.study, plan=self.plan, runs=self.runs, ganprompt=GANPROMPT)
        log = open(self.out/"snakemake.log", "a")
        return subprocess.Popen([self.snakemake, "-s", str(root/"sweep/Snakefile"), "--profile",
                                 str(root/"sweep/profiles/local"), "-j2", "--config",
                                 *(f"{k}={v}" for k, v in given.items())], cwd=self.out, stdout=log, stderr=log,
                                env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"})

    def kept(self): # Entry -> when its file was written
        return {p.name: p.stat().st_mtime_ns for p in self.study.glob("*/*-*.json")}

    def at_work(self, process, n): # The jobs of a sweep, once so many entries are kept
        while process.poll() is None:
            with suppress(psutil.Error): # one that ends while it is looked at
                found = [p for p in psutil.Process(process.pid).children(recursive=True) if "--entry" in p.cmdline()]
                if found and len(self.kept()) >= n: return found
            time.sleep(.2)
        raise AssertionError("the sweep has ended")


def killed_twice(sweeps):
    "Kill the launcher, then a job of the next one; what was kept before is not touched."
    first = sweeps.begin()
    sweeps.at_work(first, sweeps.seeds//2)
    first.send_signal(signal.SIGKILL); first.wait()
    before = sweeps.kept()
    second = sweeps.begin()
    sweeps.at_work(second, len(before) + sweeps.seeds//2)[-1].kill()
    assert second.wait() == 0, "the sweep failed"
    after = sweeps.kept()
    print(f"kept when the launcher was killed: {len(before)}; at the end: {len(after)}")
    assert len(after) == 2*sweeps.seeds and all(after[name] == then for name, then in before.items())
    assert "Error in rule fill" in (sweeps.out/"snakemake.log").read_text(), "no job was seen to die"


def drawn(study, out, to):
    "The tables of a study whose entries say nothing of time."
    shutil.copytree(study, to, ignore=shutil.ignore_patterns("*.png", "*.pdf", "*.html", "*.md", "*.tex", "*.csv"))
    for path in to.glob("*/*-*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": {}}))
    subprocess.run(f"{GANPROMPT} tables {to}", shell=True, check=True, cwd=out, stdout=subprocess.DEVNULL)
    return {p.name: p.read_bytes() for p in to.iterdir() if p.is_file()}


def as_one_after_another(sweeps):
    "The same bytes, but for seconds."
    subprocess.run(f"{GANPROMPT} tables {sweeps.out}/tables-alone --plan {sweeps.plan} --runs {sweeps.out}/runs-alone "
                   "--data-dir ''", shell=True, check=True, cwd=sweeps.out, stdout=subprocess.DEVNULL)
    both = [drawn(study, sweeps.out, sweeps.out/f"drawn-{study.name}"/"tables") for study in (sweeps.study,
            sweeps.out/"tables-alone")]
    print(f"{len(both[0])} files of tables, equal: {both[0] == both[1]}")
    assert both[0] == both[1] and len(both[0]) > 8


def one_that_fails(sweeps):
    "A file in the way of one run folder."
    for folder in sweeps.study, sweeps.runs: shutil.rmtree(folder, ignore_errors=True)
    sweeps.runs.mkdir()
    (sweeps.runs/"shop-0-baselines-popularity").write_text("in the way")
    assert sweeps.begin().wait() == 1
    kept = sweeps.kept()
    assert len(kept) == 2*sweeps.seeds - 1 and "popularity-0.json" not in kept
    said = (sweeps.out/"snakemake.log").read_text()
    assert "ganprompt: shop-0-baselines-popularity: cannot write the run folder" in said
    (sweeps.runs/"shop-0-baselines-popularity").unlink()
    assert sweeps.begin().wait() == 0
    after = sweeps.kept()
    print(f"made beside the one that failed: {len(kept)}; by the sweep after it: {sorted(set(after) - set(kept))}")
    assert set(after) - set(kept) == {"popularity-0.json"} and all(after[name] == kept[name] for name in kept)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--snakemake", default="snakemake")
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--only", nargs="*", default=["killed_twice", "as_one_after_another", "one_that_fails"])
    given = parser.parse_args()
    given.out.mkdir(parents=True)
    os.environ["PYTHONPATH"], os.environ["OMP_NUM_THREADS"] = str(root), "1"
    sweeps = Sweeps(given.out.resolve(), given.snakemake, given.seeds)
    for part in [globals()[name] for name in given.only]:
        start = time.time()
        part(sweeps)
        print(f"{part.__name__}: {time.time() - start:.0f} s", flush=True)
