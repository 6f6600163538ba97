//! Why a call was not answered, and the one place where that becomes a status code.
//!
//! Everything below the edge says what went wrong in words of its own; here it is sorted by what the caller does about
//! it. What is the server's own affair (paths of its disks, what a store answered) goes to the log, under a number that
//! the caller is told.

use std::error::Error;

use inference::executor::StartError;
use inference::placement::PlacementError;
use registry::RegistryError;
use registry::flags::FlagError;
use registry::log::LogError;
use registry::model::ArtifactError;
use tonic::{Code, Status};
use uuid::Uuid;

use crate::events::EventsError;
use crate::model_files::FilesError;

/// What the caller does about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Send something else.
    Invalid,
    /// Name something that exists.
    Unknown,
    /// Change a setting or a state first, then send the same.
    Precondition,
    /// Send less, or later.
    TooMuch,
    /// Send the same again later.
    Unavailable,
    /// The caller's own deadline passed.
    Expired,
    /// This build or version cannot do it.
    Unsupported,
    /// The server's fault; the log has the details.
    Internal,
}

/// A call that was not answered.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub kind: Kind,
    /// For the caller: what, where, and the next step.
    pub message: String,
}

impl Kind {
    pub fn code(self) -> Code {
        match self {
            Kind::Invalid => Code::InvalidArgument,
            Kind::Unknown => Code::NotFound,
            Kind::Precondition => Code::FailedPrecondition,
            Kind::TooMuch => Code::ResourceExhausted,
            Kind::Unavailable => Code::Unavailable,
            Kind::Expired => Code::DeadlineExceeded,
            Kind::Unsupported => Code::Unimplemented,
            Kind::Internal => Code::Internal,
        }
    }

    /// The same for HTTP.
    pub fn http_status(self) -> u16 {
        match self {
            Kind::Invalid => 400,
            Kind::Unknown => 404,
            Kind::Precondition => 409,
            Kind::TooMuch => 429,
            Kind::Unavailable => 503,
            Kind::Expired => 504,
            Kind::Unsupported => 501,
            Kind::Internal => 500,
        }
    }
}

impl Failure {
    pub fn new(kind: Kind, message: impl Into<String>) -> Failure {
        Failure { kind, message: message.into() }
    }

    pub fn invalid(message: impl Into<String>) -> Failure {
        Failure::new(Kind::Invalid, message)
    }

    /// Logs what happened and tells the caller only where to look.
    pub fn internal(what: &str, error: &(dyn Error + 'static)) -> Failure {
        Failure::logged(Kind::Internal, what, error)
    }

    /// As [`Failure::internal`], when the same call may well succeed later.
    pub fn unavailable(what: &str, error: &(dyn Error + 'static)) -> Failure {
        Failure::logged(Kind::Unavailable, what, error)
    }

    fn logged(kind: Kind, what: &str, error: &(dyn Error + 'static)) -> Failure {
        let number = Uuid::new_v4().simple().to_string();
        let number = &number[..8];
        tracing::error!(number, error = chain(error), "{what}");
        Failure::new(kind, format!("{what}; the server's log says why under {number}"))
    }

    /// A name that does not exist, with the one that was probably meant.
    pub fn unknown<'a>(what: &str, name: &str, known: impl IntoIterator<Item = &'a str>) -> Failure {
        Failure::new(Kind::Unknown, not_known(what, name, known))
    }
}

/// "there is no service `x`; did you mean `y`?"
pub fn not_known<'a>(what: &str, name: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    /// Longer lists help nobody.
    const LISTED_MAX: usize = 20;
    let known: Vec<&str> = known.into_iter().collect();
    let shown = feature_defs::diagnose::shown(name);
    let hint = match feature_defs::diagnose::nearest(name, known.iter().copied()) {
        Some(near) => format!("did you mean `{near}`?"),
        None if known.is_empty() => "there are none; apply definitions that have one".to_owned(),
        None if known.len() <= LISTED_MAX => format!("there are: {}", known.join(", ")),
        None => format!("there are {}, the first: {}", known.len(), known[..LISTED_MAX].join(", ")),
    };
    format!("there is no {what} `{shown}`; {hint}")
}

/// An error with its sources.
pub fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}

