"""Training sets as they stream in, and datasets that the server keeps.

The server answers a spine with the training set's batches while the spine is still being sent. Both directions are
bounded, so a client that sent everything before reading anything would wait for a server that waits for the client:
the spine is written by a thread of its own.

A kept dataset is read by tickets, each of which names a range of its rows, so a reader can be one of many, begin
anywhere, and go on where a broken stream ended.
"""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.flight as flight

from . import errors
from ._generated import flight_pb2
from .endpoints import in_parallel
from .types import SourceReport, _pandas

if TYPE_CHECKING:
    import pandas
    import polars

    from .tensors import TorchBatches

# How often a stream of a kept dataset that the network or a restart broke off is taken up again without any progress.
RESUMES_MAX = 3
RESUME_PAUSE = 0.2
# Endpoints per concurrent reader: enough that none waits for the last, few enough that calls do not count.
ENDPOINTS_PER_READER = 8


class Flights:
    """What datasets ask of the connection."""

    def __init__(self, project: str, client: Callable[[], Any]) -> None:
        self.project = project
        self._client = client

    def get(self, ticket: flight_pb2.DatasetTicket) -> Stream:
        try:
            return Stream(self._client().do_get(flight.Ticket(ticket.SerializeToString())))
        except (flight.FlightError, pa.ArrowException) as error:
            raise errors.from_flight(error) from error

    def info(self, ticket: flight_pb2.DatasetTicket) -> Any:
        try:
            descriptor = flight.FlightDescriptor.for_command(ticket.SerializeToString())
            return self._client().get_flight_info(descriptor)
        except (flight.FlightError, pa.ArrowException) as error:
            raise errors.from_flight(error) from error

    def profile(self, ticket: flight_pb2.DatasetTicket) -> bytes:
        try:
            action = flight.Action("dataset-profile", ticket.SerializeToString())
            return b"".join(result.body.to_pybytes() for result in self._client().do_action(action))
        except (flight.FlightError, pa.ArrowException) as error:
            raise errors.from_flight(error) from error


