"How far it is: on a terminal a bar; in a pipe and a log whole lines, few and without control characters; or silence."
import fcntl, io, os, pty, re, struct, subprocess, sys, termios

import pytest
from test_cli import go, notebook

from ganprompt import cli
from ganprompt.jobs import chapters
from ganprompt.launcher import Progress, took_before
from ganprompt.runs import manifest

LOOP = "import time\nfor _ in processes.progress_bar(range({n}), 'toy', 2): time.sleep(.02)\n"
SOON = "from ganprompt import processes\nprocesses.REDRAWN = processes.BETWEEN = .2\n"
TOY = SOON + LOOP.format(n=60) + '''
def make(folder): return {"x": size}
stage(run, "toy", {"size": size, "seed": seed}, make)'''
LAUNCH = '''
from pathlib import Path
from rich.console import Console
from ganprompt import jobs, launcher
launcher.BETWEEN = .4
nbs = jobs.chapters(Path({nbs!r}))
launcher.launch(nbs, jobs.chosen_values(nbs, {{"run": {run!r}}}), Console(width=100))'''


def in_pipe(code):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    assert not done.returncode, done.stderr.decode()
    return done.stdout.decode(), done.stderr.decode()


def on_terminal(code):
    "What a program writes to a terminal, as it is."
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=theirs, stderr=theirs, stdin=theirs,
                               env=os.environ | {"TERM": "xterm"})
    os.close(theirs)
    said = b""
    while True:
        try: part = os.read(ours, 4096)
        except OSError: break # the other end is closed
        if not part: break
        said += part
    os.close(ours)
    assert process.wait(60) == 0, said.decode()
    return said.decode()


def plain(text): return not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)


def test_a_bar_in_a_pipe_is_a_line_now_and_then():
    out, err = in_pipe(SOON + LOOP.format(n=60))
    assert not out and plain(err) and 3 <= len(err.splitlines()) <= 12
    steps = [re.fullmatch(r"toy: step (\d+) of 62, 00:\d\d left", line)[1] for line in err.splitlines()]
    assert steps == sorted(steps, key=int) and steps[-1] == "62"
    assert in_pipe("from ganprompt import processes\n" + LOOP.format(n=10)) == ("", ""), "it is over in a minute"


def test_a_bar_on_a_terminal_is_drawn():
    said = on_terminal(SOON + LOOP.format(n=60))
    assert said.count("\r") > 3 and said.count("\n") == 1 and re.search(r"step 62 of 62 \|█+\| 00:00 left", said)


@pytest.fixture
def nbs(tmp_path):
    notebook(tmp_path/"nbs/01_toy.ipynb", "size: int = 3  # Size", TOY)
    return tmp_path/"nbs"


def test_a_launch_in_a_pipe(nbs, tmp_path):
    out, err = in_pipe(LAUNCH.format(nbs=str(nbs), run=str(tmp_path/"run")))
    log = (tmp_path/"run/logs/01_toy.log").read_text()
    assert plain(out) and plain(log) and "Traceback" not in err
    _, first, *between, last = out.splitlines()
    assert first == "toy          begins" and re.fullmatch(r"toy          done  [\d.]+ s", last) and len(between) >= 2
    assert all(re.fullmatch(r"toy          toy: step \d+ of 62(, 00:\d\d left)?", line) for line in between)
    assert log.splitlines()[-1] == "toy: step 62 of 62, 00:00 left" and len(log.splitlines()) == len(between) + 1
    assert "left" in between[-1]


def test_a_launch_on_a_terminal(nbs, tmp_path):
    said = on_terminal(LAUNCH.format(nbs=str(nbs), run=str(tmp_path/"run")))
    assert "toy          begins" in said and "toy          done" in said and "\x1b[" in said
    assert re.search(r"toy +[\d.]+ s  toy: step \d+ of 62, 00:0\d left", said), "the line beside the spinner"
    assert "toy          toy: step" not in said, "a line of its own is for those who see none"


def test_a_launch_that_is_quiet(nbs, tmp_path, monkeypatch, capsys):
    toys = chapters(nbs)
    monkeypatch.setattr(cli, "chapters", lambda *a: toys)
    def run(*more):
        monkeypatch.setattr(sys, "argv", ["ganprompt", "run", "--run", str(tmp_path/"run"), *more])
        with pytest.raises(SystemExit) as end: cli.main()
        return end.value.code, *capsys.readouterr()
    code, out, err = run("--quiet")
    assert not code and not err and len(out.splitlines()) == 1 and out.strip().endswith("report.html")
    assert run()[1].splitlines()[-1] == out.strip(), "the last line is the same"
    code, out, err = run("--quiet", "--size", "4")
    assert code and not out and "size 3 -> 4" in err


def test_what_it_took_before(nbs, tmp_path):
    "In this run, or in one with another seed; of nothing else, and of no stage that was made in two goes."
    runs = tmp_path/"runs"
    assert "begins\n" in go(nbs, runs/"a")
    took = manifest(runs/"a", "toy")["wall_seconds"]
    assert took_before(runs/"a", "toy") == (took, True)
    assert f"begins, {took:.1f} s with another seed\n" in go(nbs, runs/"b", seed="1")
    assert "begins\n" in go(nbs, runs/"c", size="4")
    for path in (runs/"c/notebooks").glob("*.json"): path.unlink() # the chapter is executed again
    assert f"begins, {manifest(runs/'c', 'toy')['wall_seconds']:.1f} s the last time\n" in go(nbs, runs/"c", size="4")
    path = runs/"a/toy/manifest.json"
    path.write_text(path.read_text().replace('"resumed": false', '"resumed": true'))
    assert took_before(runs/"a", "toy") == (manifest(runs/"b", "toy")["wall_seconds"], False)


def test_lines_come_whole_and_tables_stay():
    "Pieces become lines; what is no bar is left as it is."
    log, said = io.StringIO(), []
    line = Progress("toy", log, said.append)
    table = "| a | b |\n|---|---|\n| 1 | 2 |\n"
    for text in (table[:7], table[7:], "\x1b[31mred\x1b[0m\r\n", "\rbar 1 |█ | ? left\rbar 2 |██",
                 "| y left", "\n", "x"):
        line.write(text)
    line.close()
    assert log.getvalue() == f"{table}red\nbar 2, y left\nx\n" and not said and line.last == "x"
