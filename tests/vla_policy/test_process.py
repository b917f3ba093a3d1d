"""What the nodes' processes have in common."""

import os
import subprocess
import sys

MAY_NOT = """
import os, resource
from vla_policy import process
resource.setrlimit(resource.RLIMIT_RTPRIO, (0, 0))
if not os.geteuid():
    os.setuid(65534)
process.go_first()
print(os.sched_getscheduler(0))
"""


def test_a_user_who_may_not_have_realtime_priority_is_told_and_goes_on() -> None:
    done = subprocess.run([sys.executable, "-c", MAY_NOT], capture_output=True, text=True, check=True)
    assert int(done.stdout) == os.SCHED_OTHER and "rtprio in limits.conf" in done.stderr