impl From<Failure> for Status {
    fn from(failure: Failure) -> Status {
        Status::new(failure.kind.code(), failure.message)
    }
}

impl From<RegistryError> for Failure {
    fn from(error: RegistryError) -> Failure {
        match &error {
            RegistryError::Refused(refusal) => {
                use registry::state::Refusal as R;
                let kind = match refusal {
                    R::UnknownProject { .. }
                    | R::UnknownModel { .. }
                    | R::UnknownVersion { .. }
                    | R::UnknownDataset { .. } => Kind::Unknown,
                    R::MetricNotFinite { .. } | R::Incomplete { .. } | R::KeyCount { .. } => Kind::Invalid,
                    R::OtherSalt => Kind::Unavailable,
                    R::Flag(FlagError::Unknown { .. }) => Kind::Unknown,
                    R::Flag(FlagError::Unfit { .. } | FlagError::Holdout { .. }) => Kind::Invalid,
                    R::Flag(_) => Kind::Precondition,
                    R::ChangesStopped(_)
                    | R::UnknownService { .. }
                    | R::OtherService { .. }
                    | R::UnknownDigest { .. }
                    | R::OtherDigest { .. }
                    | R::NotForgotten { .. }
                    | R::Deployment(_)
                    | R::DatasetTaken { .. } => Kind::Precondition,
                };
                Failure::new(kind, refusal.to_string())
            }
            RegistryError::Unsigned { .. } => Failure::invalid(error.to_string()),
            RegistryError::Contended { .. } => Failure::new(Kind::Unavailable, error.to_string()),
            RegistryError::Log(LogError::TooLarge { .. }) => Failure::new(Kind::TooMuch, error.to_string()),
            RegistryError::Log(log) if log.is_retryable() => {
                Failure::unavailable("the control log cannot be reached", &error)
            }
            RegistryError::Log(_) | RegistryError::NotDefinitions { .. } => {
                Failure::internal("the control log is damaged", &error)
            }
            RegistryError::Unread { entry, .. } => Failure::unavailable(
                &format!("the change is recorded as entry {entry}, but could not be read back yet"),
                &error,
            ),
        }
    }
}

impl From<ArtifactError> for Failure {
    fn from(error: ArtifactError) -> Failure {
        match &error {
            ArtifactError::Store { .. } => Failure::unavailable("the model file could not be moved", &error),
            ArtifactError::Missing { .. } | ArtifactError::Corrupt { .. } => {
                Failure::new(Kind::Precondition, error.to_string())
            }
        }
    }
}

impl From<FilesError> for Failure {
    fn from(error: FilesError) -> Failure {
        match error {
            FilesError::Artifact(error) => error.into(),
            FilesError::Disk { .. } => Failure::new(Kind::Unavailable, chain(&error)),
        }
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Failure {
        match &error {
            StartError::Load { .. }
            | StartError::WarmUp { .. }
            | StartError::Panicked { .. }
            | StartError::Memory(_) => {
                // Warm-up explains its cause in its own text.
                let text = if let StartError::WarmUp { .. } = error { error.to_string() } else { chain(&error) };
                Failure::new(Kind::Precondition, text)
            }
            StartError::Thread { .. } => Failure::unavailable("a model could not be started", &error),
        }
    }
}

impl From<PlacementError> for Failure {
    fn from(error: PlacementError) -> Failure {
        Failure::new(Kind::Precondition, error.to_string())
    }
}

impl From<EventsError> for Failure {
    fn from(error: EventsError) -> Failure {
        match error {
            EventsError::Invalid(message) => Failure::new(Kind::Invalid, message),
            EventsError::Unknown(message) => Failure::new(Kind::Unknown, message),
            EventsError::Full(message) => Failure::new(Kind::TooMuch, message),
            EventsError::Stopping => {
                Failure::new(Kind::Unavailable, "the server is shutting down; push to another one")
            }
            EventsError::Unavailable(source) => Failure::unavailable("a store could not be reached", &*source),
            EventsError::Failed(source) => Failure::internal("the events could not be handled", &*source),
        }
    }
}

#[cfg(test)]
mod tests;
