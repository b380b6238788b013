"""What cannot work is told before the first stage: every name and number of every chapter, models that are not
there, not whole or of another kind, and a full disk."""
import importlib, json, os, shutil, subprocess, sys, time
from types import SimpleNamespace

import pytest
from safetensors.numpy import load_file, save_file

from ganprompt import cli, jobs, launcher
from ganprompt.files import UserError, root, told
from ganprompt.runs import settings_of
from ganprompt.models import find_model, is_model, nearest_folder, of_kind, resolve
from ganprompt.backbones import bert_tokenizer, pocket_model, t5_tokenizer
from ganprompt.recommender import POCKET_LINEAR, add_adapters, linear_layers, lora_faults
from ganprompt.jobs import ask_first, chapters, parameters
from ganprompt.cli import main

DEFAULTS = {name: p.default for name, p in parameters(chapters()).items()}
ANY = {"rating", "alpha", "beta", "gamma"} # numbers that may be negative
FREE = {"run", "data_dir", "templates", "columns"} # text that is no name, or not looked at with the other defaults


def faults(chapter, **values):
    make = getattr(importlib.import_module(f"ganprompt.{chapter.stage}"), f"make_{chapter.stage}")
    return settings_of(make)(**values).check()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Tiny untrained models, as folders."
    home = tmp_path_factory.mktemp("models")
    words = "does the user buy ? yes no oak lamp".split()
    for kind in "t5", "bert", "causal":
        tokenizer = (bert_tokenizer if kind == "bert" else t5_tokenizer)(["oak lamp"], words)
        pocket_model(kind, tokenizer, 16, 1).save_pretrained(home/kind); tokenizer.save_pretrained(home/kind)
    shutil.copytree(home/"causal", home/"sharded")
    tensors = load_file(home/"causal/model.safetensors")
    (home/"sharded/model.safetensors").unlink()
    parts = [dict(list(tensors.items())[i::2]) for i in range(2)]
    for i, part in enumerate(parts): save_file(part, home/f"sharded/model-{i}.safetensors")
    index = {"weight_map": {name: f"model-{i}.safetensors" for i, part in enumerate(parts) for name in part}}
    (home/"sharded/model.safetensors.index.json").write_text(json.dumps(index))
    return home


@pytest.mark.parametrize("chapter", chapters(), ids=lambda c: c.stage)
def test_every_number_and_every_name_is_looked_at(chapter):
    "The defaults pass; -7, no number at all, or a made-up name does not."
    asked = {"recommender": "t5-decoder,causal-lm"} if chapter.stage == "recommender" else {}
    assert not faults(chapter, **asked)
    for name, p in chapter.parameters.items():
        wrong = {"int": [-7], "float": [-7., float("nan")], "str": ["no-such-thing"], "bool": []}[p.type]
        for value in [] if name in ANY | FREE else wrong:
            assert any(name in f or "no-such-thing" in f for f in faults(chapter, **asked
                    | {name: value})), f"{name}={value} went through"


@pytest.mark.parametrize("args, message", [
    (["--recommender", "causal-lm", "--llm", "no-such-model"],
     "llm: the model 'no-such-model' is neither a folder nor in the local cache"),
    (["--recommender", "causal-lm", "--lora-modules", "w_q"],
     "lora_modules='w_q': pocket has no linear layer 'w_q'; it has q_proj, k_proj"),
    (["--recommender", "t5-decodr"], "did you mean 't5-decoder'?"),
    (["--recommender", ""], "recommender='' is not known"),
    (["--coupling", "rival"], "coupling='rival' is not known"),
    (["--optimizer", "adamm"], "did you mean 'adam'?"),
    (["--score", "maybe"], "score='maybe' is not known"),
    (["--until", "study", "--study-entries", "one templat"], "did you mean 'one template'?"),
    (["--until", "study", "--study-bank", "none"], "study_bank=none"),
    (["--until", "baselines", "--models", "SASrec"], "did you mean 'SASRec'?"),
    (["--until", "benchmarks", "--bench-parts", "training,speed"], "bench_parts='speed'"),
    (["--encoder-epochs", "0"], "encoder_epochs=0 cannot be; it must be 1 or more: set --encoder-epochs"),
    (["--seed", "-1"], "seed=-1"),
    (["--test-users", "-5"], "test_users=-5"),
    (["--wordings", "99"], "wordings=99: there are"),
    (["--processes", "0"], "processes=0"),
    (["--template", "99"], "template 99 does not exist"),
    (["--templates", "none.yaml"], "no template file"),
    (["--with-runs", "runs/none"], "there is no run"),
    (["--dataset", "none.csv"], "no file"),
    (["--recommender", "causal-lm", "--four-bit", "true"], "four_bit needs a GPU"),
])
def test_a_wrong_value_is_told_first(tmp_path, monkeypatch, capsys, args, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "execute", lambda *a: pytest.fail("a chapter was started"))
    monkeypatch.setattr(sys, "argv", ["ganprompt", "run", "--run", str(tmp_path/"run"), *args])
    with pytest.raises(SystemExit) as end: main()
    said = capsys.readouterr()
    assert end.value.code == 1 and message in said.err and not said.out and not list(tmp_path.iterdir())


