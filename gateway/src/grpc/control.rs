//! What is there, and changes to it.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use feature_defs::plan::{ModelPlan, Plan, ServicePlan, SourceKind};
use feature_defs::value::Type;
use futures::{Stream, StreamExt};
use proto::v1;
use proto::v1::control_server::Control as ControlService;
use registry::Outcome;
use registry::id::{DatasetId, Digest, ModelName, NameError, ServiceName};
use registry::model::NewModel;
use registry::state::{Change, Project, State};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::answer::Gateway;
use crate::follow::{Retry, Served, input_columns};
use crate::predict::spec_of;
use crate::status::{Failure, Kind};
use crate::{deploy, drift, golden, labels, rollout};

/// The largest model file. It is held in memory while it is checked and loaded.
const MODEL_BYTES_MAX: usize = 1 << 30;
/// Uploads at once, for the same reason.
const UPLOADS_MAX: usize = 2;
/// How long a call waits for an entry that it was told of and the log does not have yet.
const ENTRY_WAIT: Duration = Duration::from_secs(20);
/// Messages of progress that wait for a slow reader; others are left out.
const STAGES_MAX: usize = 16;
/// Texts of a record are names, digests and words, not files.
const TEXT_BYTES_MAX: usize = 64 << 10;

pub struct Control {
    gateway: Arc<Gateway>,
    uploads: Semaphore,
}

impl Control {
    pub fn new(gateway: Arc<Gateway>) -> Control {
        Control { gateway, uploads: Semaphore::new(UPLOADS_MAX) }
    }
}

#[tonic::async_trait]
impl ControlService for Control {
    async fn get_catalog(
        &self,
        request: Request<v1::GetCatalogRequest>,
    ) -> Result<Response<v1::GetCatalogResponse>, Status> {
        let request = request.into_inner();
        // A client that does not know the project yet learns it here.
        if !request.project.is_empty() {
            self.gateway.check_project(&request.project)?;
        }
        let served = self.gateway.served();
        let ready = self.gateway.ready_views(&served).await;
        Ok(Response::new(catalog(self.gateway.project.as_str(), &served, &ready)))
    }

