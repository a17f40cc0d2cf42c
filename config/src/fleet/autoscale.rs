//! `pools[].autoscale:` of the fleet document.

use std::path::PathBuf;
use std::time::Duration;

use super::defaults;
use super::listen::{URL_EXPECTED, url};
use crate::choice::{Choice, choice};
use crate::names::Role;
use crate::reader::{Section, Text};

/// How the number of replicas of a pool may change by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Autoscale {
    /// Never fewer.
    pub min: u32,
    /// Never more.
    pub max: u32,
    /// What the pool is kept to.
    pub target: ScaleTarget,
    /// Percent by which a signal must leave its target before anything changes.
    pub tolerance_percent: u32,
    /// A signal must be above its target for so long before the pool grows.
    pub up_after: Duration,
    /// Fewer workers must have been enough for so long before the pool shrinks.
    pub down_after: Duration,
    /// Whether decisions are only told, logged and exported.
    pub dry_run: bool,
    /// Who starts and stops workers.
    pub scaler: ScalerSpec,
}

/// The signals a pool is kept below; `None` where it is not looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ScaleTarget {
    /// Time for which prompts wait: prompt tokens not computed yet, by the measured speed.
    pub queue_wait: Option<Duration>,
    /// The wait and the computing of a typical prompt.
    pub ttft: Option<Duration>,
    /// Percent of the KV blocks that requests hold, or wait for.
    pub kv_percent: Option<u32>,
    /// Time between two tokens of a stream.
    pub itl: Option<Duration>,
}

choice! {
    /// Who starts and stops workers.
    ScalerKind {
        /// Nobody; the desired number is only exported.
        None => "none",
        /// `baton up`, as child processes.
        Process => "process",
        /// The scale subresource of a Kubernetes object.
        Kubernetes => "kubernetes",
        /// A web hook.
        Webhook => "webhook",
    }
}

/// Who starts and stops workers, and how to reach it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ScalerSpec {
    /// [`ScalerKind::None`].
    None,
    /// [`ScalerKind::Process`].
    Process,
    /// [`ScalerKind::Kubernetes`].
    Kubernetes(KubernetesSpec),
    /// [`ScalerKind::Webhook`].
    Webhook(WebhookSpec),
}

/// The object whose scale subresource is patched.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KubernetesSpec {
    /// Its namespace.
    pub namespace: String,
    /// What it is.
    pub kind: WorkloadKind,
    /// Its name.
    pub name: String,
    /// How to reach the API server; without it as a pod does, else as `kubectl` would.
    pub kubeconfig: Option<PathBuf>,
}

choice! {
    /// What Kubernetes can scale.
    WorkloadKind {
        /// `apps/v1` Deployment.
        Deployment => "Deployment",
        /// `apps/v1` StatefulSet.
        StatefulSet => "StatefulSet",
    }
}

/// A web hook.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WebhookSpec {
    /// Where decisions are POSTed.
    pub url: String,
    /// Time for one attempt.
    pub timeout: Duration,
    /// PEM file of the authorities trusted instead of the system's.
    pub ca_file: Option<PathBuf>,
    /// File of the secret that the receiver knows us by.
    pub secret_file: Option<PathBuf>,
    /// How the secret is used.
    pub auth: WebhookAuth,
}

choice! {
    /// What is made of a web hook's secret.
    WebhookAuth {
        /// `X-Baton-Signature: sha256=HEX`, the HMAC of the body.
        Hmac => "hmac",
        /// `Authorization: Bearer SECRET`.
        Bearer => "bearer",
    }
}

impl Autoscale {
    /// The defaults for a pool of that role.
    pub fn new(role: Role, min: u32, max: u32) -> Self {
        let prefill = role.prefills().then_some(defaults::QUEUE_WAIT);
        let decode = role.decodes().then_some(defaults::KV_OCCUPANCY);
        Self {
            min,
            max,
            target: ScaleTarget { queue_wait: prefill, ttft: None, kv_percent: decode, itl: None },
            tolerance_percent: defaults::SCALE_TOLERANCE,
            up_after: defaults::SCALE_UP_AFTER,
            down_after: defaults::SCALE_DOWN_AFTER,
            dry_run: false,
            scaler: ScalerSpec::None,
        }
    }

    pub(super) fn read(mut section: Section<'_, '_>, role: Option<Role>, replicas: u32) -> Self {
        let min = section.count("min", 0..=1024, defaults::AUTOSCALE_MIN);
        let max = section.count("max", 1..=1024, replicas.max(1));
        let target = ScaleTarget::read(section.section("target"), role);
        let tolerance_percent = section.count("tolerance_percent", 0..=50, defaults::SCALE_TOLERANCE);
        let up_after = section.duration("up_after_ms", 0..=3_600_000, defaults::SCALE_UP_AFTER);
        let down_after = section.duration("down_after_ms", 1_000..=86_400_000, defaults::SCALE_DOWN_AFTER);
        let dry_run = section.flag("dry_run", false);
        let scaler = ScalerSpec::read(&mut section);
        if min > max {
            let at = section.reader.position(&section.child("min")).or(section.at);
            let problem = format!("is {min}, more than max, which is {max}");
            section.reader.fault(&section.child("min"), at, problem, "lower min or raise max");
        } else if !(min..=max).contains(&replicas) {
            let problem =
                format!("goes from {min} to {max}, which leaves out the {replicas} replicas of the pool");
            section.reader.fault(&section.path, section.at, problem, "widen it or change replicas");
        }
        Self { min, max, target, tolerance_percent, up_after, down_after, dry_run, scaler }
    }
}