def test_all_faults_are_told_together(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["ganprompt", "run", "--run", str(tmp_path/"run"), "--k", "0", "--coupling",
                                      "rival", "--encoder", "none", "--valid-users", "-1"])
    with pytest.raises(SystemExit): main()
    said = capsys.readouterr().err
    assert (all(s in said for s in ("k=0", "coupling='rival'", "encoder: the model 'none'"))
            and said.count("valid_users=-1") == 1)


def test_ten_seconds_are_enough(tmp_path):
    "The command itself, from a cold start; time spent computing, since other work on the machine is not its own."
    import resource
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.time()
    code = "from ganprompt.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "run", "--run", str(tmp_path/"run"), "--recommender",
                           "causal-lm", "--llm", "no-such-model"], capture_output=True, text=True, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and not done.stdout and not list(tmp_path.iterdir())
    assert after.ru_utime - before.ru_utime < 10 and time.time() - start < 60


def test_a_folder_is_meant_from_where_the_user_stands(models, monkeypatch):
    monkeypatch.chdir(models.parent)
    known = parameters(chapters())
    for name, kind in ("encoder", "t5"), ("bert", "bert"), ("llm", "causal"):
        for given in f"{models.name}/{kind}", f"./{models.name}/{kind}", str(models/kind):
            assert jobs.absolute(name, given, known[name].help) == str(models/kind)
    monkeypatch.chdir(models)
    values = jobs.chosen_values(chapters(), {"encoder": "t5", "llm": "causal"})
    assert (values["encoder"], values["bert"], values["llm"]) == (str(models/"t5"), "pocket", str(models/"causal"))
    assert jobs.chosen_values(chapters(), {"encoder": "org/t5"})["encoder"] == "org/t5"


def test_the_nearest_folder_is_named(models, monkeypatch):
    monkeypatch.chdir(models.parent)
    assert nearest_folder(f"{models.name}/causl") == f"; did you mean '{models.name}/causal'?"
    assert nearest_folder(f"{models.name[:-1]}/causl") == f"; did you mean '{models.name}/causal'?"
    assert nearest_folder("google/flan-t5-small") == ""
    assert told(resolve, f"{models.name}/causl") and f"{models.name}/causal" in told(resolve, f"{models.name}/causl")[0]


@pytest.mark.parametrize("kind", ["t5", "bert", "causal"])
def test_a_model_of_another_kind_is_refused(models, kind):
    for other in "t5", "bert", "causal":
        said = told(is_model, str(models/other), kind)
        assert not said if kind == other else "as its config.json says" in said[0]


@pytest.mark.parametrize("architecture, model_type, kinds", [
    ("BertModel", "bert", ""), ("BertForPreTraining", "bert", "bert"), ("RobertaForMaskedLM", "roberta", "bert"),
    ("T5EncoderModel", "t5", ""), ("MT5ForConditionalGeneration", "mt5", "t5"),
    ("GPT2LMHeadModel", "gpt2", "causal"), ("MistralForCausalLM", "mistral", "causal"),
    ("LlamaForSequenceClassification", "llama", ""), ("BertLMHeadModel", "bert", "")])
