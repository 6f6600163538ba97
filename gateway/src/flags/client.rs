//! Flags for programs in Rust, over gRPC: the five questions of OpenFeature's provider, with its reasons and error codes.
//!
//! The crate `open-feature` is none of ours; a provider of it forwards each `resolve_*` to the one of the same name here.
//! Programs that use its provider for the remote protocol (OFREP) need nothing of this.

use std::time::Duration;

use proto::v1;
use proto::v1::gateway_client::GatewayClient;
use registry::flags::Kind;
use serde_json::{Map, Value as Json};
use tonic::transport::Channel;

/// Asks one server about the flags of one project. Cheap to clone.
#[derive(Debug, Clone)]
pub struct FlagClient {
    gateway: GatewayClient<Channel>,
    project: String,
    within: Duration,
}

/// Who asks, and what is known of them.
#[derive(Debug, Clone, Default)]
pub struct EvaluationContext {
    /// The unit that splits go by.
    pub targeting_key: Option<String>,
    pub attributes: Map<String, Json>,
}

/// A value and why it is that.
#[derive(Debug, Clone, PartialEq)]
pub struct Resolution<T> {
    pub value: T,
    pub variant: String,
    /// OpenFeature's: `TARGETING_MATCH`, `SPLIT`, `DEFAULT` or `DISABLED`.
    pub reason: String,
    /// The entry of the control log that made the flag so.
    pub entry: u64,
}

/// Why there is no value; whoever asks has a default of its own.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{code}: {message}")]
pub struct ResolutionError {
    /// OpenFeature's, such as `FLAG_NOT_FOUND`.
    pub code: String,
    pub message: String,
}

impl FlagClient {
    /// No answer takes longer than `within`.
    pub fn new(channel: Channel, project: impl Into<String>, within: Duration) -> FlagClient {
        FlagClient { gateway: GatewayClient::new(channel), project: project.into(), within }
    }

    pub async fn resolve_bool_value(
        &self,
        flag: &str,
        context: &EvaluationContext,
    ) -> Result<Resolution<bool>, ResolutionError> {
        self.resolve(flag, Kind::Boolean, context, |value| value.as_bool()).await
    }

    pub async fn resolve_int_value(
        &self,
        flag: &str,
        context: &EvaluationContext,
    ) -> Result<Resolution<i64>, ResolutionError> {
        self.resolve(flag, Kind::Integer, context, |value| value.as_i64()).await
    }

    pub async fn resolve_float_value(
        &self,
        flag: &str,
        context: &EvaluationContext,
    ) -> Result<Resolution<f64>, ResolutionError> {
        self.resolve(flag, Kind::Float, context, |value| value.as_f64()).await
    }

    pub async fn resolve_string_value(
        &self,
        flag: &str,
        context: &EvaluationContext,
    ) -> Result<Resolution<String>, ResolutionError> {
        self.resolve(flag, Kind::String, context, |value| value.as_str().map(str::to_owned)).await
    }

    pub async fn resolve_struct_value(
        &self,
        flag: &str,
        context: &EvaluationContext,
    ) -> Result<Resolution<Map<String, Json>>, ResolutionError> {
        self.resolve(flag, Kind::Object, context, |value| value.as_object().cloned()).await
    }

    async fn resolve<T>(
        &self,
        flag: &str,
        kind: Kind,
        context: &EvaluationContext,
        read: impl Fn(&Json) -> Option<T>,
    ) -> Result<Resolution<T>, ResolutionError> {
        let failed = |code: &str, message: String| ResolutionError { code: code.to_owned(), message };
        let attributes = serde_json::to_string(&context.attributes);
        let question = v1::EvaluateFlagsRequest {
            project: self.project.clone(),
            flags: vec![v1::FlagQuestion { name: flag.to_owned(), r#type: kind.name().to_owned() }],
            targeting_key: context.targeting_key.clone(),
            context: attributes.map_err(|error| failed("INVALID_CONTEXT", error.to_string()))?,
            exposures: v1::Exposures::Log.into(),
        };
        let mut gateway = self.gateway.clone();
        let answer = tokio::time::timeout(self.within, gateway.evaluate_flags(question)).await;
        let answer = answer.map_err(|_| failed("GENERAL", format!("no answer within {:?}", self.within)))?;
        let answer = answer.map_err(|status| match status.code() {
            tonic::Code::InvalidArgument => failed("INVALID_CONTEXT", status.message().to_owned()),
            _ => failed("GENERAL", status.to_string()),
        })?;
        let value = answer.into_inner().flags.into_iter().next();
        let value = value.ok_or_else(|| failed("GENERAL", "the server answered nothing".to_owned()))?;
        if !value.error_code.is_empty() {
            return Err(ResolutionError { code: value.error_code, message: value.error_message });
        }
        let parsed = serde_json::from_str(&value.value).ok().and_then(|value| read(&value));
        let parsed = parsed.ok_or_else(|| failed("TYPE_MISMATCH", format!("`{flag}` is {}", value.value)))?;
        let v1::FlagValue { variant, reason, entry, .. } = value;
        Ok(Resolution { value: parsed, variant, reason, entry })
    }
}