impl ScaleTarget {
    fn read(mut section: Section<'_, '_>, role: Option<Role>) -> Self {
        for (key, wanted, other) in [
            ("queue_wait_ms", Role::Prefill, "kv_occupancy or itl_ms"),
            ("ttft_ms", Role::Prefill, "kv_occupancy or itl_ms"),
            ("kv_occupancy", Role::Decode, "queue_wait_ms or ttft_ms"),
            ("itl_ms", Role::Decode, "queue_wait_ms or ttft_ms"),
        ] {
            let strange = match wanted {
                Role::Prefill => role.is_some_and(|role| !role.prefills()),
                _ => role.is_some_and(|role| !role.decodes()),
            };
            if strange && section.has(key) {
                let at = section.position(key);
                let problem = format!("is a target of {wanted} workers, which this pool has none of");
                let remedy = format!("remove it, or set {other} instead");
                section.reader.fault(&section.child(key), at.or(section.at), problem, remedy);
            }
        }
        let of = |role: Option<Role>, does: fn(Role) -> bool| role.is_none_or(does);
        let millis = |section: &mut Section<'_, '_>, key: &'static str| {
            let expected = "a whole number of milliseconds from 1 to 600000";
            let parse = |text: &Text| text.integer().filter(|ms| (1..=600_000).contains(ms));
            section.optional(key, expected, parse).map(Duration::from_millis)
        };
        let queue_wait = if of(role, Role::prefills) {
            Some(section.duration("queue_wait_ms", 1..=600_000, defaults::QUEUE_WAIT))
        } else {
            section.take("queue_wait_ms");
            None
        };
        let kv_percent = if of(role, Role::decodes) {
            Some(section.count("kv_occupancy", 1..=100, defaults::KV_OCCUPANCY))
        } else {
            section.take("kv_occupancy");
            None
        };
        let (ttft, itl) = (millis(&mut section, "ttft_ms"), millis(&mut section, "itl_ms"));
        Self { queue_wait, ttft, kv_percent, itl }
    }
}

impl ScalerSpec {
    /// Its kind.
    pub fn kind(&self) -> ScalerKind {
        match self {
            Self::None => ScalerKind::None,
            Self::Process => ScalerKind::Process,
            Self::Kubernetes(_) => ScalerKind::Kubernetes,
            Self::Webhook(_) => ScalerKind::Webhook,
        }
    }

    fn read(section: &mut Section<'_, '_>) -> Self {
        let kind = section.choice("scaler", defaults::SCALER);
        for (key, of) in [("kubernetes", ScalerKind::Kubernetes), ("webhook", ScalerKind::Webhook)] {
            if kind != of && section.has(key) {
                let at = section.position(key);
                let problem = format!("is given, but the scaler is {kind}");
                let remedy = format!("write scaler: {}, or remove the section", of.word());
                section.reader.fault(&section.child(key), at, problem, remedy);
            } else if kind == of && !section.has(key) {
                section.missing(key, expected(of));
            }
        }
        match kind {
            ScalerKind::None | ScalerKind::Process => {
                section.take("kubernetes");
                section.take("webhook");
                if kind == ScalerKind::None { Self::None } else { Self::Process }
            }
            ScalerKind::Kubernetes => {
                section.take("webhook");
                let given = section.section_if_given("kubernetes");
                given.and_then(KubernetesSpec::read).map_or(Self::None, Self::Kubernetes)
            }
            ScalerKind::Webhook => {
                section.take("kubernetes");
                let given = section.section_if_given("webhook");
                given.and_then(WebhookSpec::read).map_or(Self::None, Self::Webhook)
            }
        }
    }
}

fn expected(kind: ScalerKind) -> &'static str {
    match kind {
        ScalerKind::Kubernetes => "the object to scale, such as { kind: Deployment, name: prefill }",
        _ => "where to POST, such as { url: \"https://scaler.example/baton\" }",
    }
}

impl KubernetesSpec {
    fn read(mut section: Section<'_, '_>) -> Option<Self> {
        let expected = "a name of at most 63 characters of a-z, 0-9 and '-'";
        let namespace = section.value("namespace", expected, defaults::NAMESPACE.to_owned(), label);
        if !section.has("kind") {
            section.missing("kind", "Deployment or StatefulSet");
        }
        let kind = section.choice_if_given::<WorkloadKind>("kind");
        let name = section.required("name", "a name of a-z, 0-9, '-' and '.'", object_name);
        let kubeconfig = section.file("kubeconfig");
        Some(Self { namespace, kind: kind?, name: name?, kubeconfig })
    }
}

/// A DNS label, as names of namespaces are.
fn label(text: &Text) -> Option<String> {
    object_name(text).filter(|name| name.len() <= 63 && !name.contains('.'))
}

/// A DNS name, as names of workloads are.
fn object_name(text: &Text) -> Option<String> {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.');
    let ends = |name: &str| name.starts_with(['-', '.']) || name.ends_with(['-', '.']);
    text.words().filter(|name| name.len() <= 253 && name.chars().all(good) && !ends(name))
}

impl WebhookSpec {
    fn read(mut section: Section<'_, '_>) -> Option<Self> {
        let url = section.required("url", URL_EXPECTED, url);
        let timeout = section.duration("timeout_ms", 100..=8_000, defaults::WEBHOOK_TIMEOUT);
        let ca_file = section.file("ca_file");
        let auth = section.choice("auth", WebhookAuth::Hmac);
        let secret_file = section.file("secret_file");
        let plain = url.as_deref().is_some_and(|url| url.starts_with("http://"));
        if plain && ca_file.is_some() {
            let path = section.child("ca_file");
            let at = section.reader.position(&path);
            section.reader.fault(&path, at, "is given, but the url is not https", "write https:// in url");
        }
        Some(Self { url: url?, timeout, ca_file, secret_file, auth })
    }
}
