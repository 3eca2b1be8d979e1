"""Run by test_files_killed.py, never imported by it: processes that save and are killed while they do."""

import itertools
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from interop import folder, load, save


def kill_at_line(number):
    """Trace function: kill -9 this process before the `number`-th line that runs in interop/folder.py."""
    lines = itertools.count(1)

    def trace(frame, event, _):
        if frame.f_code.co_filename != folder.__file__:
            return None
        if event == "line" and next(lines) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace

    return trace


def save_and_be_killed_at_every_line(adapter, start, outcomes):
    """Save over copies of `start`, each by a process killed one line later, until one saves to the end."""
    for number in itertools.count(1):
        target = outcomes / f"{number:03d}"
        shutil.copytree(start, target)
        child = os.fork()
        if not child:
            os.fsync = lambda _: None  # what a killed process wrote, the kernel keeps
            sys.settrace(kill_at_line(number))
            save(adapter, target, model_card=False)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return
        assert status == -signal.SIGKILL, f"line {number}: exit status {status}"


def save_by_turns(adapters, target):
    """Save one adapter after the other for ever; a line on stdout says that the first one is in place."""
    for number in itertools.count():
        save(adapters[number % len(adapters)], target, model_card=False)
        if number == 0:
            print("saving", flush=True)


def main(task, target, *sources):
    if task == "turns":
        save_by_turns([load(source) for source in sources], Path(target))
    else:
        for start, source, outcomes in json.loads(target):
            save_and_be_killed_at_every_line(load(source), Path(start), Path(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
