"""Kill a run again and again, and look whether it ends with the numbers of one that was left alone.

make soak                    two runs of the demo, with one process and with two, 25 kills each
make soak SMALL=1            the same with smaller models and fewer users
make soak SOAK="--kills 40"  with other numbers
python tests/soak.py --help  what can be set

A kill is SIGKILL to the launcher, its kernel or one of the kernel's processes, drawn at random among those that live, 6
to 45 seconds after the
last one. Then the same command is given again. Not collected by pytest: it takes an hour."""
import argparse, json, os, random, shutil, signal, subprocess, sys, time
from pathlib import Path

import polars as pl
from safetensors.numpy import load_file

GANPROMPT = str(Path(sys.executable).with_name("ganprompt"))
SMALL = dict(pocket_width=32, pocket_layers=1, pocket_epochs=1, recommender_epochs=2, valid_users=100, test_users=200,
             held_out_users=100, figure_users=60, resamples=100)
# of a manifest: when and where, not what
MAY_DIFFER = ("wall_seconds", "peak_memory_mb", "finished", "resumed", "device", "versions", "commit", "seconds",
              "load_and_cut_seconds")


def command(folder, processes, values, only=""):
    values = (({"only": only} if only else {})
              | {"run": folder, "recommender": "t5-decoder,causal-lm", "processes": processes} | values)
    return [GANPROMPT, "run", *(x for name, value in values.items()
                                for x in (f"--{name.replace('_', '-')}", str(value)))]


def start(folder, processes, values, log, only=""):
    "The command in a session of its own; what it says is added to a file."
    with open(log, "a") as out:
        return subprocess.Popen(command(folder, processes, values, only), stdout=out, stderr=out,
                                start_new_session=True)


def offspring(pid):
    """Living descendants of a process, as (pid, generation): 0 is the process itself, 1 its kernel, 2 and more the
    kernel's processes."""
    def children(p):
        try:
            return [int(c) for t in os.listdir(f"/proc/{p}/task")
                    for c in Path(f"/proc/{p}/task/{t}/children").read_text().split()]
        except OSError: return []
    found, at = [(pid, 0)], 0
    while at < len(found):
        found += [(c, found[at][1] + 1) for c in children(found[at][0])]
        at += 1
    return [(p, g) for p, g in found if alive(p)]


def alive(pid):
    try: return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError: return False


def victim(pid, rng):
    "Launcher, kernel or rank: first which kind, then which of it."
    kinds = {}
    for p, generation in offspring(pid):
        kinds.setdefault(("launcher", "kernel", "rank")[min(generation, 2)], []).append(p)
    kind = rng.choice(sorted(kinds))
    return kind, rng.choice(kinds[kind])


def progress(folder):
    "The stage at work, and what is whole in it."
    parts = sorted(folder.glob("*.partial"), key=lambda p: p.stat().st_mtime)
    if not parts: return "between stages"
    whole = sorted(str(p.parent.relative_to(parts[-1])) for p in parts[-1].rglob(".part.json"))
    return parts[-1].name.removesuffix(".partial") + (f", whole: {', '.join(whole)}" if whole else "")


def soak(folder, processes, values, rng, kills, between, deadline, only=""):
    """Start, kill, start again; after the last kill let it end. Returns the kills, how often it was started, and
    whether it ended."""
    log, done, starts, process = folder.with_suffix(".log"), [], 1, start(folder, processes, values,
            folder.with_suffix(".log"), only)
    began = time.time()
    while True:
        wait = rng.uniform(*between) if len(done) < kills and time.time() < deadline else 10**6
        try: process.wait(wait)
        except subprocess.TimeoutExpired:
            kind, pid = victim(process.pid, rng)
            at, known = progress(folder), [p for p, _ in offspring(process.pid)]
            os.kill(pid, signal.SIGKILL)
            killed = time.time()
            done.append({"second": round(killed - began, 1), "after": round(wait, 1), "killed": kind, "at": at})
            try: process.wait(60) # it says that it has lost its kernel, or is the one that was killed
            # it does not need the one that was killed, or has not noticed: then it never ends
            except subprocess.TimeoutExpired: continue
            finally: print(f"kill {len(done)}, {done[-1]}", flush=True)
            done[-1] |= {"launcher_ended_after": round(time.time() - killed, 1)}
            left = [p for p in known if p != pid and alive(p)]
            until = time.time() + 15
            while any(map(alive, left)) and time.time() < until: time.sleep(.2)
            done[-1] |= {"others_ended_after": round(time.time() - killed, 1), "left_behind": sum(map(alive, left))}
            print(f"    {done[-1]}", flush=True)
        else:
            said = log.read_text().strip().splitlines()[-1:]
            if process.returncode == 0: return done, starts, True
            print(f"ended with {process.returncode}: {said}", flush=True)
            if time.time() > deadline: return done, starts, False
        starts += 1
        process = start(folder, processes, values, log, only)


