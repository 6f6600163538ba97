"""Coeval: a feature store with an inference gateway, in which training and serving see the same values.

`connect` is the way in; what it returns is a `Client`.
"""

from .client import Client, Pusher, connect
from .dataset import Dataset
from .errors import (
    AlreadyExists,
    CoevalError,
    Conflict,
    DeadlineExceeded,
    InvalidArgument,
    MissingDependency,
    NotFound,
    Refused,
    ResourceExhausted,
    Unavailable,
)
from .flags import FlagValue
from .golden import Golden
from .types import (
    Approval,
    Catalog,
    DatasetInfo,
    Deployed,
    Drift,
    FeatureDrift,
    Features,
    GatewayVersion,
    Model,
    Outcome,
    Position,
    Predictions,
    PushResult,
    Rejected,
    RowStatus,
    SourceReport,
    Status,
    Timings,
    Traffic,
    UnavailableReason,
)

__version__ = "0.1.0"

__all__ = [
    "AlreadyExists",
    "Approval",
    "Catalog",
    "Client",
    "CoevalError",
    "Conflict",
    "Dataset",
    "DatasetInfo",
    "DeadlineExceeded",
    "Deployed",
    "Drift",
    "FeatureDrift",
    "Features",
    "FlagValue",
    "GatewayVersion",
    "Golden",
    "InvalidArgument",
    "MissingDependency",
    "Model",
    "NotFound",
    "Outcome",
    "Position",
    "Predictions",
    "PushResult",
    "Pusher",
    "Refused",
    "Rejected",
    "ResourceExhausted",
    "RowStatus",
    "SourceReport",
    "Status",
    "Timings",
    "Unavailable",
    "UnavailableReason",
    "connect",
]
