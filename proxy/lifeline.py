"""A child that does not outlive whoever supervises it.

A service or worker that its killed supervisor left behind would keep the port, and nobody would
restart it.
"""

import ctypes
import os
import signal
import sys

# Set for a child, to the process that it must not outlive.
SUPERVISOR_VARIABLE = "TALLYGATE_SUPERVISOR_PID"

_PR_SET_PDEATHSIG = 1


def die_with_supervisor() -> None:
    """If a supervisor started us, have the kernel end us with it; exits if it is gone already."""
    supervisor = os.environ.get(SUPERVISOR_VARIABLE)  # noqa: TID251 - no setting of an operator
    if supervisor is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # It may have died before the call.
    if supervisor != str(os.getppid()):
        sys.exit("the process that started this one is gone")
