//! Requests for features and predictions, made before anything is measured.

use std::sync::Arc;

use bytes::Bytes;
use clap::Args;
use prost::Message as _;
use proto::v1;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

use super::raw::{GET_FEATURES, PREDICT};

/// What is asked for.
#[derive(Debug, Clone, Args)]
pub struct Asked {
    #[arg(long)]
    pub project: String,
    #[arg(long)]
    pub service: String,
    /// A prediction of this model for the same rows, instead of the features
    #[arg(long)]
    pub model: Option<String>,
    /// Entity keys are 0 to this, without it; 0 for a service that reads nothing
    #[arg(long)]
    pub keys: i64,
    /// Entities in one request
    #[arg(long, default_value_t = 1)]
    pub entities: usize,
    /// The column of the key
    #[arg(long, default_value = "entity")]
    pub key: String,
    /// A column of request fields, all values between 0 and 1
    #[arg(long)]
    pub field: Vec<String>,
}

/// What is sent over and over, and where to.
#[derive(Debug, Clone)]
pub struct Requests {
    pub path: &'static str,
    pub bodies: Arc<Vec<Bytes>>,
}

/// Different requests, which are sent over and over.
pub const REQUESTS: usize = 2_000;

/// None of the load is about deadlines of its own.
const DEADLINE_MS: u32 = 10_000;

impl Asked {
    pub fn requests(&self) -> Requests {
        let mut random = SmallRng::seed_from_u64(7);
        let bodies = (0..REQUESTS).map(|_| self.request(&mut random)).collect();
        let path = if self.model.is_some() { PREDICT } else { GET_FEATURES };
        Requests { path, bodies: Arc::new(bodies) }
    }

    fn request(&self, random: &mut SmallRng) -> Bytes {
        let column =
            |name: &str, values| v1::Column { name: name.to_owned(), validity: Vec::new(), values: Some(values) };
        let mut rows = Vec::new();
        if self.keys > 0 {
            let values = (0..self.entities).map(|_| random.random_range(0..self.keys)).collect();
            rows.push(column(&self.key, v1::column::Values::Int64s(v1::Int64Values { values })));
        }
        for field in &self.field {
            let values = (0..self.entities).map(|_| random.random()).collect();
            rows.push(column(field, v1::column::Values::Doubles(v1::DoubleValues { values })));
        }
        let project = self.project.clone();
        match &self.model {
            Some(model) => v1::PredictRequest {
                project,
                model: model.clone(),
                rows,
                deadline_ms: DEADLINE_MS,
                ..v1::PredictRequest::default()
            }
            .encode_to_vec()
            .into(),
            None => v1::GetFeaturesRequest {
                project,
                what: Some(v1::get_features_request::What::Service(self.service.clone())),
                rows,
                ..v1::GetFeaturesRequest::default()
            }
            .encode_to_vec()
            .into(),
        }
    }
}
