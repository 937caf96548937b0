"""One partition of a log of messages: read on, write down where one stands, take up what another left.

A partition is read from `start`, which lies before what was `committed`: what comes before that is read again
to bring streams back to where they were (see `stream.live_stream`), and nothing that comes of it is news.
Whoever reads calls `take` for each message in order, `reach` where there are none, and `checkpoint` before
each commit; and asks `is_news` of each event.

What a silence means follows from the log: the clock of a partition is the latest time at which its broker put
a message there. At the end of the log it goes on with the seconds for which somebody listens there
(`listen`), which is never more than the next message will say. No wall clock but the broker's has a part in
it; producers' clocks have none: where a message brings only that (CreateTime), listening alone counts.
What is read again is not judged again: whoever committed has found those streams alive.

Lost, and said so: a stream whose messages are not there any more, or whose mark cannot be used. Its open
actions are aborted, and it begins anew. No I/O here.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.errors import ConfigError
from engine.manifest import Decoding, Manifest
from stream.checkpoint import MAX_RECORD_BYTES, Committed, Life, Mark, key_of, packed, read_records
from stream.config import RuntimeSettings
from stream.events import Event
from stream.live_stream import MISFITS, Standing
from stream.ring import capacity, largest_save
from stream.runtime import Runtime
from stream.tracker import TIME_DIGITS, OpenAction, Tracker
from stream.wire import Message

log = logging.getLogger(__name__)

LOST = "the service lost its state"
NO_PLACE = "max_streams"
_MAKER_MARK = "#"  # in no bundle's id
# Ended streams that are remembered in the topic; see stream.runtime.
_REMEMBERED = 1024
# Of marks in one commit; those of other streams wait for the next, since a transaction has its time-out.
_MARKS_BYTES = 4 * 1024 * 1024
# Of a mark's record, what is neither ring nor tracker: names, the key, and what Kafka and gzip add.
_BESIDE_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class _Base:
    """A stream as it was saved, waiting to become a mark."""

    offset: int
    clock: float
    chunks: int
    saved: Mapping[str, Any]


@dataclass
class _Known:
    """What is known here of an open stream."""

    life: int  # the runtime's number
    offset: int  # where reading has to begin, to come to where it stands
    clock: float
    opened: int  # where it opened
    opened_clock: float
    bases: deque[_Base]
    based: int = 0  # chunks at the newest base
    is_marked: bool = False
    is_written: bool = False  # there is a current life in the topic
    is_awake: bool = True
    unwritten: Mark | None = None  # a mark that the topic does not have yet


class Partition:
    """The streams of one partition."""

    def __init__(
        self,
        runtime: Runtime,
        name: str,
        tell: Callable[[Sequence[Event]], None],
        maker: str,
        warm: int,
        committed: int,
        rewind: Committed | None = None,
        records: Mapping[bytes, bytes] | None = None,
        beginning: int = 0,
        end: int | None = None,
    ) -> None:
        """Take up a partition from offset `committed` on; `tell` takes the events of what is lost.

        `maker`: what decides here (`maker_of`); `warm`: chunks after which the network has forgotten what
        came before (`warm_chunks`); `rewind` and `records`: what stood beside the committed offset, and in
        the compacted topic; `beginning`, `end`: the offsets that are there, as far as is known.
        """
        self._runtime, self._name, self._maker, self._warm = runtime, name, maker, warm
        self._tell = tell
        if end is not None and committed > end:
            log.error(
                "%s: %d messages had been read, there are %d: the topic is another one, and is read from its "
                "beginning; no stream goes on",
                name,
                committed,
                end,
            )
            committed, rewind = beginning, None
        self.committed = committed
        self._known: dict[str, _Known] = {}
        self._skip: dict[str, int] = {}  # stream -> its messages before this offset belong to an earlier life
        self._awaited: dict[str, Life] = {}  # open when `committed` will have been reached
        self._ended: OrderedDict[str, int] = OrderedDict()
        self._plan: list[tuple[int, Callable[[], None]]] = []
        self._spoken: set[str] = set()  # streams of which events came since the last checkpoint
        self._obituaries: list[Event] = []  # what is told once nothing is read again
        lives, marks, complaints = read_records(records or {})
        for complaint in complaints:
            log.error("%s: a record of the state cannot be used: %s", name, complaint)
        self.start, self._clock = committed, 0.0
        if rewind is not None:
            self.start, self._clock = min(committed, rewind.rewind), rewind.clock
        if beginning > committed:
            log.error(
                "%s: messages %d to %d were deleted before they were read; keep them longer (retention.ms)",
                name,
                committed,
                beginning - 1,
            )
        self.position = max(self.start, beginning)
        self.is_replaying = True
        """what is read now was read before"""
        self._take_up(lives, marks, self.position, is_continued=rewind is not None)
        if self.start < beginning:
            log.error(
                "%s: to go on where a worker stopped takes the messages from %d on, the first that is still "
                "there is %d: streams that need those before it begin anew, and their open actions are "
                "aborted; keep messages longer (retention.ms)",
                name,
                self.start,
                beginning,
            )
        self.start = self.position
        self._plan.sort(key=lambda item: item[0])
        self.reach(self.start)

    @property
    def streams(self) -> list[str]:
        """The streams that were read here and are open, or were when this was last looked at."""
        return list(self._known)

    def holds(self, stream: str) -> bool:
        """Whether a stream is open here, or is being brought back."""
        return stream in self._known or stream in self._awaited

    def is_news(self, stream: str) -> bool:
        """Whether an event of this stream, coming now, has not been told yet. To be asked of each event."""
        if not self.is_replaying:
            self._spoken.add(stream)
        return not self.is_replaying

    def leave(self) -> None:
        """Somebody else goes on: the runtime forgets all streams of this partition."""
        mine = [name for name, known in self._known.items() if self._runtime.life(name) == known.life]
        self._runtime.forget(mine)
        self._runtime.forget_ended(self._ended)

    def take(self, offset: int, timestamp: float | None, message: Message | None) -> None:
        """The message at `offset`; None: it could not be read. `timestamp`: seconds, when its broker put it
        there; None: the broker did not say."""
        self.reach(offset)
        if timestamp is not None:
            self._clock = max(self._clock, timestamp)
        if message is not None and self._is_wanted(offset, message.stream):
            self._offer(offset, message)
        self.position = offset + 1

    def _is_wanted(self, offset: int, stream: str) -> bool:
        # What is read again matters to the streams that are brought back, and to no other: one that was
        # refused when it was read first would speak from nowhere, if it found a place now.
        return offset >= self._skip.get(stream, 0) and (not self.is_replaying or stream in self._awaited)

    def _offer(self, offset: int, message: Message) -> None:
        name = message.stream
        if self.is_replaying:
            self._runtime.excuse(name, self._clock)
        self._runtime.offer(message, at=self._clock)
        standing = self._runtime.standing(name)
        if standing is None or not standing.is_open:
            if self.is_replaying:  # refused; and so it stays, should there be a place later
                self._skip[name] = self.committed
            return
        known = self._known.get(name)
        if known is None or known.life != standing.life:
            saved = self._runtime.blank(standing.epoch, standing.floor, self._clock)
            self._known[name] = _Known(
                standing.life,
                offset,
                self._clock,
                offset,
                self._clock,
                deque([_Base(offset, self._clock, 0, saved)]),
                is_marked=known is not None and known.is_marked,
            )

    def reach(self, offset: int) -> None:
        """Everything before `offset` was read: do what was planned up to there."""
        while self._plan and self._plan[0][0] <= offset:
            self._runtime.drain()
            self._plan.pop(0)[1]()
        self.position = max(self.position, offset)
        if self.is_replaying and offset >= self.committed:
            self._runtime.drain()
            self.is_replaying = False
            for name, life in list(self._awaited.items()):
                known = self._known.get(name)
                if known is None or self._runtime.life(name) != known.life:
                    self._lose(name, life, NO_PLACE, is_marked=True)
            self._awaited.clear()
            obituaries, self._obituaries = self._obituaries, []
            self._tell(obituaries)

    def is_silent(self, seconds: float) -> bool:
        """Whether `listen` for so long loses a stream."""
        return self._runtime.is_silent(self._clock + seconds, self.streams)

    def listen(self, seconds: float) -> None:
        """For so long nothing came, where all that is there has been read: lose what fell silent."""
        self._clock += seconds
        self.tick()

    def tick(self) -> None:
        """Lose the streams that fell silent by the partition's clock."""
        self._runtime.tick(self._clock, self.streams)

    def checkpoint(self) -> tuple[list[tuple[bytes, bytes | None]], Committed]:
        """What to write into the compacted topic (None: forget the key), and beside the offset `position`.

        All that was taken must have been digested (`Runtime.drain`), and nothing is being read again.
        """
        records: list[tuple[bytes, bytes | None]] = []
        marked = 0
        # First whose mark is the oldest: from there a successor has to read again.
        for name, known in sorted(self._known.items(), key=lambda item: item[1].offset):
            standing = self._runtime.standing(name)
            if standing is None or not standing.is_open:
                del self._known[name]
                records += self._end(name, standing, known)
                continue
            if not known.is_written and known.is_marked:  # in an earlier life
                known.is_marked = False
                records.append((key_of(Mark, name), None))
            if not known.is_written or name in self._spoken:
                known.is_written = True
                records.append((key_of(Life, name), packed(self._life(standing, known))))
            if known.unwritten is not None:
                records.append((key_of(Mark, name), packed(known.unwritten)))
                known.unwritten = None
            if known.is_awake and marked < _MARKS_BYTES and (mark := self._mark(name, standing, known)):
                records.append((key_of(Mark, name), mark))
                marked += len(mark)
        self._spoken.clear()
        first = min(self._known.values(), key=lambda known: known.offset, default=None)
        rewind = (
            Committed(rewind=self.position, clock=self._clock)
            if first is None
            else Committed(rewind=first.offset, clock=first.clock)
        )
        while len(self._ended) > _REMEMBERED and next(iter(self._ended.values())) <= rewind.rewind:
            records.append((key_of(Life, self._ended.popitem(last=False)[0]), None))
        return records, rewind

    def _life(self, standing: Standing, known: _Known) -> Life:
        return Life(
            is_open=True,
            epoch=standing.epoch,
            reach=standing.reach,
            floor=standing.floor,
            offset=known.opened,
            clock=known.opened_clock,
            maker=self._maker,
            actions=tuple(standing.actions),
            now=standing.now,
            captured=standing.captured,
        )

    def _end(self, name: str, standing: Standing | None, known: _Known) -> list[tuple[bytes, bytes | None]]:
        records: list[tuple[bytes, bytes | None]] = []
        if standing is None:
            records.append((key_of(Life, name), None))
        else:
            life = Life(
                is_open=False,
                epoch=standing.epoch,
                reach=standing.reach,
                offset=self.position,
                clock=self._clock,
                maker=self._maker,
            )
            records.append((key_of(Life, name), packed(life)))
            self._ended[name] = self.position
            self._ended.move_to_end(name)
        if known.is_marked:
            records.append((key_of(Mark, name), None))
        return records

    def _mark(self, name: str, standing: Standing, known: _Known) -> bytes | None:
        """A mark to be written, if it is time for one."""
        if standing.chunks >= known.based + max(1, self._warm // 2) or not known.bases:
            known.based = standing.chunks
            known.bases.append(_Base(self.position, self._clock, standing.chunks, self._runtime.save(name)))
        oldest = known.bases[0]
        if standing.chunks - oldest.chunks < self._warm:
            return None
        known.bases.popleft()
        known.offset, known.clock, known.is_marked = oldest.offset, oldest.clock, True
        tracker = self._runtime.save_tracker(name)
        mark = Mark(
            offset=oldest.offset,
            clock=oldest.clock,
            saved=dict(oldest.saved),
            woken=self.position,
            tracker=tracker,
            maker=self._maker,
        )
        return packed(mark)

    # What another left

    def _take_up(
        self, lives: Mapping[str, Life], marks: Mapping[str, Mark], first: int, is_continued: bool
    ) -> None:
        """Plan how each stream comes to where it stood; messages before `first` are not there."""
        for name, life in lives.items():
            mark = marks.get(name)
            if not is_continued or life.offset > self.committed:  # it tells of another log
                if life.is_open:
                    self._lose(name, life, LOST, is_marked=mark is not None)
            elif not life.is_open:
                self._runtime.remember_ended(name, life.epoch, life.reach)
                self._ended[name] = self._skip[name] = life.offset
            elif mark is not None and first <= mark.offset <= mark.woken <= self.committed:
                self._take_up_marked(name, life, mark)
            elif mark is None and life.offset >= first:  # it is young: all of it is read again
                self._take_up_young(name, life)
            else:
                self._lose(name, life, LOST, is_marked=mark is not None)

    def _take_up_young(self, name: str, life: Life) -> None:
        if life.maker == self._maker:
            self._skip[name], self._awaited[name] = life.offset, life
            if life.floor:
                self._runtime.remember_ended(name, life.epoch, life.floor)
            return
        # Another maker began it, and has announced things: it sleeps from its first message on.
        self._take_up_marked(
            name,
            life,
            Mark(
                offset=life.offset,
                clock=life.clock,
                saved=self._runtime.blank(life.epoch, life.floor, life.clock),
                woken=self.committed,
                tracker=None,
                maker=life.maker,
            ),
        )

    def _take_up_marked(self, name: str, life: Life, mark: Mark) -> None:
        is_ours = mark.maker == self._maker
        self._skip[name] = mark.offset
        self._awaited[name] = life

        def restore() -> None:
            try:
                if not self._runtime.restore(name, mark.saved):
                    self._skip[name] = self.committed  # it is missed at the end
                    return
            except MISFITS as problem:
                log.error("%s: the state of %r cannot be used (%s)", self._name, name, problem)
                self._lose(name, life, LOST, is_marked=True)
                return
            number = self._runtime.life(name)
            assert number is not None
            known = _Known(number, mark.offset, mark.clock, life.offset, life.clock, deque())
            known.is_marked = known.is_written = True
            known.is_awake = False
            if not is_ours:
                # Until there is a mark of this maker, a successor has to do the same.
                known.unwritten = mark
            self._known[name] = known
            self._plan.append((mark.woken if is_ours else self.committed, wake))
            self._plan.sort(key=lambda item: item[0])

        def wake() -> None:
            known = self._known[name]
            if self._runtime.life(name) != known.life:
                return  # it is missed at the end
            known.is_awake = True
            if is_ours:
                try:
                    self._runtime.wake(name, mark.tracker)
                except MISFITS as problem:
                    log.error("%s: the state of %r cannot be used (%s)", self._name, name, problem)
                    self._runtime.wake(name, None, life.actions)
            else:
                log.info("%s: %r goes on under %s, after %s", self._name, name, self._maker, mark.maker)
                self._runtime.wake(name, None, life.actions)
            standing = self._runtime.standing(name)
            assert standing is not None
            # A worker that lives but for a short time has to come nearer to its next mark, too.
            known.based = standing.chunks
            known.bases.append(_Base(self.position, self._clock, standing.chunks, self._runtime.save(name)))

        self._plan.append((mark.offset, restore))

    def _lose(self, name: str, life: Life, reason: str, is_marked: bool) -> None:
        """Abort what is open; what comes of the stream from `committed` on begins it anew."""
        log.error("%s: %r begins anew (%s)", self._name, name, reason)

        def event(kind: Any, action: OpenAction | None) -> Event:
            return Event(
                type=kind,
                stream=name,
                epoch=life.epoch,
                bundle=life.maker.split(_MAKER_MARK)[0],
                time=round(life.now, TIME_DIGITS),
                captured=None if life.captured is None else round(life.captured, TIME_DIGITS),
                instance_id=action and action.id,
                label=action and action.label,
                start=action and round(action.start / self._runtime.rate, TIME_DIGITS),
                reason=reason,
            )

        # Not before all is read again: what is told has to be committed with how far the log was read.
        self._obituaries += [event("action.aborted", action) for action in life.actions]
        self._obituaries.append(event("stream.ended", None))
        self._awaited.pop(name, None)
        self._skip[name] = self.committed
        self._runtime.remember_ended(name, life.epoch, life.reach)
        # Known, but not open: the next checkpoint writes its end.
        self._known[name] = _Known(-1, self.committed, self._clock, 0, 0.0, deque(), is_marked=is_marked)


def maker_of(manifest: Manifest, decoding: Decoding, settings: RuntimeSettings) -> str:
    """What decides on a stream's events: the bundle's id, and a hash of all that else matters."""
    kept = {name: getattr(settings, name) for name in ("idle_timeout", "reorder", "max_gap")}
    text = json.dumps([manifest.model_dump(mode="json"), decoding.model_dump(mode="json"), kept])
    return manifest.id + _MAKER_MARK + hashlib.blake2b(text.encode("utf-8"), digest_size=6).hexdigest()


def warm_chunks(manifest: Manifest, max_gap: float) -> int:
    """Chunks after which a state has forgotten what came before, wherever it began.

    Beside the receptive field: up to a period until it can begin, and a gap of up to `max_gap` seconds in
    which it sees nothing.
    """
    frames = manifest.receptive_field + manifest.period + math.ceil(max_gap * manifest.frame.rate)
    return -(-frames // manifest.chunk)


def check_marks(manifest: Manifest, decoding: Decoding, settings: RuntimeSettings) -> None:
    """Raises ConfigError where a stream's mark may not fit into a record, which would be found out late."""
    frame = manifest.frame
    chunk = manifest.chunk * frame.hop
    held = capacity(chunk, frame.sample_rate, settings.reorder, settings.max_gap)
    ring = largest_save(held, frame.channels)
    tracker = Tracker.largest_save(manifest, decoding)
    size = ring + tracker + _BESIDE_BYTES
    if size > MAX_RECORD_BYTES:
        waits = {"`reorder`": 2 * settings.reorder, "`max_gap`": settings.max_gap}
        longest = max(waits, key=lambda name: waits[name])
        if tracker > ring:
            remedy = "lower `decoding.max_duration`"
        elif waits[longest] * frame.sample_rate > chunk:
            remedy = f"lower {longest}"
        else:
            remedy = f"export the bundle with a smaller chunk than {manifest.chunk} frames"
        raise ConfigError(
            f"the state of one stream may take {size} bytes, expected at most {MAX_RECORD_BYTES}: "
            f"{tracker} for `decoding.max_duration` ({decoding.max_duration:g} s, "
            f"{len(manifest.classes)} classes), {ring} for {held} samples of {frame.channels} channels "
            f"(two chunks, `reorder` twice, `max_gap`); {remedy}"
        )
