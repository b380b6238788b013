"""The demo on idle cores and beside busy processes: `make busy`, or tests/busy.py STAGE [PAIRS] for the stages up to
STAGE only. Not part of the quick tests.

Idle and busy runs alternate, each with the same code from the command to the report; a busy machine has as many loops
at work as it has cores. Fails if the slowest busy run took more than LIMIT times the fastest idle one,
or if a number of two runs differs: how busy a machine is must not decide a result."""
import hashlib, os, subprocess, sys, tempfile, time
from contextlib import contextmanager
from pathlib import Path

LIMIT = 2.5


@contextmanager
def loops(n):
    "So many processes that do nothing but compute."
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try: yield
    finally:
        for p in busy: p.kill(); p.wait()


def timed(folder, until):
    "Seconds that a run takes."
    start, command = time.time(), [Path(sys.executable).with_name("ganprompt"), "run", "--run", folder,
                                   *(["--until", until] if until else [])]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL,
                   env={k: v for k, v in os.environ.items() if "NUM_THREADS" not in k})
    return time.time() - start


def weights(folder):
    "A digest of every file of weights."
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(Path(folder).rglob("*.safetensors"))}


def main(until="", pairs=1):
    seconds, made = {"idle": [], "busy": []}, []
    with tempfile.TemporaryDirectory() as tmp:
        for i in range(2*pairs):
            kind = "busy" if i % 2 else "idle"
            with loops(os.cpu_count() if i % 2 else 0): seconds[kind].append(timed(f"{tmp}/{i}", until))
            made.append(weights(f"{tmp}/{i}"))
            print(f"{kind}: {seconds[kind][-1]:.0f} s", flush=True)
    ratio = max(seconds["busy"])/min(seconds["idle"])
    print(f"busy/idle {ratio:.2f} (at most {LIMIT}); {len(made[0])} files of weights, "
          f"{'all alike' if all(m == made[0] for m in made) else 'NOT alike'}")
    sys.exit(ratio > LIMIT or not made[0] or any(m != made[0] for m in made))


if __name__ == "__main__": main(*sys.argv[1:2], *map(int, sys.argv[2:3]))
