"""Codistillation: peers on disjoint data, each in a process of its own, learn from each other's stale weights."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from torch import nn

from tutelage.algorithms.multi_teacher.averaged_ensemble import average_logits
from tutelage.catalogue import method
from tutelage.console import say
from tutelage.knowledge.base import Loss
from tutelage.knowledge.response.kd import KD
from tutelage.knowledge.response.task import TaskLoss
from tutelage.record import Record
from tutelage.schemes.online.cohort import group_record
from tutelage.schemes.online.exchange import DamagedWeights, Exchange, Published
from tutelage.steps import Steps
from tutelage.taps import Observer
from tutelage.teachers import Lesson, Teacher
from tutelage.views import Batch


@method(
    section="3.2",
    role="teacher",
    paper="Anil, Pereyra, Passos, Ormandi, Dahl, Hinton: Large Scale Distributed Training through Online Distillation",
    year=2018,
    link="https://arxiv.org/abs/1804.03235",
    needs=("labels", "other models"),
    use="More machines than one training can use, or data that stay where they are: peers exchange weights at times.",
)
class Codistillation(Teacher):
    """Frozen copies of the other peers, as they were at the last exchange, teach this one; a folder is all they share.

    Peer i learns from CE(z_i, y) + KL(1/(N−1) · Σ_{j≠i} softmax(z̃_j) ‖ softmax(z_i)), where z̃_j are the logits of peer
    j's stale copy on peer i's own batch. In its first ``burn_in`` steps it learns from the labels alone. After every
    ``every`` steps of its own it leaves its weights in ``folder`` and takes the newest that each other peer left there,
    waiting for nobody. Any losses stand beside or instead of :meth:`losses`, one that needs no teacher among them; at
    other addresses than the logits they are given the mean of the copies' tensors.

    Each peer is a training of its own, with the engine or in your own loop: give each its number, its part of the data
    (:func:`tutelage.data.shard`) and its seed, and all of them the same folder. :func:`tutelage.codistill` trains all
    in one process. A peer that is slow or has ended teaches with the last weights that it left. One that never left any
    is no error for ``patience`` seconds, in which those that did teach, or the labels alone. A damaged file is passed
    over with a message, as the copy that is there is only a little more stale; weights that do not fit are an error.

    The paper's target is the average of the other peers' predictions and its distance the cross-entropy, whose gradient
    is KL's. It has a burn-in and exchanges by files on a shared file system. Its numbers of steps are those of its own
    data sets and could not be checked against its text, so ``every`` is a choice of ours, and ``burn_in`` is yours.

    Args:
        folder: on a file system that all peers see. Empty at first, so that no earlier run teaches in it.
        peer: this one's number, from 0.
        peers: how many there are.
        every: steps of this peer between exchanges.
        burn_in: steps of this peer before the first that is taught by others.
        patience: seconds from this peer's first exchange after which a peer that has left nothing is an error.
        lockstep: wait at each exchange (at most ``patience``) for every other peer's weights of the same step, which
            makes the training repeatable. Then all files stay, so that a resumed peer finds what it read before, and
            ``every`` must be the same for all.
        networks: all peers' networks in their order, where they differ from the student; their weights do not matter,
            and this peer's own is not used. By default each is a copy of the student.

    Raises:
        ValueError: a number out of range, no folder, a folder where this peer has been before, weights that do not
            fit, a peer that never came, or the engine in several processes, where they would be one peer.

    Memory: a network for each other peer, their activations without a graph, and on disk two files of weights for each
    peer.

    Anil, Pereyra, Passos, Ormandi, Dahl, Hinton 2018, "Large scale distributed neural network training through online
    distillation", https://arxiv.org/abs/1804.03235

    >>> import tempfile
    >>> from tutelage import Distillation
    >>> folder, batch = tempfile.mkdtemp(), (torch.randn(6, 4), torch.arange(6) % 3)
    >>> roles = [Codistillation(folder, peer, peers=2, every=1) for peer in (0, 1)]
    >>> peers = [Distillation(nn.Linear(4, 3), role, losses=role.losses()).bind(batch) for role in roles]
    >>> for step in range(3):
    ...     for d in peers:
    ...         losses = d(batch)
    ...         losses.total.backward()
    ...         torch.optim.SGD(d.parameters(), lr=0.1).step()
    >>> sorted(losses.values), roles[1].seen  # peer 0 after both its steps, as it stepped before peer 1 did
    (['KD', 'TaskLoss'], [2, None])
    """

    def __init__(
        self,
        folder: str | Path | None = None,
        peer: int = 0,
        peers: int = 2,
        *,
        every: int = 50,
        burn_in: int = 0,
        patience: float = 3600.0,
        lockstep: bool = False,
        networks: Sequence[nn.Module] | None = None,
    ):
        if peers < 2 or not 0 <= peer < peers:
            raise ValueError(f"Codistillation: peer={peer}, peers={peers}: expected 2 peers or more, numbered from 0")
        if every < 1 or burn_in < 0 or not patience >= 0:
            raise ValueError(
                f"Codistillation: every={every}, burn_in={burn_in}, patience={patience}: expected every >= 1 and the "
                "others >= 0"
            )
        if networks is not None and len(networks) != peers:
            raise ValueError(f"Codistillation: networks: expected one for each of {peers} peers, got {len(networks)}")
        self.folder, self.peer, self.peers = folder, peer, peers
        self.every, self.burn_in, self.patience, self.lockstep = every, burn_in, patience, lockstep
        self.copies: dict[int, nn.Module] = {}
        if networks is not None:
            self.copies = {j: copy.deepcopy(network) for j, network in enumerate(networks) if j != peer}
        self.steps = 0
        self.seen: list[int | None] = [None] * peers
        """The step of each other peer's weights that teach now; ``None`` where there are none yet."""
        self.pause: Callable[[], Any] = lambda: time.sleep(0.05)
        """Called again and again while this peer waits in lockstep."""
        self._here = False  # whether what this peer left in the folder is this training's own
        self._waits_since: float | None = None

    def losses(self) -> list[Loss]:
        """The published ones: cross-entropy, and KL to the others' mean prediction at temperature 1."""
        return [TaskLoss(), KD(temperature=1.0, weight=1.0)]

    def names(self, student: nn.Module) -> tuple[nn.Module, nn.Module]:
        if not self.copies:
            self.copies = {j: copy.deepcopy(student) for j in range(self.peers) if j != self.peer}
        for network in self.copies.values():
            network.requires_grad_(False).eval()
        return student, next(iter(self.copies.values()))

    def bind(self, student: nn.Module, student_reads: list[str], teacher_reads: list[str]) -> list[str]:
        if self.folder is None:
            raise ValueError("Codistillation: folder: where all peers leave their weights for each other is missing")
        if PartialState._shared_state and PartialState().num_processes > 1:
            raise ValueError(
                f"Codistillation: the engine runs in {PartialState().num_processes} processes and averages their "
                "gradients, so that all of them would be one peer; start each peer by itself, without torchrun, or "
                "write your own loop"
            )
        self._exchange = Exchange(self.folder, keep=None if self.lockstep else 2)
        self._observers = {j: Observer(network, teacher_reads) for j, network in self.copies.items()}
        self._student, self._changes, self._dry = (student,), Steps(student), True
        return student_reads

    def lessons(self, batch: Batch, student: Record) -> list[Lesson]:
        if self._dry:  # when binding all copies run, whoever will teach, so that losses see what they will be given
            record, self._dry = self._said(batch, list(self.copies), dry=True), False
            return [Lesson(student, record)]
        if not self._here:
            self._arrive()
        if self._stepped() and self.steps % self.every == 0:
            self._publish()
            for peer in self.copies:
                self._take(peer)
        teaching = [peer for peer in self.copies if self.seen[peer] is not None]
        if self.steps < self.burn_in or not teaching:
            return [Lesson(student, None)]
        return [Lesson(student, self._said(batch, teaching))]

    def end(self) -> None:
        """Leave the weights that the student has now as this peer's last, for the others to go on learning from.

        Without it those of its last exchange stay.
        """
        self._stepped()
        if not any(published.last for published in self._exchange.found(self.peer)):
            self._publish(last=True)

    def apply(self, change: Callable[[nn.Module], Any]) -> None:
        for network in self.copies.values():
            change(network)

    def own_state(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "stepped": self._changes.pending(),
            "seen": list(self.seen),
            "copies": [network.state_dict() for network in self.copies.values()],
        }

    def load_own_state(self, state: dict[str, Any]) -> None:
        self.steps, self.seen, self._here = state["steps"], list(state["seen"]), True
        for network, weights in zip(self.copies.values(), state["copies"], strict=True):
            network.load_state_dict(weights)
        self._changes.restore(state["stepped"])
        self._exchange.forget(self.peer, after=self.steps)

    def _stepped(self) -> bool:
        """Count a step if the student's weights have changed since the last batch; returns whether they have."""
        changed = self._changes.taken()
        self.steps += changed
        return changed

    def _said(self, batch: Batch, peers: list[int], dry: bool = False) -> Record:
        """What these peers' copies say together of what the teacher sees."""
        records = []
        for peer in peers:
            observer = self._observers[peer]
            if not observer.addresses:
                return Record()  # no loss reads them, so they need not run
            if any(m.training for m in self.copies[peer].modules()):
                self.copies[peer].eval()
            with torch.set_grad_enabled(batch.differentiable):
                records.append((observer.dry_run if dry else observer)(batch.teacher))
        if len(records) == 1:
            return records[0]
        logits = [record.logits for record in records] if records[0].output is not None else None
        return group_record(records, None if logits is None else average_logits(logits, average="probabilities"))

    def _arrive(self) -> None:
        """Before the first step: nobody else is this peer here, and no earlier training was."""
        self._here = True
        if there := self._exchange.found(self.peer):
            raise ValueError(
                f"Codistillation: peer {self.peer} has left weights in {self.folder} already ({there[-1].path.name}): "
                "another process has the same number, or an earlier run was there; give each peer its own number and "
                "a new run an empty folder"
            )

    def _publish(self, last: bool = False) -> None:
        self._exchange.publish(self.peer, self.steps, self._student[0].state_dict(), last)

    def _take(self, peer: int) -> None:
        """Take the weights that another peer has left, if there are others than the copy's."""
        published = self._due(peer)
        if published is None or published.step == self.seen[peer]:
            return
        try:
            weights = self._exchange.read(published)
        except FileNotFoundError:  # its peer has left newer ones meanwhile
            self._take(peer)
        except DamagedWeights as error:
            if self.lockstep:
                raise
            say(f"Codistillation: {error}; peer {peer} goes on teaching as it was")
        else:
            try:
                self.copies[peer].load_state_dict(weights)
            except RuntimeError as error:
                raise ValueError(
                    f"Codistillation: {published.path} does not fit the copy of peer {peer} (peers of different "
                    f"architectures need networks=): {' '.join(str(error).split())}"
                ) from error
            self.seen[peer] = published.step

    def _due(self, peer: int) -> Published | None:
        """What to take: the newest there is; in lockstep, as soon as it is there, what is of this step."""
        began = time.monotonic()
        if self._waits_since is None:
            self._waits_since = began
        while True:
            if self.lockstep:
                published = self._exchange.of_step(peer, self.steps)
            else:
                published = next(iter(self._exchange.found(peer)[::-1]), None)
            if published is not None or (not self.lockstep and self.seen[peer] is not None):
                return published
            if time.monotonic() - (began if self.lockstep else self._waits_since) >= self.patience:
                what = f"no weights of step {self.steps}" if self.lockstep else "no weights"
                raise ValueError(
                    f"Codistillation: peer {peer} has left {what} in {self.folder} for {self.patience:g} s; start it, "
                    "or give more patience= (in lockstep the same every= for all)"
                )
            if not self.lockstep:
                return None
            self.pause()