    async fn refresh(&self, request: Request<v1::RefreshRequest>) -> Result<Response<v1::RefreshResponse>, Status> {
        let request = request.into_inner();
        self.gateway.check_project(&request.project)?;
        let wait_until = tokio::time::Instant::now() + ENTRY_WAIT;
        let served = loop {
            let served = self.gateway.follower.follow(Retry::Now).await;
            if let (_, Some(error)) = self.gateway.follower.log_health() {
                let source: Box<dyn std::error::Error + Send + Sync> = error.into();
                Err(Failure::unavailable("the control log cannot be read", &*source))?;
            }
            if served.head.0 >= request.at_least {
                break served;
            }
            if tokio::time::Instant::now() >= wait_until {
                let text =
                    format!("entry {} is not in the control log, which ends at {}", request.at_least, served.head);
                Err(Failure::new(Kind::Expired, text))?;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        let mut reasons = self.gateway.pending();
        reasons.extend(self.gateway.pending_elsewhere(&served).await);
        Ok(Response::new(v1::RefreshResponse { control_head: served.head.0, ready: reasons.is_empty(), reasons }))
    }

    async fn register_model(
        &self,
        request: Request<Streaming<v1::RegisterModelRequest>>,
    ) -> Result<Response<v1::RegisterModelResponse>, Status> {
        Ok(Response::new(self.register(request.into_inner()).await?))
    }

    async fn deploy_model(
        &self,
        request: Request<v1::DeployModelRequest>,
    ) -> Result<Response<v1::DeployModelResponse>, Status> {
        self.gateway.check_serving()?;
        let gateway = self.gateway.clone();
        // It goes on when the caller goes away: every other gateway has begun by then.
        let work = tokio::spawn(deploy::deploy(gateway, request.into_inner()));
        match work.await {
            Ok(answer) => Ok(Response::new(answer?)),
            Err(error) => Err(Failure::internal("the deploy ended early", &error).into()),
        }
    }

    async fn promote_model(
        &self,
        request: Request<v1::PromoteModelRequest>,
    ) -> Result<Response<v1::TrafficResponse>, Status> {
        Ok(Response::new(deploy::promote(&self.gateway, request.get_ref()).await?))
    }

    async fn begin_rollout(
        &self,
        request: Request<v1::BeginRolloutRequest>,
    ) -> Result<Response<v1::BeginRolloutResponse>, Status> {
        self.gateway.check_serving()?;
        Ok(Response::new(rollout::control::begin(&self.gateway, request.get_ref()).await?))
    }

    async fn plan_rollout(
        &self,
        request: Request<v1::PlanRolloutRequest>,
    ) -> Result<Response<v1::PlanRolloutResponse>, Status> {
        Ok(Response::new(rollout::control::plan(&self.gateway, request.get_ref()).await?))
    }

    async fn get_rollout(
        &self,
        request: Request<v1::GetRolloutRequest>,
    ) -> Result<Response<v1::GetRolloutResponse>, Status> {
        Ok(Response::new(rollout::control::get(&self.gateway, request.get_ref()).await?))
    }

    async fn change_rollout(
        &self,
        request: Request<v1::ChangeRolloutRequest>,
    ) -> Result<Response<v1::ChangeRolloutResponse>, Status> {
        Ok(Response::new(rollout::control::change(&self.gateway, request.get_ref()).await?))
    }

    async fn rollback_model(
        &self,
        request: Request<v1::RollbackModelRequest>,
    ) -> Result<Response<v1::TrafficResponse>, Status> {
        Ok(Response::new(deploy::rollback(&self.gateway, request.get_ref()).await?))
    }

    async fn retire_model(
        &self,
        request: Request<v1::RetireModelRequest>,
    ) -> Result<Response<v1::RetireModelResponse>, Status> {
        Ok(Response::new(deploy::retire(&self.gateway, request.get_ref()).await?))
    }

    async fn approve_model(
        &self,
        request: Request<v1::ApproveModelRequest>,
    ) -> Result<Response<v1::ApproveModelResponse>, Status> {
        Ok(Response::new(deploy::approve(&self.gateway, request.get_ref()).await?))
    }

    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        self.gateway.check_project(&request.into_inner().project)?;
        let state = self.gateway.registry.state();
        let models = project(&state, &self.gateway).map_or_else(Vec::new, |project| models(&self.gateway, project));
        Ok(Response::new(v1::ListModelsResponse { models }))
    }

    async fn get_memory(
        &self,
        request: Request<v1::GetMemoryRequest>,
    ) -> Result<Response<v1::GetMemoryResponse>, Status> {
        self.gateway.check_project(&request.into_inner().project)?;
        let devices = &self.gateway.follower.versions.devices;
        let capacity = devices.cpu().and_then(|cpu| cpu.capacity()).unwrap_or(0);
        let models = devices.all().into_iter().flat_map(|(device, shared)| {
            shared.footprints().into_iter().map(move |footprint| v1::ModelMemory {
                bytes: footprint.bytes(),
                arithmetic: footprint.arithmetic(),
                name: footprint.name,
                device: device.to_string(),
            })
        });
        Ok(Response::new(v1::GetMemoryResponse {
            capacity,
            allowed: inference::memory::allowed(capacity),
            resident: inference::memory::resident().unwrap_or(0),
            models: models.collect(),
            alarms: self.gateway.memory.alarms(),
        }))
    }

    async fn list_datasets(
        &self,
        request: Request<v1::ListDatasetsRequest>,
    ) -> Result<Response<v1::ListDatasetsResponse>, Status> {
        self.gateway.check_project(&request.into_inner().project)?;
        let state = self.gateway.registry.state();
        let datasets = project(&state, &self.gateway).map_or_else(Vec::new, datasets);
        Ok(Response::new(v1::ListDatasetsResponse { datasets }))
    }

    async fn get_drift(&self, request: Request<v1::GetDriftRequest>) -> Result<Response<v1::GetDriftResponse>, Status> {
        self.gateway.check_serving()?;
        Ok(Response::new(drift::get(&self.gateway, request.into_inner()).await?))
    }

    async fn add_labels(
        &self,
        request: Request<v1::AddLabelsRequest>,
    ) -> Result<Response<v1::AddLabelsResponse>, Status> {
        self.gateway.check_serving()?;
        Ok(Response::new(labels::add(&self.gateway, request.into_inner()).await?))
    }

    async fn get_quality(
        &self,
        request: Request<v1::GetQualityRequest>,
    ) -> Result<Response<v1::GetQualityResponse>, Status> {
        self.gateway.check_serving()?;
        Ok(Response::new(labels::quality(&self.gateway, request.into_inner()).await?))
    }

    async fn list_flags(
        &self,
        request: Request<v1::ListFlagsRequest>,
    ) -> Result<Response<v1::ListFlagsResponse>, Status> {
        Ok(Response::new(self.gateway.list_flags(request.into_inner()).await?))
    }

    async fn set_flag(&self, request: Request<v1::SetFlagRequest>) -> Result<Response<v1::SetFlagResponse>, Status> {
        Ok(Response::new(self.gateway.set_flag(request.get_ref()).await?))
    }

    async fn remove_flag(
        &self,
        request: Request<v1::RemoveFlagRequest>,
    ) -> Result<Response<v1::RemoveFlagResponse>, Status> {
        Ok(Response::new(self.gateway.remove_flag(request.get_ref()).await?))
    }

    async fn set_holdout(
        &self,
        request: Request<v1::SetHoldoutRequest>,
    ) -> Result<Response<v1::SetHoldoutResponse>, Status> {
        Ok(Response::new(self.gateway.set_holdout(request.get_ref()).await?))
    }

    async fn get_flag_history(
        &self,
        request: Request<v1::GetFlagHistoryRequest>,
    ) -> Result<Response<v1::GetFlagHistoryResponse>, Status> {
        Ok(Response::new(self.gateway.flag_history(request.get_ref()).await?))
    }

    async fn get_flag_exposures(
        &self,
        request: Request<v1::GetFlagExposuresRequest>,
    ) -> Result<Response<v1::GetFlagExposuresResponse>, Status> {
        Ok(Response::new(self.gateway.flag_exposures(request.get_ref()).await?))
    }

    type ForgetStream = Pin<Box<dyn Stream<Item = Result<v1::ForgetProgress, Status>> + Send>>;

    async fn forget(&self, request: Request<v1::ForgetRequest>) -> Result<Response<Self::ForgetStream>, Status> {
        let request = request.into_inner();
        self.gateway.check_serving()?;
        self.gateway.check_project(&request.project)?;
        let (sender, stages) = mpsc::channel::<String>(STAGES_MAX);
        let gateway = self.gateway.clone();
        // It goes on when the caller goes away: half of it would be finished later anyway.
        let work = tokio::spawn(async move { crate::forget::forget(&gateway, request, sender).await });
        let stages = ReceiverStream::new(stages).map(|stage| Ok(v1::ForgetProgress { stage, result: None }));
        let end = futures::stream::once(async move {
            match work.await {
                Ok(Ok(result)) => Ok(v1::ForgetProgress { stage: "done".into(), result: Some(result) }),
                Ok(Err(failure)) => Err(failure.into()),
                Err(error) => Err(Failure::internal("the work ended early; the server goes on with it", &error).into()),
            }
        });
        Ok(Response::new(Box::pin(stages.chain(end))))
    }
}

impl Control {
    async fn register(
        &self,
        mut parts: Streaming<v1::RegisterModelRequest>,
    ) -> Result<v1::RegisterModelResponse, Failure> {
        use v1::register_model_request::Part;
        let Some(Part::Header(header)) = next(&mut parts).await? else {
            return Err(Failure::invalid("the first part of an upload must be its header"));
        };
        let gateway = &self.gateway;
        gateway.check_project(&header.project)?;
        check_header(&header)?;
        // What the header says is checked before a gigabyte is taken for it.
        let served = gateway.follower.follow(Retry::Later).await;
        let plan = served.plan()?;
        let known = || plan.models.iter().map(|model| &*model.name);
        let model = plan.model(&header.model).ok_or_else(|| Failure::unknown("model", &header.model, known()))?;
        let name: ModelName = parse(&header.model)?;
        check_importances(&header, model)?;
        let dataset = self.dataset(&header.dataset)?;

        let _permit = self.uploads.try_acquire().map_err(|_| {
            Failure::new(Kind::TooMuch, format!("{UPLOADS_MAX} models are being uploaded already; send it again later"))
        })?;
        let (mut bytes, mut golden) = (BytesMut::new(), BytesMut::new());
        while let Some(part) = next(&mut parts).await? {
            let (chunk, whole, most, what) = match part {
                Part::Chunk(chunk) => (chunk, &mut bytes, MODEL_BYTES_MAX, "model file"),
                Part::GoldenChunk(chunk) => (chunk, &mut golden, golden::BYTES_MAX, "file of golden rows"),
                Part::Header(_) => return Err(Failure::invalid("an upload has one header, and then chunks only")),
            };
            if whole.len() + chunk.len() > most {
                let text = format!("the {what} is larger than {most} bytes, the largest this server takes");
                return Err(Failure::new(Kind::TooMuch, text));
            }
            whole.extend_from_slice(&chunk);
        }
        if bytes.is_empty() {
            return Err(Failure::invalid("the model file is empty"));
        }
        let artifacts = gateway.registry.artifacts();
        let golden_rows = match golden.freeze() {
            golden if golden.is_empty() => None,
            golden => {
                // Said now to whoever has them at hand, rather than when the version is deployed.
                golden::read(golden.clone(), spec_of(model)).await?;
                Some(artifacts.put_golden_rows(&name, golden).await?)
            }
        };
        let artifact = artifacts.put_artifact(&name, bytes.freeze()).await?;
        let digest = artifact.sha256.to_string();
        let author = header.author.clone();
        let new = NewModel {
            name,
            artifact,
            runtime: runtime_name(model).to_owned(),
            service: parse::<ServiceName>(&model.service.name)?,
            service_digest: parse::<Digest>(model.service.semantic_digest.as_str())?,
            inputs: input_columns(model),
            author: header.author,
            commit: header.commit,
            environment_digest: header.environment_digest,
            seed: header.seed,
            hardware: header.hardware,
            libraries: header.libraries.into_iter().collect(),
            dataset,
            metrics: header.metrics.into_iter().collect(),
            importances: header.importances.into_iter().collect(),
            golden_rows,
        };
        let change = Change::RegisterModel(Box::new(new));
        let receipt = gateway.registry.submit(&gateway.project, &change, &author, None).await?;
        let version = receipt.version.map_or(0, |version| version.0);
        tracing::info!(model = header.model, version, digest, "a model is registered");
        Ok(v1::RegisterModelResponse { version, digest, existed: receipt.outcome == Outcome::AlreadySo })
    }

