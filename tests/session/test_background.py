"""Low priority: for what runs already, and for what it starts."""

from __future__ import annotations

import os
import subprocess
import sys

from pipo_ray.session.background import give_way

CHILD = """
import os, subprocess, sys, threading
threading.Thread(target=threading.Event().wait, daemon=True).start()
print("started", flush=True)
sys.stdin.readline()
print(subprocess.run([sys.executable, "-c", "import os; print(os.getpriority(0, 0), os.sched_getscheduler(0))"],
      capture_output=True, text=True).stdout, end="", flush=True)
sys.stdin.readline()
"""


def test_all_threads_give_way_and_children_inherit_it() -> None:
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == "started\n"
        give_way([child.pid, 1 << 22])  # the other one does not exist
        threads = [int(name) for name in os.listdir(f"/proc/{child.pid}/task")]
        assert len(threads) == 2
        assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_IDLE}
        assert {os.getpriority(os.PRIO_PROCESS, thread) for thread in threads} == {19}
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.stdout.readline() == f"19 {os.SCHED_IDLE}\n"
        child.stdin.write("\n")
    assert os.sched_getscheduler(0) == os.SCHED_OTHER
