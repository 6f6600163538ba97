//! Flags over HTTP: `/v1/flags`, and OpenFeature's remote evaluation protocol (OFREP), by which any client of OpenFeature can
//! ask without knowing what answers.
//!
//! OFREP has two calls. About one flag ask servers, when they need it, so units that a split gave a variant are written
//! down. About all flags ask clients, who keep the answers and ask again whether they have changed; what they use of them
//! happens elsewhere, so nothing is written down.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::Router;
use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use proto::v1;
use registry::flags::{ErrorCode, Kind};
use registry::id::Sha256;
use serde::Deserialize;
use serde_json::{Map, Value as Json, json};

use super::{Answer, Context, Question};
use crate::answer::Gateway;
use crate::status::{Failure, Kind as FailureKind};

/// OpenFeature's name of the unit in a context.
const TARGETING_KEY: &str = "targetingKey";
/// A context, and the names of all flags that a project may have.
const BODY_BYTES_MAX: usize = 256 << 10;
/// Of clients that keep answers: how soon a change reaches them is theirs to choose, but not below this.
const POLL_MS_MIN: u64 = 1_000;

/// The routes of flags.
pub fn routes() -> Router<Arc<Gateway>> {
    Router::new()
        .route("/v1/flags", post(flags_twin))
        .route("/ofrep/v1/evaluate/flags/{key}", post(ofrep_one))
        .route("/ofrep/v1/evaluate/flags", post(ofrep_all))
        .route("/ofrep/v1/configuration", get(ofrep_configuration))
        .layer(axum::extract::DefaultBodyLimit::max(BODY_BYTES_MAX))
}

/// `{"flags": {"new_page": "boolean"}, "targeting_key": "N14228", "context": {"carrier": "UA"}}`; a type may be null, and
/// without `flags` all are meant.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FlagsBody {
    project: Option<String>,
    #[serde(default)]
    flags: BTreeMap<String, Option<String>>,
    targeting_key: Option<String>,
    #[serde(default)]
    context: Map<String, Json>,
    exposures: Option<ExposuresBody>,
}

#[derive(Deserialize)]
#[serde(rename_all = "snake_case")]
enum ExposuresBody {
    Log,
    None,
}

async fn flags_twin(State(gateway): State<Arc<Gateway>>, body: Bytes) -> Result<Response, Failure> {
    let body: FlagsBody =
        serde_json::from_slice(&body).map_err(|error| Failure::invalid(format!("the body cannot be read: {error}")))?;
    gateway.check_serving()?;
    if let Some(project) = &body.project {
        gateway.check_project(project)?;
    }
    let served = gateway.served();
    let kind = |name: &Option<String>| match name.as_deref() {
        None => Ok(None),
        Some(name) => Kind::of_name(name).map(Some).ok_or_else(|| {
            let text = crate::status::not_known("type of flags named", name, Kind::ALL.into_iter().map(Kind::name));
            Failure::invalid(text)
        }),
    };
    let flags = body.flags.iter().map(|(name, of)| Ok((name.as_str(), kind(of)?)));
    let flags = flags.collect::<Result<Vec<_>, Failure>>()?;
    let exposures = match body.exposures {
        // Nobody uses all flags at once.
        None if flags.is_empty() => v1::Exposures::None,
        None | Some(ExposuresBody::Log) => v1::Exposures::Log,
        Some(ExposuresBody::None) => v1::Exposures::None,
    };
    let context = Context::new(body.targeting_key.as_deref(), &body.context)?;
    let question = Question { flags, context, exposures };
    let flags = gateway.ask_flags(&served.flags, &question, |answer| (answer.name.to_owned(), told(&answer)))?;
    let flags: Map<String, Json> = flags.into_iter().collect();
    Ok(axum::Json(json!({"flags": flags, "control_head": served.head.0})).into_response())
}

fn told(answer: &Answer<'_>) -> Json {
    let evaluation = &answer.evaluation;
    let (code, message) = evaluation.error.as_ref().map(|(code, text)| (code.name(), text.as_str())).unzip();
    json!({
        "value": evaluation.value,
        "type": answer.kind.map(Kind::name),
        "variant": evaluation.variant,
        "reason": evaluation.reason.name(),
        "error_code": code,
        "error_message": message,
        "entry": evaluation.entry.map(|entry| entry.0),
    })
}

/// A request of OFREP: the context, and the unit in it.
struct Remote {
    attributes: Map<String, Json>,
    targeting_key: Option<String>,
}

/// A request that OFREP answers as a whole with one error.
struct Refused {
    status: StatusCode,
    code: &'static str,
    details: String,
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Refused {
        let (status, code) = match failure.kind {
            FailureKind::Invalid => (StatusCode::BAD_REQUEST, "INVALID_CONTEXT"),
            FailureKind::Unavailable => (StatusCode::SERVICE_UNAVAILABLE, "PROVIDER_NOT_READY"),
            kind => (StatusCode::from_u16(kind.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), "GENERAL"),
        };
        Refused { status, code, details: failure.message }
    }
}