    /// The id of a dataset that was named by its id or its name.
    fn dataset(&self, named: &str) -> Result<Option<DatasetId>, Failure> {
        if named.is_empty() {
            return Ok(None);
        }
        let state = self.gateway.registry.state();
        let project = project(&state, &self.gateway);
        let known = || project.into_iter().flat_map(|project| project.dataset_names.keys()).map(|name| name.as_str());
        let found = project.and_then(|project| project.dataset(named));
        let record = found.ok_or_else(|| Failure::unknown("dataset", named, known()))?;
        Ok(Some(record.dataset.id.clone()))
    }
}

async fn next(
    parts: &mut Streaming<v1::RegisterModelRequest>,
) -> Result<Option<v1::register_model_request::Part>, Failure> {
    match parts.message().await {
        Ok(Some(message)) => match message.part {
            Some(part) => Ok(Some(part)),
            None => Err(Failure::invalid("a part of the upload is empty")),
        },
        Ok(None) => Ok(None),
        Err(status) => Err(Failure::new(Kind::Unavailable, format!("the upload broke off: {}", status.message()))),
    }
}

fn check_header(header: &v1::ModelHeader) -> Result<(), Failure> {
    let texts = [&header.author, &header.commit, &header.environment_digest, &header.hardware];
    let maps = header.libraries.iter().map(|(name, version)| name.len() + version.len()).sum::<usize>()
        + header.metrics.keys().chain(header.importances.keys()).map(String::len).sum::<usize>();
    if texts.into_iter().map(String::len).sum::<usize>() + maps > TEXT_BYTES_MAX {
        return Err(Failure::invalid(format!("the header's texts take more than {TEXT_BYTES_MAX} bytes")));
    }
    Ok(())
}

fn check_importances(header: &v1::ModelHeader, model: &ModelPlan) -> Result<(), Failure> {
    for (name, importance) in &header.importances {
        if model.service.output(name).is_none() {
            let known = model.service.outputs.iter().map(|output| output.name.as_str());
            return Err(Failure::unknown(&format!("feature of service `{}` named", model.service.name), name, known));
        }
        if !(0.0..f64::INFINITY).contains(importance) {
            let text = format!("the importance of `{name}` is {importance}; give a number from 0 on");
            return Err(Failure::invalid(text));
        }
    }
    Ok(())
}

fn parse<T: std::str::FromStr<Err = NameError>>(text: &str) -> Result<T, Failure> {
    text.parse().map_err(|error: NameError| Failure::invalid(error.to_string()))
}

fn runtime_name(model: &ModelPlan) -> &'static str {
    match model.runtime {
        feature_defs::catalog::Runtime::TorchScript => "torchscript",
        feature_defs::catalog::Runtime::Pt2 => "pt2",
    }
}

