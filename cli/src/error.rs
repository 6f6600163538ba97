//! Everything that a command can fail with, and the exit status it ends with.

use std::path::PathBuf;
use std::process::ExitCode;

use gateway::config::ServeError;
use registry::RegistryError;
use registry::id::NameError;
use registry::model::ArtifactError;
use registry::store::StoreError;
use thiserror::Error;

use crate::columns::ColumnError;
use crate::project::ProjectError;
use crate::rows::RowError;
use crate::server::ServerError;
use crate::tables::TableError;
use crate::times::TimeError;

#[derive(Debug, Error)]
pub enum CliError {
    #[error("{0}")]
    Usage(String),
    #[error(transparent)]
    Row(#[from] RowError),
    #[error(transparent)]
    Time(#[from] TimeError),
    /// The diagnostics themselves have been shown.
    #[error("{} in {}", counted(*.errors, "error"), .folder.display())]
    Invalid { errors: usize, folder: PathBuf },
    /// A check whose findings have been shown.
    #[error("{0}")]
    Failed(String),
    #[error("there is no {what} `{name}`; {known}")]
    Unknown { what: &'static str, name: String, known: String },
    #[error(transparent)]
    Project(#[from] ProjectError),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
    #[error(transparent)]
    Server(#[from] ServerError),
    #[error(transparent)]
    Table(#[from] TableError),
    #[error(transparent)]
    ManagedTable(Box<offline_store::table::TableError>),
    #[error(transparent)]
    Runs(Box<ingest::runs::RunsError>),
    #[error(transparent)]
    Explain(Box<offline_store::explain::ExplainError>),
    #[error(transparent)]
    Audit(Box<offline_store::audit::AuditError>),
    #[error(transparent)]
    Dataset(Box<offline_store::dataset::DatasetError>),
    #[error(transparent)]
    Labels(#[from] Box<offline_store::labels::LabelError>),
    #[error(transparent)]
    ServingLog(#[from] gateway::serving_log::LogSetupError),
    #[error(transparent)]
    Column(#[from] ColumnError),
    #[error(transparent)]
    Serve(#[from] ServeError),
    #[error("{what}")]
    Io {
        what: String,
        #[source]
        source: std::io::Error,
    },
}

impl CliError {
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Usage(_) | Self::Row(_) | Self::Time(_) => ExitCode::from(2),
            _ => ExitCode::from(1),
        }
    }

    /// Says what there is, nearest first.
    pub fn unknown<'a>(what: &'static str, name: &str, known: impl IntoIterator<Item = &'a str>) -> Self {
        let known: Vec<&str> = known.into_iter().collect();
        let known = match feature_defs::diagnose::nearest(name, known.iter().copied()) {
            Some(near) => format!("did you mean `{near}`?"),
            None if known.is_empty() => "there are none yet".to_owned(),
            None => format!("there are: {}", known.join(", ")),
        };
        Self::Unknown { what, name: name.to_owned(), known }
    }
}

/// `1 error`, `2 errors`.
pub fn counted(count: usize, noun: &str) -> String {
    match count {
        1 => format!("1 {noun}"),
        _ => format!("{count} {noun}s"),
    }
}

/// An error and what caused it, on one line.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        // Some libraries repeat the cause in their own text.
        if !text.contains(&cause) {
            text.push_str(": ");
            text.push_str(&cause);
        }
        source = error.source();
    }
    text
}
