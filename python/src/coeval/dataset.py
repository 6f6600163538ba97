"""Training sets as they stream in.

The server answers a spine with the training set's batches while the spine is still being sent. Both directions are
bounded, so a client that sent everything before reading anything would wait for a server that waits for the client:
the spine is written by a thread of its own.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.flight as flight

from . import errors
from .types import _pandas

if TYPE_CHECKING:
    import pandas
    import polars


class Dataset:
    """A training set. It streams: `batches()` yields it once; `to_arrow()` and friends read it to its end and keep it.

    The facts about a kept dataset (`id`, `location`, `rows`) are known once it has been read to its end.
    """

    def __init__(self, open_stream: Callable[[], Stream], reopen: Callable[[str, str], Stream], name: str | None) -> None:
        self._open_stream: Callable[[], Stream] | None = open_stream
        self._reopen = reopen
        self._stream: Stream | None = None
        self._schema: pa.Schema | None = None
        self._table: pa.Table | None = None
        self._finished = False
        self._manifest: dict[str, Any] = {"dataset": name} if name else {}

    @property
    def schema(self) -> pa.Schema:
        """The columns: those of the spine, then the features. Starts the stream."""
        if self._schema is None:
            self._schema = self._started().schema()
        return self._schema

    @property
    def name(self) -> str | None:
        return self._manifest.get("dataset")

    @property
    def id(self) -> str | None:
        """Identifies the snapshot; None while it is not written, or when it is not kept."""
        return self._manifest.get("id")

    @property
    def location(self) -> str | None:
        return self._manifest.get("location")

    @property
    def rows(self) -> int | None:
        return self._manifest.get("rows")

    @property
    def manifest(self) -> dict[str, Any]:
        """What the server said about the dataset."""
        return dict(self._manifest)

    def batches(self) -> Iterator[pa.RecordBatch]:
        """The record batches in the spine's order. A dataset the server keeps can be read again; any other only once."""
        if self._table is not None:
            yield from self._table.to_batches()
            return
        stream = self._started()
        self._stream = None
        self._open_stream = None
        self._schema = stream.schema()
        try:
            for batch in stream:
                yield batch
            self._finished = True
        finally:
            stream.close()
            self._manifest.update(stream.manifest)
            if self.id:
                name, identity = self.name or "", self.id
                self._open_stream = lambda: self._reopen(name, identity)

    def drain(self) -> Dataset:
        """Reads to the end and keeps nothing here: for a dataset that only the server should keep."""
        for _ in self.batches():
            pass
        return self

    def to_arrow(self) -> pa.Table:
        """All of it as an Arrow table."""
        if self._table is None:
            batches = list(self.batches())
            self._table = pa.Table.from_batches(batches, schema=self._schema)
        return self._table

    def to_pandas(self) -> pandas.DataFrame:
        """All of it as a DataFrame."""
        return _pandas(self.to_arrow(), "Dataset.to_pandas")

    def to_polars(self) -> polars.DataFrame:
        """All of it as a polars DataFrame."""
        try:
            import polars
        except ImportError:
            errors.missing("polars", "Dataset.to_polars")
        frame = polars.from_arrow(self.to_arrow())
        assert isinstance(frame, polars.DataFrame)
        return frame

    def close(self) -> None:
        """Gives up a stream that was started and not read to its end."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> Dataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<coeval.Dataset {self.name or 'not kept'}{f' {self.id}' if self.id else ''}>"

    def _started(self) -> Stream:
        if self._stream is None:
            if self._open_stream is None:
                raise errors.CoevalError(
                    "this training set was streamed and is gone: give it a name to keep it, or read it with to_arrow()"
                )
            self._stream = self._open_stream()
        return self._stream


class Stream:
    """One Flight call, seen from the reading side."""

    def __init__(self, reader: Any, writer: SpineWriter | None = None) -> None:
        self._reader = reader
        self._writer = writer
        self._ended = False
        self.manifest: dict[str, Any] = {}

    def schema(self) -> pa.Schema:
        try:
            return self._reader.schema
        except (flight.FlightError, pa.ArrowException, StopIteration) as error:
            raise self._failure(error) from error

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        while True:
            try:
                chunk = self._reader.read_chunk()
            except StopIteration:
                break
            except (flight.FlightError, pa.ArrowException) as error:
                raise self._failure(error) from error
            if chunk.app_metadata is not None:
                self._note(chunk.app_metadata.to_pybytes())
            if chunk.data is not None and chunk.data.num_rows:
                yield chunk.data
        self._ended = True
        if self._writer is not None:
            self._writer.join()

    def close(self) -> None:
        if not self._ended:
            self._reader.cancel()
            self._ended = True
        if self._writer is not None:
            self._writer.stop()

    def _note(self, metadata: bytes) -> None:
        try:
            noted = json.loads(metadata)
        except ValueError:
            return
        if isinstance(noted, dict):
            self.manifest.update(noted)

    def _failure(self, error: Exception) -> errors.CoevalError:
        # When the spine itself could not be read, the server only saw a call that broke off: that is not the news.
        if self._writer is not None and self._writer.spine_error is not None:
            return self._writer.spine_error
        return errors.from_flight(error)


class SpineWriter(threading.Thread):
    """Sends the spine beside the reader of the answer."""

    def __init__(self, writer: Any, schema: pa.Schema, batches: Iterator[pa.RecordBatch], cancel: Callable[[], None]) -> None:
        super().__init__(name="coeval-spine", daemon=True)
        self._writer = writer
        self._spine_schema = schema
        self._batches = batches
        self._cancel = cancel
        self._stopped = threading.Event()
        #: Why the caller's spine could not be read to its end.
        self.spine_error: errors.CoevalError | None = None

    def run(self) -> None:
        try:
            self._writer.begin(self._spine_schema)
            while not self._stopped.is_set():
                batch = self._next()
                if batch is None:
                    break
                self._writer.write_batch(batch)
            if self.spine_error is None:
                self._writer.done_writing()
        except (flight.FlightError, pa.ArrowException, OSError):
            # The server ended the call; it told the reader why.
            pass
        if self.spine_error is not None:
            self._cancel()

    def stop(self) -> None:
        """Ends the thread after the batch under way."""
        self._stopped.set()
        self.join(timeout=10)

    def _next(self) -> pa.RecordBatch | None:
        try:
            return next(self._batches, None)
        except errors.CoevalError as error:
            self.spine_error = error
        except Exception as error:  # noqa: BLE001 - whatever the caller's own iterator raises
            self.spine_error = errors.InvalidArgument(f"the spine could not be read: {error}")
        return None