fn project<'a>(state: &'a State, gateway: &Gateway) -> Option<&'a Project> {
    state.project(gateway.project.as_str())
}

fn models(gateway: &Gateway, project: &Project) -> Vec<v1::ModelInfo> {
    let versions =
        project.models.iter().flat_map(|(name, versions)| versions.values().map(move |record| (name, record)));
    let others = gateway.presence.others();
    let info = versions.map(|(name, record)| {
        let model = &record.model;
        let approvals = record.approvals.values().map(|fact| v1::Approval {
            who: fact.who.clone(),
            why: fact.why.clone().unwrap_or_default(),
            at: fact.at.to_rfc3339(),
        });
        let given_up = project.deployments.get(name).and_then(|deployment| deployment.given_up.get(&record.version));
        let reasons = given_up.map(|given_up| given_up.reasons.values().cloned().collect::<Vec<_>>().join("; "));
        v1::ModelInfo {
            name: name.to_string(),
            version: record.version.0,
            digest: model.artifact.sha256.to_string(),
            service: model.service.to_string(),
            service_digest: model.service_digest.to_string(),
            author: model.author.clone(),
            commit: model.commit.clone(),
            environment_digest: model.environment_digest.clone(),
            seed: model.seed,
            hardware: model.hardware.clone(),
            libraries: model.libraries.clone().into_iter().collect(),
            dataset: model.dataset.as_ref().map(DatasetId::to_string).unwrap_or_default(),
            metrics: model.metrics.clone().into_iter().collect(),
            registered_at: record.registered.at.to_rfc3339(),
            state: project.standing(name.as_str(), record.version).to_string(),
            approvals: approvals.collect(),
            golden_digest: model.golden_rows.as_ref().map(|golden| golden.sha256.to_string()).unwrap_or_default(),
            gateways: deploy::reports(gateway, &others, &(name.clone(), record.version)),
            given_up: reasons.unwrap_or_default(),
        }
    });
    info.collect()
}