def table(path): return pl.read_parquet(path)


def without(found, keys):
    "A JSON value without some keys, wherever they stand."
    if isinstance(found, dict): return {k: without(v, keys) for k, v in found.items() if k not in keys}
    return [without(v, keys) for v in found] if isinstance(found, list) else found


def same(one, other):
    "Whether two files say the same: frames, weights and figures by value, all else byte by byte."
    if one.suffix == ".parquet": return pl.read_parquet(one).equals(pl.read_parquet(other))
    if one.suffix == ".safetensors":
        a, b = load_file(one), load_file(other)
        return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
    if one.suffix == ".json":
        return without(json.loads(one.read_text()), MAY_DIFFER) == without(json.loads(other.read_text()), MAY_DIFFER)
    return one.read_bytes() == other.read_bytes()


def compare(calm, killed):
    """Compare every output of every stage. Returns how many were equal, which differ, which one run alone has, and
    what was left of the work."""
    def outputs(run):
        return {str(p.relative_to(run)) for m in run.glob("*/manifest.json") for p in m.parent.rglob("*")
                if p.is_file()}
    both = outputs(calm) & outputs(killed)
    differ = sorted(p for p in both if not same(calm/p, killed/p))
    left = sorted(str(p.relative_to(killed)) for p in killed.rglob("*") if p.name == "checkpoint.pt"
                  or p.suffix in (".partial", ".half") or p.name == ".fingerprint")
    return {"equal": len(both) - len(differ), "differ": differ, "only_one_has": sorted(outputs(calm) ^ outputs(killed)),
            "left_over": left}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True,
                        help="folder for the runs and for soak.json, to which a summary is added")
    parser.add_argument("--kills", type=int, default=25, help="kills of each run [25]")
    parser.add_argument("--minutes", type=float, default=60, help="minutes after which a run is killed no more [60]")
    parser.add_argument("--processes", default="1,2", help="a run for each of these [1,2]")
    parser.add_argument("--between", type=float, nargs=2, default=(6, 45),
                        help="seconds between a start and a kill [6 45]")
    parser.add_argument("--seed", type=int, default=0, help="of the draws [0]")
    parser.add_argument("--only", default="",
                        help="stages to make and kill, with commas; the others are copied from the undisturbed run  "
                             "[all]")
    parser.add_argument("--small", action="store_true", help="small models, few users")
    parser.add_argument("--runs", type=int, default=1, help="killed runs for each number of processes [1]")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    values, kind = SMALL if args.small else {}, "small" if args.small else "demo"
    worst = 0
    for processes in map(int, args.processes.split(",")):
        calm = args.out/f"{kind}-{processes}-calm"
        began = time.time()
        if start(calm, processes, values | ({"until": args.only.split(",")[-1]} if args.only else {}),
                 calm.with_suffix(".log")).wait():
            sys.exit(f"the undisturbed run failed; see {calm.with_suffix('.log')}")
        seconds = time.time() - began
        for i in range(args.runs):
            killed, rng, began = args.out/f"{kind}-{processes}-killed-{args.seed + i}", random.Random(args.seed
                    + i), time.time()
            shutil.rmtree(killed, ignore_errors=True); killed.mkdir()
            if args.only:
                [shutil.copytree(p.parent, killed/p.parent.name) for p in calm.glob("*/manifest.json")
                 if p.parent.name not in args.only.split(",")]
            done, starts, ended = soak(killed, processes, values, rng, args.kills, args.between, began
                                       + 60*args.minutes, args.only)
            found = compare(calm, killed) if ended else {"differ": ["it did not end"]}
            entry = dict(kind=kind, processes=processes, seed=args.seed + i, between=args.between, kills=len(done),
                         starts=starts, ended=ended, undisturbed_seconds=round(seconds),
                         seconds=round(time.time() - began), killed={k: sum(d["killed"] == k for d in done)
                                                                     for k in ("launcher", "kernel", "rank")},
                         left_behind=sum(d["left_behind"] for d in done), may_differ=MAY_DIFFER, **found)
            file = args.out/"soak.json"
            before = json.loads(file.read_text()) if file.exists() else []
            file.write_text(json.dumps(before + [entry | {"log": done}], indent=1))
            print(json.dumps(entry, indent=1), flush=True)
            worst += bool(found["differ"] or found.get("only_one_has") or found.get("left_over")
                          or entry["left_behind"])
    sys.exit(bool(worst))


if __name__ == "__main__": main()
