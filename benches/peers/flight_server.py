"""A pyarrow Flight server that streams Parquet files as they lie: what a user would write in an afternoon.

    flight_server.py FILE...

Prints its address, and serves every ticket the same until it is ended.
"""

import sys

import pyarrow as pa
import pyarrow.dataset
import pyarrow.flight


class Server(pa.flight.FlightServerBase):
    def __init__(self, files: list[str]) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self.files = files

    def do_get(self, context, ticket):
        # A reader of the C++ library: batches pass from the files to the wire without Python in between.
        scanner = pa.dataset.dataset(self.files).scanner(use_threads=True)
        return pa.flight.RecordBatchStream(scanner.to_reader())


def main() -> None:
    pa.set_cpu_count(2)
    server = Server(sys.argv[1:])
    print(f"127.0.0.1:{server.port}", flush=True)
    server.serve()


if __name__ == "__main__":
    main()
