"""What test_killed_caching.py runs in a process of its own: ``caching_cases.py FOLDER``."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from killing import HALF, OPENED, Dying, die, in_a_fork

sys.path.insert(0, str(Path(__file__).parents[1]))

import cache_cases

from tutelage import cache_files

BATCH = 7


class Torn:
    """A file of which a write may be the last one, and end in the middle."""

    def __init__(self, file: Any, dying: Dying):
        self.file, self.dying = file, dying

    def seek(self, place: int) -> int:
        return self.file.seek(place)

    def write(self, text: memoryview) -> int:
        # a row's last four bytes lie in one page and are one write, which no signal divides
        if self.dying.comes_to("half a row" if len(text) > 4 else "a row without its checksum"):
            if len(text) > 4:
                self.file.write(text[: len(text) // 2])
            die()
        return self.file.write(text)


def fill(out: Path, kind: str | None, at: int, words: Path) -> int:
    """Go on with filling the cache, and be killed before the ``at``-th of a kind of moments; the exit status."""

    def work() -> None:
        dying, put, exact = Dying(out, kind, at), cache_files._put, cache_cases.exact

        def taught(*args: Any) -> Any:
            network = exact(*args)
            network.register_forward_hook(note)
            return network

        def note(module: Any, inputs: Any, output: Any) -> None:
            dying.reaches("the teacher")
            with Path(f"{out}.calls").open("a") as file:
                file.write(f"{len(output)}\n")

        cache_cases.exact = taught
        cache_files._put = lambda file, *given: put(Torn(file, dying), *given)
        dying.tears(Path, "write_text", 0)
        cache_cases.filled(out, size=BATCH)

    return in_a_fork(work, words)


def main(folder: Path) -> None:
    cache_files.MOST_ROWS = 20  # so that there are several shards
    words, chance, moments = folder / "words.txt", random.Random(7), []
    assert fill(folder / "whole", None, 0, words) == 0, words.read_text()
    chain = [(HALF, 1), ("rename", 1), (OPENED, 3), (OPENED, 4), ("rename", 2)]
    chain += [(k, chance.randint(1, 8)) for k in ("half a row", "a row without its checksum", "the teacher") * 3]
    chain += [("rename", 1), (HALF, 1), ("rename", 1)]  # where everything is there, but not yet summed up
    for kind, at in chain:
        moments.append({"kind": kind, "at": at, "status": fill(folder / "chain", kind, at, words)})
    assert fill(folder / "chain", None, 0, words) == 0, words.read_text()
    (folder / "moments.json").write_text(json.dumps(moments))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