fn datasets(project: &Project) -> Vec<v1::DatasetInfo> {
    let info = project.datasets.values().map(|record| {
        let dataset = &record.dataset;
        v1::DatasetInfo {
            name: dataset.name.to_string(),
            id: dataset.id.to_string(),
            service: dataset.service.to_string(),
            service_digest: dataset.service_digest.to_string(),
            rows: dataset.rows,
            location: dataset.manifest.clone(),
            created_at: record.created.at.to_rfc3339(),
        }
    });
    info.collect()
}

fn catalog(project: &str, served: &Served, ready: &[bool]) -> v1::GetCatalogResponse {
    let mut response = v1::GetCatalogResponse {
        project: project.to_owned(),
        control_head: served.head.0,
        ..v1::GetCatalogResponse::default()
    };
    let Some(definitions) = &served.definitions else { return response };
    let plan: &Plan = &definitions.plan;
    response.catalog_digest = definitions.catalog_digest.to_string();
    response.views = plan
        .views
        .iter()
        .enumerate()
        .map(|(index, view)| v1::ViewInfo {
            name: view.name.to_string(),
            entity: view.entity.to_string(),
            storage_digest: view.storage_digest.to_string(),
            semantic_digest: view.semantic_digest.to_string(),
            ready: ready.get(index).copied().unwrap_or(false),
        })
        .collect();
    response.services = plan
        .services
        .iter()
        .map(|service| v1::ServiceInfo {
            name: service.name.to_string(),
            semantic_digest: service.semantic_digest.to_string(),
            inputs: service
                .columns
                .iter()
                .map(|column| named(&column.name, &column.column_type, column.nullable))
                .collect(),
            features: service.outputs.iter().map(|output| named(&output.name, &output.feature_type, true)).collect(),
            units: units(plan, service),
        })
        .collect();
    response.sources = plan
        .sources
        .iter()
        .map(|source| v1::SourceInfo {
            name: source.name.to_string(),
            kind: match source.kind {
                SourceKind::Files { .. } => "files",
                SourceKind::Static { .. } => "static",
                SourceKind::Stream { .. } => "stream",
            }
            .to_owned(),
            schema: source.schema.iter().map(|(name, column_type)| named(name, column_type, true)).collect(),
            event_time: source.event_time.clone().unwrap_or_default(),
            created_time: source.created_time.clone().unwrap_or_default(),
        })
        .collect();
    response
}

/// Keys of units that canaries randomise and the service does not take.
fn units(plan: &Plan, service: &ServicePlan) -> Vec<v1::NamedType> {
    let of_service = plan.models.iter().filter(|model| model.service.name == service.name);
    let keys = of_service.flat_map(|model| &model.rollout.unit).filter(|key| key.column.is_none());
    let mut units: Vec<v1::NamedType> = keys.map(|key| named(&key.name, &key.key_type, true)).collect();
    units.sort_by(|a, b| a.name.cmp(&b.name));
    units.dedup_by(|a, b| a.name == b.name);
    units
}

fn named(name: &str, value_type: &Type, nullable: bool) -> v1::NamedType {
    v1::NamedType { name: name.to_owned(), r#type: value_type.to_string(), nullable }
}
