//! Scales a Deployment or StatefulSet by its scale subresource.
//!
//! Patches only what differs, on condition that nobody changed it in between. Pods that go get SIGTERM, on which a
//! worker drains: the pod's `terminationGracePeriodSeconds` must leave it the time.

use std::time::Duration;

use baton_config::fleet::{KubernetesSpec, WorkloadKind};
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::autoscaling::v1::Scale;
use kube::api::{Api, Patch, PatchParams};
use kube::config::{Config, KubeConfigOptions, Kubeconfig};
use kube::{Client, Error};
use serde_json::json;

use super::ScalerError;

/// Time to reach the API server.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Time for reading, and for patching.
const CALL_TIMEOUT: Duration = Duration::from_secs(4);
/// Who changed the number, as the API server notes it.
const MANAGER: &str = "baton-autoscaler";
/// Longest part of an answer that is told.
const MESSAGE_MAX_CHARS: usize = 300;

/// One object.
pub(super) struct Kubernetes {
    spec: KubernetesSpec,
    client: Option<Client>,
}

impl Kubernetes {
    pub(super) fn new(spec: KubernetesSpec) -> Self {
        Self { spec, client: None }
    }

    #[cfg(test)]
    pub(super) fn with_client(spec: KubernetesSpec, client: Client) -> Self {
        Self { spec, client: Some(client) }
    }

    /// The number of replicas asked for now.
    pub(super) async fn current(&mut self) -> Result<u32, ScalerError> {
        let objects = self.objects().await?;
        let scale = self.bounded(objects.get()).await?;
        Ok(replicas(&scale))
    }

    /// Asks for `desired` replicas, unless that many are asked for.
    pub(super) async fn scale(&mut self, desired: u32) -> Result<u32, ScalerError> {
        let objects = self.objects().await?;
        let scale = self.bounded(objects.get()).await?;
        if replicas(&scale) == desired {
            return Ok(desired);
        }
        let version = scale.metadata.resource_version;
        let patch = json!({ "metadata": { "resourceVersion": version }, "spec": { "replicas": desired } });
        let patched = self.bounded(objects.patch(patch)).await?;
        Ok(replicas(&patched))
    }

    async fn objects(&mut self) -> Result<Objects, ScalerError> {
        let client = match &self.client {
            Some(client) => client.clone(),
            None => {
                let client = connect(&self.spec).await?;
                self.client.insert(client).clone()
            }
        };
        let (namespace, name) = (&self.spec.namespace, self.spec.name.clone());
        Ok(match self.spec.kind {
            WorkloadKind::Deployment => Objects::Deployments(Api::namespaced(client, namespace), name),
            WorkloadKind::StatefulSet => Objects::StatefulSets(Api::namespaced(client, namespace), name),
        })
    }

    async fn bounded(&self, call: impl Future<Output = Result<Scale, Error>>) -> Result<Scale, ScalerError> {
        match tokio::time::timeout(CALL_TIMEOUT, call).await {
            Ok(Ok(scale)) => Ok(scale),
            Ok(Err(error)) => Err(self.explain(&error)),
            Err(_) => {
                Err(ScalerError(format!("the Kubernetes API server does not answer within {CALL_TIMEOUT:?}")))
            }
        }
    }

    fn explain(&self, error: &Error) -> ScalerError {
        let KubernetesSpec { namespace, kind, name, .. } = &self.spec;
        let resource = format!("{}s", kind.to_string().to_lowercase());
        let Error::Api(status) = error else {
            return ScalerError(format!(
                "the Kubernetes API server can't be reached: {}",
                cut(&chain(error))
            ));
        };
        let said = cut(&status.message);
        ScalerError(match status.code {
            401 => format!(
                "Kubernetes does not know who asks ({said}): check the service account or the kubeconfig"
            ),
            403 => format!(
                "Kubernetes forbids it ({said}): allow the conductor's service account get and patch on {resource}/scale in namespace {namespace}"
            ),
            404 => {
                format!("there is no {kind} {name} in namespace {namespace}: check autoscale.kubernetes")
            }
            409 => format!("{kind} {name} was changed by somebody else meanwhile; trying again"),
            code => format!("the Kubernetes API server answers {code}: {said}"),
        })
    }
}

/// The two kinds of objects; their scale is the same.
enum Objects {
    Deployments(Api<Deployment>, String),
    StatefulSets(Api<StatefulSet>, String),
}

impl Objects {
    async fn get(&self) -> Result<Scale, Error> {
        match self {
            Self::Deployments(api, name) => api.get_scale(name).await,
            Self::StatefulSets(api, name) => api.get_scale(name).await,
        }
    }

    async fn patch(&self, patch: serde_json::Value) -> Result<Scale, Error> {
        let params = PatchParams { field_manager: Some(MANAGER.to_owned()), ..PatchParams::default() };
        let patch = Patch::Merge(patch);
        match self {
            Self::Deployments(api, name) => api.patch_scale(name, &params, &patch).await,
            Self::StatefulSets(api, name) => api.patch_scale(name, &params, &patch).await,
        }
    }
}

/// Without a number, Kubernetes takes it for 1.
fn replicas(scale: &Scale) -> u32 {
    let replicas = scale.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    u32::try_from(replicas).unwrap_or(0)
}

async fn connect(spec: &KubernetesSpec) -> Result<Client, ScalerError> {
    let fault = |error: &dyn std::error::Error| {
        let why = cut(&chain(error));
        ScalerError(format!("there is no way to Kubernetes ({why}): set autoscale.kubernetes.kubeconfig"))
    };
    let mut config = match &spec.kubeconfig {
        Some(path) => {
            let file = Kubeconfig::read_from(path).map_err(|error| fault(&error))?;
            let options = KubeConfigOptions::default();
            Config::from_custom_kubeconfig(file, &options).await.map_err(|error| fault(&error))?
        }
        None => Config::infer().await.map_err(|error| fault(&error))?,
    };
    (config.connect_timeout, config.read_timeout) = (Some(CONNECT_TIMEOUT), None);
    Client::try_from(config).map_err(|error| fault(&error))
}

/// An error with its causes.
fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    let mut text = error.to_string();
    for cause in causes.map(ToString::to_string) {
        // Many libraries repeat the cause themselves.
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

fn cut(text: &str) -> String {
    text.chars().take(MESSAGE_MAX_CHARS).collect()
}
