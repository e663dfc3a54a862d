"""Scalars of a run as TensorBoard reads them, written in the calling thread.

SummaryWriter of torch writes in a thread of its own, where a full disk ends in a traceback on stderr.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from recur.train.config import InputError


class Events:
    """An event file in `folder`; a run that was resumed says so, that TensorBoard may drop what came after `step`."""

    def __init__(self, folder: Path, step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        self.folder = folder
        try:
            folder.mkdir(exist_ok=True)
            self._file = (folder / f"events.out.tfevents.{time.time_ns()}.{platform.node()}").open("ab", 0)
        except OSError as error:
            raise self._mistake(error) from error
        self._write([Event(wall_time=time.time(), file_version="brain.Event:2")])
        if step:
            log = SessionLog(status=SessionLog.START)
            self._write([Event(wall_time=time.time(), step=step + 1, session_log=log)])

    def add(self, points: Iterable[Mapping[str, Any]]) -> None:
        """Write each point's numbers under its "step".   Raises: InputError if the file cannot be written."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        now, events = time.time(), []
        for point in points:
            values = [Summary.Value(tag=name, simple_value=value) for name, value in point.items() if name != "step"]
            events.append(Event(wall_time=now, step=point["step"], summary=Summary(value=values)))
        self._write(events)

    def close(self) -> None:
        self._file.close()

    def _write(self, events: Iterable[Any]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        records = RecordWriter(self._file)
        try:
            for event in events:
                records.write(event.SerializeToString())
        except OSError as error:
            raise self._mistake(error) from error

    def _mistake(self, error: OSError) -> InputError:
        return InputError(f"cannot write to {self.folder}: {(error.strerror or str(error)).lower()}")
