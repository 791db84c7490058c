"""Ends what a run of the tests started, also when the run itself was killed.

A process of its own that holds one end of a pipe and the run's lock. Each thing that is started is
told to it first, as the command that ends it. When the other end of the pipe closes, which no way of
dying prevents, it runs the commands, the last one first; then the lock is free for the next run.
The commands are such that they do nothing where there is nothing left to end.
"""

import json
import signal
import subprocess
import sys

COMMAND_BOUND_S = 120

# One cloud of the tests at a time on a machine: each would have the same bridge, ports and addresses.
LOCK = "/run/lock/mallee-e2e"


class Keeper:
    def __init__(self, lock):
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, pass_fds=[lock.fileno()], start_new_session=True
        )

    def at_the_end(self, *command):
        """To be told before what it ends is started."""
        self.process.stdin.write(json.dumps([str(word) for word in command]).encode() + b"\n")
        self.process.stdin.flush()

    def finish(self):
        self.process.stdin.close()
        self.process.wait(timeout=10 * COMMAND_BOUND_S)


def main():
    # The keys that end the run are not meant for who cleans up after it.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for command in reversed([json.loads(line) for line in sys.stdin]):
        try:
            subprocess.run(command, timeout=COMMAND_BOUND_S, check=False,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except (OSError, subprocess.TimeoutExpired) as problem:
            print(f"cleaning up: {' '.join(command)}: {problem}", file=sys.stderr)


if __name__ == "__main__":
    main()
