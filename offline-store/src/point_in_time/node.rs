//! The logical node, and how it becomes an execution plan.

use std::cmp::Ordering;
use std::fmt;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use arrow::datatypes::{DataType, Field, Schema};
use async_trait::async_trait;
use datafusion::catalog::Session;
use datafusion::common::{DFSchema, DFSchemaRef, plan_err};
use datafusion::error::Result;
use datafusion::execution::session_state::SessionState;
use datafusion::logical_expr::{Expr, LogicalPlan, UserDefinedLogicalNode, UserDefinedLogicalNodeCore};
use datafusion::physical_plan::ExecutionPlan;
use datafusion::physical_planner::{DefaultPhysicalPlanner, ExtensionPlanner, PhysicalPlanner};

use super::PitJoin;
use super::exec::PitJoinExec;

/// Input 0 is the spine, the others are scans of those sources of `join` that are not Parquet files. The output is the spine's columns and, for each input of
/// the service, its answer: one column per feature that the service reads, the row's status, and its event time where that is
/// read.
#[derive(Debug, Clone)]
pub struct PitJoinNode {
    join: Arc<PitJoin>,
    inputs: Vec<LogicalPlan>,
    schema: DFSchemaRef,
}

impl PitJoinNode {
    pub fn try_new(join: Arc<PitJoin>, inputs: Vec<LogicalPlan>) -> Result<PitJoinNode> {
        if inputs.len() != join.plans() + 1 {
            return plan_err!("a point-in-time join of {} scans has {} inputs", join.plans(), inputs.len());
        }
        let schema = output_schema(&join, inputs[0].schema().as_arrow());
        let schema = Arc::new(DFSchema::try_from(schema)?);
        Ok(PitJoinNode { join, inputs, schema })
    }
}

/// The spine's columns and the answers. Names of answers cannot meet those of spine columns by accident: they begin with
/// two underscores and a number.
pub fn output_schema(join: &PitJoin, spine: &Schema) -> Schema {
    let mut fields: Vec<Field> = spine.fields().iter().map(|field| field.as_ref().clone()).collect();
    for (i, (input, used)) in join.service.inputs.iter().zip(&join.used).enumerate() {
        let features = input.view.features();
        for feature in &used.features {
            fields.push(Field::new(format!("__{i}_{feature}"), features[*feature].1.arrow(), true));
        }
        fields.push(Field::new(format!("__{i}_status"), DataType::UInt8, false));
        if used.event_time {
            fields.push(Field::new(format!("__{i}_event_time"), DataType::Int64, true));
        }
    }
    Schema::new(fields)
}

// Nodes are equal when they join the same inputs for the same request; a request is itself.
impl PartialEq for PitJoinNode {
    fn eq(&self, other: &PitJoinNode) -> bool {
        Arc::ptr_eq(&self.join, &other.join) && self.inputs == other.inputs
    }
}
impl Eq for PitJoinNode {}
impl Hash for PitJoinNode {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.join).hash(state);
        self.inputs.hash(state);
    }
}
impl PartialOrd for PitJoinNode {
    fn partial_cmp(&self, other: &PitJoinNode) -> Option<Ordering> {
        (self == other).then_some(Ordering::Equal)
    }
}

impl UserDefinedLogicalNodeCore for PitJoinNode {
    fn name(&self) -> &str {
        "PitJoin"
    }

    fn inputs(&self) -> Vec<&LogicalPlan> {
        self.inputs.iter().collect()
    }

    fn schema(&self) -> &DFSchemaRef {
        &self.schema
    }

    fn expressions(&self) -> Vec<Expr> {
        Vec::new()
    }

    fn fmt_for_explain(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let aliases: Vec<&str> = self.join.service.inputs.iter().map(|input| input.alias.as_str()).collect();
        write!(f, "PitJoin: service={}, views=[{}]", self.join.service.name, aliases.join(", "))
    }

    fn with_exprs_and_inputs(&self, _exprs: Vec<Expr>, inputs: Vec<LogicalPlan>) -> Result<PitJoinNode> {
        PitJoinNode::try_new(self.join.clone(), inputs)
    }
}

/// Plans the node; everything else is DataFusion's.
#[derive(Debug, Default)]
pub struct PitPlanner;

#[async_trait]
impl ExtensionPlanner for PitPlanner {
    async fn plan_extension(
        &self,
        _planner: &dyn PhysicalPlanner,
        node: &dyn UserDefinedLogicalNode,
        _logical_inputs: &[&LogicalPlan],
        physical_inputs: &[Arc<dyn ExecutionPlan>],
        _session: &dyn Session,
        _planning_ctx: &datafusion::logical_expr::physical_planning_context::PhysicalPlanningContext,
    ) -> Result<Option<Arc<dyn ExecutionPlan>>> {
        let Some(node) = node.as_any().downcast_ref::<PitJoinNode>() else { return Ok(None) };
        Ok(Some(Arc::new(PitJoinExec::try_new(node.join.clone(), physical_inputs.to_vec())?)))
    }
}

#[derive(Debug, Default)]
pub struct PitQueryPlanner;

#[async_trait]
impl datafusion::execution::context::QueryPlanner for PitQueryPlanner {
    async fn create_physical_plan(
        &self,
        logical_plan: &LogicalPlan,
        session: &dyn Session,
    ) -> Result<Arc<dyn ExecutionPlan>> {
        let planner = DefaultPhysicalPlanner::with_extension_planners(vec![Arc::new(PitPlanner)]);
        planner.create_physical_plan(logical_plan, session).await
    }
}

/// A session state that can plan the node.
pub fn with_planner(state: SessionState) -> SessionState {
    datafusion::execution::session_state::SessionStateBuilder::new_from_existing(state)
        .with_query_planner(Arc::new(PitQueryPlanner))
        .build()
}
