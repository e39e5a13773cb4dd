"""`warm_client.py SOCKET ARGUMENTS`: what is started in place of `python ARGUMENTS`, for warm.py's server to run.

It hands over what a process has: arguments, environment, working folder and streams; and it ends as the fork ends.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys


def main() -> None:
    _, path, *arguments = sys.argv
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        socket.send_fds(server, [b"?"], [0, 1, 2])
        asked = {"arguments": arguments, "environment": dict(os.environ), "folder": os.getcwd()}  # noqa: PTH109
        server.sendall(json.dumps(asked).encode() + b"\n")
        code = int(server.recv(16))
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
