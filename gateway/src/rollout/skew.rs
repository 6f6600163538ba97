//! Whether what a rollout's rows were served is what the same code says offline.

use std::sync::Arc;

use feature_defs::plan::Plan;
pub use offline_store::rollout::skew::{Asked, Found, Known};

use super::quiet::quietly;
use crate::answer::Gateway;
use crate::status::chain;

/// Looks at what has come to the log since `known`: some 20,000 rows at a time, and `is_behind` says whether there are more. What is
/// found is for whoever asks to add to `known`; dropped on the way, nothing of it is.
pub async fn skew(gateway: &Gateway, plan: &Arc<Plan>, asked: &Asked, known: &Known) -> Result<Found, String> {
    let Some(engine) = gateway.engine.get().cloned() else {
        return Err(
            "this server has no offline engine to replay rows with; a server with the role `offline` has".into()
        );
    };
    if let Some(events) = &gateway.events {
        // What was served must be in history before it can be asked of it.
        events.flush().await.map_err(|error| chain(&error))?;
    }
    let (plan, asked, known) = (plan.clone(), asked.clone(), known.clone());
    quietly("rollout-skew", move || async move {
        let found = offline_store::rollout::skew::look(&engine, &plan, &asked, &known).await;
        found.map_err(|error| chain(&error))
    })
    .await
}
