"""What every measured process says of itself at its end."""

import json
import resource


def finish(**said: object) -> None:
    """Prints one line of JSON; Linux counts `ru_maxrss` in KiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**said, "peak_bytes": peak}), flush=True)
