"""The process that test_fuzz_recipes.py starts: ``fuzz_cases.py FOLDER``.

It hands hostile and mutated recipes to the command line one after the other, builds those that can be built, trains
none, and writes down what was said and what happened meanwhile. A process of its own, as a hook on audit events cannot
be removed again.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import random
import resource
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from hostile_recipes import CANARY, CONTROL, FOREIGN, PAYLOADS, TOKENS, VALUES, bombs

SECONDS = 120  # for one recipe, which takes milliseconds: only what never ends is stopped
MOST_MEMORY = 2**30


class TooLong(BaseException):
    """A recipe that does not end."""


class Built(ValueError):
    """A recipe that could be run."""


# What must not happen, whatever a recipe says


class Watch:
    """Writes down what Python reports while it is armed."""

    def __init__(self) -> None:
        self.armed, self.seen = False, []
        sys.addaudithook(self.hook)

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.armed and self.is_wrong(event, arguments):
            self.armed = False  # what is done to write it down is ours
            self.seen.append(f"{event} {arguments!r:.200} {''.join(traceback.format_stack(limit=6))[-900:]}")
            self.armed = True

    def is_wrong(self, event: str, arguments: tuple[Any, ...]) -> bool:
        family = event.partition(".")[0]
        if family in ("socket", "subprocess", "pty", "urllib", "ftplib", "smtplib", "webbrowser", "http"):
            return event != "socket.gethostname"
        if event in ("os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile", "os.putenv"):
            return True
        if event in ("pickle.find_class", "marshal.loads", "os.remove", "os.rename", "os.rmdir", "shutil.rmtree"):
            return event != "marshal.loads" or CANARY in str(arguments)
        if event == "import":
            return arguments[0].partition(".")[0] in FOREIGN
        if event == "compile":
            return CANARY in str(arguments[0])
        if event == "exec":
            return CANARY in getattr(arguments[0], "co_filename", "")
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            return bool(writes) and path != os.devnull and not str(path).endswith(".pyc")
        return False


# Recipes


def places(fields: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value."""
    if path:
        yield path
    for key, value in (
        fields.items() if isinstance(fields, dict) else enumerate(fields) if isinstance(fields, list) else ()
    ):
        yield from places(value, (*path, key))


def at(fields: Any, path: tuple[Any, ...]) -> Any:
    return functools.reduce(lambda here, key: here[key], path, fields)


