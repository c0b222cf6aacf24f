"""Where in the user's program an operation was issued, cheaply enough to note it for every one.

The innermost frame outside ringfold is found at each call; its text ("train.py:41 in step") is made once, put into a row of the shared page, and
from then on an operation carries the row's number. So a peer, or the launcher, can name the line that a dead rank was in.
"""

from __future__ import annotations

import os
import sys
from types import CodeType, FrameType

from ringfold.collectives.page import SITE_COUNT, Page

__all__ = ["CallSites"]

UNKNOWN = 0
OUR_OWN = -1  # a frame of ringfold itself: look at its caller
PACKAGE = "ringfold."
USERS = "ringfold.benchmarks."  # of the package, but they use it as a script does


class CallSites:
    """The rows of one page; when all are taken, further places are unknown."""

    def __init__(self, page: Page) -> None:
        self._page = page
        # Code objects are kept, so that no later one gets the address of one that has gone.
        self._rows: dict[tuple[int, int], tuple[int, CodeType]] = {}
        self._used = 0

    def row(self, depth: int) -> int:
        """Return the row of the innermost frame outside ringfold, beginning `depth` frames above this call."""
        return self._from(sys._getframe(depth + 1))

    def _from(self, frame: FrameType | None) -> int:
        while frame is not None:
            known = self._rows.get((id(frame.f_code), frame.f_lasti))
            row = known[0] if known is not None else self._add(frame)
            if row != OUR_OWN:
                return row
            frame = frame.f_back
        return UNKNOWN

    def row_of(self, frame: FrameType) -> int:
        """Return the row of the innermost frame outside ringfold from `frame` on; its complement if that is not `frame` itself, or unknown."""
        row = self._from(frame)
        own = self._rows.get((id(frame.f_code), frame.f_lasti))
        return row if own is not None and own[0] == row else ~row

    def _add(self, frame: FrameType) -> int:
        row = OUR_OWN
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(PACKAGE) or module.startswith(USERS):
            if self._used + 1 >= SITE_COUNT:
                return UNKNOWN
            self._used = row = self._used + 1
            self._page.write_site(row, describe(frame))
        self._rows[id(frame.f_code), frame.f_lasti] = (row, frame.f_code)
        return row


def describe(frame: FrameType) -> str:
    """Return "train.py:41 in step", with the file relative to the working directory where it lies below."""
    name = frame.f_code.co_filename
    here = os.getcwd() + os.sep
    return f"{name.removeprefix(here)}:{frame.f_lineno} in {frame.f_code.co_qualname}"