def test_what_a_config_says(architecture, model_type, kinds):
    assert [k for k in ("t5", "bert", "causal") if of_kind({"architectures": [architecture], "model_type": model_type},
                                                           k)] == kinds.split()


@pytest.mark.parametrize("spoil, message", [
    (lambda d: (d/"model-1.safetensors").unlink(), "incomplete copy: model-1.safetensors is missing"),
    (lambda d: (d/"model-1.safetensors").write_bytes((d/"model-1.safetensors").read_bytes()[:-40]),
     "incomplete copy: model-1.safetensors is cut short or damaged"),
    (lambda d: (d/"model-0.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
     "incomplete copy: model-0.safetensors is cut short or damaged"),
    (lambda d: [f.unlink() for f in d.glob("tokenizer*")], "incomplete copy: its tokenizer is missing"),
    (lambda d: (d/"tokenizer.json").write_text("{"), "incomplete copy: its tokenizer cannot be read"),
    (lambda d: (d/"config.json").unlink(), "has no config.json"),
    (lambda d: (d/"config.json").write_text("{"), "incomplete copy: config.json cannot be read"),
])
@pytest.mark.parametrize("where", ["folder", "cache"])
def test_an_incomplete_copy_is_told(models, tmp_path, monkeypatch, spoil, message, where):
    "As a folder, and as a snapshot in the hub's cache, where files are links."
    home, name = tmp_path/"my-llm", str(tmp_path/"my-llm")
    if where == "cache":
        from huggingface_hub import constants
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        home, name = tmp_path/"models--org--llm/snapshots/abc", "org/llm"
        (tmp_path/"models--org--llm/refs").mkdir(parents=True)
        (tmp_path/"models--org--llm/refs/main").write_text("abc")
    shutil.copytree(models/"sharded", home)
    if where == "cache" and not find_model(name): pytest.skip("this cache is read at import")
    assert not told(is_model, name, "causal")
    spoil(home)
    assert message in told(is_model, name, "causal")[0]


def test_adapters_need_something_to_adapt(models):
    llm = str(models/"sharded")
    assert {k.rpartition(".")[2] for k in linear_layers(llm)} == set(POCKET_LINEAR)
    def said(modules): return lora_faults(llm, modules)
    assert not said("q_proj, self_attn.v_proj") and not said("all-linear")
    assert len(said("q_proj,w_q")) == 1 and "no linear layer 'c_attn'; it has" in said("c_attn")[0] and said(" , ")


def test_all_linear_layers_but_the_last_get_adapters(models):
    lm = pocket_model("causal", t5_tokenizer(["oak lamp"], ["yes", "no"]), 16, 2)
    adapted = {n.split(".lora_A")[0].rpartition(".")[2] for n, p in add_adapters(lm, 2).named_parameters()
               if p.requires_grad and "lora_A" in n}
    assert adapted == set(POCKET_LINEAR)


def test_the_disk_is_looked_at(tmp_path, monkeypatch, models):
    values = DEFAULTS | {"run": str(tmp_path/"deep/run"), "dataset": "demo"}
    ask_first(chapters()[:8], values)
    monkeypatch.setattr(jobs.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e8))
    with pytest.raises(UserError, match=r"the run will write about 0\.\d GB, and .* has 0\.1 GB free; .*--run"):
        ask_first(chapters()[:8], values)
    assert not list(tmp_path.iterdir())


def test_a_misspelt_model_is_told_before_a_demo_is_made(tmp_path, monkeypatch):
    from ganprompt import robustness
    monkeypatch.setattr(robustness, "need", lambda *a: pytest.fail("a stage was made"))
    (tmp_path/"ganprompt").mkdir()
    with pytest.raises(UserError, match="did you mean .*ganprompt'"): robustness.make_report(str(tmp_path/"ganpromt"))
    with pytest.raises(UserError, match="no template file"): robustness.make_report("none", templates="none.yaml")
    with pytest.raises(UserError, match="users=-1"): robustness.make_report("none", users=-1)


