"""Several pieces of work in one process, one at a time: what processes do side by side, made repeatable."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from tutelage.run import random_state, restore_random

Made = TypeVar("Made")


class Turns:
    """Threads of which one runs at a time, until it passes on or ends; each has random numbers of its own.

    Their order is the same every time, so what they do is as repeatable as one thread.

    Args:
        count: how many there are.

    >>> turns, said = Turns(2), []
    >>> def work(number):
    ...     for step in range(2):
    ...         said.append((number, step))
    ...         turns.pass_on(number)
    ...     return number
    >>> turns.run([lambda: work(0), lambda: work(1)]), said
    ([0, 1], [(0, 0), (1, 0), (0, 1), (1, 1)])
    """

    def __init__(self, count: int):
        self._gates = [threading.Semaphore(0) for _ in range(count)]
        self._running = list(range(count))
        self._error: BaseException | None = None

    def run(self, work: Sequence[Callable[[], Made]]) -> list[Made]:
        """Do all of it; what one of them raises ends the others when they next pass on, and is raised here."""
        made: dict[int, Made] = {}
        beginning = random_state()

        def do(number: int) -> None:
            self._gates[number].acquire()
            try:
                self._go_on()
                restore_random(beginning)
                made[number] = work[number]()
            except BaseException as error:
                self._error = self._error or error
            after = self._after(number)
            self._running.remove(number)
            if after is not None:
                self._gates[after].release()

        threads = [threading.Thread(target=do, args=(number,), daemon=True) for number in range(len(self._gates))]
        for thread in threads:
            thread.start()
        self._gates[0].release()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C
            self._error = error
            for thread in threads:
                thread.join()
        if self._error is not None:
            raise self._error
        return [made[number] for number in range(len(threads))]

    def pass_on(self, number: int) -> None:
        """Let the others run, each until it passes on or ends; returns when it is this one's turn again.

        Raises:
            RuntimeError: another one has failed.
        """
        after = self._after(number)
        if after is not None:
            state = random_state()
            self._gates[after].release()
            self._gates[number].acquire()
            restore_random(state)
        self._go_on()

    def _after(self, number: int) -> int | None:
        others = [n for n in self._running if n != number]
        return next((n for n in others if n > number), others[0]) if others else None

    def _go_on(self) -> None:
        if self._error is not None:
            raise RuntimeError("another one of these has failed") from self._error
