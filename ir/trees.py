"""Python text to a syntax tree, whatever other threads parse meanwhile."""

from __future__ import annotations

import ast
import threading
from typing import Literal

# CPython before 3.13 counts the depth of the tree it builds in one place for all threads: a parse that another thread
# interrupts ends in this SystemError, which says nothing of the text.
RACE = "AST constructor recursion depth mismatch"
TRIES = 8
_LOCK = threading.Lock()


def tree(text: str, mode: Literal["exec", "eval"] = "exec") -> ast.AST:
    """The tree of a text; raises SyntaxError, ValueError and whatever else `ast.parse` says of it."""
    for left in reversed(range(TRIES)):
        try:
            with _LOCK:
                return ast.parse(text, mode=mode)
        except SystemError as error:  # a library's own parse, which takes no lock of ours
            if RACE not in str(error) or not left:
                raise
    raise AssertionError("the last try returns or raises")


def raced(error: BaseException | None) -> bool:
    """Whether an error, or one behind it, is that of two parses at once."""
    while error is not None:
        if isinstance(error, SystemError) and RACE in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