def test_help_lists_the_stages():
    from click.testing import CliRunner
    page = " ".join(CliRunner().invoke(cli.cli, ["run", "--help"]).output.split())
    assert "made in this order data, prompts, backbones, attributes, encoder, recommender, metrics, figures" in page
    assert "made on demand" in page and "baselines, titles, p5, collm, ctrl, gather, study, benchmarks" in page




def test_no_users_means_all_in_the_figure():
    import polars as pl

    from ganprompt.figures import pick_states
    states = pl.DataFrame([(when, u, v, [1., 2.]) for when in ("before", "after") for u in range(7) for v in range(2)],
                          schema=["stage", "user", "version", "x"], orient="row")
    assert len(pick_states(states, 0)[0]) == 14 and len(pick_states(states, 3)[0]) == 6


def test_the_figure_needs_no_folder_of_numba(tmp_path):
    "A stand-in for UMAP that fails as the true one does where its folder and the user's cache cannot be written."
    (tmp_path/"umap.py").write_text("import numba\nif not numba.config.CACHE_DIR: raise RuntimeError('cannot cache "
                                    "function')\nclass UMAP: pass")
    code = ("from ganprompt.figures import load_umap; import numba, os; load_umap(); "
            "print(os.path.isdir(numba.config.CACHE_DIR), numba.config.CACHE_DIR)")
    env = ({k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"}
           | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{root()}"})
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True).stdout.split()
    assert said[0] == "True" and not os.path.exists(said[1])


def test_own_results_stay_out_of_the_repository(shop, tmp_path, monkeypatch):
    from click.testing import CliRunner

    from ganprompt.data import DataSettings, make_data
    mine = tmp_path/"mine"
    make_data(DataSettings(str(tmp_path/"run"), dataset=str(shop), core=2))
    with pytest.raises(UserError, match=r"shop.csv is data of your own, .* --study ./tables"):
        cli.check_home("tables", [str(tmp_path/"run")])
    with pytest.raises(UserError, match="the project has no study 'mine'; .* --study ./mine"):
        cli.check_home("mine", [])
    cli.check_home("./tables", [str(tmp_path/"run")])
    with monkeypatch.context() as m: # the first results of a kind need no folder, and a machine no data
        m.setattr(cli, "results_folder", lambda study: tmp_path/"none")
        cli.check_home("gpu", [str(tmp_path)])
    monkeypatch.chdir(tmp_path)
    shutil.copytree(root()/"data/results/end_to_end", mine)
    before = {p: p.stat().st_mtime_ns for folder in ("figures", "data") for p in (root()/folder).rglob("*")}
    for wrong in "./none", "./robustness-none", "./benchmarks-none", "./tables-none", "./standard-none":
        assert not CliRunner().invoke(cli.cli, ["tables", wrong]).output and not (tmp_path/wrong).exists()
    done = CliRunner().invoke(cli.cli, ["tables", "./mine"])
    assert sorted(done.output.split()) == sorted(f"mine/{p.name}" for p in mine.glob("mine.*") if p.suffix != ".json")
    assert {"mine.md", "mine.html", "mine.tex", "mine.png"} <= {p.name for p in mine.glob("mine.*")}
    assert "mine.png" in (mine/"mine.md").read_text()
    assert before == {p: p.stat().st_mtime_ns for folder in ("figures", "data") for p in (root()/folder).rglob("*")}


def test_the_study_prints_what_it_found():
    import numpy as np

    from ganprompt import study as S
    from ganprompt.templates import read_templates
    from ganprompt.sensitivity import measure_bank
    bank = [t for t in read_templates(root()/"data/templates.yaml") if t["task"] == "recommendation"]
    scores = np.random.default_rng(0).normal(size=(len(bank), 6, 21))
    measured = measure_bank(scores, bank)
    page = S.to_md(S.stage_page({"agreement": {"measured": measured}, "P5": {"failed": "no titles"}},
                                "t5-ranker, demo, 6 users"))
    assert (f"{measured['clean']['hit@10']:.3f}" in page and f"{measured['unseen']['hit@10']['avg']:.3f}" in page
            and "no titles" in page and "6 users" in page)
