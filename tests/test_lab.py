"A real JupyterLab in a real browser: a chapter is left as it was by opening it, and the explorer is explored in one."
import base64, io, json, os, shutil, subprocess, sys

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_output
from PIL import Image

from chromium import Browser, again, browser, until
from ganprompt.explorer import GAP, view_of
from ganprompt.files import root
from ganprompt.runs import Run
from test_explorer import FIND


@pytest.fixture(scope="module")
def lab(finished, tmp_path_factory):
    "A JupyterLab on loopback, with a folder of its own for all it keeps; in its repository the demo is `finished`."
    home = tmp_path_factory.mktemp("lab")
    for name in ("work", "config"): (home/name).mkdir()
    shutil.copy(root()/".ci/jupyter_server_config.json", home/"config")
    for name in ("settings.ini", "pyproject.toml"): shutil.copy(root()/name, home/"work")
    for name in ("ganprompt", "nbs", "data"):
        shutil.copytree(root()/name, home/"work"/name, ignore=shutil.ignore_patterns("raw", "results", "__pycache__"))
    shutil.copytree(finished, home/"work/runs/demo")
    keeps = {f"JUPYTER_{name}_DIR": str(home/name.lower()) for name in ("CONFIG", "DATA", "RUNTIME")}
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--ServerApp.port=0",
         "--IdentityProvider.token=t", "--LabApp.expose_app_in_browser=True"],
        cwd=home/"work", env=os.environ | keeps | {"PYTHONPATH": str(home/"work")}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    def running(): return list((home/"runtime").glob("jpserver-*.json"))
    try:
        until(lambda: running() and running()[0].read_text().rstrip().endswith("}"), 120)
        yield home/"work", json.loads(running()[0].read_text())["url"]
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill() # it may wait for a kernel, which ends with it


def opened(tab, url, name):
    "A chapter in JupyterLab, with its kernel."
    tab.call("Page.navigate", url=f"{url}lab/tree/nbs/{name}?token=t&reset")
    until(lambda: tab.js("!!(window.jupyterapp && [...jupyterapp.shell.widgets('main')][0]?.sessionContext)"), 120)
    tab.js("book = [...jupyterapp.shell.widgets('main')][0]; true")
    until(lambda: tab.js("!!(book.sessionContext.isReady && book.sessionContext.session?.kernel && book.model)"), 120)


@pytest.fixture
def tab(tmp_path):
    tab = Browser(tmp_path/"profile")
    yield tab
    tab.close()


@browser
def test_nobody_is_asked_for_news(lab, tab):
    "Neither the hub's news nor a newer version: no network without being asked."
    opened(tab, lab[1], "15_measures.ipynb")
    page = json.loads(tab.js("document.getElementById('jupyter-config-data').textContent"))
    assert page["news"] == {"disabled": True}
    found = tab.js("fetch('/lab/api/update', {headers: {Authorization: 'token t'}}).then(r => r.text())")
    assert json.loads(found) == {"notification": None}


def give_outputs(chapter):
    "Outputs of all kinds that `make outputs` keeps."
    book, pixel = nbformat.read(chapter, 4), base64.b64encode(b"not looked at").decode()
    outputs = [new_output("stream", text="two\nlines\n"), new_output("display_data", {"image/png": pixel}),
               new_output("execute_result", {"text/html": "<table>\n<tr></tr></table>"}),
               new_output("execute_result", {"text/plain": "1.5"})]
    for cell, out in zip([c for c in book.cells if c.cell_type == "code"][2:], outputs): cell.outputs = [out]
    nbformat.write(book, chapter)


@browser
def test_a_chapter_that_is_opened_is_left_as_it_was(lab, tab):
    work, url = lab
    chapter = work/"nbs/15_measures.ipynb"
    give_outputs(chapter)
    before = chapter.read_bytes()
    opened(tab, url, chapter.name)
    until(lambda: tab.js("book.context.model.dirty"), 60) # what it notes of the kernel, it would save by itself
    tab.js("book.context.save().then(() => true)")
    assert chapter.read_bytes() == before


FRAME = "book.node.querySelector('iframe[title=explorer]')"
SHOWN = "[...Bokeh.index.find_one(panel).shadow_el.querySelectorAll('h3, p')].map(e => e.textContent).join('\\n')"


def executed(tab):
    "The explorer's chapter once it has run; what evaluates code in its page."
    tab.js("void jupyterapp.commands.execute('notebook:run-all-cells').then(() => { window.ran = true })")
    until(lambda: tab.js("!!window.ran"), 300)
    shown = tab.js("[...book.model.cells].flatMap(c => c.toJSON().outputs ?? [])")
    assert [o for o in shown if o["output_type"] == "error"] == []
    cell = "[...book.model.cells].findIndex(c => JSON.stringify(c.toJSON().outputs ?? []).includes('<iframe'))"
    again(lambda: tab.js(f"void book.content.scrollToItem({cell}, 'start')"),
          lambda: tab.js(f"!!{FRAME}?.contentWindow.Bokeh?.documents[0]?.is_idle"), 120)
    def js(code): return tab.js(f"{FRAME}.contentWindow.eval({json.dumps(code)})")
    js(FIND)
    return js


def placed(tab, js, part):
    "Where in the window a part of the explorer's page lies once the page is scrolled to, and its size."
    tab.js(f"{FRAME}.scrollIntoView({{block: 'nearest'}})")
    (left, top), (x, y, *size) = tab.js(f"(b => [b.left, b.top])({FRAME}.getBoundingClientRect())"), js(part)
    return left + x, top + y, *size


def tap_point(tab, js, i):
    tab.tap(lambda: placed(tab, js, f"place(0, {i})"), lambda: js("points.selected.indices") == [i])


def ink(tab, left, top, width, height):
    "How far from white a part of the window is, on average."
    shot = tab.call("Page.captureScreenshot", clip=dict(x=left, y=top, width=width, height=height, scale=1))["data"]
    return 255 - np.asarray(Image.open(io.BytesIO(base64.b64decode(shot))).convert("L")).mean()


@browser
def test_a_point_tapped_in_the_explorers_chapter_marks_its_partner_and_shows_its_prompt(lab, tab, finished):
    "On the right the others fade; what is said is what the run says."
    opened(tab, lab[1], "21_explorer.ipynb")
    js = executed(tab)
    i = js("lone()")
    partner, everyone = f"place(1, {i}).map(at => at - 2).concat(4, 4)", "area(1)"
    def inked(): return np.array([ink(tab, *placed(tab, js, part)) for part in (partner, everyone)])
    until(lambda: inked().all(), 30) # it is drawn
    before = inked()
    tap_point(tab, js, i)
    view = view_of(Run(finished))
    user, version = view.points.row(i)
    card = view.cards.filter(user=user).to_dicts()[0]
    prompt = card["asked"].replace(GAP, view.names[version]) if version else card["plain"]
    until(lambda: js(SHOWN).startswith(f"User {user}, {view.names[version]}"), 30)
    assert prompt in js(SHOWN)
    until(lambda: (inked()/before > .8).tolist() == [True, False], 30)
