"A real JupyterLab in a real browser: a chapter that is opened and saved is left as it was."
import json, os, shutil, subprocess, sys

import pytest

from chromium import Browser, browser, until
from ganprompt.files import root


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    "A JupyterLab on loopback, with a folder of its own for all it keeps."
    home = tmp_path_factory.mktemp("lab")
    for name in ("work", "config"): (home/name).mkdir()
    shutil.copy(root()/".ci/jupyter_server_config.json", home/"config")
    shutil.copy(root()/"settings.ini", home/"work") # without which nbdev lets a notebook be
    shutil.copy(root()/"pyproject.toml", home/"work")
    keeps = {f"JUPYTER_{name}_DIR": str(home/name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--ServerApp.port=0",
         "--IdentityProvider.token=t", "--LabApp.expose_app_in_browser=True", "--LabApp.news_url=",
         "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"],
        cwd=home/"work", env=os.environ | keeps | {"PYTHONPATH": str(root())}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    def running(): return list((home/"runtime").glob("jpserver-*.json"))
    try:
        until(lambda: running() and running()[0].read_text().rstrip().endswith("}"), 120)
        yield home/"work", json.loads(running()[0].read_text())["url"]
    finally: server.terminate(); server.wait()


def opened(tab, url, name):
    "A notebook in JupyterLab, with its kernel."
    tab.call("Page.navigate", url=f"{url}lab/tree/{name}?token=t&reset")
    until(lambda: tab.js("!!(window.jupyterapp && [...jupyterapp.shell.widgets('main')][0]?.sessionContext)"), 120)
    tab.js("book = [...jupyterapp.shell.widgets('main')][0]; book.sessionContext.ready.then(() => true)")
    until(lambda: tab.js("!!(book.sessionContext.session?.kernel && book.model)"), 60)


@browser
def test_a_chapter_that_is_opened_is_left_as_it_was(lab, tmp_path):
    work, url = lab
    shutil.copy(root()/"nbs/15_measures.ipynb", work)
    before, tab = (work/"15_measures.ipynb").read_bytes(), Browser(tmp_path/"profile")
    try:
        opened(tab, url, "15_measures.ipynb")
        until(lambda: tab.js("book.context.model.dirty"), 60) # what it notes of the kernel, it would save by itself
        tab.js("book.context.save().then(() => true)")
    finally: tab.close()
    assert (work/"15_measures.ipynb").read_bytes() == before
