"A training that waits to be killed: a fast machine is through before a test that watches its files has looked."
import fnmatch, sys, time


def wait_at(path, nth=2):
    "Let this process and its forks wait before they rename a file to `path` (a pattern), from the nth time on."
    left = nth
    def before(event, args):
        nonlocal left
        if event != "os.rename" or not fnmatch.fnmatch(str(args[1]), str(path)): return
        left -= 1
        if left <= 0: time.sleep(300)
    sys.addaudithook(before)
