//! How a service is read: everything about it that does not depend on the request, worked out once.

use std::sync::Arc;

use feature_defs::as_of::MaxAge;
use feature_defs::plan::{ServicePlan, ViewPlan, ViewPlanKind};
use feature_defs::value::{Type, Value};
use feature_defs::window::Window;
use online_store::key::Generation;
use online_store::tile::{Layout, Tiles};

/// Reads the inputs of one service.
#[derive(Debug)]
pub struct ServiceReader {
    pub service: Arc<ServicePlan>,
    /// Of all views, each once.
    pub(super) generations: Vec<Generation>,
    /// The names of the facts that say so when a generation is complete.
    pub(super) ready_facts: Vec<String>,
    pub(super) inputs: Vec<InputReader>,
}

#[derive(Debug)]
pub(super) struct InputReader {
    pub kind: Kind,
    /// Of the view's features.
    pub types: Vec<Type>,
}

#[derive(Debug)]
pub(super) enum Kind {
    OfflineOnly,
    AsOf {
        generation: usize,
        max_age: MaxAge,
    },
    Windowed {
        generation: usize,
        layout: Layout,
        outputs: Vec<(usize, Window)>,
        /// What no events give.
        empty: Option<Arc<[Value]>>,
    },
}

impl ServiceReader {
    pub fn new(service: Arc<ServicePlan>, project: &str) -> ServiceReader {
        let mut generations: Vec<Generation> = Vec::new();
        let mut generation_of = |view: &ViewPlan| {
            let generation = Generation::new(project, &view.name, view.storage_digest.as_str());
            generations.iter().position(|known| *known == generation).unwrap_or_else(|| {
                generations.push(generation);
                generations.len() - 1
            })
        };
        let mut input = |view: &ViewPlan| {
            let kind = match &view.kind {
                ViewPlanKind::AsOf { max_age, .. } => Kind::AsOf { generation: generation_of(view), max_age: *max_age },
                ViewPlanKind::Windowed { levels: None, .. } => Kind::OfflineOnly,
                ViewPlanKind::Windowed { aggregates, outputs, windows, levels: Some(levels) } => {
                    let layout = Layout {
                        aggregates: aggregates.iter().map(|aggregate| aggregate.aggregate.clone()).collect(),
                        windows: windows.clone(),
                        levels: levels.clone(),
                    };
                    let outputs: Vec<(usize, Window)> =
                        outputs.iter().map(|output| (output.aggregate, output.window)).collect();
                    let empty = layout.read(&Tiles::default(), &outputs, 0).ok().map(Into::into);
                    Kind::Windowed { generation: generation_of(view), layout, outputs, empty }
                }
            };
            let types = view.features().into_iter().map(|(_, feature_type, _)| feature_type.clone()).collect();
            InputReader { kind, types }
        };
        let inputs = service.inputs.iter().map(|service_input| input(&service_input.view)).collect();
        let ready_facts = generations.iter().map(Generation::ready_fact).collect();
        ServiceReader { service, generations, ready_facts, inputs }
    }
}

impl InputReader {
    pub fn generation(&self) -> Option<usize> {
        match self.kind {
            Kind::OfflineOnly => None,
            Kind::AsOf { generation, .. } | Kind::Windowed { generation, .. } => Some(generation),
        }
    }
}
