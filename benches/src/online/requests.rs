//! Requests for features, made before anything is measured.

use bytes::Bytes;
use clap::Args;
use prost::Message as _;
use proto::v1;
use rand::rngs::SmallRng;
use rand::{Rng as _, SeedableRng as _};

/// What is asked for.
#[derive(Debug, Clone, Args)]
pub struct Asked {
    #[arg(long)]
    pub project: String,
    #[arg(long)]
    pub service: String,
    /// Entity keys are 0 to this, without it
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

/// Different requests, which are sent over and over.
pub const REQUESTS: usize = 2_000;

impl Asked {
    pub fn requests(&self) -> Vec<Bytes> {
        let mut random = SmallRng::seed_from_u64(7);
        (0..REQUESTS).map(|_| self.request(&mut random).encode_to_vec().into()).collect()
    }

    fn request(&self, random: &mut SmallRng) -> v1::GetFeaturesRequest {
        let keys = (0..self.entities).map(|_| random.random_range(0..self.keys)).collect();
        let column =
            |name: &str, values| v1::Column { name: name.to_owned(), validity: Vec::new(), values: Some(values) };
        let mut rows = vec![column(&self.key, v1::column::Values::Int64s(v1::Int64Values { values: keys }))];
        for field in &self.field {
            let values = (0..self.entities).map(|_| random.random()).collect();
            rows.push(column(field, v1::column::Values::Doubles(v1::DoubleValues { values })));
        }
        v1::GetFeaturesRequest {
            project: self.project.clone(),
            what: Some(v1::get_features_request::What::Service(self.service.clone())),
            rows,
            ..v1::GetFeaturesRequest::default()
        }
    }
}
