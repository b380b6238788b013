"Pages in the repository: as wide as the window, light or dark as the reader is, linked, and nothing is fetched."
import re
from urllib.parse import unquote

import polars as pl
import pytest

from chromium import Browser, browser
from ganprompt import pages as P
from ganprompt.files import root

PAGES = sorted((root()/"figures").glob("*.html"))
PAPER = "getComputedStyle(document.documentElement).backgroundColor"


def light(tab, of):
    "How light a colour is that the page computes, 0 to 1."
    return sum(map(float, re.findall(r"[\d.]+", tab.js(of))[:3]))/3/255


@browser
@pytest.mark.parametrize("width", [1440, 390])
def test_pages_fit_and_fetch_nothing(width, tmp_path):
    tab = Browser(tmp_path/"profile", width=width)
    try:
        for page in PAGES:
            tab.open(page)
            assert tab.js("document.documentElement.scrollWidth") <= width, page.name
            assert tab.js("[...document.images].every(i => i.complete && i.naturalWidth > 0)"), page.name
        assert len(PAGES) > 15 and all(url.startswith("file:") for url in tab.requests[1:]) and not tab.faults
    finally: tab.close()


@browser
def test_pages_are_as_dark_as_the_reader(tmp_path):
    "What is written stands out from its ground, in names of rows too, which have a ground of their own."
    tab, name = Browser(tmp_path/"profile"), "document.querySelector('tbody th')"
    try:
        for scheme, dark in (("dark", True), ("light", False)):
            tab.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
            for page in PAGES:
                tab.open(page)
                for ground, ink in ((PAPER, "getComputedStyle(document.body).color"),
                                    (f"getComputedStyle({name}).backgroundColor", f"getComputedStyle({name}).color")):
                    assert (light(tab, ground) < .2, light(tab, ink) < .2) == (dark, not dark), (page.name, scheme)
    finally: tab.close()


@browser
def test_a_wide_table_keeps_the_names_of_its_rows_in_sight(tmp_path):
    tab = Browser(tmp_path/"profile", width=390)
    try:
        tab.open(root()/"figures/board.html")
        assert tab.js("document.querySelector('.table').scrollLeft = 900") == 900
        assert 0 <= tab.js("document.querySelector('tbody th').getBoundingClientRect().left") < 30
        assert tab.js("document.querySelector('tbody td').getBoundingClientRect().left") < -300
        assert tab.js("document.querySelector('caption span').getBoundingClientRect().right") < 390
    finally: tab.close()


def test_every_page_leads_to_all_others_and_shows_its_pictures():
    names = {p.name for p in PAGES}
    for page in PAGES:
        text = page.read_text("utf-8")
        links = {unquote(x) for x in re.findall(r'<a href="([^"]+)"', text)}
        shown = {unquote(x) for x in re.findall(r'<img src="([^"]+)"', text)}
        assert links == names - {page.name} | shown, page.name
        own = {p.name for p in page.parent.glob(f"{page.stem}*.png") if re.fullmatch(
            f"{page.stem}(_heat|_figure1|-tsne)?", p.stem)}
        assert shown == own, page.name
        assert {f"]({name})" for name in shown} == set(re.findall(r"\]\([^)]+\.png\)",
                                                                  page.with_suffix(".md").read_text("utf-8")))


def test_lists_follow_the_folder(tmp_path):
    "A page written again is listed once, by its new title; a page of somebody else is left as it is."
    table, mine = pl.DataFrame({"a": [1]}), "<html><title>Mine</title><body></body></html>"
    (tmp_path/"mine.html").write_text(mine)
    for title, name in ("One", "one"), ("Two", "two"), ("Second <2>", "two"):
        P.write_page(P.Page(title, [], []), table, tmp_path/name)
    one, two = ((tmp_path/f"{name}.html").read_text() for name in ("one", "two"))
    assert re.findall("<a .*?</a>", one) == ['<a href="two.html">Second &lt;2&gt;</a>']
    assert re.findall("<a .*?</a>", two) == ['<a href="one.html">One</a>'] and two.count("<nav") == 1
    assert (tmp_path/"mine.html").read_text() == mine
