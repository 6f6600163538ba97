"""A pyarrow Flight server that streams Parquet files as they lie: what a user would write in an afternoon, in two ways.

    flight_server.py batches|scanner FILE...

Prints its address, and serves every ticket the same until it is ended.
"""

import sys

import pyarrow as pa
import pyarrow.dataset
import pyarrow.flight
import pyarrow.parquet as pq

# Larger batches, and more of them read ahead, take longer to the first batch and to the last.
BATCH_ROWS = 65_536
SCANNER_BATCH_ROWS = 16_384


class Server(pa.flight.FlightServerBase):
    def __init__(self, how: str, files: list[str]) -> None:
        super().__init__("grpc://127.0.0.1:0")
        self.how = how
        self.files = files

    def do_get(self, context, ticket):
        if self.how == "scanner":
            # A reader of the C++ library: batches pass from the files to the wire without Python in between.
            scanner = pa.dataset.dataset(self.files).scanner(
                batch_size=SCANNER_BATCH_ROWS, batch_readahead=2, fragment_readahead=1
            )
            return pa.flight.RecordBatchStream(scanner.to_reader())
        files = [pq.ParquetFile(file) for file in self.files]
        batches = (batch for file in files for batch in file.iter_batches(BATCH_ROWS))
        return pa.flight.GeneratorStream(files[0].schema_arrow, batches)


def main() -> None:
    pa.set_cpu_count(2)
    server = Server(sys.argv[1], sys.argv[2:])
    print(f"127.0.0.1:{server.port}", flush=True)
    server.serve()


if __name__ == "__main__":
    main()
