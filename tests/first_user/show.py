"""How the story is shown: one line a step, a clock on every step that takes longer than a second."""

import contextlib
import sys
import threading
import time

LIVE = sys.stdout.isatty()
WIDTH = 62


def say(text=""):
    print(text, flush=True)


def chapter(title):
    say(f"\n\033[1m{title}\033[0m" if LIVE else f"\n{title}")


def quote(text):
    """What a guest or a program said, set off from our own words."""
    for line in text.rstrip("\n").splitlines():
        say(f"    | {line}")


class Step:
    """A step under way: its text, its clock, what came of it."""

    def __init__(self, text):
        self.text = text
        self.result = ""
        self.begun = time.monotonic()
        self.ended = threading.Event()
        self.clock = threading.Thread(target=self._tick, daemon=True)
        self.clock.start()

    def seconds(self):
        return time.monotonic() - self.begun

    def _tick(self):
        waited = 1.0 if LIVE else 10.0
        while not self.ended.wait(waited):
            if LIVE:
                print(f"\r  … {self.text:<{WIDTH}} {self.seconds():6.1f} s", end="", flush=True)
                waited = 0.2
            else:
                say(f"  … {self.text} ({self.seconds():.0f} s)")

    def end(self, mark):
        self.ended.set()
        self.clock.join()
        start = "\r" if LIVE else ""
        result = f"  {self.result}" if self.result else ""
        say(f"{start}  {mark} {self.text:<{WIDTH}} {self.seconds():6.1f} s{result}")


@contextlib.contextmanager
def step(text):
    """`with step("…") as it:`; set `it.result` to show what came of it."""
    one = Step(text)
    try:
        yield one
    except BaseException:
        one.end("✗")
        raise
    one.end("✓")
