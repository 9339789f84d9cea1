"""The errors that DSpark Serve raises, and what each means to a caller.

    DSparkError
    ├── InvalidRequestError      the request itself is wrong          400  INVALID_ARGUMENT
    ├── ModelNotFoundError       no such model is served              404  NOT_FOUND
    ├── UnauthenticatedError     no API key, or none that is known    401  UNAUTHENTICATED
    ├── OverloadedError          a bounded queue is full; retry later 429  RESOURCE_EXHAUSTED
    │   └── QueueTimeoutError    waited in one for as long as it may
    ├── UnavailableError         a part that is needed is not up      503  UNAVAILABLE
    │   └── NotLeaderError       this scheduler stands by; another one leads
    ├── CalibrationError         a calibration table is damaged, or another drafter's
    ├── CheckpointError          a checkpoint cannot be used
    ├── ConfigError              a setting is wrong
    ├── DownloadError            a model could not be fetched intact
    ├── FencedError              a write of one who was replaced meanwhile
    ├── ProtocolError            a peer sent a message outside the contract
    └── StepTableError           a step-time table is damaged, or of something else

Every message says what was wrong, what was got, and what to do.
"""

from __future__ import annotations


class DSparkError(Exception):
    """Base of every error raised on purpose; `code` is the stable machine-readable name."""

    code = "internal_error"


class InvalidRequestError(DSparkError):
    """The request is wrong; `param` names the field."""

    code = "invalid_request"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFoundError(DSparkError):
    """No such model is served here."""

    code = "model_not_found"


class UnauthenticatedError(DSparkError):
    """No API key was sent, or none that is known."""

    code = "invalid_api_key"


class OverloadedError(DSparkError):
    """A bounded queue is full; the caller may retry after `retry_after_s`."""

    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueTimeoutError(OverloadedError):
    """The request waited for as long as it may, and was not begun."""

    code = "queue_timeout"


class UnavailableError(DSparkError):
    """A part that the request needs is not up."""

    code = "unavailable"


class NotLeaderError(UnavailableError):
    """This scheduler stands by; `leader` is host:port of the one that leads, empty if unknown."""

    def __init__(self, leader: str = "") -> None:
        who = f"ask {leader}" if leader else "none leads at the moment; retry"
        super().__init__(f"this scheduler stands by: {who}")
        self.leader = leader


class CalibrationError(DSparkError):
    """A calibration table is damaged, or of another drafter."""

    code = "bad_calibration"


class CheckpointError(DSparkError):
    """A checkpoint is missing, damaged, or does not fit its target."""

    code = "bad_checkpoint"


class ConfigError(DSparkError):
    """A setting is unknown or out of range."""

    code = "bad_config"


class DownloadError(DSparkError):
    """A model could not be fetched, or arrived damaged."""

    code = "download_failed"


class FencedError(DSparkError):
    """A write was refused since its writer's lease has passed on."""

    code = "fenced"


class ProtocolError(DSparkError):
    """A peer sent a message that the contract does not allow."""

    code = "protocol_error"


class StepTableError(DSparkError):
    """A step-time table is damaged, or was measured on something else."""

    code = "bad_step_table"
