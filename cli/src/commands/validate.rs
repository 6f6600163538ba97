//! `coeval validate`: everything that is wrong, in one go.

use feature_defs::diagnose::{Severity, locate};

use crate::error::{CliError, counted};
use crate::output::Output;
use crate::project::{Place, Project};

pub async fn run(place: &Place, output: &Output) -> Result<(), CliError> {
    let project = Project::read(place)?;
    let (diagnostics, checked) = match project.check().await {
        Ok(checked) => (checked.warnings.clone(), Some(checked)),
        Err(diagnostics) => (diagnostics, None),
    };
    if output.is_json() {
        output.json(&locate(&diagnostics, &project.files));
    } else {
        project.show(&diagnostics, output);
    }
    let Some(checked) = checked else { return Err(project.invalid(&diagnostics)) };
    let catalog = &checked.catalog;
    let parts = [
        counted(catalog.sources.len(), "source"),
        counted(catalog.feature_views.len(), "feature view"),
        counted(catalog.feature_services.len(), "service"),
        counted(catalog.models.len(), "model"),
    ];
    let warnings = diagnostics.iter().filter(|diagnostic| diagnostic.severity == Severity::Warning).count();
    let warned = if warnings == 0 { String::new() } else { format!(", {}", counted(warnings, "warning")) };
    output.line(format!("{} is valid: {}{warned}", checked.plan.project, parts.join(", ")));
    for service in &checked.plan.services {
        output.line(format!("  service {} {}", service.name, service.semantic_digest));
    }
    Ok(())
}