def changed_fields(fields: dict[str, Any], rng: random.Random) -> bytes:
    """A recipe with one to three of its values or names replaced, dropped, doubled or exchanged."""
    fields = copy.deepcopy(fields)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(list(places(fields)) or [("student",)])
        parent, key = at(fields, path[:-1]), path[-1]
        kind = rng.choice(("value", "value", "payload", "payload", "drop", "name", "exchange", "more", "wrap"))
        if kind == "value":
            parent[key] = copy.deepcopy(rng.choice(VALUES))
        elif kind == "payload":
            parent[key] = copy.deepcopy(rng.choice(PAYLOADS))
        elif kind == "drop":
            del parent[key]
        elif kind == "name" and isinstance(parent, dict):
            parent[rng.choice((f"{key}x", str(key)[1:], str(key).upper(), "class_path", "__class__", "self"))] = (
                parent.pop(key)
            )
        elif kind == "exchange":
            other = rng.choice(list(places(fields)))
            parent[key] = copy.deepcopy(at(fields, other))
        elif kind == "more" and isinstance(parent, dict):
            parent[rng.choice(("trust", "self", "args", "kwargs", "after_epoch", "views", "source", "out"))] = (
                copy.deepcopy(rng.choice(VALUES + PAYLOADS))
            )
        else:
            parent[key] = [parent[key]]
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def changed_text(text: str, rng: random.Random) -> bytes:
    """A recipe with some of its lines or bytes dropped, doubled, exchanged, moved, or written over."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        lines = text.split("\n")
        here, there = rng.randrange(len(lines)), rng.randrange(len(lines))
        place = rng.randrange(len(text) + 1)
        kind = rng.choice(("drop", "double", "exchange", "move", "token", "token", "cut", "erase"))
        if kind == "drop":
            del lines[here]
        elif kind == "double":
            lines.insert(there, lines[here])
        elif kind == "exchange":
            lines[here], lines[there] = lines[there], lines[here]
        elif kind == "move":
            lines[here] = rng.choice(("  ", "\t", " ", "- ")) + lines[here]
        if kind in ("drop", "double", "exchange", "move"):
            text = "\n".join(lines)
        elif kind == "token":
            text = text[:place] + rng.choice(TOKENS) + text[place:]
        else:
            text = text[:place] + (text[place + rng.randrange(1, 9) :] if kind == "erase" else "")
    content = bytearray(text.encode("utf-8", "surrogatepass"))
    if content and rng.random() < 0.15:
        for _ in range(3):
            content[rng.randrange(len(content))] = rng.randrange(256)
    return bytes(content)


def recipes(names: list[str], read: Any, each: int) -> Iterator[tuple[str, bytes]]:
    """Every file to try, named by how it was made."""
    yield from bombs()
    for n, payload in enumerate(PAYLOADS):
        for field in ("student", "losses", "views", "procedure", "after_epoch", "source"):
            fields = {
                "student": "SmallCNN",
                "data": "fashion_loaders",
                field: [payload] if field == "losses" else payload,
            }
            yield f"payload {n} in {field}", yaml.safe_dump(fields).encode("utf-8", "surrogatepass")
    import tutelage

    folder = Path(tutelage.__file__).parent / "recipes"
    for name in names:
        fields, text = read(name), (folder / f"{name}.yaml").read_text(encoding="utf-8")
        for n in range(each):
            rng = random.Random(f"{name} {n}")
            yield f"{name} {n}", changed_fields(fields, rng) if n % 2 else changed_text(text, rng)


# The process


def few_images(train: int = 1200, test: int = 60) -> Any:
    from tutelage.data import Images, ImageSet, fashion_subset

    whole = fashion_subset()
    parts = (Images(p.images[:n], p.labels[:n]) for p, n in ((whole.train, train), (whole.test, test)))
    return ImageSet(*parts, whole.classes)


def main(home: Path) -> None:
    from tutelage import cli, recipe
    from tutelage.data import loaders

    sys.path.insert(0, str(home))  # where the canary is
    os.chdir(home)
    os.environ["TUTELAGE_DATA"] = str(home)
    few, load = few_images(), recipe.load
    loaders.fashion_subset = lambda: few

    class Ready:
        """What load returns, and does not train."""

        def __init__(self, keywords: dict[str, Any]):
            self.keywords = keywords

        def __call__(self) -> None:
            raise Built(f"built {', '.join(self.keywords)}")

    def only_built(*arguments: Any) -> Ready:
        run = load(*arguments)
        watch.armed = False
        return Ready(run.keywords)

    rng = np.random.default_rng(0)
    (home / "cifar10").mkdir()
    for part, n in (("train", 1200), ("test", 30)):
        images = rng.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        np.savez(home / "cifar10" / f"{part}.npz", images=images, labels=np.arange(n) % 10)
    names = recipe.packaged_names()
    unbuilt = []
    for name in names:  # imports what is imported when it is used
        try:
            load(name)
        except Exception as error:
            unbuilt.append(f"{name}: {error}")
    recipe.load = only_built

    def too_long(*_: Any) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, too_long)
    now = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (now + MOST_MEMORY, resource.RLIM_INFINITY))
    file, watch, found = home / "recipe.yaml", Watch(), []

    def run(name: str, content: bytes, command: str, *more: str) -> dict[str, Any]:
        file.write_bytes(content)
        said, code = io.StringIO(), "nothing"
        watch.seen = []
        signal.alarm(SECONDS)
        try:
            with redirect_stderr(said), redirect_stdout(io.StringIO()):
                watch.armed = True
                code = cli.main([command, str(file), *more])
        except TooLong:
            code = "did not end"
        except BaseException:  # what would be a traceback
            watch.armed = False
            code = traceback.format_exc()
        watch.armed = False
        signal.alarm(0)
        wrong = [*watch.seen, *(root for root in FOREIGN if root in sys.modules)]
        text = content[:1500].decode("latin-1")
        return {"name": f"{command}: {name}", "text": text, "code": code, "said": said.getvalue(), "wrong": wrong}

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, content in recipes(names, recipe.read, each=8):
        found.append(run(name, content, "distill"))
    for name, content in bombs():
        found.append(run(name, content, "compare", "--out", str(home / "compared")))
        found.append(run(name, content, "compress", "--max-size", "1MB", "--out", str(home / "compressed")))
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    clean = not (home / "imported").exists()
    # with trust the canary is imported, and the watch has to see it
    trusting = run("control", yaml.safe_dump(CONTROL).encode(), "distill", "--trust", CANARY)
    report = {"unbuilt": unbuilt, "grown": grown, "found": found, "clean": clean, "control": trusting}
    (home / "found.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
