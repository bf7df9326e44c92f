"""Mutate valid files, and open each mutant in a child process: it must open, or raise one of the errors that users get to see."""

import faulthandler
import multiprocessing
import random
import re
import resource
import signal
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tests.faults.rows import Row

MEMORY = 1 << 30  # bytes that opening one mutant may take
SECONDS = 20  # that it may take
WEIRD = (b"NaN", b"-1", b"1e999", b"null", b"99999999999999999999", b"[[[]]]", b"{}", b'"x"', b"../../x", b"\x1b[31m", b"true")
TOKEN = re.compile(rb'-?\d+(?:\.\d+)?|"[^"\n]*"|[A-Za-z_]+')


def mutants(content: bytes, n: int, seed: int = 0) -> Iterator[bytes]:
    """Yield `n` mutants of a file. Half of those of a text file have a token replaced, so that they still parse."""
    generator = random.Random(seed)
    tokens = list(TOKEN.finditer(content)) if b"\0" not in content[:1000] else []
    for _ in range(n):
        mutant = bytearray(content)
        if tokens and generator.random() < 0.5:
            start, end = generator.choice(tokens).span()
            mutant[start:end] = generator.choice(WEIRD)
        else:
            for _ in range(generator.choice((1, 1, 2, 8))):
                _mutate(mutant, generator)
        yield bytes(mutant)


def _mutate(mutant: bytearray, generator: random.Random) -> None:
    if not mutant:
        return
    start = generator.randrange(len(mutant))
    end = min(len(mutant), start + generator.choice((1, 2, 4, 64)))
    change = generator.randrange(6)
    if change == 0:
        mutant[start] ^= 1 << generator.randrange(8)
    elif change == 1:
        mutant[start:end] = generator.randbytes(end - start)
    elif change == 2:
        mutant[start:end] = generator.choice((b"\0", b"\xff", b"\x80")) * (end - start)
    elif change == 3:
        del mutant[start:end]
    elif change == 4:
        mutant[start:start] = mutant[start:end] * generator.choice((1, 2, 50))
    else:
        del mutant[start:]


def fuzz(
    name: str,
    files: Mapping[Path, bytes],
    open_it: Callable[[], Any],
    allowed: tuple[type[BaseException], ...],
    n: int,
    must: str = "opened, or one clear error",
) -> Row:
    """Open `n` mutants: in each, one of the files differs from its valid content. `open_it` reads them and checks the result.

    `allowed` are the errors that reach users as one line; every other exception, a crash, a hang and a flood of memory are wrong.
    """

    def open_mutant(number: int) -> None:
        path = list(files)[number % len(files)]
        path.write_bytes(next(mutants(files[path], 1, seed=number)))
        try:
            open_it()
        finally:
            path.write_bytes(files[path])

    row = in_children(name, [f"mutant {number}" for number in range(n)], open_mutant, allowed, must)
    for path, content in files.items():
        path.write_bytes(content)
    return row


def in_children(
    name: str, cases: Sequence[str], run: Callable[[int], Any], allowed: tuple[type[BaseException], ...], must: str
) -> Row:
    """Call `run` with the number of each case, in a child process with a limit on memory and time. A crash ends only its case."""
    row, first = Row(name, must, len(cases)), 0
    context = multiprocessing.get_context("fork")
    while first < len(cases):
        receiver, sender = context.Pipe(duplex=False)
        child = context.Process(target=_run_cases, args=(run, allowed, range(first, len(cases)), sender))
        child.start()
        sender.close()
        try:
            while True:
                number, problem = receiver.recv()
                first = number + 1
                if problem:
                    row.wrong.append(f"{name}, {cases[number]}: {problem}")
        except EOFError:
            child.join()
        if first < len(cases):  # the child died of this case
            row.wrong.append(f"{name}, {cases[first]}: the process ended with {child.exitcode}")
            first += 1
    return row


def _run_cases(run: Callable[[int], Any], allowed: tuple, numbers: range, sender: Any) -> None:
    faulthandler.disable()  # the parent reports a crash
    torch.set_num_threads(1)  # OpenMP's threads don't survive a fork
    _limit_memory()
    signal.signal(signal.SIGALRM, _too_long)
    for number in numbers:
        signal.alarm(SECONDS)
        problem = None
        try:
            run(number)
        except allowed as error:
            if not str(error).strip() or "\n" in str(error).strip():
                problem = f"not a line: {error!r}"
        except BaseException:
            problem = traceback.format_exc(limit=-3)
        signal.alarm(0)
        sender.send((number, problem))
    sender.close()


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def _too_long(signum: int, frame: object) -> None:
    raise TimeoutError(f"took more than {SECONDS} seconds")
