//! The features of a request: views fetched, transforms evaluated, statuses and reasons beside every value.

mod message;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use feature_defs::digest::Canonical;
use feature_defs::plan::{Assembled, Plan, RequestColumn, ServiceInput, ServiceOutput, ServicePlan, Slot, ViewAnswer};
use feature_defs::time::Status;
use online_store::OnlineStore;
use proto::v1;
use tokio::time::Instant;

use crate::convert;
use crate::fetch::{self, Fetched, Reason, ServiceReader, When};
use crate::metrics::{Metrics, ServiceCounters};
use crate::request::Rows;
use crate::status::Failure;

pub use message::FeaturesAnswer;

/// Names in one list of features. Longer lists are services that somebody should define.
const NAMES_MAX: usize = 1_000;

/// Services kept ready. Those of the definitions in force are far fewer; the rest are lists of features that callers make
/// up, and plans that were replaced.
const SERVICES_MAX: usize = 1_024;
/// Lists kept ready, and names in one that is kept.
const LISTS_MAX: usize = 256;
const LISTED_NAMES_MAX: usize = 256;

/// A service ready to be answered: how it is read, and what counts its values.
pub struct Service {
    pub reader: ServiceReader,
    pub counters: Arc<ServiceCounters>,
}

/// Services by the plan they are of. A plan is never changed, so the place where it lies says which it is, as long as it is
/// held here.
#[derive(Default)]
pub struct Services {
    known: Mutex<HashMap<usize, Arc<Service>>>,
    lists: Mutex<HashMap<Vec<String>, Listed>>,
}

/// The service that a list of features is, by the definitions that it was made from.
type Listed = (Arc<Plan>, Arc<ServicePlan>);

impl Services {
    pub fn of(&self, plan: &Arc<ServicePlan>, project: &str, metrics: &Metrics) -> Arc<Service> {
        let place = Arc::as_ptr(plan) as usize;
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(service) = known.get(&place) {
            return service.clone();
        }
        if known.len() >= SERVICES_MAX {
            // Whatever nobody else holds was replaced, or made up for one request.
            known.retain(|_, service| Arc::strong_count(&service.reader.service) > 1);
            if known.len() >= SERVICES_MAX {
                known.clear();
            }
        }
        let counters = metrics.service(plan);
        let service = Arc::new(Service { reader: ServiceReader::new(plan.clone(), project), counters });
        known.insert(place, service.clone());
        service
    }

    /// The service that a list of features is, see [`listed`].
    pub fn listed(&self, plan: &Arc<Plan>, names: &[String]) -> Result<Arc<ServicePlan>, Failure> {
        let lists = || self.lists.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, service)) = lists().get(names)
            && Arc::ptr_eq(of, plan)
        {
            return Ok(service.clone());
        }
        let service = Arc::new(listed(plan, names)?);
        if names.len() <= LISTED_NAMES_MAX {
            let mut lists = lists();
            if lists.len() >= LISTS_MAX {
                lists.clear();
            }
            lists.insert(names.to_vec(), (plan.clone(), service.clone()));
        }
        Ok(service)
    }
}

/// The features of some rows.
#[derive(Debug)]
pub struct Features {
    pub fetched: Fetched,
    pub assembled: Assembled,
    pub fetch_time: Duration,
    pub transform_time: Duration,
}

pub async fn compute(
    reader: &ServiceReader,
    rows: &Rows,
    when: When,
    deadline: Instant,
    store: &dyn OnlineStore,
) -> Result<Features, Failure> {
    let started = Instant::now();
    let fetched = fetch::fetch(reader, rows, when, deadline, store).await?;
    let fetch_time = started.elapsed();
    if let Some(error) = &fetched.store_error {
        tracing::warn!(%error, "the online store did not answer; what it would have said is UNAVAILABLE");
    }
    let started = Instant::now();
    let answers: Vec<&ViewAnswer> = fetched.answers().collect();
    let assembled = reader
        .service
        .assemble(&answers, &rows.columns, &fetched.at)
        .map_err(|error| Failure::internal("the features could not be computed", &error))?;
    Ok(Features { fetched, assembled, fetch_time, transform_time: started.elapsed() })
}

impl Features {
    /// The columns of the answer, in the order of the service.
    pub fn columns(&self, service: &ServicePlan) -> Vec<v1::FeatureColumn> {
        let outputs = service.outputs.iter().enumerate();
        let column = |(index, output): (usize, &ServiceOutput)| {
            let statuses = &self.assembled.statuses[index];
            v1::FeatureColumn {
                name: output.name.clone(),
                values: Some(convert::from_array(&output.name, &self.assembled.columns[index], &output.feature_type)),
                statuses: statuses.iter().map(|status| status_number(*status)).collect(),
                reasons: self.reasons(service, output.slot, statuses),
            }
        };
        outputs.map(column).collect()
    }

    /// One per row where any is UNAVAILABLE, else none.
    fn reasons(&self, service: &ServicePlan, slot: Slot, statuses: &[Status]) -> Vec<i32> {
        if !statuses.contains(&Status::Unavailable) {
            return Vec::new();
        }
        let mut inputs = Vec::new();
        inputs_of(service, slot, &mut inputs);
        let reason = |(row, status): (usize, &Status)| {
            let found = inputs.iter().find_map(|input| self.fetched.inputs[*input].reasons[row]);
            found.filter(|_| *status == Status::Unavailable).map_or(0, reason_number)
        };
        statuses.iter().enumerate().map(reason).collect()
    }