impl Refused {
    fn answer(self, key: Option<&str>) -> Response {
        let mut body = json!({"errorCode": self.code, "errorDetails": self.details});
        if let (Some(key), Some(body)) = (key, body.as_object_mut()) {
            body.insert("key".to_owned(), key.into());
        }
        (self.status, axum::Json(body)).into_response()
    }
}

fn read(gateway: &Gateway, body: &[u8]) -> Result<Remote, Refused> {
    gateway.check_serving()?;
    let refused = |code: &'static str, details: String| Refused { status: StatusCode::BAD_REQUEST, code, details };
    // Clients may say more than we know of.
    let mut body: Map<String, Json> = match body.is_empty() {
        true => Map::new(),
        false => serde_json::from_slice(body)
            .map_err(|error| refused("PARSE_ERROR", format!("the body cannot be read: {error}")))?,
    };
    let attributes = match body.remove("context") {
        None | Some(Json::Null) => Map::new(),
        Some(Json::Object(attributes)) => attributes,
        Some(_) => return Err(refused("INVALID_CONTEXT", "`context` is no object".to_owned())),
    };
    let targeting_key = match attributes.get(TARGETING_KEY) {
        None | Some(Json::Null) => None,
        Some(Json::String(key)) => Some(key.clone()),
        Some(other) => {
            let shown = feature_defs::diagnose::shown(&other.to_string()).to_string();
            return Err(refused("INVALID_CONTEXT", format!("`{TARGETING_KEY}` is no string but {shown}")));
        }
    };
    Ok(Remote { attributes, targeting_key })
}

async fn ofrep_one(State(gateway): State<Arc<Gateway>>, Path(key): Path<String>, body: Bytes) -> Response {
    let answer = |remote: Remote| -> Result<Response, Refused> {
        let served = gateway.served();
        let context = Context::new(remote.targeting_key.as_deref(), &remote.attributes)?;
        let question = Question { flags: vec![(&key, None)], context, exposures: v1::Exposures::Log };
        let mut answers = gateway.ask_flags(&served.flags, &question, |answer| {
            let status = match &answer.evaluation.error {
                None => StatusCode::OK,
                Some((ErrorCode::FlagNotFound, _)) => StatusCode::NOT_FOUND,
                Some(_) => StatusCode::BAD_REQUEST,
            };
            (status, axum::Json(ofrep(&answer))).into_response()
        })?;
        answers.pop().ok_or_else(|| Failure::new(FailureKind::Internal, "no flag was answered").into())
    };
    read(&gateway, &body).and_then(answer).unwrap_or_else(|refused| refused.answer(Some(&key)))
}

async fn ofrep_all(State(gateway): State<Arc<Gateway>>, headers: HeaderMap, body: Bytes) -> Response {
    let answer = |remote: Remote| -> Result<Response, Refused> {
        let served = gateway.served();
        let context = Context::new(remote.targeting_key.as_deref(), &remote.attributes)?;
        let question = Question { flags: Vec::new(), context, exposures: v1::Exposures::None };
        let flags = gateway.ask_flags(&served.flags, &question, |answer| ofrep(&answer))?;
        let body = json!({"flags": flags}).to_string();
        // By what is said: gateways that say the same agree, and other changes of the log change nothing.
        let tag = format!("\"{}\"", Sha256::of(body.as_bytes()).as_str());
        let known = headers.get(header::IF_NONE_MATCH).and_then(|known| known.to_str().ok()).unwrap_or_default();
        let is_known =
            known.split(',').map(str::trim).any(|known| known == "*" || known.trim_start_matches("W/") == tag);
        if is_known {
            return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, tag)]).into_response());
        }
        let headers = [(header::ETAG, tag), (header::CONTENT_TYPE, "application/json".to_owned())];
        Ok((headers, body).into_response())
    };
    read(&gateway, &body).and_then(answer).unwrap_or_else(|refused| refused.answer(None))
}

async fn ofrep_configuration() -> Response {
    let body = json!({
        "name": "coeval",
        "capabilities": {
            "cacheInvalidation": {"polling": {"enabled": true, "minPollingIntervalMs": POLL_MS_MIN}},
            "flagEvaluation": {"supportedTypes": ["int", "float", "string", "boolean", "object"]},
            "caching": {"enabled": false},
        },
    });
    axum::Json(body).into_response()
}

fn ofrep(answer: &Answer<'_>) -> Json {
    let evaluation = &answer.evaluation;
    match &evaluation.error {
        Some((code, details)) => {
            json!({"key": answer.name, "errorCode": code.name(), "errorDetails": details})
        }
        None => json!({
            "key": answer.name,
            "value": evaluation.value,
            "variant": evaluation.variant,
            "reason": evaluation.reason.name(),
            "metadata": {"entry": evaluation.entry.map_or(0, |entry| entry.0)},
        }),
    }
}
