"The package without its repository: a wheel, installed elsewhere, runs in the folder where one stands."
import ast, os, re, shutil, subprocess, sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions

import pytest

from ganprompt.files import root


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "A folder with the unpacked wheel, and another that is empty."
    source, home, desk = (tmp_path_factory.mktemp(name) for name in ("source", "home", "desk"))
    for name in ("nbs", "ganprompt", "data"):
        shutil.copytree(root()/name, source/name, ignore=shutil.ignore_patterns("results", "raw", "__pycache__"))
    for name in ("setup.py", "settings.ini", "pyproject.toml", "README.md", "LICENSE"): shutil.copy(root()/name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(source/"dist"), str(source)], check=True)
    subprocess.run([*pip, "install", "--no-deps", "--target", str(home), *map(str, (source/"dist").glob("*.whl"))],
                   check=True)
    shutil.rmtree(source)
    return home, desk


def ganprompt(installed, *args):
    "What the command says, from the wheel and in the empty folder."
    home, desk = installed
    code = ("import sys, ganprompt; assert ganprompt.__file__.startswith(sys.argv.pop(1)), ganprompt.__file__; from "
            "ganprompt.cli import main; sys.exit(main())")
    done = subprocess.run([sys.executable, "-c", code, str(home), *map(str, args)], cwd=desk, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": str(home)})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_run_goes_under_the_current_folder(installed):
    assert "prompts" in ganprompt(installed, "run", "--until", "prompts")
    run = installed[1]/"runs/demo"
    assert ((run/"prompts/manifest.json").exists() and (run/"report.html").exists()
            and not list(installed[0].rglob("manifest.json")))
    assert '"commit": "unknown"' in (run/"data/manifest.json").read_text()
    assert "done" in ganprompt(installed, "show", "demo")


def test_a_recommender_is_put_to_the_bank(installed, finished):
    ganprompt(installed, "robustness", finished/"recommender/no-stage-1", "--users", 5, "--out", "asked")
    assert "By chance" in (installed[1]/"asked/report.html").read_text()


def test_tables_are_made_of_kept_results(installed):
    shutil.copytree(root()/"data/results/benchmarks", installed[1]/"data/results/benchmarks")
    ganprompt(installed, "tables", "benchmarks") # into figures/, which is not there yet
    made, ours = ({p.name for p in (home/"figures").glob("benchmarks*.png")} for home in (installed[1], root()))
    assert made == ours
    shutil.copytree(root()/"data/results/end_to_end", installed[1]/"end_to_end")
    ganprompt(installed, "tables", "./end_to_end")
    assert next(installed[1].rglob("end_to_end.csv")).read_bytes() == (root()/"figures/end_to_end.csv").read_bytes()


def test_what_is_imported_is_required():
    "Also what would come with something else; extras count, since only some commands need them."
    ini = ConfigParser(interpolation=None)
    ini.read(root()/"settings.ini", encoding="utf-8")
    def plain(name): return re.split("[<>=]", name)[0].lower().replace("_", "-")
    required = {plain(line) for key, lines in ini["DEFAULT"].items() if key.endswith("requirements")
                for line in lines.split()}
    def names(node):
        if isinstance(node, ast.Import): return [alias.name for alias in node.names]
        return [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
    imported = {name.split(".")[0] for path in (root()/"ganprompt").glob("*.py")
                for node in ast.walk(ast.parse(path.read_text("utf-8"))) for name in names(node)}
    homes = packages_distributions()
    others = imported - sys.stdlib_module_names - {"ganprompt"}
    assert {"torch", "psutil", "PIL", "recbole"} <= others
    assert not [name for name in others if not required & set(map(plain, homes.get(name, [])))]
