"A shop of eighty shoppers, cut out of the demo, on which a whole pipeline takes seconds."
import ast, csv, gzip, json, multiprocessing, os, shutil
from pathlib import Path

import pytest
from waiting import wait_at

from ganprompt.files import lock, root
from ganprompt.runs import replacing, settings_of


def write_shop(path):
    "A CSV file with the columns user, item, rating, time and title."
    with gzip.open(root()/"data/demo/reviews_Demo_5.json.gz", "rt") as f: reviews = [json.loads(line) for line in f]
    with gzip.open(root()/"data/demo/meta_Demo.json.gz", "rt") as f:
        titles = {m["asin"]: m.get("title") for m in map(ast.literal_eval, f)}
    users = sorted({r["reviewerID"] for r in reviews})[:120]
    with open(path, "w", newline="") as f:
        out = csv.writer(f)
        out.writerow(["user", "item", "rating", "time", "title"])
        for r in reviews:
            if r["reviewerID"] in users and "overall" in r:
                out.writerow([r["reviewerID"], r["asin"], r["overall"], r.get("unixReviewTime"), titles.get(r["asin"])])
    return path


# A folder that several pytests share, so that the finished run is made once for all of them; unset: everyone's own
SHARED = os.environ.get("TESTS_SHARE")


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    home = Path(SHARED or tmp_path_factory.mktemp("shop"))
    with lock(str(home), "shop", wait=60):
        return path if (path := home/"shop.csv").exists() else write_shop(path)


SMALL = dict(core=2, pocket_width=32, pocket_layers=1, pocket_epochs=1, bert_epochs=1, k=3, encoder_batch=16,
             held_out_users=30,
             recommender="t5-decoder,causal-lm,t5-ranker", recommender_epochs=2, recommender_batch=16, valid_users=40)


def make(run, last, shop, **more):
    "Make all stages up to `last` with small settings; the last stage's folder."
    from ganprompt import attributes, backbones, data, encoder, prompts, recommender
    values = SMALL | {"dataset": str(shop)} | more
    for stage in (data.make_data, prompts.make_prompts, backbones.make_backbones, attributes.make_attributes,
                  encoder.make_encoder, recommender.make_recommender):
        with replacing(True): folder = stage(settings_of(stage).of(values | {"run": str(run)}))
        if stage.__name__ == f"make_{last}": return folder


STAGES = "data", "prompts", "backbones", "attributes", "encoder", "recommender"
warm = multiprocessing.get_context("forkserver")
warm.set_forkserver_preload(["__main__", "conftest", *(f"ganprompt.{stage}" for stage in STAGES), "polars", "torch",
                             "peft", "sklearn.neighbors", *(f"transformers.models.{name}" for name in (
                                 "auto.tokenization_auto", "t5.modeling_t5", "bert.modeling_bert",
                                 "llama.modeling_llama"))])


class Apart(warm.Process):
    """A process that is forked from one in which no test has run, and which has loaded what the stages need, once for
    all of them. Libraries that other tests have loaded would change the last digits of sums."""
    def __init__(self, function, *args): super().__init__(target=self.silently, args=(function, *args))

    @staticmethod
    def silently(function, *args):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        function(*args)

    def poll(self): return self.exitcode

    def wait(self):
        self.join()
        return self.exitcode


def begin(function, *args):
    process = Apart(function, *args)
    process.start()
    return process


def keep_every(seconds, waits, run, last, shop, more):
    from ganprompt import backbones
    backbones.EVERY = seconds
    if waits: wait_at(waits)
    make(run, last, shop, **more)


def start(run, last, shop, every=10, waits=None, **more):
    """`make` in a process of its own, with a checkpoint every so many seconds; the second time that it
    saves the file `waits` it waits to be killed."""
    return begin(keep_every, every, waits, str(run), last, str(shop), more)


def copy_run(run, to, *without):
    "Copy a run folder but for some of its stages; a folder of that name inside a stage is copied."
    return shutil.copytree(run, to, ignore=lambda folder, names: set(without) if str(folder) == str(run) else set())


@pytest.fixture(scope="session")
def finished(shop, tmp_path_factory):
    "A run that went through undisturbed."
    whole, run = shop.parent/"whole", tmp_path_factory.mktemp("runs")/"whole"
    with lock(str(shop.parent), "whole", wait=900):
        if not (whole/"recommender").exists(): assert start(whole, "recommender", shop).wait() == 0
    return shutil.copytree(whole, run)
