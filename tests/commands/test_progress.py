"""The progress bar and the tables of the commands."""

import io

from flash_attn_mps.text_table import aligned
from flash_attn_mps.tools.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_sees_how_far_it_is():
    terminal = Terminal()
    with Progress(4, "tune", terminal) as progress:
        progress.step("first")
        progress._drawn = float("-inf")
        progress.step("half", 2)
    first, half, cleared = terminal.getvalue().split("\r")[1:]
    assert first.startswith("tune [######..................] 1/4 0:00")
    assert half.startswith("tune [##################......] 3/4")
    assert half.rstrip("\x1b[K").endswith("half")
    assert cleared == "\x1b[K"


def test_a_pipe_sees_nothing():
    pipe = io.StringIO()
    with Progress(4, "tune", pipe) as progress:
        progress.step("first", 4)
    assert pipe.getvalue() == ""


def test_more_steps_than_announced_do_no_harm():
    with Progress(0, "tune", Terminal()) as progress:
        progress.step()
        progress.step()
    assert progress.done == 1


def test_columns():
    assert aligned([("a", "bb"), ("ccc", 4)]) == "a    bb\nccc  4"
    assert aligned([("a", "bb"), ("ccc", 4)], right=True) == "a    bb\nccc   4"
