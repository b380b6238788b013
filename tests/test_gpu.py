"What `make gpu` measures, as small as it can be, in a process of its own; kept, and drawn."
import json, os, subprocess, sys

import pytest

from ganprompt import gpu
from ganprompt.files import UserError, root
from ganprompt.gpu import draw_gpu, keep_gpu, made_up, measure_gpu, random_lm, useful_operations


def test_every_part_is_measured_once_and_kept(tmp_path):
    def run():
        code = "from ganprompt.gpu import gpu_command; gpu_command()"
        return subprocess.run([sys.executable, "-c", code, "--tiny", "--run", str(tmp_path/"run")],
                              capture_output=True, text=True, timeout=600, env=os.environ | {"PYTHONPATH": str(root())})
    done = run()
    assert done.returncode == 0, done.stderr[-2000:]
    files = {p: p.read_bytes() for p in (tmp_path/"run/measured").glob("*.json")}
    found = {part["part"]: part for part in map(json.loads, files.values())}
    assert len(found) == 9 and not any("failed" in part for part in found.values()), found
    assert found["score pocket"]["forwards"] == 2 and .5 < found["score pocket"]["useful"] <= 1
    assert found["agreement pocket"]["tau"] == pytest.approx(1) and found["rate"]["budget"] == 4096
    assert run().returncode == 0 and files == {p: p.read_bytes() for p in (tmp_path/"run/measured").glob("*.json")}
    assert len(json.loads(keep_gpu(str(tmp_path/"run"), tmp_path/"gpu").read_text())["parts"]) == 9
    page = next(p for p in draw_gpu(tmp_path/"gpu", tmp_path/"out") if p.suffix == ".md").read_text()
    assert "| score pocket " in page and "Random weights" in page


def test_one_failure_does_not_stop_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "make_data", lambda p: None); monkeypatch.setattr(gpu, "make_prompts", lambda p: None)
    monkeypatch.setattr(gpu, "parts_of", lambda *_: {"a": lambda: 1/0, "b": lambda: {"x": 2}})
    folder = measure_gpu(str(tmp_path/"run"))
    assert "ZeroDivisionError" in json.loads((folder/"a.json").read_text())["failed"]
    assert json.loads((folder/"b.json").read_text())["x"] == 2
    with pytest.raises(UserError, match="only"): measure_gpu(str(tmp_path/"run"), only="c")
    (folder/"a.json").unlink()
    assert not (measure_gpu(str(tmp_path/"run"), minutes=0)/"a.json").exists()


def test_useful_operations_by_hand():
    "Two layers of width 64: four matrices 64 by 64, three 64 by 128; a prefix of 2, a tail of 3."
    lm = random_lm("pocket")
    weights = 2*(4*64*64 + 3*64*128)
    seen = (1 + 2) + (3 + 4 + 5)
    assert useful_operations(lm, [[5, 6]], [[[7, 8, 9]]]) == 2*weights*5 + 4*64*2*seen
    prefixes, tails = made_up(3, 4)
    assert all(150 <= len(p) <= 190 for p in prefixes) and all(5 <= len(t) <= 13 for row in tails for t in row)
