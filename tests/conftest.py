"A shop of eighty shoppers, cut out of the demo, on which a whole pipeline takes seconds."
import ast, csv, gzip, json, os, shutil, subprocess, sys
from pathlib import Path

import pytest

from ganprompt.files import root
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


@pytest.fixture(scope="session")
def shop(tmp_path_factory): return write_shop(tmp_path_factory.mktemp("shop")/"shop.csv")


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


def start(run, last, shop, every=10, stderr=subprocess.DEVNULL, **more):
    """`make` in a process of its own, as the launcher does: libraries loaded by other tests change the last digits
    of sums."""
    code = ("import sys; sys.path.insert(0, {!r}); from conftest import make; from ganprompt import backbones; "
            "backbones.EVERY = {}; make({!r}, {!r}, {!r}, **{!r})")
    return subprocess.Popen([sys.executable, "-c", code.format(str(Path(__file__).parent), every, str(run), last,
                                                               str(shop), more)], stderr=stderr)


@pytest.fixture(scope="session")
def finished(shop, tmp_path_factory):
    "A run that went through undisturbed; a copy of the one in FINISHED_RUN, where that is set."
    run = tmp_path_factory.mktemp("runs")/"whole"
    if "FINISHED_RUN" in os.environ: return shutil.copytree(os.environ["FINISHED_RUN"], run)
    assert start(run, "recommender", shop).wait() == 0
    return run
