"""A pyarrow client of ours and of flight_server.py.

    flight_client.py read ADDRESS DATASET              reads a stored dataset, one line of JSON
    flight_client.py create ADDRESS DATASET SPINE      has a dataset made for the rows of a Parquet file
"""

import sys
import time

import pyarrow.compute as pc
import pyarrow.flight
import pyarrow.parquet as pq

from measure import finish

PROJECT = "benches"
SERVICE = "bench"
SPINE_BATCH_ROWS = 65_536


def message(**fields: tuple[int, str]) -> bytes:
    """A protobuf message of short strings: field number and text."""
    encoded = b""
    for number, text in fields.values():
        value = text.encode()
        assert len(value) < 128, "a longer text has a longer length"
        encoded += bytes([number << 3 | 2, len(value)]) + value
    return encoded


def read(client: pyarrow.flight.FlightClient, dataset: str) -> None:
    ticket = message(project=(1, PROJECT), name=(2, dataset))
    started = time.monotonic()
    reader = client.do_get(pyarrow.flight.Ticket(ticket))
    first_batch_seconds = None
    rows = 0
    checksum = 0.0
    for chunk in reader:
        if first_batch_seconds is None:
            first_batch_seconds = time.monotonic() - started
        rows += chunk.data.num_rows
        # One column: enough to tell that the rows are the same ones.
        checksum += pc.sum(chunk.data.column(chunk.data.num_columns - 1)).as_py() or 0.0
    seconds = time.monotonic() - started
    finish(
        rows=rows,
        columns=len(reader.schema),
        checksum=checksum,
        # On the clock that all processes share, for whoever watches the server.
        began=started,
        seconds=seconds,
        first_batch_seconds=first_batch_seconds,
    )


def create(client: pyarrow.flight.FlightClient, dataset: str, spine: str) -> None:
    command = message(project=(1, PROJECT), service=(2, SERVICE), dataset=(3, dataset))
    file = pq.ParquetFile(spine)
    writer, reader = client.do_exchange(pyarrow.flight.FlightDescriptor.for_command(command))
    writer.begin(file.schema_arrow)
    for batch in file.iter_batches(SPINE_BATCH_ROWS):
        writer.write_batch(batch)
    writer.done_writing()
    rows = 0
    stored = None
    for chunk in reader:
        if chunk.data is not None:
            rows += chunk.data.num_rows
        stored = chunk.app_metadata or stored
    finish(rows=rows, stored=stored.to_pybytes().decode() if stored else None)


def main() -> None:
    what, address, dataset = sys.argv[1:4]
    # No compression and no limit on the size of a message: the other side has its own.
    client = pyarrow.flight.connect(f"grpc://{address}", generic_options=[("grpc.max_receive_message_length", -1)])
    if what == "read":
        read(client, dataset)
    else:
        create(client, dataset, sys.argv[4])


if __name__ == "__main__":
    main()
