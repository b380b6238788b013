"""What test_processes.py has two machines do: torchrun executes this file on both, and the first one writes down what
came of it."""
import os, signal, sys
from pathlib import Path

import numpy as np
from conftest import make
from test_processes import work

from ganprompt import processes
from ganprompt.files import UserError, write_json
from ganprompt.processes import follow, gathered, in_processes, is_main, load_checkpoint, save_checkpoint
from ganprompt.runs import manifest, stage


def mistaken():
    if not is_main(): raise UserError("a row of the second half is wrong")
    gathered("waiting")


def killed():
    if not is_main(): os.kill(os.getpid(), signal.SIGKILL)
    gathered("waiting")


def unplugged():
    if not is_main(): os.kill(os.getppid(), signal.SIGKILL)
    gathered("waiting")


def raised(function, *args):
    try: return f"nothing: {function(*args)}"
    except Exception as e: return f"{type(e).__name__}: {e}"


def go_on(folder):
    "A stage that is killed when it has a checkpoint, and not when it began with one."
    if found := load_checkpoint(folder): return {"step": found[0]}
    save_checkpoint(folder, 7, {})
    in_processes(2, killed)


def main(run, shop, finished, out):
    from ganprompt.recommender import score_lists
    follow()
    make(run, "encoder", shop, processes=2)
    score_lists(str(finished), finished/"recommender/ganprompt", "uni99", np.arange(40), "yes-no",
                processes=2).write_parquet(out/"scores.parquet")
    found = {"work": [np.array(x).tolist() for x in in_processes(2, work)[:3]],
             "mistake": raised(in_processes, 2, mistaken), "killed": raised(stage, out/"run", "toy", {}, go_on),
             "too many": raised(in_processes, 3, work)}
    stage(out/"run", "toy", {}, go_on)
    found["step"] = manifest(out/"run", "toy")["metrics"]["step"]
    processes.LOST = 3
    write_json(out/"found.json", found | {"unplugged": raised(in_processes, 2, unplugged)})
    sys.exit("the second machine is gone") # a launcher whose process ends well waits for the other one


if __name__ == "__main__": main(*map(Path, sys.argv[1:]))
