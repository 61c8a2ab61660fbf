"""Where the images of a job wait for the others of their group: encoded beside the device's work,
written group by group in the order of the job.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace

from synthrep_generator.chunks import Place
from synthrep_generator.failure_writer import Failure
from synthrep_generator.shard_writer import Member, ShardWriter
from synthrep_generator.synthesis import Pixels
from synthrep_shared.samples import image_seed


@dataclass(frozen=True)
class Group:
    """One prompt to make images of."""

    place: Place
    gid: str
    prompt: str
    num_images: int
    request_seed: int | None


@dataclass(frozen=True)
class Shot:
    """One image to make, with one of its seeds."""

    group: Group
    image_index: int
    attempt: int = 0

    @property
    def seed(self) -> int:
        """What this attempt starts from."""
        group = self.group
        return image_seed(
            group.gid,
            self.image_index,
            request_seed=group.request_seed,
            index=group.place.index,
            attempt=self.attempt,
        )

    def again(self) -> Shot:
        """The next attempt."""
        return replace(self, attempt=self.attempt + 1)


class Shelf:
    """Collects the groups of a job and writes those that are whole.

    `encode` makes the members of an image, made in a device pass of so many, in a thread of `pool`.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        writer: ShardWriter,
        pool: Executor,
        encode: Callable[[Shot, Pixels, int], list[Member]],
    ) -> None:
        self._writer, self._pool, self._encode = writer, pool, encode
        self._waiting = OrderedDict((g, dict[int, Future[list[Member]]]()) for g in groups)
        self._failures: dict[Group, Failure] = {}

    @property
    def failures(self) -> list[Failure]:
        """The prompts that were given up."""
        return list(self._failures.values())

    def is_given_up(self, group: Group) -> bool:
        """Whether more images of the group would be in vain."""
        return group in self._failures

    def put(self, shot: Shot, pixels: Pixels, batch_images: int) -> None:
        """Take an image that came out of a device pass of so many."""
        if shot.group in self._waiting:
            future = self._pool.submit(self._encode, shot, pixels, batch_images)
            self._waiting[shot.group][shot.image_index] = future

    def give_up(self, shot: Shot, reason: str) -> None:
        """Make this attempt the failure of its prompt, unless it has failed before."""
        group = shot.group
        if self._waiting.pop(group, None) is not None:
            self._failures[group] = Failure(
                gid=group.gid,
                batch=group.place.batch,
                index=group.place.index,
                prompt=group.prompt,
                reason=reason,
                attempts=shot.attempt + 1,
            )

    def write(self) -> None:
        """Write the first groups that are encoded, up to one that is not."""
        while self._waiting:
            group, futures = next(iter(self._waiting.items()))
            if len(futures) < group.num_images or not all(f.done() for f in futures.values()):
                return
            self._write(group)

    def finish(self) -> None:
        """Write every group whose images all came; what is not complete is left out."""
        for group in [g for g, f in self._waiting.items() if len(f) == g.num_images]:
            self._write(group)

    def _write(self, group: Group) -> None:
        futures = self._waiting.pop(group)
        members = [member for k in range(group.num_images) for member in futures[k].result()]
        self._writer.add_group(group.gid, members)
