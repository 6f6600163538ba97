//! Which columns and features of a service are declared `sensitive`. It changes nothing that is computed or served, only what
//! may be written down of it.

use super::{ServicePlan, Slot, ViewPlan, ViewPlanKind};
use crate::catalog::{Catalog, ViewKind};

/// Marks the columns and outputs of a service as its definitions say. What is computed from something sensitive is marked
/// only where that is declared too: a mean of ages need not be as private as an age.
pub(super) fn mark(catalog: &Catalog, service: &mut ServicePlan) {
    let keys: Vec<bool> = (0..service.columns.len()).map(|column| is_sensitive_key(catalog, service, column)).collect();
    for (column, by_key) in service.columns.iter_mut().zip(keys) {
        column.sensitive =
            by_key || column.address.as_deref().is_some_and(|address| is_sensitive_field(catalog, address));
    }
    let outputs: Vec<bool> = service
        .outputs
        .iter()
        .map(|output| match output.slot {
            Slot::Feature { input, feature } => is_sensitive_feature(catalog, &service.inputs[input].view, feature),
            Slot::Request(column) => service.columns[column].sensitive,
            Slot::Transform(transform) => is_sensitive_transform(catalog, &service.transforms[transform].address),
            Slot::EventTime { .. } | Slot::At => false,
        })
        .collect();
    service.outputs.iter_mut().zip(outputs).for_each(|(output, sensitive)| output.sensitive = sensitive);
}

/// Whether a column is what some view's entity calls a sensitive key.
fn is_sensitive_key(catalog: &Catalog, service: &ServicePlan, column: usize) -> bool {
    service.inputs.iter().any(|input| {
        let entity = catalog.entities.iter().find(|entity| *entity.name.value == *input.view.entity);
        let keys = entity.map_or(&[][..], |entity| &entity.keys);
        input.keys.iter().zip(keys).any(|(place, key)| *place == column && key.sensitive)
    })
}

fn is_sensitive_field(catalog: &Catalog, address: &str) -> bool {
    let Some((request, field)) = address.split_once(':') else { return false };
    let request = catalog.requests.iter().find(|known| *known.name.value == *request);
    request.is_some_and(|request| request.fields.iter().any(|known| *known.name.value == *field && known.sensitive))
}

fn is_sensitive_transform(catalog: &Catalog, address: &str) -> bool {
    let Some((transform, feature)) = address.split_once(':') else { return false };
    let transform = catalog.transforms.iter().find(|known| *known.name.value == *transform);
    transform.is_some_and(|of| of.features.iter().any(|known| *known.name.value == *feature && known.sensitive))
}

fn is_sensitive_feature(catalog: &Catalog, view: &ViewPlan, feature: usize) -> bool {
    let Some(declared) = catalog.feature_views.iter().find(|known| *known.name.value == *view.name) else {
        return false;
    };
    let name = match &view.kind {
        ViewPlanKind::AsOf { features, .. } => features.get(feature).map(|feature| feature.name.as_str()),
        ViewPlanKind::Windowed { outputs, aggregates, .. } => {
            outputs.get(feature).and_then(|output| aggregates.get(output.aggregate)).map(|of| of.name.as_str())
        }
    };
    let Some(name) = name else { return false };
    match &declared.kind {
        ViewKind::AsOf { features, .. } => features.iter().any(|known| *known.name.value == *name && known.sensitive),
        ViewKind::Windowed { aggregates, .. } => {
            aggregates.iter().any(|known| *known.name.value == *name && known.sensitive)
        }
    }
}
