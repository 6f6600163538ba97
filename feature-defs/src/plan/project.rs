//! From definition texts to a plan in one call, as every program that reads definitions needs it.

use super::{Plan, SourceSchemas, compile};
use crate::catalog::{Catalog, Files};
use crate::check::check;
use crate::diagnose::{Diagnostic, Severity};
use crate::parse::parse_definitions;

/// Parses and checks the definitions of a project; warnings are returned beside the catalog.
pub fn read_definitions(project: &str, files: &Files) -> Result<(Catalog, Vec<Diagnostic>), Vec<Diagnostic>> {
    let (catalog, mut diagnostics) = parse_definitions(project, files);
    diagnostics.extend(check(&catalog));
    if diagnostics.iter().any(|diagnostic| diagnostic.severity == Severity::Error) {
        return Err(diagnostics);
    }
    Ok((catalog, diagnostics))
}

/// Parses, checks and compiles. The schemas of file sources are those their files had when they were applied.
pub fn compile_definitions(project: &str, files: &Files, schemas: &SourceSchemas) -> Result<Plan, Vec<Diagnostic>> {
    let (catalog, _) = read_definitions(project, files)?;
    compile(&catalog, files, schemas)
}