    /// What each view answered from.
    pub fn provenance(&self, service: &ServicePlan) -> Vec<v1::ViewProvenance> {
        let none = v1::Position { time: i64::MIN, sequence: 0 };
        let inputs = service.inputs.iter().zip(&self.fetched.inputs);
        let provenance = inputs.map(|(input, fetched)| v1::ViewProvenance {
            view: input.view.name.to_string(),
            alias: input.alias.clone(),
            event_times: fetched.answer.event_times.iter().map(|time| time.unwrap_or(i64::MIN)).collect(),
            positions: fetched
                .positions
                .iter()
                .map(|position| {
                    position.map_or(none, |position| v1::Position { time: position.time, sequence: position.sequence })
                })
                .collect(),
            storage_digest: input.view.storage_digest.to_string(),
        });
        provenance.collect()
    }
}

/// The views that a slot is made of, directly or through transforms, each once.
pub fn inputs_of(service: &ServicePlan, slot: Slot, inputs: &mut Vec<usize>) {
    match slot {
        Slot::Feature { input, .. } | Slot::EventTime { input } => {
            if !inputs.contains(&input) {
                inputs.push(input);
            }
        }
        // A transform reads only earlier ones, so this ends.
        Slot::Transform(index) => {
            service.transforms[index].reads.iter().for_each(|slot| inputs_of(service, *slot, inputs));
        }
        Slot::At | Slot::Request(_) => {}
    }
}

fn status_number(status: Status) -> i32 {
    let status = match status {
        Status::Present => v1::FieldStatus::Present,
        Status::NullValue => v1::FieldStatus::NullValue,
        Status::NotFound => v1::FieldStatus::NotFound,
        Status::OutsideMaxAge => v1::FieldStatus::OutsideMaxAge,
        Status::Unavailable => v1::FieldStatus::Unavailable,
    };
    status as i32
}

pub fn reason_number(reason: Reason) -> i32 {
    let reason = match reason {
        Reason::Timeout => v1::UnavailableReason::Timeout,
        Reason::Backfilling => v1::UnavailableReason::Backfilling,
        Reason::AtBeforeStore => v1::UnavailableReason::AtBeforeStore,
        Reason::StoreError => v1::UnavailableReason::StoreError,
        Reason::OfflineOnly => v1::UnavailableReason::OfflineOnly,
    };
    reason as i32
}

/// The service that a list of `view:feature` and `view:*` is, in the order asked.
pub fn listed(plan: &Plan, names: &[String]) -> Result<ServicePlan, Failure> {
    if names.is_empty() || names.len() > NAMES_MAX {
        let text =
            format!("{} features are asked for; name 1 to {NAMES_MAX} as `view:feature` or `view:*`", names.len());
        return Err(Failure::invalid(text));
    }
    let mut service = ServicePlan {
        name: "(features)".into(),
        columns: Vec::new(),
        inputs: Vec::new(),
        transforms: Vec::new(),
        outputs: Vec::new(),
        semantic_digest: Canonical::new("features").digest(),
    };
    for name in names {
        let Some((view_name, wanted)) = name.split_once(':') else {
            let shown = feature_defs::diagnose::shown(name);
            return Err(Failure::invalid(format!(
                "`{shown}` does not name a feature; write `view:feature` or `view:*`"
            )));
        };
        let Some(view) = plan.view(view_name) else {
            return Err(Failure::unknown("feature view", view_name, plan.views.iter().map(|view| &*view.name)));
        };
        let input = match service.inputs.iter().position(|input| input.alias == view_name) {
            Some(input) => input,
            None => {
                let mut keys = Vec::new();
                for key in &view.keys {
                    keys.push(key_column(&mut service, &key.name, &key.key_type)?);
                }
                service.inputs.push(ServiceInput { alias: view_name.to_owned(), view: view.clone(), keys });
                service.inputs.len() - 1
            }
        };
        let features = view.features();
        let known = || features.iter().map(|(feature, _, _)| *feature);
        if wanted != "*" && !known().any(|feature| feature == wanted) {
            return Err(Failure::unknown(&format!("feature in view `{view_name}` named"), wanted, known()));
        }
        for (feature, (feature_name, feature_type, _)) in features.iter().enumerate() {
            let output = format!("{view_name}:{feature_name}");
            let all = wanted == "*";
            if !all && *feature_name != wanted || all && service.output(&output).is_some() {
                continue;
            }
            if service.output(&output).is_some() {
                return Err(Failure::invalid(format!("feature `{output}` is asked for twice")));
            }
            let slot = Slot::Feature { input, feature };
            let feature_type = (*feature_type).clone();
            service.outputs.push(ServiceOutput { name: output, feature_type, slot, sensitive: false });
        }
    }
    let mut digest = Canonical::new("features");
    for input in &service.inputs {
        digest.add("alias", &input.alias);
        digest.add("view", &input.view.semantic_digest);
    }
    service.outputs.iter().for_each(|output| digest.add("output", &output.name));
    service.semantic_digest = digest.digest();
    Ok(service)
}

fn key_column(
    service: &mut ServicePlan,
    name: &str,
    column_type: &feature_defs::value::Type,
) -> Result<usize, Failure> {
    if let Some(index) = service.columns.iter().position(|column| column.name == name) {
        let known = &service.columns[index].column_type;
        if known != column_type {
            let text = format!(
                "the key `{name}` is {known} in one view and {column_type} in another; ask for them in two requests, or \
                 define a service that names their columns"
            );
            return Err(Failure::invalid(text));
        }
        return Ok(index);
    }
    service.columns.push(RequestColumn {
        name: name.to_owned(),
        column_type: column_type.clone(),
        nullable: true,
        is_key: true,
        address: None,
        // A list is no service, and what is asked by lists is not logged.
        sensitive: false,
    });
    Ok(service.columns.len() - 1)
}