class Dataset:
    """A training set.

    One that the server computes streams: `batches()` yields it once; `to_arrow()` and friends read it to its end and keep
    it. One that the server keeps can be read again and again, by many readers, in shuffled order, and from any row on.

    The facts about a kept dataset (`id`, `location`, `rows`, `existed`, `known_at`) are known once it has been made.
    """

    def __init__(
        self, flights: Flights, name: str | None, id: str = "", compute: Callable[[str], Stream] | None = None
    ) -> None:
        self._flights = flights
        # What starts the computation; None where there is nothing to compute (any more).
        self._compute = compute
        self._computed = compute is not None
        self._stream: Stream | None = None
        self._schema: pa.Schema | None = None
        self._table: pa.Table | None = None
        self._manifest: dict[str, Any] = {"dataset": name} if name else {}
        if id:
            self._manifest["id"] = id

    @property
    def schema(self) -> pa.Schema:
        """The columns: those of the spine, then the features. Starts the stream."""
        if self._schema is None:
            if self._compute is None and self._stream is None and self._is_kept():
                self._schema = self._flights.info(self._ticket()).schema
            else:
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
    def existed(self) -> bool | None:
        """Whether the server had it before: the same inputs under the same name are one dataset, computed once."""
        return self._manifest.get("existed")

    @property
    def known_at(self) -> list[SourceReport]:
        """How many rows of each source known-at rules hid, and why; empty before the training set has been read."""
        reports = self._manifest.get("known_at")
        if reports is None and self._compute is None and self._stream is None and self._is_kept():
            reports = self.describe()["known_at"]
        known = [field.name for field in dataclasses.fields(SourceReport)]
        return [SourceReport(**{name: report[name] for name in known}) for report in reports or []]

    @property
    def manifest(self) -> dict[str, Any]:
        """What the server said about the dataset."""
        return dict(self._manifest)

    def describe(self) -> dict[str, Any]:
        """The manifest of a kept dataset: what it was made from, its parts, and a profile of every feature."""
        self._make_sure_it_is_kept("describe")
        described: dict[str, Any] = json.loads(self._flights.info(self._ticket()).app_metadata)
        return described

    @property
    def profile(self) -> dict[str, Any]:
        """What drift of a model trained on this is judged by: for every feature its rows, nulls, defaults and stale
        values, and for each distribution (one; of a vector, one for each number) moments and bins with their labels.
        Asks the server each time."""
        self._make_sure_it_is_kept("profile")
        profile: dict[str, Any] = json.loads(self._flights.profile(self._ticket()))
        return profile

    def batches(
        self,
        *,
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
        columns: Sequence[str] | None = None,
        resume: int = 0,
        parallel: int = 1,
        compression: str = "none",
        batch_rows: int = 0,
    ) -> Iterator[pa.RecordBatch]:
        """The record batches, in the order of the spine (or, with `order="any"`, as they are ready).

        A training set that is computed and not kept is yielded once. Of one that the server keeps (which is made first,
        where it is not there) each of `world_size` readers gets its share: disjoint, together complete, and equal to
        within one row.

        - `seed` shuffles: the order depends on the dataset and the seed alone. It is no uniform permutation: blocks of
          rows are shuffled, and within groups of blocks (about 64 MiB) all rows. A share is cut from that order, so give
          each epoch a seed of its own, the same for all ranks.
        - `resume` leaves out so many rows of the share, those that were seen before an interruption. A stream that
          breaks off is taken up again by itself.
        - `parallel` streams at a time are read ahead within bounds; rows come in the same order.
        - `compression` (`none`, `lz4`, `zstd`) is of the bytes on the wire: for networks slower than the codec.
        """
        options = dict(
            rank=rank, world_size=world_size, seed=seed, columns=columns, resume=resume, batch_rows=batch_rows
        )
        plain = options == dict(rank=0, world_size=1, seed=None, columns=None, resume=0, batch_rows=0)
        if self._table is not None and plain:
            return iter(self._table.to_batches())
        if plain and parallel == 1 and (self._compute is not None or self._stream is not None):
            return self._computed_batches(self._started())
        self._make_sure_it_is_kept("batches")
        ticket = self._ticket(
            rank=rank,
            world_size=world_size,
            shuffle_seed=seed,
            columns=columns or (),
            offset=resume,
            compression=compression,
            batch_rows=batch_rows,
        )
        return self._stored_batches(ticket, parallel)

    def torch_batches(
        self,
        model: str,
        batch_size: int,
        *,
        labels: Sequence[str] = (),
        rank: int = 0,
        world_size: int = 1,
        seed: int | None = None,
        resume: int = 0,
        parallel: int = 1,
        drop_last: bool = False,
        refused: str = "error",
        compression: str = "none",
    ) -> TorchBatches:
        """Batches of `batch_size` rows as dicts of torch tensors: the inputs of `model`, and `labels`, by name.

        The server makes the inputs, with the encoder that serves predictions; they become tensors without being copied
        (but for batches that lie across two messages). `refused` says what to do with rows that serving would refuse
        because a feature is null where the model says `missing: refuse`: `error`, or `skip`, which counts them in
        `.refused`. The other options are those of `batches`; `.rows` is what to give as `resume` later.
        """
        from .tensors import TorchBatches

        if refused not in ("error", "skip"):
            raise errors.InvalidArgument(f"refused `{refused}`: error or skip")
        if batch_size < 1:
            raise errors.InvalidArgument(f"batch_size {batch_size}: at least 1")
        shared = rank != 0 or world_size != 1 or seed is not None or resume != 0 or parallel != 1
        if self._table is None and self.name is None and not shared:
            if self._compute is None:
                raise self._gone()
            compute, self._compute = self._compute, None
            batches = self._computed_batches(compute(model))
        else:
            self._make_sure_it_is_kept("torch_batches")
            ticket = self._ticket(
                rank=rank,
                world_size=world_size,
                shuffle_seed=seed,
                columns=labels,
                inputs_only=not labels,
                offset=resume,
                compression=compression,
                encode_for=model,
            )
            batches = self._stored_batches(ticket, parallel)
        return TorchBatches(batches, batch_size, labels, first=resume, drop_last=drop_last, skip=refused == "skip")

    def drain(self) -> Dataset:
        """Reads to the end and keeps nothing here: for a dataset that only the server should keep."""
        if self._compute is not None or self._stream is not None:
            for _ in self._computed_batches(self._started()):
                pass
        return self

    def to_arrow(self, *, parallel: int = 1) -> pa.Table:
        """All of it as an Arrow table."""
        if self._table is None:
            batches = list(self.batches(parallel=parallel))
            self._table = pa.Table.from_batches(batches, schema=batches[0].schema if batches else self.schema)
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

    def _is_kept(self) -> bool:
        return self.name is not None and (not self._computed or self.id is not None)

    def _make_sure_it_is_kept(self, call: str) -> None:
        if self.name is None and self._compute is None and self._stream is None:
            raise self._gone()
        if self.name is None:
            raise errors.InvalidArgument(
                f"{call} with these options reads a dataset that the server keeps, and this training set has no name: "
                "give it one"
            )
        self.drain()
        if not self._is_kept():
            raise self._gone()

    def _ticket(self, **options: Any) -> flight_pb2.DatasetTicket:
        return flight_pb2.DatasetTicket(
            project=self._flights.project, name=self.name or "", id=self.id or "", **options
        )

    def _started(self) -> Stream:
        if self._stream is None:
            if self._compute is None:
                raise self._gone()
            compute, self._compute = self._compute, None
            self._stream = compute("")
        return self._stream

    def _computed_batches(self, stream: Stream) -> Iterator[pa.RecordBatch]:
        try:
            # Also where there are no rows.
            schema = stream.schema()
            if self._stream is stream:
                self._schema = schema
                self._stream = None
            yield from stream
        finally:
            stream.close()
            self._manifest.update(stream.manifest)

    def _stored_batches(self, ticket: flight_pb2.DatasetTicket, parallel: int) -> Iterator[pa.RecordBatch]:
        if parallel <= 1:
            return self._resumed(ticket)
        asked = flight_pb2.DatasetTicket()
        asked.CopyFrom(ticket)
        asked.endpoints = parallel * ENDPOINTS_PER_READER
        endpoints = self._flights.info(asked).endpoints
        tickets = [flight_pb2.DatasetTicket.FromString(endpoint.ticket.ticket) for endpoint in endpoints]
        return in_parallel([lambda ticket=ticket: self._resumed(ticket) for ticket in tickets], parallel)

    def _resumed(self, ticket: flight_pb2.DatasetTicket) -> Iterator[pa.RecordBatch]:
        """Reads what a ticket gives, over as many calls as it takes."""
        ticket = flight_pb2.DatasetTicket.FromString(ticket.SerializeToString())
        failures = 0
        while True:
            try:
                stream = self._flights.get(ticket)
                try:
                    for batch in stream:
                        failures = 0
                        ticket.offset += batch.num_rows
                        if ticket.HasField("limit"):
                            ticket.limit -= batch.num_rows
                        yield batch
                    return
                finally:
                    stream.close()
            except errors.Unavailable:
                failures += 1
                if failures > RESUMES_MAX:
                    raise
                time.sleep(RESUME_PAUSE * failures)

    def _gone(self) -> errors.CoevalError:
        return errors.CoevalError(
            "this training set was streamed and is gone: give it a name to keep it, or read it with to_arrow()"
        )


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
