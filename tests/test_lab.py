"A real JupyterLab in a real browser: the explorer in a cell, and a chapter that is opened and left as it was."
import json, os, shutil, subprocess, sys

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from chromium import Browser, browser, until
from ganprompt.files import root
from test_explorer import FIND


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
def test_a_point_tapped_in_a_cell_is_chosen_on_both_sides(finished, lab, tmp_path):
    work, url = lab
    cell = new_code_cell(f"from ganprompt import Run\nRun({str(finished)!r}).explore()")
    nbformat.write(new_notebook(cells=[cell]), work/"explore.ipynb")
    tab = Browser(tmp_path/"profile", height=1500)
    try:
        opened(tab, url, "explore.ipynb")
        tab.js("jupyterapp.shell.activateById(book.id); void jupyterapp.commands.execute('notebook:run-all-cells')")
        frame = "document.querySelector('iframe[title=explorer]')"
        inside = f"{frame}.contentWindow"
        until(lambda: tab.js(f"!!({frame} && {inside}.Bokeh?.documents[0]?.is_idle)"), 240)
        def js(code): return tab.js(f"{inside}.eval({json.dumps(code)})")
        js(FIND)
        i = js("lone()")
        tab.js(f"{frame}.scrollIntoView()")
        x, y = js(f"place(0, {i})")
        left, top = tab.js(f"(b => [b.left, b.top])({frame}.getBoundingClientRect())")
        tab.click(x + left, y + top)
        until(lambda: js("points.selected.indices") == [i])
        assert js("""figures.map(f => f.renderers.filter(r => r.data_source === points)
                     .map(r => [...Bokeh.index.find_one(r).model.data_source.selected.indices]))""") == [[[i]], [[i]]]
        assert "User " in js("panel.text") and "Prompt" in js("panel.text")
    finally: tab.close()


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
