//! The HTTP port: metrics, probes, and JSON twins of the calls for tools without gRPC.

mod json;

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use feature_defs::plan::ServicePlan;
use feature_defs::value::Type;
use proto::v1;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;

use crate::answer::Gateway;
use crate::config::{Listener, ServeError};
use crate::edge::{Limit, LimitedListener};
use crate::status::{Failure, not_known};

/// JSON is several times as large as the columns it stands for.
const BODY_BYTES_MAX: usize = 32 << 20;

pub(crate) async fn serve(
    listener: Listener,
    limit: Limit,
    gateway: Arc<Gateway>,
    stop: CancellationToken,
) -> Result<(), ServeError> {
    axum::serve(LimitedListener { listener: listener.listener, limit }, router(gateway))
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
        .map_err(|error| ServeError::Server { what: "HTTP", source: Box::new(error) })
}

fn router(gateway: Arc<Gateway>) -> Router {
    Router::new()
        .route("/live", get(|| async { "live\n" }))
        .route("/ready", get(ready))
        .route("/metrics", get(metrics))
        .route("/v1/features", post(features_twin))
        .route("/v1/models/{name}", get(model))
        .route("/v1/models/{name}/versions/{version}/ready", get(version_ready))
        .route("/v1/models/{name}/predict", post(predict_twin))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .merge(crate::flags::http::routes())
        .with_state(gateway)
}

async fn ready(State(gateway): State<Arc<Gateway>>) -> Response {
    let readiness = gateway.readiness();
    let status = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, axum::Json(readiness)).into_response()
}

async fn model(State(gateway): State<Arc<Gateway>>, Path(name): Path<String>) -> Result<Response, Failure> {
    Ok(axum::Json(gateway.served().model_health(&name)?).into_response())
}

/// For probes of one version: whether it answers here.
async fn version_ready(
    State(gateway): State<Arc<Gateway>>,
    Path((name, version)): Path<(String, u32)>,
) -> Result<Response, Failure> {
    let health = gateway.served().version_health(&name, version)?;
    let status = if health.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Ok((status, axum::Json(health)).into_response())
}

async fn metrics(State(gateway): State<Arc<Gateway>>) -> Response {
    let (age, _) = gateway.follower.log_health();
    gateway.metrics.remembered(&gateway.memory);
    let text = gateway.metrics.encode(&gateway.served(), age, gateway.readiness().ready);
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], text).into_response()
}

/// `{"service": "s", "rows": {"airport": ["JFK"]}}`, or `"features": ["view:feature"]` in place of the service.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FeaturesBody {
    project: Option<String>,
    service: Option<String>,
    features: Option<Vec<String>>,
    #[serde(default)]
    rows: BTreeMap<String, Vec<serde_json::Value>>,
    #[serde(default)]
    at: Vec<serde_json::Value>,
    #[serde(default)]
    provenance: bool,
    #[serde(default)]
    deadline_ms: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PredictBody {
    project: Option<String>,
    #[serde(default)]
    rows: BTreeMap<String, Vec<serde_json::Value>>,
    #[serde(default)]
    at: Vec<serde_json::Value>,
    #[serde(default)]
    include_features: bool,
    #[serde(default)]
    provenance: bool,
    #[serde(default)]
    deadline_ms: u32,
    #[serde(default)]
    version: u32,
    #[serde(default)]
    request_id: String,
    #[serde(default)]
    tier: String,
}

async fn features_twin(State(gateway): State<Arc<Gateway>>, body: Bytes) -> Result<Response, Failure> {
    let body: FeaturesBody = read(&body)?;
    gateway.check_serving()?;
    let served = gateway.served();
    let plan = served.plan()?;
    let (what, service): (_, Arc<ServicePlan>) = match (body.service, body.features) {
        (Some(name), None) => {
            let known = plan.services.iter().map(|service| &*service.name);
            let service = plan.service(&name).cloned();
            let service = service.ok_or_else(|| Failure::unknown("feature service", &name, known))?;
            (v1::get_features_request::What::Service(name), service)
        }
        (None, Some(names)) => {
            let service = gateway.listed(plan, &names)?;
            (v1::get_features_request::What::Features(v1::FeatureList { names }), service)
        }
        _ => return Err(Failure::invalid("the request must have either `service` or `features`")),
    };
    let request = v1::GetFeaturesRequest {
        project: body.project.unwrap_or_else(|| gateway.project.to_string()),
        what: Some(what),
        rows: columns(&service, &[], &body.rows)?,
        at: json::times(&body.at)?,
        include_provenance: body.provenance,
        deadline_ms: body.deadline_ms,
    };
    let answer = gateway.get_features(request).await?;
    Ok(axum::Json(json::features_response(&answer.to_message())).into_response())
}

async fn predict_twin(
    State(gateway): State<Arc<Gateway>>,
    Path(name): Path<String>,
    body: Bytes,
) -> Result<Response, Failure> {
    let body: PredictBody = read(&body)?;
    gateway.check_serving()?;
    let served = gateway.served();
    // The state that the columns are read by is the one that answers.
    let model = served.model(&name, body.version)?;
    let service = model.plan.service.clone();
    // The unit of a canary, and what a version that is tried takes, may come beside.
    let unit = model.plan.rollout.unit.iter().map(|key| (key.name.clone(), key.key_type.clone()));
    let tried = served.trials.get(&name).map(|trial| trial.columns()).unwrap_or_default();
    let beside: Vec<(String, Type)> = unit.chain(tried).collect();
    let request = v1::PredictRequest {
        project: body.project.unwrap_or_else(|| gateway.project.to_string()),
        model: name,
        rows: columns(&service, &beside, &body.rows)?,
        at: json::times(&body.at)?,
        deadline_ms: body.deadline_ms,
        include_features: body.include_features,
        include_provenance: body.provenance,
        version: body.version,
        request_id: body.request_id,
        tier: body.tier,
    };
    let response = gateway.predict_on(served, request).await?;
    Ok(axum::Json(json::predict_response(&response)).into_response())
}

fn read<T: serde::de::DeserializeOwned>(body: &[u8]) -> Result<T, Failure> {
    serde_json::from_slice(body).map_err(|error| Failure::invalid(format!("the body cannot be read: {error}")))
}

fn columns(
    service: &ServicePlan,
    beside: &[(String, Type)],
    rows: &BTreeMap<String, Vec<serde_json::Value>>,
) -> Result<Vec<v1::Column>, Failure> {
    let read = |(name, values): (&String, &Vec<serde_json::Value>)| {
        let declared = service.columns.iter().find(|column| column.name == *name).map(|column| &column.column_type);
        let other = || beside.iter().find(|(known, _)| known == name).map(|(_, column_type)| column_type);
        let wanted = declared.or_else(other).ok_or_else(|| {
            let what = format!("column in what service `{}` takes:", service.name);
            Failure::invalid(not_known(&what, name, service.columns.iter().map(|column| column.name.as_str())))
        })?;
        json::column(name, values, wanted)
    };
    rows.iter().map(read).collect()
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.kind.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let body = serde_json::json!({"error": self.message, "code": format!("{:?}", self.kind.code())});
        (status, axum::Json(body)).into_response()
    }
}
