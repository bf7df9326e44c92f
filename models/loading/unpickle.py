"""Unpickle a stranger's file: plain values, and what a subclass makes of a few known names. Nothing of the file is executed."""

import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, BinaryIO, ClassVar

from models.loading.files import first_line

OPCODES = "PROTO FRAME STOP MARK PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE INT BININT BININT1"
OPCODES += " BININT2 LONG LONG1 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINBYTES"
OPCODES += " SHORT_BINBYTES BINBYTES8 EMPTY_SET EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT"
OPCODES += " DICT SETITEM SETITEMS GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID"  # what Python, numpy and torch write
ERRORS: tuple[type[Exception], ...]  # that a damaged pickle raises
ERRORS = (ArithmeticError, AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError, struct.error)
ERRORS += (pickle.UnpicklingError,)


class ForbiddenContent(pickle.UnpicklingError):
    """A pickle that uses a name which is not in `known`. The message is the name."""


class Ignored:
    """Replaces an object whose content nobody needs, such as the options of a training script."""

    def __init__(self, *args: Any) -> None:
        pass


class PlainUnpickler(pickle._Unpickler):
    """Makes plain values. `known` maps the other names that a file may use to what is called instead of them.

    Objects of `known` may have a method `build(state)`. Memory and time are proportional to the size of the content: the
    unpickler in C would take gigabytes for a memo's index, and crash on objects that it hashes or fills without a check.
    """

    stack: list[Any]  # of the base class
    pop_mark: Callable[[], list[Any]]
    dispatch: ClassVar[Any] = {}

    def __init__(self, file: BinaryIO, *, max_values: int, encoding: str = "ASCII") -> None:
        self.file, self.reads_left = file, 3 * max_values  # a value takes one to three
        self.known: dict[str, Any] = {}
        super().__init__(self, encoding=encoding)

    def read(self, n: int) -> bytes:
        self._count_read()
        return self.file.read(n)

    def readline(self) -> bytes:
        self._count_read()
        return self.file.readline()

    def _count_read(self) -> None:
        self.reads_left -= 1
        if self.reads_left < 0:
            raise pickle.UnpicklingError("it has too many values")

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self.known:
            raise ForbiddenContent(first_line(f"{module}.{name}"))
        return self.known[f"{module}.{name}"]

    def load_frame(self) -> None:
        self.read(8)  # a frame only tells how much to read at once

    def load_newobj(self) -> None:
        del self.stack[-1]
        if self.stack[-1] is not Ignored:
            raise pickle.UnpicklingError("it has an object that is not a plain value")
        self.stack[-1] = Ignored()

    def load_build(self) -> None:
        """Set the state of an object that needs it. Plain values have none, so it is dropped."""
        state = self.stack.pop()
        if hasattr(self.stack[-1], "build"):
            self.stack[-1].build(state)

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self._set(items)

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set([key, value])

    def load_setitems(self) -> None:
        self._set(self.pop_mark())

    def _set(self, items: list[Any]) -> None:
        target, keys = self.stack[-1], items[::2]
        if type(target) not in (dict, OrderedDict) or not all(isinstance(key, (str, int, float, bytes)) for key in keys):
            raise pickle.UnpicklingError("it has a dictionary with keys that are not plain values")
        target.update(zip(keys, items[1::2], strict=True))

    def load_append(self) -> None:
        value = self.stack.pop()
        self._extend([value])

    def load_appends(self) -> None:
        self._extend(self.pop_mark())

    def _extend(self, items: list[Any]) -> None:
        if type(self.stack[-1]) is not list:
            raise pickle.UnpicklingError("it has an item of something that is not a list")
        self.stack[-1].extend(items)


_CODES = [getattr(pickle, name)[0] for name in OPCODES.split()]
PlainUnpickler.dispatch = {code: getattr(PlainUnpickler, pickle._Unpickler.dispatch[code].__name__) for code in _CODES}
